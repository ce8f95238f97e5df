"""Nodes that measure and choose: sensitivity as JSON from one to the other, and a mapping that loads."""

import json

import comfy.model_management as mm
import pytest
from quant_pack.nodes import AutoMapping, LoadQuantizedPipeline, MeasureSensitivity
from quant_pack.quant_core import footprint, format_plan

SIZE = {"width": 64, "height": 64, "steps": 1, "guidance": -1.0}
GIB_OF_15_MIB = 15 / 1024


@pytest.fixture(scope="module")
def measured():
    return MeasureSensitivity.execute(
        "demo", "bfloat16", "a lake\n\nhills", **SIZE, seed=3, pictures=1, schemes="gguf/Q4_0, gguf/Q8_0", batch=2
    )


def test_sensitivity_is_told_as_json_and_as_a_table(measured):
    text, table = measured.args
    data = json.loads(text)
    assert data["pictures"] == 2 and set(data["components"]) == {"transformer", "text_encoder", "text_encoder_2"}
    assert set(data["components"]["transformer"]["groups"]["output"]["errors"]) == {"gguf/Q4_0", "gguf/Q8_0"}
    assert measured.ui.value == table and "first block" in table


def test_a_mapping_is_chosen_by_it_and_loads(measured):
    found = AutoMapping.execute("demo", "bfloat16", GIB_OF_15_MIB, "weights", **SIZE, sensitivity=measured.args[0])
    mapping, text, reasons, data = found.args
    assert text == format_plan(mapping) and reasons.count("\n") == 2 and "2 pictures" in reasons
    assert json.loads(data)["text"] == text and text in found.ui.value
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    assert sum(map(footprint, pipeline.models.values())) == json.loads(data)["footprint"] <= 15 * 2**20


def test_without_data_and_budget_it_goes_by_what_is_shipped_and_the_memory_of_the_device():
    mapping, text, reasons, _ = AutoMapping.execute("demo", "bfloat16", "all", "in turn", **SIZE).args
    assert text == "none" and not mapping.components and "It is 16 bit, which fits." in reasons
    assert f"of {24 - 400 / 1024:.2f} GiB" in reasons


@pytest.mark.parametrize(
    ("budget", "mebibytes"),
    [("15MiB", 15), (" 15 mib", 15), ("0.012", 12.288), (0.012, 12.288), ("7.75", 7936), (7.75, 7936), (8, 8192)],
)
def test_a_budget_is_what_was_typed(monkeypatch, budget, mebibytes):
    seen = []
    monkeypatch.setattr("quant_pack.nodes.auto_plan.auto_plan", lambda request: seen.append(request) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AutoMapping.execute("demo", "bfloat16", budget, "weights", **SIZE)
    assert seen[0].budget == int(mebibytes * 2**20)


@pytest.mark.parametrize("budget", [0, 0.0, "0", "0GiB", "0.0000000001"])
def test_nothing_is_no_word_for_everything(budget):
    with pytest.raises(ValueError, match=f"budget is {budget}, which nothing fits into; write all for all the memory"):
        AutoMapping.execute("demo", "bfloat16", budget, "weights", **SIZE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sensitivity": "{"}, "no valid JSON"),
        ({"sensitivity": "{}"}, "no sensitivity data of format 1"),
        ({"budget": 0.001}, "No plan fits into 1.02 MiB of weights"),
        ({"budget": ""}, "budget is ''; it takes a size in G, GB, GiB, M, MB or MiB, as 8GiB; or all."),
        ({"budget": "8 TB"}, "budget is '8 TB'; it takes a size"),
        ({"budget": "-1"}, "budget is '-1'; it takes a size"),
        ({"budget": float("nan")}, "budget is 'nan'; it takes a size"),
        ({"budget": True}, "budget is 'True'; it takes a size"),
        ({"pipeline": "../x"}, "There is no diffusers pipeline"),
    ],
)
def test_what_cannot_be_chosen_is_said(changed, message):
    inputs = {"pipeline": "demo", "dtype": "bfloat16", "budget": GIB_OF_15_MIB, "fits": "weights"} | SIZE | changed
    with pytest.raises(ValueError, match=message):
        AutoMapping.execute(**inputs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": " \n"}, "at least one scheme, one prompt"),
        ({"schemes": "nf4"}, "'nf4' is no part of a plan"),
        ({"schemes": "gguf/file"}, "gguf/file is a file|needs path"),
    ],
)
def test_what_cannot_be_measured_is_said(changed, message):
    inputs = {"pipeline": "demo", "dtype": "bfloat16", "prompts": "a lake", "seed": 0, "pictures": 1} | SIZE | changed
    with pytest.raises(ValueError, match=message):
        MeasureSensitivity.execute(**inputs)


def test_cancel_stops_the_measuring(monkeypatch):
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        MeasureSensitivity.execute("demo", "bfloat16", "a lake", **SIZE, seed=0, pictures=1, schemes="gguf/Q8_0")
