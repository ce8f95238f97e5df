"""A pipeline that shares a device by itself."""

import gc
import weakref

import pytest
import torch

from quant_core import QuantError, generate, manage, optimize, parse_optimization

from .simulated_device import DEVICE, Card
from .small_requests import SIDES, load, small


@pytest.mark.parametrize("name", sorted(SIDES))
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_components_come_in_turn_and_the_picture_is_the_same(tiny, name, share):
    pipeline, card = load(tiny, name), Card()
    expected = generate(pipeline, small(name))
    placements = pipeline.placements
    manage(pipeline, DEVICE, lambda part: max(placements[part].least, share * placements[part].size), copy=card.copy)
    assert torch.equal(generate(pipeline, small(name)), expected)
    assert sum(placement.resident > 0 for placement in placements.values()) == 1, "the last one is still there"
    assert card.peak < sum(placement.size for placement in placements.values())
    assert torch.equal(generate(pipeline, small(name)), expected)


def test_those_that_keep_their_place_come_once(tiny):
    pipeline, card = load(tiny, "demo"), Card()
    manage(pipeline, DEVICE, keep=True, copy=card.copy)
    first = generate(pipeline, small("demo"))
    copied = card.copied
    assert torch.equal(generate(pipeline, small("demo")), first)
    assert card.copied == copied > 0
    assert card.used == sum(placement.size for placement in pipeline.placements.values())


def test_what_does_not_fit_whole_and_must_is_told(tiny):
    pipeline, card = load(tiny, "demo"), Card()
    manage(pipeline, DEVICE, lambda name: pipeline.placements[name].least, copy=card.copy)
    handle = optimize(pipeline, parse_optimization(compile="whole"))
    with pytest.raises(QuantError, match="transformer needs .* compiled as a whole, so that its blocks must stay"):
        generate(handle, small("demo"))


def test_it_is_freed_with_the_pipeline(tiny):
    pipeline, card = load(tiny, "demo"), Card()
    manage(pipeline, DEVICE, copy=card.copy)
    generate(pipeline, small("demo"))
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(pipeline.pipe.transformer)
        del pipeline
        assert gone() is None and card.used == 0
    finally:
        gc.enable()
