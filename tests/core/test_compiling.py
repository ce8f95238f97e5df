"""torch.compile for one run: what it compiles, how often, and that nothing of it stays."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

from quant_core import (
    LoadRequest,
    QuantError,
    SpecError,
    compiled_forward,
    compiling,
    format_runs,
    generate,
    inspect_pipeline,
    load_pipeline,
    optimize,
    parse_optimization,
    save_pipeline,
)

from .simulated_device import Card, manage
from .small_requests import SIDES, load, small

ONE_OF_EACH = (  # benchmarks/compiled.py has all schemes, with code made for them
    *("none", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0", "quanto/float8", "torchao/int8wo"),
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced as ever and run without making code for them, which takes long."""
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")


def compiled(pipeline, text="blocks", **others):
    return optimize(pipeline, parse_optimization(compile=text, **others))


def graphs(pipeline, request):
    generate(pipeline, request)
    report = pipeline.reports["compile"]
    assert not report.eager
    return report.graphs


@pytest.mark.parametrize("plan", ONE_OF_EACH)
def test_only_a_new_size_makes_new_graphs_and_only_once(traced, tiny, plan):
    torch._dynamo.reset()
    pipeline = load(tiny, "demo", plan)
    handle = compiled(pipeline)
    first = graphs(handle, small("demo"))
    assert first > 0
    assert graphs(handle, small("demo", seed=1)) == 0
    assert graphs(handle, small("demo", prompt="a red house on the left")) == 0
    assert graphs(handle, small("demo", steps=3)) == 0
    larger, other = small("demo"), small("demo")
    object.__setattr__(larger, "width", 64)
    object.__setattr__(other, "height", 96)
    assert graphs(handle, larger) <= first
    assert graphs(handle, other) == 0
    assert torch.equal(generate(handle, small("demo")), generate(pipeline, small("demo")))
    assert "compile blocks: 0 graphs" in format_runs(handle)


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "blocks") for name in sorted(SIDES)), ("zimage", "whole"), ("wan", "blocks,vae")]
)
def test_every_pipeline(traced, tiny, name, way):
    torch._dynamo.reset()
    pipeline = load(tiny, name)
    handle = compiled(pipeline, way)
    assert torch.equal(generate(handle, small(name)), generate(pipeline, small(name)))
    assert handle.reports["compile"].graphs > 0 and not handle.reports["compile"].eager
    assert graphs(handle, small(name, seed=3, steps=3)) == 0
    assert torch.equal(generate(handle, small(name)), generate(pipeline, small(name)))


@pytest.mark.parametrize("plan", ["bitsandbytes_8bit/int8", "torchao/int8wo", "quanto/int8", "quanto/int4"])
def test_a_saved_pipeline_compiles_as_what_it_was_saved_from(traced, tiny, tmp_path, plan):
    torch._dynamo.reset()
    pipeline = load(tiny, "demo", plan)
    save_pipeline(pipeline, tmp_path / "saved")
    again = load_pipeline(LoadRequest(str(tmp_path / "saved")))
    assert not again.specs
    assert compiling._settings(again) == compiling._settings(pipeline)
    (report,) = [report for report in inspect_pipeline(again) if report.name == "transformer"]
    assert report.compilable is (plan != "quanto/int4")
    if plan == "quanto/int4":
        with pytest.raises(SpecError, match="transformer is quanto/int4: torch.compile fails"):
            compiled(again)
    else:
        assert graphs(compiled(again, "blocks,full_graph"), small("demo")) == 2, "a kind of block each"


def test_a_lora_and_its_strength(traced, tiny):
    from peft import LoraConfig

    torch._dynamo.reset()
    pipeline = load(tiny, "demo", "torchao/int8wo")
    denoiser = pipeline.pipe.transformer
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k"])
    denoiser.add_adapter(config, adapter_name="style")
    handle = compiled(pipeline)
    assert graphs(handle, small("demo")) > 0
    for strength in (0.3, 0.8):
        denoiser.set_adapters(["style"], weights=[strength])
        assert graphs(handle, small("demo")) == 0
        assert torch.equal(generate(handle, small("demo")), generate(pipeline, small("demo")))
    scaled = small("demo", extra={"joint_attention_kwargs": {"scale": 0.5}})
    assert graphs(handle, scaled) == 0
    assert torch.equal(generate(handle, scaled), generate(pipeline, scaled))
    layer = next(module for module in denoiser.modules() if hasattr(module, "lora_A"))
    assert layer.scaling == {"style": 0.8}, "strengths are plain numbers again"


def test_streamed_blocks_are_compiled_and_checked(traced, tiny):
    pipeline = load(tiny, "demo", "gguf/Q8_0")
    expected = generate(pipeline, small("demo"))
    blocks = compiling.repeated_blocks(pipeline.pipe.transformer)
    checks = []
    manage(pipeline, Card(part=0.3), lambda: checks.append(pipeline.pipe.transformer))
    handle = compiled(pipeline)
    assert torch.equal(generate(handle, small("demo")), expected)
    assert len(checks) >= 2 * len(blocks), "before each block of each step"
    assert graphs(handle, small("demo")) == 0, "copies of weights are no reason to compile again"


def test_it_is_cancelled_between_blocks(traced, tiny):
    class Cancelled(BaseException):
        pass

    pipeline, calls = load(tiny, "demo"), []

    def check():
        calls.append(None)
        if len(calls) == 8:
            raise Cancelled

    manage(pipeline, Card(), check)
    handle = compiled(pipeline)
    with pytest.raises(Cancelled):
        generate(handle, small("demo"))
    assert torch.equal(generate(handle, small("demo")), generate(pipeline, small("demo")))


def test_the_whole_denoiser_is_one_and_stays_on_the_device(traced, tiny):
    pipeline = load(tiny, "demo")
    expected = generate(pipeline, small("demo"))
    manage(pipeline, Card())
    handle = compiled(pipeline, "whole,full_graph")
    assert torch.equal(generate(handle, small("demo")), expected)
    assert handle.reports["compile"].graphs == 1
    del handle
    short = load(tiny, "demo")
    manage(short, Card(part=0.3))
    with pytest.raises(QuantError, match="transformer is compiled as a whole, so that its blocks must stay"):
        generate(compiled(short, "whole"), small("demo"))
    assert torch.equal(generate(short, small("demo")), expected), "streamed again, when it is not compiled"


def test_nothing_stays_behind(traced, tiny, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")
    pipeline = load(tiny, "demo", "bitsandbytes_4bit/nf4")
    before = [dict(vars(module)) for module in pipeline.pipe.transformer.modules()]
    settings = torch._dynamo.config.recompile_limit, torch._dynamo.config.capture_dynamic_output_shape_ops
    handle = compiled(pipeline)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(handle, small("demo"), stop)
    generate(handle, small("demo"))
    assert [set(vars(module)) for module in pipeline.pipe.transformer.modules()] == list(map(set, before))
    assert settings == (
        torch._dynamo.config.recompile_limit,
        torch._dynamo.config.capture_dynamic_output_shape_ops,
    )
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/nowhere"
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(pipeline.pipe.transformer)
        del pipeline
        assert gone() is not None, "the other handle holds it"
        del handle
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("part", [1.0, 0.0])
def test_a_decoder_is_whole_whatever_manages_it(traced, tiny, part):
    torch._dynamo.reset()
    pipeline = load(tiny, "demo")
    expected = generate(pipeline, small("demo"))
    manage(pipeline, Card(part=part))
    handle = compiled(pipeline, "blocks,vae,full_graph")
    if part:
        assert torch.equal(generate(handle, small("demo")), expected)
        assert graphs(handle, small("demo", seed=1)) == 0
    else:
        with pytest.raises(QuantError, match="its decoder is compiled as a whole, so that its blocks must stay"):
            generate(handle, small("demo"))
    assert torch.equal(generate(pipeline, small("demo")), expected) if part else True


def test_the_decoder_is_compiled_where_asked(traced, tiny):
    pipeline = load(tiny, "demo")
    with_vae, without = compiled(pipeline, "blocks,vae"), compiled(pipeline)
    torch._dynamo.reset()
    assert torch.equal(generate(with_vae, small("demo")), generate(pipeline, small("demo")))
    assert graphs(without, small("demo")) == 0
    torch._dynamo.reset()
    assert graphs(without, small("demo")) == with_vae.reports["compile"].graphs - 1
