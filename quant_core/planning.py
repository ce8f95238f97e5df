"""Checking a plan against a pipeline before the first weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .accounted import account
from .accounting import listed
from .architecture import empty_model
from .availability import ensure_available, ensure_runs
from .backend import Option, Recipe
from .backends import get_backend
from .checkpoint import WeightFiles, has_variant, weight_files
from .classes import components_of
from .errors import SourceError, SpecError, choices, did_you_mean
from .layers import LayerPlan, check_patterns, match_modules, plan_layers
from .prequantized import ensure_readable
from .skip_lists import recommended, with_patterns
from .source import ComponentInfo, PipelineIndex
from .specs import RECOMMENDED, QuantPlan, QuantSpec
from .weightless import open_weightless

_ALREADY = "its checkpoint is quantized already, with "


@dataclass(frozen=True)
class CheckedPlan:
    """What a plan comes to in one pipeline."""

    specs: dict[str, QuantSpec]  # of the components that will be quantized, their skip patterns written out
    layers: dict[str, LayerPlan]
    files: dict[str, WeightFiles]  # of every component with weights, unless the plan brings a file for it
    models: dict[str, nn.Module]  # of the components that will be quantized, without their weights
    weightless: dict[str, Any]  # the other components, opened
    notes: dict[str, str] = field(default_factory=dict)  # components the default could not serve, and why
    unused: dict[str, str] = field(default_factory=dict)  # components whose checkpoint has leftovers, and which


def check_plan(
    plan: QuantPlan,
    index: PipelineIndex,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
    *,
    here: bool = True,
) -> CheckedPlan:
    """Check everything that can go wrong with a plan and its source without loading weights.

    What this machine's packages and devices can run is left out unless it is to run `here`.

    Raises:
        SpecError: a component is unknown, has no weights, is quantized already or would not be quantized at all.
        SourceError: the pipeline's files are not what they should be.
        BackendUnavailable: a package that quantizes or reads a component is missing, too old or broken.
        DeviceUnsupported: a scheme does not run on the device, or a checkpoint needs a GPU.
    """
    for name, spec in plan.components.items():
        _check_name(name, index)
        _check_paths(spec)
        if own_files(spec) and (parts := index.models[name].parts):
            raise SpecError(f"{name} is {len(parts)} models in files of their own, and {spec} names one file.")
    if plan.default and own_files(plan.default):
        raise SpecError(f"{plan.default} is for one component; name the component instead of making it the default.")
    wanted = dict.fromkeys(index.default_reach, plan.default) if plan.default else {}
    wanted |= plan.components
    from_gguf = {name for name, info in index.models.items() if info.gguf_file}
    brought = {name: _own_spec(index.models[name]) for name in from_gguf - plan.components.keys()}
    wanted |= brought
    if here:
        _check_machine(wanted.values(), dtype, device)
    if lacking := components_of(index.cls) - set(index.cls._optional_components) - index.components.keys():
        raise SourceError(f"model_index.json names no {choices(lacking)}, which each {index.class_name} has.")
    weightless = open_weightless(index)
    files = _weight_files(index, variant, from_gguf | {name for name, spec in wanted.items() if own_files(spec)})
    plain = {name for name, info in index.models.items() if not info.prequantized}
    models = {name: empty_model(index.models[name], dtype) for name in wanted if name in plain or name in brought}
    unused = {}
    for name, found in files.items():
        if left := account(index.models[name], dtype, found.variant, models.get(name)):
            unused[name] = f"does not use {listed(left)}, which its checkpoint has"
    for name in plan.components.keys() & models.keys():
        _check_patterns([models[name]], plan.components[name])
    if plan.default and (served := [models[name] for name in models.keys() - plan.components.keys() - brought.keys()]):
        _check_patterns(served, plan.default)
    specs, layers, notes = {}, {}, {}
    for name, spec in wanted.items():
        full = with_patterns(spec, index.models[name].class_name)
        found: LayerPlan | str = f"{_ALREADY}{index.models[name].prequantized}"
        if name in models:
            found = _layers(plan_layers(models[name], full, dtype, device, _written(spec)))
        if isinstance(found, LayerPlan):
            specs[name], layers[name] = full, found
            if check := get_backend(spec.backend).check:
                check(index.models[name], spec, models[name], found.layers)
        elif name in plan.components or name in brought:
            ways = f"; leave {name} out of the plan, or load the checkpoint that it was made from"
            raise SpecError(f"{name} cannot be quantized as {spec}: {found}{ways * found.startswith(_ALREADY)}.")
        else:
            notes[name] = f"stays as it is: {found}"
    for name in plan.components.keys() & layers.keys():
        _check_effect([models[name]], [layers[name]], plan.components[name])
    if plan.default and (served := layers.keys() - plan.components.keys() - brought.keys()):
        _check_effect([models[name] for name in served], [layers[name] for name in served], plan.default)
    if plan.default:
        notes |= {name: f"stays as it is: {_ALREADY}gguf" for name in brought if name in index.default_reach}
    if plan.default and not specs.keys() - brought.keys():
        why = "; ".join(f"{name} {note}" for name, note in notes.items()) or "it has no denoiser or text encoder"
        way = "; leave the plan out" if _ALREADY in why else ""
        raise SpecError(f"The plan would quantize nothing of this pipeline: {why}{way}.")
    for name, found in files.items():
        for part in index.models[name].parts or (index.models[name],):
            if part.prequantized:
                ensure_readable(part, _files_of(part, found.variant), dtype, here=here)
    return CheckedPlan(specs, layers, files, {name: models[name] for name in specs}, weightless, notes, unused)


def _check_machine(specs: Iterable[QuantSpec], dtype: torch.dtype, device: torch.device) -> None:
    checked: list[tuple[str, Recipe]] = []
    for spec in specs:
        backend = get_backend(spec.backend)
        for recipe in spec.recipes(dtype, device).values():
            if (spec.backend, recipe) not in checked:
                checked.append((spec.backend, recipe))
                ensure_available(backend, backend.scheme(recipe.scheme), recipe.options)
                ensure_runs(backend, backend.scheme(recipe.scheme), recipe)


def _own_spec(info: ComponentInfo) -> QuantSpec:
    return QuantSpec("gguf", "file", {"path": str(info.gguf_file)})


def _check_name(name: str, index: PipelineIndex) -> None:
    if name in index.models:
        return
    if name in index.absent:
        raise SpecError(f"This pipeline comes without its optional {name}; it has: {choices(index.models)}.")
    if name in index.named.keys() - index.components.keys():
        has = choices(index.models)
        raise SpecError(f"{index.class_name} takes no {name}, though model_index.json names one; it has: {has}.")
    if name in index.components:
        kind = index.components[name].class_name
        raise SpecError(f"{name} is a {kind}, which has no weights; the plan can name: {choices(index.models)}.")
    hint = did_you_mean(name, index.models)
    raise SpecError(f"No component {name!r} in this {index.class_name}{hint}; it has: {choices(index.models)}.")


def own_files(spec: QuantSpec) -> list[str]:
    """The paths of files that a spec names."""
    return [str(spec.options[option.name]) for option in _path_options(spec)]


def _path_options(spec: QuantSpec) -> list[Option]:
    return [option for option in get_backend(spec.backend).options if option.suffix and option.name in spec.options]


def _weight_files(index: PipelineIndex, variant: str | None, others: set[str]) -> dict[str, WeightFiles]:
    found = {name: info for name, info in index.models.items() if name not in others}
    parts = [part for info in found.values() for part in info.parts or (info,)]
    if variant and not any(has_variant(part, variant) for part in parts):
        raise SourceError(f"No component has weights of the variant {variant!r}; load it without a variant.")
    return {name: _files_of(info, variant) for name, info in found.items()}


def _files_of(info: ComponentInfo, variant: str | None) -> WeightFiles:
    """Those of a component, one part after the other where it is several models."""
    if not info.parts:
        return weight_files(info, variant)
    found = [weight_files(part, variant) for part in info.parts]
    files = [file for part in found for file in part.files]
    return WeightFiles(files, next((part.variant for part in found if part.variant), None), None)


def _check_paths(spec: QuantSpec) -> None:
    for option in _path_options(spec):
        path = str(spec.options[option.name])
        if not path:
            raise SpecError(f"{spec} needs {option.name}: the path of a {option.suffix} file.")
        if not path.lower().endswith(option.suffix) or not os.path.isfile(path):
            raise SpecError(f"{option.name} is {path!r}; it must be an existing {option.suffix} file.")


def _written(spec: QuantSpec) -> list[str]:
    """The skip patterns that the user wrote himself."""
    return [pattern for pattern in spec.skip_modules or () if pattern != RECOMMENDED]


def _check_patterns(models: Sequence[nn.Module], spec: QuantSpec) -> None:
    check_patterns(models, _written(spec))
    for pattern, scheme in spec.mixed.items():
        check_patterns(models, [pattern], f"{scheme}'s pattern")
    classes = sorted({type(model).__name__ for model in models})
    if RECOMMENDED in (spec.skip_modules or ()) and not any(map(recommended, classes)):
        raise SpecError(f"No skip list is recommended for {', '.join(classes)}; write skip patterns of your own.")


def _check_effect(models: Sequence[nn.Module], found: Sequence[LayerPlan], spec: QuantSpec) -> None:
    """Check that each mixed pattern gives its scheme to a layer."""
    before: list[str] = []
    for pattern, scheme in spec.mixed.items():
        if not any(
            (match_modules(model, [pattern]) - match_modules(model, before)) & plan.layers.keys()
            for model, plan in zip(models, found, strict=True)
        ):
            raise SpecError(
                f"{scheme}={pattern} has no effect: all that it matches is skipped, does not fit the scheme, or is "
                "matched by a pattern before it; leave it out."
            )
        before.append(pattern)


def _layers(found: LayerPlan) -> LayerPlan | str:
    """The layers a spec reaches in a component, or why it reaches none."""
    if not found.layers:
        reasons = sorted(set(found.left_out.values())) or ["it has no linear layers"]
        return f"no layer would be quantized ({'; '.join(reasons)})"
    return found
