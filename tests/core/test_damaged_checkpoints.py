"""Files that are cut, missing or not what they say: one sentence that names them, and never a random weight."""

import json
import re
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from quant_core import LoadRequest, QuantPlan, QuantSpec, SourceError, load_pipeline, parse_plan, reading
from quant_core.inspection import stored_tensors

DENOISER = "transformer/diffusion_pytorch_model.safetensors"
T5 = "text_encoder_3/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def cut(model, file, share):
    data = (model / file).read_bytes()
    (model / file).write_bytes(data[: int(len(data) * share)])


def lie(model, file, **header):
    """Let the header say something else of its first tensor."""
    data = (model / file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + size])
    name = next(name for name in tensors if name != "__metadata__")
    tensors[name] |= header
    told = json.dumps(tensors).encode()
    (model / file).write_bytes(struct.pack("<Q", len(told)) + told + data[8 + size :])


def overwrite(model, file, data):
    (model / file).write_bytes(data)


def shard(model, folder, **files):
    """A shard index in place of the weights; the real ones are its first shard."""
    stem = model / folder / "diffusion_pytorch_model.safetensors"
    stem.rename(model / folder / "part-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (model / folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def reshape(model, file, name):
    tensors = load_file(model / file)
    tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()
    save_file(tensors, model / file, {"format": "pt"})


def drop(model, file, *names):
    tensors = load_file(model / file)
    for name in names:
        del tensors[name]
    save_file(tensors, model / file, {"format": "pt"})


def remove(model, path):
    shutil.rmtree(model / path) if (model / path).is_dir() else (model / path).unlink()


def empty_folder(model, path):
    remove(model, path)
    (model / path).mkdir()


TRUNCATED = r"diffusion_pytorch_model.safetensors is truncated or not what its header says \(.*\); download it again\."
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
INDEX = "diffusion_pytorch_model.safetensors.index.json"

# what is done to the folder, and the sentence: found before weights are read
BEFORE = [
    (cut, (DENOISER, 0.5), "transformer: " + TRUNCATED),
    (cut, (VAE, 0.999), "vae: " + TRUNCATED),
    (cut, (DENOISER, 0), "transformer: " + TRUNCATED),
    (lie, (DENOISER, {"shape": [10**6, 10**6], "data_offsets": [0, 2 * 10**12]}), "transformer: " + TRUNCATED),
    (lie, (DENOISER, {"data_offsets": [-8, 0]}), "transformer: " + TRUNCATED),
    (overwrite, (VAE, struct.pack("<Q", 2**60) + b"{}"), "vae: " + TRUNCATED),
    (overwrite, (VAE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"))
    + ("vae: its diffusion_pytorch_model.safetensors is a Git LFS pointer, not the file itself; run git lfs pull in",),
    (reshape, (DENOISER, "proj_out.weight"))
    + (r"stores proj_out.weight as \(16, 32\), and SD3Transformer2DModel takes \(16, 64\) there\.",),
    (reshape, (T5, WO), rf"stores {WO} as \(64, 64\), and T5EncoderModel takes \(64, 128\) there\."),
    (shard, ("transformer", {"a": "../../etc/passwd.safetensors"}))
    + (r"transformer: the shard index names '\.\./\.\./etc/passwd\.safetensors', which is no safetensors file of",),
    (shard, ("transformer", {"a": "/etc/passwd"}), "transformer: the shard index names '/etc/passwd', which is no"),
    (shard, ("transformer", {"a": "part-1.bin"}), "transformer: the shard index names 'part-1.bin', which is no"),
    (shard, ("transformer", {"a": 1}), "transformer: the shard index names 1, which is no safetensors file"),
    (shard, ("transformer", {"a": "part-1.safetensors", "b": "part-2.safetensors"}))
    + ("transformer: the shard part-2.safetensors is missing; download the model again",),
    (overwrite, (f"vae/{INDEX}", b'{"weight_map": '), f"vae: the shard index {INDEX} is damaged \\("),
    (overwrite, (f"vae/{INDEX}", b"[]"), f"vae: the shard index {INDEX} is damaged \\("),
    (remove, (VAE,), "vae has no weights: its folder holds no safetensors file"),
    (remove, ("vae",), "vae is named in model_index.json, but the pipeline has no folder vae"),
    (remove, ("tokenizer",), "tokenizer is named in model_index.json, but the pipeline has no files of it"),
    (empty_folder, ("tokenizer_3",), "tokenizer_3 is named in model_index.json, but the pipeline has no files of it"),
    (remove, ("scheduler",), "scheduler is named in model_index.json, but the pipeline has no files of it"),
    (remove, ("model_index.json",), "sd3 is not a diffusers pipeline: it has no model_index.json"),
    (
        overwrite,
        ("model_index.json", b'{"a": '),
        "its model_index.json is damaged \\(Expecting value: line 1",
    ),
    (overwrite, ("model_index.json", b"\xff\xfe"), "its model_index.json is damaged \\('utf-8' codec can't decode"),
    (overwrite, ("model_index.json", b"[" * 10**5), "its model_index.json is damaged \\(maximum recursion depth"),
    (overwrite, ("model_index.json", b"[]"), "its model_index.json holds no JSON object"),
    (overwrite, ("model_index.json", b"{}"), "its model_index.json names no _class_name"),
    (overwrite, ("vae/config.json", b"{"), "component vae of this pipeline: its config.json is damaged \\("),
    (remove, ("text_encoder_3/config.json",), "component text_encoder_3 of this pipeline has no config.json"),
]
# and what only shows while they are read
WHILE = [
    (drop, (DENOISER, "proj_out.weight"), "transformer: its checkpoint lacks 1 weights of .*, as proj_out.weight"),
    (
        drop,
        (DENOISER, "proj_out.weight", "proj_out.bias"),
        "lacks 2 weights of SD3Transformer2DModel, as proj_out.b",
    ),
    (drop, (T5, WO), f"text_encoder_3: its checkpoint lacks 1 weights of T5EncoderModel, as {WO}"),
    (drop, (VAE, "decoder.conv_in.bias"), "vae: its checkpoint lacks 1 weights of AutoencoderKL, as decoder.conv_in."),
]


def ids(rows):
    return [f"{spoil.__name__}-{arguments[0]}-{number}" for number, (spoil, arguments, _) in enumerate(rows)]


def spoiled(copy, spoil, arguments):
    model = copy("sd3")
    values = arguments[-1] if isinstance(arguments[-1], dict) else {}
    spoil(model, *(arguments[:-1] if values else arguments), **values)
    return model


def refusal(model, plan):
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(str(model), plan))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo"])
@pytest.mark.parametrize(("spoil", "arguments", "sentence"), BEFORE, ids=ids(BEFORE))
def test_a_damaged_file_is_named_before_weights_are_read(copy, monkeypatch, spoil, arguments, sentence, plan):
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))
    said = refusal(spoiled(copy, spoil, arguments), parse_plan(plan))
    assert re.search(sentence, said), said


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0"])
@pytest.mark.parametrize(("spoil", "arguments", "sentence"), WHILE, ids=ids(WHILE))
def test_weights_that_are_missing_or_of_another_shape_are_never_made_up(copy, spoil, arguments, sentence, plan):
    said = refusal(spoiled(copy, spoil, arguments), parse_plan(plan))
    assert re.search(sentence, said), said


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"num_layers": 3},
            r"stores transformer_blocks.1.norm1_context.\S+ as \(128,\), and SD3.* takes \(384,\) there",
        ),
        ({"num_layers": "two"}, "transformer: its config.json describes no SD3Transformer2DModel \\('str' object"),
        (
            {"joint_attention_dim": 32},
            r"stores context_embedder.weight as \(64, 64\), and SD3.* takes \(64, 32\) there",
        ),
    ],
)
def test_weights_that_do_not_belong_to_their_config(copy, edit, config, sentence):
    model = copy("sd3")
    edit(model / "transformer/config.json", **config)
    plan = QuantPlan({"transformer": QuantSpec("torchao", "int8wo")})
    said = refusal(model, plan)
    assert re.search(sentence, said), said


def test_variants_are_asked_for_by_name(copy):
    model = copy("sd3")
    (model / DENOISER).rename(model / "transformer/diffusion_pytorch_model.fp16.safetensors")
    sentence = "transformer has no plain weights but diffusion_pytorch_model.fp16.safetensors; ask for variant='fp16'."
    assert refusal(model, QuantPlan()) == sentence
    plan = QuantPlan({"transformer": QuantSpec("torchao", "int8wo")})
    pipeline = load_pipeline(LoadRequest(str(model), plan, variant="fp16"))
    assert pipeline.specs.keys() == {"transformer"}
    with pytest.raises(SourceError, match="No component has weights of the variant 'bf16'; load it without a variant"):
        load_pipeline(LoadRequest(str(model), plan, variant="bf16"))


def test_shards_load_as_one_file_does(copy, tiny):
    import torch
    from diffusers import SD3Transformer2DModel

    model = copy("sd3")
    (model / DENOISER).unlink()
    SD3Transformer2DModel.from_pretrained(tiny("sd3") / "transformer", dtype=torch.bfloat16).save_pretrained(
        model / "transformer", max_shard_size="100KB"
    )
    assert len([*(model / "transformer").glob("*-of-*.safetensors")]) > 2
    plan = QuantPlan({"transformer": QuantSpec("torchao", "int8wo")})
    ours, whole = (load_pipeline(LoadRequest(str(folder), plan)).pipe.transformer for folder in (model, tiny("sd3")))
    assert ours.proj_out.weight.__class__.__name__ == "Int8Tensor"
    pairs = list(zip(stored_tensors(ours), stored_tensors(whole), strict=True))
    assert pairs and all(torch.equal(first, second) for first, second in pairs)
