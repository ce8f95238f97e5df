"""A large layer is quantized in slices of its rows, and is the same, bit for bit, as if it had been at once."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant_core import parse_plan
from quant_core.backend import Recipe
from quant_core.backends import _slices, get_backend
from quant_core.inspection import stored_tensors

CPU = torch.device("cpu")
SCHEMES = [
    "bitsandbytes_4bit/nf4",
    "bitsandbytes_4bit/fp4",
    "bitsandbytes_4bit/nf4?double_quant=true",
    "bitsandbytes_4bit/fp4?double_quant=true",
    "bitsandbytes_4bit/nf4?quant_storage=bfloat16",
    "bitsandbytes_4bit/fp4?quant_storage=float16",
    "bitsandbytes_4bit/nf4?quant_storage=float32&double_quant=true",
    "bitsandbytes_8bit/int8",
    "gguf/Q8_0",
    "gguf/Q5_1",
    "gguf/Q5_0",
    "gguf/Q4_1",
    "gguf/Q4_0",
    "quanto/int8",
    "quanto/int4",
    "quanto/int2",
    "quanto/float8",
    "torchao/int8wo",
    "torchao/int8wo?group_size=32",
    "torchao/int8dq",
    "torchao/fp8wo",
]
SHAPES = [  # most divide into slices of unequal length
    (38, 96),
    (37, 64),
    (33, 256),
    (7, 1600),  # 500 weights are less than two rows
    (4, 32 * 128),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def linear(weight):
    rows, columns = weight.shape
    made = torch.nn.Linear(columns, rows, dtype=weight.dtype, device="meta")
    made.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    made.bias = torch.nn.Parameter(torch.linspace(-1, 1, rows, dtype=weight.dtype), requires_grad=False)
    return made


def quantized(monkeypatch, scheme, layer, most):
    """The layer, quantized in slices of about so many weights."""
    monkeypatch.setattr(_slices, "SLICE", most)
    spec = parse_plan(scheme).default
    backend = get_backend(spec.backend)
    recipe = Recipe(spec.scheme, backend.complete(spec.scheme, dict(spec.options)), layer.weight.dtype, CPU)
    assert backend.unfit(recipe, *layer.weight.shape) == ""
    return backend, backend.quantize(layer, recipe).requires_grad_(False).eval()


def weights(shape, dtype):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, shape[1])
    made[1] = 0
    made[-1, : shape[1] // 2] = 0
    return made.to(dtype)


def exactly(tensor):
    tensor = tensor.detach()
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_in_slices_is_the_same_as_at_once(monkeypatch, scheme, shape, dtype):
    weight = weights(shape, dtype)
    backend, whole = quantized(monkeypatch, scheme, linear(weight), sys.maxsize)
    backend, sliced = quantized(monkeypatch, scheme, linear(weight), 500)
    assert type(sliced) is type(whole) and type(sliced.weight) is type(whole.weight)
    assert backend.layer_format(sliced) == backend.layer_format(whole)
    assert backend.weight_shape(sliced) == backend.weight_shape(whole) == shape
    assert [*map(exactly, stored_tensors(sliced))] == [*map(exactly, stored_tensors(whole))]
    if backend.pack:
        first, second = backend.pack(sliced), backend.pack(whole)
        assert first.about == second.about and list(first.tensors) == list(second.tensors)
        assert [*map(exactly, first.tensors.values())] == [*map(exactly, second.tensors.values())]
    inputs = torch.randn((3, shape[1]), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert exactly(sliced(inputs)) == exactly(whole(inputs))


@pytest.mark.parametrize("double_quant", ["false", "true"])
def test_the_state_of_4_bit_weights_is_the_same(monkeypatch, double_quant):
    def state(layer):
        found = dict(vars(layer.weight.quant_state))
        nested = found.pop("state2")
        found |= {f"state2.{name}": value for name, value in vars(nested).items()} if nested else {}
        return {name: exactly(value) if torch.is_tensor(value) else value for name, value in found.items()}

    scheme = f"bitsandbytes_4bit/nf4?double_quant={double_quant}"
    weight = weights((38, 96), torch.bfloat16)
    _, whole = quantized(monkeypatch, scheme, linear(weight), sys.maxsize)
    _, sliced = quantized(monkeypatch, scheme, linear(weight), 500)
    assert state(sliced) == state(whole)
    data, other = (
        {name: value for name, value in vars(layer.weight).items() if name != "quant_state"}
        for layer in (sliced, whole)
    )
    assert data == other


class Largest(TorchDispatchMode):
    """Remembers the most elements of a floating-point tensor that something is computed from."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.name() not in ("aten::detach", "aten::empty_like"):
            read = (item for item in args if isinstance(item, torch.Tensor) and not item.is_meta)
            self.most = max([self.most, *(item.numel() for item in read if item.is_floating_point())])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_library_is_given_the_layer_at_once(monkeypatch, scheme):
    weight = weights((64, 256), torch.bfloat16)
    found = {}
    for most in (sys.maxsize, 1024):
        layer = linear(weight)
        with Largest() as largest:
            quantized(monkeypatch, scheme, layer, most)
        found[most] = largest.most
    assert found[sys.maxsize] >= weight.numel() > 4 * found[1024]


def test_slices_are_rows_in_order(monkeypatch):
    monkeypatch.setattr(_slices, "SLICE", 12)
    matrix, seen = torch.arange(33).reshape(11, 3), []

    def double(rows):
        seen.append(len(rows))
        return rows * 2, rows.reshape(-1)

    doubled, flat = _slices.by_rows(matrix, double)
    assert seen == [4, 4, 3]
    assert torch.equal(doubled, matrix * 2) and torch.equal(flat, matrix.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "large"), [((4, 3), False), ((5, 3), True), ((3, 100), False), ((4, 100), True)], ids=str
)
def test_what_is_large_has_more_weights_than_a_slice_and_two_rows_for_each(monkeypatch, shape, large):
    monkeypatch.setattr(_slices, "SLICE", 12)
    assert _slices.is_large(torch.zeros(shape)) is large
