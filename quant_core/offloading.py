"""diffusers' own ways of keeping weights off the device, for one run at a time, for who wants just these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .availability import quiet_libraries
from .backend import Backend, Option
from .backends import get_backend
from .errors import SpecError
from .hooks import taken_back
from .pipeline import QuantizedPipeline
from .settings import Setting, Way
from .transfer import backend_of, copies, put

WAYS = (
    Way("managed", "Components come in turn, each as far as there is room, and the rest of it is streamed by blocks."),
    Way("model", "A component as a whole while it runs, as diffusers' enable_model_cpu_offload."),
    Way(
        "group",
        "Blocks or single layers while they run, as diffusers' enable_group_offload.",
        (
            Option(
                "type", "block_level", "What is moved at once: blocks, or each layer.", ("block_level", "leaf_level")
            ),
            Option("blocks", 1, "Blocks that are moved together, where blocks are.", minimum=1, maximum=1000),
            Option("stream", False, "Copy the next while one computes, which takes page-locked RAM of all weights."),
            Option("record_stream", False, "Let the allocator track the stream: less waiting, more memory."),
            Option("low_cpu_mem", False, "Lock RAM only for what is being copied: slower, less RAM."),
        ),
    ),
)
_REFUSED = {
    # Figures of github.com/vipshop/cache-dit, its OFFLOAD.md.
    "sequential": "offload is sequential, which takes 14 times as long as none (FLUX.1-dev on an L20, 335 s against "
    "23 s) and fails for bitsandbytes 4-bit, quanto and GGUF; use managed, or group,type=leaf_level.",
    "layerwise_casting": "offload is layerwise_casting, which is for unquantized weights and rounds them for good; "
    "quantize with torchao/fp8wo instead, which stores the same bytes.",
}


def refused(way: str) -> str:
    """Why a way of diffusers is never taken, or nothing."""
    return _REFUSED.get(way, "")


@dataclass
class OffloadReport:
    """What was in force."""

    way: str

    def __str__(self) -> str:
        return f"offload {self.way}"

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    """Refuse what diffusers cannot move.

    Raises:
        SpecError: a component or backend does not allow it, or the device cannot.
    """
    if setting.way == "managed" and not pipeline.placements:
        raise SpecError("offload managed is what a host does; call quant_core.manage on the pipeline first.")
    moved = [name for name, model in pipeline.models.items() if next(model.parameters()).device.type != "cpu"]
    if setting.way != "managed" and moved and not pipeline.placements:
        raise SpecError(
            f"offload {setting.way} wants all weights on the CPU; move {moved[0]} back, with pipe.to('cpu')."
        )
    if setting.way == "model":
        _check_model(pipeline)
    if setting.way == "group":
        _check_group(pipeline, setting, device)


def _check_model(pipeline: QuantizedPipeline) -> None:
    if not getattr(pipeline.pipe, "model_cpu_offload_seq", None):
        raise SpecError(f"{pipeline.index.class_name} has no model offload (model_cpu_offload_seq); use managed.")
    for name, spec in pipeline.specs.items():
        for scheme in map(get_backend(spec.backend).scheme, spec.schemes):
            if why := scheme.immovable:
                raise SpecError(f"offload model does not work for {name}, which is {spec}: {why}; use managed.")


def _check_group(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    streams = [name for name in ("stream", "record_stream", "low_cpu_mem") if setting.options[name]]
    if streams and not setting.options["stream"]:
        raise SpecError(f"offload group has no {streams[0]} without stream; add stream, or leave it out.")
    if streams and device.type != "cuda":
        raise SpecError(f"offload group streams only to a GPU, and the device is {device.type}; leave stream out.")
    for name, model in pipeline.models.items():
        if not getattr(model, "_supports_group_offloading", True):
            raise SpecError(f"offload group cannot move {name}, a {type(model).__name__}; use managed.")
        for backend, layer in _quantized(model):
            keeps_more = any(True for _ in backend.hidden_tensors(layer))
            why = (
                backend.group_offload
                or (keeps_more and "diffusers moves its packed weights and leaves their scales behind")
                or (setting.options["stream"] and backend.group_stream)
            )
            if why:
                raise SpecError(
                    f"offload group does not work for {name}, which is {backend.name}: {why}; use managed."
                )


def _quantized(model: nn.Module) -> list[tuple[Backend, nn.Module]]:
    """The backends that quantized its layers, as its weights tell, each with one of them."""
    found = ((backend_of(part), part) for part in model.modules())
    return list({backend.name: (backend, part) for backend, part in found if backend}.values())


@contextmanager
def applied(
    pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]
) -> Iterator[OffloadReport | None]:
    """Let diffusers move the weights, as long as this lasts. It moves stand-ins; the weights themselves stay where
    they are, so that afterwards all is as it was."""
    if setting.way == "managed":
        yield None
        return
    owner = pipeline.owner or pipeline
    owner.step_aside()
    models, device = pipeline.models.values(), pipeline.device
    weights = {name: list(owner.weights(name)) for name in pipeline.models}
    converting = {model: vars(model)["_apply"] for model in models if "_apply" in vars(model)}  # see placement
    home = []
    try:
        for model in models:
            home += put(copies(model.modules(), _itself, torch.device("cpu")))
            vars(model).pop("_apply", None)
        owner.aside = weights
        with taken_back(models), quiet_libraries():
            for model in models:
                vars(model).pop("_hf_hook", None)
            if setting.way == "model":
                pipeline.pipe.enable_model_cpu_offload(device=device)
            else:
                pipeline.pipe.enable_group_offload(onload_device=device, **_group(setting))
            yield OffloadReport(str(setting))
    finally:
        owner.aside = None
        pipeline.pipe._all_hooks = []
        for model, convert in converting.items():
            model._apply = convert
        put(home)


def _group(setting: Setting) -> dict[str, Any]:
    options = setting.options
    blocks = options["blocks"] if options["type"] == "block_level" else None
    return {
        "offload_type": options["type"],
        "num_blocks_per_group": blocks,
        "use_stream": options["stream"],
        "record_stream": options["record_stream"],
        "low_cpu_mem_usage": options["low_cpu_mem"],
        "non_blocking": options["stream"],
    }


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
