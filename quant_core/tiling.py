"""A decode in tiles, for a run that would not fit its device otherwise, and of a VAE that knows no other."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import gib
from .inspection import footprint
from .pipeline import QuantizedPipeline

_SETTINGS = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")  # of VAEs of diffusers
_LEAST = 32  # latents on a tile's side, of which diffusers' tiles overlap by a quarter

logger = logging.getLogger(__name__)


@contextmanager
def tiled(pipeline: QuantizedPipeline, request: Any) -> Iterator[None]:
    """For one run of a `GenerateRequest` that has begun: where a VAE's weights and what it needs beside them
    (`pipeline.activations`) exceed the room of its device (`pipeline.room`), it works in tiles, and the run begins
    anew, so that the host learns what it needs so. Taken back however the run ends.

    A VAE that cannot tile, or would need no less, works as ever. One that decodes in no other way works in its tiles
    in every run.
    """
    vaes = {name: model for name, model in pipeline.models.items() if can_tile(model)}
    before = {name: {key: getattr(vae, key) for key in _SETTINGS if hasattr(vae, key)} for name, vae in vaes.items()}
    try:
        for name, vae in vaes.items():
            if knows_only_tiles(vae):
                vae.enable_tiling()
                pipeline.begin(request)
                _tell(pipeline, f"{name} works in tiles in this run, as {type(vae).__name__} decodes in no other way.")
            elif _is_too_large(pipeline, name):
                _tile(pipeline, request, name, vae, before[name])
        yield
    finally:
        for name, vae in vaes.items():
            _restore(vae, before[name])


def knows_only_tiles(model: nn.Module) -> bool:
    """Whether a VAE decodes in tiles alone: the code that would decode without them ends in raising an error."""
    decode = inspect.unwrap(getattr(type(model), "_decode", None) or getattr(type(model), "decode", None))
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(decode)))
    except (OSError, TypeError):  # there is no source
        return False
    return isinstance(code.body[0].body[-1], ast.Raise)


def can_tile(model: nn.Module) -> bool:
    """Whether a component can work in tiles, and does not yet."""
    return getattr(model, "use_tiling", None) is False and callable(getattr(model, "enable_tiling", None))


def _is_too_large(pipeline: QuantizedPipeline, name: str) -> bool:
    used = pipeline.activations.get(name, 0)
    return bool(pipeline.room and used) and _weights(pipeline, name) + used > pipeline.room


def _weights(pipeline: QuantizedPipeline, name: str) -> int:
    placement = pipeline.placements.get(name)
    return placement.size if placement else footprint(pipeline.models[name])


def _tile(pipeline: QuantizedPipeline, request: Any, name: str, vae: nn.Module, before: dict[str, Any]) -> None:
    """In the VAE's own tiles, or smaller ones where those do not fit and it is known how to make them so."""
    whole = pipeline.activations[name]
    vae.enable_tiling()
    pipeline.begin(request)
    while _is_too_large(pipeline, name) and _halve(vae):
        pipeline.begin(request)
    used = pipeline.activations.get(name, whole)
    if used >= whole:
        _restore(vae, before)
        pipeline.begin(request)
        return
    sizes = [gib(_weights(pipeline, name) + needed) for needed in (whole, used)]
    _tell(
        pipeline,
        f"{name} works in tiles in this run, which changes the picture slightly at their seams: as a whole it would "
        f"need {sizes[0]}, in tiles it needs {sizes[1]}, and its device gives {gib(pipeline.room)}.",
    )


def _tell(pipeline: QuantizedPipeline, notice: str) -> None:
    logger.info(notice)
    pipeline.notices.append(notice)


def _halve(vae: nn.Module) -> bool:
    """Make the tiles of AutoencoderKL and its like smaller; whether that was done."""
    sizes = [getattr(vae, name, None) for name in _SETTINGS[1:]]
    if not all(type(size) is int and size % 2 == 0 for size in sizes) or sizes[1] < 2 * _LEAST:
        return False
    for name, size in zip(_SETTINGS[1:], sizes, strict=True):
        setattr(vae, name, size // 2)
    return True


def _restore(vae: nn.Module, before: dict[str, Any]) -> None:
    for name, value in before.items():
        setattr(vae, name, value)
