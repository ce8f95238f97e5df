"""Ready gguf files of other makers: without the 16-bit weights beside them, and in the names of a first release."""

import shutil

import gguf
import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    QuantSpec,
    find_folder,
    generate,
    inspect_pipeline,
    load_pipeline,
)

TO_FIRST_RELEASE = [  # as diffusers' converter of Wan reads them, the other way round
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    ("scale_shift_table", "modulation"),
    ("proj_out", "head.head"),
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "self_attn.norm_k"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "cross_attn.norm_k"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
]


def made(source, tmp_path):
    """The gguf file that a load with gguf/Q8_0 makes of the transformer."""
    load_pipeline(LoadRequest(source, QuantPlan({"transformer": QuantSpec("gguf", "Q8_0")}), store=tmp_path / "cache"))
    (path,) = (tmp_path / "cache").rglob("*.gguf")
    return path


def from_file(path):
    return QuantPlan({"transformer": QuantSpec("gguf", "file", {"path": str(path)})})


def test_a_file_needs_no_16_bit_weights_beside_it(tmp_path):
    path = made("demo", tmp_path)
    demo_copy = tmp_path / "demo"
    shutil.copytree(find_folder("demo"), demo_copy)
    for weights in (demo_copy / "transformer").glob("*.safetensors"):
        weights.unlink()
    request = GenerateRequest("a lake", width=128, height=128, steps=1, max_sequence_length=48)
    alone = generate(load_pipeline(LoadRequest(str(demo_copy), from_file(path))), request)
    assert torch.equal(alone, generate(load_pipeline(LoadRequest("demo", from_file(path))), request))


def test_a_file_in_first_release_names_is_converted_and_stays_packed(tiny, tmp_path):
    source = str(tiny("wan"))
    path = made(source, tmp_path)
    renamed = tmp_path / "wan.gguf"
    writer = gguf.GGUFWriter(renamed, "wan")
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name
        for ours, theirs in TO_FIRST_RELEASE:
            name = name.replace(ours, theirs)
        name = "head.modulation" if name == "modulation" else name
        plain = tensor.tensor_type.name == "BF16"
        data = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).float().numpy() if plain else tensor.data
        if name == "patch_embedding.weight":  # of five dimensions, which ours stores flat
            data = data.reshape(load_pipeline(LoadRequest(source)).pipe.transformer.patch_embedding.weight.shape)
        writer.add_tensor(name, data, raw_dtype=None if plain else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = (load_pipeline(LoadRequest(source, from_file(file))) for file in (path, renamed))
    formats = [{r.name: r.formats for r in inspect_pipeline(pipeline)}["transformer"] for pipeline in (ours, theirs)]
    assert formats[0] == formats[1] and formats[0]["Q8_0"] > 10
    request = GenerateRequest("a cat", width=32, height=32, steps=1, extra={"num_frames": 5})
    assert torch.allclose(generate(ours, request), generate(theirs, request), atol=0.02)


@pytest.mark.parametrize("scheme", ["Q8_0"])
def test_t5_in_float16_keeps_its_output_layers_in_float32(scheme, tmp_path):
    plan = QuantPlan({"text_encoder_2": QuantSpec("gguf", scheme)})
    pipeline = load_pipeline(LoadRequest("demo", plan, "float16", store=tmp_path))
    layer = pipeline.models["text_encoder_2"].encoder.block[0].layer[1].DenseReluDense
    assert layer.wo.weight.dtype == torch.float32 and layer.wi_0.weight.quant_type.name == scheme
    assert pipeline.left_out["text_encoder_2"]["encoder.block.0.layer.1.DenseReluDense.wo"] == (
        "its model keeps it in float32"
    )
