"""What quantizing a group alone costs: the same as a plan for only that group, and nothing is left behind."""

import json

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantError,
    QuantPlan,
    QuantSpec,
    Sensitivity,
    SensitivityRequest,
    SourceError,
    SpecError,
    format_sensitivity,
    generate,
    load_pipeline,
    measure_sensitivity,
    parse_plan,
    parse_sensitivity,
    parse_spec,
    read_sensitivity,
    save_pipeline,
    sensitivity,
)
from quant_core.__main__ import main
from quant_core.groups import layer_groups, plain_patterns
from quant_core.layers import linear_layers
from quant_core.metrics import error_of, mean_psnr, psnr_each, psnr_of, relative_error
from quant_core.sensitivity_data import shipped
from quant_core.transfer import byte_size

from .simulated_device import Card, manage
from .small_requests import small

SETTINGS = GenerateRequest("", width=64, height=64, steps=2, max_sequence_length=48)
PROMPTS = ["a lake at noon", "snowy mountains", "green hills"]


def request(source="demo", specs=("gguf/Q4_0",), **others):
    given = {"prompts": PROMPTS, "seeds": (3,), "settings": SETTINGS, "batch": 2} | others
    return SensitivityRequest(LoadRequest(str(source)), [parse_spec(text) for text in specs], **given)


@pytest.fixture(scope="module")
def found():
    return measure_sensitivity(request(specs=("gguf/Q4_0", "bitsandbytes_4bit/nf4")))


def paint(plan):
    """The same pictures, by a pipeline loaded with a plan, and the last latents of each batch."""
    pipeline = load_pipeline(LoadRequest("demo", plan))
    images, latents = [], []
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        last = []
        asked = GenerateRequest(prompts, width=64, height=64, steps=2, max_sequence_length=48, seed=3)
        images.append(generate(pipeline, asked, lambda step, last=last: last.append(step.latents)))
        latents.append(last[-1].float())
    return torch.cat(images), latents


@pytest.mark.parametrize(
    ("component", "group"),
    [("transformer", "attention"), ("transformer", "first block"), ("text_encoder_2", "attention")],
)
@pytest.mark.parametrize("text", ["gguf/Q4_0", "bitsandbytes_4bit/nf4"])
def test_a_group_costs_what_a_plan_for_only_that_group_does(found, component, group, text):
    model = load_pipeline(LoadRequest("demo")).models[component]
    layers = [name for name, _ in linear_layers(model)]
    others = [
        pattern for other in layer_groups(model) if other.name != group for pattern in plain_patterns(other, layers)
    ]
    spec = QuantSpec(*text.split("/"), {}, tuple(others))
    (images, latents), (plain, plain_latents) = paint(QuantPlan({component: spec})), paint(QuantPlan())
    measured = found.components[component].groups[group]
    assert measured.errors[text] == error_of(mean_psnr(psnr_each(images, plain))) > 0
    errors = [relative_error(*pair) for pair in zip(latents, plain_latents, strict=True)]
    assert measured.latent_errors[text] == pytest.approx(sum(errors) / 2)


def test_every_group_of_the_denoiser_and_the_encoders_is_measured(found):
    models = load_pipeline(LoadRequest("demo")).models
    assert set(found.components) == {"transformer", "text_encoder", "text_encoder_2"}
    for name, part in found.components.items():
        assert part.class_name == type(models[name]).__name__
        assert list(part.groups) == [group.name for group in layer_groups(models[name])]
        for group in part.groups.values():
            assert set(group.errors) == set(group.latent_errors) == {"gguf/Q4_0", "bitsandbytes_4bit/nf4"}
    assert found.pictures == 3 and found.model == "demo" and found.pipeline == "FluxPipeline"
    assert found.settings["width"] == 64 and found.settings["prompt"] == PROMPTS and "torch" in found.versions


def test_each_layer_can_be_measured(tiny):
    found = measure_sensitivity(request(tiny("sd"), by="layer", prompts=["a cat"], settings=small("sd", ""), batch=1))
    groups = found.components["unet"].groups
    assert all(group.layers == 1 and group.patterns == (name,) for name, group in groups.items()) and len(groups) > 5
    assert any(error > 0 for group in groups.values() for error in group.errors.values())


def test_the_pipeline_is_as_it_was_also_after_a_stop(monkeypatch):
    loaded = []

    def keep(load):
        loaded.append(load_pipeline(load))
        return loaded[-1]

    class Enough(Exception):
        pass

    def stop(done, total, label):
        if label.startswith("transformer"):
            raise Enough

    monkeypatch.setattr(sensitivity, "load_pipeline", keep)
    with pytest.raises(Enough):
        measure_sensitivity(request(specs=("bitsandbytes_4bit/nf4",)), stop)
    (pipeline,) = loaded
    assert all(type(layer) is torch.nn.Linear for _, layer in linear_layers(pipeline.models["transformer"]))
    fresh = load_pipeline(LoadRequest("demo"))
    asked = GenerateRequest("a lake", width=64, height=64, steps=2)
    assert torch.equal(generate(pipeline, asked), generate(fresh, asked))


@pytest.mark.parametrize("part", [1.0, 0.4])
def test_under_a_memory_manager_it_is_the_same_and_nothing_stays_on_the_device(found, part):
    card, kept = Card(part), []

    def place(pipeline, device):
        manage(pipeline, card)
        kept.append(pipeline)
        return pipeline

    managed = measure_sensitivity(request(specs=("gguf/Q4_0", "bitsandbytes_4bit/nf4")), place=place)
    assert managed.components == found.components
    assert card.copied > 100
    for name, placement in kept[0].placements.items():
        placement.evict()
        parts = [part for unit in placement._units for part in unit.modules]
        assert len(parts) == len(set(parts)) and set(parts) == set(kept[0].models[name].modules())
        assert placement.size == byte_size(list(kept[0].models[name].modules()))
    assert card.used == 0


def test_progress_counts_pictures():
    seen = []
    measure_sensitivity(request(prompts=["a lake"]), lambda *told: seen.append(told))
    done = [count for count, _, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == seen[-1][1] == 2 + 11
    assert {label for _, _, label in seen} >= {"16 bit", "transformer, output, gguf/Q4_0"}


def test_a_reference_that_differs_from_itself_is_an_error(monkeypatch):
    real, runs = sensitivity.generate, []

    def other(pipeline, asked, on_step=None):
        runs.append(asked)
        return real(pipeline, asked, on_step) + (len(runs) - 1) / 1000

    monkeypatch.setattr(sensitivity, "generate", other)
    with pytest.raises(QuantError, match="differs from itself by"):
        measure_sensitivity(request())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"specs": ()}, "at least one scheme"),
        ({"prompts": []}, "at least one scheme, one prompt"),
        ({"by": "block"}, "by is 'block'; use one of: group, layer"),
        ({"batch": 0}, "batch is 0; it takes"),
    ],
)
def test_a_request_with_nothing_to_measure_is_refused(others, message):
    with pytest.raises(SpecError, match=message):
        request(**others)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gguf/file?path=x.gguf", "gguf/file is a file and no way to quantize"),
        ("torchao/int8wo?group_size=64", "write torchao/int8wo and nothing more"),
        ("gguf/Q4_0?skip=proj_out", "write gguf/Q4_0 and nothing more"),
    ],
)
def test_only_schemes_as_they_come_are_measured(text, message):
    with pytest.raises(SpecError, match=message):
        measure_sensitivity(request(specs=(text,)))


def test_what_is_quantized_already_is_not_measured(tmp_path):
    save_pipeline(load_pipeline(LoadRequest("demo", parse_plan("torchao/int8wo"))), tmp_path / "saved")
    with pytest.raises(SpecError, match="has no layer that could be quantized so"):
        measure_sensitivity(request(tmp_path / "saved"))


def test_the_data_come_back_from_json(found):
    assert parse_sensitivity(json.dumps(found.to_dict())) == found


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("format"),
        lambda data: data.update(format=99),
        lambda data: data.update(components=[]),
        lambda data: data.update(settings=[]),
        lambda data: data["settings"].update(by="foo"),
        lambda data: data.update(pictures=float("inf")),
        lambda data: data["components"]["transformer"]["groups"]["output"]["errors"].update({"a/b": float("inf")}),
        lambda data: data["components"]["transformer"]["groups"]["output"].pop("errors"),
        lambda data: data["components"]["transformer"]["groups"]["output"]["errors"].update({"gguf/Q4_0": -1.0}),
        lambda data: data["components"]["transformer"]["groups"]["output"]["errors"].update(
            {"gguf/Q4_0": float("nan")}
        ),
    ],
)
def test_other_json_is_refused(found, damage):
    data = json.loads(json.dumps(found.to_dict()))
    damage(data)
    with pytest.raises(SourceError, match="no sensitivity data of format 1"):
        Sensitivity.from_dict(data)


def test_no_json_and_no_file_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no valid JSON"):
        parse_sensitivity("{")
    with pytest.raises(SourceError, match="cannot be read"):
        read_sensitivity(tmp_path / "none.json")


def test_the_table_shows_the_figures(found):
    table = format_sensitivity(found)
    error = found.components["transformer"].groups["output"].errors["gguf/Q4_0"]
    (line,) = [line for line in table.splitlines() if line.startswith("transformer") and "output" in line]
    assert f"{psnr_of(error):.1f}" in line.split() and "3 pictures of demo" in table


def test_what_is_shipped_is_of_the_demo():
    (data,) = [data for data in shipped() if data.pipeline == "FluxPipeline"]
    models = load_pipeline(LoadRequest("demo")).models
    for name, part in data.components.items():
        assert list(part.groups) == [group.name for group in layer_groups(models[name])]
        assert [group.patterns for group in part.groups.values()] == [
            group.patterns for group in layer_groups(models[name])
        ]
    assert data.pictures >= 24


def test_the_command_writes_what_plan_reads(tmp_path, capsys):
    out = tmp_path / "found.json"
    size = ["--width", "64", "--height", "64", "--steps", "1"]
    arguments = ["sensitivity", "demo", "--prompt", "a lake", "--scheme", "gguf/Q8_0", *size, "--out", str(out)]
    assert main(arguments) == 0
    assert "first block" in capsys.readouterr().out
    assert read_sensitivity(out).components["transformer"].groups["output"].errors["gguf/Q8_0"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a lake", "--scheme", "nf4"], "'nf4' is no part of a plan"),
        (["--prompt", "a lake", "--scheme", "transformer=gguf/Q4_0"], "'transformer=gguf/Q4_0' is no scheme"),
        (["--scheme", "gguf/Q4_0"], "sensitivity needs a prompt"),
        (["--prompt", "a lake", "--out", "/nowhere/x.json"], "--out is /nowhere/x.json; name a .json file"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, message, capsys):
    assert main(["sensitivity", "demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
