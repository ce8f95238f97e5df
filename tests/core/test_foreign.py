"""Checkpoints of quantizers that no backend here has: read by their library, or refused before a weight is read."""

import importlib.util
import json
import shutil
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quant_core import (
    BackendUnavailable,
    DeviceUnsupported,
    LoadRequest,
    SourceError,
    SpecError,
    estimate,
    generate,
    inspect_layers,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    planning,
    requirements,
    save_pipeline,
)
from quant_core.headers import stored_bytes

from .simulated_device import Card, manage
from .small_requests import small

DEMO = Path(__file__).resolve().parents[2] / "demo_model/pipeline"
FOREIGN = ("auto-round", "kernels", "sdnq")
WAY = "load the checkpoint that it was made from."
NUNCHAKU = {
    "quant_method": "nunchaku_lite",
    "svdq_w4a4": {"precision": "int4", "group_size": 64, "rank": 32, "targets": ["proj_out"]},
}


def report(pipeline, name):
    return next(found for found in inspect_pipeline(pipeline) if found.name == name)


@pytest.fixture
def claiming(copy, edit):
    """A component and a quantization_config -> a folder whose component says that it is quantized so."""

    def make(component, config):
        folder = copy("sd3")
        edit(folder / component / "config.json", quantization_config=config)
        return folder

    return make


@pytest.fixture
def bare(monkeypatch):
    """A machine without a GPU and without the packages that only such checkpoints need."""
    is_met = requirements._is_met
    monkeypatch.setattr(requirements, "_is_met", lambda asked: asked.name not in FOREIGN and is_met(asked))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(folder, error):
    told = []
    with pytest.raises(error) as found:
        load_pipeline(LoadRequest(str(folder)), lambda *progress: told.append(progress))
    assert not told, "it began to read weights"
    return str(found.value)


@pytest.mark.parametrize("component", ["transformer", "text_encoder_3"])
@pytest.mark.parametrize(("method", "install"), [("sdnq", "sdnq"), ("auto-round", "auto-round>=0.13.0")])
def test_a_missing_package_is_named_with_its_install_line(bare, claiming, component, method, install):
    said = refused(claiming(component, {"quant_method": method}), BackendUnavailable)
    assert said == f"{component}'s checkpoint is quantized with {method}, which needs: pip install {install!r}"


def test_nunchaku_needs_a_gpu_and_then_its_package(bare, claiming, monkeypatch):
    folder = claiming("transformer", NUNCHAKU)
    what = "transformer's checkpoint is quantized with nunchaku_lite, which needs"
    assert refused(folder, DeviceUnsupported) == f"{what} an NVIDIA GPU; {WAY}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refused(folder, BackendUnavailable) == f"{what}: pip install 'kernels'"


def test_what_its_library_says_of_the_machine_is_said_before_weights_are_read(bare, claiming, monkeypatch):
    monkeypatch.setattr("quant_core.prequantized.ensure_packages", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("diffusers.quantizers.nunchaku.nunchaku_quantizer.is_kernels_available", lambda: True)
    said = refused(claiming("transformer", NUNCHAKU), SourceError)
    assert "Hopper" in said and said.endswith(f"; {WAY}") and said.count(". ") == 0 and "\n" not in said


def test_modelopt_keeps_its_layers_in_a_pickled_file(claiming):
    folder = claiming("transformer", {"quant_method": "modelopt", "quant_type": "FP8"})
    said = (
        "transformer's checkpoint is quantized with modelopt, which keeps its layers in modelopt_state.pth, a pickled "
        f"file that is not opened; {WAY}"
    )
    assert refused(folder, SourceError) == said
    with pytest.raises(SourceError) as error:
        estimate(LoadRequest(str(folder)), small("sd3"))
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("component", "library", "config"),
    [
        ("transformer", "diffusers", {"quant_method": "bfl"}),  # diffusers reads it from a single file only
        ("transformer", "diffusers", {"quant_method": "nobodys"}),
        ("text_encoder_3", "transformers", {"quant_method": "nobodys"}),
        ("text_encoder_3", "transformers", {}),
    ],
)
def test_what_its_library_does_not_read_is_refused(claiming, component, library, config):
    said = refused(claiming(component, config), SourceError)
    method = config.get("quant_method", "an unknown method")
    assert said.startswith(f"{component}'s checkpoint is quantized with {method}, which {library} ")
    assert said.endswith(f"); {WAY}") and "\n" not in said and len(said) < 350


def test_a_plan_is_told_of_both_ways_out_and_an_estimate_needs_no_package(bare, claiming):
    folder = claiming("transformer", {"quant_method": "sdnq"})
    with pytest.raises(SpecError) as error:
        load_pipeline(LoadRequest(str(folder), parse_plan("transformer=torchao/int8wo")))
    assert str(error.value) == (
        "transformer cannot be quantized as torchao/int8wo: its checkpoint is quantized already, with sdnq; "
        f"leave transformer out of the plan, or {WAY}"
    )
    parts = {part.name: part for part in estimate(LoadRequest(str(folder)), small("sd3")).components}
    assert parts["transformer"].quantization == "sdnq"


def test_layers_that_a_library_loads_without_their_scales_are_an_error(claiming, monkeypatch):
    folder = claiming("text_encoder_3", {"quant_method": "nobodys"})
    file = folder / "text_encoder_3/model.safetensors"
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    save_file(load_file(file) | {f"{layer}.scale": torch.ones(1)}, file, metadata={"format": "pt"})
    monkeypatch.setattr(planning, "ensure_readable", lambda *_, **__: None)
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(str(folder)))
    assert str(error.value) == (
        f"text_encoder_3: its checkpoint is quantized with nobodys, but {layer} was loaded as if it were not, without "
        f"{layer}.scale; {WAY}"
    )


class Packed(nn.Module):
    """A layer of a made-up library, whose weight has neither the name nor the shape of a Linear's."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.empty(linear.weight.shape[::-1], dtype=torch.int8))
        self.register_buffer("scales", torch.empty(linear.out_features, dtype=torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.t() * self.scales[:, None], self.bias)


@pytest.fixture
def made_up(tiny, tmp_path, edit, monkeypatch):
    """(folder of a pipeline whose transformer a made-up library quantized, one with the same weights unpacked)."""
    from diffusers.quantizers import auto
    from diffusers.quantizers.base import DiffusersQuantizer

    class Config:
        quant_method = Enum("Method", {"MADE_UP": "made-up"}, type=str).MADE_UP
        from_dict = classmethod(lambda cls, _: cls())
        to_dict = dict

    class Quantizer(DiffusersQuantizer):
        is_serializable = is_trainable = False

        def _process_model_before_weight_loading(self, model, **_):
            for name, layer in [*model.transformer_blocks.named_modules()]:
                if isinstance(layer, nn.Linear):
                    model.transformer_blocks.set_submodule(name, Packed(layer))

        def _process_model_after_weight_loading(self, model, **_):
            return model

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "made-up", Quantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "made-up", Config)
    folders = [shutil.copytree(tiny("sd3"), tmp_path / name) for name in ("packed", "plain")]
    files = [folder / "transformer/diffusion_pytorch_model.safetensors" for folder in folders]
    plain = load_file(files[1])
    packed = dict(plain)
    for name, weight in plain.items():
        if name.startswith("transformer_blocks.") and name.endswith(".weight") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            scales = (weight.float().abs().amax(1) / 127).bfloat16()
            values = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            del packed[name]
            packed |= {f"{layer}.qweight": values.t().contiguous(), f"{layer}.scales": scales}
            plain[name] = values * scales[:, None]
    for file, tensors in zip(files, (packed, plain), strict=True):
        save_file(tensors, file, metadata={"format": "pt"})
    edit(folders[0] / "transformer/config.json", quantization_config={"quant_method": "made-up"})
    return folders


def test_a_library_unknown_here_is_read_inspected_estimated_and_saved(made_up, tmp_path):
    packed, unpacked = (load_pipeline(LoadRequest(str(folder))) for folder in made_up)
    images = generate(packed, small("sd3"))
    assert torch.equal(images, generate(unpacked, small("sd3")))
    found, plain = report(packed, "transformer"), report(unpacked, "transformer")
    left_out = {name for name, part in packed.models["transformer"].named_modules() if isinstance(part, nn.Linear)}
    layers = sum(isinstance(part, Packed) for part in packed.models["transformer"].modules())
    assert layers and (found.is_quantized, found.method, found.formats) == (True, "made-up", {"int8": layers})
    assert left_out and found.left_out == dict.fromkeys(left_out, "not quantized by its checkpoint")
    assert (found.parameters, found.bytes_16bit) == (plain.parameters, plain.bytes_16bit)
    listed, whole = (
        {layer.name: layer for layer in inspect_layers(pipeline, errors=True) if layer.component == "transformer"}
        for pipeline in (packed, unpacked)
    )
    assert {name: layer.shape for name, layer in listed.items()} == {
        name: layer.shape for name, layer in whole.items()
    }
    assert {name for name, layer in listed.items() if not layer.is_quantized} == left_out
    for name, layer in listed.items():
        assert layer.bytes_16bit == whole[name].bytes_16bit and layer.error is None
        assert (layer.format == "int8") == (layer.footprint < layer.bytes_16bit) == layer.is_quantized
        assert ("quantized already" in layer.error_note) == layer.is_quantized
    stored = stored_bytes((made_up[0] / "transformer").glob("*.safetensors"))
    assert found.footprint == stored < plain.footprint
    parts = {part.name: part for part in estimate(LoadRequest(str(made_up[0])), small("sd3")).components}
    assert parts["transformer"].quantization == "made-up"
    assert parts["transformer"].streamed <= parts["transformer"].footprint == stored
    saved = {part.name: part for part in save_pipeline(packed, tmp_path / "saved")}
    assert (saved["transformer"].quantization, saved["transformer"].bytes) == ("made-up", stored)
    assert torch.equal(generate(load_pipeline(LoadRequest(str(tmp_path / "saved"))), small("sd3")), images)


@pytest.mark.skipif(importlib.util.find_spec("sdnq") is None, reason="sdnq is not installed")
@pytest.mark.parametrize("scheme", ["int8", "uint4"])
def test_sdnq_is_read_in_both_libraries(tmp_path, scheme):
    import diffusers
    import transformers
    from sdnq import SDNQConfig

    folder = shutil.copytree(DEMO, tmp_path / "pipeline")
    classes = {"transformer": diffusers.FluxTransformer2DModel, "text_encoder_2": transformers.T5EncoderModel}
    for name, cls in classes.items():
        config = SDNQConfig(weights_dtype=scheme)
        model = cls.from_pretrained(DEMO, subfolder=name, dtype=torch.bfloat16, quantization_config=config)
        shutil.rmtree(folder / name)
        model.save_pretrained(folder / name)
    pipeline, plain = (load_pipeline(LoadRequest(str(source))) for source in (folder, "demo"))
    request = small("demo")
    images = generate(pipeline, request)
    assert 0 < (images - generate(plain, request)).abs().mean() < 0.05
    for name in classes:
        found, full = report(pipeline, name), report(plain, name)
        assert (found.method, list(found.formats)) == ("sdnq", ["int8" if scheme == "int8" else "uint8"])
        assert found.parameters == full.parameters and found.footprint < full.footprint
        linear = sum(isinstance(part, nn.Linear) for part in plain.models[name].modules())
        assert found.left_out and sum(found.formats.values()) == linear - len(found.left_out)
        assert json.loads((folder / name / "config.json").read_text())["quantization_config"]["quant_method"] == "sdnq"
    save_pipeline(pipeline, tmp_path / "saved")
    again = load_pipeline(LoadRequest(str(tmp_path / "saved")))
    manage(again, Card(0.4))
    assert torch.equal(generate(again, request), images)
