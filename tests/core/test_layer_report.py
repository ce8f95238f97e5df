"""Each linear layer: how it is stored, and the error that quantizing it made."""

import json
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch

from quant_core import (
    LoadRequest,
    backends,
    format_layers,
    generate,
    inspect_layers,
    inspect_pipeline,
    layer_data,
    load_pipeline,
    parse_plan,
    save_pipeline,
)
from quant_core.__main__ import main
from quant_core.layer_report import ROWS, SEED

from .simulated_device import Card, manage
from .small_requests import load, small

ROOT = Path(__file__).resolve().parents[2]
THREE = "transformer=torchao/int8wo?skip=proj_out|norm_out,text_encoder_2=bitsandbytes_4bit/nf4,text_encoder=gguf/Q8_0"
EACH = [
    f"{name}/{scheme.name}"
    for name, backend in backends().items()
    for scheme in backend.schemes
    if "cpu" in scheme.devices and scheme.name != "file"
]


def errors(pipeline, component):
    found = [layer for layer in inspect_layers(pipeline, errors=True) if layer.component == component]
    assert not [layer.error_note for layer in found if layer.error_note]
    return [layer.error for layer in found if layer.is_quantized]


@pytest.fixture(scope="module")
def three():
    return load_pipeline(LoadRequest("demo", parse_plan(THREE)))


def test_every_linear_layer_is_listed_as_it_is_stored(three):
    plain = load_pipeline(LoadRequest("demo"))
    found = inspect_layers(three)
    for report in inspect_pipeline(three):
        layers = [layer for layer in found if layer.component == report.name]
        linear = {
            name: part for name, part in plain.models[report.name].named_modules() if isinstance(part, torch.nn.Linear)
        }
        assert [(layer.name, layer.shape) for layer in layers] == [
            (name, tuple(part.weight.shape)) for name, part in linear.items()
        ]
        for layer in layers:
            numbers = sum(tensor.numel() for tensor in linear[layer.name].parameters())
            assert layer.bytes_16bit == 2 * numbers
            assert layer.footprint < 0.6 * layer.bytes_16bit if layer.is_quantized else layer.footprint == 2 * numbers
        assert {layer.name: layer.left_out for layer in layers if layer.left_out} == report.left_out
        counts = {name: sum(layer.format == name for layer in layers) for name in report.formats}
        assert counts == report.formats
        assert {layer.format for layer in layers if not layer.is_quantized} <= {"bfloat16"}
    assert {layer.error for layer in found} == {None} and {layer.error_note for layer in found} == {""}


def test_the_error_is_that_of_the_outputs_for_normal_inputs(three):
    plain = load_pipeline(LoadRequest("demo"))
    measured = [layer for layer in inspect_layers(three, errors=True) if layer.is_quantized]
    assert len(measured) == 12 + 14 + 52
    for layer in measured[::9]:
        made = three.models[layer.component].get_submodule(layer.name)
        original = plain.models[layer.component].get_submodule(layer.name)
        torch.manual_seed(SEED)
        inputs = torch.randn(ROWS, layer.shape[1]).bfloat16()
        with torch.no_grad():
            expected, found = original(inputs).double(), made(inputs).double()
        by_hand = (found - expected).square().sum().sqrt() / expected.square().sum().sqrt()
        assert layer.error == pytest.approx(by_hand.item(), rel=1e-3), layer.name


@pytest.mark.parametrize("scheme", EACH)
def test_every_backend_s_layers_are_measured(tiny, scheme):
    found = errors(load(tiny, "sd3", f"transformer={scheme}"), "transformer")
    assert found and all(0 < error < 0.8 for error in found)


def test_fewer_bits_are_a_larger_error():
    order = ["gguf/Q8_0", "torchao/int8wo", "quanto/float8", "gguf/Q5_0", "bitsandbytes_4bit/nf4"]
    order += ["bitsandbytes_4bit/fp4", "quanto/int2"]
    found = [median(errors(load(None, "demo", f"transformer={scheme}"), "transformer")) for scheme in order]
    assert found == sorted(found)
    assert 0.005 < found[1] < 0.012 and 0.07 < found[4] < 0.12


@pytest.mark.parametrize("name", ["sd", "zimage", "wan"])
def test_checkpoints_of_each_library_are_found_by_the_names_of_the_layers(tiny, name):
    found = inspect_layers(load(tiny, name, "torchao/int8wo"), errors=True)
    quantized = [layer for layer in found if layer.is_quantized]
    assert {layer.component for layer in quantized} >= {"text_encoder"}
    assert all(layer.error is not None and layer.error < 0.05 for layer in quantized)


def test_a_checkpoint_in_another_dtype_than_the_pipeline_s(tiny):
    pipeline = load_pipeline(LoadRequest(str(tiny("zimage")), parse_plan("gguf/Q8_0"), dtype="float32"))
    found = [layer.error for layer in inspect_layers(pipeline, errors=True) if layer.is_quantized]
    assert found and max(found) < 0.01


def test_what_was_quantized_on_disk_has_no_error_but_a_reason(tmp_path, made, three):
    save_pipeline(three, tmp_path / "saved")
    for layer in inspect_layers(load_pipeline(LoadRequest(str(tmp_path / "saved"))), errors=True):
        assert layer.error is None
        assert ("its checkpoint is quantized already" in layer.error_note) == layer.is_quantized
    file = made("transformer")[1]
    pipeline = load_pipeline(LoadRequest("demo", parse_plan(f"transformer=gguf/file?path={file}")))
    for layer in inspect_layers(pipeline, errors=True):
        assert layer.error is None
        assert ("it comes from a file that is quantized already" in layer.error_note) == layer.is_quantized


def test_a_checkpoint_that_went_since_is_a_reason_and_no_failure(tmp_path):
    shutil.copytree(ROOT / "demo_model/pipeline", tmp_path / "demo")
    pipeline = load_pipeline(LoadRequest(str(tmp_path / "demo"), parse_plan("torchao/int8wo")))
    (weights,) = (tmp_path / "demo/transformer").glob("*.safetensors")
    weights.unlink()
    found = layer_data(inspect_layers(pipeline, errors=True))
    assert all(layer["error"] for layer in found["text_encoder"])
    for layer in found["transformer"]:
        assert layer["error"] is None and layer["error_note"].startswith("its 16-bit weights cannot be read: ")


def test_a_layer_that_does_not_run_is_told_and_out_of_memory_is_raised(three, monkeypatch):
    three.errors.clear()
    layer = three.models["transformer"].x_embedder
    monkeypatch.setattr(layer, "forward", lambda inputs: torch.empty(2, 3, 4) @ inputs, raising=False)
    found = {layer.name: layer for layer in inspect_layers(three, errors=True) if layer.component == "transformer"}
    assert found["x_embedder"].error is None and found["x_embedder"].error_note.startswith("it does not run on cpu: ")
    assert found["context_embedder"].error
    monkeypatch.setattr(layer, "forward", lambda inputs: inputs.new_full((ROWS, 256), float("nan")))
    found = {layer.name: layer for layer in inspect_layers(three, errors=True) if layer.component == "transformer"}
    assert found["x_embedder"].error is None and found["x_embedder"].error_note == "its outputs are not finite"

    def full(inputs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(layer, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        inspect_layers(three, errors=True)


def test_progress_counts_the_layers_and_may_stop():
    pipeline = load_pipeline(LoadRequest("demo", parse_plan("torchao/int8wo")))
    before = generate(pipeline, small("demo"))
    told = []
    inspect_layers(pipeline, errors=True, on_progress=lambda *given: told.append(given))
    assert [done for done, _, _ in told] == list(range(81)) and {total for _, total, _ in told} == {80}
    assert told[0][2] == "text_encoder.encoder.layers.0.self_attn.k_proj" and told[-1][2] == ""

    class Cancelled(BaseException):
        pass

    def cancel(done, total, label):
        told.append(label)
        if done == 30:
            raise Cancelled

    told.clear()
    pipeline.errors.clear()
    with pytest.raises(Cancelled):
        inspect_layers(pipeline, errors=True, on_progress=cancel)
    assert len(told) == 31
    assert torch.equal(generate(pipeline, small("demo")), before)


def test_errors_are_measured_once_and_read_no_checkpoint_again(monkeypatch):
    pipeline = load_pipeline(LoadRequest("demo", parse_plan("transformer=torchao/int8wo")))
    told = []
    first = inspect_layers(pipeline, errors=True, on_progress=lambda *given: told.append(given))
    monkeypatch.setattr("quant_core.layer_report.read_mapped", None)
    assert inspect_layers(pipeline, errors=True, on_progress=lambda *given: told.append(given)) == first
    assert len(told) == 55 and {layer.error for layer in inspect_layers(pipeline)} == {None}
    del pipeline.errors["transformer", "proj_out"]
    again = inspect_layers(pipeline, errors=True)
    assert [layer.name for layer in again if layer.error_note] == ["proj_out"], "only that one is measured"


@pytest.mark.parametrize("scheme", ["torchao/int8wo", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0"])
@pytest.mark.parametrize("part", [1.0, 0])
def test_under_a_host_layers_are_measured_where_they_are(scheme, part):
    alone = [layer.error for layer in inspect_layers(load(None, "demo", scheme), errors=True)]
    pipeline, card = load(None, "demo", scheme), Card(part)
    before = generate(pipeline, small("demo"))
    used = manage(pipeline, card)
    assert [layer.error for layer in inspect_layers(pipeline, errors=True)] == alone
    assert not used and not card.copied, "nothing is brought to the device"
    assert torch.equal(generate(pipeline, small("demo")), before)
    used.clear()
    pipeline.errors.clear()
    copied, held = card.copied, card.used
    assert [layer.error for layer in inspect_layers(pipeline, errors=True)] == alone
    assert not used and (card.copied, card.used) == (copied, held)
    pipeline.memory.forget()
    assert torch.equal(generate(pipeline, small("demo")), before)


def test_the_table_and_the_command(tmp_path, capsys, three):
    layers = inspect_layers(three, errors=True)
    lines = format_layers(layers).splitlines()
    assert len(lines) == 2 + len(layers)
    (line,) = (line for line in lines if line.startswith("transformer ") and " context_embedder " in line)
    assert "256 x 256" in line and "Int8Tensor" in line and line.endswith("0.68%")
    assert [line for line in lines if line.endswith("skipped by the plan")]
    out = tmp_path / "out"
    assert main(["inspect", "demo", "--plan", THREE, "--layers", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"] == json.loads(json.dumps(layer_data(layers)))
    assert {path.name for path in out.iterdir()} == {"inspection.png", "inspection-dark.png", "inspection.json"}
    written = json.loads((out / "inspection.json").read_text())
    assert written["layers"] == printed["layers"] and written["peak"]["resident"] > written["footprint"]
    assert main(["inspect", "demo", "--plan", THREE, "--layers"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(lines[-1])
    assert main(["inspect", "demo", "--out", str(tmp_path / "not/there")]) == 2
    assert "name a folder" in capsys.readouterr().err
