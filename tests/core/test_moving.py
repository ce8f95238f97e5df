"""A host moves components in and out: what they hold stays the same, and is freed with the pipeline."""

import gc
import weakref

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, Placement, generate, load_pipeline, parse_plan
from quant_core.inspection import stored_tensors

from .simulated_device import DEVICE

SCHEMES = [
    "none",
    "bitsandbytes_4bit/nf4",
    "bitsandbytes_4bit/fp4?double_quant=true",
    "bitsandbytes_8bit/int8",
    "gguf/Q8_0",
    "gguf/Q4_0",
    "quanto/int8",
    "quanto/int4",
    "quanto/float8",
    "torchao/int8wo",
    "torchao/int8dq",
    "torchao/fp8wo",
    "torchao/nvfp4wo",
]
REQUEST = GenerateRequest("a cat", width=16, height=16, steps=2)


@pytest.fixture
def load(tiny):
    return lambda scheme: load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan(scheme)))


def stored(module):
    return [tensor.clone() for tensor in stored_tensors(module)]


def assert_same(module, before):
    after = list(stored_tensors(module))
    assert [(tensor.dtype, tensor.shape) for tensor in after] == [(tensor.dtype, tensor.shape) for tensor in before]
    for first, second in zip(after, before, strict=True):
        assert torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_running_and_moving_changes_nothing_that_is_stored(load, scheme):
    pipeline = load(scheme)
    before = {name: stored(module) for name, module in pipeline.models.items()}
    first = generate(pipeline, REQUEST)
    for name, module in pipeline.models.items():
        assert_same(module, before[name])
        module.to("cpu")
        placement = Placement(module, DEVICE, torch.device("cpu"))
        placement.load(placement.size)
        assert_same(module, before[name])
        placement.evict()
        assert_same(module, before[name])
    assert torch.equal(generate(pipeline, REQUEST), first)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.startswith("bitsandbytes")])
@pytest.mark.parametrize("used", [False, True], ids=["before its first use", "after its first use"])
def test_bitsandbytes_layers_survive_a_move_by_their_parent(load, scheme, used):
    pipeline = load(scheme)
    model = pipeline.pipe.transformer
    before = stored(model)
    images = generate(pipeline, REQUEST)
    fresh = load(scheme)
    if used:
        generate(fresh, REQUEST)
    moved = fresh.pipe.transformer
    seen = []
    moved._apply(
        lambda tensor: seen.append(tensor.shape) or tensor.clone()
    )  # as a move to another device makes new ones
    assert seen
    assert_same(moved, before)
    assert torch.equal(generate(fresh, REQUEST), images)
    for name, tensor in moved.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.startswith("bitsandbytes_4bit")])
def test_4_bit_state_dict_is_the_same_before_and_after_a_forward_on_the_cpu(load, scheme):
    pipeline = load(scheme)
    before = {name: value.clone() for name, value in pipeline.pipe.transformer.state_dict().items()}
    assert any(name.endswith(".absmax") and value.dtype != torch.bfloat16 for name, value in before.items())
    generate(pipeline, REQUEST)
    after = pipeline.pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_weights_are_freed_with_the_pipeline_and_not_by_the_garbage_collector(load, scheme, used):
    pipeline = load(scheme)
    pipeline.on_use(torch.device("cpu"), lambda name: None)
    if used:
        generate(pipeline, REQUEST, lambda step: None)
    watched = {
        f"{name}.{path}": weakref.ref(part)
        for name, module in pipeline.models.items()
        for path, part in module.named_modules()
    }
    weights = [weakref.ref(weight) for module in pipeline.models.values() for weight in module.parameters()]
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert [name for name, module in watched.items() if module() is not None] == []
        assert [weight for weight in weights if weight() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_components_are_prepared_in_the_order_of_their_use(load, scheme):
    pipeline = load(scheme)
    expected = generate(pipeline, REQUEST)
    used = []
    pipeline.on_use(torch.device("cpu"), used.append)
    assert torch.equal(generate(pipeline, REQUEST), expected)
    assert set(used) == set(pipeline.models)
    order = list(dict.fromkeys(used))
    assert order.index("text_encoder_3") < order.index("transformer") < order.index("vae")
    assert used.count("transformer") == REQUEST.steps
