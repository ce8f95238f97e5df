"""A cell per linear layer: its colour is the format, how strong it is the error; and the legend that says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from .drawing import SMALL, Colour, Sheet, Theme, font, mixed, shortened, wrapped
from .layer_report import LayerReport

CELL, INSIDE = 18, 16  # pixels: from one cell to the next, and of a cell
_ORDER = (0, 4, 2, 3, 5, 1)  # of a theme's colours: blue and orange first, which everybody tells apart, and no grey
_PALEST = 0.28  # of a colour, for the smallest error
_GAP = 28  # pixels between two entries of the legend


class Palette:
    """The colour of each format, and how strong it is for an error."""

    def __init__(self, layers: Sequence[LayerReport], theme: Theme):
        self.theme = theme
        formats = dict.fromkeys(layer.format for layer in layers if layer.is_quantized)
        self.colours = {name: theme.colours[_ORDER[place % len(_ORDER)]] for place, name in enumerate(formats)}
        errors = [layer.error for layer in layers if layer.error]
        self.span = (_round(min(errors), down=True), _round(max(errors), down=False)) if errors else None

    def shade(self, name: str, error: float | None) -> Colour:
        """A format's colour for an error, in full where no errors are shown."""
        if self.span is None or error is None:
            return self.colours[name]
        low, high = self.span
        part = math.log(max(error, low) / low) / math.log(high / low)
        return mixed(self.theme.paper, self.colours[name], _PALEST + (1 - _PALEST) * min(part, 1.0))


def _round(error: float, down: bool) -> float:
    """The next 1, 2 or 5 times a power of ten beyond an error."""
    power = 10.0 ** math.floor(math.log10(error))
    steps = [power * factor for factor in (0.5, 1, 2, 5, 10, 20)]
    return max(step for step in steps if step < error) if down else min(step for step in steps if step > error)


def draw_cell(sheet: Sheet, palette: Palette, layer: LayerReport, x: float, y: float) -> None:
    """Draw a layer: hatched if it is not quantized, a frame if its error is not known where others are."""
    box = (x, y, x + INSIDE, y + INSIDE)
    if not layer.is_quantized:
        sheet.hatched(box, sheet.theme.faint)
    elif palette.span and layer.error is None:
        sheet.box(box, None, palette.colours[layer.format])
    else:
        sheet.box(box, palette.shade(layer.format, layer.error))


def draw_legend(
    sheet: Sheet, palette: Palette, layers: Sequence[LayerReport], left: float, top: float, right: float
) -> float:
    """What the cells mean; returns where it ends."""
    told = "The colour of a layer is its format. Errors were not measured."
    if palette.span:
        low, high = (f"{100 * error:g}%" for error in palette.span)
        told = "The colour of a layer is its format; the stronger, the larger the relative error of its outputs, "
        told += f"from {low} to {high} on a log scale."
    for line in wrapped(told, SMALL, right - left):
        sheet.text(left, top, line, sheet.theme.faint, SMALL)
        top += 18
    x, top = left, top + 8
    for examples, text in _entries(palette, layers):
        before = len(examples) * CELL + 6
        text = shortened(text, SMALL, right - left - before)
        width = before + font(SMALL).getlength(text)
        if x > left and x + width > right:
            x, top = left, top + 24
        for place, example in enumerate(examples):
            draw_cell(sheet, palette, example, x + place * CELL, top)
        sheet.text(x + before, top + INSIDE / 2, text, size=SMALL, anchor="lm")
        x += width + _GAP
    return top + INSIDE


def _entries(palette: Palette, layers: Sequence[LayerReport]) -> Iterator[tuple[list[LayerReport], str]]:
    """Layers as examples, and what they stand for."""
    counts = Counter(layer.format for layer in layers if layer.is_quantized)
    low, high = palette.span or (0.0, 0.0)
    steps = [low * (high / low) ** (step / 4) for step in range(5)] if palette.span else [None]
    for name, count in counts.items():
        yield [_example(name, error) for error in steps], f"{name} ({count})"
    if palette.span and (count := sum(layer.is_quantized and layer.error is None for layer in layers)):
        yield [_example(next(iter(counts)), None)], f"error not known ({count})"
    if count := sum(bool(layer.left_out) for layer in layers):
        yield [_example("", None)], f"left out ({count})"


def _example(name: str, error: float | None) -> LayerReport:
    return LayerReport("", "", (1, 1), name, bool(name), 0, 0, "", error)
