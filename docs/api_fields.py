"""Griffe extension for the API page: lists the fields of dataclasses and named tuples in a table.

A field's description is the comment above it in the source.
"""

import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function, Parameter, Parameters


class Fields(Extension):
    """Adds an `Args:` section, or `Attributes:` where no field has a default, to each docstring."""

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """Runs for every class that is loaded."""
        named_tuple = any(str(base) == "NamedTuple" for base in cls.bases)
        dataclass = any("dataclass" in str(each.value) for each in cls.decorators)
        if cls.docstring is None or not (named_tuple or dataclass):
            return
        fields = [
            member
            for member in cls.members.values()
            if isinstance(member, Attribute) and member.annotation is not None
            if "property" not in member.labels
        ]
        has_defaults = any(field.value is not None for field in fields)
        if named_tuple and has_defaults:
            parameters = (
                Parameter(f.name, annotation=f.annotation, default=f.value) for f in fields
            )
            cls.set_member("__init__", Function("__init__", parameters=Parameters(*parameters)))
        listed = [f"    {field.name}: {_comment(field)}" for field in fields]
        section = "\n".join(["Args:" if has_defaults else "Attributes:", *listed])
        summary, *rest = re.split(r"\n\n(?=Raises:|Examples:)", cls.docstring.value, maxsplit=1)
        text = "\n\n".join([summary, section, *rest])
        cls.docstring = Docstring(text, parent=cls, parser=cls.docstring.parser)


def _comment(field: Attribute) -> str:
    """Returns the comment above a field or behind it; without one, a dash."""
    source = field.lines_collection[field.filepath]
    assert field.lineno is not None
    line = field.lineno - 1
    if "  # " in source[line]:
        return source[line].split("  # ", 1)[1]
    found: list[str] = []
    while (text := source[line - 1].strip()).startswith("#"):
        found.insert(0, text.removeprefix("#").strip())
        line -= 1
    return " ".join(found) or "–"
