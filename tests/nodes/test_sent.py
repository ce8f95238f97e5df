"""What a prompt says and ComfyUI drops or lets pass, every node refuses before it does anything."""

from types import SimpleNamespace
from unittest.mock import Mock

import comfy_execution.utils
import pytest
from quant_pack.nodes import NODES, Generate, LoadQuantizedPipeline, OptimizePipeline, QuantConfig
from quant_pack.nodes.types import MADE_BY
from quant_pack.quant_core import QuantizedPipeline, SpecError

by_id = pytest.mark.parametrize("node", NODES, ids=lambda node: node.define_schema().node_id)
WIRES = [(node, wire.id) for node in NODES for wire in node.define_schema().inputs if wire.get_io_type() in MADE_BY]


@pytest.fixture
def send(monkeypatch):
    """Run a node in a prompt that says `sent`, with what ComfyUI makes of that as arguments."""

    def run(node, sent, **arguments):
        monkeypatch.setattr(node, "hidden", SimpleNamespace(prompt={"5": {"inputs": sent}}), raising=False)
        monkeypatch.setattr(comfy_execution.utils, "context", SimpleNamespace(node_id="5"))
        monkeypatch.setattr(
            "quant_pack.nodes.comfy_node.get_executing_context", comfy_execution.utils.get_executing_context
        )
        return node.execute(**arguments)

    return run


@by_id
def test_a_name_that_the_node_has_not_is_refused(send, node):
    with pytest.raises(SpecError, match=f"{node.define_schema().display_name} has no input 'no_such'; it takes: "):
        send(node, {"no_such": 1})


@by_id
def test_a_wire_to_a_name_that_the_node_has_not_is_refused(node):
    with pytest.raises(SpecError, match="has no input 'mappping'"):  # ComfyUI hands it over as it is
        node.execute(mappping=object())


@by_id
def test_what_the_node_has_is_no_surprise(node, send, monkeypatch):
    monkeypatch.setattr(node, "run", lambda **inputs: inputs)
    names = [given.id for given in node.define_schema().inputs if given.get_io_type() not in MADE_BY]
    assert send(node, dict.fromkeys(names), **dict.fromkeys(names)) == dict.fromkeys(names)


@pytest.mark.parametrize(
    ("node", "sent", "sentence"),
    [
        (Generate, {"negative_promt": "rain"}, "Generate has no input 'negative_promt' (did you mean 'negative_pro"),
        (LoadQuantizedPipeline, {"varient": "fp16"}, "has no input 'varient' (did you mean 'variant'?)"),
        (QuantConfig, {"backend": "torchao", "group_size": "32"}, "(did you mean 'backend.group_size'?)"),
        (QuantConfig, {"backend": "torchao", "backend.double_quant": True}, "has no input 'backend.double_quant'"),
        (QuantConfig, {"backend": "bnb", "backend.bits": 4}, "Unknown backend 'bnb'"),
        (QuantConfig, {"backend": ["4", 0]}, "backend is ['4', 0]; it takes a text, as 'bitsandbytes_4bit'."),
        (OptimizePipeline, {"compile": "blocks", "compile.depth": 3}, "has no input 'compile.depth'"),
        (OptimizePipeline, {"compile": "bloks"}, "compile has no 'bloks' (did you mean 'blocks'?)"),
    ],
)  # fmt: skip
def test_what_was_meant_is_said(send, node, sent, sentence):
    arguments = {"backend": {"backend": "torchao"}} if sent.get("backend") == "torchao" else {}
    arguments |= {"pipeline": Mock(QuantizedPipeline)} if node is OptimizePipeline else {}
    with pytest.raises(SpecError) as raised:
        send(node, sent, **arguments)
    assert sentence in str(raised.value) and len(str(raised.value)) <= 300


@pytest.mark.parametrize(("node", "name"), WIRES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", ["x", {}, 3, {"a": "b" * 500}])
def test_a_constant_where_a_wire_belongs_is_refused(node, name, value):
    with pytest.raises(SpecError, match=f"^{name} is .*; it takes a wire from ") as raised:
        node.execute(**{name: value})
    assert len(str(raised.value)) <= 300


@pytest.mark.parametrize("name", [[], {}, 3, "x" * 500])
def test_a_pipeline_s_name_that_is_no_name_is_refused(name):
    said = LoadQuantizedPipeline.validate_inputs(name)
    assert said.startswith("There is no diffusers pipeline ") and len(said) <= 300
