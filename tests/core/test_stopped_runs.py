"""Wherever and however a run is stopped, the next one makes the picture that a fresh pipeline makes."""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from quant_core import GenerateRequest, LoadRequest, QuantError, generate, load_pipeline

from .simulated_device import Card, manage, resident
from .small_requests import small

STOPS = 23  # of each case
OWN = {  # what `small_requests` does not have
    "kandinsky22": GenerateRequest("a cat", width=64, height=64, steps=2, extra={"prior_num_inference_steps": 2}),
    "sdxl": GenerateRequest("a cat", width=16, height=16, steps=2),
    "pag": GenerateRequest("a cat", width=16, height=16, steps=2, extra={"pag_scale": 3.0}),
}
CASES = [  # pipeline, dtype, whether its components are streamed to a device
    ("demo", "bfloat16", False),
    ("kandinsky22", "bfloat16", True),
    ("pag", "bfloat16", False),
    ("sd", "bfloat16", True),
    ("sd3", "bfloat16", True),
    ("sdxl", "float16", False),
    ("sdxl", "float16", True),
    ("wan", "bfloat16", False),
    ("zimage", "bfloat16", True),
]


class Cancelled(BaseException):
    """As a host's is."""


class Broken(RuntimeError):
    pass


@contextmanager
def watching(pipeline, look):
    """Call `look` with the name of the component before each call of a module inside of one."""
    owners = {part: name for name, model in pipeline.models.items() for part in model.modules()}
    handle = register_module_forward_pre_hook(lambda module, _: look(owners[module]) if module in owners else None)
    try:
        yield
    finally:
        handle.remove()


def stop(pipeline, request, component, call, error):
    """Run, and raise at that call of a module of a component; by the host where the component is none."""
    seen = []

    def look(name):
        if name == component:
            seen.append(name)
            if len(seen) == call:
                raise error("in the midst")

    def on_step(step):
        if component is None and step.done == call:
            raise error("between steps")

    told = QuantError if error is Broken and component else error  # a sentence stands in for what a library raises
    with watching(pipeline, look), pytest.raises(told):
        generate(pipeline, request, on_step)


@pytest.mark.parametrize(("name", "dtype", "streamed"), CASES)
def test_the_run_after_one_that_was_stopped_is_as_that_of_a_fresh_pipeline(tiny, name, dtype, streamed):
    source = LoadRequest("demo" if name == "demo" else str(tiny(name)), dtype=dtype)
    request = replace(OWN.get(name) or small(name), remember=False)
    expected = generate(load_pipeline(source), request)
    pipeline, card = load_pipeline(source), Card(part=0.3)
    if streamed:
        manage(pipeline, card)
    calls = []
    with watching(pipeline, calls.append):
        assert torch.equal(generate(pipeline, request), expected)
    chance = random.Random(f"{name} {streamed}")
    components = [*dict.fromkeys(calls), None]
    assert len(components) >= 4, "an encoder, a denoiser, a decoder, and between steps"
    for number in range(STOPS):
        component = components[number % len(components)]
        call = chance.randint(1, calls.count(component) if component else request.steps)
        error = chance.choice([Cancelled, Broken, torch.OutOfMemoryError])
        stop(pipeline, request, component, call, error)
        assert card.used == (resident(pipeline) if streamed else 0)
        assert torch.equal(generate(pipeline, request), expected), (component, call, error)
