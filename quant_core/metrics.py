"""How far images and latents are from their reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F

from .errors import SpecError

MOST_PSNR = 100.0  # dB that one image counts as in a mean
_WINDOW, _SIGMA = 11, 1.5  # pixels, of the gaussian window (Wang et al. 2004, III.C)
_C1, _C2 = 0.01**2, 0.03**2  # (K L)^2 with their K and the range L = 1


def psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of all images (N, H, W, C) in 0..1 together: 10 log10(1 / mean squared error).

    Infinite where they are equal.

    Raises:
        SpecError: the shapes differ.
    """
    _check(images, references)
    return psnr_of((images.double() - references.double()).square().mean().item())


def psnr_of(error: float) -> float:
    """The PSNR in dB of a mean squared error of images in 0..1, infinite of none."""
    return 10 * math.log10(1 / error) if error else math.inf


def error_of(decibels: float) -> float:
    """The mean squared error that a PSNR in dB says."""
    return 10 ** (-decibels / 10)


def psnr_each(images: torch.Tensor, references: torch.Tensor) -> tuple[float, ...]:
    """The PSNR in dB of each image (N, H, W, C) in 0..1.

    Raises:
        SpecError: the shapes differ.
    """
    _check(images, references)
    return tuple(psnr(*pair) for pair in zip(images.split(1), references.split(1), strict=True))


def mean_psnr(each: Sequence[float]) -> float:
    """The mean over images of their PSNR in dB, each counted as 100 at most; infinite only if all are.

    So a few images that became others altogether do not decide alone, as they do in the PSNR of all errors together.
    """
    return math.inf if all(map(math.isinf, each)) else fmean(min(value, MOST_PSNR) for value in each)


def ssim(images: torch.Tensor, references: torch.Tensor) -> float:
    """Mean structural similarity of images (N, H, W, C) in 0..1, over all channels and windows that lie inside.

    Of Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment" (2004), with their window and constants.

    Raises:
        SpecError: the shapes differ, or a side is shorter than the window.
    """
    _check(images, references)
    if min(images.shape[1:3]) < _WINDOW:
        raise SpecError(f"SSIM needs images of at least {_WINDOW} x {_WINDOW} pixels, not {tuple(images.shape[1:3])}.")
    return float(sum(_ssim(*pair) for pair in zip(images, references, strict=True)) / len(images))


def _ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    x, y = (tensor.double().permute(2, 0, 1).unsqueeze(1) for tensor in (image, reference))
    places = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    weights /= weights.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    square_x, square_y, product = mean_x.square(), mean_y.square(), mean_x * mean_y
    variance_x, variance_y = mean(x * x) - square_x, mean(y * y) - square_y
    covariance = mean(x * y) - product
    similar = (2 * product + _C1) * (2 * covariance + _C2)
    return (similar / ((square_x + square_y + _C1) * (variance_x + variance_y + _C2))).mean()


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference as a share of the reference's norm.

    Raises:
        SpecError: the shapes differ.
    """
    _check(found, reference)
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def _check(found: torch.Tensor, reference: torch.Tensor) -> None:
    if found.shape != reference.shape:
        raise SpecError(f"{tuple(found.shape)} cannot be compared with {tuple(reference.shape)}; give equal shapes.")
