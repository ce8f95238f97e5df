"""What the latents of a step show: the picture they will come to, laid out in rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .pipeline import QuantizedPipeline

# Parts of the names of schedulers whose steps add new noise, so that two steps do not share theirs.
_NEW_NOISE = ("Ancestral", "SDE", "LCM", "TCD", "DDPM")
_SCALE_FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")


def vae_channels(vae: Any) -> int | None:
    """The channels of a VAE's latents, or None where it does not say."""
    config = getattr(vae, "config", None)
    return getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)


def scale_factor(pipe: Any) -> int:
    """Pixels along a side for one latent."""
    return next((int(value) for name in _SCALE_FACTORS if (value := getattr(pipe, name, None))), 8)


def grid(pipeline: QuantizedPipeline, tokens: int, width: int, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) in tokens of a frame that was packed into `tokens` tokens of `width` numbers.

    `arguments` are those of the pipeline's call. None where neither its height and width nor a square explain it.
    """
    channels = vae_channels(getattr(pipeline.pipe, "vae", None))
    size = arguments.get("height"), arguments.get("width")
    if channels and all(size):
        pixels = scale_factor(pipeline.pipe) * max(1, math.isqrt(width // channels))
        height, across = (value // pixels for value in size)
        if height * across and tokens % (height * across) == 0:
            return height, across
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def first_frame(latents: torch.Tensor, channels: int, size: tuple[int, int] | None = None) -> torch.Tensor:
    """(channels, height, width) of the first frame of the first of the latents.

    They are (B, C, H, W), (B, C, F, H, W), (B, F, C, H, W) as CogVideoX has it, or packed as tokens (B, S, C * p * p)
    of `size`, a token's numbers being those of a patch of p x p in the order C, p, p (`_pack_latents` in diffusers).

    Raises:
        ValueError: they are none of these.
    """
    first = latents[0]
    if first.ndim == 2 and size:
        height, width = size
        patch = math.isqrt(first.shape[1] // channels)
        if first.shape[1] == channels * patch * patch and first.shape[0] >= height * width:
            patches = first[: height * width].reshape(height, width, channels, patch, patch)
            return patches.permute(2, 0, 3, 1, 4).reshape(channels, height * patch, width * patch)
    if first.ndim == 4:
        first = first[:, 0] if first.shape[0] == channels else first[0]
    if first.ndim == 3 and first.shape[0] == channels:
        return first
    raise ValueError(f"latents of {tuple(latents.shape)} are no picture of {channels} channels")


def foresee(scheduler: Any, before: torch.Tensor | None, after: torch.Tensor, done: int, total: int) -> torch.Tensor:
    """The finished latents, as far as they can be told from those before and after the last step.

    Latents at a noise level are a * finished + s * noise. Where both steps share their noise, these are two equations
    with one solution: for flow matching and Euler x0 = x1 - s1 * (x1 - x) / (s1 - s). Else it is the best linear
    guess for latents of unit variance, x1 * a1 / (a1**2 + s1**2).
    """
    levels = _levels(scheduler, done, total)
    if done >= total or levels is None:
        return after
    (a, s), (a1, s1) = levels
    scale = a1 * s - a * s1
    if before is None or before.shape != after.shape or _adds_noise(scheduler) or abs(scale) < 1e-4 * s:
        return after.float() * (a1 / (a1 * a1 + s1 * s1))
    return (after.float() * s - before.float() * s1) / scale


def _levels(scheduler: Any, done: int, total: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """(share of the finished latents, share of noise) before and after the last step, or None if unknown."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is not None and index and index < len(sigmas):
        pair = (float(sigmas[index - 1]), float(sigmas[index]))
        if split := getattr(scheduler, "_sigma_to_alpha_sigma_t", None):
            return tuple(tuple(map(float, split(torch.tensor(sigma)))) for sigma in pair)
        flow = "FlowMatch" in type(scheduler).__name__
        return tuple((1 - sigma if flow else 1.0, sigma) for sigma in pair)
    shares, timesteps = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "timesteps", None)
    if sigmas is not None or shares is None or timesteps is None or not 0 < done < total <= len(timesteps):
        return None
    at = len(timesteps) - total + done
    kept = [float(shares[int(timestep)]) for timestep in (timesteps[at - 1], timesteps[at])]
    return tuple((share**0.5, (1 - share) ** 0.5) for share in kept)


def _adds_noise(scheduler: Any) -> bool:
    config = getattr(scheduler, "config", None)
    return (
        any(part in type(scheduler).__name__ for part in _NEW_NOISE)
        or str(getattr(config, "algorithm_type", "")).startswith("sde")
        or bool(getattr(config, "stochastic_sampling", False))
    )
