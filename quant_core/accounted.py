"""Components whose tensors were accounted for, each once: plans are compared by checking many of one model."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from .accounting import check_tensors
from .architecture import empty_model
from .checkpoint import WeightFiles, weight_files
from .headers import header, tensors_in
from .source import ComponentInfo

_ACCOUNTED: dict[str, list[str]] = {}  # what is left over, by contents


def account(info: ComponentInfo, dtype: torch.dtype, variant: str | None, whole: nn.Module | None) -> list[str]:
    """Check that what is not quantized already takes every tensor of its files, and return what is left over.

    `whole` is the component without its weights, where there is one.

    Raises:
        SourceError: as `check_tensors` says.
    """
    left: list[str] = []
    for part in info.parts or (info,):
        if not part.prequantized:
            files = weight_files(part, variant)
            key = _contents(part, files, dtype)
            if key not in _ACCOUNTED:
                model = whole if whole and not info.parts else empty_model(part, dtype)
                tensors = tensors_in(files.files)
                _ACCOUNTED[key] = check_tensors(part, model, tensors, sharded=files.index is not None)
            left += _ACCOUNTED[key]
    return left


def _contents(info: ComponentInfo, files: WeightFiles, dtype: torch.dtype) -> str:
    """A key of all that the accounting of a component depends on: its class, its config and its files' headers."""
    about = [info.cls.__module__, info.cls.__qualname__, info.config, str(dtype), files.index is not None]
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for file in files.files:
        found.update(header(file))
    return found.hexdigest()
