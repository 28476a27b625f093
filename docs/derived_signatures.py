"""Signatures that the source does not spell out, for the API reference.

They are those of the methods that `GraloraModel` has of the base model, `name = _of_base_model(View.name)`.
"""

from __future__ import annotations

import copy
from typing import Any

import griffe


class BaseModelMethods(griffe.Extension):
    """Gives a class the method that an attribute is made of, with its signature and its documentation."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the attributes, now that the classes whose methods they are made of are loaded."""
        for module in _modules(pkg):
            for cls in (found for found in module.classes.values() if not found.is_alias):
                own = (item for item in cls.members.items() if not item[1].is_alias and item[1].is_attribute)
                for name, attribute in list(own):
                    value = attribute.value
                    if isinstance(value, griffe.ExprCall) and value.canonical_path.endswith("._of_base_model"):
                        view, method = str(value.arguments[0]).rsplit(".", 1)
                        found = copy.copy(pkg.modules_collection[f"{cls.resolve(view)}.{method}"])
                        found.lineno, found.endlineno = attribute.lineno, attribute.endlineno  # the order of the page
                        cls.set_member(name, found)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    below = [found for found in module.modules.values() if not found.is_alias]
    return [module, *(deeper for found in below for deeper in _modules(found))]
