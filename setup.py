"""The packages, found: `exporters/` is installed as `gralora_fx.exporters`, which pyproject.toml could only list."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["gralora_fx", "gralora_fx.*"], exclude=["gralora_fx.exporters*"]),  # the link to it
        "gralora_fx.exporters",
        *(f"gralora_fx.exporters.{name}" for name in find_packages("exporters")),
    ],
)
