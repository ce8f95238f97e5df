"""A comparison as pictures: the images side by side, where they differ, and quality against bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .comparison import REFERENCE, Comparison
from .comparison_report import decibels
from .errors import gib

INK, FAINT, PAPER = (28, 30, 36), (120, 126, 138), (250, 250, 248)
COLOURS = ((33, 102, 172), (178, 24, 43), (27, 120, 55), (118, 42, 131), (166, 97, 26), (1, 102, 94), (90, 90, 90))
GAIN = 8.0  # by which differences are brightened
_GAP, _LEAST = 10, 192  # pixels: between pictures, and of a picture's longer side at least
_TEXT = 15


@cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def grid(comparison: Comparison) -> Image.Image:
    """The images: a column per plan, a row per prompt and seed."""
    return _grid(comparison, {plan.label: comparison.images[plan.label] for plan in comparison.plans}, "")


def differences(comparison: Comparison) -> Image.Image:
    """How far each image is from the reference's, per channel, brightened."""
    reference = comparison.images[REFERENCE]
    found = {
        plan.label: ((comparison.images[plan.label] - reference).abs() * GAIN).clamp(0, 1)
        for plan in comparison.plans
        if plan.label != REFERENCE
    }
    return _grid(comparison, found, f"difference from {REFERENCE}, {GAIN:g} times brighter")


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as (1, H, W, C) floats in 0..1."""
    return torch.from_numpy(numpy.array(picture)).float().div(255).unsqueeze(0)


def _grid(comparison: Comparison, columns: dict[str, torch.Tensor], caption: str) -> Image.Image:
    plans = {plan.label: plan for plan in comparison.plans}
    pictures = {label: [_picture(image) for image in images] for label, images in columns.items()}
    width, height = next(iter(pictures.values()))[0].size
    heads = {}
    for label in columns:
        plan = plans[label]
        quality = "reference" if label == REFERENCE else f"{decibels(plan.psnr)} dB, SSIM {plan.ssim:.3f}"
        heads[label] = [*_wrapped(label, width), gib(plan.footprint), quality.replace("equal dB", "equal")]
    prompts = [(prompt, seed) for prompt in comparison.prompts for seed in comparison.seeds]
    line = _TEXT + 4
    top = _GAP + 4 + line * max(map(len, heads.values())) + (line if caption else 0)
    notes = [_wrapped(f"seed {seed}: {prompt}", (width + _GAP) * len(columns))[:2] for prompt, seed in prompts]
    rows = [height + line * len(note) + 2 * _GAP for note in notes]
    sheet = Image.new("RGB", (_GAP + (width + _GAP) * len(columns), top + sum(rows) + _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    if caption:
        draw.text((_GAP, _GAP // 2), caption, FAINT, _font(_TEXT))
    for column, (label, images) in enumerate(pictures.items()):
        left = _GAP + column * (width + _GAP)
        for number, text in enumerate(heads[label]):
            above = top - 4 - line * (len(heads[label]) - number)
            draw.text((left, above), text, INK if number < len(heads[label]) - 2 else FAINT, _font(_TEXT))
        for row, image in enumerate(images):
            sheet.paste(image, (left, top + sum(rows[:row])))
    for row, note in enumerate(notes):
        for number, text in enumerate(note):
            draw.text((_GAP, top + sum(rows[:row]) + height + 2 + line * number), text, FAINT, _font(_TEXT))
    return sheet


def _picture(image: torch.Tensor) -> Image.Image:
    made = Image.fromarray((image * 255).round().byte().numpy())
    factor = max(1, math.ceil(_LEAST / max(made.size)))
    return made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines no wider than that, broken where words or a plan's parts end."""
    lines, line = [], ""
    for part in text.replace(",", ", ").replace("/", "/ ").replace("?", " ?").split():
        joined = f"{line} {part}" if line and not line.endswith("/") else line + part
        if line and _font(_TEXT).getlength(joined) > width:
            lines.append(line)
            joined = part
        line = joined
    return [*lines, line]


def chart(comparison: Comparison, size: tuple[int, int] = (900, 560)) -> Image.Image:
    """PSNR over bytes stored, a point per plan; those that no other beats in both are joined."""
    plans = [plan for plan in comparison.plans if plan.label != REFERENCE]
    reference = next(plan for plan in comparison.plans if plan.label == REFERENCE)
    finite = [plan.psnr for plan in plans if math.isfinite(plan.psnr)]
    low, high = _span(finite or [20.0, 60.0], 1.0)
    left, right = _span([*(plan.footprint / 2**20 for plan in plans), reference.footprint / 2**20], 0.0)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    box = (78, 56, size[0] - 24, size[1] - 64)

    def at(mib: float, decibel: float) -> tuple[float, float]:
        share = (mib - left) / (right - left), (min(decibel, high) - low) / (high - low)
        return box[0] + share[0] * (box[2] - box[0]), box[3] - share[1] * (box[3] - box[1])

    draw.text((box[0] - 60, 16), "quality against size: PSNR in dB to the 16-bit pictures", INK, _font(18))
    for value in _ticks(low, high):
        y = at(left, value)[1]
        draw.line((box[0], y, box[2], y), (225, 226, 228))
        draw.text((box[0] - 10, y), f"{value:g}", FAINT, _font(_TEXT), anchor="rm")
    for value in _ticks(left, right):
        x = at(value, low)[0]
        draw.line((x, box[3], x, box[3] + 5), FAINT)
        draw.text((x, box[3] + 9), f"{value:g}", FAINT, _font(_TEXT), anchor="mt")
    draw.text(((box[0] + box[2]) / 2, size[1] - 12), "MiB stored, all components", FAINT, _font(_TEXT), anchor="mb")
    x = at(reference.footprint / 2**20, low)[0]
    for y in range(int(box[1]), int(box[3]), 10):
        draw.line((x, y, x, y + 5), FAINT)
    taken: list[tuple[float, ...]] = []
    _label(draw, (x, box[3] - 14), REFERENCE, FAINT, taken, box)
    front = _front([(plan.footprint / 2**20, plan.psnr) for plan in plans])
    draw.line([at(*point) for point in front], (200, 204, 212), 3)
    points = [at(plan.footprint / 2**20, plan.psnr) for plan in plans]
    taken += [(px - 7, py - 7, px + 7, py + 7) for px, py in points]
    for number, (plan, (px, py)) in enumerate(zip(plans, points, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        draw.ellipse((px - 6, py - 6, px + 6, py + 6), colour)
        _label(draw, (px, py), f"{plan.label}  {decibels(plan.psnr)}", colour, taken, box)
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
    taken: list[tuple[float, ...]],
    box: tuple[int, int, int, int],
) -> None:
    """Write beside a point where nothing is yet, further away if need be."""
    x, y = point
    width, height = draw.textlength(text, _font(_TEXT)), _TEXT + 2
    for distance in range(0, 400, 8):
        for dx, dy in ((12, 0), (-12 - width, 0), (-width / 2, -16), (-width / 2, 16), (12, -14), (12, 14)):
            shift = distance if dy > 0 else -distance
            place = (x + dx, y + dy + shift - height / 2, x + dx + width, y + dy + shift + height / 2)
            inside = box[0] <= place[0] and place[2] <= box[2] + 20 and box[1] <= place[1] and place[3] <= box[3]
            if inside and not any(_overlap(place, other) for other in taken):
                if distance > 8:
                    draw.line((x, y, place[0], (place[1] + place[3]) / 2), (200, 204, 212))
                draw.text((place[0], place[1]), text, colour, _font(_TEXT))
                taken.append(place)
                return


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
