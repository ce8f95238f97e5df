"""The ways in which a denoiser's pass takes over parts of the passes before it, as data and as configs of diffusers.

Left out is TextKVCache: it serves NucleusMoE image models alone, whose pipelines do not tell their passes apart.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from .backend import Option, Value
from .errors import SpecError
from .pipeline import QuantizedPipeline
from .reuse import Reuse
from .settings import Setting, Way
from .user_text import parse_number

_Options = Mapping[str, Value]
_THRESHOLD = "how far a change may go before all is computed; where nothing is reused, raise it"
_FROM = Option("low", 100.0, "the timestep above which it is reused, of 1000", minimum=-1.0)
_UNTIL = Option("high", 800.0, "the timestep below which it is reused, of 1000", minimum=-1.0)

WAYS = (
    Way(
        "first_block",
        "Passes whose first block changes little take over the change that all other blocks made (FirstBlockCache).",
        (Option("threshold", 0.05, _THRESHOLD, minimum=0.0),),
    ),
    Way(
        "taylor",
        "Between full passes, what attention says is extrapolated from the passes before (TaylorSeer).",
        (
            Option("interval", 5, "one pass in so many is computed in full", minimum=1),
            Option("warm_up", 3, "so many first passes are computed in full", minimum=1),
            Option("order", 1, "the highest derivative that is used", minimum=0, maximum=4),
            Option("lite", False, "extrapolate what the last layer says instead, so that no block runs in between"),
        ),
    ),
    Way(
        "mag",
        "Passes take over the change that all blocks made, while that is known to grow little (MagCache).",
        (
            Option("threshold", 0.06, _THRESHOLD, minimum=0.0),
            Option("most", 3, "so many passes in a row at most", minimum=1),
            Option("keep", 0.2, "the share of first steps that are computed in full", minimum=0.0, maximum=1.0),
            Option(
                "ratios", "", "how that change grows at each step of this model, e.g. 1 1.2 1.1; none: as of FLUX.1"
            ),
            Option("calibrate", False, "reuse nothing, and report the ratios of this run"),
        ),
    ),
    Way(
        "pyramid",
        "Attention is computed in one pass of several and taken over in the others (Pyramid Attention Broadcast).",
        (
            Option("spatial", 2, "one pass in so many for attention within a picture", minimum=1),
            Option("temporal", 1, "one pass in so many for attention between frames", minimum=1),
            Option("cross", 1, "one pass in so many for attention to the prompt", minimum=1),
            _FROM,
            _UNTIL,
        ),
    ),
    Way(
        "faster",
        "Attention is computed in one pass of several and extrapolated in the others (FasterCache).",
        (
            Option("interval", 2, "one pass in so many is computed in full", minimum=1),
            Option("high", 681.0, "the timestep below which that is done, of 1000", minimum=-1.0),
            Option("weight", 0.5, "how far it is extrapolated: 0 takes over", minimum=0.0, maximum=1.0),
        ),
    ),
    Way(
        "sea",
        "Passes extrapolate the change that all blocks made, while the clean picture changes little (SeaCache).",
        (
            Option("threshold", 0.25, _THRESHOLD, minimum=0.0),
            Option("order", 1, "0 takes over, 1 extrapolates", minimum=0, maximum=1),
            Option("warm_up", 1, "so many first steps are computed in full", minimum=0),
            Option("final", 1, "so many last steps are computed in full", minimum=0),
            Option("most", 2, "so many passes in a row at most, 0: any number", minimum=0),
        ),
    ),
)
INSIDE: frozenset[str] = frozenset({"taylor", "pyramid", "faster"})  # hook modules within blocks, the others blocks

_ENDLESS = 10**6  # steps: at the last one diffusers prints the ratios and forgets them


def make_config(pipeline: QuantizedPipeline, setting: Setting, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    """What diffusers' `enable_cache` takes, for a run of the pipeline with these arguments.

    Raises:
        SpecError: the ratios of `mag` are not numbers.
    """
    return _CONFIGS[setting.way](pipeline, setting.options, arguments, reuse)


def defaults(way: Way) -> Setting:
    """The way with the defaults of its options."""
    return Setting(way.name, {option.name: option.default for option in way.options})


def _first_block(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(options["threshold"])


def _taylor(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import taylorseer_cache

    numbered = [f"{pattern}[12]?" for pattern in taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS]  # attn1, attn2 too
    return TaylorSeerCacheConfig(
        cache_interval=options["interval"],
        disable_cache_before_step=options["warm_up"],
        max_order=options["order"],
        taylor_factors_dtype=pipeline.dtype,
        cache_identifiers=numbered,
        use_lite_mode=options["lite"],
    )


def _mag(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import MagCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    if options["calibrate"]:
        return MagCacheConfig(calibrate=True, num_inference_steps=_ENDLESS)
    return MagCacheConfig(
        threshold=options["threshold"],
        max_skip_steps=options["most"],
        retention_ratio=options["keep"],
        num_inference_steps=_steps(pipeline, arguments),
        mag_ratios=_numbers(options["ratios"]) or FLUX_MAG_RATIOS,
    )


def _pyramid(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    kinds, within = ("spatial", "temporal", "cross"), (options["low"], options["high"])
    return PyramidAttentionBroadcastConfig(
        **{f"{kind}_attention_block_skip_range": options[kind] for kind in kinds},
        **{f"{kind}_attention_timestep_skip_range": within for kind in kinds},
        current_timestep_callback=lambda: pipeline.pipe.current_timestep,
    )


def _faster(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import FasterCacheConfig

    def timestep() -> Any:
        return math.inf if reuse.passes < 2 else pipeline.pipe.current_timestep  # the first has nothing to take over

    return FasterCacheConfig(
        spatial_attention_block_skip_range=options["interval"],
        spatial_attention_timestep_skip_range=(-1, options["high"]),
        attention_weight_callback=lambda module: options["weight"],
        is_guidance_distilled=True,
        current_timestep_callback=timestep,
    )


def _sea(pipeline: QuantizedPipeline, options: _Options, arguments: Mapping[str, Any], reuse: Reuse) -> Any:
    from diffusers import SeaCacheConfig

    return SeaCacheConfig(
        threshold=options["threshold"],
        residual_order=options["order"],
        retention_steps=options["warm_up"],
        cache_end_steps=options["final"],
        max_consecutive_cached=options["most"],
    )


_CONFIGS: dict[str, Callable[..., Any]] = {
    "first_block": _first_block,
    "taylor": _taylor,
    "mag": _mag,
    "pyramid": _pyramid,
    "faster": _faster,
    "sea": _sea,
}


def _steps(pipeline: QuantizedPipeline, arguments: Mapping[str, Any]) -> int:
    """Of a run with these arguments."""
    if own := arguments.get("sigmas") or arguments.get("timesteps"):
        return len(own)
    given = inspect.signature(type(pipeline.pipe).__call__).parameters.get("num_inference_steps")
    return arguments.get("num_inference_steps", given.default if given else 1)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [parse_number(word, float) for word in text.split()]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise SpecError(f"ratios is {text!r}; it takes numbers with spaces between them.")
    return numbers
