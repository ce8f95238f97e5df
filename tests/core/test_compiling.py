"""torch.compile for one run: what it compiles, how often, and that nothing of it stays."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import Unsupported

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
from quant_core.compiled_code import kept_in
from quant_core.optimization import check_eager

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


def test_what_does_not_compile_runs_as_it_is_with_one_warning(tiny, monkeypatch, caplog):
    tries = []

    def fail(*arguments, **options):
        tries.append(arguments)
        raise Unsupported("no such operator\nand a page of hints")

    monkeypatch.setattr(compiled_forward, "_function", lambda *_: fail)
    pipeline = load(tiny, "demo")
    handle = compiled(pipeline)
    for _ in range(2):
        assert torch.equal(generate(handle, small("demo")), generate(pipeline, small("demo")))
    assert len(tries) == 2, "once for each kind of block"
    warnings = [record.message for record in caplog.records if "without compile" in record.message]
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    assert warnings == [f"{name} runs without compile: no such operator." for name in blocks]
    said = "; ".join(f"{name} does not compile: no such operator" for name in blocks)
    assert format_runs(handle) == f"compile blocks: none; {said}"


@pytest.mark.parametrize(
    ("kind", "wanted"), [("InvalidCxxCompiler", "a C++ compiler, as g++"), ("TritonMissing", "Triton")]
)
def test_a_compiler_that_is_not_there_is_named(tiny, monkeypatch, kind, wanted):
    def fail(*arguments, **options):
        raise Unsupported(f"{kind}: No working compiler was found in config.cpp.cxx")

    monkeypatch.setattr(compiled_forward, "_function", lambda *_: fail)
    handle = compiled(load(tiny, "demo"))
    generate(handle, small("demo"))
    assert f"does not compile: it needs {wanted}" in format_runs(handle)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"compiel": "auto"},
            "There is no compiel to optimize (did you mean 'compile'?); there are: attention, cache, ",
        ),
        ({"compile": 3}, "compile is 3; it takes a text, as compile='auto'."),
        ({"compile": ""}, "compile has no ''; use one of: auto, blocks, off, whole."),
    ],
)
def test_what_is_no_setting_is_told_so(texts, message):
    with pytest.raises(SpecError) as raised:
        parse_optimization(**texts)
    assert str(raised.value).startswith(message)


def test_out_of_memory_is_handed_on_as_it_is(tiny, monkeypatch):
    def fail(*arguments, **options):
        raise Unsupported("while compiling") from torch.OutOfMemoryError("full")

    monkeypatch.setattr(compiled_forward, "_function", lambda *_: fail)
    with pytest.raises(torch.OutOfMemoryError, match="^full$"):
        generate(compiled(load(tiny, "demo")), small("demo"))


def test_what_cannot_be_compiled_is_refused_or_left(tiny):
    pipeline = load(tiny, "demo", "quanto/int4")
    with pytest.raises(SpecError) as raised:
        compiled(pipeline)
    assert str(raised.value) == (
        "compile is blocks, but transformer is quanto/int4: torch.compile fails on its packed weights; "
        "use compile off, or another scheme."
    )
    automatic = compiled(pipeline, "auto")
    assert torch.equal(generate(automatic, small("demo")), generate(pipeline, small("demo")))
    assert format_runs(automatic).startswith("compile auto: none; transformer is quanto/int4")
    reports = {report.name: report.compilable for report in inspect_pipeline(pipeline)}
    assert reports["transformer"] is False and reports["vae"] is True


def test_a_vae_without_a_decoder_of_its_own_is_named(tiny):
    pipeline = load(tiny, "demo")
    pipeline.pipe.vae.decoder = None
    with pytest.raises(SpecError, match="compile vae has no effect on FluxPipeline, whose VAE has no decoder"):
        compiled(pipeline, "blocks,vae")


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


@pytest.mark.parametrize(
    ("other", "named"), [({"cache": "first_block"}, "cache first_block"), ({"offload": "model"}, "offload model")]
)
def test_recorded_graphs_and_what_moves_under_them(tiny, other, named):
    pipeline = load(tiny, "demo")
    wanted = parse_optimization(compile="blocks,mode=reduce-overhead", **other)
    optimize(pipeline, wanted, "cpu")
    with pytest.raises(
        SpecError, match=f"records CUDA graphs, which {named} does not stand; use mode=max-autotune-no"
    ):
        optimize(pipeline, wanted, "cuda")


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_recorded_graphs_are_refused_where_components_come_and_go(tiny, mode):
    pipeline = load(tiny, "demo")
    wanted = parse_optimization(compile=f"whole,mode={mode}")
    optimize(pipeline, wanted, "cuda")
    manage(pipeline, Card())
    optimize(pipeline, wanted, "cpu")
    with pytest.raises(SpecError, match=f"compile mode={mode} records CUDA graphs, whose memory nobody gets back"):
        optimize(pipeline, wanted, "cuda")
    optimize(pipeline, parse_optimization(compile="whole,mode=max-autotune-no-cudagraphs"), "cuda")


def test_the_decoder_is_compiled_where_asked(traced, tiny):
    pipeline = load(tiny, "demo")
    with_vae, without = compiled(pipeline, "blocks,vae"), compiled(pipeline)
    torch._dynamo.reset()
    assert torch.equal(generate(with_vae, small("demo")), generate(pipeline, small("demo")))
    assert graphs(without, small("demo")) == 0
    torch._dynamo.reset()
    assert graphs(without, small("demo")) == with_vae.reports["compile"].graphs - 1


def test_a_scheme_that_crawls_eagerly_is_refused_on_a_gpu(tiny, monkeypatch):
    pipeline = load(tiny, "demo", "torchao/int8dq")
    with pytest.raises(SpecError) as raised:
        check_eager(pipeline, torch.device("cuda"))
    assert str(raised.value) == (
        "transformer is torchao/int8dq, which takes 130 s a picture against 3.4 s compiled; "
        "compile it, or take another scheme."
    )
    check_eager(pipeline, torch.device("cpu"))
    stopped = compiled(pipeline)
    check_eager(stopped, torch.device("cuda"))
    stopped.uncompiled["FluxTransformerBlock"] = "it failed"
    check_eager(stopped, torch.device("cuda"))  # with a warning, and no failed prompt
    pipeline.pipe.transformer._repeated_blocks = ["NoSuchBlock"]
    monkeypatch.setattr(compiling, "divide", lambda *_: ([], []))
    with pytest.raises(SpecError, match="torchao/int8dq"):
        check_eager(compiled(pipeline, "auto"), torch.device("cuda"))
    with pytest.raises(SpecError, match="transformer, a FluxTransformer2DModel, has no repeated blocks"):
        compiled(pipeline)


def test_quantizing_leaves_the_process_s_settings_alone(tiny):
    """torchao would set Inductor's, by which compiled code is found again."""
    import torch._inductor.config as inductor

    before = inductor.save_config_portable()
    pipeline = load(tiny, "demo", "torchao/int8wo")
    assert inductor.save_config_portable() == before
    _, settings = compiling._settings(pipeline)
    assert settings["coordinate_descent_tuning"] and not settings["pattern_matcher"]


RUN = """
import json, sys, torch
torch.set_num_threads(1)
from quant_core import *
pipeline = load_pipeline(LoadRequest("demo", parse_plan(sys.argv[1]), store=sys.argv[2]))
if sys.argv[3]:
    moved = optimize(pipeline, parse_optimization(offload="model"))
    generate(moved, GenerateRequest("a dog", width=32, height=32, steps=1))
request = GenerateRequest("a cat", width=32, height=32, steps=2, max_sequence_length=16)
handle = optimize(pipeline, parse_optimization(compile="blocks"))
ours, plain = generate(handle, request), generate(pipeline, request)
print(json.dumps({**handle.reports["compile"].data(), "distance": (ours - plain).abs().mean().item()}))
"""


def test_a_second_start_makes_no_code(tmp_path):
    """By Inductor, for real."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    found = []
    for before in ("", "offloaded"):
        command = [sys.executable, "-c", RUN, "torchao/int8wo", str(tmp_path), before]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["graphs"] == second["graphs"] > 0
    assert (first["compiled"], second["compiled"]) == (first["graphs"], 0)
    assert first["distance"] == second["distance"] < 0.02, "as far as 16 bit is from itself compiled"
    assert any((tmp_path / "compiled").rglob("*.so"))
    listed = subprocess.run(
        [sys.executable, "-m", "quant_core", "store", "list", "--store", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "compiled code" in listed.stdout


def test_code_is_kept_only_where_nobody_else_can_write(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with kept_in(tmp_path):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert (tmp_path / "compiled").stat().st_mode & 0o077 == 0
    for folder in (tmp_path / "compiled", tmp_path):
        folder.chmod(0o777)
        with kept_in(tmp_path):
            assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        folder.chmod(0o700)
    assert caplog.text.count("which others can write") == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with kept_in(tmp_path / "store"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not (tmp_path / "store").exists()
