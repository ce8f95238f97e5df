"""The loaded pipeline, as everything after loading sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .source import PipelineIndex
from .specs import QuantPlan, QuantSpec


@dataclass(eq=False)
class QuantizedPipeline:
    """A diffusers pipeline (`pipe`) with what it was loaded from and as. Owns its modules."""

    pipe: Any
    index: PipelineIndex
    plan: QuantPlan
    dtype: torch.dtype
    specs: dict[str, QuantSpec] = field(default_factory=dict)  # of the components that were quantized
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # component -> layer -> why
    notes: dict[str, str] = field(default_factory=dict)  # component -> why the default did not serve it
    prepare: Callable[[str], None] | None = None

    def __str__(self) -> str:
        return (
            f"{self.index.class_name} ({', '.join(f'{name}={spec}' for name, spec in self.specs.items()) or '16 bit'})"
        )

    __repr__ = __str__  # hosts put it into error reports

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The components with weights, by name."""
        return {name: getattr(self.pipe, name) for name in self.index.models}

    def on_use(self, device: torch.device, prepare: Callable[[str], None]) -> None:
        """Before each use of a component, call `prepare(name)`; it must leave the component on `device`."""
        self.prepare = prepare
        for name, module in self.models.items():
            hook = _UseHook(name, device, weakref.ref(self))
            module.register_forward_pre_hook(hook.move_inputs, with_kwargs=True)
            module._hf_hook = hook  # diffusers asks it for the device, and calls it before vae.encode and decode


def move(module: torch.nn.Module, device: torch.device) -> None:
    """Move a component to a device, all of it or, if that raises, none of it.

    Also under `torch.inference_mode`, whose tensors cannot take the place of a tensor subclass made outside of it.
    """
    home, moved = next(module.parameters()).device, False
    with torch.inference_mode(False), torch.no_grad():
        try:
            module.to(device)
            moved = True
        finally:
            if not moved:
                module.to(home)


class _UseHook:
    """accelerate's hook protocol, without `add_hook_to_module`: that makes a module hold itself, so that
    only the garbage collector frees its memory."""

    def __init__(self, name, device, pipeline):
        self.name = name
        self.execution_device = device
        self.pipeline = pipeline

    def pre_forward(self, module, *args, **kwargs):
        self.pipeline().prepare(self.name)
        return args, kwargs

    def move_inputs(self, module, args, kwargs):
        self.pre_forward(module)
        return _to(args, self.execution_device), _to(kwargs, self.execution_device)


def _to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to(item, device) for item in value)
    return value
