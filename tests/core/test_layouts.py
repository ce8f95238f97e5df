"""Layers on the inputs that models make: views of all kinds, one row, four dimensions; also as kernels for CUDA read
them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import backends
from quant_core.availability import quiet_libraries
from quant_core.backend import Recipe

from .layouts import IN, OUT, layouts, off

SCHEMES = [
    f"{name}/{scheme.name}"
    for name, backend in backends().items()
    for scheme in backend.schemes
    if scheme.bits and "cpu" in scheme.devices
]


class OnCuda(TorchDispatchMode):
    """Refuses on a CPU what kernels for CUDA refuse, or read wrong without a word."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if name in ("bitsandbytes.int8_vectorwise_quant", "aten._weight_int4pack_mm"):
            assert args[0].is_contiguous(), f"{name} takes the memory of its input for rows that follow each other"
            assert args[0].ndim in (2, 3), f"what follows {name} takes two or three dimensions"
        if name == "aten._weight_int4pack_mm":
            return args[0].new_zeros(len(args[0]), OUT)  # which has no kernel for a CPU
        return function(*args, **(kwargs or {}))


def run(layer, inputs):
    with torch.no_grad(), OnCuda():
        return layer(inputs)


@pytest.mark.parametrize("text", SCHEMES)
def test_a_layer_takes_any_view(text):
    name, scheme = text.split("/")
    backend = backends()[name]
    recipe = Recipe(scheme, backend.complete(scheme, {}), torch.bfloat16, torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad(), quiet_libraries():
        layer = backend.quantize(torch.nn.Linear(IN, OUT, dtype=torch.bfloat16), recipe).eval()
    for what, given in layouts().items():
        assert off(lambda inputs: run(layer, inputs), given) < 0.01, what


def test_kernels_of_int4_get_rows():
    from torchao.quantization import Int4TilePackedTo4dTensor

    packed = torch.zeros(OUT // 8, 8, 32, 4, dtype=torch.int32)
    weight = Int4TilePackedTo4dTensor(
        packed, torch.zeros(8, OUT, 2, dtype=torch.bfloat16), [1, 128], torch.Size((OUT, 1024))
    )
    layer = torch.nn.Linear(1024, OUT, False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    backends()["torchao"].settle(layer)
    given = torch.zeros(2, 1024, 3, 4, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    assert run(layer, given[0, 0]).shape == (4, OUT)
    assert run(layer, given).shape == (2, 3, 4, OUT)
