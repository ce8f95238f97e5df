"""How a pipeline is made faster or smaller while it runs: compiling, attention, step caching, offloading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from types import ModuleType, NoneType
from typing import Any

import torch

from . import attending, compiling, offloading, step_cache
from .backend import Value
from .backends import get_backend
from .errors import SpecError, choices, did_you_mean
from .pipeline import QuantizedPipeline
from .settings import OFF, Setting, Way, make_setting, parse_setting
from .user_text import check_type

# In the order in which they are put in force: hooks of step caching go around compiled blocks.
_PARTS: dict[str, ModuleType] = {
    "compile": compiling,
    "attention": attending,
    "cache": step_cache,
    "offload": offloading,
}


@dataclass(frozen=True)
class Optimization:
    """What is done about a pipeline's runs. None does nothing about it."""

    compile: Setting | None = None
    attention: Setting | None = None
    cache: Setting | None = None
    offload: Setting | None = None

    def __post_init__(self):
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), Setting, NoneType)

    def __str__(self) -> str:
        return "; ".join(f"{name} {setting}" for name, setting in self.settings.items()) or OFF

    @property
    def settings(self) -> dict[str, Setting]:
        """Those that do something, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: setting for name, setting in found.items() if setting is not None}

    def data(self) -> dict[str, str]:
        """For JSON."""
        return {name: str(setting) for name, setting in self.settings.items()}


def ways(part: str) -> tuple[Way, ...]:
    """The ways of `compile`, `attention`, `cache` or `offload`."""
    return _PARTS[part].WAYS


def choose(part: str, way: str, options: Mapping[str, Value]) -> Setting | None:
    """A setting of `compile`, `attention`, `cache` or `offload`; None for `off`.

    Raises:
        SpecError: as `make_setting` says, or the way is one that is never taken, and why.
    """
    refused = getattr(_PARTS[part], "refused", None)
    if refused and (why := refused(way)):
        raise SpecError(why)
    return make_setting(part, way, options, ways(part))


def parse_optimization(**texts: str) -> Optimization:
    """From texts as `compile="blocks,mode=max-autotune"`, each as `parse_setting` reads it.

    Raises:
        SpecError: a text is malformed, or says what there is not.
    """
    for part, text in texts.items():
        if part not in _PARTS:
            raise SpecError(
                f"There is no {part} to optimize{did_you_mean(part, _PARTS)}; there are: {choices(_PARTS)}."
            )
        if not isinstance(text, str):
            raise SpecError(f"{part} is {text!r}; it takes a text, as {part}='{ways(part)[0].name}'.")
    said = {part: parse_setting(part, text, ways(part)) for part, text in texts.items()}
    return Optimization(**{part: choose(part, way, options) for part, (way, options) in said.items()})


def optimize(
    pipeline: QuantizedPipeline, optimization: Optimization, device: torch.device | str | None = None
) -> QuantizedPipeline:
    """Another handle on a pipeline, whose runs on `device` are optimized. The pipeline itself stays as it is. What it
    was optimized with before stays in force, where the new settings say nothing.

    Raises:
        SpecError: a setting does not work for this pipeline or device, or not with another one.
    """
    device = torch.device(device or (pipeline.device if pipeline.placements else pipeline.pipe._execution_device))
    before = (pipeline.optimization or Optimization()).settings
    optimization = Optimization(**(before | optimization.settings))
    for part, setting in optimization.settings.items():
        _PARTS[part].check(pipeline, setting, device)
    check_together(pipeline, optimization, device)
    return pipeline.with_optimization(optimization, device)


def check_together(pipeline: QuantizedPipeline, optimization: Optimization, device: torch.device) -> None:
    """Refuse settings that do not work with one another.

    Raises:
        SpecError: there are two of them.
    """
    compile, cache, offload = optimization.compile, optimization.cache, optimization.offload
    if compile and compile.way == "auto" and compiling.obstacle(pipeline):
        compile = None
    if compile and device.type == "cuda" and compiling.is_recording(compile) and (cache or offload):
        raise SpecError(
            f"compile mode={compile.options['mode']} records CUDA graphs, which "
            f"{f'cache {cache.way}' if cache else f'offload {offload.way}'} does not stand; use "
            "mode=max-autotune-no-cudagraphs."
        )
    if compile and compile.way == "whole" and cache:
        raise SpecError(f"compile whole leaves no place for cache {cache.way}, which acts on blocks; compile blocks.")
    if compile and cache and cache.way in step_cache.INSIDE:
        others = choices(set(step_cache.usable(pipeline)) - step_cache.INSIDE)
        raise SpecError(
            f"cache {cache.way} acts inside of the blocks that are compiled; leave compile off, or use one of: "
            f"{others}."
        )
    inside = offload and offload.way == "group" and (compile and compile.way == "whole" or _each_layer(offload))
    if compile and inside and compile.options.get("full_graph"):
        raise SpecError(
            f"compile {compile.way} cannot be one full graph while offload group moves weights inside of it; leave "
            "full_graph out, or use offload model."
        )


def _each_layer(offload: Setting) -> bool:
    return offload.options["type"] == "leaf_level"


def check_eager(pipeline: QuantizedPipeline, device: torch.device) -> None:
    """Refuse a run whose denoiser is of no use on a GPU unless compiled, and is not.

    Raises:
        SpecError: it is such a run.
    """
    compile = pipeline.optimization and pipeline.optimization.compile
    if device.type != "cuda" or (compile and not (compile.way == "auto" and compiling.obstacle(pipeline))):
        return
    for name in pipeline.index.denoisers:
        if spec := pipeline.specs.get(name):
            for scheme in map(get_backend(spec.backend).scheme, spec.schemes):
                if scheme.slow_eager:
                    raise SpecError(
                        f"{name} is {spec.backend}/{scheme.name}, which takes {scheme.slow_eager}; "
                        "compile it, or take another scheme."
                    )


def format_runs(pipeline: QuantizedPipeline) -> str:
    """What the pipeline's optimization did in its last run, in a line; empty if there is none."""
    return "; ".join(map(str, pipeline.reports.values()))


@contextmanager
def optimized(pipeline: QuantizedPipeline, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Put in force what the pipeline's handle says, for one call with these arguments, and leave a report of it.

    Raises:
        SpecError: a setting does not work with these arguments.
    """
    settings = (pipeline.optimization or Optimization()).settings
    with ExitStack() as stack:
        reports = {
            part: stack.enter_context(module.applied(pipeline, settings[part], arguments))
            for part, module in _PARTS.items()
            if part in settings
        }
        yield
    pipeline.reports = {part: report for part, report in reports.items() if report is not None}
