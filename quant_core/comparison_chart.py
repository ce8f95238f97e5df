"""Quality against bytes, drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from .comparison import REFERENCE, Comparison
from .comparison_report import decibels
from .drawing import LIGHT, TEXT, Box, font, overlap

_NEAR = 16  # pixels from a point within which its label needs no line
_CROSSING = 60.0  # pixels that a label goes further to cross one thing less


class Point(NamedTuple):
    """A plan on the chart."""

    label: str
    footprint: int  # bytes of all components as stored
    psnr: float  # dB, infinite if all pictures are equal
    group: str = ""  # plans of one group have one colour


def chart(comparison: Comparison, size: tuple[int, int] = (900, 560)) -> Image.Image:
    """PSNR over bytes stored, a point per plan; those that no other beats in both are joined."""
    points = {plan.label: Point(plan.label, plan.footprint, plan.psnr) for plan in comparison.plans}
    reference = points.pop(REFERENCE)
    return draw_chart(list(points.values()), reference.footprint, size)


def draw_chart(plans: Sequence[Point], bytes_16bit: int, size: tuple[int, int]) -> Image.Image:
    """The same of figures alone; `bytes_16bit` is where the reference is, `size` in pixels."""
    finite = [plan.psnr for plan in plans if math.isfinite(plan.psnr)]
    low, high = _span(finite or [20.0, 60.0], 1.0)
    left, right = _span([*(plan.footprint / 2**20 for plan in plans), bytes_16bit / 2**20], 0.0)
    sheet = Image.new("RGB", size, LIGHT.paper)
    draw = ImageDraw.Draw(sheet)
    box = (78, 56, size[0] - 24, size[1] - 64)

    def at(mib: float, decibel: float) -> tuple[float, float]:
        share = (mib - left) / (right - left), (min(decibel, high) - low) / (high - low)
        return box[0] + share[0] * (box[2] - box[0]), box[3] - share[1] * (box[3] - box[1])

    draw.text((box[0] - 60, 16), "quality against size: PSNR in dB to the 16-bit pictures", LIGHT.ink, font(18))
    for value in _ticks(low, high):
        y = at(left, value)[1]
        draw.line((box[0], y, box[2], y), (225, 226, 228))
        draw.text((box[0] - 10, y), f"{value:g}", LIGHT.faint, font(TEXT), anchor="rm")
    for value in _ticks(left, right):
        x = at(value, low)[0]
        draw.line((x, box[3], x, box[3] + 5), LIGHT.faint)
        draw.text((x, box[3] + 9), f"{value:g}", LIGHT.faint, font(TEXT), anchor="mt")
    middle = (box[0] + box[2]) / 2
    draw.text((middle, size[1] - 12), "MiB stored, all components", LIGHT.faint, font(TEXT), anchor="mb")
    x = at(bytes_16bit / 2**20, low)[0]
    for y in range(int(box[1]), int(box[3]), 10):
        draw.line((x, y, x, y + 5), LIGHT.faint)
    taken: list[Box] = []
    _label(draw, (x, box[3] - 14), REFERENCE, LIGHT.faint, taken, box)
    front = _front([(plan.footprint / 2**20, plan.psnr) for plan in plans])
    draw.line([at(*point) for point in front], (200, 204, 212), 3)
    for one, other in zip(front, front[1:], strict=False):
        taken += _trail(at(*one), at(*other))
    points = [at(plan.footprint / 2**20, plan.psnr) for plan in plans]
    taken += [(px - 7, py - 7, px + 7, py + 7) for px, py in points]
    groups = list(dict.fromkeys(plan.group or plan.label for plan in plans))
    for plan, (px, py) in zip(plans, points, strict=True):
        colour = LIGHT.colours[groups.index(plan.group or plan.label) % len(LIGHT.colours)]
        _label(draw, (px, py), f"{plan.label}  {decibels(plan.psnr)}", colour, taken, box)
        draw.ellipse((px - 6, py - 6, px + 6, py + 6), colour)
    return sheet


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    best, front = -math.inf, []
    for size, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if quality > best:
            best = quality
            front.append((size, quality))
    return front


def _span(values: Sequence[float], least: float) -> tuple[float, float]:
    margin = max(0.08 * (max(values) - min(values)), least, 0.02 * abs(max(values)), 1e-6)
    return max(min(values) - margin, 0.0), max(values) + margin


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * factor for factor in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 8)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(
    draw: ImageDraw.ImageDraw,
    point: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    taken: list[Box],
    box: Box,
) -> None:
    """Write as near to a point as nothing is yet, and lead there where that is not beside it."""
    width, height = draw.textlength(text, font(TEXT)), TEXT + 2
    least, best = math.inf, None
    for place in _places(point, width, height):
        inside = box[0] <= place[0] and place[2] <= box[2] + 20 and box[1] <= place[1] and place[3] <= box[3]
        if not inside or any(overlap(place, other) for other in taken):
            continue
        end = _nearest(point, place)
        length = math.dist(point, end)
        if length >= least:
            continue
        trail = _trail(point, end)
        cost = length + _CROSSING * sum(any(overlap(dot, other) for dot in trail) for other in taken)
        if cost < least:
            least, best = cost, (place, end, trail)
    if best is None:
        return
    place, end, trail = best
    if math.dist(point, end) > _NEAR:
        draw.line((*point, *end), tuple((part + 2 * 235) // 3 for part in colour), 2)
        taken += trail
    draw.text((place[0], place[1]), text, colour, font(TEXT))
    taken.append(place)


def _places(point: tuple[float, float], width: float, height: float) -> Iterator[Box]:
    """Where a label could stand, those to prefer first: right of the point, left of it, above and below."""
    x, y = point
    for away in range(0, 200, 24):
        for down in range(0, 264, 6):
            for top in (y - down, y + down) if down else (y,):
                for left in (x + 12 + away, x - 12 - away - width, x - width / 2):
                    if left != x - width / 2 or down > height:
                        yield left, top - height / 2, left + width, top + height / 2


def _nearest(point: tuple[float, float], place: Box) -> tuple[float, float]:
    """Where a line from a point to a label ends."""
    return min(max(point[0], place[0] - 3), place[2] + 3), min(max(point[1], place[1] + 4), place[3])


def _trail(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """A line as dots, but for what is within the point that it starts from."""
    length = math.dist(start, end)
    shares = (at / length for at in range(12, int(length), 4))
    dots = [tuple(one + (other - one) * share for one, other in zip(start, end, strict=True)) for share in shares]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in dots]
