"""quanto without a compiler, and without the formats that it packs for one device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quant_core import LoadRequest, QuantSpec, backends, load_pipeline, parse_plan
from quant_core.backend import Recipe
from quant_core.backends import quanto
from quant_core.exchanging import quantized
from quant_core.inspection import stored_tensors
from quant_core.transfer import backend_of, moved

CPU = torch.device("cpu")


@pytest.fixture
def unmoved(monkeypatch):
    """PyTorch moves no quantized layer: on the way from a GPU it would be packed for the CPU."""
    move = nn.Module.to

    def to(module, *args, **kwargs):
        assert not any(map(backend_of, module.modules())), "a quantized layer is moved by PyTorch"
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)


@pytest.mark.parametrize("plan", ["quanto/int4?skip=none", "torchao/int8wo", "bitsandbytes_4bit/nf4"])
def test_layers_go_home_as_what_they_were_quantized_to(unmoved, plan):
    load_pipeline(LoadRequest("demo", parse_plan(f"transformer={plan}"), store="off"))


def test_exchanged_layers_go_home_as_what_they_were_quantized_to(unmoved):
    pipeline = load_pipeline(LoadRequest("demo", store="off"))
    name = next(name for name, part in pipeline.pipe.transformer.named_modules() if type(part) is nn.Linear)
    recipe = Recipe("int4", {}, torch.bfloat16, CPU)
    with quantized(pipeline, "transformer", [name], QuantSpec("quanto", "int4"), recipe):
        layer = pipeline.pipe.transformer.get_submodule(name)
        assert type(layer.weight).__name__ == "WeightQBitsTensor"


SCHEMES = ["quanto/int8", "quanto/int4", "quanto/int2", "quanto/float8", "torchao/int8wo", "torchao/nvfp4wo"]
SCHEMES += ["gguf/Q8_0", "gguf/Q4_0", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8"]


@pytest.mark.parametrize("text", SCHEMES)
def test_moved_weights_are_of_the_same_kind_and_all_there(text):
    name, scheme = text.split("/")
    backend = backends()[name]
    recipe = Recipe(scheme, backend.complete(scheme, {}), torch.bfloat16, CPU)
    with torch.no_grad():
        layer = backend.quantize(nn.Linear(128, 128, dtype=torch.bfloat16), recipe).eval()
        inputs = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        before, kind, expected = backend.layer_format(layer), type(layer.weight), layer(inputs)
        assert torch.equal(moved(layer, CPU)(inputs), expected)
        assert moved(layer, torch.device("meta")) is layer
    assert (backend.layer_format(layer), type(layer.weight)) == (before, kind)
    assert {tensor.device.type for tensor in [*stored_tensors(layer), *layer.buffers()]} == {"meta"}


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """What optimum.quanto registers where it finds CUDA, which asks nvcc for a library when it is first used."""
    from optimum.quanto.library.extensions import extension as registry

    def load(name, **settings):
        pytest.fail(f"a compiler is asked for {name}")

    made = registry.Extension("quanto_cuda", str(tmp_path), ["unpack.cu"])
    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(registry, "_extensions", {"quanto_cuda": made})
    quanto._do_without_a_compiler.cache_clear()
    yield made
    quanto._do_without_a_compiler.cache_clear()


def test_no_compiler_is_asked_and_no_format_is_chosen_that_needs_one(extension):
    from optimum.quanto import is_extension_available

    backend, recipe = backends()["quanto"], Recipe("int2", {}, torch.bfloat16, CPU)
    with torch.no_grad():
        layer = backend.quantize(nn.Linear(128, 64, dtype=torch.bfloat16), recipe)
        packed = layer.weight._data._data
        found, expected = extension.lib.unpack(packed, 2), torch.ops.quanto.unpack(packed, 2)
    assert torch.equal(found, expected) and found.max() == 3
    assert not is_extension_available("quanto_cuda"), "quanto would turn a weight that moves into one of its kernels'"


@pytest.mark.parametrize("built_for", [torch.__version__, "1.0"])
def test_an_extension_stays_where_it_is_built_for_this_pytorch(extension, tmp_path, built_for):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "pytorch_version.txt").write_text(f"{built_for}\n")
    quanto._do_without_a_compiler()
    assert isinstance(extension._lib, SimpleNamespace) == (built_for == "1.0")
