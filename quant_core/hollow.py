"""Components without their weights, and the bytes that they will have when they are stored as planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .architecture import empty_model, is_transformers, kept_in_float32
from .backend import Backend, Recipe
from .blocks import divide
from .inspection import footprint
from .lane import AHEAD
from .layers import stored_sizes
from .source import PipelineIndex


class Quantized(NamedTuple):
    """How a component is quantized."""

    backend: Backend
    layers: Mapping[str, Recipe]


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
    """The bytes of a component as it will be stored: its `footprint`, and what of it is on a device while its blocks
    are `streamed`."""

    def __init__(self, model: nn.Module, quantized: Quantized | None):
        self.saved: dict[nn.Module, int] = {}
        if quantized:
            for name, size in stored_sizes(model, quantized.layers, quantized.backend).items():
                layer = model.get_submodule(name)
                self.saved[layer] = layer.weight.numel() * layer.weight.element_size() - size
        self.footprint = footprint(model) - sum(self.saved.values())
        blocks, rest = divide(model, self._size)
        passing = sorted((self._size(block.modules()) for block in blocks), reverse=True)[:AHEAD]
        self.streamed = self._size(rest) + sum(passing)

    def _size(self, modules: Iterable[nn.Module]) -> int:
        modules = list(modules)
        held = (tensor for part in modules for own in (part._parameters, part._buffers) for tensor in own.values())
        unique = {id(tensor): tensor.numel() * tensor.element_size() for tensor in held if tensor is not None}
        return sum(unique.values()) - sum(self.saved.get(part, 0) for part in modules)
