"""Components without their weights, and the bytes that they will have when they are stored as planned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .architecture import empty_model, is_transformers, kept_in_float32
from .backend import Backend, Recipe
from .inspection import footprint
from .source import PipelineIndex


class Quantized(NamedTuple):
    """How a component is quantized."""

    backend: Backend
    recipe: Recipe
    layers: tuple[str, ...]


def hollow_models(index: PipelineIndex, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The components without weights, in the dtypes that a load gives them."""
    return {name: _in_dtype(empty_model(info), dtype) for name, info in index.models.items()}


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    kept = kept_in_float32(model, dtype)
    if is_transformers(model):
        model.tie_weights()
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                own = torch.float32 if not kept.isdisjoint(name.split(".")) else dtype
                parameter.data = parameter.data.to(own)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                saved = buffer is not None and name not in module._non_persistent_buffers_set
                if saved and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    return model


class PlannedWeights:
    """The bytes of a component as it will be stored: its `footprint`, and that of its `largest_block`."""

    def __init__(self, model: nn.Module, quantized: Quantized | None):
        self.saved: dict[str, int] = {}
        if quantized:
            backend, recipe, layers = quantized
            sizes: dict[tuple[int, int], int] = {}
            for name in layers:
                weight = model.get_submodule(name).weight
                shape = tuple(weight.shape)
                if shape not in sizes:
                    sizes[shape] = weight.numel() * weight.element_size() - backend.stored(recipe, *shape)
                self.saved[name] = sizes[shape]
        self.footprint = footprint(model) - sum(self.saved.values())
        blocks = [
            (f"{path}.{number}.", block)
            for path, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and not any(isinstance(inner, nn.ModuleList) for inner in [*part])
            for number, block in part.named_children()
        ]
        self.largest_block = max((self._block(*block) for block in blocks), default=self.footprint)

    def _block(self, prefix: str, block: nn.Module) -> int:
        return footprint(block) - sum(size for name, size in self.saved.items() if name.startswith(prefix))
