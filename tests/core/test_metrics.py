"""Distances agree with an implementation of others, and grow with the distortion."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from quant_core.errors import SpecError
from quant_core.metrics import error_of, mean_psnr, psnr, psnr_each, psnr_of, relative_error, ssim


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(1, 32, 48, 3), (3, 64, 64, 3), (2, 11, 17, 1)], ids=str)
def test_they_agree_with_torchmetrics(shape, seed):
    images = noise(*shape, seed=seed)
    others = (images + (seed + 1) * 0.03 * (noise(*shape, seed=seed + 100) - 0.5)).clamp(0, 1)
    theirs = [tensor.permute(0, 3, 1, 2).double() for tensor in (others, images)]
    _, places = structural_similarity_index_measure(*theirs, data_range=1.0, return_full_image=True)
    inside = places[..., 5:-5, 5:-5]  # theirs counts windows over the edge too, which Wang's does not
    assert ssim(others, images) == pytest.approx(inside.mean().item(), abs=1e-4)
    assert psnr(others, images) == pytest.approx(peak_signal_noise_ratio(*theirs, data_range=1.0).item(), abs=1e-4)


def test_the_same_is_at_no_distance():
    images = noise(2, 32, 32, 3)
    assert psnr(images, images) == math.inf and ssim(images, images) == pytest.approx(1, abs=1e-12)
    assert relative_error(images, images) == 0


def test_growing_distortions_are_in_order():
    images = noise(2, 64, 64, 3, seed=1)
    grown = [(images + amount * (noise(2, 64, 64, 3, seed=2) - 0.5)).clamp(0, 1) for amount in (0.01, 0.05, 0.2, 0.8)]
    for metric, falls in ((psnr, True), (ssim, True), (relative_error, False)):
        found = [metric(image, images) for image in grown]
        assert found == sorted(found, reverse=falls) and len(set(found)) == 4


def test_what_cannot_be_compared_is_said():
    with pytest.raises(SpecError, match="give equal shapes"):
        psnr(noise(1, 32, 32, 3), noise(1, 32, 31, 3))
    with pytest.raises(SpecError, match="at least 11 x 11"):
        ssim(noise(1, 8, 32, 3), noise(1, 8, 32, 3))


def test_the_mean_over_images_counts_an_equal_one_as_100_dB():
    images, others = noise(3, 32, 32, 3), noise(3, 32, 32, 3)
    others[1] += 0.1
    each = psnr_each(others, images)
    assert each == (math.inf, psnr(others[1:2], images[1:2]), math.inf)
    assert mean_psnr(each) == pytest.approx((200 + 20) / 3, abs=1e-4)
    assert mean_psnr(psnr_each(images, images)) == math.inf


def test_a_psnr_and_its_error_say_the_same():
    assert psnr_of(error_of(31.5)) == pytest.approx(31.5)
    assert error_of(math.inf) == 0 and psnr_of(0.0) == math.inf
