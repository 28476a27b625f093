"""Names of adapters in a model, which become attributes of its graph."""

from __future__ import annotations

import keyword

from gralora_fx.errors import ConfigError


def refuse_name(name: object) -> ConfigError:
    """The error for a name that cannot be one of an adapter."""
    return ConfigError(
        f"{name!r} cannot name an adapter; use letters, digits, _ and -, no dots, no attribute of nn.Module and no "
        "Python keyword"
    )


def check_adapter_letters(name: object) -> None:
    """Check that a name can be part of an attribute path, of code and of a file path, as far as its letters tell.

    Raises:
        ConfigError: It is not a string, is empty or a Python keyword, or holds a dot, a slash, a quote or an
            unprintable character.
    """
    is_fit = (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not set(name) & set("./\\'\"")
        and not keyword.iskeyword(name)
    )
    if not is_fit:
        raise refuse_name(name)
