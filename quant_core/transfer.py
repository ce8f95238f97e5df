"""Copies of a module's weights that take their place, whatever they are quantized with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .backend import Backend
from .backends import backends

Copy = Callable[[torch.Tensor], torch.Tensor]  # of a plain tensor


class Place(NamedTuple):
    """What stands, or is to stand, under a name of a module."""

    module: nn.Module
    name: str
    value: Any


def copies(modules: Iterable[nn.Module], copy: Copy, device: torch.device) -> list[Place]:
    """Copies of the modules' own parameters and buffers, each plain tensor in them made by `copy`, ready to be `put`.

    Nothing of the modules changes. What is shared stays shared.
    """
    seen: dict[int, torch.Tensor] = {}
    found = []
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            backend = backend_of(module)
            done = backend.transfer(module, copy, device) if backend and backend.transfer else {}
            found += [Place(module, name, value) for name, value in done.items()]
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and name not in done:
                    if id(tensor) not in seen:
                        seen[id(tensor)] = copy_tensor(tensor, copy)
                    found.append(Place(module, name, seen[id(tensor)]))
    return found


def copy_tensor(tensor: torch.Tensor, copy: Copy) -> torch.Tensor:
    """A tensor of the same kind, of subclasses too, whose plain tensors were made by `copy`."""
    if is_wrapper(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = {name: copy_tensor(getattr(tensor, name), copy) for name in names}
        made = type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    else:
        made = copy(tensor.data)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its data in other tensors, as those of torchao and quanto do."""
    return hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, nn.Parameter)


def put(places: Iterable[Place]) -> list[Place]:
    """Put values where they belong; returns what stood there."""
    before = []
    for module, name, value in places:
        held = next((held for held in (module._parameters, module._buffers) if name in held), None)
        if held is None:
            before.append(Place(module, name, getattr(module, name)))
            setattr(module, name, value)
        else:
            before.append(Place(module, name, held[name]))
            held[name] = value
    return before


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its weights on a device, each of the kind it was: `Module.to` leaves that to their classes, and
    some of quanto's are packed anew for the device, with loss."""
    put(copies(module.modules(), lambda tensor: tensor.to(device), device))
    return module


def adopt(places: Iterable[Place]) -> None:
    """Let what stands in its place hold the data of a value of its kind, and be the object that it was."""
    for module, name, value in places:
        there = getattr(module, name)
        if isinstance(there, torch.Tensor) and not is_wrapper(there):
            there.data = value.data
        vars(there).update(vars(value))


def byte_size(modules: Iterable[nn.Module]) -> int:
    """Bytes of all that `copies` copies, shared tensors once."""
    seen: dict[tuple, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.numel())
        seen[place] = tensor.numel() * tensor.element_size()
        return tensor

    copies(modules, note, torch.device("cpu"))
    return sum(seen.values())


def why_whole(module: nn.Module) -> str:
    """Why a module's weights cannot be streamed, with what to do instead; empty where they can."""
    for part in module.modules():
        backend = backend_of(part)
        known = backend and backend.transfer
        odd = [
            type(weight).__name__ for weight in part._parameters.values() if weight is not None and not _plain(weight)
        ]
        if odd and not known:
            return f"weights of the type {odd[0]} cannot be streamed; quantize it with torchao or bitsandbytes instead"
    return ""


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) or is_wrapper(tensor)


def backend_of(module: nn.Module) -> Backend | None:
    """The backend that quantized a layer, None if none did."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    return next((backend for backend in backends().values() if backend.layer_format(module)), None)
