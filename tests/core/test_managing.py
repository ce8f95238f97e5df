"""A pipeline that shares a device by itself."""

import gc
import inspect
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from quant_core import (
    QuantError,
    compare,
    generate,
    manage,
    managing,
    measure_sensitivity,
    optimize,
    parse_optimization,
)
from quant_core.__main__ import main
from quant_core.commands import arguments
from quant_core.commands import compare as compare_command

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


@pytest.fixture
def cuda(monkeypatch):
    """The command line takes the simulated device for a GPU; returns what is managed there, and the card."""
    from diffusers import DiffusionPipeline

    told, card, real = [], Card(), managing.manage

    def simulated(pipeline, device):
        told.append(device.type)
        real(pipeline, DEVICE, copy=card.copy)

    for module in (arguments, compare_command):
        monkeypatch.setattr(module, "choose_device", lambda name: "cuda")
    monkeypatch.setattr(managing, "manage", simulated)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda *_: pytest.fail("all of the pipeline is moved at once"))
    return told, card


SMALL = ["--width", "32", "--height", "32", "--steps", "2", "--max-sequence-length", "16", "--store", "off"]


def test_generate_brings_components_to_a_gpu_in_turn(tiny, tmp_path, cuda, capsys):
    told, card = cuda
    out = tmp_path / "a.png"
    assert main(["generate", "demo", "--prompt", "a cat", *SMALL, "--out", str(out)]) == 0
    assert told == ["cuda"] and card.copied
    (expected,) = (generate(load(tiny, "demo"), small("demo")) * 255).round().byte()
    assert numpy.array_equal(numpy.asarray(Image.open(out)), expected)


def test_compare_and_sensitivity_bring_components_to_a_gpu_in_turn(cuda, capsys):
    told, card = cuda
    assert main(["compare", "demo", "--plan", "none", "--prompt", "a cat", *SMALL]) == 0
    assert told == ["cuda", "cuda"] and card.copied, "the reference and the plan"
    for measure in (compare, measure_sensitivity):
        assert inspect.signature(measure).parameters["place"].default is managing.on_device


def test_on_the_cpu_nothing_is_managed(tiny):
    pipeline = load(tiny, "demo")
    assert managing.on_device(pipeline, "cpu") is pipeline and not pipeline.placements


@pytest.mark.parametrize(
    ("room", "needs", "stay"), [(1000, {"vae": 100}, True), (400, {"vae": 100}, False), (1000, {}, False)]
)
def test_who_comes_sends_away_the_others_only_where_it_must(monkeypatch, room, needs, stay):
    """On a card with that much room, a denoiser of 300 bytes meets a VAE of 200 that needs 100 more to compute."""

    class Part:
        def __init__(self, size, resident):
            self.size, self.resident, self.streams = size, resident, False

        def evict(self):
            self.resident = 0

        def settle(self):
            pass

        def load(self, budget):
            self.resident = min(self.size, budget)

    class Pipeline(SimpleNamespace):
        """That a weak reference takes."""

    parts = {"transformer": Part(300, 300), "vae": Part(200, 0)}

    def used(*_):
        return sum(part.resident for part in parts.values())

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (room - used(), room))
    monkeypatch.setattr(torch.cuda, "memory_reserved", used)
    monkeypatch.setattr(torch.cuda, "memory_allocated", used)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(managing, "_SPARE", 0)
    pipeline = Pipeline(placements=parts, activations=needs)
    managing._Manager(pipeline, torch.device("cuda"), None, False).prepare("vae")
    assert parts["vae"].resident == 200 and bool(parts["transformer"].resident) is stay
