"""gguf/file: a ready .gguf file, in our names or llama.cpp's, of any type that can be decoded."""

import shutil

import gguf
import numpy
import pytest
import torch

from quant_core import LoadRequest, QuantPlan, QuantSpec, inspect_pipeline, load_pipeline

from .gguf_copies import rewrite

pytestmark = pytest.mark.usefixtures("no_network")

# type -> where its blocks have their scales, as half floats; all other bytes may be anything
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= {"IQ4_NL": (0,), "IQ4_XS": (0,), "Q4_0": (0,), "Q8_0": (0,)}


def load(component, path):
    plan = QuantPlan({component: QuantSpec("gguf", "file", {"path": str(path)})})
    return load_pipeline(LoadRequest("demo", plan))


def report(pipeline, component):
    return {report.name: report for report in inspect_pipeline(pipeline)}[component]


@torch.no_grad()
def encode(pipeline, component):
    return getattr(pipeline.pipe, component)(input_ids=torch.arange(12).view(1, 12)).last_hidden_state


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_a_ready_file_stays_packed_and_is_the_made_one(made, tmp_path, component):
    pipeline, file = made(component)
    ready = load(component, shutil.copy(file, tmp_path / "a b, c.gguf"))
    first, second = report(pipeline, component), report(ready, component)
    assert second.requested == "gguf/file"
    assert (first.formats, first.footprint, first.parameters) == (second.formats, second.footprint, second.parameters)
    assert second.footprint < 0.6 * second.bytes_16bit and second.left_out == {}
    ours, theirs = (getattr(loaded.pipe, component).state_dict() for loaded in (pipeline, ready))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.data, theirs[name].data), name


def test_a_t5_file_in_llama_cpp_s_names_is_read_packed(made, tmp_path):
    pipeline, file = made("text_encoder_2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)

    def rename(name):
        return names.get_name(name, (".weight", ".bias"))

    ready = load("text_encoder_2", rewrite(file, tmp_path / "t5.gguf", rename, architecture="t5encoder"))
    assert "enc.blk.0.attn_q.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "t5.gguf").tensors}
    first, second = report(pipeline, "text_encoder_2"), report(ready, "text_encoder_2")
    assert (first.formats, first.footprint) == (second.formats, second.footprint)
    assert torch.equal(encode(pipeline, "text_encoder_2"), encode(ready, "text_encoder_2"))


def random_blocks(kind, generator):
    """Change every packed tensor to valid random blocks of another type."""

    def change(name, data, old):
        if old != gguf.GGMLQuantizationType.Q8_0:
            return data, old
        rows, columns = gguf.quant_shape_from_byte_shape(data.shape, old)
        size, width = gguf.GGML_QUANT_SIZES[kind]
        blocks = generator.integers(0, 256, (rows * columns // size, width), dtype=numpy.uint8)
        for place in SCALES[kind.name]:
            scale = numpy.full(len(blocks), 0.0005, numpy.float16).view(numpy.uint8).reshape(-1, 2)
            blocks[:, place : place + 2] = scale
        return blocks.reshape(rows, -1), kind

    return change


@pytest.mark.parametrize("name", SCALES)
def test_types_that_only_others_can_make_are_decoded(made, tmp_path, name):
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    kind = getattr(gguf.GGMLQuantizationType, name)
    change = random_blocks(kind, numpy.random.default_rng(0))
    file = rewrite(made("text_encoder_2")[1], tmp_path / "random.gguf", change=change)
    pipeline = load("text_encoder_2", file)
    found = report(pipeline, "text_encoder_2")
    assert set(found.formats) == {name} and found.left_out == {}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    checked = 0
    for path, part in pipeline.pipe.text_encoder_2.named_modules():
        if type(getattr(part, "weight", None)).__name__ == "GGUFParameter":
            expected = torch.from_numpy(gguf.quants.dequantize(tensors[f"{path}.weight"].data, kind))
            decoded = dequantize_gguf_tensor(part.weight).float()
            assert torch.allclose(decoded, expected, rtol=2e-3, atol=1e-4), path
            checked += 1
    assert checked == sum(found.formats.values())
    assert encode(pipeline, "text_encoder_2").isfinite().all()
