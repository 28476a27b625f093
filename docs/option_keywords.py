"""The keywords of a function that takes the options of a record, for the API reference: `@by_keywords(Record)`."""

from __future__ import annotations

from typing import Any

import griffe


class OptionKeywords(griffe.Extension):
    """Gives such a function the fields of the record as keywords, in place of its last parameter."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the parameter, now that the record's class is loaded."""
        for module in _modules(pkg):
            for function in (found for found in module.functions.values() if not found.is_alias):
                for value in (decorator.value for decorator in function.decorators):
                    if isinstance(value, griffe.ExprCall) and value.canonical_path.endswith("by_keywords"):
                        record = pkg.modules_collection[value.arguments[0].canonical_path]  # type: ignore[union-attr]
                        del function.parameters[function.parameters[-1].name]
                        for field in record.attributes.values():
                            if isinstance(field.annotation, griffe.ExprSubscript):
                                function.parameters.add(_keyword(field))


def _keyword(field: griffe.Attribute) -> griffe.Parameter:
    declared: Any = field.annotation
    return griffe.Parameter(
        field.name,
        annotation=declared.slice.elements[0],  # of Annotated[type, Option(...)]
        kind=griffe.ParameterKind.keyword_only,
        default=field.value,
    )


def _modules(module: griffe.Module) -> list[griffe.Module]:
    below = [found for found in module.modules.values() if not found.is_alias]
    return [module, *(deeper for found in below for deeper in _modules(found))]
