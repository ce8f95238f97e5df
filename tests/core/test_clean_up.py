"""However a run or a load ends, nothing of it is alive afterwards, though the garbage collector never came by."""

import gc
import random
import traceback
import weakref
from contextlib import contextmanager

import diffusers
import pytest
import torch

from quant_core import (
    LoadRequest,
    QuantError,
    SourceError,
    generate,
    load_pipeline,
    loading,
    parse_plan,
    quantizing,
    reading,
)

from .simulated_device import Card, manage, resident
from .small_requests import SIDES, load, small

SCHEDULERS = {  # that keep tensors of the steps before
    "sd": ("PNDMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"),
    "wan": ("UniPCMultistepScheduler",),
    "sd3": ("FlowMatchHeunDiscreteScheduler",),
}
CASES = [(name, None) for name in SIDES] + [(name, made) for name, all in SCHEDULERS.items() for made in all]


INPUTS = 24  # at most, of modules with hooks: closures of the libraries hold them while the traceback is there


class Cancelled(BaseException):
    """As a host's is."""


class Broken(RuntimeError):
    pass


@contextmanager
def census():
    """Without the garbage collector; yields what names the tensors that were made since and are alive."""
    gc.collect()
    gc.freeze()  # what is there before is not listed
    gc.disable()

    def alive():
        found = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        return [(tuple(tensor.shape), tensor.dtype) for tensor in found]

    try:
        yield alive
    finally:
        gc.unfreeze()
        gc.enable()


def runs(tiny, name, scheduler, managed):
    """A pipeline that has run before, so that what its modules compute once is there."""
    pipeline = load(tiny, name)
    card = Card(part=0.3)
    if managed:
        manage(pipeline, card)
    if scheduler:
        made = getattr(diffusers, scheduler).from_config(pipeline.pipe.scheduler.config)
        pipeline.pipe.scheduler = made
    request = small(name, steps=4, remember=False)
    return pipeline, card, request, generate(pipeline, request)


def deep(module):
    """A layer in the midst of a module."""
    leaves = [part for part in module.modules() if not list(part.children()) and part._parameters]
    return leaves[len(leaves) * 2 // 3]


@contextmanager
def failing(module, error, count=1):
    """The module's call of that number raises."""
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == count:
            raise error("in the midst")

    hook = module.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("managed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_nothing_of_a_run_is_alive_afterwards(tiny, name, scheduler, managed):
    pipeline, card, request, expected = runs(tiny, name, scheduler, managed)
    steps = []
    with census() as alive:
        image = generate(pipeline, request, lambda step: steps.append(step.done))
        same = torch.equal(image, expected)
        assert len(alive()) == 1, "the picture"
        del image
        assert alive() == []
    assert same and steps == list(range(1, len(steps) + 1)) and len(steps) >= 4

    stop_at = random.Random(name).randint(1, 4)

    def stop(step):
        if step.done == stop_at:
            raise Cancelled("by the user")

    denoiser = pipeline.models.get("transformer") or pipeline.models["unet"]
    encoder = pipeline.models[pipeline.index.text_encoders[-1]]
    decoder = pipeline.models["vae"].decoder
    ends = {
        "cancelled": (None, Cancelled, 0),
        "in a text encoder": (deep(encoder), Broken, 1),
        "in the denoiser": (deep(denoiser), Broken, 2),
        "out of memory": (deep(denoiser), torch.OutOfMemoryError, 3),
        "in the VAE": (deep(decoder), Broken, 1),
    }
    for end, (module, error, count) in ends.items():
        with census() as alive:
            told = QuantError if error is Broken else error  # a sentence stands in for what a library raises
            with pytest.raises(told) as raised, failing(module or denoiser, error, count):
                generate(pipeline, request, None if module else stop)
            cause = raised.value.__cause__ if error is Broken else raised.value
            assert type(cause) is error
            lines = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
            assert {"_generate", "__call__"} < set(lines) and lines[-1] == ("fail" if module else "stop"), end
            assert len(alive()) <= (INPUTS if module else 0), (end, alive())
            assert card.used == resident(pipeline), end
            del raised, cause
            assert alive() == [], end
        assert torch.equal(generate(pipeline, request), expected), end


def test_of_a_chain_of_errors_none_keeps_a_tensor(tiny):
    pipeline, _, request, expected = runs(tiny, "sd", None, True)

    def raises(kind):
        kept = torch.ones(7)
        raise kind(str(kept.sum().item()))

    def chain(*_):
        try:
            try:
                raises(KeyError)
            except KeyError:
                raises(IndexError)
        except IndexError as error:
            try:
                raises(ValueError)
            except ValueError:
                raise Broken("at last") from error

    hook = deep(pipeline.models["unet"]).register_forward_hook(chain)
    with census() as alive:
        with pytest.raises(QuantError) as raised:
            generate(pipeline, request)
        broken = raised.value.__cause__
        assert type(broken) is Broken
        assert isinstance(broken.__cause__, IndexError) and isinstance(broken.__context__, ValueError)
        assert isinstance(broken.__cause__.__context__, KeyError)
        assert len(alive()) <= INPUTS and ((7,), torch.float32) not in alive()
    del raised, broken
    hook.remove()
    assert torch.equal(generate(pipeline, request), expected)


def test_a_first_run_that_is_cancelled_leaves_the_scheduler_as_it_was(tiny):
    for name in SIDES:
        pipeline = load(tiny, name)
        before, seen = dict(vars(pipeline.pipe.scheduler)), []

        def stop(step, seen=seen):
            seen.append(step)
            raise Cancelled

        with pytest.raises(Cancelled):
            generate(pipeline, small(name), stop)
        assert seen and dict(vars(pipeline.pipe.scheduler)) == before


@contextmanager
def no_module_left(monkeypatch):
    """Of those that a load read none is alive at the end."""
    read, modules = reading.read_weights, []

    def watched(*arguments):
        module = read(*arguments)
        modules.append(weakref.ref(module))
        return module

    monkeypatch.setattr(reading, "read_weights", watched)
    gc.collect()
    gc.disable()
    try:
        yield
        assert modules and [type(ref()).__name__ for ref in modules if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "quanto/int8"])
@pytest.mark.parametrize("name", ["sd3", "sd", "zimage"])
def test_a_load_that_is_cancelled_leaves_no_module(tiny, name, plan, monkeypatch):
    request = LoadRequest(str(tiny(name)), parse_plan(plan))
    calls = []
    load_pipeline(request, lambda *told: calls.append(told))
    for stop_at in (3, len(calls) // 2, len(calls)):
        told = []

        def stop(*progress, told=told, stop_at=stop_at):
            told.append(progress)
            if len(told) == stop_at:
                raise Cancelled

        with no_module_left(monkeypatch), pytest.raises(Cancelled) as raised:
            load_pipeline(request, stop)
        assert raised.value.__traceback__ is not None


@pytest.mark.parametrize("error", [Broken, torch.OutOfMemoryError, MemoryError])
def test_a_load_that_fails_at_a_later_component_leaves_no_module(tiny, error, monkeypatch):
    quantize, calls = quantizing.quantized_layers, []

    def failing(model, *arguments):
        calls.append(type(model).__name__)
        yield from quantize(model, *arguments)
        if len(calls) == 3:
            raise error("in the midst")

    monkeypatch.setattr(quantizing, "quantized_layers", failing)
    expected = SourceError if error is Broken else error
    with no_module_left(monkeypatch), pytest.raises(expected, match="in the midst") as raised:
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan("torchao/int8wo")))
    assert type(raised.value) is expected and len(calls) == 3


def test_a_census_that_fails_leaves_no_module(tiny, monkeypatch):
    monkeypatch.setattr(loading, "_census", lambda *_: (_ for _ in ()).throw(SourceError("not quantized")))
    with no_module_left(monkeypatch), pytest.raises(SourceError) as raised:
        load_pipeline(LoadRequest(str(tiny("sd")), parse_plan("torchao/int8wo")))
    assert str(raised.value) == "not quantized"
