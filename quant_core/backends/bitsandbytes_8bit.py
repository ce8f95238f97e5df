"""bitsandbytes 8-bit: LLM.int8(), whose outlier columns stay in 16 bit (arXiv 2208.07339)."""

from __future__ import annotations

import logging
from copy import copy as shallow_copy
from functools import cache

from ..backend import Backend, Option, Packed, Scheme, Upstream, Workspace
from . import _bitsandbytes
from ._slices import by_rows, is_large


@cache
def _layer_class():
    import bitsandbytes as bnb

    # Said by every layer at every step of a bfloat16 model, of something that is as it should be.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(
        lambda record: "inputs will be cast from" not in record.getMessage()
    )

    class Int8Linear(bnb.nn.Linear8bitLt):
        """A layer that takes any view as its input: bitsandbytes' kernels for CUDA take the memory of one for rows
        that follow each other, and none of its code takes four dimensions. Its matrix stays one with its weight when
        a parent moves it: bitsandbytes' own leaves the copy in its state on the old device, and drops the scales."""

        def forward(self, input):
            rows = input.reshape(-1, input.shape[-1]).contiguous()
            return super().forward(rows).reshape(*input.shape[:-1], self.out_features)

        def _apply(self, fn, recurse=True):
            scales = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
            super()._apply(fn, recurse)
            self.weight.CB = self.weight.SCB = None
            self.state.CB = self.weight.data
            self.state.SCB = scales if scales is None else scales.to(self.weight.device)  # not fn, which may cast
            return self

    return Int8Linear


def quantize(linear, recipe):
    weight = linear.weight.data
    if not is_large(weight):
        return _layer(linear, _quantized(weight, recipe), recipe)

    def quantized(rows):
        made = _quantized(rows, recipe)
        return made.data, made.SCB

    data, scales = by_rows(weight, quantized)
    return unpack(linear, Packed({"weight": data, "SCB": scales}, {}), recipe)


def _quantized(weight, recipe):
    import bitsandbytes as bnb

    weight = weight.to("cpu")  # bitsandbytes quantizes when a weight leaves the CPU
    return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(recipe.device)


def _layer(linear, weight, recipe):
    layer = _layer_class()(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=recipe.options["threshold"],
        device="meta",
    )
    layer.weight, layer.bias = weight, linear.bias
    layer.init_8bit_state()
    return layer.eval()


def pack(layer):
    """As bitsandbytes writes it: `weight`, its scales `SCB`, and that its rows are in order."""
    import torch

    scales = next(iter(hidden_tensors(layer)))
    return Packed(
        {"weight": layer.weight.data, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}, {}
    )


def unpack(linear, packed, recipe):
    import bitsandbytes as bnb

    data = packed.tensors["weight"]
    weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=packed.tensors["SCB"])
    return _layer(linear, weight, recipe)


def export(model, layers, left_out):
    recipe = next(iter(layers.values()))  # that of all
    arguments = {"load_in_8bit": True, "llm_int8_threshold": recipe.options["threshold"]}
    return _bitsandbytes.export(model, layers, left_out, arguments)


def reads(config):
    """What transformers' and diffusers' BitsAndBytesConfig says, with its defaults."""
    if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_8bit"):
        return None
    return "int8", {"threshold": float(config.get("llm_int8_threshold", 6.0))}


def dequantize(layer):
    """Rows of int8 times their greatest absolute value over 127, as arXiv 2208.07339 has it."""
    return layer.weight.data * (next(iter(hidden_tensors(layer))).view(-1, 1) / 127)


def settle(model):
    """Give layers that a checkpoint brought the same care when they are moved."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.__class__ = _layer_class()


def transfer(layer, copy, device):
    """The weight, its scales, and the state that the layer computes with."""
    import torch

    old = layer.weight
    weight = torch.Tensor._make_subclass(type(old), copy(old.data), False)
    vars(weight).update(vars(old), CB=None, SCB=None)
    state = shallow_copy(layer.state)
    state.CB, state.SCB = weight.data, copy(old.SCB if old.SCB is not None else layer.state.SCB)
    return {"weight": weight, "state": state}


def layer_format(module):
    state = getattr(module, "state", None)
    weight = getattr(module, "weight", None)
    if type(weight).__name__ != "Int8Params" or (weight.SCB is None and getattr(state, "SCB", None) is None):
        return None
    return "int8"


def workspace(recipe, rows, out_features, in_features):
    """The input in float16 and int8 and the products in int32. Measured on the CPU, where bitsandbytes multiplies
    int8 if PyTorch has AVX-512, and copies of both in float32 if not; for CUDA read from its `int8_vectorwise_quant`
    and `int8_mixed_scaled_mm`."""
    import torch

    if recipe.device.type == "cuda":
        return Workspace(rows * 3 * in_features, rows * (3 * in_features + 6 * out_features))
    products = rows * (16 * out_features + in_features + 4)
    cast = 2 if str(recipe.dtype) != "torch.float16" else 0
    unpacking = rows * ((9 + cast) * in_features + 8)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        unpacking = max(unpacking, rows * (5 * in_features + 4 * out_features + 4) + 4 * in_features * out_features)
    return Workspace(unpacking, products - rows * out_features * recipe.dtype.itemsize)


def hidden_tensors(module):
    return (module.weight.SCB if module.weight.SCB is not None else module.state.SCB,)


def upstream(name, arguments):
    options = _bitsandbytes.upstream(8, name, arguments)
    if options is None:
        return None
    skip = options.pop("skip_modules", ())
    return Upstream("int8", options, skip)


BACKEND = Backend(
    name="bitsandbytes_8bit",
    title="bitsandbytes 8-bit",
    requires=_bitsandbytes.REQUIRES,
    schemes=(Scheme("int8", bits=8, help="LLM.int8(): 8-bit rows, outlier columns in 16 bit."),),
    options=(
        Option(
            "threshold",
            6.0,
            "Activations beyond this are outliers, and their columns are computed in 16 bit; 0 switches that off.",
            minimum=0.0,
            maximum=1000.0,
        ),
    ),
    quantize=quantize,
    layer_format=layer_format,
    weight_shape=lambda module: tuple(module.weight.shape),
    stored=lambda recipe, rows, columns: rows * columns + 4 * rows,
    workspace=workspace,
    hidden_tensors=hidden_tensors,
    settle=settle,
    transfer=transfer,
    pack=pack,
    unpack=unpack,
    export=export,
    dequantize=dequantize,
    mark="SCB",
    reads=reads,
    upstream=upstream,
    dynamo={"capture_dynamic_output_shape_ops": True},
)
