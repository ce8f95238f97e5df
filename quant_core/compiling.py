"""torch.compile for the denoiser of a pipeline, for one run at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .backend import Backend, Option, Scheme
from .backends import get_backend
from .blocks import divide
from .compiled_code import Made, kept_in, made
from .compiled_forward import compiled_forward
from .errors import SpecError
from .pipeline import QuantizedPipeline
from .prequantized import told_spec
from .settings import Setting, Way
from .transfer import backend_of, byte_size

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
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
_SETTINGS = {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}


@dataclass
class CompileReport:
    """What compiling took in a run: graphs traced, those that code was made for, and what ran without, and why."""

    way: str
    graphs: int = 0
    compiled: int = 0
    eager: str = ""

    def __str__(self) -> str:
        made = f"{self.graphs} graph{'s' * (self.graphs != 1)}, {self.compiled} of them new"
        return f"compile {self.way}: {made if self.graphs or not self.eager else 'none'}" + (
            f"; {self.eager}" if self.eager else ""
        )

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    """Refuse what cannot be compiled.

    Raises:
        SpecError: a component's layers cannot be, the pipeline has no denoiser, or its VAE no decoder.
    """
    if device.type == "cuda" and pipeline.placements and is_recording(setting):
        raise SpecError(
            f"compile mode={setting.options['mode']} records CUDA graphs, whose memory nobody gets back while "
            "components come and go; use mode=max-autotune-no-cudagraphs."
        )
    if setting.way != "auto" and (why := obstacle(pipeline, setting.way)):
        raise SpecError(f"compile is {setting.way}, but {why}; use compile off, or another scheme.")
    if setting.options.get("vae") and not isinstance(getattr(_vae(pipeline), "decoder", None), nn.Module):
        raise SpecError(
            f"compile vae has no effect on {pipeline.index.class_name}, whose VAE has no decoder; leave it."
        )


def is_recording(setting: Setting) -> bool:
    """Whether CUDA graphs are recorded, which want the same memory at each step."""
    return setting.options.get("mode") in ("reduce-overhead", "max-autotune")


def obstacle(pipeline: QuantizedPipeline, way: str = "blocks") -> str:
    """Why the pipeline's denoiser cannot be compiled that way, empty if it can."""
    if not pipeline.index.denoisers:
        return f"{pipeline.index.class_name} has no denoiser"
    for name in pipeline.index.denoisers:
        for backend, scheme in _schemes(pipeline, name):
            if scheme.uncompilable:
                return f"{name} is {backend.name}/{scheme.name}: {scheme.uncompilable}"
        if way != "whole" and not repeated_blocks(pipeline.models[name]):
            return f"{name}, a {type(pipeline.models[name]).__name__}, has no repeated blocks"
    return ""


def _schemes(pipeline: QuantizedPipeline, name: str) -> Iterator[tuple[Backend, Scheme]]:
    """Those of a component's layers, its checkpoint's included; where nothing tells which, all of their backend."""
    if spec := pipeline.specs.get(name) or told_spec(pipeline.index.models[name]):
        backend = get_backend(spec.backend)
        yield from ((backend, backend.scheme(scheme)) for scheme in spec.schemes)
        return
    found = filter(None, map(backend_of, pipeline.models[name].modules()))
    for backend in {backend.name: backend for backend in found}.values():
        yield from ((backend, scheme) for scheme in backend.schemes)


@contextmanager
def applied(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]) -> Iterator[CompileReport]:
    """Run what can be compiled compiled, as long as this lasts. What fails to compile runs as it is, with one warning,
    then and from then on."""
    report = CompileReport(setting.way, eager=obstacle(pipeline) if setting.way == "auto" else "")
    if report.eager:
        yield report
        return
    import torch._dynamo
    import torch._inductor.config

    mode, full_graph = setting.options.get("mode", "default"), setting.options.get("full_graph", False)
    with ExitStack() as stack:
        dynamo, inductor = _settings(pipeline)
        stack.enter_context(torch._dynamo.config.patch(dynamo))
        stack.enter_context(torch._inductor.config.patch(inductor))
        stack.enter_context(kept_in(pipeline.store))
        before = made()
        for module in _compiled_modules(pipeline, setting, stack):
            stack.enter_context(compiled_forward(module, mode, full_graph, pipeline.uncompiled))
        stack.enter_context(_strengths_as_tensors(pipeline))
        try:
            yield report
        finally:
            new: Made = made().since(before)
            report.graphs, report.compiled = new.graphs, new.compiled
            report.eager = "; ".join(f"{name} does not compile: {why}" for name, why in pipeline.uncompiled.items())


def _settings(pipeline: QuantizedPipeline) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of Dynamo and of Inductor that the pipeline's denoisers need."""
    dynamo, inductor = dict(_SETTINGS), {}
    for name in pipeline.index.denoisers:
        for backend, scheme in _schemes(pipeline, name):
            dynamo |= backend.dynamo
            inductor |= {**backend.inductor, **scheme.inductor}
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
        if placement := pipeline.placements.get("vae"):
            stack.enter_context(placement.as_one("its decoder is compiled as a whole, so that its blocks must stay"))
        yield _vae(pipeline).decoder


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers names for this (`_repeated_blocks`), else those that are streamed."""
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    found = [module for module in denoiser.modules() if type(module).__name__ in names]
    return found or [block for block in divide(denoiser, byte_size)[0] if any(block.children())]


def _vae(pipeline: QuantizedPipeline) -> Any:
    return getattr(pipeline.pipe, "vae", None)


@contextmanager
def _strengths_as_tensors(pipeline: QuantizedPipeline) -> Iterator[None]:
    """Make the strengths of LoRA layers (peft's `scaling`) tensors, so that a new one makes no new graph."""
    changed = []
    for name in pipeline.index.denoisers:
        for module in pipeline.models[name].modules():
            scaling = getattr(module, "scaling", None)
            if hasattr(module, "lora_A") and isinstance(scaling, dict):
                changed.append((scaling, dict(scaling)))
                device = pipeline.device
                scaling.update({key: torch.tensor(float(value), device=device) for key, value in scaling.items()})
    try:
        yield
    finally:
        for scaling, before in changed:
            scaling.update(before)
