"""What no plan says to skip: under fewer than 8 bits the layers that are recommended for the component's class."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    QuantSpec,
    SpecError,
    backends,
    estimate,
    format_plan,
    format_report,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    plan_from_diffusers,
    skip_lists,
)
from quant_core.errors import QuantError

REASON = "recommended to stay in 16 bit for FluxTransformer2DModel"
OF_FLUX = {f"time_text_embed.{part}_embedder.linear_{number}" for part in ("timestep", "text") for number in (1, 2)}
OF_FLUX |= {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}  # not a block's proj_out
OF_FLUX |= {"single_transformer_blocks.0.norm.linear"}
ALL = {(backend.name, scheme.name): scheme for backend in backends().values() for scheme in backend.schemes}
BELOW = ["bitsandbytes_4bit/nf4", "gguf/Q4_0", "gguf/Q5_1", "quanto/int2", "quanto/int4", "torchao/nvfp4wo"]
EIGHT = ["bitsandbytes_8bit/int8", "gguf/Q8_0", "quanto/int8", "quanto/float8", "torchao/int8wo", "torchao/fp8wo"]


def load(plan):
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    pipeline = load_pipeline(LoadRequest("demo", plan))
    return pipeline, {report.name: report for report in inspect_pipeline(pipeline)}


@pytest.mark.parametrize("scheme", BELOW)
def test_below_8_bits_the_recommended_layers_stay_in_16_bit(scheme):
    pipeline, reports = load(scheme)
    left_out = reports["transformer"].left_out
    assert {name for name, why in left_out.items() if why == REASON} == OF_FLUX
    assert sum(reports["transformer"].formats.values()) == 54 - len(left_out)
    assert REASON not in {*reports["text_encoder"].left_out.values(), *reports["text_encoder_2"].left_out.values()}
    assert pipeline.specs["transformer"].skip_modules == skip_lists.recommended("FluxTransformer2DModel")
    assert pipeline.specs["text_encoder"].skip_modules == ()
    assert f"transformer: 9 left out, {REASON}: " in format_report(inspect_pipeline(pipeline))


@pytest.mark.parametrize("scheme", EIGHT)
def test_from_8_bits_on_nothing_is_skipped(scheme):
    pipeline, reports = load(f"transformer={scheme}")
    assert not reports["transformer"].left_out
    assert pipeline.specs["transformer"].skip_modules == ()


@pytest.mark.parametrize("key", ALL, ids="/".join)
def test_what_a_spec_skips_follows_from_its_bits(key):
    spec = QuantSpec(*key, options={"path": "a.gguf"} if key[1] == "file" else {})
    skips = bool(skip_lists.with_patterns(spec, "FluxTransformer2DModel").skip_modules)
    assert skips == (0 < ALL[key].bits < 8)
    assert skip_lists.with_patterns(spec, "T5EncoderModel").skip_modules == ()


def test_none_skips_nothing():
    _, reports = load("transformer=gguf/Q4_0?skip=none")
    assert not reports["transformer"].left_out and reports["transformer"].formats == {"Q4_0": 54}


def test_a_written_list_is_that_list_alone():
    _, reports = load("transformer=gguf/Q4_0?skip=proj_out")
    assert reports["transformer"].left_out == {"proj_out": "skipped by the plan"}


@pytest.mark.parametrize("scheme", ["gguf/Q4_0", "gguf/Q8_0"])
def test_recommended_in_a_list_stands_for_the_list_of_the_class(scheme):
    pipeline, reports = load(f"transformer={scheme}?skip=*.to_q|recommended|proj_out")
    left_out = reports["transformer"].left_out
    assert {name for name, why in left_out.items() if why == REASON} == OF_FLUX - {"proj_out"}
    own = {name for name, why in left_out.items() if why == "skipped by the plan"}
    assert len(own) == 6 and own == {name for name in left_out if re.fullmatch(r".*\.to_q|proj_out", name)}
    assert len(set(pipeline.specs["transformer"].skip_modules)) == len(pipeline.specs["transformer"].skip_modules) == 7


def test_what_a_mixed_pattern_names_is_not_left_out_by_default():
    _, reports = load("transformer=gguf/Q4_0?Q8_0=proj_out")
    report = reports["transformer"]
    assert set(report.left_out) == OF_FLUX - {"proj_out"} and report.formats == {"Q4_0": 54 - 9, "Q8_0": 1}
    _, reports = load("transformer=gguf/Q4_0?Q8_0=norm_out|*_blocks.*.attn&skip=*.to_q")
    assert set(reports["transformer"].left_out.values()) == {"skipped by the plan"}


def test_recommended_has_to_mean_something():
    with pytest.raises(SpecError) as error:
        load("text_encoder=gguf/Q4_0?skip=recommended")
    sentence = "No skip list is recommended for CLIPTextModel; write skip patterns of your own."
    assert str(error.value) == sentence
    _, reports = load("gguf/Q4_0?skip=recommended")  # of a default, in one component at least
    assert set(reports["transformer"].left_out) == OF_FLUX and not reports["text_encoder"].left_out


def test_patterns_of_a_list_need_not_match_but_those_that_are_written_do(monkeypatch):
    monkeypatch.setattr(skip_lists, "_lists", lambda: {"FluxTransformer2DModel": ("proj_out", "guidance_embedder")})
    _, reports = load("transformer=gguf/Q4_0")
    assert reports["transformer"].left_out == {"proj_out": REASON}
    with pytest.raises(SpecError, match="Skip pattern 'guidance_embedder' matches no module of Flux"):
        load("transformer=gguf/Q4_0?skip=guidance_embedder")
    with pytest.raises(SpecError, match="Skip pattern 'x_embeder' matches no module .*'x_embedder'"):
        load("transformer=gguf/Q4_0?skip=recommended|x_embeder")


def test_a_list_that_leaves_nothing_to_quantize_is_an_error(monkeypatch):
    monkeypatch.setattr(skip_lists, "_lists", lambda: {"FluxTransformer2DModel": ("*",)})
    with pytest.raises(SpecError) as error:
        load("transformer=gguf/Q4_0")
    assert str(error.value) == (
        f"transformer cannot be quantized as gguf/Q4_0: no layer would be quantized ({REASON})."
    )


@pytest.mark.parametrize("scheme", ["gguf/Q4_0", "bitsandbytes_4bit/nf4"])
def test_the_estimate_and_the_store_know_of_it(scheme, tmp_path):
    request = LoadRequest("demo", parse_plan(f"transformer={scheme}"), store=tmp_path / "store")
    expected = {part.name: part.footprint for part in estimate(request, GenerateRequest("a lake", steps=1)).components}
    first, again = load_pipeline(request), load_pipeline(request)
    for pipeline, origin in ((first, "stored"), (again, "store")):
        report = {report.name: report for report in inspect_pipeline(pipeline)}["transformer"]
        assert (report.footprint, report.origin) == (expected["transformer"], origin)
        assert report.left_out == dict.fromkeys(OF_FLUX, REASON)
    everything = load_pipeline(replace(request, plan=parse_plan(f"transformer={scheme}?skip=none")))
    assert everything.origins["transformer"].kind == "stored"  # another entry


@pytest.mark.parametrize(
    ("skip", "text"),
    [
        (None, "gguf/Q4_0"),
        ((), "gguf/Q4_0?skip=none"),
        ("none", "gguf/Q4_0?skip=none"),
        (["recommended"], "gguf/Q4_0?skip=recommended"),
        (("recommended", "**.to_q"), "gguf/Q4_0?skip=recommended|**.to_q"),
    ],
)
def test_each_way_to_skip_is_read_back(skip, text):
    plan = QuantPlan(default=QuantSpec("gguf", "Q4_0", skip_modules=skip))
    assert format_plan(plan) == text and parse_plan(text) == plan
    assert parse_plan(json.dumps(plan.to_dict())) == plan == QuantPlan.from_dict(plan.to_dict())
    assert hash(parse_plan(text)) == hash(plan)
    assert ("skip_modules" in plan.to_dict()["default"]) == (skip is not None)


def test_what_is_pasted_from_diffusers_documentation_skips_what_it_says():
    config = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}}
    assert plan_from_diffusers(config).default.skip_modules == ()
    config["quant_kwargs"]["llm_int8_skip_modules"] = ["proj_out"]
    assert plan_from_diffusers(config).default.skip_modules == ("**.proj_out",)


def test_each_list_is_of_a_class_that_diffusers_has():
    import diffusers

    data = json.loads((Path(skip_lists.__file__).parent / "skip_lists.json").read_text(encoding="utf-8"))
    assert data and all(hasattr(diffusers, name) for name in data)
    assert {name: skip_lists.recommended(name) for name in data} == skip_lists.read_lists(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "skip_lists.json must be an object: "),
        ({"A": ["proj_out"]}, "A in skip_lists.json must be an object of skip, source, share and note."),
        ({"A": {"skip": ["a"]}}, "A in skip_lists.json must be an object of skip, source, share and note."),
        ({"A": {"skip": "a", "source": "b"}}, "A in skip_lists.json needs skip, a list of different patterns, "),
        ({"A": {"skip": [], "source": "b"}}, "A in skip_lists.json needs skip, a list of different patterns, "),
        ({"A": {"skip": ["a", "a"], "source": "b"}}, "A in skip_lists.json needs skip, a list of different "),
        ({"A": {"skip": ["a", 5], "source": "b"}}, "A in skip_lists.json needs skip, a list of different "),
        ({"A": {"skip": ["a"], "source": " "}}, "A in skip_lists.json needs skip, a list of different "),
    ],
)
def test_a_file_of_lists_is_checked(data, sentence):
    with pytest.raises(QuantError) as error:
        skip_lists.read_lists(data)
    assert str(error.value).startswith(sentence)
