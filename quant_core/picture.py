"""Saving images as PNG with what made them in the metadata."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from .backends import backends
from .locating import DEMO
from .notation import format_plan, without_folders
from .pipeline import QuantizedPipeline
from .request import GenerateRequest

KEY = "quantized_diffusers"  # of the metadata


def describe(pipeline: QuantizedPipeline, request: GenerateRequest, source: str) -> dict[str, Any]:
    """What made the images of the last run, as plain data: no path but names, and nothing secret."""
    is_path = source != DEMO and os.path.isdir(os.path.expanduser(source))
    return {
        "model": pipeline.index.name if is_path else source,
        "pipeline": pipeline.index.class_name,
        "plan": format_plan(without_folders(pipeline.plan)),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        **request_settings(request),
        "seed": request.seed,
        **({"optimization": pipeline.optimization.data()} if pipeline.optimization else {}),
        **({"notices": pipeline.notices} if pipeline.notices else {}),
        "versions": library_versions(),
    }


def request_settings(request: GenerateRequest) -> dict[str, Any]:
    """What a request sets, as JSON has it, but for its kind of output."""
    settings = {name: value for name, value in vars(request).items() if value not in (None, {}) and name != "output"}
    return {name: dict(value) if name == "extra" else value for name, value in settings.items()}


def library_versions() -> dict[str, str]:
    """Those of the installed libraries that a picture depends on."""
    packages = {Requirement(text).name for backend in backends().values() for text in backend.requires}
    found = {}
    for package in ("torch", "diffusers", "transformers", *sorted(packages)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save_png(images: torch.Tensor, out: Path, record: dict[str, Any]) -> list[Path]:
    """Write images (N, H, W, C) in 0..1 to `out`, or of several to `out` with -0, -1, ... before its suffix."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps(record))
    files = []
    for number, image in enumerate(images):
        file = out if len(images) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        Image.fromarray((image * 255).round().byte().numpy()).save(file, pnginfo=info)
        files.append(file)
    return files
