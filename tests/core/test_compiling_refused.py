"""What cannot be compiled: refused beforehand, or run as it is."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

from quant_core import (
    SpecError,
    compiled_forward,
    compiling,
    format_runs,
    generate,
    inspect_pipeline,
    optimize,
    parse_optimization,
)
from quant_core.optimization import check_eager

from .simulated_device import Card, manage
from .small_requests import load, small


def compiled(pipeline, text="blocks"):
    return optimize(pipeline, parse_optimization(compile=text))


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
    assert compiled(pipeline, "whole").optimization.compile.way == "whole"
