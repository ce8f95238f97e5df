"""A denoiser's pass takes over parts of the passes before it, by the caching of diffusers, for one run at a time."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import nn

from .availability import quiet
from .cache_ways import INSIDE, WAYS, defaults, make_config
from .errors import SpecError, choices
from .hooks import taken_back
from .pipeline import QuantizedPipeline
from .reuse import Reuse, counting, reached
from .settings import OFF, Setting

__all__ = ["INSIDE", "WAYS", "applied", "check"]

_ONE_STATE = ("pyramid", "faster")  # ask for the timestep, and keep one state per module, whichever prompt it is for


def check(pipeline: QuantizedPipeline, setting: Setting, device: torch.device) -> None:
    """Check that the pipeline's denoisers can be cached this way, which is the same on every device.

    Raises:
        SpecError: they cannot.
    """
    if why := _obstacle(pipeline, setting):
        works = [OFF, *usable(pipeline)]
        remedy = f"use one of: {choices(works)}" if len(works) > 1 else "leave it off, as no other does"
        raise SpecError(f"cache {setting.way} does not work here: {why}; {remedy}.")


def usable(pipeline: QuantizedPipeline) -> list[str]:
    """The ways that work for the pipeline with the defaults of their options."""
    return [way.name for way in WAYS if not _obstacle(pipeline, defaults(way))]


@contextmanager
def applied(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]) -> Iterator[Reuse]:
    """Cache during one run of the pipeline with these arguments; yields what it reused.

    Raises:
        SpecError: the run makes passes for two prompts, which this way would mix up.
    """
    _check_passes(pipeline, setting, arguments)
    reuse = Reuse(setting.way)
    with ExitStack() as stack:
        for denoiser in _denoisers(pipeline):
            stack.enter_context(taken_back([denoiser]))
            with quiet("diffusers"):
                denoiser.enable_cache(make_config(pipeline, setting, arguments, reuse))
            stack.enter_context(counting(denoiser, reuse))
            if setting.options.get("calibrate"):
                stack.enter_context(_measuring_ratios(denoiser, reuse))
        yield reuse


@contextmanager
def _measuring_ratios(denoiser: nn.Module, reuse: Reuse) -> Iterator[None]:
    """Keep the mean over the prompts of each step's ratio, which diffusers forgets when the run ends."""
    managers = {id(hook.state_manager): hook.state_manager for hook in reached(denoiser)}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states = (state for manager in managers.values() for state in manager._state_cache.values())
        reuse.ratios = [fmean(step) for step in zip(*(state.calibration_ratios for state in states), strict=False)]

    handle = denoiser.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _denoisers(pipeline: QuantizedPipeline) -> list[nn.Module]:
    return [pipeline.models[name] for name in pipeline.index.denoisers]


def _obstacle(pipeline: QuantizedPipeline, setting: Setting) -> str:
    """Why the pipeline cannot be cached this way, or nothing."""
    from diffusers import CacheMixin

    owner, denoisers = pipeline.index.class_name, _denoisers(pipeline)
    for denoiser in denoisers:
        if not isinstance(denoiser, CacheMixin):
            return f"diffusers has no caching for {type(denoiser).__name__}"
    if "cache_context" not in _code(pipeline).co_names:
        return f"{owner} does not tell its passes apart (it enters no cache_context)"
    if setting.way in _ONE_STATE and not hasattr(type(pipeline.pipe), "current_timestep"):
        return f"{owner} does not say at which timestep it is"
    if setting.way == "sea" and "sigma" not in _texts(pipeline):
        return f"{owner} does not say at which noise level it is"
    if setting.way == "mag" and len(denoisers) > 1:
        return f"{owner} shares its steps among {len(denoisers)} denoisers"
    for denoiser in denoisers:
        unfit = "" if setting.way in INSIDE else _block_obstacle(denoiser, setting)
        if unfit := unfit or _reach_obstacle(pipeline, denoiser, setting):
            return unfit
    return ""


def _block_obstacle(denoiser: nn.Module, setting: Setting) -> str:
    """Why the blocks of a denoiser cannot be left out, or nothing."""
    from diffusers import WanTransformer3DModel
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as lists
    from diffusers.hooks._helpers import TransformerBlockRegistry

    name, config = type(denoiser).__name__, denoiser.config
    children = ((key, child) for key, child in denoiser.named_children() if isinstance(child, nn.ModuleList))
    blocks = [block for key, child in children if key in lists for block in child]
    if len(blocks) < 2:
        return f"{name} has {len(blocks)} blocks in a row, where 2 are needed at least"
    known = []
    for kind in dict.fromkeys(map(type, blocks)):
        try:
            known.append(TransformerBlockRegistry.get(kind))
        except ValueError:
            return f"diffusers does not know what {kind.__name__} of {name} returns"
    if setting.way == "first_block" and len({entry.return_encoder_hidden_states_index is None for entry in known}) > 1:
        return f"the blocks of {name} do not all return the same"
    if any(entry.hidden_states_argument_name != "hidden_states" for entry in known):
        return f"the blocks of {name} call their input by another name"
    of_flux_1 = name == "FluxTransformer2DModel" and (config.num_layers, config.num_single_layers) == (19, 38)
    if setting.way == "mag" and not (setting.options["calibrate"] or setting.options["ratios"] or of_flux_1):
        return f"the ratios of this {name} are not known (a run with mag,calibrate reports them)"
    if setting.way == "sea" and not (
        isinstance(denoiser, WanTransformer3DModel) and config.in_channels == config.out_channels
    ):
        return f"diffusers does not know which input of {name} is the video"
    return ""


def _reach_obstacle(pipeline: QuantizedPipeline, denoiser: nn.Module, setting: Setting) -> str:
    """Why caching a denoiser would change nothing, or spoil it, or nothing: found by trying."""
    name = type(denoiser).__name__
    if setting.options.get("lite") and not isinstance(getattr(denoiser, "proj_out", None), nn.Module):
        return f"{name} has no last layer by the name of proj_out, which lite is about"
    with taken_back([denoiser]), quiet("diffusers"):
        denoiser.enable_cache(make_config(pipeline, setting, {}, Reuse(setting.way)))
        found = len(reached(denoiser))
    return f"it reaches no block of {name}" if found <= bool(setting.options.get("lite")) else ""


def _check_passes(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any]) -> None:
    """Refuse a run with passes for two prompts where one state would serve both."""
    if setting.way not in _ONE_STATE:
        return
    contexts = {text for text in _texts(pipeline) if re.fullmatch(r"(un)?cond(_\w+)?", text)}
    shares_a_pass = contexts == {"cond_uncond"} and setting.way == "pyramid"
    knob = _guided_by(pipeline, arguments)
    if not contexts or (knob and not shares_a_pass):
        remedy = f"set {knob} to 1" if knob else "use another cache"
        raise SpecError(
            f"cache {setting.way} would mix up the prompt and the negative prompt, for both of which "
            f"{pipeline.index.class_name} runs its denoiser; {remedy}."
        )


def _guided_by(pipeline: QuantizedPipeline, arguments: Mapping[str, Any]) -> str:
    """The argument by which this run contrasts the prompt with a negative one, or nothing."""
    accepted = inspect.signature(type(pipeline.pipe).__call__).parameters
    knob = next((name for name in ("true_cfg_scale", "guidance_scale") if name in accepted), "")
    if knob == "true_cfg_scale" and not any(
        key.startswith("negative_prompt") and value is not None for key, value in arguments.items()
    ):
        return ""
    scale = arguments.get(knob, accepted[knob].default) if knob else 1
    return "" if isinstance(scale, (int, float)) and scale <= 1 else knob


def _code(pipeline: QuantizedPipeline) -> Any:
    return inspect.unwrap(type(pipeline.pipe).__call__).__code__


def _texts(pipeline: QuantizedPipeline) -> set[str]:
    """The texts in the pipeline's `__call__`: among them are the names of passes and of what it says of each."""
    items = (item if isinstance(item, tuple) else (item,) for item in _code(pipeline).co_consts)
    return {text for item in items for text in item if isinstance(text, str)}
