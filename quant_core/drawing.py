"""What the pictures have in common: themes, the font, and a sheet that is as long as what is drawn on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

TEXT, SMALL = 15, 13  # sizes of letters in pixels


class Theme(NamedTuple):
    """The colours of a picture."""

    ink: Colour
    faint: Colour  # of what is said beside
    paper: Colour
    line: Colour  # of frames, and of bars to compare with
    colours: tuple[Colour, ...]  # to tell things apart


LIGHT = Theme(
    (28, 30, 36),
    (100, 106, 118),
    (250, 250, 248),
    (214, 217, 222),
    ((33, 102, 172), (178, 24, 43), (27, 120, 55), (118, 42, 131), (166, 97, 26), (1, 102, 94), (90, 90, 90)),
)
DARK = Theme(
    (236, 238, 242),
    (152, 159, 172),
    (26, 28, 34),
    (66, 70, 80),
    (
        (92, 168, 244),
        (248, 112, 116),
        (98, 204, 128),
        (200, 138, 232),
        (238, 172, 84),
        (70, 204, 192),
        (182, 182, 182),
    ),
)
THEMES = {"light": LIGHT, "dark": DARK}


@cache
def font(size: int) -> ImageFont.ImageFont:
    """The font that comes with Pillow, in a size in pixels."""
    return ImageFont.load_default(size)


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as (1, H, W, C) floats in 0..1."""
    return torch.from_numpy(numpy.array(picture)).float().div(255).unsqueeze(0)


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes have a point inside both."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def mixed(one: Colour, other: Colour, part: float) -> Colour:
    """A colour between two, `part` of the way to the other."""
    return tuple(round(a + (b - a) * part) for a, b in zip(one, other, strict=True))


def shortened(text: str, size: int, width: float) -> str:
    """The text, its middle left out as far as it has to be to fit into a width."""
    if font(size).getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if font(size).getlength(short) <= width:
            return short
    return "…"


def wrapped(text: str, size: int, width: float) -> list[str]:
    """Lines of words that fit into a width; a longer word is shortened."""
    lines: list[str] = []
    for word in (shortened(word, size, width) for word in text.split()):
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


class Label(NamedTuple):
    """A text on a sheet, and the box of its letters."""

    text: str
    box: Box


class Sheet:
    """A picture of a fixed width. It remembers its labels, so that it can be told whether one covers another."""

    def __init__(self, width: int, theme: Theme):
        self.width = width
        self.theme = theme
        self.labels: list[Label] = []
        self._bottom = 0.0
        self._marks: list[Callable[[ImageDraw.ImageDraw], None]] = []

    def text(
        self, x: float, y: float, text: str, colour: Colour | None = None, size: int = TEXT, anchor: str = "la"
    ) -> None:
        """Write a line, at a point that `anchor` explains as Pillow does."""
        colour = colour or self.theme.ink
        left, top, right, bottom = font(size).getbbox(text, anchor=anchor)
        self.labels.append(Label(text, (x + left, y + top, x + right, y + bottom)))
        self._mark(y + bottom, lambda draw: draw.text((x, y), text, colour, font(size), anchor=anchor))

    def box(self, box: Box, fill: Colour | None = None, outline: Colour | None = None) -> None:
        """Draw a rectangle, right and bottom edge outside."""
        inside = (box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1))
        self._mark(box[3], lambda draw: draw.rectangle(inside, fill, outline))

    def hatched(self, box: Box, colour: Colour) -> None:
        """Draw a rectangle of rising lines."""
        left, top, right, bottom = (round(edge) for edge in (box[0], box[1], box[2] - 1, box[3] - 1))
        for start in range(left - (bottom - top) + 2, right, 4):
            low, high = max(start, left), min(start + bottom - top, right)
            self._line(low, bottom - (low - start), high, bottom - (high - start), colour)
        self.box(box, None, colour)

    def _line(self, x: float, y: float, to_x: float, to_y: float, colour: Colour) -> None:
        self._mark(y, lambda draw: draw.line((x, y, to_x, to_y), colour))

    def _mark(self, bottom: float, mark: Callable[[ImageDraw.ImageDraw], None]) -> None:
        self._bottom = max(self._bottom, bottom)
        self._marks.append(mark)

    def image(self, margin: int) -> Image.Image:
        """The picture, with a margin below what is drawn."""
        picture = Image.new("RGB", (self.width, round(self._bottom) + margin), self.theme.paper)
        draw = ImageDraw.Draw(picture)
        for mark in self._marks:
            mark(draw)
        return picture
