"""Backends x {global, granular} x {a diffusers component, a transformers component, both}, on the bundled demo."""

import pytest
import torch

from quant_core import (
    DeviceUnsupported,
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    QuantSpec,
    backends,
    generate,
    inspect_pipeline,
    load_pipeline,
)

REQUEST = GenerateRequest("a red circle on a blue square", width=128, height=128, steps=2, seed=7)

# scheme -> how its layers are stored, and the most bytes per weight of the quantized layers, scales included
STORED = {
    "bitsandbytes_4bit/nf4": ("nf4", 0.57),
    "bitsandbytes_4bit/fp4": ("fp4", 0.57),
    "bitsandbytes_8bit/int8": ("int8", 1.07),
    "gguf/Q8_0": ("Q8_0", 1.07),
    "gguf/Q5_1": ("Q5_1", 0.76),
    "gguf/Q5_0": ("Q5_0", 0.70),
    "gguf/Q4_1": ("Q4_1", 0.64),
    "gguf/Q4_0": ("Q4_0", 0.57),
    "quanto/int8": ("qint8", 1.07),
    "quanto/int4": ("qint4", 0.64),
    "quanto/int2": ("qint2", 0.32),
    "quanto/float8": ("qfloat8_e4m3fn", 1.07),
    "torchao/int8wo": ("Int8Tensor", 1.07),
    "torchao/int8dq": ("Int8Tensor", 1.07),
    "torchao/fp8wo": ("Float8Tensor", 1.07),
    "torchao/nvfp4wo": ("NVFP4Tensor", 0.58),
}
OF_EACH_BACKEND = ("bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q4_0", "quanto/float8", "torchao/int8wo")
REFUSED = {
    "torchao/int4wo": "a CUDA GPU of compute capability 8.0 or newer",
    "torchao/fp8dq": "a CUDA GPU of compute capability 8.9 or newer",
    "torchao/fp8dq_row": "a CUDA GPU of compute capability 8.9 or newer",
    "torchao/nvfp4dq": "a CUDA GPU of compute capability 10.0 or newer",
    "torchao/mxfp8dq": "a CUDA GPU of compute capability 10.0 or newer",
}
ELSEWHERE = {"gguf/file", "torchao/fp8dq_int4wo"}  # tests of their own: it needs a file, and the mslk package


def spec(text):
    """Of a scheme, for every layer."""
    return QuantSpec(*text.split("/"), skip_modules=())


def test_every_scheme_of_every_backend_is_in_a_table():
    schemes = {f"{name}/{scheme.name}" for name, backend in backends().items() for scheme in backend.schemes}
    assert schemes == {*STORED, *REFUSED, *ELSEWHERE}
    assert {name.split("/")[0] for name in OF_EACH_BACKEND} == set(backends())


def plans(text):
    """Each way to plan a scheme, and the components that it quantizes."""
    both = {"transformer": spec(text), "text_encoder_2": spec(text)}
    yield "global", QuantPlan(default=spec(text)), {"transformer", "text_encoder", "text_encoder_2"}
    yield "granular transformer", QuantPlan({"transformer": spec(text)}), {"transformer"}
    yield "granular text_encoder_2", QuantPlan({"text_encoder_2": spec(text)}), {"text_encoder_2"}
    yield "granular both", QuantPlan(both), set(both)
    other = spec("torchao/fp8wo" if text != "torchao/fp8wo" else "quanto/float8")
    yield (
        "named over global",
        QuantPlan({"transformer": other}, spec(text)),
        {
            "transformer",
            "text_encoder",
            "text_encoder_2",
        },
    )


def rows():
    for text in STORED:
        kinds = list(plans(text)) if text in OF_EACH_BACKEND else [next(plans(text))]
        for kind, plan, planned in kinds:
            yield pytest.param(text, plan, planned, id=f"{text}-{kind.replace(' ', '-')}")


@pytest.mark.parametrize(("text", "plan", "planned"), [*rows()])
def test_a_plan_quantizes_its_components_and_no_other(text, plan, planned):
    pipeline = load_pipeline(LoadRequest("demo", plan))
    images = generate(pipeline, REQUEST)
    assert images.shape == (1, 128, 128, 3) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert images.std() > 0, "a picture of one colour"
    assert torch.equal(images, generate(pipeline, REQUEST)), "the same seed gives the same picture"

    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    assert set(reports) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert {name for name, report in reports.items() if report.is_quantized} == planned
    for name, report in reports.items():
        wanted = plan.components.get(name) or (plan.default if name in planned else None)
        assert report.requested == str(wanted or "")
        if wanted is None:
            assert (report.formats, report.method, report.footprint) == ({}, "", report.bytes_16bit)
            continue
        stored, most = STORED[str(wanted)]
        module = getattr(pipeline.pipe, name)
        linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
        assert report.formats == {stored: len(linear)}
        assert report.left_out == {} and report.method == wanted.backend and report.note == ""
        assert 0 < report.footprint < report.bytes_16bit
        weights = sum(layer.in_features * layer.out_features for layer in linear)
        rest = report.bytes_16bit - 2 * weights
        assert report.footprint - rest <= most * weights


@pytest.mark.parametrize(("text", "needs"), REFUSED.items(), ids=REFUSED)
@pytest.mark.parametrize("named", [True, False], ids=["granular", "global"])
def test_a_scheme_that_this_device_lacks_is_refused(text, needs, named):
    plan = QuantPlan({"transformer": spec(text)}) if named else QuantPlan(default=spec(text))
    with pytest.raises(DeviceUnsupported) as error:
        load_pipeline(LoadRequest("demo", plan))
    assert str(error.value) == f"{text} needs {needs}; this run is on cpu."


def test_the_unquantized_pipeline_is_the_one_diffusers_loads():
    from diffusers import FluxPipeline

    pipeline = load_pipeline(LoadRequest("demo"))
    theirs = FluxPipeline.from_pretrained(pipeline.index.folder, torch_dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(
        REQUEST.prompt,
        width=128,
        height=128,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    expected = images.float().clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.equal(generate(pipeline, REQUEST), expected)
    for first, second in (("float32", torch.float32), ("float16", torch.float16)):
        other = load_pipeline(LoadRequest("demo", dtype=first))
        assert {report.dtype for report in inspect_pipeline(other)} == {first}
        assert other.pipe.transformer.dtype == second
