"""Saving that goes wrong loses nothing and leaves nothing; what comes along with the weights; foreign folders."""

import errno
import json
import shutil

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantError,
    SourceError,
    SpecError,
    StoreError,
    estimate,
    find_folder,
    load_pipeline,
    parse_plan,
    save_pipeline,
    writing,
)
from quant_core.__main__ import main

DEMO = find_folder("demo")


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


@pytest.fixture
def copy_of(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_folder_that_is_there_stays_as_it_is(pipeline, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("keep")
    with pytest.raises(SpecError, match="mine is there already; name a folder that is not"):
        save_pipeline(pipeline, tmp_path / "mine")
    with pytest.raises(SpecError, match="absent is not there; name a folder within one that is"):
        save_pipeline(pipeline, tmp_path / "absent/saved")
    assert (tmp_path / "mine/notes").read_text() == "keep" and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_leaves_nothing(pipeline, tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(StoreError, match="saved cannot be written .*No space left on device"):
        save_pipeline(pipeline, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_written(pipeline, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="takes .* MiB, and its disk has 1.00 MiB left"):
        save_pipeline(pipeline, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("at", [0.0, 0.01, 0.5, 0.9])
def test_a_save_that_is_cancelled_leaves_nothing(pipeline, tmp_path, at):
    def cancel(done, total, name):
        if done >= at * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        save_pipeline(pipeline, tmp_path / "saved", cancel)
    assert not list(tmp_path.iterdir())


def test_progress_is_told_of_every_component_up_to_the_end(pipeline, tmp_path):
    told = []
    save_pipeline(pipeline, tmp_path / "saved", lambda *progress: told.append(progress))
    assert [name for name in dict.fromkeys(name for _, _, name in told)] == list(pipeline.models)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert 0.95 * told[-1][1] <= told[-1][0] <= told[-1][1]


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
    assert "text_encoder: diffusers and transformers open a .gguf file by itself" in note
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


def test_a_default_leaves_what_is_quantized_and_says_so(saved, copy_of, tmp_path):
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
        from quant_core import footprint

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


def test_weights_that_other_code_changed_on_a_layer_are_saved_as_they_are(tmp_path):
    pipeline = load("demo", "transformer=torchao/int8wo")
    with torch.no_grad():
        pipeline.pipe.transformer.proj_out.bias.add_(1)
    expected = pipeline.pipe.transformer.proj_out.bias.clone()
    save_pipeline(pipeline, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").pipe.transformer.proj_out.bias, expected)
