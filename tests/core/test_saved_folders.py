"""What is in a saved folder, and what of it is refused when it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantError,
    SourceError,
    SpecError,
    estimate,
    find_folder,
    footprint,
    load_pipeline,
    parse_plan,
    save_pipeline,
)
from quant_core.__main__ import main

DEMO = find_folder("demo")
ROOT = Path(__file__).resolve().parents[2]


def load(source, plan="none", **settings):
    return load_pipeline(LoadRequest(str(source), parse_plan(plan), **settings))


@pytest.fixture(scope="module")
def pipeline():
    return load("demo", "transformer=torchao/int8wo,text_encoder=gguf/Q8_0,text_encoder_2=bitsandbytes_4bit/nf4")


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "small"
    save_pipeline(pipeline, folder)
    return folder


def test_license_card_and_tokenizers_come_along_and_code_and_pickles_do_not(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "source")
    texts = {"README.md": "---\nlicense: apache-2.0\n---\n# A card", "LICENSE": "its terms", "NOTICE.txt": "too"}
    for name, text in texts.items():
        (source / name).write_text(text)
    for name in ("pipeline.py", "old.ckpt", "one_file.safetensors", "transformer/model.bin", "transformer/x.pt"):
        (source / name).write_bytes(b"no")
    save_pipeline(load(source, "transformer=torchao/int8wo"), tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_text() for name in texts} == texts
    made = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    had = {str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file()}
    assert made == had | set(texts) | {"QUANTIZATION.md"}
    note = (tmp_path / "saved/QUANTIZATION.md").read_text()
    assert "| transformer | torchao/int8wo |" in note and "FluxPipeline.from_pretrained(" in note
    assert str(tmp_path) not in note + "".join(path.read_text() for path in (tmp_path / "saved").rglob("*.json"))


def test_the_note_names_who_cannot_open_it(saved):
    note = (saved / "QUANTIZATION.md").read_text()
    assert "text_encoder: transformers would unpack a .gguf file" in note
    assert "text_encoder_2: 2 layers (wo) are written dequantized" in note
    assert "from_pretrained" not in note


@pytest.mark.parametrize(
    ("plan", "method"),
    [
        ("transformer=torchao/fp8wo", "torchao"),
        ("text_encoder=quanto/int8", "gguf"),
        ("text_encoder_2=bitsandbytes_8bit/int8", "bitsandbytes"),
    ],
)
def test_a_plan_that_contradicts_the_folder_is_told_the_two_ways_out(saved, plan, method):
    with pytest.raises(SpecError) as error:
        load(saved, plan)
    name, _, scheme = plan.partition("=")
    assert str(error.value) == (
        f"{name} cannot be quantized as {scheme}: its checkpoint is quantized already, with {method}; "
        f"leave {name} out of the plan, or load the checkpoint that it was made from."
    )


def test_a_default_leaves_what_is_quantized_and_says_so(saved, tmp_path):
    with pytest.raises(SpecError, match="would quantize nothing .*; leave the plan out"):
        load(saved, "torchao/int8wo")
    half = tmp_path / "half"
    save_pipeline(load("demo", "text_encoder=gguf/Q8_0"), half)
    pipeline = load(half, "torchao/int8wo")
    assert {name: str(spec) for name, spec in pipeline.specs.items()} == {
        "text_encoder": "gguf/file",
        "text_encoder_2": "torchao/int8wo",
        "transformer": "torchao/int8wo",
    }
    assert pipeline.notes == {"text_encoder": "stays as it is: its checkpoint is quantized already, with gguf"}


def test_the_estimate_of_a_saved_pipeline_is_of_its_bytes(pipeline, saved):
    request = GenerateRequest("a lake", width=128, height=128, steps=2)
    found = {part.name: part for part in estimate(LoadRequest(str(saved)), request).components}
    again = load(saved)
    for name, model in again.models.items():
        assert found[name].footprint == pytest.approx(footprint(model), rel=0.01), name


@pytest.mark.parametrize("damage", ["renamed", "lacking", "no_state", "config"])
def test_a_damaged_folder_gets_a_sentence(tmp_path, damage, edit):
    from quant_core.container import read_tensors, write_tensors

    save_pipeline(load("demo", "transformer=bitsandbytes_4bit/nf4"), tmp_path / "saved")
    (file,) = (tmp_path / "saved/transformer").glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file)[0].items()}
    name = "transformer_blocks.0.attn.to_q.weight"
    if damage == "renamed":
        tensors["transformer_blocks.7.attn.to_q.bias"] = tensors.pop("transformer_blocks.0.attn.to_q.bias")
    elif damage == "lacking":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    elif damage == "no_state":
        del tensors[f"{name}.absmax"]
    else:
        config = json.loads((tmp_path / "saved/transformer/config.json").read_text())["quantization_config"]
        edit(tmp_path / "saved/transformer/config.json", quantization_config=config | {"bnb_4bit_quant_type": "nf5"})
    write_tensors(file, tensors, {})
    with pytest.raises(SourceError if damage != "config" else QuantError) as error:
        load(tmp_path / "saved")
    assert "transformer" in str(error.value) or "nf5" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command(tmp_path, capsys):
    arguments = ["save", "demo", "--plan", "transformer=torchao/int8wo", "--out", str(tmp_path / "saved"), "--json"]
    assert main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["folder"] == str(tmp_path / "saved")
    assert {part["name"]: part["quantization"] for part in data["components"]}["transformer"] == "torchao/int8wo"
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert "54 Int8Tensor" in capsys.readouterr().out
    assert main([*arguments[:4], "--out", str(tmp_path / "more")]) == 0
    assert "plain diffusers opens it, too" in capsys.readouterr().out


def test_weights_that_other_code_changed_are_saved_as_they_are(tmp_path):
    pipeline = load("demo", "transformer=torchao/int8wo")
    places = ("transformer", "proj_out"), ("vae", "decoder.conv_in"), ("text_encoder", "text_model.final_layer_norm")
    expected = []
    for name, path in places:
        bias = getattr(pipeline.pipe, name).get_submodule(path.removeprefix("text_model.")).bias
        with torch.no_grad():
            bias.add_(1)
        expected.append(bias.clone())
    save_pipeline(pipeline, tmp_path / "saved")
    again = load(tmp_path / "saved").pipe
    for (name, path), bias in zip(places, expected, strict=True):
        assert torch.equal(getattr(again, name).get_submodule(path.removeprefix("text_model.")).bias, bias)


@pytest.mark.parametrize("scheme", ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "quanto/int8"])
@pytest.mark.parametrize("name", ["proj_out.bias", "norm_out.linear.bias", "foreign.weight"])
def test_a_weight_of_another_shape_or_name_is_refused(tmp_path, scheme, name):
    from quant_core.container import read_tensors, write_tensors

    save_pipeline(load("demo", f"transformer={scheme}"), tmp_path / "saved")
    (file,) = (tmp_path / "saved/transformer").glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file)[0].items()}
    tensors[name] = torch.zeros(1, dtype=torch.bfloat16)
    write_tensors(file, tensors, {})
    with pytest.raises(SourceError, match="transformer: .*(takes|no such weight)"):
        load(tmp_path / "saved")


def test_quanto_weights_of_another_dtype_are_told_at_load(tmp_path):
    save_pipeline(load("demo", "text_encoder_2=quanto/int4", dtype="float16"), tmp_path / "saved")
    with pytest.raises(SourceError, match="made for float16 and not for bfloat16; load it in float16"):
        load(tmp_path / "saved")
    assert load(tmp_path / "saved", dtype="float16").models


def test_what_is_near_the_model_but_not_of_it_stays(tmp_path):
    source = shutil.copytree(DEMO, tmp_path / "source")
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0123").write_text("the hub's cache links here")
    (source / "notes.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.txt").write_text("mine")
    (source / "README.md").symlink_to(tmp_path / "blobs/0123")
    (source / "LICENSE.pdf").write_bytes(b"terms")
    save_pipeline(load(source), tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "the hub's cache links here"
    assert (tmp_path / "saved/LICENSE.pdf").exists() and not (tmp_path / "saved/notes.txt").exists()
