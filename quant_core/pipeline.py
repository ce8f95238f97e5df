"""The loaded pipeline, as everything after loading sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .allocator import give_back
from .memory import EncoderMemory, remembering
from .placement import Placement
from .quantizing import Origin
from .source import PipelineIndex
from .specs import QuantPlan, QuantSpec


@dataclass(eq=False)
class QuantizedPipeline:
    """A diffusers pipeline (`pipe`) with what it was loaded from and as. Owns its modules."""

    pipe: Any
    index: PipelineIndex
    plan: QuantPlan
    dtype: torch.dtype
    variant: str | None = None  # of its weight files
    specs: dict[str, QuantSpec] = field(default_factory=dict)  # of the components that were quantized
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # component -> layer -> why
    notes: dict[str, str] = field(default_factory=dict)  # component -> what must be told of it
    origins: dict[str, Origin] = field(default_factory=dict)  # component -> where it came from
    placements: dict[str, Placement] = field(default_factory=dict)  # of a pipeline that a host manages
    activations: dict[str, int] = field(default_factory=dict)  # bytes a component needs beside its weights in this run
    room: int | None = None  # bytes that the device can give a component at all, None where that is not known
    needs: dict[str, dict[str, int]] = field(default_factory=dict)  # kind of request -> such bytes; see estimate
    errors: dict[tuple[str, str], float] = field(default_factory=dict)  # of (component, layer); see layer_report
    memory: EncoderMemory = field(default_factory=EncoderMemory)
    prepare: Callable[[str], None] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that a host has components run on
    last: Any = None  # the GenerateRequest of the last run that came to its end
    peak: int | None = None  # bytes that the last run held at most, as stored weights and beside them, where measured
    peak_meaning: str = ""  # what that measure counts
    notices: list[str] = field(default_factory=list)  # of the last run: what its user must be told, a sentence each
    store: Path | None = None  # that keeps its components and its compiled code
    optimization: Any = None  # how runs are made faster or smaller; see optimization
    reports: dict[str, Any] = field(default_factory=dict)  # of what the optimization did in the last run
    uncompiled: dict[str, str] = field(default_factory=dict)  # class of modules that do not compile -> why
    aside: dict[str, list] | None = None  # component -> its weights, while diffusers itself moves stand-ins of them
    running: Lock = field(default_factory=Lock)  # held by a run, of any handle
    owner: QuantizedPipeline | None = None  # whose modules these are, of a handle made by `with_optimization`

    def __str__(self) -> str:
        return (
            f"{self.index.class_name} ({', '.join(f'{name}={spec}' for name, spec in self.specs.items()) or '16 bit'})"
        )

    __repr__ = __str__  # hosts put it into error reports

    def __del__(self):
        """The weights go now, and their memory back to the operating system."""
        if vars(self).get("owner") is not None:
            return
        for placement in vars(self).get("placements", {}).values():
            placement.evict()
        vars(self).clear()
        if give_back is not None:  # as it is while the interpreter ends
            give_back()

    def with_optimization(self, optimization: Any, device: torch.device) -> QuantizedPipeline:
        """Another handle on the same modules, whose runs on a device are optimized otherwise."""
        made = object.__new__(type(self))
        own = {
            "optimization": optimization,
            "device": device,
            "reports": {},
            "uncompiled": {},
            "last": None,
            "peak": None,
            "notices": [],
        }
        vars(made).update(vars(self) | own | {"owner": self.owner or self})  # at once: without an owner it owns them
        return made

    @property
    def title(self) -> str:
        """Its class and its model, as people know them."""
        return f"{self.index.class_name}, {self.index.name}"

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """The components with weights, by name."""
        return {name: getattr(self.pipe, name) for name in self.index.models}

    def exchange(self, name: str, layers: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
        """Put layers, whose weights are where a component's are at rest, in the place of its own; returns those."""
        module = self.models[name]
        own = {path: module.get_submodule(path) for path in layers}
        if placement := self.placements.get(name):
            placement.exchange({own[path]: layer for path, layer in layers.items()})
        for path, layer in layers.items():
            module.set_submodule(path, layer)
        self.memory.forget()
        return own

    def weights(self, name: str) -> Iterable[torch.Tensor]:
        """A component's weights, wherever copies of them are."""
        if self.aside is not None:
            return self.aside[name]
        placement = self.placements.get(name)
        return placement.weights() if placement else self.models[name].parameters()

    def step_aside(self) -> None:
        """Diffusers itself will move the weights; a host clears the device for it here."""
        for placement in self.placements.values():
            placement.evict()

    def begin(self, request: Any) -> None:
        """A run of a `GenerateRequest` begins, or begins anew with other settings of a VAE; a host may find out here
        what it needs."""

    def on_use(self, device: torch.device, prepare: Callable[[str], None]) -> None:
        """Before each use of a component, call `prepare(name)`; it must leave the component on `device`.

        A text encoder whose output is remembered is not used.
        """
        self.prepare, self.device = prepare, device
        for name, module in self.models.items():
            hook = _UseHook(name, device, weakref.ref(self))
            module._hf_hook = hook  # diffusers asks it for the device, and calls it before vae.encode and decode
            if name in self.index.text_encoders:
                remembering(module, name, self.memory, hook)
                for part in module.modules():  # some pipelines call a part of the encoder afterwards
                    if part is not module:
                        part.register_forward_pre_hook(hook.enter_part, prepend=True)
            else:
                module.register_forward_pre_hook(hook.enter, with_kwargs=True)


class _UseHook:
    """accelerate's hook protocol, without `add_hook_to_module`: that makes a module hold itself, so that
    only the garbage collector frees its memory."""

    def __init__(self, name, device, pipeline):
        self.name = name
        self.execution_device = device
        self.pipeline = pipeline
        self.running = False

    def pre_forward(self, module, *args, **kwargs):
        pipeline = self.pipeline()
        if pipeline.aside is None:
            pipeline.prepare(self.name)
        return args, kwargs

    def enter(self, module, args, kwargs):
        self.pre_forward(module)
        return _to(args, self.execution_device), _to(kwargs, self.execution_device)

    def weights(self, module):
        return self.pipeline().weights(self.name)

    def enter_part(self, module, args):
        if not self.running:
            self.pre_forward(module)


def _to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to(item, device) for item in value)
    return value
