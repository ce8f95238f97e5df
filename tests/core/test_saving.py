"""Saved pipelines are what they were: for us, for plain diffusers, in bits, census and bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    find_folder,
    generate,
    get_backend,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    save_pipeline,
    writing,
)
from quant_core.headers import stored_dtypes
from quant_core.inspection import footprint

ROOT = Path(__file__).resolve().parents[2]
REQUEST = GenerateRequest("a cat", width=16, height=16, steps=2)
SMALL = GenerateRequest("a lake at noon", width=128, height=128, steps=2, seed=3, max_sequence_length=48)
BOTH = [  # that both libraries read
    *("torchao/int8wo", "torchao/int8dq", "torchao/fp8wo", "torchao/nvfp4wo"),
    *("bitsandbytes_4bit/nf4", "bitsandbytes_4bit/fp4?double_quant=true&compute_dtype=float32"),
    *("bitsandbytes_4bit/nf4?quant_storage=bfloat16", "bitsandbytes_8bit/int8?threshold=4.0"),
]
QUANTO = [f"quanto/{scheme}" for scheme in ("int8", "int4", "int2", "float8")]
GGUF = ["gguf/Q8_0", "gguf/Q4_0"]


def load(source, plan="none", **settings):
    return load_pipeline(LoadRequest(str(source), parse_plan(plan), **settings))


def census(pipeline):
    return {
        report.name: (report.formats, report.footprint, report.parameters, set(report.left_out))
        for report in inspect_pipeline(pipeline)
    }


def with_plain_components(pipeline, folder):
    """The pipeline, with the components that plain diffusers reads from a folder."""
    import diffusers

    plain = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for name in pipeline.models:
        part = getattr(plain, name)
        for module in part.modules():  # the kernel that rounds scales; see bitsandbytes_4bit.settle
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        pipeline.pipe.register_modules(**{name: part})
    return pipeline


@pytest.fixture
def bitsandbytes_without_gpu(monkeypatch):
    """diffusers asks for a GPU, which bitsandbytes itself no longer needs."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(getattr(bnb_quantizer, name), "update_device_map", lambda *_: {"": "cpu"})


@pytest.mark.parametrize("scheme", [*BOTH, *QUANTO, *GGUF])
def test_a_saved_pipeline_loads_without_a_plan_and_is_what_it_was(tiny, tmp_path, scheme):
    skip = "&" if "?" in scheme else "?"
    plan = f"transformer={scheme}{skip}skip=none,text_encoder={scheme},text_encoder_3={scheme}{skip}skip=**.wo"
    pipeline = load(tiny("sd3"), plan)
    saved = {part.name: part for part in save_pipeline(pipeline, tmp_path / "saved")}
    again = load(tmp_path / "saved")
    assert census(again) == census(pipeline)
    for name, part in saved.items():  # beside the weights: a gguf file's header, names of 8 bit, quant states of 4 bit
        extra = part.bytes - footprint(again.models[name])
        assert (extra == 0) if scheme in (*BOTH[:4], *QUANTO) else 0 <= extra < 80_000, name
        files = [*(tmp_path / "saved" / name).glob("*.safetensors"), *(tmp_path / "saved" / name).glob("*.gguf")]
        assert part.bytes <= sum(file.stat().st_size for file in files)
    assert torch.equal(generate(again, REQUEST), generate(pipeline, REQUEST))


@pytest.mark.parametrize("scheme", BOTH)
def test_plain_diffusers_makes_the_same_image_of_it(tiny, tmp_path, scheme, bitsandbytes_without_gpu):
    skip = "&" if "?" in scheme else "?"
    plan = f"transformer={scheme}{skip}skip=none,text_encoder={scheme},text_encoder_3={scheme}{skip}skip=**.wo"
    pipeline = load(tiny("sd3"), plan)
    saved = save_pipeline(pipeline, tmp_path / "saved")
    wants_gpu = ["transformer"] if scheme.startswith("bitsandbytes") else []
    assert [part.name for part in saved if part.note] == wants_gpu and not any(part.obstacle for part in saved)
    before = census(pipeline)
    expected = generate(pipeline, REQUEST)
    plain = with_plain_components(pipeline, tmp_path / "saved")
    assert {name: found[:2] for name, found in census(plain).items()} == {
        name: found[:2] for name, found in before.items()
    }
    if scheme == "torchao/nvfp4wo":  # whose inputs plain diffusers leaves with gaps, which round otherwise
        assert 0 < (generate(plain, REQUEST) - expected).abs().max() < 0.02
        for model in plain.models.values():
            get_backend("torchao").settle(model)
    assert torch.equal(generate(plain, REQUEST), expected)


@pytest.mark.parametrize("scheme", QUANTO)
def test_plain_diffusers_reads_a_denoiser_of_quanto_and_refuses_the_encoder(tiny, tmp_path, scheme):
    pipeline = load(tiny("sd3"), f"transformer={scheme}?skip=none")
    save_pipeline(pipeline, tmp_path / "saved")
    expected = generate(pipeline, REQUEST)
    assert torch.equal(generate(with_plain_components(pipeline, tmp_path / "saved"), REQUEST), expected)
    (part,) = (
        part
        for part in save_pipeline(load(tiny("sd3"), f"text_encoder_3={scheme}"), tmp_path / "encoder")
        if part.obstacle
    )
    assert (part.name, part.obstacle) == ("text_encoder_3", "transformers reads no quanto checkpoint")
    with pytest.raises(OSError, match="no file named model.safetensors"):  # and not random weights
        with_plain_components(pipeline, tmp_path / "encoder")


def test_plain_diffusers_reads_the_gguf_file_of_a_denoiser(tmp_path):
    import diffusers

    pipeline = load("demo", "transformer=gguf/Q8_0")
    save_pipeline(pipeline, tmp_path / "saved")
    expected = generate(pipeline, SMALL)
    folder = tmp_path / "saved/transformer"
    transformer = diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "weights.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    plain = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "saved", transformer=transformer, torch_dtype=torch.bfloat16
    )
    pipeline.pipe.register_modules(transformer=plain.transformer)
    assert torch.equal(generate(pipeline, SMALL), expected)


OURS = """
import sys, torch
from tests.core.test_saving import SMALL, load
from quant_core import generate
torch.save(generate(load(sys.argv[1]), SMALL), sys.argv[2])
"""
PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
for part in (pipe.text_encoder, pipe.text_encoder_2):
    for module in part.modules():  # the kernel that rounds scales
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
pictures = pipe("a lake at noon", width=128, height=128, num_inference_steps=2, max_sequence_length=48,
                generator=torch.Generator("cpu").manual_seed(3), output_type="pt").images
torch.save(pictures.permute(0, 2, 3, 1).float().clamp(0, 1), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("plan", "codes"),
    [
        ("transformer=torchao/int8wo,text_encoder=torchao/fp8wo,text_encoder_2=bitsandbytes_4bit/nf4", [OURS, PLAIN]),
        ("transformer=quanto/float8,text_encoder=bitsandbytes_8bit/int8", [OURS, PLAIN]),
        ("transformer=bitsandbytes_4bit/nf4,text_encoder=gguf/Q8_0,text_encoder_2=quanto/int4", [OURS]),
        ("transformer=gguf/Q4_0,text_encoder=quanto/int8,text_encoder_2=torchao/nvfp4wo", [OURS]),
        ("transformer=bitsandbytes_8bit/int8,text_encoder_2=gguf/Q8_0", [OURS]),
    ],
)
def test_processes_of_their_own_make_the_same_picture_of_it(tmp_path, plan, codes):
    pipeline = load("demo", plan)
    save_pipeline(pipeline, tmp_path / "saved")
    expected = generate(pipeline, SMALL)
    for code in codes:
        command = [sys.executable, "-c", code, tmp_path / "saved", tmp_path / "found.pt"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-500:]
        assert torch.equal(torch.load(tmp_path / "found.pt"), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["proj_out"]},
        {"load_in_8bit": True},
    ],
    ids=str,
)
def test_what_diffusers_itself_saved_with_bitsandbytes_is_read_as_diffusers_reads_it(
    tmp_path, arguments, bitsandbytes_without_gpu
):
    import diffusers

    shutil.copytree(find_folder("demo"), tmp_path / "theirs")
    folder = tmp_path / "theirs/transformer"
    model = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=diffusers.BitsAndBytesConfig(**arguments), torch_dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    ours = load(tmp_path / "theirs")
    assert sum(next(report.formats.values() for report in inspect_pipeline(ours) if report.name == "transformer")) > 40
    expected = generate(ours, SMALL)
    assert torch.equal(generate(with_plain_components(ours, tmp_path / "theirs"), SMALL), expected)


@pytest.mark.parametrize("pipeline_name", ["sd", "wan", "zimage"])
@pytest.mark.parametrize("scheme", ["torchao/int8wo", "bitsandbytes_8bit/int8"])
def test_every_kind_of_pipeline(tiny, tmp_path, pipeline_name, scheme, bitsandbytes_without_gpu):
    pipeline = load(tiny(pipeline_name), scheme)
    notes = {part.name: part.note for part in save_pipeline(pipeline, tmp_path / "saved")}
    again = load(tmp_path / "saved")
    for name, found in census(pipeline).items():
        assert census(again)[name] == found or notes[name], name
    if not any(notes.values()):
        assert torch.equal(generate(again, REQUEST), generate(pipeline, REQUEST))
    expected = generate(again, REQUEST)
    assert torch.equal(generate(with_plain_components(again, tmp_path / "saved"), REQUEST), expected)


@pytest.mark.parametrize("scheme", ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8"])
def test_what_transformers_keeps_in_16_bit_is_saved_so_and_said(tmp_path, scheme):
    pipeline = load("demo", f"text_encoder_2={scheme}")
    (part,) = (part for part in save_pipeline(pipeline, tmp_path / "saved") if part.note)
    assert part.note == "2 layers (wo) are written dequantized, because transformers keeps them in 16 bit"
    again = load(tmp_path / "saved")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        was, now = (found.pipe.text_encoder_2(ids).last_hidden_state for found in (pipeline, again))
    if scheme == "bitsandbytes_4bit/nf4":
        assert torch.equal(was, now)
    else:  # whose layers round the activations, too
        assert 0 < ((was - now).norm() / was.norm()).item() < 0.02


@pytest.mark.parametrize(
    "scheme", ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "quanto/int8", "torchao/int8wo"]
)
def test_a_layer_left_out_among_others_of_its_name(tmp_path, scheme, bitsandbytes_without_gpu):
    pipeline = load("demo", f"transformer={scheme}?skip=proj_out")
    (part,) = (part for part in save_pipeline(pipeline, tmp_path / "saved") if part.name == "transformer")
    again = load(tmp_path / "saved")
    expected = generate(pipeline, SMALL)
    assert census(again) == census(pipeline)
    assert torch.equal(generate(again, SMALL), expected)
    if scheme == "torchao/int8wo":
        assert not part.obstacle
        assert torch.equal(generate(with_plain_components(pipeline, tmp_path / "saved"), SMALL), expected)
    else:
        assert "diffusers cannot leave out" in part.obstacle
        with pytest.raises(OSError, match="no file named"):
            with_plain_components(pipeline, tmp_path / "saved")


@pytest.mark.parametrize("scheme", ["torchao/int8wo", "bitsandbytes_4bit/nf4", "quanto/int8"])
def test_several_files_hold_whole_layers(tmp_path, scheme, monkeypatch, bitsandbytes_without_gpu):
    monkeypatch.setattr(writing, "_SHARD", 2**20)
    pipeline = load("demo", f"transformer={scheme}?skip=none")
    save_pipeline(pipeline, tmp_path / "saved")
    folder = tmp_path / "saved/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert 3 < len(set(places.values())) == len(list(folder.glob("*.safetensors")))
    assert index["metadata"]["total_size"] >= footprint(pipeline.models["transformer"])
    for layer in (name for name, part in pipeline.pipe.transformer.named_modules() if hasattr(part, "in_features")):
        files = {place for name, place in places.items() if name.startswith((f"{layer}.weight", f"{layer}._weight"))}
        assert len(files) == 1
    expected = generate(pipeline, SMALL)
    assert torch.equal(generate(load(tmp_path / "saved"), SMALL), expected)
    assert torch.equal(generate(with_plain_components(pipeline, tmp_path / "saved"), SMALL), expected)


@pytest.mark.parametrize("plan", ["transformer=torchao/int8wo,text_encoder_2=quanto/int4,text_encoder=gguf/Q8_0"])
def test_what_was_saved_can_be_saved_again(tmp_path, plan):
    first = load("demo", plan)
    save_pipeline(first, tmp_path / "first")
    save_pipeline(load(tmp_path / "first"), tmp_path / "second")
    second = load(tmp_path / "second")
    assert census(second) == census(first)
    assert torch.equal(generate(second, SMALL), generate(first, SMALL))
    assert "## Before that" in (tmp_path / "second/QUANTIZATION.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_components_that_are_not_quantized_are_saved_in_the_dtype(tiny, tmp_path, dtype):
    pipeline = load(tiny("sd3"), "transformer=gguf/Q8_0", dtype=dtype)
    save_pipeline(pipeline, tmp_path / "saved")
    for name in ("vae", "text_encoder"):
        (file,) = (tmp_path / "saved" / name).glob("*.safetensors")
        kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        assert stored_dtypes([file]) - {"I64"} == {kinds[dtype]}
    again = load(tmp_path / "saved", dtype=dtype)
    assert torch.equal(generate(again, REQUEST), generate(pipeline, REQUEST))


def test_a_variant_is_saved_under_plain_names(tiny, tmp_path):
    import diffusers

    plain = diffusers.DiffusionPipeline.from_pretrained(tiny("sd3"), torch_dtype=torch.float16)
    plain.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="100KB")
    pipeline = load(tmp_path / "variant", "transformer=torchao/int8wo", dtype="float16", variant="fp16")
    save_pipeline(pipeline, tmp_path / "saved")
    again = load(tmp_path / "saved", dtype="float16")
    assert torch.equal(generate(again, REQUEST), generate(pipeline, REQUEST))
