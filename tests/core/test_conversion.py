"""Components that are converted while they are on a device, and models that keep tensors on their classes."""

import functools
import gc
import weakref

import torch
from torch import nn

from quant_core import Placement
from quant_core.allocator import forget_cached

DEVICE, HOME = torch.device("cpu", 0), torch.device("cpu")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ModuleList(), nn.Linear(8, 8)).half()


def test_a_conversion_on_the_device_is_one_of_the_weights_at_home():
    """As diffusers' SDXL converts its VAE for a decode and back."""
    module = model()
    before = [weight.clone() for weight in module.parameters()]
    placement = Placement(module, DEVICE, HOME, copy=lambda tensor, device: tensor.clone())
    half = placement.size
    placement.load(placement.size)
    module.to(dtype=torch.float32)
    assert placement.resident == placement.size == 2 * half
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    module.to(torch.float16)
    assert placement.resident == placement.size == half
    placement.evict()
    assert {weight.dtype for weight in module.parameters()} == {torch.float16}
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), before, strict=True))
    placement.load(placement.size)
    module.to(torch.float32)
    placement.evict()
    assert {weight.dtype for weight in module.parameters()} == {torch.float32} and placement.size == 2 * half


def test_a_managed_component_is_not_moved_by_others():
    module = model()
    placement = Placement(module, DEVICE, HOME, copy=lambda tensor, device: tensor.clone())
    module.to("meta")
    assert not any(weight.is_meta for weight in module.parameters()) and placement.resident == 0


def test_what_a_method_caches_of_a_model_goes():
    class Rope(nn.Module):
        @functools.cache  # noqa: B019, as some models of diffusers do
        def table(self, size):
            return torch.zeros(size)

    Rope.__module__ = "diffusers.models.rope"
    rope = Rope()
    table, kept = weakref.ref(rope.table(4)), weakref.ref(rope)
    forget_cached(rope.modules())
    del rope
    gc.collect()
    assert table() is None and kept() is None
