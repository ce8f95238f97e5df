"""What a plan costs, said from configs and the headers of weight files before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .availability import import_diffusers, quiet_libraries
from .backend import Backend, Recipe
from .backends import get_backend
from .dry_run import DryRun, dry_run
from .errors import gib
from .headers import stored_bytes
from .hollow import PlannedWeights, Quantized, hollow_models
from .inspection import count_parameters
from .layers import layer_recipes, linear_layers
from .loading import LoadRequest, assemble
from .locating import find_folder
from .pipeline import QuantizedPipeline
from .planning import check_plan
from .request import GenerateRequest, call_arguments
from .results import size_of
from .source import PipelineIndex, read_index
from .table import aligned
from .tiling import can_tile, knows_only_tiles

_LENGTH = 200  # characters of a prompt that make no difference to what an encoder takes
_PER_PIXEL = 4096  # bytes that decoders take, where a dry run did not reach one


@dataclass(frozen=True)
class ComponentEstimate:
    """One component, in bytes."""

    name: str
    class_name: str
    quantization: str  # backend/scheme of the plan, "" if none
    bytes_16bit: int  # its weights at two bytes each
    footprint: int  # its weights as they will be stored, scales included
    streamed: int  # of those, what is on the device while the component's blocks are streamed
    activations: int  # the most that one use takes beside the weights; 0 if the pipeline does not use it
    is_coarse: bool  # the dry run did not see it to its end


@dataclass(frozen=True)
class Estimate:
    """What a plan costs for one request."""

    components: tuple[ComponentEstimate, ...]
    image: tuple[int, int] | None  # width and height in pixels of what is made, where the dry run came to its end
    coarse: str  # why some figures follow a rule of thumb, "" if none does

    @property
    def peak_resident(self) -> int:
        """Bytes on the device at most, with all components on it."""
        parts = self.components
        return sum(part.footprint for part in parts) + max((part.activations for part in parts), default=0)

    @property
    def peak_in_turn(self) -> int:
        """Bytes on the device at most, with only the component on it that is in use."""
        return max((part.footprint + part.activations for part in self.components), default=0)

    @property
    def peak_streamed(self) -> int:
        """Bytes on the device at most, with only the component in use on it, streamed block by block."""
        return max((part.streamed + part.activations for part in self.components), default=0)


def estimate(load: LoadRequest, request: GenerateRequest, tiled: bool = False) -> Estimate:
    """What loading and generating will cost, on `load.device`, which need not be here; `tiled` with the VAE working in
    tiles, where it can.

    Raises:
        SpecError, SourceError, BackendUnavailable: as `load_pipeline` and `generate` say.
    """
    folder = find_folder(
        str(load.source), allow_download=load.allow_download, revision=load.revision, variant=load.variant
    )
    index, dtype = read_index(folder), getattr(torch, load.dtype)
    checked = check_plan(load.plan, index, dtype, torch.device(load.device), load.variant, here=False)
    quantized = {
        name: Quantized(get_backend(spec.backend), checked.layers[name].layers) for name, spec in checked.specs.items()
    }
    models = hollow_models(index, dtype)
    for model in filter(can_tile, models.values()):
        if tiled or knows_only_tiles(model):
            model.enable_tiling()
    with torch.inference_mode(False), quiet_libraries():
        pipe = assemble(index, models | checked.weightless)
        pipe.set_progress_bar_config(disable=True)
        run = _run(pipe, models, index, quantized, request, load.device)
    parts = []
    for name, model in models.items():
        weights = PlannedWeights(model, quantized.get(name))
        taken, is_coarse = _activations(name, model, run, request)
        spec = checked.specs.get(name)
        prequantized = None if spec else index.models[name].prequantized
        size = stored_bytes(checked.files[name].files) if prequantized else weights.footprint
        parts.append(
            ComponentEstimate(
                name=name,
                class_name=type(model).__name__,
                quantization=str(spec or prequantized or ""),
                bytes_16bit=2 * count_parameters(model),
                footprint=size,
                streamed=min(weights.streamed, size),
                activations=taken,
                is_coarse=is_coarse,
            )
        )
    return Estimate(tuple(parts), size_of(run.result), _why_coarse(run))


def activations(pipeline: QuantizedPipeline, request: GenerateRequest, device: str = "cpu") -> dict[str, int]:
    """Bytes that one use of each component takes beside its weights when a loaded pipeline runs a request on a device.

    It depends on the request (but for its seed), the dtype, the specs and the settings of the VAE, as tiling.

    Raises:
        SpecError: as `generate` says.
    """
    quantized = {}
    models = hollow_models(pipeline.index, pipeline.dtype)
    for name, spec in pipeline.specs.items():
        left_out = pipeline.left_out.get(name, {})
        names = [path for path, _ in linear_layers(models[name]) if path not in left_out]
        layers = layer_recipes(models[name], spec, names, pipeline.dtype, torch.device(device))
        quantized[name] = Quantized(get_backend(spec.backend), layers)
    for name, real in pipeline.models.items():
        settings = {key: value for key, value in vars(real).items() if type(value) in (bool, int, float)}
        vars(models[name]).update(settings)  # as use_tiling
    pipe = _with_models(pipeline.pipe, {id(real): models[name] for name, real in pipeline.models.items()})
    with torch.inference_mode(False), quiet_libraries():
        run = _run(pipe, models, pipeline.index, quantized, request, device)
    return {name: _activations(name, model, run, request)[0] for name, model in models.items()}


def _with_models(pipe: Any, models: Mapping[int, nn.Module]) -> Any:
    """A copy of a pipeline, and of those inside of it, with other models in the place of its own, which `models` has
    by their id."""
    made = copy.copy(pipe)
    for name, part in vars(pipe).items():
        if id(part) in models:
            vars(made)[name] = models[id(part)]
        elif isinstance(part, import_diffusers().DiffusionPipeline):
            vars(made)[name] = _with_models(part, models)
    return made


def needs(pipeline: QuantizedPipeline, request: GenerateRequest) -> dict[str, int]:
    """`activations` on the device where the pipeline runs, looked at once for requests that differ in what does not
    count: the seed, the steps, the words of a prompt. Whether a VAE tiles counts.

    Raises:
        SpecError: as `generate` says.
    """
    prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
    lengths = len(prompts), max(map(len, prompts)) // _LENGTH
    alike = replace(request, prompt="", negative_prompt=None, seed=0, steps=None, remember=True, extra={})
    settings = [setting for model in pipeline.models.values() for setting in vars(model).items()]
    tiles = [setting for setting in settings if setting[0].startswith(("use_tiling", "tile_"))]
    kind = repr((alike, lengths, request.negative_prompt is None, sorted(request.extra.items(), key=str), tiles))
    if kind not in pipeline.needs:
        pipeline.needs[kind] = activations(pipeline, request, pipeline.device.type)
    return pipeline.needs[kind]


def _run(
    pipe: Any,
    models: Mapping[str, nn.Module],
    index: PipelineIndex,
    quantized: Mapping[str, Quantized],
    request: GenerateRequest,
    device: str,
) -> DryRun:
    arguments = call_arguments(SimpleNamespace(pipe=pipe, index=index), request)
    workspaces = {}
    for name, (backend, layers) in quantized.items():
        for path, recipe in layers.items():
            layer = models[name].get_submodule(path)
            shape = layer.out_features, layer.in_features
            workspaces[layer] = partial(_workspace, backend, recipe, shape)
    return dry_run(pipe, models, arguments, workspaces, torch.device(device))


def _workspace(backend: Backend, recipe: Recipe, shape: tuple[int, int], rows: int):
    return backend.workspace(recipe, rows, *shape)


def _activations(name: str, model: nn.Module, run: DryRun, request: GenerateRequest) -> tuple[int, bool]:
    """The most bytes that a use of the component takes beside its weights, and whether a rule of thumb says so."""
    seen = run.peaks.get(name, 0)
    if not run.failure or (name in run.peaks and name != run.unfinished):
        return seen, False
    if hasattr(model, "decode"):
        pixels = (request.width or 1024) * (request.height or 1024) * (request.images_per_prompt or 1)
        return max(seen, _PER_PIXEL * pixels), True
    return max(seen, count_parameters(model) // 2), True


def _why_coarse(run: DryRun) -> str:
    if not run.failure:
        return ""
    where = f" in {run.unfinished}" if run.unfinished else ""
    return (
        f"The dry run ended early{where} ({run.failure}), so what is marked with ~ is a rule of thumb: "
        f"{_PER_PIXEL // 1024} KiB a pixel for decoders, a quarter of the weights in 16 bit for others."
    )


def estimate_data(found: Estimate) -> dict[str, Any]:
    """The estimate as plain data for JSON, with its totals."""
    return {
        **asdict(found),
        "peak_resident": found.peak_resident,
        "peak_in_turn": found.peak_in_turn,
        "peak_streamed": found.peak_streamed,
    }


def format_estimate(found: Estimate) -> str:
    """The estimate as an aligned table, with its totals below it."""
    rows = [("component", "class", "quantization", "16 bit", "stored", "streamed", "activations")]
    for part in found.components:
        sizes = (part.bytes_16bit, part.footprint, part.streamed)
        used = ("~" if part.is_coarse else "") + gib(part.activations) if part.activations else "unused"
        rows.append((part.name, part.class_name, part.quantization or "-", *map(gib, sizes), used))
    totals = (sum(part.bytes_16bit for part in found.components), sum(part.footprint for part in found.components))
    rows.append(("total", "", "", *map(gib, totals), "", ""))
    lines = aligned(rows, right=range(3, 7))
    if found.image:
        lines.append("size: {} x {}".format(*found.image))
    lines.append(f"peak with all components on the device: {gib(found.peak_resident)}")
    lines.append(f"peak with only the component in use on it: {gib(found.peak_in_turn)}")
    lines.append(f"peak with that one streamed block by block: {gib(found.peak_streamed)}")
    return "\n".join([*lines, *filter(None, [found.coarse])])
