"""The methods that `GraloraModel` takes from its parts, for the API reference: `name = delegate("_part", P.name)`."""

from __future__ import annotations

import copy
from typing import Any

import griffe


class DelegatedMethods(griffe.Extension):
    """Gives a class the method that an attribute delegates to, with its signature and its documentation."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the attributes, now that the classes of the parts are loaded."""
        for module in _modules(pkg):
            for cls in (found for found in module.classes.values() if not found.is_alias):
                for name, attribute in list(cls.attributes.items()):
                    value = attribute.value
                    if isinstance(value, griffe.ExprCall) and value.canonical_path.endswith(".delegate"):
                        part, _, method = str(value.arguments[1]).rpartition(".")
                        found = copy.copy(pkg.modules_collection[f"{cls.resolve(part)}.{method}"])
                        found.lineno, found.endlineno = attribute.lineno, attribute.endlineno  # the order of the page
                        cls.set_member(name, found)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    below = [found for found in module.modules.values() if not found.is_alias]
    return [module, *(deeper for found in below for deeper in _modules(found))]
