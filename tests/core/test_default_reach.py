"""What a plan's default is for: denoisers and text encoders; never VAEs, safety checkers or image encoders."""

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    SpecError,
    generate,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    read_index,
    reading,
)

REACHED = {
    "sd": {"text_encoder", "unet"},
    "sd3": {"text_encoder", "text_encoder_2", "text_encoder_3", "transformer"},
    "wan": {"text_encoder", "transformer"},
    "zimage": {"text_encoder", "transformer"},
}
LEFT_ALONE = {"sd": {"vae", "safety_checker"}, "sd3": {"vae"}, "wan": {"vae"}, "zimage": {"vae"}}
SIZES = {"wan": {"extra": {"num_frames": 5}}}
SCHEMES = ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0", "quanto/float8", "torchao/int8wo"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", REACHED)
def test_a_default_reaches_the_denoiser_and_the_text_encoders_and_no_more(tiny, name, scheme):
    pipeline = load_pipeline(LoadRequest(str(tiny(name)), parse_plan(scheme)))
    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    assert {name for name, report in reports.items() if report.is_quantized} == REACHED[name]
    assert {name for name, report in reports.items() if not report.is_quantized} == LEFT_ALONE[name]
    assert {report.requested for report in reports.values()} == {scheme, ""}
    request = GenerateRequest("a cat", width=32, height=32, steps=2, **SIZES.get(name, {}))
    images = generate(pipeline, request)
    assert images.shape == (5 if name == "wan" else 1, 32, 32, 3)
    assert images.isfinite().all() and torch.equal(images, generate(pipeline, request))


@pytest.mark.parametrize(
    ("pipeline", "index", "reached"),
    [
        ("KandinskyPrior", {"prior": ["diffusers", "PriorTransformer"]}, {"prior"}),
        ("Wan", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"transformer_2"}),
        ("StableDiffusionControlNet", {"controlnet": ["diffusers", "ControlNetModel"]}, set()),
        ("StableDiffusion", {"unet": ["diffusers", "UNet2DConditionModel"]}, {"unet"}),
        ("StableDiffusion", {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, set()),
        ("StableDiffusion", {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, set()),
        ("LTX2", {"vae": ["diffusers", "AutoencoderKLWan"], "vocoder": ["transformers", "SpeechT5HifiGan"]}, set()),
        ("QwenImage", {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"]}, {"text_encoder"}),
        ("DreamLite", {"text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"]}, {"text_encoder"}),
        (
            "Wan",
            {"tokenizer": ["transformers", "T5TokenizerFast"], "scheduler": ["diffusers", "DDIMScheduler"]},
            set(),
        ),
        ("StableDiffusion", {"feature_extractor": ["transformers", "CLIPImageProcessor"]}, set()),
        ("StableDiffusion", {"text_encoder": [None, None]}, set()),
        ("AceStep", {"audio_tokenizer": ["diffusers", "AceStepAudioTokenizer"]}, set()),
    ],
)
def test_the_reach_is_told_by_name_and_class(tmp_path, edit, pipeline, index, reached):
    (tmp_path / "model_index.json").write_text("{}")
    edit(tmp_path / "model_index.json", _class_name=f"{pipeline}Pipeline", requires_safety_checker=True, **index)
    assert set(read_index(tmp_path).default_reach) == reached


def test_a_component_the_default_cannot_serve_stays_and_the_report_says_why(tiny):
    plan = parse_plan("torchao/int8wo?skip=**.layers")  # all of the CLIP text encoder
    reports = {report.name: report for report in inspect_pipeline(load_pipeline(LoadRequest(str(tiny("sd")), plan)))}
    assert reports["text_encoder"].note == "stays as it is: no layer would be quantized (skipped by the plan)"
    assert (reports["text_encoder"].requested, reports["text_encoder"].formats) == ("", {})
    assert reports["text_encoder"].footprint == reports["text_encoder"].bytes_16bit
    assert reports["unet"].formats and not reports["unet"].note


UNSERVED = [
    ("wan", "vae=torchao/int8wo", "vae cannot be quantized as torchao/int8wo: no layer would be quantized {}"),
    ("wan", "vae=gguf/Q8_0", "vae cannot be quantized as gguf/Q8_0: no layer would be quantized {}"),
    (
        "wan",
        "vae=bitsandbytes_4bit/nf4,default=torchao/int8wo",
        "vae cannot be quantized as bitsandbytes_4bit/nf4: {}",
    ),
]


@pytest.mark.parametrize(("name", "plan", "sentence"), UNSERVED, ids=[plan for _, plan, _ in UNSERVED])
def test_a_named_component_that_cannot_be_served_is_an_error(tiny, monkeypatch, name, plan, sentence):
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SpecError) as error:
        load_pipeline(LoadRequest(str(tiny(name)), parse_plan(plan)))
    assert str(error.value).startswith(sentence.split("{}")[0])
    assert str(error.value).endswith("(it has no linear layers).")


def test_a_default_that_serves_nothing_is_an_error(tiny):
    with pytest.raises(SpecError) as error:
        load_pipeline(LoadRequest(str(tiny("wan")), parse_plan("torchao/int8wo?skip=*")))
    assert str(error.value).startswith(
        "The plan would quantize nothing of this pipeline: text_encoder stays as it is: "
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_vae_is_quantized_where_a_plan_names_it(tiny, scheme):
    pipeline = load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan(f"vae={scheme}")))
    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    assert {name for name, report in reports.items() if report.is_quantized} == {"vae"}
    assert sum(reports["vae"].formats.values()) == 8
    assert generate(pipeline, GenerateRequest("a", width=16, height=16, steps=1)).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_safety_checker_is_quantized_where_a_plan_names_it(tiny, scheme):
    pipeline = load_pipeline(LoadRequest(str(tiny("sd")), parse_plan(f"safety_checker={scheme}")))
    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    assert reports["safety_checker"].is_quantized
    assert generate(pipeline, GenerateRequest("a", width=16, height=16, steps=1)).isfinite().all()
