"""Work loads the files that it needs, and no more of those that other models, options or requests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loaded_files import JOBS, loaded

# the most files that each job may load; lower them with what it loads
MOST = {
    "trace, rewrite, merge: two layers": 82,
    "export: Llama, merged, verified": 183,
    "load and generate": 55,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Return the files that each job loads; the last one reads what the one before it wrote."""
    export = tmp_path_factory.mktemp("loaded") / "export"
    return {job.name: loaded(job.program, export) for job in JOBS if job.name in MOST}


@pytest.mark.parametrize("job", MOST)
def test_a_job_loads_no_more_files_than_it_did(job: str, files: dict[str, list[Path]]) -> None:
    assert len(files[job]) <= MOST[job], f"{job} loads {len(files[job])} files; import what it does not need later"


def test_a_net_of_two_layers_needs_no_cache_image_picture_or_file(files: dict[str, list[Path]]) -> None:
    names = {file.relative_to(Path(__file__).resolve().parents[1]).as_posix() for file in files[next(iter(MOST))]}
    others = ("picture/", "inputs/cache", "image", "quantiz", "adapter_files", "methods/lora.py")
    assert [name for name in sorted(names) if any(other in name for other in others)] == []


@pytest.mark.parametrize("job", MOST)
@pytest.mark.parametrize("feature", ["experts", "images", "nf4", "sentences", "states"])
def test_a_model_without_a_features_layers_loads_at_most_what_recognises_them(
    feature: str, job: str, files: dict[str, list[Path]]
) -> None:
    names = {file.name for file in files[job] if file.parent.parent.name == "features" and file.parent.name == feature}
    recognising = {"__init__.py", "recognised.py"} if feature in {"experts", "states"} else set[str]()
    assert names == (recognising if "Llama" in job else set())


def test_an_export_is_opened_without_torchs_exporter_or_configurations(files: dict[str, list[Path]]) -> None:
    root = Path(__file__).resolve().parents[1]
    folders = {file.relative_to(root).parent.as_posix() for file in files["load and generate"]}
    unneeded = {"core/adapters", "core/methods", "core/model", "core/planning", "core/graph", "picture"}
    assert folders.isdisjoint({f"gralora_fx/{folder}" for folder in unneeded})
