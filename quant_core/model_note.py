"""What was done to a saved model, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from .backends import get_backend
from .errors import choices, gib
from .pipeline import QuantizedPipeline

NOTE = "QUANTIZATION.md"


@dataclass(frozen=True)
class SavedComponent:
    """One component of a saved pipeline."""

    name: str
    quantization: str  # backend/scheme or the method of its checkpoint, "" where it is not quantized
    bytes: int  # of its weights on disk
    obstacle: str  # why its library does not open it and only this engine does, "" where it does
    note: str = ""  # what became different


def format_saved(saved: Sequence[SavedComponent], folder: Path) -> str:
    """The components as lines to read: what they are stored as, their size, and who else opens them."""
    lines = [f"{part.name}: {part.quantization or 'not quantized'}, {gib(part.bytes)}" for part in saved]
    lines += [f"{part.name}: {text}" for part in saved for text in (part.obstacle, part.note) if text]
    only = [part.name for part in saved if part.obstacle]
    opens = f"only this pack opens it, because of {choices(only)}" if only else "plain diffusers opens it, too"
    return "\n".join([*lines, f"{folder}: {gib(sum(part.bytes for part in saved))}; {opens}"])


def model_note(pipeline: QuantizedPipeline, saved: Sequence[SavedComponent]) -> str:
    """The text of QUANTIZATION.md."""
    index, dtype = pipeline.index, str(pipeline.dtype)
    before = index.folder / NOTE
    used = {"torch", "diffusers", "transformers"}
    for spec in pipeline.specs.values():
        used |= {Requirement(text).name for text in get_backend(spec.backend).requires}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in sorted(used))
    lines = [
        "# What was done to this model",
        "",
        f"This is `{index.name}`, quantized. The license of the original holds for it.",
        "",
        "| component | stored as | bytes | opened by |",
        "|---|---|---|---|",
    ]
    libraries = {part.name: part.library for info in index.models.values() for part in (info, *info.parts)}
    for part in saved:
        readers = "Quantized Diffusers" + ("" if part.obstacle else f", {libraries[part.name]}")
        lines.append(
            f"| {part.name} | {part.quantization or dtype.removeprefix('torch.')} | {part.bytes} | {readers} |"
        )
    lines += [f"\n- {part.name}: {text}." for part in saved for text in (part.obstacle, part.note) if text]
    name = dtype.removeprefix("torch.")
    lines += ["", f"Made with {versions}.", "", f"Quantized Diffusers opens it without a plan, with dtype {name}."]
    if not any(part.obstacle for part in saved):
        lines += [
            "So does diffusers:",
            "",
            "```python",
            "import torch",
            f"from diffusers import {index.class_name}",
            "",
            f'pipe = {index.class_name}.from_pretrained("FOLDER", torch_dtype={dtype})',
            "```",
        ]
    if before.is_file():
        lines += [
            "",
            "## Before that",
            "",
            before.read_text(encoding="utf-8").removeprefix(f"{lines[0]}\n\n").rstrip(),
        ]
    return "\n".join(lines) + "\n"
