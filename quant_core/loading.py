"""From a request to a loaded pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocator import clean
from .architecture import component_class, is_transformers, pipeline_class
from .availability import quiet_libraries
from .backends import backends, get_backend
from .checkpoint import WeightFiles
from .errors import QuantError, SourceError, SpecError, choices, is_out_of_memory, one_sentence
from .layers import quantize_layers
from .pipeline import QuantizedPipeline
from .planning import CheckedPlan, check_plan
from .source import ComponentInfo, PipelineIndex, find_folder, read_index
from .specs import QuantPlan

DTYPES = ("bfloat16", "float16", "float32")

OnProgress = Callable[[int, int, str], None]  # bytes of the weight files done, of all, whose; raise to stop


def default_cache() -> Path:
    """Where converted components are kept outside ComfyUI: the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # which counts only if absolute, says its specification
    return Path(given if os.path.isabs(given) else Path.home() / ".cache") / "quantized_diffusers"


@dataclass(frozen=True)
class LoadRequest:
    """What to load and how.

    `source` is the folder of a diffusers pipeline, `demo`, or with `allow_download` a hub id. `dtype` is that of all
    that stays unquantized. `device` is where layers are quantized; the loaded components are on the CPU.
    """

    source: str
    plan: QuantPlan = field(default_factory=QuantPlan)
    dtype: str = "bfloat16"
    device: str = "cpu"
    variant: str | None = None
    allow_download: bool = False
    revision: str | None = None
    cache: Path | None = None

    def __post_init__(self):
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
    progress = _Progress(checked, index, on_progress)
    modules: dict[str, nn.Module] = {}
    with torch.inference_mode(False), torch.no_grad(), quiet_libraries(), clean(modules):
        for name, info in index.models.items():
            progress.begin(name)
            modules[name] = _load_component(info, checked, request, dtype, progress)
        progress.begin("")
        left_out = {name: _census(name, modules[name], checked) for name in checked.specs}
        pipe = assemble(index, modules)
    pipe.set_progress_bar_config(disable=True)
    return QuantizedPipeline(pipe, index, request.plan, dtype, checked.specs, left_out, checked.notes)


class _Progress:
    """Tells a host how many bytes of the weight files are loaded."""

    def __init__(self, checked: CheckedPlan, index: PipelineIndex, on_progress: OnProgress | None):
        self.on_progress = on_progress
        self.sizes = {"": 0}
        for name in index.models:
            own = (Path(str(value)) for value in checked.specs[name].options.values()) if name in checked.specs else ()
            files = checked.files[name].files if name in checked.files else filter(Path.is_file, own)
            self.sizes[name] = sum(file.stat().st_size for file in files)
        self.total = sum(self.sizes.values())
        self.name = ""
        self.before = 0  # of the components that are done
        self.telling = False  # so that what the host raises is not taken for the checkpoint's fault

    def begin(self, name: str) -> None:
        self.before += self.sizes[self.name]
        self.name = name
        self.tell(0, 1)

    def tell(self, part: int, whole: int) -> None:
        if self.on_progress:
            self.telling = True
            self.on_progress(self.before + self.sizes[self.name] * part // whole, self.total, self.name)
            self.telling = False


def _load_component(
    info: ComponentInfo, checked: CheckedPlan, request: LoadRequest, dtype: torch.dtype, progress: _Progress
) -> nn.Module:
    files, variant = checked.files.get(info.name, WeightFiles([], None))
    try:
        spec = checked.specs.get(info.name)
        if spec is None:
            return read_weights(info, dtype, variant)
        backend, recipe = get_backend(spec.backend), checked.recipes[info.name]
        layers = checked.layers[info.name].layers
        if backend.load:
            cache = Path(request.cache or default_cache())
            read = partial(read_weights, info, dtype, variant)
            return backend.load(info, spec, recipe, layers, files, cache, read, progress.tell)
        model = read_weights(info, dtype, variant)
        quantize_layers(model, layers, backend, recipe, progress.tell)
        return model
    except QuantError:
        raise
    except Exception as error:  # the libraries raise whatever a checkpoint makes them stumble over
        if is_out_of_memory(error) or progress.telling:
            raise
        raise SourceError(f"{info.name} does not load: {one_sentence(error)}.") from error


def read_weights(info: ComponentInfo, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """A component as its checkpoint has it, on the CPU in `dtype`.

    Raises:
        SourceError: the checkpoint lacks weights of the class, which the libraries would fill with random numbers.
    """
    cls = component_class(info)
    arguments: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
    if is_transformers(cls):
        arguments |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # else it names them in its log only
    else:
        arguments["torch_dtype"] = dtype
    model, found = cls.from_pretrained(info.folder, output_loading_info=True, **arguments)
    if absent := sorted(found["missing_keys"]) or sorted(str(item[0]) for item in found.get("mismatched_keys", ())):
        raise SourceError(
            f"{info.name}: its checkpoint lacks {len(absent)} weights of {cls.__name__}, as {absent[0]}."
        )
    if info.prequantized:
        for backend in backends().values():
            if backend.settle:
                backend.settle(model)
        model.to("cpu")  # some libraries quantize on the GPU, and leave it there
    return model.eval().requires_grad_(False)


def assemble(index: PipelineIndex, modules: dict[str, nn.Module]) -> Any:
    """The pipeline of these components, with its scheduler and tokenizers.

    Raises:
        SourceError: one of those does not load.
    """
    try:
        return pipeline_class(index).from_pretrained(index.folder, local_files_only=True, **modules)
    except Exception as error:  # as in _load_component, for schedulers and tokenizers
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
    for path in set(planned.layers) - quantized:
        left_out[path] = "not quantized by its file"
    if backend.load is None and len(left_out) > len(planned.left_out):
        raise SpecError(f"{name}: {len(left_out) - len(planned.left_out)} layers were not quantized as {spec}.")
    return left_out
