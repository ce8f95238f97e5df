"""gguf/file with a file that is damaged, foreign or absent: one sentence, and no question to the network."""

import gguf
import numpy
import pytest

from quant_core import LoadRequest, QuantError, QuantPlan, QuantSpec, SourceError, SpecError, load_pipeline

from .gguf_copies import rewrite

pytestmark = pytest.mark.usefixtures("no_network")


def load(component, path):
    plan = QuantPlan({component: QuantSpec("gguf", "file", {"path": str(path)})})
    return load_pipeline(LoadRequest("demo", plan))


def cut(file, target):
    target.write_bytes(file.read_bytes()[:-5000])
    return target


def text(file, target):
    target.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return target


def other_shape(file, target):
    def change(name, data, kind):
        return (data[:-1] if name.endswith("wo.weight") else data), kind

    return rewrite(file, target, change=change)


def one_missing(file, target):
    def change(name, data, kind):
        return None if "block.1.layer.1.DenseReluDense.wo" in name else (data, kind)

    return rewrite(file, target, change=change)


def unknown_type(file, target):
    kind = gguf.GGMLQuantizationType.TQ1_0

    def change(name, data, old):
        if not name.endswith("wo.weight"):
            return data, old
        weight = gguf.quants.dequantize(data, old)
        return gguf.quants.quantize(weight, kind), kind

    return rewrite(file, target, change=change)


def unpacked(file, target):
    def change(name, data, kind):
        if kind != gguf.GGMLQuantizationType.Q8_0:
            return data, kind
        return gguf.quants.dequantize(data, kind).astype(numpy.float16), gguf.GGMLQuantizationType.F16

    return rewrite(file, target, change=change)


def other_architecture(file, target):
    return rewrite(file, target, rename=lambda name: f"llama.{name}", architecture="llama")


def other_names(file, target):
    return rewrite(file, target, rename=lambda name: f"x.{name}", architecture="t5")


UNUSABLE = [
    (cut, "bad.gguf is truncated or no gguf file ("),
    (
        text,
        "bad.gguf is a Git LFS pointer, not the file itself; run git lfs pull in the model's folder, or download it",
    ),
    (other_shape, "bad.gguf stores encoder.block."),
    (one_missing, "bad.gguf lacks 1 weights of T5EncoderModel, as encoder.block.1.layer.1.DenseReluDense.wo.weight."),
    (unknown_type, "as TQ1_0; the types that can be read: BF16, "),
    (unpacked, "bad.gguf holds no quantized layer of T5EncoderModel; leave it out of the plan."),
    (other_architecture, "bad.gguf is of architecture 'llama', whose weights llama.cpp transforms or whose model is "),
    (other_names, "bad.gguf is not of T5EncoderModel: it says that its architecture is 't5', 0 of its 21 tensors"),
]


@pytest.mark.parametrize(("spoil", "sentence"), UNUSABLE, ids=[spoil.__name__ for spoil, _ in UNUSABLE])
def test_an_unusable_file_is_refused_in_one_sentence(made, tmp_path, spoil, sentence):
    path = spoil(made("text_encoder_2")[1], tmp_path / "bad.gguf")
    with pytest.raises(QuantError) as error:
        load("text_encoder_2", path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_component_is_refused(made, tmp_path):
    with pytest.raises(SourceError):
        load("transformer", made("text_encoder_2")[1])
    with pytest.raises(SourceError):
        load("text_encoder_2", made("transformer")[1])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere.gguf", "path is 'nowhere.gguf'; it must be an existing .gguf file."),
        ("pyproject.toml", "path is 'pyproject.toml'; it must be an existing .gguf file."),
        ("", "gguf/file needs path: the path of a .gguf file."),
    ],
)
def test_a_path_that_is_no_gguf_file_is_refused(path, sentence):
    with pytest.raises(SpecError) as error:
        load("transformer", path)
    assert str(error.value) == sentence
