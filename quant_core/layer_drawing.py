"""The map of layers, drawn: tables of cells, a column per block of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from .drawing import SMALL, TEXT, Sheet, font, shortened, wrapped
from .layer_cells import CELL, INSIDE, Palette, draw_cell
from .layer_map import Section, sections
from .layer_report import LayerReport, percent

_TALLEST = 40  # rows of a table, beyond which it goes on beside
_LONGEST = 290  # pixels of a layer's name
_NARROWEST = 300  # pixels of a component with its line of text
_GAP, _BELOW = 28, 24  # pixels: between tables, and from one row of components to the next


class _Piece(NamedTuple):
    """A part of a section that fits onto the sheet."""

    section: Section
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    title: str
    names: float  # width of the rows' names
    width: float


def draw_maps(
    sheet: Sheet, palette: Palette, layers: Sequence[LayerReport], left: float, top: float, right: float
) -> float:
    """The layers of each component, beside one another where they fit; returns where they end."""
    x, bottom = left, top
    for name in dict.fromkeys(layer.component for layer in layers):
        own = [layer for layer in layers if layer.component == name]
        pieces = list(_pieces(sections(own), right - left)) if any(layer.is_quantized for layer in own) else []
        abreast = sum(piece.width for piece in pieces) + _GAP * (len(pieces) - 1)
        width = min(max(abreast, _NARROWEST), right - left)
        if x > left and x + width > right:
            x, top = left, bottom + _BELOW
        bottom = max(bottom, _draw_component(sheet, palette, name, own, pieces, (x, top, x + width)))
        x += width + 2 * _GAP
    return bottom


def _draw_component(
    sheet: Sheet,
    palette: Palette,
    name: str,
    layers: Sequence[LayerReport],
    pieces: Sequence[_Piece],
    place: tuple[float, float, float],
) -> float:
    left, top, right = place
    sheet.text(left, top, shortened(name, TEXT, right - left))
    top += 21
    for line in wrapped(_summary(layers), SMALL, right - left):
        sheet.text(left, top, line, sheet.theme.faint, SMALL)
        top += 18
    x, top, bottom = left, top + 8, top
    for piece in pieces:
        if x > left and x + piece.width > right + 1:
            x, top = left, bottom + 14
        bottom = max(bottom, _draw_piece(sheet, palette, piece, x, top))
        x += piece.width + _GAP
    return bottom


def _summary(layers: Sequence[LayerReport]) -> str:
    counts = Counter(layer.format for layer in layers if layer.is_quantized)
    left_out = sum(bool(layer.left_out) for layer in layers)
    parts = [f"{count} {name}" for name, count in counts.items()] + [f"{left_out} left out"] * bool(left_out)
    whole = (
        f"all {parts[0].split(' ', 1)[1]}" if len(parts) == 1 and counts.total() == len(layers) else ", ".join(parts)
    )
    text = f"{len(layers)} linear layers, {whole or 'none of them quantized'}"
    errors = {layer.name: layer.error for layer in layers if layer.error is not None}
    if errors:
        worst = max(errors, key=errors.get)
        text += (
            f"; error {percent(median(errors.values()))} in the median, {percent(errors[worst])} at most, in {worst}"
        )
    elif note := next((layer.error_note for layer in layers if layer.error_note), ""):
        text += f"; no errors: {note}"
    return text


def _pieces(found: Sequence[Section], most: float) -> Iterator[_Piece]:
    for section in found:
        title = shortened(section.title or "outside of blocks", SMALL, most)
        names = max(font(SMALL).getlength(shortened(row, SMALL, _LONGEST)) for row in section.rows) + 6
        many = max(1, int((most - names) // CELL))
        for first in range(0, len(section.rows), _TALLEST):
            for start in range(0, len(section.columns), many):
                columns = section.columns[start : start + many]
                width = max(names + len(columns) * CELL, font(SMALL).getlength(title))
                yield _Piece(section, columns, section.rows[first : first + _TALLEST], title, names, width)


def _draw_piece(sheet: Sheet, palette: Palette, piece: _Piece, x: float, y: float) -> float:
    sheet.text(x, y, piece.title, sheet.theme.faint, SMALL)
    y += 18
    first = x + piece.names
    step = 1 if len(piece.columns) <= 8 and max(map(len, piece.columns)) <= 2 else 5
    for place, column in enumerate(piece.columns[::step]):
        if column:
            middle = first + place * step * CELL + INSIDE / 2
            sheet.text(middle, y, shortened(column, SMALL, step * CELL - 2), sheet.theme.faint, SMALL, anchor="ma")
    y += 18
    for row in piece.rows:
        sheet.text(first - 6, y + INSIDE / 2, shortened(row, SMALL, _LONGEST), size=SMALL, anchor="rm")
        for place, column in enumerate(piece.columns):
            if layer := piece.section.cells.get((column, row)):
                draw_cell(sheet, palette, layer, first + place * CELL, y)
        y += CELL
    return y
