"""diffusers' own offloading for a run: the same picture, and all is where it was afterwards."""

import gc
import itertools
import weakref

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    Placement,
    SpecError,
    generate,
    load_pipeline,
    managing,
    offloading,
    optimize,
    parse_optimization,
    parse_plan,
)
from quant_core.inspection import stored_tensors

from .simulated_device import CPU, DEVICE, Card, manage
from .small_requests import SIDES, load, small

WAYS = ("model", "group", "group,type=leaf_level", "group,blocks=2")


def offloaded(pipeline, text):
    return optimize(pipeline, parse_optimization(offload=text))


def places(pipeline):
    """Which tensors the weights are, and where."""
    models = pipeline.models.values()
    return [(tensor.device, tensor.data_ptr()) for model in models for tensor in stored_tensors(model)]


def attributes(pipeline):
    return [set(vars(part)) for model in pipeline.models.values() for part in model.modules()]


@pytest.mark.parametrize(
    "plan", ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0", "torchao/int8wo", "torchao/nvfp4wo"]
)
def test_the_picture_is_the_same_and_the_weights_stay_where_they_are(tiny, plan):
    pipeline = load(tiny, "demo", plan)
    expected, before, has = generate(pipeline, small("demo")), places(pipeline), attributes(pipeline)
    for way in WAYS if not plan.startswith("bitsandbytes") else ("model",):
        handle = offloaded(pipeline, way)
        assert torch.equal(generate(handle, small("demo")), expected), way
        assert places(pipeline) == before, way
        assert attributes(pipeline) == has, way
        assert handle.reports["offload"].data()["way"].startswith(way.partition(",")[0])
    assert torch.equal(generate(pipeline, small("demo")), expected)


@pytest.mark.parametrize("name", sorted(SIDES))
def test_every_pipeline(tiny, name):
    pipeline = load(tiny, name)
    expected = generate(pipeline, small(name))
    for way in ("model", "group"):
        assert torch.equal(generate(offloaded(pipeline, way), small(name)), expected), way


def test_a_run_that_is_stopped_leaves_nothing(tiny):
    class Stopped(BaseException):
        pass

    def stop(step):
        raise Stopped

    for way in WAYS:
        pipeline = load(tiny, "demo", "torchao/int8wo")
        before, has = places(pipeline), attributes(pipeline)
        with pytest.raises(Stopped):
            generate(offloaded(pipeline, way), small("demo"), stop)
        assert (places(pipeline), attributes(pipeline)) == (before, has)
        gc.collect()
        gc.disable()
        try:
            gone = weakref.ref(pipeline.pipe.transformer)
            del pipeline
            assert gone() is None, way
        finally:
            gc.enable()


def test_a_host_steps_aside(tiny):
    pipeline, card, asked = load(tiny, "demo"), Card(), []
    expected = generate(pipeline, small("demo"))
    for name, module in pipeline.models.items():
        pipeline.placements[name] = Placement(module, DEVICE, CPU, card.copy, lambda: asked.append(None))
    pipeline.on_use(DEVICE, lambda name: pipeline.placements[name].load(float("inf")))
    generate(pipeline, small("demo"))
    assert card.used > 0
    handle, before = offloaded(pipeline, "model"), attributes(pipeline)
    asked.clear()
    copied = card.copied
    assert torch.equal(generate(handle, small("demo")), expected)
    assert (card.copied, card.used) == (copied, 0), "the device is cleared, and the host copies nothing"
    assert asked, "cancelled between blocks all the same"
    assert attributes(pipeline) == before
    assert torch.equal(generate(pipeline, small("demo")), expected)
    assert card.copied > copied, "the host again"


@pytest.mark.parametrize(
    ("plan", "text", "device", "message"),
    [
        ("none", "sequential", "cuda", "offload is sequential, which takes 14 times as long as none (FLUX.1-dev on an "
         "L20, 335 s against 23 s) and fails for bitsandbytes 4-bit, quanto and GGUF; use managed, or group,"
         "type=leaf_level."),
        ("none", "layerwise_casting", "cuda", "offload is layerwise_casting, which is for unquantized weights and "
         "rounds them for good; quantize with torchao/fp8wo instead, which stores the same bytes."),
        ("transformer=quanto/float8", "group", "cuda", "offload group does not work for transformer, which is quanto: "
         "diffusers moves no quanto tensors in groups; use managed."),
        ("transformer=bitsandbytes_4bit/nf4", "group", "cuda", "offload group does not work for transformer, which is "
         "bitsandbytes_4bit: diffusers moves its packed weights and leaves their scales behind; use managed."),
        ("transformer=bitsandbytes_8bit/int8", "group,type=leaf_level,stream", "cuda", "offload group does not work "
         "for transformer, which is bitsandbytes_8bit: diffusers moves its packed weights and leaves their scales "
         "behind; use managed."),
        ("transformer=quanto/int4", "model", "cuda", "offload model does not work for transformer, which is "
         "quanto/int4: its weights are packed for the device they are on; use managed."),
        ("transformer=torchao/fp8wo", "group,stream", "cuda", "offload group does not work for transformer, which is "
         "torchao: what diffusers streams of it fails or comes out wrong (diffusers' issues 13281 and 14433); use "
         "managed."),
        ("none", "group,stream", "cpu", "offload group streams only to a GPU, and the device is cpu; leave stream "
         "out."),
        ("none", "group,record_stream", "cuda", "offload group has no record_stream without stream; add stream, or "
         "leave it out."),
    ],
)  # fmt: skip
def test_what_diffusers_cannot_do_is_refused(tiny, plan, text, device, message):
    pipeline = load(tiny, "demo", plan)
    with pytest.raises(SpecError) as raised:
        optimize(pipeline, parse_optimization(offload=text), device)
    assert str(raised.value) == message


@pytest.mark.parametrize("plan", ["quanto/float8", "bitsandbytes_4bit/nf4"])
def test_a_checkpoint_that_is_quantized_already_is_seen_by_its_weights(tiny, tmp_path, plan):
    from quant_core import save_pipeline

    save_pipeline(load(tiny, "demo", f"transformer={plan}"), tmp_path / "saved")
    pipeline = load_pipeline(LoadRequest(str(tmp_path / "saved")))
    with pytest.raises(SpecError, match=f"offload group does not work for transformer, which is {plan.split('/')[0]}"):
        offloaded(pipeline, "group")


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo", "gguf/Q8_0"])
@pytest.mark.parametrize("way", ["model", "group"])
def test_a_prompt_is_remembered_all_the_same(tiny, way, plan):
    pipeline = load(tiny, "demo", plan)
    managing.manage(pipeline, DEVICE, copy=Card().copy)
    ran = []
    encoder = pipeline.pipe.text_encoder_2.encoder.block[0]
    encoder.register_forward_pre_hook(lambda module, inputs: ran.append(module))
    generate(pipeline, small("demo"))
    handle, once = offloaded(pipeline, way), len(ran)
    assert once
    for seed in (1, 2):
        generate(handle, small("demo", seed=seed))
    generate(pipeline, small("demo", seed=3))
    assert len(ran) == once


def test_weights_that_were_moved_are_named(tiny, monkeypatch):
    pipeline = load(tiny, "demo")
    pipeline.pipe.vae.to("meta")
    with pytest.raises(SpecError) as raised:
        offloaded(pipeline, "model")
    assert str(raised.value) == "offload model wants all weights on the CPU; move vae back, with pipe.to('cpu')."


def test_a_pipeline_without_model_offload_is_named(tiny):
    pipeline = load(tiny, "sd")
    pipeline.pipe.model_cpu_offload_seq = None
    with pytest.raises(SpecError, match="StableDiffusionPipeline has no model offload"):
        offloaded(pipeline, "model")
    pipeline.pipe.unet._supports_group_offloading = False
    with pytest.raises(SpecError, match="offload group cannot move unet, a UNet2DConditionModel; use managed."):
        offloaded(pipeline, "group")


def test_managed_is_what_a_host_does_anyway(tiny):
    pipeline = load(tiny, "demo")
    with pytest.raises(SpecError, match="offload managed is what a host does; call quant_core.manage"):
        offloaded(pipeline, "managed")
    manage(pipeline, Card(part=0.3))
    handle = offloaded(pipeline, "managed")
    assert torch.equal(generate(handle, small("demo")), generate(pipeline, small("demo")))
    assert "offload" not in handle.reports
    with offloading.applied(pipeline, handle.optimization.offload, {}) as report:
        assert report is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "whole", "cache": "first_block"}, "compile whole leaves no place for cache first_block, which "
         "acts on blocks; compile blocks."),
        ({"compile": "whole,full_graph", "offload": "group"}, "compile whole cannot be one full graph while offload "
         "group moves weights inside of it; leave full_graph out, or use offload model."),
        ({"compile": "blocks,full_graph", "offload": "group,type=leaf_level"}, "compile blocks cannot be one full "
         "graph while offload group moves weights inside of it; leave full_graph out, or use offload model."),
        ({"compile": "blocks", "cache": "taylor"}, "cache taylor acts inside of the blocks that are compiled; leave "
         "compile off, or use one of: first_block."),
    ],
)  # fmt: skip
def test_what_does_not_work_together_is_refused(tiny, settings, message):
    with pytest.raises(SpecError) as raised:
        optimize(load(tiny, "demo"), parse_optimization(**settings))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("compile", "cache", "offload"),
    [
        *itertools.product(["off", "blocks"], ["off", "first_block,threshold=9"], ["off", "model", "group"]),
        ("whole", "off", "group,type=leaf_level"),
        ("blocks", "off", "group,type=leaf_level"),
        ("whole,full_graph", "off", "model"),
    ],
)
def test_what_works_together(tiny, monkeypatch, compile, cache, offload):
    from quant_core import compiled_forward

    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    pipeline = load_pipeline(LoadRequest("demo", parse_plan("gguf/Q8_0")))
    request = GenerateRequest("a lake", width=32, height=32, steps=4, max_sequence_length=16)
    expected = generate(optimize(pipeline, parse_optimization(cache=cache)), request)
    before, has = places(pipeline), attributes(pipeline)
    handle = optimize(pipeline, parse_optimization(compile=compile, cache=cache, offload=offload, attention="native"))
    assert torch.equal(generate(handle, request), expected)
    assert (places(pipeline), attributes(pipeline)) == (before, has)
    if cache != "off":
        assert handle.reports["cache"].reused == 3
    if compile != "off":
        assert not handle.reports["compile"].eager
    assert set(handle.reports) == {"attention"} | {
        name for name, text in (("compile", compile), ("cache", cache), ("offload", offload)) if text != "off"
    }
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(pipeline.pipe.transformer)
        del pipeline, handle
        assert gone() is None
    finally:
        gc.enable()
