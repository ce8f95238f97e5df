"""Layers as plain tensors, and a model put together from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from .backend import Backend, Packed, Recipe
from .errors import StoreError


def all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, computed ones too, by full name; shared ones under each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def own_tensors(model: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a model beside the packed `layers`: parameters and persistent buffers, shared ones
    once."""
    seen = set()
    for prefix, module in model.named_modules():
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        for name in ["bias"] if prefix in layers else [*module._parameters, *sorted(buffers)]:
            tensor = getattr(module, name, None)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{prefix}.{name}" if prefix else name), tensor


def fill(
    model: nn.Module,
    backend: Backend,
    recipes: Mapping[str, Recipe],
    layers: Mapping[str, Packed],
    tensors: Mapping[str, torch.Tensor],
    same: Mapping[str, str],
) -> nn.Module:
    """Put weights into a model whose parameters are on the meta device: packed layers by path, as their recipes say,
    all else by name, and under more names what is shared (name -> the name in `tensors`).

    Raises:
        StoreError: a weight is lacking, unknown or of another shape.
    """
    places = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in all_tensors(model)}
    for name, value in places.items():
        if value.shape != shapes.get(name):
            wanted = f"takes {tuple(shapes[name])}" if name in shapes else "has no such weight"
            raise StoreError(f"it has {name} of shape {tuple(value.shape)}, and the model {wanted}")
    for path, packed in layers.items():
        linear = model.get_submodule(path)
        shape = tuple(linear.weight.shape)
        if linear.bias is not None:
            linear.bias = places.pop(f"{path}.bias", linear.bias)
        layer = backend.unpack(linear, packed, recipes[path]).requires_grad_(False).eval()
        if tuple(backend.weight_shape(layer)) != shape:
            raise StoreError(
                f"it has {path} of shape {tuple(backend.weight_shape(layer))}, and the model takes {shape}"
            )
        model.set_submodule(path, layer)
    for name, value in [*places.items(), *((alias, places[name]) for alias, name in same.items())]:
        prefix, _, own = name.rpartition(".")
        module = model.get_submodule(prefix)
        if own in module._buffers:
            module._buffers[own] = value.data
        else:
            module._parameters[own] = value
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if empty := [name for name, tensor in all_tensors(model) if tensor.is_meta]:
        raise StoreError(f"it lacks {len(empty)} weights, as {empty[0]}")
    return model.eval().requires_grad_(False)


def packed_layers(tensors: Mapping[str, torch.Tensor], mark: str) -> tuple[dict[str, Packed], dict[str, torch.Tensor]]:
    """The packed layers among the tensors of a checkpoint, by path, and the other tensors.

    A layer is packed if it has a tensor of the name `mark`. Its bias is among the others.
    """
    ending = f".{mark}"
    layers = {name.removesuffix(ending): Packed({}, {}) for name in tensors if name.endswith(ending)}
    rest = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        path = next((path for path in paths if path in layers), None)
        if path is None or name == f"{path}.bias":
            rest[name] = tensor
        else:
            layers[path].tensors[name.removeprefix(f"{path}.")] = tensor
    return layers, rest
