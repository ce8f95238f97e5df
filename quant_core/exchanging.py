"""Some layers of a loaded pipeline quantized for a while, in place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .availability import quiet_libraries
from .backend import Recipe
from .backends import get_backend
from .pipeline import QuantizedPipeline
from .specs import QuantSpec
from .transfer import moved


@contextmanager
def quantized(
    pipeline: QuantizedPipeline, name: str, layers: Sequence[str], spec: QuantSpec, recipe: Recipe
) -> Iterator[None]:
    """The component with these layers quantized, and as it was afterwards."""
    if placement := pipeline.placements.get(name):
        placement.evict()
    module = pipeline.models[name]
    with torch.inference_mode(False), torch.no_grad(), quiet_libraries():
        made = {layer: _copy_quantized(module.get_submodule(layer), spec, recipe) for layer in layers}
    own = pipeline.exchange(name, made)
    try:
        yield
    finally:
        pipeline.exchange(name, own)


def _copy_quantized(linear: nn.Linear, spec: QuantSpec, recipe: Recipe) -> nn.Module:
    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name, own in linear.named_parameters():
        setattr(copy, name, nn.Parameter(own.data.to(recipe.device, recipe.dtype), requires_grad=False))
    quantized = get_backend(spec.backend).quantize(copy, recipe)
    return moved(quantized.requires_grad_(False).eval(), linear.weight.device)
