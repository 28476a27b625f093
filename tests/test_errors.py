"""Errors keep their class, fields and remedies when another text is put in their place."""

from __future__ import annotations

import pytest

from gralora_fx.errors import CheckpointError, GraloraError, VersionError, in_command, marked, option, without_folder
from gralora_fx.run.generate.request_errors import DeadEndError, UnknownAdapterError, WrongFieldError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "error",
    [
        WrongFieldError("lora_name", f"give {option(overwrite=True)}"),
        DeadEndError("schema", f"give {option(overwrite=True)}"),
        UnknownAdapterError(f"give {option(overwrite=True)}"),
        CheckpointError(f"give {option(overwrite=True)}").about("adapter"),
        VersionError(f"give {option(overwrite=True)}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_reworded_error_keeps_what_is_not_its_text(error: GraloraError) -> None:
    error.extra = 3  # type: ignore[attr-defined]
    other = error.reworded(f"first: {marked(error)}")
    assert type(other) is type(error)
    assert str(other) == f"first: {error}"
    assert in_command(other).endswith("give --overwrite")
    assert (other.field, vars(other)) == (error.field, vars(error))


def test_an_error_about_a_temporary_folder_keeps_its_class_and_field() -> None:
    with pytest.raises(WrongFieldError, match=r"^path: data is wrong$") as raised, without_folder("/tmp/copies"):
        raise WrongFieldError("path", "/tmp/copies/data is wrong")
    assert raised.value.field == "path"
