"""torch.compile for the denoiser of a pipeline, for one run at a time."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.exc
from torch import nn

from .backend import Option
from .backends import get_backend
from .blocks import divide
from .compiled_code import Made, kept_in, made
from .errors import SpecError, is_out_of_memory, one_sentence
from .pipeline import QuantizedPipeline
from .settings import Setting, Way
from .transfer import byte_size

logger = logging.getLogger(__name__)

BACKEND = "inductor"  # of torch.compile
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_RECORDING = ("reduce-overhead", "max-autotune")
_OPTIONS = (
    Option("mode", "default", "What torch.compile looks for; max-autotune tries kernels, which takes long.", MODES),
    Option("full_graph", False, "Do without compiling rather than with a break inside of what is compiled."),
    Option("vae", False, "The decoder of the VAE, too."),
)
WAYS = (
    Way("auto", "Repeated blocks, where all layers can be compiled; nothing elsewhere."),
    Way("blocks", "Each kind of repeated block once: the least to make, whatever comes and goes.", _OPTIONS),
    Way("whole", "The denoiser as one: longer to make, must stay on the device, cancelled between steps.", _OPTIONS),
)
# PyTorch's own 8 graphs for one piece of code are too few for blocks that differ in their layers.
_SETTINGS = {"recompile_limit": 64, "accumulated_recompile_limit": 1024}


@dataclass
class CompileReport:
    """What compiling took in a run: graphs traced, those that code had to be made for, and why none was used."""

    way: str
    graphs: int = 0
    compiled: int = 0
    eager: str = ""

    def __str__(self) -> str:
        if self.eager:
            return f"compile {self.way}: runs without, {self.eager}"
        return f"compile {self.way}: {self.graphs} graphs, {self.compiled} of them new"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    """Refuse what cannot be compiled.

    Raises:
        SpecError: a component's layers cannot be, the pipeline has no denoiser, or its VAE no decoder.
    """
    mode = setting.options.get("mode")
    if device.type == "cuda" and pipeline.placements and mode in _RECORDING:
        raise SpecError(
            f"compile mode={mode} records CUDA graphs, whose memory nobody gets back while components come and go; "
            "use mode=max-autotune-no-cudagraphs."
        )
    if setting.way != "auto" and (why := _obstacle(pipeline)):
        raise SpecError(f"compile is {setting.way}, but {why}; use compile off, or another scheme.")
    if setting.options.get("vae") and not isinstance(getattr(_vae(pipeline), "decoder", None), nn.Module):
        raise SpecError(
            f"compile vae has no effect on {pipeline.index.class_name}, whose VAE has no decoder; leave it."
        )


def _obstacle(pipeline: QuantizedPipeline) -> str:
    """Why the pipeline's denoiser cannot be compiled, empty if it can."""
    if not pipeline.index.denoisers:
        return f"{pipeline.index.class_name} has no denoiser"
    for name in pipeline.index.denoisers:
        if spec := pipeline.specs.get(name):
            backend = get_backend(spec.backend)
            for scheme in spec.schemes:
                if why := backend.scheme(scheme).uncompilable:
                    return f"{name} is {spec.backend}/{scheme}: {why}"
    return ""


@contextmanager
def applied(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]) -> Iterator[CompileReport]:
    """Run what can be compiled compiled, as long as this lasts. What fails to compile runs as it is, with one warning,
    then and from then on."""
    eager = pipeline.uncompiled or (_obstacle(pipeline) if setting.way == "auto" else "")
    report = CompileReport(setting.way, eager=eager)
    if report.eager:
        yield report
        return
    with ExitStack() as stack:
        dynamo, inductor = _settings(pipeline)
        stack.enter_context(torch._dynamo.config.patch(dynamo))
        stack.enter_context(torch._inductor.config.patch(inductor))
        stack.enter_context(kept_in(pipeline.store))
        before = made()
        for module in _compiled_modules(pipeline, setting, stack):
            stack.enter_context(_forward(module, _Compiled(module, setting, report)))
        stack.enter_context(_strengths_as_tensors(pipeline))
        try:
            yield report
        finally:
            new: Made = made().since(before)
            report.graphs, report.compiled = new.graphs, new.compiled
            pipeline.uncompiled = report.eager


def _settings(pipeline: QuantizedPipeline) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of Dynamo and of Inductor that the pipeline's denoisers need."""
    dynamo, inductor = dict(_SETTINGS), {}
    for spec in filter(None, map(pipeline.specs.get, pipeline.index.denoisers)):
        backend = get_backend(spec.backend)
        dynamo |= backend.dynamo
        for scheme in spec.schemes:
            inductor |= backend.scheme(scheme).inductor
    return dynamo, inductor


def _compiled_modules(pipeline: QuantizedPipeline, setting: Setting, stack: ExitStack) -> Iterator[nn.Module]:
    for name in pipeline.index.denoisers:
        denoiser = pipeline.models[name]
        if setting.way == "whole":
            if placement := pipeline.placements.get(name):
                stack.enter_context(placement.as_one(f"{name} is compiled as a whole, so that its blocks must stay"))
            yield denoiser
        else:
            yield from repeated_blocks(denoiser)
    if setting.options.get("vae"):
        yield _vae(pipeline).decoder


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers names for this (`_repeated_blocks`), else those that are streamed."""
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    found = [module for module in denoiser.modules() if type(module).__name__ in names]
    return found or divide(denoiser, byte_size)[0]


def _vae(pipeline: QuantizedPipeline) -> Any:
    return getattr(pipeline.pipe, "vae", None)


@functools.cache
def _function(forward: Callable, backend: str, mode: str, full_graph: bool) -> Callable:
    """One function for all modules of a class, so that they share its graphs and none of them is held by it."""
    return torch.compile(forward, backend=backend, mode=None if mode == "default" else mode, fullgraph=full_graph)


class _Compiled:
    """In place of a module's forward: that of its class, compiled, with the module as its first argument. What hooks
    the module has stay outside: streaming, cancelling."""

    def __init__(self, module: nn.Module, setting: Setting, report: CompileReport):
        self.module = weakref.ref(module)
        self.report = report
        options = setting.options
        forward = type(module).forward
        mode, full_graph = options.get("mode", "default"), options.get("full_graph", False)
        self.function = _function(forward, BACKEND, mode, full_graph)
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args, **kwargs):
        module = self.module()
        if not self.report.eager:
            try:
                return self.function(module, *_plain(args), **{key: _plain(value) for key, value in kwargs.items()})
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                inner = getattr(error, "inner_exception", None) or error.__cause__
                if inner is not None and is_out_of_memory(inner):
                    raise inner from None
                self.report.eager = f"{type(module).__name__} does not compile: {one_sentence(error)}"
                logger.warning("The pipeline runs without compile; %s.", self.report.eager)
        return type(module).forward(module, *args, **kwargs)


@contextmanager
def _forward(module: nn.Module, call: Callable) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = call
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before


def _plain(value: Any) -> Any:
    """The same tensors without what tells apart graphs that compute the same: being a view of another, and the stride
    of a dimension of one element."""
    if type(value) is torch.Tensor:
        value = value.data
        if value.is_contiguous() and value.stride() != (plain := _strides(value.shape)):
            value = torch.as_strided(value, value.shape, plain).data
        return value
    return tuple(map(_plain, value)) if type(value) is tuple else value  # into lists and dicts a module may write


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a tensor of that shape without gaps."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


@contextmanager
def _strengths_as_tensors(pipeline: QuantizedPipeline) -> Iterator[None]:
    """Make the strengths of LoRA layers (peft's `scaling`) tensors, so that a new one makes no new graph."""
    changed = []
    for name in pipeline.index.denoisers:
        for module in pipeline.models[name].modules():
            scaling = getattr(module, "scaling", None)
            if hasattr(module, "lora_A") and isinstance(scaling, dict):
                changed.append((scaling, dict(scaling)))
                device = pipeline.device if pipeline.placements else next(module.parameters()).device
                scaling.update({key: torch.tensor(float(value), device=device) for key, value in scaling.items()})
    try:
        yield
    finally:
        for scaling, before in changed:
            scaling.update(before)
