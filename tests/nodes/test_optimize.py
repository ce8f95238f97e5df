"""Optimize Pipeline: what its widgets say, and that the pipeline that goes in stays as it is."""

import json
import logging

import pytest
import torch
from quant_pack.nodes import Generate, InspectQuant, LoadQuantizedPipeline, OptimizePipeline, QuantMapping
from quant_pack.quant_core import Optimization, SpecError, compiled_forward, parse_optimization, ways

PARTS = ("compile", "attention", "cache", "offload")
SMALL = {"prompt": "a lake", "width": 32, "height": 32, "steps": 4, "guidance": -1.0, "seed": 7}


@pytest.fixture
def pipeline(monkeypatch):
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    return LoadQuantizedPipeline.execute("demo", "bfloat16")[0]


def choice(part, way):
    """What the frontend sends for a way whose widgets nobody touched."""
    combo = next(widget for widget in OptimizePipeline.define_schema().inputs if widget.id == part)
    option = next(option for option in combo.settings["options"] if option.key == way)
    return {part: way, **{widget.id: widget.settings.get("default") for widget in option.inputs}}


@pytest.mark.parametrize(("part", "way"), [(part, way.name) for part in PARTS for way in ways(part)])
def test_untouched_widgets_give_the_defaults(part, way):
    from quant_pack.nodes.widgets import setting_of

    assert setting_of(part, choice(part, way)) == getattr(parse_optimization(**{part: way}), part)


def test_a_new_node_compiles_and_nothing_more():
    combos = [widget for widget in OptimizePipeline.define_schema().inputs if widget.id in PARTS]
    first = {combo.id: combo.settings["options"][0].key for combo in combos}
    assert first == {"compile": "auto", "attention": "off", "cache": "off", "offload": "managed"}
    assert all(combo.settings["optional"] for combo in combos)


def test_without_any_input_nothing_changes(pipeline):
    handle = OptimizePipeline.execute(pipeline)[0]
    assert handle.optimization == Optimization()
    assert torch.equal(Generate.execute(handle, **SMALL)[0], Generate.execute(pipeline, **SMALL)[0])


def test_the_pipeline_that_goes_in_stays_as_it_is(pipeline, caplog):
    caplog.set_level(logging.INFO)
    plain = Generate.execute(pipeline, **SMALL)[0]
    cache = {"cache": "first_block", "threshold": 9.0}
    handle = OptimizePipeline.execute(pipeline, compile={"compile": "auto"}, cache=cache)[0]
    fast = Generate.execute(handle, **SMALL)[0]
    assert not torch.equal(fast, plain)
    assert "Generate: compile auto: " in caplog.text and "first_block: 3 of 4 passes reused." in caplog.text
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], plain)
    table, data = InspectQuant.execute(handle, after=fast, errors=False)[:2]
    assert "first_block: 3 of 4 passes reused" in table
    found = json.loads(data)
    assert found["optimization"] == {"compile": "auto", "cache": "first_block,threshold=9.0"}
    assert found["runs"]["cache"]["reused"] == 3
    assert "runs" in json.loads(InspectQuant.execute(pipeline, errors=False)[1])


def test_the_pipeline_lives_as_long_as_a_handle_on_it(pipeline):
    plain = Generate.execute(pipeline, **SMALL)[0]
    handle = OptimizePipeline.execute(pipeline, offload={"offload": "model"})[0]
    another = OptimizePipeline.execute(handle, compile={"compile": "auto"})[0]
    del pipeline
    assert torch.equal(Generate.execute(handle, **SMALL)[0], plain)
    assert str(another.optimization) == "compile auto; offload model"
    assert torch.equal(Generate.execute(another, **SMALL)[0], plain)
    del handle
    assert torch.equal(Generate.execute(another, **SMALL)[0], plain)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"compile": {"compile": "bloks"}}, "compile has no 'bloks' (did you mean 'blocks'?)"),
        ({"compile": {"compile": "blocks", "mode": "fast"}}, "mode is 'fast'; use one of: default, reduce-overhead"),
        ({"cache": {"cache": "first_block", "threshold": -1.0}}, "threshold is -1.0; it must be at least 0.0."),
        ({"offload": {"offload": "sequential"}}, "offload is sequential, which takes 14 times as long as none"),
        ({"attention": {"attention": "sage_hub"}}, "attention sage_hub would download a kernel from the hub"),
    ],
)
def test_a_wrong_choice_is_told_so_in_its_own_node(pipeline, choices, message):
    with pytest.raises(SpecError) as raised:
        OptimizePipeline.execute(pipeline, **choices)
    assert message in str(raised.value)


def test_a_quantized_pipeline_is_refused_what_its_layers_cannot_do():
    pipeline = LoadQuantizedPipeline.execute(
        "demo", "bfloat16", QuantMapping.execute(text="transformer=quanto/float8")[0]
    )[0]
    with pytest.raises(SpecError, match="diffusers moves no quanto tensors in groups; use managed"):
        OptimizePipeline.execute(pipeline, offload={"offload": "group"})
