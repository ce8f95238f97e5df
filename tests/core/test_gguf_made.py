"""gguf/Q8_0 and its like: a file made once from the 16-bit weights, kept in the cache and trusted only if whole."""

import os

import gguf
import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, generate, inspect_pipeline, load_pipeline, parse_plan, reading

REQUEST = GenerateRequest("a cat", width=16, height=16, steps=2)


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def load(tiny, tmp_path):
    def loaded(plan="transformer=gguf/Q8_0", **settings):
        settings = {"source": str(tiny("sd3")), "store": tmp_path / "cache"} | settings
        return load_pipeline(LoadRequest(plan=parse_plan(plan), **settings))

    return loaded


@pytest.fixture
def files(tmp_path):
    return lambda: sorted(path for path in (tmp_path / "cache").glob("*/*.gguf") if "." not in path.parent.name)


def test_a_made_file_is_used_again(load, files, monkeypatch):
    first = generate(load(), REQUEST)
    (file,) = files()
    assert file.parent.name.startswith("SD3Transformer2DModel-gguf-Q8_0-")
    os.utime(file, (1, 1))
    read = []
    real = reading.read_weights
    monkeypatch.setattr(reading, "read_weights", lambda info, *rest: read.append(info.name) or real(info, *rest))
    assert torch.equal(generate(load(), REQUEST), first)
    assert files() == [file] and file.stat().st_mtime == 1
    assert "transformer" not in read and "vae" in read


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("transformer=gguf/Q4_0", {}),
        ("transformer=gguf/Q8_0?skip=proj_out", {}),
        ("transformer=gguf/Q8_0", {"dtype": "float16"}),
        ("text_encoder_3=gguf/Q8_0", {}),
    ],
)
def test_another_plan_makes_another_file(load, files, plan, settings):
    load()
    (first,) = files()
    load(plan, **settings)
    assert len(files()) == 2 and first in files()


def test_changed_weights_make_another_file(load, files, copy, edit):
    model = copy("sd3")
    load(source=str(model))
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x12\x3f")
    load(source=str(model))
    assert len(files()) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "text"])
def test_a_damaged_file_is_made_again(load, files, damage):
    first = generate(load(), REQUEST)
    (file,) = files()
    whole = file.read_bytes()
    spoiled = {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": os.urandom(4096), "text": b"version 1\n"}
    file.write_bytes(spoiled[damage])
    assert torch.equal(generate(load(), REQUEST), first)
    assert files() == [file] and file.read_bytes() == whole, "the file is the same whenever it is made"


def test_a_stopped_load_leaves_no_half_file(load, files, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.quants, "quantize", stop)
    monkeypatch.setattr("quant_core.planning.ensure_runs", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert files() == []


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_3", "vae"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_made_file_holds_every_weight_of_the_component(load, files, component, dtype):
    pipeline = load(f"{component}=gguf/Q8_0", dtype=dtype)
    (file,) = files()
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    module = getattr(pipeline.pipe, component)
    assert {name for name, _ in module.named_parameters()} <= names
    assert generate(pipeline, REQUEST).isfinite().all()
    report = {report.name: report for report in inspect_pipeline(pipeline)}[component]
    assert set(report.formats) == {"Q8_0"} and report.device == "cpu"
