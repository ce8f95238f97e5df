"""gguf/file as other tools write it: shapes in the metadata, prefixes, parts; and files that are not of the model."""

import logging
import random
import shutil
from functools import partial

import gguf
import numpy
import pytest
import torch
from diffusers.loaders import single_file_model

from quant_core import LoadRequest, QuantPlan, QuantSpec, SourceError, load_pipeline

from .gguf_copies import rewrite

pytestmark = pytest.mark.usefixtures("no_network")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def load(source, component, path, on_progress=None):
    plan = QuantPlan({component: QuantSpec("gguf", "file", {"path": str(path)})})
    return load_pipeline(LoadRequest(str(source), plan), on_progress)


def same(one, other, component):
    ours, theirs = (getattr(pipeline.pipe, component).state_dict() for pipeline in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.data, theirs[name].data) for name, value in ours.items()
    )


def refused(source, component, path):
    with pytest.raises(SourceError) as error:
        load(source, component, path, lambda *_: pytest.fail("weights were read"))
    said = str(error.value)
    assert "\n" not in said and said.endswith(".") and len(said) <= 300
    return said


@pytest.fixture(scope="session")
def z_image(tiny, tmp_path_factory):
    """The tiny Z-Image with its transformer as gguf/Q8_0, and the file that was made."""
    store = tmp_path_factory.mktemp("zimage")
    plan = QuantPlan({"transformer": QuantSpec("gguf", "Q8_0")})
    pipeline = load_pipeline(LoadRequest(str(tiny("zimage")), plan, store=store))
    (file,) = store.glob("*/*.gguf")
    return tiny("zimage"), pipeline, file


def test_a_shape_in_the_metadata_is_the_weights(made, tmp_path):
    pipeline, file = made("transformer")
    reader = gguf.GGUFReader(file)
    shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    name = next(name for name, shape in shapes.items() if len(shape) == 2 and shape[0] % 2 == 0)

    def wider(tensor, data, kind):
        return (data.reshape(data.shape[0] // 2, -1) if tensor == name else data), kind

    changed = rewrite(file, tmp_path / "wide.gguf", change=wider, shapes={name: shapes[name]})
    assert same(load("demo", "transformer", changed), pipeline, "transformer")
    plain = rewrite(file, tmp_path / "plain.gguf", change=wider)
    rows, columns = shapes[name]
    assert f"plain.gguf stores {name} as ({rows // 2}, {columns * 2})" in refused("demo", "transformer", plain)
    wrong = rewrite(file, tmp_path / "wrong.gguf", change=wider, shapes={name: (rows, columns + 1)})
    assert f"and calls it ({rows}, {columns + 1})" in refused("demo", "transformer", wrong)


def test_rows_that_no_block_fits_are_unpacked(z_image, tmp_path):
    source, pipeline, file = z_image
    layer = "layers.0.feed_forward.w2"
    weight = pipeline.pipe.transformer.get_submodule(layer).weight.detach()
    assert weight.shape[1] % 32

    def packed(tensor, data, kind):
        if tensor != f"{layer}.weight":
            return data, kind
        return gguf.quants.quantize(weight.float().numpy().reshape(-1, 64), Q8_0), Q8_0

    changed = rewrite(file, tmp_path / "rows.gguf", change=packed, shapes={f"{layer}.weight": tuple(weight.shape)})
    loaded = load(source, "transformer", changed)
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy().reshape(-1, 64), Q8_0), Q8_0)
    found = loaded.pipe.transformer.get_submodule(layer).weight
    assert torch.allclose(found.float(), torch.from_numpy(expected).reshape(weight.shape), rtol=0.01, atol=1e-4)


def test_dimensions_of_one_may_be_left_out(z_image, tmp_path):
    source, pipeline, file = z_image

    def flat(tensor, data, kind):
        return (data.reshape(-1) if tensor.endswith("pad_token") else data), kind

    changed = rewrite(file, tmp_path / "flat.gguf", change=flat)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(changed).tensors}
    assert shapes["x_pad_token"] == (256,) and pipeline.pipe.transformer.x_pad_token.shape == (1, 256)
    assert same(load(source, "transformer", changed), pipeline, "transformer")


def test_a_prefix_of_all_names_is_none_of_them(made, tmp_path):
    pipeline, file = made("transformer")
    changed = rewrite(file, tmp_path / "prefixed.gguf", lambda name: f"model.diffusion_model.{name}")
    assert same(load("demo", "transformer", changed), pipeline, "transformer")


def test_an_upper_case_suffix_is_one(made, tmp_path):
    from quant_core import find_folder

    pipeline, file = made("transformer")
    assert same(load("demo", "transformer", shutil.copy(file, tmp_path / "A.GGUF")), pipeline, "transformer")
    folder = shutil.copytree(find_folder("demo"), tmp_path / "folder")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    shutil.copy(file, folder / "transformer/A.GGUF")
    assert same(load_pipeline(LoadRequest(str(folder))), pipeline, "transformer")


@pytest.mark.parametrize("told", ["name", "metadata"])
def test_a_part_of_a_file_is_named(made, tmp_path, told):
    file = tmp_path / ("m-00001-of-00003.gguf" if told == "name" else "m.gguf")
    rewrite(made("transformer")[1], file, parts=0 if told == "name" else 3)
    said = refused("demo", "transformer", file)
    assert said == f"{file.name} is one of 3 parts of a file; put them together with llama.cpp's gguf-split --merge."


@pytest.mark.parametrize("offset", [0, 64, 10**6])
def test_tensors_that_overlap_or_leave_gaps_are_refused(made, tmp_path, offset):
    file = shutil.copy(made("transformer")[1], tmp_path / "bad.gguf")
    reader = gguf.GGUFReader(file, "r+")
    reader.tensors[3].field.parts[5][0] = offset
    reader.data.flush()
    said = refused("demo", "transformer", file)
    assert said.startswith("bad.gguf is ") and (
        "does not begin where the tensor before it ends" in said or "trunc" in said
    )


def write(path, architecture, names):
    writer = gguf.GGUFWriter(path, architecture)
    for name in names:
        numbers = numpy.random.default_rng(0).normal(size=(64, 64)).astype("float32")
        writer.add_tensor(name, gguf.quants.quantize(numbers, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


OTHERS = {
    "wan": [f"blocks.{block}.self_attn.{kind}.weight" for block in range(2) for kind in "qkvo"],
    "sdxl": ["input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", "middle_block.1.proj_in.weight"],
    "t5encoder": ["enc.blk.0.attn_q.weight", "enc.blk.0.attn_k.weight"],
    "flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "any": ["some.weight", "other.weight"],
}


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize(
    ("pipeline", "component", "cls"),
    [
        ("demo", "transformer", "FluxTransformer2DModel"),
        ("sd", "unet", "UNet2DConditionModel"),
        ("sd3", "transformer", "SD3Transformer2DModel"),
        ("wan", "transformer", "WanTransformer3DModel"),
        ("zimage", "transformer", "ZImageTransformer2DModel"),
    ],
)
def test_the_file_of_another_model_is_named_before_weights_are_read(
    tiny, tmp_path, architecture, pipeline, component, cls
):
    path = write(tmp_path / "other.gguf", architecture, OTHERS[architecture])
    said = refused("demo" if pipeline == "demo" else tiny(pipeline), component, path)
    assert cls in said and "index" not in said
    if architecture not in (pipeline, "flux"):
        told = f"other.gguf is not of {cls}: it says that its architecture is '{architecture}', 0 of its "
        assert said.startswith(told) or f"{component}: its checkpoint has " in said


def test_the_file_of_a_denoiser_is_none_of_an_encoder(tmp_path):
    said = refused("demo", "text_encoder_2", write(tmp_path / "other.gguf", "t5", OTHERS["wan"]))
    assert said.startswith("other.gguf is not of T5EncoderModel: it says that its architecture is 't5', 0 of its 8")


def to_llama_cpp(name):
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2).get_name(name, (".weight", ".bias"))


def with_more(file, target, more, **changes):
    """A copy of a file with another tensor, of any content."""
    return rewrite(file, target, more={more: numpy.ones((2, 32), numpy.float32)}, **changes)


@pytest.mark.parametrize("more", ["dec.blk.0.attn_q.weight", "output.weight"])
def test_parts_that_an_encoder_is_without_are_left_and_told(made, tmp_path, caplog, more):
    caplog.set_level(logging.INFO, "quant_core")
    pipeline, file = made("text_encoder_2")
    whole = with_more(file, tmp_path / "t5.gguf", more, rename=to_llama_cpp, architecture="t5")
    assert same(load("demo", "text_encoder_2", whole), pipeline, "text_encoder_2")
    assert f"t5.gguf: T5EncoderModel does not use {more}." in caplog.messages


@pytest.mark.parametrize("more", ["enc.blk.7.attn_q.weight", "enc.blk.0.attn_q.scale"])
def test_blocks_that_an_encoder_does_not_have_are_refused(made, tmp_path, more):
    file = with_more(made("text_encoder_2")[1], tmp_path / "t5.gguf", more, rename=to_llama_cpp, architecture="t5")
    assert f"t5.gguf has 1 tensor that T5EncoderModel does not take, as {more}" in refused(
        "demo", "text_encoder_2", file
    )


def test_what_a_converter_passes_over_is_refused(tiny, z_image, tmp_path, monkeypatch):
    """As most of diffusers' converters do, which take the names that they know out of the file."""
    source, pipeline, file = z_image
    names = {tensor.name: f"old.{tensor.name}" for tensor in gguf.GGUFReader(file).tensors}
    about = {
        "checkpoint_mapping_fn": lambda checkpoint, **_: {ours: checkpoint.pop(old) for ours, old in names.items()}
    }
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "ZImageTransformer2DModel", about)
    renamed = rewrite(file, tmp_path / "old.gguf", names.__getitem__)
    assert same(load(source, "transformer", renamed), pipeline, "transformer")
    more = with_more(file, tmp_path / "more.gguf", "old.layers.0.extra", rename=lambda name: names.get(name, name))
    assert "its checkpoint has 1 tensor that ZImageTransformer2DModel does not take, as old.layers.0.ex" in refused(
        source, "transformer", more
    )


def without(gone, name, *about):
    return None if name == gone else about


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_a_tensor_more_less_or_of_another_name_is_never_a_silent_success(made, tmp_path, component):
    file, rng = made(component)[1], random.Random(component)
    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    for _ in range(3):
        one = rng.choice(names)
        called = {name: name for name in names} | {one: f"{one}_"}
        refused("demo", component, rewrite(file, tmp_path / "a.gguf", called.__getitem__))
        gone = rewrite(file, tmp_path / "b.gguf", change=partial(without, one))
        assert "b.gguf lacks 1 weights of" in refused("demo", component, gone)
        parent = one.rpartition(".")[0]
        for more in (f"{parent}.scale_weight", "extra", f"{one}.absmax"):
            refused("demo", component, with_more(file, tmp_path / "c.gguf", more))
