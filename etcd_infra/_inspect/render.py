"""Info objects in, a table or JSON out; pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

MANY_FIELDS: Final = 8


def to_json(found: object) -> str:
    """Render an info object, or several, as indented JSON with sorted keys."""
    return msgspec.json.format(msgspec.json.encode(found, order="sorted"), indent=2).decode()


def to_table(kind: str, infos: Sequence[Any], *, now: float) -> Table | str:
    """
    Render info objects of one kind: a row each, or with many fields a column each.

    Args:
        kind: The title.
        infos: Dataclasses of one type.
        now: Unix seconds, for ages.
    """
    if not infos:
        return f"{kind}: none"
    table = Table(title=kind, title_justify="left")
    names = [field.name for field in dataclasses.fields(infos[0])]
    titles = [name.removesuffix("_at").replace("_", " ") for name in names]
    cells = [[_cell(name, getattr(info, name), now) for name in names] for info in infos]
    if len(names) > MANY_FIELDS:
        table.show_header = False
        for row in zip(titles, *cells, strict=True):
            table.add_row(*row)
        return table
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def _cell(name: str, value: object, now: float) -> str:  # noqa: PLR0911 - one per kind of value
    match value:
        case None | ():
            return "-"
        case bool():
            return "yes" if value else "no"
        case float() if name.endswith("_at"):
            return f"{_age(now - value)} ago"
        case float():
            return f"{value * 1000:.1f} ms"
        case int() if "ttl" in name:
            return f"{value} s"
        case tuple() if name.endswith("_at"):
            return "\n".join(_cell(name, item, now) for item in value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        case tuple():
            return "\n".join(str(item) for item in value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        case _:
            return str(value)


def _age(seconds: float) -> str:
    whole = max(0, round(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
