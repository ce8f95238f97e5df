"""A skip pattern means the same layers on every backend: full names, globs of them, and what is inside a module."""

import re

import pytest
import torch

from quant_core import LoadRequest, QuantPlan, QuantSpec, SpecError, inspect_pipeline, load_pipeline

BACKENDS = ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0", "quanto/float8", "torchao/int8wo"]

# component, pattern -> the full names of the linear layers that it leaves out, as a regular expression
PATTERNS = [
    ("transformer", "proj_out", r"proj_out"),
    ("transformer", "**.proj_out", r"proj_out|single_transformer_blocks\.\d+\.proj_out"),
    ("transformer", "transformer_blocks.0", r"transformer_blocks\.0\..*"),
    ("transformer", "transformer_blocks.0.attn.to_q", r"transformer_blocks\.0\.attn\.to_q"),
    ("transformer", "*.to_q", r".*\.to_q"),
    ("transformer", "**.attn", r".*\.attn\..*"),
    ("transformer", "*_embed*.linear_[12]", r".*_embed.*\.linear_[12]"),
    ("text_encoder_2", "**.wo", r".*\.wo"),
]


@pytest.fixture(scope="module")
def unquantized():
    return load_pipeline(LoadRequest("demo"))


def load(backend, component, *patterns):
    spec = QuantSpec(*backend.split("/"), skip_modules=patterns)
    return load_pipeline(LoadRequest("demo", QuantPlan({component: spec})))


def linear_layers(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("component", "pattern", "expected"), PATTERNS, ids=[row[1] for row in PATTERNS])
def test_a_pattern_leaves_out_the_same_layers_on_every_backend(unquantized, backend, component, pattern, expected):
    pipeline = load(backend, component, pattern)
    before = linear_layers(getattr(unquantized.pipe, component))
    after = linear_layers(getattr(pipeline.pipe, component))
    left_out = {name for name in before if re.fullmatch(expected, name)}
    assert left_out and left_out != set(before)

    report = {report.name: report for report in inspect_pipeline(pipeline)}[component]
    assert report.left_out == dict.fromkeys(left_out, "skipped by the plan")
    assert sum(report.formats.values()) == len(before) - len(left_out)
    for name in before:
        same = type(after[name].weight) is torch.nn.Parameter and torch.equal(after[name].weight, before[name].weight)
        assert same == (name in left_out), name


def test_several_patterns_add_up():
    report = inspect_pipeline(load("torchao/int8wo", "transformer", "proj_out", "x_embedder", "*.to_k"))[2]
    assert {name.split(".")[-1] for name in report.left_out} == {"proj_out", "x_embedder", "to_k"}
    assert len(report.left_out) == 2 + 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("proj_ot", " (did you mean 'proj_out'?)"),
        ("transformer_block.0", " (did you mean 'transformer_blocks.0'?)"),
        ("to_q", ""),  # a name of its own stands for the full one: it takes **.to_q
        ("**.to_qq", " (did you mean 'to_q'?)"),
        ("Proj_out", " (did you mean 'proj_out'?)"),
        ("zzzzz", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(backend, pattern, hint):
    with pytest.raises(SpecError) as error:
        load(backend, "transformer", pattern)
    sentence = f"Skip pattern {pattern!r} matches no module of FluxTransformer2DModel"
    assert str(error.value).startswith(sentence) and str(error.value).endswith(".")
    assert hint in str(error.value)


def test_patterns_of_a_default_have_to_match_in_one_component_only():
    spec = QuantSpec("torchao", "int8wo", skip_modules=("proj_out", "**.wo"))
    reports = inspect_pipeline(load_pipeline(LoadRequest("demo", QuantPlan(default=spec))))
    left_out = {report.name: {name.split(".")[-1] for name in report.left_out} for report in reports}
    assert left_out == {"text_encoder": set(), "text_encoder_2": {"wo"}, "transformer": {"proj_out"}, "vae": set()}
    unmatched = QuantSpec("torchao", "int8wo", skip_modules=("proj_out", "nowhere"))
    with pytest.raises(SpecError, match="Skip pattern 'nowhere' matches no module of "):
        load_pipeline(LoadRequest("demo", QuantPlan(default=unmatched)))


def test_patterns_that_leave_nothing_to_quantize_are_an_error():
    with pytest.raises(SpecError) as error:
        load("torchao/int8wo", "transformer", "*")
    assert str(error.value) == (
        "transformer cannot be quantized as torchao/int8wo: no layer would be quantized (skipped by the plan)."
    )
