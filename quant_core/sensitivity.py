"""What quantizing each group of layers alone costs, measured through the real pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from .availability import ensure_available, ensure_runs
from .backend import Recipe
from .backends import get_backend
from .comparison import REFERENCE, OnProgress, Place, check_equal
from .errors import SpecError
from .exchanging import quantized
from .generation import Step, generate
from .groups import BY, LayerGroup
from .layers import plan_layers
from .loading import LoadRequest, load_pipeline
from .managing import on_device
from .metrics import error_of, mean_psnr, psnr_each, relative_error
from .picture import library_versions, request_settings
from .pipeline import QuantizedPipeline
from .planning import own_files
from .request import GenerateRequest
from .sensitivity_data import ComponentSensitivity, GroupSensitivity, Sensitivity
from .specs import QuantPlan, QuantSpec
from .texts import cleaned


@dataclass(frozen=True)
class SensitivityRequest:
    """What to measure, and on what.

    `load` names the pipeline without a plan, `specs` how a group is quantized, one after the other. `by` is group or
    layer. Each prompt is painted with each seed, `batch` prompts at once; `settings` are all else of a run.

    Raises:
        SpecError: there is nothing to measure, or a setting is none.
    """

    load: LoadRequest
    specs: Sequence[QuantSpec]
    prompts: Sequence[str]
    seeds: Sequence[int] = (0,)
    settings: GenerateRequest = GenerateRequest("")
    by: str = "group"
    batch: int = 1

    def __post_init__(self):
        object.__setattr__(self, "prompts", cleaned("prompts", tuple(self.prompts)))
        if not self.specs or not self.prompts or not self.seeds:
            raise SpecError("Sensitivity takes at least one scheme, one prompt and one seed.")
        if self.by not in BY:
            raise SpecError(f"by is {self.by!r}; use one of: {', '.join(BY)}.")
        if self.batch < 1:
            raise SpecError(f"batch is {self.batch}; it takes a whole number of at least 1.")
        if self.load.plan != QuantPlan():
            raise SpecError("The pipeline to measure is named without a plan; give what to measure as schemes.")


@dataclass(frozen=True)
class _Painted:
    images: torch.Tensor
    latents: list[torch.Tensor]  # of each batch, after its last step; none of a pipeline that shows none
    notices: list[str]


def measure_sensitivity(
    request: SensitivityRequest, on_progress: OnProgress | None = None, place: Place = on_device
) -> Sensitivity:
    """Paint in 16 bit, and again with each group of layers of the denoiser and the text encoders quantized alone.

    One pipeline is loaded, in which layers are exchanged. A host whose memory manager moves components gives a `place`
    of its own. `on_progress` is called at every step.

    Raises:
        SpecError, SourceError, BackendUnavailable, DeviceUnsupported: as `load_pipeline` and `generate` say.
        QuantError: the reference differs from itself, so that no distance from it would mean anything.
    """
    load = request.load
    dtype, device = getattr(torch, load.dtype), torch.device(load.device)
    recipes = {_whole(spec): Recipe(spec.scheme, spec.options, dtype, device) for spec in request.specs}
    for spec, recipe in recipes.items():
        _check(spec, recipe)
    pipeline = place(load_pipeline(load), load.device)
    index = pipeline.index
    parts = {name: pipeline.models[name] for name in index.default_reach if not index.models[name].prequantized}
    groups = {name: BY[request.by](model) for name, model in parts.items()}
    reached = {}
    for name, model in parts.items():
        for spec in recipes:
            fitting = plan_layers(model, spec, dtype, device, ()).layers
            for group in groups[name]:
                reached[name, group.name, spec] = [layer for layer in group.layers if layer in fitting]
    if not any(reached.values()):
        raise SpecError(f"{index.name} has no layer that could be quantized so; name another pipeline or scheme.")
    pictures = len(request.prompts) * len(request.seeds)
    done, total = 0, pictures * (2 + sum(map(bool, reached.values())))

    def paint(label: str) -> _Painted:
        def tell(finished: int = 0) -> None:
            nonlocal done
            done += finished
            if on_progress:
                on_progress(done, total, label)

        return _paint(pipeline, request, tell)

    reference = paint(REFERENCE)
    check_equal(paint(REFERENCE).images, reference.images)

    def measured(name: str, group: LayerGroup) -> GroupSensitivity:
        errors, latent_errors = {}, {}
        for spec, recipe in recipes.items():
            if not (layers := reached[name, group.name, spec]):
                continue
            with quantized(pipeline, name, layers, spec, recipe):
                painted = paint(f"{name}, {group.name}, {spec}")
            errors[str(spec)] = error_of(mean_psnr(psnr_each(painted.images, reference.images)))
            if reference.latents:
                pairs = zip(painted.latents, reference.latents, strict=True)
                latent_errors[str(spec)] = fmean(relative_error(*pair) for pair in pairs)
        weights = sum(parts[name].get_submodule(layer).weight.numel() for layer in group.layers)
        return GroupSensitivity(group.patterns, len(group.layers), weights, errors, latent_errors)

    return Sensitivity(
        index.class_name,
        index.name,
        pictures,
        _settings(request),
        library_versions(),
        {
            name: ComponentSensitivity(
                type(model).__name__, {group.name: measured(name, group) for group in groups[name]}
            )
            for name, model in parts.items()
        },
        tuple(dict.fromkeys(reference.notices)),
    )


def _whole(spec: QuantSpec) -> QuantSpec:
    """The spec reaching all layers.

    Raises:
        SpecError: it says more than a scheme.
    """
    if own_files(spec):
        raise SpecError(f"{spec} is a file and no way to quantize; name another scheme.")
    if spec != QuantSpec(spec.backend, spec.scheme, {}, spec.skip_modules) or spec.skip_modules:
        raise SpecError(
            f"Sensitivity measures schemes as they come; write {spec.backend}/{spec.scheme} and nothing more."
        )
    return replace(spec, skip_modules=())


def _check(spec: QuantSpec, recipe: Recipe) -> None:
    backend = get_backend(spec.backend)
    ensure_available(backend, backend.scheme(spec.scheme))
    ensure_runs(backend, backend.scheme(spec.scheme), recipe)


def _paint(pipeline: QuantizedPipeline, request: SensitivityRequest, tell: Callable[..., None]) -> _Painted:
    images, latents, notices = [], [], []
    for asked in _batches(request):
        last: list[torch.Tensor] = []

        def on_step(step: Step, last=last) -> None:
            tell()
            if step.latents is not None:
                last[:] = [step.latents]

        images.append(generate(pipeline, asked, on_step))
        latents += [kept.detach().float().cpu() for kept in last]
        notices += pipeline.notices
        tell(len(asked.prompt))
    return _Painted(torch.cat(images), latents, notices)


def _batches(request: SensitivityRequest) -> Iterator[GenerateRequest]:
    prompts = list(request.prompts)
    for seed in request.seeds:
        for start in range(0, len(prompts), request.batch):
            yield replace(request.settings, prompt=prompts[start : start + request.batch], seed=seed)


def _settings(request: SensitivityRequest) -> dict[str, Any]:
    """As JSON has them."""
    run = request_settings(replace(request.settings, prompt=list(request.prompts)))
    load = {"dtype": request.load.dtype, "device": request.load.device}
    return {**run, "seed": list(request.seeds), **load, "by": request.by, "batch": request.batch}
