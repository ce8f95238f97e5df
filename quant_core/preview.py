"""Small pictures of what a run has come to, at a bounded cost."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from .errors import is_out_of_memory, one_sentence
from .generation import Step
from .latents import first_frame, foresee, grid, scale_factor, vae_channels
from .pipeline import QuantizedPipeline
from .request import GenerateRequest

SHARE = 0.02  # of the time of a run that its previews may take
INTERVAL = 0.1  # seconds between two previews, at least: what a host does with one has its cost too

_PICTURES = 32  # that a map is learned from, 8 latents along a side
_RIDGE = 1e-2  # of the latents' variance: how far the map distrusts what little it has seen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentRGB:
    """A linear map from latents to colours: weight (C, 3), bias (3)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """(H, W, 3) bytes on the CPU from latents (C, H, W) on any device, where the map is applied."""
        weight, bias = (part.to(latents.device) for part in (self.weight, self.bias))
        colours = latents.float().movedim(0, -1) @ weight + bias
        return colours.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


_learned: WeakKeyDictionary[torch.nn.Module, LatentRGB | None] = WeakKeyDictionary()


def latent_rgb(pipeline: QuantizedPipeline) -> LatentRGB | None:
    """The map for a pipeline, learned once from its own VAE and remembered as long as that lives.

    None where the VAE cannot encode pictures. Learn it before a run: it uses the VAE, for which a host may move
    other components away.
    """
    vae = getattr(pipeline.pipe, "vae", None)
    if vae is None:
        return None
    if vae not in _learned:
        try:
            with torch.inference_mode(False), torch.no_grad():
                _learned[vae] = _learn(vae, scale_factor(pipeline.pipe))
        except Exception as error:  # of any VAE there will be
            if is_out_of_memory(error):
                raise
            logger.debug("No previews: %s does not encode (%s).", type(vae).__name__, one_sentence(error))
            _learned[vae] = None
    return _learned[vae]


def _learn(vae: Any, factor: int) -> LatentRGB:
    """Ridge regression of pictures' colours on the latents that the VAE makes of them."""
    pictures = _pictures(8 * factor)
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    inputs = (pictures * 2 - 1).to(device, vae.dtype)
    video = any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
    parts = [_encode(vae, part.unsqueeze(2) if video else part) for part in inputs.split(4)]
    latents = _normalised(vae, torch.cat(parts))
    colours = functional.adaptive_avg_pool2d(pictures, latents.shape[-2:])
    x, y = (values.movedim(1, -1).flatten(0, -2) for values in (latents, colours))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    spread = x.T @ x
    weight = torch.linalg.solve(spread + _RIDGE * spread.diagonal().mean() * torch.eye(x.shape[1]), x.T @ y)
    if not weight.isfinite().all():
        raise ValueError("its latents are not finite")
    return LatentRGB(weight, y_mean - x_mean @ weight)


def _encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The latents (B, C, H, W) of pictures, of a video VAE those of its first frame."""
    encoded = vae.encode(pictures)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return (latents[:, :, 0] if latents.ndim == 5 else latents).float().cpu()


def _pictures(side: int) -> torch.Tensor:
    """(N, 3, side, side) of colours in 0..1 that flow into each other, the corners of the RGB cube among them."""
    generator = torch.Generator().manual_seed(0)
    colours = (torch.rand(_PICTURES, 3, 4, 4, generator=generator) * 1.5 - 0.25).clamp(0, 1)
    return functional.interpolate(colours, (side, side), mode="bilinear", align_corners=True)


def _normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) as they are while a pipeline denoises: (z - mean) / std * scaling factor, where the VAE's
    config, or as in LTX the VAE, names them."""

    def named(*names: str) -> torch.Tensor | None:
        for name in names:
            value = vae.config.get(name)
            value = vae._buffers.get(name) if value is None else value
            if value is not None:
                value = torch.as_tensor(value, dtype=torch.float32, device="cpu")
                return value.view(1, -1, 1, 1) if value.ndim else value
        return None

    mean, std, scaling = named("latents_mean", "shift_factor"), named("latents_std"), named("scaling_factor")
    latents = latents if mean is None else latents - mean
    latents = latents if std is None else latents / std
    return latents if scaling is None else latents * scaling


class Budget:
    """Time that may be spent beside a run: no more than a share of it, by what was spent before."""

    def __init__(self, share: float = SHARE, clock: Callable[[], float] = time.perf_counter):
        self.share = share
        self.clock = clock
        self.began = clock()
        self.spent = self.last = self.due = 0.0

    def allows(self) -> bool:
        """Whether spending as much as the last time would stay within the share of the time until now."""
        now = self.clock()
        return now >= self.due and self.spent + self.last <= self.share * (now - self.began)

    def __enter__(self):
        self.entered = self.clock()

    def __exit__(self, *error):
        now = self.clock()
        self.last, self.due = now - self.entered, now + INTERVAL
        self.spent += self.last


class Preview:
    """What each step of a run shows, drawn by `draw` from latents of (channels, height, width).

    A step whose preview would take the previews of the run above `SHARE` of its time has none, and there are no more
    than one in `INTERVAL`. The first is drawn at any cost, which is then paid off, and so is the last.
    """

    def __init__(
        self,
        pipeline: QuantizedPipeline,
        request: GenerateRequest,
        draw: Callable[[torch.Tensor], Any],
        channels: int | None = None,
        budget: Budget | None = None,
    ):
        self.pipeline = pipeline
        self.arguments = _size(pipeline, request)
        self.draw = draw
        self.channels = channels or vae_channels(getattr(pipeline.pipe, "vae", None))
        self.budget = budget or Budget()
        self.before: torch.Tensor | None = None
        self.failed = False

    def __call__(self, step: Step) -> Any | None:
        """What `draw` makes of the step, or None."""
        before, self.before = self.before, step.latents
        last = step.done >= step.total  # stays on the screen
        if step.latents is None or self.failed or not (last or self.budget.allows()):
            return None
        try:
            # Else the wait for the step itself, which the GPU may still be at, would count as the preview's.
            torch.get_device_module(step.latents.device).synchronize()
            with self.budget:
                return self.draw(self.latents(before, step))
        except Exception as error:  # of any pipeline there will be: a preview is no reason to fail
            if is_out_of_memory(error):
                raise
            logger.debug("No previews of %s: %s.", self.pipeline, one_sentence(error))
            self.failed = True
            return None

    def latents(self, before: torch.Tensor | None, step: Step) -> torch.Tensor:
        """(channels, height, width) of the finished latents, as far as the step lets them be told."""
        size = None
        if step.latents.ndim == 3:
            size = grid(self.pipeline, *step.latents.shape[1:], self.arguments)
        one = (None if latents is None else latents[:1] for latents in (before, step.latents))
        finished = foresee(self.pipeline.pipe.scheduler, *one, step.done, step.total)
        return first_frame(finished, self.channels, size)


def _size(pipeline: QuantizedPipeline, request: GenerateRequest) -> dict[str, Any]:
    """Height and width of the request, or where they are left out the pipeline's defaults."""
    accepted = inspect.signature(type(pipeline.pipe).__call__).parameters
    given = {"height": request.height, "width": request.width}
    return {name: value or getattr(accepted.get(name), "default", None) for name, value in given.items()}
