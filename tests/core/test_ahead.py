"""Weights that come ahead of their use: while something else computes, with the same bits, or not at all."""

import gc
import threading

import pytest
import torch
from torch import nn

from quant_core import generate

from .simulated_device import Card, budget, manage, place, resident
from .small_requests import SIDES, load, small
from .test_moving import SCHEMES
from .test_placement import Layers

LONG = 60  # seconds after which a thread that should have gone on is given up


class Gate(Card):
    """A device whose copies in the background wait until they are let through."""

    def __init__(self):
        super().__init__()
        self.asked, self.open = threading.Event(), threading.Event()
        self.passed = 0

    def copy(self, tensor, device):
        if threading.current_thread() is not threading.main_thread():
            self.asked.set()
            assert self.open.wait(LONG)
            self.passed += 1
        return super().copy(tensor, device)


def model():
    torch.manual_seed(0)
    return Layers().requires_grad_(False)


@pytest.mark.parametrize("scheme", ["", *SCHEMES])
def test_what_came_ahead_makes_the_same_picture(tiny, scheme):
    pipeline, card = load(tiny, "sd3", scheme), Card()
    expected = generate(pipeline, small("sd3"))
    manage(pipeline, card)
    for placement in pipeline.placements.values():
        placement.load_ahead()
        assert placement.is_ahead and placement.resident == 0
    for placement in pipeline.placements.values():
        assert placement.arrive() == placement.size == placement.resident
        assert not placement.is_ahead and placement.arrive() == 0
    assert card.used == resident(pipeline)
    copied = card.copied
    assert torch.equal(generate(pipeline, small("sd3", remember=False)), expected)
    assert card.copied == copied
    for placement in pipeline.placements.values():
        placement.evict()
    assert card.used == 0


@pytest.mark.parametrize("part", [0, 0.5])
def test_only_what_is_not_there_is_copied(tiny, part):
    placement = place(load(tiny, "demo").models["transformer"], card := Card())
    placement.load(budget(placement, part))
    before = placement.resident
    placement.load_ahead()
    assert placement.arrive() == placement.size - before
    assert card.used == card.peak == placement.size and not placement.streams


@pytest.mark.parametrize("name", SIDES)
def test_the_denoiser_s_weights_come_while_the_last_encoder_computes(tiny, name):
    """The encoder ends only when a copy was asked for, which ends only when the encoder has."""
    pipeline, card, events = load(tiny, name), Gate(), []
    expected = generate(pipeline, small(name, remember=False))
    used = manage(pipeline, card)
    encoders = pipeline.index.text_encoders
    denoiser = next(pipeline.placements[name] for name in ("transformer", "unet") if name in pipeline.models)
    prepare = pipeline.prepare

    def ahead(component):
        if pipeline.placements[component] is denoiser:
            card.open.set()
            arrived = denoiser.arrive()
            events.append(("arrived", arrived == denoiser.size))
        prepare(component)
        if component == encoders[-1] and not denoiser.resident and not denoiser.is_ahead:
            denoiser.load_ahead()

    pipeline.prepare = ahead

    def last(*_):
        if denoiser.is_ahead:
            events.append(("asked", card.asked.wait(LONG)))
            events.append(("passed", card.passed))

    layer = [part for part in pipeline.models[encoders[-1]].modules() if not list(part.children())][-1]
    layer.register_forward_hook(last)
    assert torch.equal(generate(pipeline, small(name, remember=False)), expected)
    assert events[:2] == [("asked", True), ("passed", 0)] and ("arrived", True) in events
    assert used[0] in encoders and card.used == resident(pipeline)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_copy_that_fails_in_the_background_leaves_all_as_it_was(error):
    made, x = model(), torch.ones(2, 16)
    expected, home = made(x), dict(made.named_parameters())
    placement = place(made, card := Card())
    for count in range(1, 15):
        card.fail(count, error("full"))
        placement.load_ahead()
        assert placement.arrive() == placement.resident == card.used == 0
        assert len(card.failing) == 1, "it was not raised"
        assert all(weight is home[name] for name, weight in made.named_parameters())
        placement.load(placement.size)
        assert torch.equal(made(x), expected)
        placement.evict()
    placement.load_ahead()
    assert placement.arrive() == placement.size


def convert(placement, made):
    made.to(torch.float64)


def exchange(placement, made):
    placement.exchange({made.first: nn.Linear(16, 16)})


OTHERS = {
    "load": lambda placement, made: placement.load(placement.size / 2),
    "unload": lambda placement, made: placement.unload(1),
    "evict": lambda placement, made: placement.evict(),
    "settle": lambda placement, made: placement.settle(),
    "convert": convert,
    "exchange": exchange,
    "again": lambda placement, made: placement.load_ahead(),
}


@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.parametrize("when", ["copying", "copied"])
def test_whatever_else_is_asked_drops_the_copies_first(how, when):
    made = model()
    placement = place(made, card := Gate())
    placement.load_ahead()
    thread = placement._ahead._thread
    assert card.asked.wait(LONG)
    if when == "copied":
        card.open.set()
        thread.join(LONG)
        assert card.used == placement.size
    else:  # the thread is within its first unit, and goes on when it is joined
        join = thread.join
        thread.join = lambda: (card.open.set(), join())
    OTHERS[how](placement, made)
    assert not thread.is_alive()
    if when == "copying":
        assert card.passed <= 2 or how == "again", "only what was begun is copied to its end"
    placement.settle()
    assert card.used == placement.resident and not placement.is_ahead
    placement.load(placement.size)
    assert made(torch.ones(1, 16, dtype=made.first.weight.dtype)).isfinite().all()


def test_a_block_that_runs_without_them_gives_them_up():
    made, x = model(), torch.ones(2, 16)
    expected = made(x)
    placement = place(made, card := Card())
    placement.load(0)
    placement.load_ahead()
    assert torch.equal(made(x), expected)
    assert not placement.is_ahead
    placement.settle()
    assert card.used == placement.resident


def test_a_pipeline_that_is_dropped_meanwhile_is_gone(tiny):
    """By reference counting alone."""
    pipeline, card = load(tiny, "demo"), Gate()
    manage(pipeline, card)
    gc.collect()
    gc.disable()
    try:
        pipeline.placements["transformer"].load_ahead()
        thread = pipeline.placements["transformer"]._ahead._thread
        assert card.asked.wait(LONG)
        card.open.set()
        del pipeline
        assert not thread.is_alive() and card.used == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_run_that_stops_meanwhile_leaves_nothing_of_them(tiny, error):
    pipeline, card = load(tiny, "demo"), Card()
    expected = generate(pipeline, small("demo", remember=False))
    manage(pipeline, card)
    prepare, transformer = pipeline.prepare, pipeline.placements["transformer"]

    def ahead(component):
        prepare(component)
        if component == "text_encoder_2":
            transformer.load_ahead()
            raise error("stop")

    pipeline.prepare = ahead
    with pytest.raises(error):
        generate(pipeline, small("demo", remember=False))
    assert not transformer.is_ahead and transformer.resident == 0 and card.used == resident(pipeline)
    pipeline.prepare = prepare
    assert torch.equal(generate(pipeline, small("demo", remember=False)), expected)
