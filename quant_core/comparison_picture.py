"""A comparison as pictures: the images side by side, and where they differ."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw

from .comparison import REFERENCE, Comparison
from .comparison_report import decibels
from .drawing import LIGHT, TEXT, font
from .errors import gib

GAIN = 8.0  # by which differences are brightened
_GAP, _LEAST = 10, 192  # pixels: between pictures, and of a picture's longer side at least


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
    line = TEXT + 4
    top = _GAP + 4 + line * max(map(len, heads.values())) + (line if caption else 0)
    notes = [_wrapped(f"seed {seed}: {prompt}", (width + _GAP) * len(columns))[:2] for prompt, seed in prompts]
    rows = [height + line * len(note) + 2 * _GAP for note in notes]
    sheet = Image.new("RGB", (_GAP + (width + _GAP) * len(columns), top + sum(rows) + _GAP), LIGHT.paper)
    draw = ImageDraw.Draw(sheet)
    if caption:
        draw.text((_GAP, _GAP // 2), caption, LIGHT.faint, font(TEXT))
    for column, (label, images) in enumerate(pictures.items()):
        left = _GAP + column * (width + _GAP)
        for number, text in enumerate(heads[label]):
            above = top - 4 - line * (len(heads[label]) - number)
            draw.text((left, above), text, LIGHT.ink if number < len(heads[label]) - 2 else LIGHT.faint, font(TEXT))
        for row, image in enumerate(images):
            sheet.paste(image, (left, top + sum(rows[:row])))
    for row, note in enumerate(notes):
        for number, text in enumerate(note):
            draw.text((_GAP, top + sum(rows[:row]) + height + 2 + line * number), text, LIGHT.faint, font(TEXT))
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
        if line and font(TEXT).getlength(joined) > width:
            lines.append(line)
            joined = part
        line = joined
    return [*lines, line]
