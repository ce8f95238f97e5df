"""Footprints are the bytes that are stored, and parameters are counted as before packing."""

import gguf
import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import LoadRequest, backends, footprint, inspect_pipeline, load_pipeline, parse_plan
from quant_core.backend import Recipe

SCHEMES = [
    "bitsandbytes_4bit/nf4",
    "bitsandbytes_4bit/fp4",
    "bitsandbytes_4bit/nf4?double_quant=true",
    "bitsandbytes_4bit/nf4?quant_storage=bfloat16",
    "bitsandbytes_8bit/int8",
    "gguf/Q8_0",
    "gguf/Q5_1",
    "gguf/Q4_0",
    "quanto/int8",
    "quanto/int4",
    "quanto/int2",
    "quanto/float8",
    "torchao/int8wo",
    "torchao/int8dq",
    "torchao/fp8wo",
    "torchao/nvfp4wo",
]


def load(scheme, **settings):
    return load_pipeline(LoadRequest("demo", parse_plan(scheme), **settings))


def bytes_of_file(path):
    """Of the tensors in a safetensors file, from its header."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I64": 8}
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            total += torch.Size(part.get_shape()).numel() * sizes[part.get_dtype()]
    return total


@pytest.fixture(scope="module")
def unquantized():
    return load("none")


def test_an_unquantized_component_is_as_large_as_its_file(unquantized):
    for name, module in unquantized.models.items():
        (file,) = unquantized.index.components[name].folder.glob("*.safetensors")
        assert footprint(module) == bytes_of_file(file), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_are_those_of_the_unquantized_component(unquantized, scheme):
    pipeline = load(scheme)
    for report in inspect_pipeline(pipeline):
        own = {id(parameter): parameter.numel() for parameter in getattr(unquantized.pipe, report.name).parameters()}
        assert report.parameters == sum(own.values()), report.name
        assert report.bytes_16bit == 2 * report.parameters


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.startswith("bitsandbytes")])
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_bitsandbytes_stores_what_its_state_dict_holds(scheme, component):
    module = getattr(load(f"{component}={scheme}").pipe, component)
    tensors = {}
    for name, tensor in module.state_dict().items():
        if "bitsandbytes__" in name or name.endswith("weight_format"):  # names and numbers packed as JSON for files
            continue
        tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    offsets = 0  # a double quantized layer's offset is one number, which its file has among the names
    if "double_quant" in scheme:
        offsets = 4 * sum(type(part).__name__ == "Linear4bit" for part in module.modules())
    assert footprint(module) == sum(tensors.values()) + offsets


@pytest.mark.parametrize("scheme", ["torchao/int8wo", "torchao/fp8wo", "torchao/nvfp4wo"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
def test_torchao_stores_what_its_tensors_flatten_to(scheme, component):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    module = getattr(load(f"{component}={scheme}").pipe, component)
    flat, _ = flatten_tensor_state_dict(dict(module.state_dict()))
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in flat.values()}
    assert footprint(module) == sum(tensors.values())


def test_torchao_stores_what_diffusers_writes_to_disk(tmp_path):
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    ours = load("transformer=torchao/int8wo")
    theirs = FluxTransformer2DModel.from_pretrained(
        ours.index.components["transformer"].folder,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.bfloat16,
    )
    theirs.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert footprint(ours.pipe.transformer) == bytes_of_file(file)


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("scheme", ["gguf/Q8_0", "gguf/Q5_1", "gguf/Q4_0"])
def test_gguf_stores_what_its_file_holds(tmp_path, scheme, component):
    module = getattr(load(f"{component}={scheme}", store=tmp_path).pipe, component)
    (file,) = tmp_path.glob("*/*.gguf")
    tensors = [(int(tensor.n_bytes), tensor.tensor_type.name) for tensor in gguf.GGUFReader(file).tensors]
    assert "F32" in {kind for _, kind in tensors}  # vectors, which are bfloat16 once loaded
    assert footprint(module) == sum(size // 2 if kind == "F32" else size for size, kind in tensors)


@pytest.mark.parametrize("scheme", ["quanto/int8", "quanto/float8", "quanto/int2"])
def test_quanto_stores_what_its_state_dict_holds(scheme):
    module = load(f"transformer={scheme}").pipe.transformer
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    assert footprint(module) == sum(tensors.values())


class TilesOfInt4(TorchDispatchMode):
    """Packs int4 on a CPU as PyTorch's operator for CUDA does, as far as sizes go."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._convert_weight_to_int4pack.default:
            (rows, columns), inner = args[0].shape, args[1]  # two values in each column
            shape = (-(-rows // 8), 2 * columns // (16 * inner), 32, inner // 2)
            return torch.zeros(shape, dtype=torch.int32)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("group_size", ["auto", "32"])
@pytest.mark.parametrize(("rows", "columns"), [(8, 1024), (1280, 1280), (100, 128), (3072, 4096)])
def test_int4_is_counted_with_what_fills_up_its_tiles(monkeypatch, rows, columns, group_size):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    backend = backends()["torchao"]
    options = backend.complete("int4wo", {"group_size": group_size})
    recipe = Recipe("int4wo", options, torch.bfloat16, torch.device("cpu"))
    with torch.no_grad(), TilesOfInt4():
        layer = backend.quantize(torch.nn.Linear(columns, rows, False, dtype=torch.bfloat16), recipe)
    assert backend.layer_format(layer) == "Int4TilePackedTo4dTensor"
    assert backend.stored(recipe, rows, columns) == footprint(layer)
