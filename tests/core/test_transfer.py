"""Copies of weights of every kind: nothing shared with the original, the same bits, and back again."""

import pytest
import torch
from torch import nn

from quant_core import Placement, QuantError, generate
from quant_core.inspection import footprint, stored_tensors
from quant_core.transfer import byte_size, copies, put, why_whole

from .simulated_device import CPU, DEVICE
from .small_requests import load, small
from .test_moving import SCHEMES, assert_same, stored


@pytest.fixture(scope="module")
def loaded(tiny):
    """Scheme -> the pipeline quantized with it; who changes it changes it back."""
    made = {}

    def pipeline(scheme):
        if scheme not in made:
            made[scheme] = load(tiny, "sd3", scheme)
        return made[scheme]

    return pipeline


def held(module):
    """Every parameter and buffer object under its place, and the state beside the weights."""
    return {
        (name, kind, key): value
        for name, part in module.named_modules()
        for kind, values in (
            ("", part._parameters),
            ("", part._buffers),
            ("state", {"": getattr(part, "state", None)}),
        )
        for key, value in values.items()
    }


def same_objects(module, before):
    after = held(module)
    assert after.keys() == before.keys()
    assert [place for place, value in after.items() if value is not before[place]] == []


def storages(module):
    buffers = [buffer for buffer in module.buffers() if buffer.numel() and not hasattr(buffer, "__tensor_flatten__")]
    return {tensor.untyped_storage().data_ptr() for tensor in [*stored_tensors(module), *buffers]}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_share_nothing_with_the_original_and_make_the_same_picture(loaded, scheme):
    pipeline = loaded(scheme)
    expected = generate(pipeline, small("sd3"))
    homes = {}
    for name, module in pipeline.models.items():
        objects, weights, places = held(module), stored(module), storages(module)
        made = copies(module.modules(), torch.clone, CPU)
        same_objects(module, objects)
        assert_same(module, weights)
        homes[name] = put(made), objects
        assert len(homes[name][0]) == len(made) > 0
        assert_same(module, weights)
        assert not places & storages(module)
        assert [place for place, value in held(module).items() if value is objects[place] is not None] == []
    assert torch.equal(generate(pipeline, small("sd3")), expected)
    for name, (home, objects) in homes.items():
        put(home)
        same_objects(pipeline.models[name], objects)
    assert torch.equal(generate(pipeline, small("sd3")), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_copied_are_the_footprint_and_the_buffers_that_no_file_has(loaded, scheme):
    for module in loaded(scheme).models.values():
        computed = [
            part._buffers[name]
            for part in module.modules()
            for name in part._non_persistent_buffers_set
            if part._buffers[name] is not None
        ]
        copied = []
        copies(module.modules(), lambda tensor, seen=copied: seen.append(tensor) or tensor, CPU)
        size = footprint(module) + sum(buffer.numel() * buffer.element_size() for buffer in computed)
        assert byte_size(module.modules()) == size
        assert sum(tensor.numel() * tensor.element_size() for tensor in copied) == size


@pytest.mark.parametrize("scheme", ["none", "torchao/int8wo", "gguf/Q8_0"])
def test_what_was_shared_is_shared(loaded, scheme):
    encoder = loaded(scheme).models["text_encoder_3"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    original = encoder.shared.weight
    home = put(copies(encoder.modules(), torch.clone, CPU))
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight is not original
    put(home)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight is original


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_are_plain_weights_in_any_grad_mode(loaded, scheme, mode):
    module = loaded(scheme).models["transformer"]
    with mode():
        home = put(copies(module.modules(), torch.clone, CPU))
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad, name
        assert not parameter.is_inference(), name
    put(home)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_can_be_streamed(loaded, scheme):
    models = loaded(scheme).models
    assert why_whole(models["transformer"]) == "" == why_whole(models["vae"])


class Odd(nn.Parameter):
    """Weights of a library that nobody here knows."""


def test_weights_that_nobody_knows_how_to_copy_stay_whole():
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert why_whole(layer) == ""
    layer[1].weight = Odd(torch.ones(4, 4))
    assert why_whole(layer) == (
        "weights of the type Odd cannot be streamed; quantize it with torchao or bitsandbytes instead"
    )


def test_what_cannot_be_streamed_is_loaded_whole_or_not_at_all(tiny):
    module = load(tiny, "sd3", "none").models["transformer"]
    module.proj_out.weight = Odd(module.proj_out.weight.data, requires_grad=False)
    before = held(module)
    placement = Placement(module, DEVICE, CPU)
    for budget in (0, placement.size - 1):
        with pytest.raises(
            QuantError, match=r"^The model needs .* MiB on cpu:0 and .* are free; weights of the type Odd .*\.$"
        ):
            placement.load(budget)
        assert placement.resident == 0
        same_objects(module, before)
    assert placement.load(placement.size) == placement.size == placement.resident and not placement.streams
    assert placement.unload(1) == 0, "it has no blocks"
    placement.evict()
    assert placement.resident == 0
    same_objects(module, before)
    assert Placement(module, CPU, CPU).load(0) == placement.size, "where it is, it needs no room"
