"""From a request to a loaded pipeline."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from . import reading
from .allocator import clean
from .availability import quiet_libraries
from .backends import get_backend
from .classes import components_of
from .errors import QuantError, SourceError, SpecError, choices, is_out_of_memory, one_sentence, stoppable, stopping
from .locating import find_folder
from .pipeline import QuantizedPipeline
from .planning import CheckedPlan, check_plan, own_files
from .quantizing import Job, Origin, describe_origin, load_quantized
from .source import PipelineIndex, read_index
from .specs import QuantPlan
from .store import LIMIT, OFF, Store, default_store
from .user_text import check_type

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")

OnProgress = Callable[[int, int, str], None]  # bytes of the weight files done, of all, whose; raise to stop


@dataclass(frozen=True)
class LoadRequest:
    """What to load and how.

    `source` is the folder of a diffusers pipeline, `demo`, or with `allow_download` a hub id. `dtype` is that of all
    that stays unquantized. `device` is where layers are quantized; the loaded components are on the CPU. `store` is
    the folder that keeps quantized components, by default in the user's cache folder, or `off`; `store_limit` is in
    bytes, by default the `Store`'s own.
    """

    source: str
    plan: QuantPlan = field(default_factory=QuantPlan)
    dtype: str = "bfloat16"
    device: str = "cpu"
    variant: str | None = None
    allow_download: bool = False
    revision: str | None = None
    store: Path | str | None = None
    store_limit: int | None = None

    def __post_init__(self):
        for name in ("variant", "revision"):
            check_type(name, getattr(self, name), str, NoneType)
        check_type("allow_download", self.allow_download, bool)
        check_type("store", self.store, str, Path, NoneType)
        check_type("store_limit", self.store_limit, int, NoneType)
        if self.store is not None and not str(self.store).strip():
            raise SpecError(f"store is empty; name a folder, or {OFF} to keep nothing.")
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype is {self.dtype!r}; use one of: {choices(DTYPES)}.")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise SpecError(f"device is {self.device!r}; use cpu, cuda or cuda:1.") from None
        if self.variant is not None and not re.fullmatch(r"[\w-]+", self.variant):
            raise SpecError(f"variant is {self.variant!r}; it takes a word, as fp16.")
        if not isinstance(self.plan, QuantPlan):
            raise SpecError(f"plan is a {type(self.plan).__name__}; make a QuantPlan, with parse_plan for example.")


def load_pipeline(request: LoadRequest, on_progress: OnProgress | None = None) -> QuantizedPipeline:
    """Load a pipeline, each component quantized as planned.

    Everything about the plan and the files is checked before the first weight is read. `on_progress` is called
    before each component and after each layer that was quantized: a component's files count as done by the share of
    its planned weights that is. What it raises stops the load and frees what was loaded.

    Raises:
        SpecError, SourceError, BackendUnavailable, DeviceUnsupported: as `check_plan` says.
        SourceError: a component's weights do not load, or do not belong to its class.
    """
    folder = find_folder(
        str(request.source), allow_download=request.allow_download, revision=request.revision, variant=request.variant
    )
    index = read_index(folder)
    dtype, device = getattr(torch, request.dtype), torch.device(request.device)
    checked = check_plan(request.plan, index, dtype, device, request.variant)
    for name in index.untaken:
        logger.warning("%s of %s is left out: %s takes none.", name, index.name, index.class_name)
    for name, unused in checked.unused.items():
        logger.warning("%s of %s %s.", name, index.name, unused)
    progress = _Progress(checked, index, on_progress)
    store = _store(request)
    modules: dict[str, nn.Module] = {}
    origins: dict[str, Origin] = {}
    with stoppable(), torch.inference_mode(False), torch.no_grad(), quiet_libraries(), clean(modules):
        for name in index.models:
            progress.begin(name)
            modules[name], origins[name] = _load_component(index, name, checked, dtype, device, store, progress)
            if name in checked.specs:
                logger.info("%s", describe_origin(name, checked.specs[name], origins[name]))
        progress.begin("")
        left_out = {name: _census(name, modules[name], checked) for name in checked.specs}
        pipe = assemble(index, modules | checked.weightless)
    pipe.set_progress_bar_config(disable=True)
    return QuantizedPipeline(
        pipe,
        index,
        request.plan,
        dtype,
        request.variant,
        checked.specs,
        left_out,
        _notes(checked),
        origins=origins,
        store=store.folder if store else None,
    )


def _notes(checked: CheckedPlan) -> dict[str, str]:
    """All that must be told of the components."""
    told = [checked.notes, checked.unused]
    return {name: "; ".join(notes[name] for notes in told if name in notes) for name in checked.notes | checked.unused}


def _store(request: LoadRequest) -> Store | None:
    folder = request.store or default_store()
    if str(folder).lower() == OFF:
        return None
    return Store(Path(folder).expanduser(), LIMIT if request.store_limit is None else request.store_limit)


class _Progress:
    """Tells a host how many bytes of the weight files are loaded."""

    def __init__(self, checked: CheckedPlan, index: PipelineIndex, on_progress: OnProgress | None):
        self.on_progress = stopping(on_progress)
        self.sizes = {"": 0}
        for name in index.models:
            files = checked.files[name].files if name in checked.files else own_files(checked.specs[name])
            self.sizes[name] = sum(os.path.getsize(file) for file in files)
        self.total = sum(self.sizes.values())
        self.name = ""
        self.before = 0  # of the components that are done

    def begin(self, name: str) -> None:
        self.before += self.sizes[self.name]
        self.name = name
        self.tell(0, 1)

    def tell(self, part: int, whole: int) -> None:
        self.on_progress(self.before + self.sizes[self.name] * part // whole, self.total, self.name)


def _load_component(
    index: PipelineIndex,
    name: str,
    checked: CheckedPlan,
    dtype: torch.dtype,
    device: torch.device,
    store: Store | None,
    progress: _Progress,
) -> tuple[nn.Module, Origin]:
    info = index.models[name]
    began = time.perf_counter()
    spec = checked.specs.get(info.name)
    try:
        if spec is None:
            model = reading.read_weights(info, dtype, checked.files[info.name].variant)
            return model, Origin("checkpoint", time.perf_counter() - began)
        layers = checked.layers[info.name].layers
        empty = checked.models.pop(info.name)
        if own := own_files(spec):
            model = get_backend(spec.backend).load(info, empty, dtype, layers, Path(own[0]), progress.tell)
            return model, Origin("file", time.perf_counter() - began)
        job = Job(index.name, info, spec, dtype, device, layers, checked.files[info.name], [empty])
        return load_quantized(job, store, progress.tell)
    except QuantError:
        raise
    except Exception as error:  # the libraries raise whatever a checkpoint makes them stumble over
        if is_out_of_memory(error):
            raise
        raise SourceError(f"{info.name} does not load: {one_sentence(error)}.") from error


def assemble(index: PipelineIndex, components: dict[str, Any]) -> Any:
    """The pipeline of these components, which are all of it.

    Raises:
        SourceError: they do not go together.
    """
    absent = dict.fromkeys(components_of(index.cls) - components.keys())
    try:
        return index.cls(**components, **absent, **index.settings)
    except Exception as error:  # as in _load_component, for what the class makes of its components
        if is_out_of_memory(error):
            raise
        raise SourceError(f"The pipeline does not load: {one_sentence(error)}.") from error


def _census(name: str, module: nn.Module, checked: CheckedPlan) -> dict[str, str]:
    """The layers left out and why, once it is sure that every planned one is quantized."""
    spec, planned = checked.specs[name], checked.layers[name]
    backend = get_backend(spec.backend)
    quantized = {path for path, part in module.named_modules() if backend.layer_format(part)}
    if not quantized:
        raise SpecError(f"{name} was to be quantized as {spec}, but its weights hold no quantized layer.")
    left_out = dict(planned.left_out)
    for path in planned.layers.keys() - quantized:
        left_out[path] = "not quantized by its file"
    if not own_files(spec) and len(left_out) > len(planned.left_out):
        raise SpecError(f"{name}: {len(left_out) - len(planned.left_out)} layers were not quantized as {spec}.")
    return left_out
