"""The linear layers of a component as tables: a column per block of the model, a row per layer of such a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .layer_report import LayerReport

_ROWS = 16  # beyond so many kinds of layers, blocks that are mostly blocks of their own are looked into


class Section(NamedTuple):
    """Blocks that are alike, or layers that are in no block."""

    title: str  # what the blocks are called, empty for layers in none
    columns: tuple[str, ...]  # their numbers, one that is empty for layers in none
    rows: tuple[str, ...]  # names of layers inside a block, in the order of the model
    cells: dict[tuple[str, str], LayerReport]  # by column and row; blocks may lack some


def sections(layers: Iterable[LayerReport]) -> list[Section]:
    """The layers of one component, in the order of the model. Blocks are told by the numbers in the layers' names."""
    return list(_sections([(layer.name, layer) for layer in layers], ""))


def _sections(named: list[tuple[str, LayerReport]], prefix: str) -> Iterator[Section]:
    found: dict[str, dict[tuple[str, str], LayerReport]] = {}
    for name, layer in named:
        title, number, rest = _divided(name)
        found.setdefault(title, {})[number, rest] = layer
    for title, cells in found.items():
        columns, rows = (tuple(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
        inner = sum(bool(_divided(row)[0]) for row in rows)
        if title and len(rows) > _ROWS and 2 * inner >= len(rows):
            for number in columns:
                own = [(row, layer) for (column, row), layer in cells.items() if column == number]
                yield from _sections(own, f"{prefix}{title}.{number}.")
        else:
            yield Section((prefix + title).rstrip("."), columns, rows, cells)


def _divided(name: str) -> tuple[str, str, str]:
    """The name of a list of blocks, a number in it, and the rest; a number at the end is a layer's own."""
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        if parts[place].isdigit():
            return ".".join(parts[:place]), parts[place], ".".join(parts[place + 1 :])
    return "", "", name
