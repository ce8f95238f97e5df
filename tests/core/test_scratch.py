"""What kernels take is told for those that this CPU has: a convolution's may be oneDNN's, or PyTorch's own where the
CPU has no arithmetic in the dtype."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from quant_core import GenerateRequest, LoadRequest, activations, load_pipeline
from quant_core.backend import Recipe
from quant_core.backends import get_backend
from quant_core.scratch import scratch

from ..conftest import ROOT
from .measured import measured_activations, peak_of

CPU, CONVOLUTION = torch.device("cpu"), torch.ops.aten.convolution.default
CONVOLUTIONS = [
    (nn.Conv2d(32, 64, 3, padding=1), (2, 32, 32, 32)),
    (nn.Conv2d(64, 32, 3, padding=1, stride=2), (1, 64, 32, 32)),
    (nn.Conv2d(32, 64, 1), (2, 32, 32, 32)),
    (nn.Conv2d(32, 64, 1, stride=2), (1, 32, 32, 32)),
    (nn.Conv2d(32, 64, 3, padding=1, groups=4), (1, 32, 32, 32)),
    (nn.Conv2d(64, 64, 3, padding=1, groups=64), (1, 64, 32, 32)),
    (nn.Conv2d(32, 64, 3, padding=2, dilation=2), (2, 32, 32, 32)),
    (nn.Conv1d(32, 64, 5, padding=2), (2, 32, 512)),
    (nn.Conv3d(32, 32, 3, padding=1), (2, 32, 4, 16, 16)),
    (nn.Conv3d(32, 32, 3, padding=2, dilation=2), (2, 32, 4, 16, 16)),
    (nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1), (2, 32, 256)),
    (nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), (2, 32, 16, 16)),
    (nn.ConvTranspose3d(32, 16, 3, padding=1), (2, 32, 4, 16, 16)),
]


pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")


@pytest.fixture
def own_kernels():
    """No oneDNN, so that PyTorch computes convolutions as on a CPU without arithmetic in their dtype."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=[repr(layer) for layer, _ in CONVOLUTIONS])
def test_pytorch_s_own_kernels_unfold_the_input(own_kernels, layer, shape, dtype):
    values, weight = torch.zeros(shape, dtype=dtype), torch.zeros_like(layer.weight, dtype=dtype)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
    with torch.inference_mode():
        result, peak = peak_of(lambda: torch.ops.aten.convolution(values, weight, None, *geometry))
    held = result.untyped_storage().nbytes()  # which is larger than the result where a buffer was used again
    on_meta = [tensor.to("meta") for tensor in (values, weight)]
    assert scratch(CONVOLUTION, (*on_meta, None, *geometry), result.to("meta"), CPU) == peak - held


def test_a_decoder_that_pytorch_computes_alone_is_estimated(own_kernels):
    pipeline = load_pipeline(LoadRequest("demo", dtype="float32"))
    request = GenerateRequest("a lake", width=64, height=64, steps=1)
    assert activations(pipeline, request)["vae"] == pytest.approx(
        measured_activations(pipeline, request)["vae"], rel=0.1
    )


def test_another_device_is_not_asked_about():
    values, weight = torch.zeros(1, 8, 16, 16, device="meta"), torch.zeros(8, 8, 3, 3, device="meta")
    arguments = (values, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert scratch(CONVOLUTION, arguments, values, torch.device("cuda")) == values.nbytes


def taken():
    """By name, (bytes that are told of, bytes that are taken) beside the weights by a product in bfloat16, by one of
    many and by a layer of LLM.int8()."""
    torch.set_num_threads(1)
    rows, columns, outputs = 64, 1024, 2048
    values, weight = torch.zeros(rows, columns).bfloat16(), torch.zeros(outputs, columns).bfloat16()
    many, others = torch.zeros(4, outputs, rows).bfloat16(), torch.zeros(4, rows, columns).bfloat16()
    recipe = Recipe("int8", {"threshold": 0.0}, torch.bfloat16, CPU)
    layer = get_backend("bitsandbytes_8bit").quantize(nn.Linear(columns, outputs, bias=False).bfloat16(), recipe)
    found = {}
    with torch.inference_mode():
        for operator, given in (("mm", (values, weight.t())), ("bmm", (many, others))):
            result, peak = peak_of(lambda operator=operator, given=given: getattr(torch, operator)(*given))
            told = scratch(getattr(torch.ops.aten, operator).default, given, result, CPU)
            found[operator] = told + result.nbytes, peak
        result, peak = peak_of(lambda: layer(values))
    space = get_backend("bitsandbytes_8bit").workspace(recipe, rows, outputs, columns)
    found["int8"] = max(space.unpacking, space.multiplying + result.nbytes), peak
    return found


LESSER = """
import json, torch
torch.cpu._is_avx512_bf16_supported = lambda: False
from tests.core.test_scratch import taken
print(json.dumps(taken()))
"""


def test_a_cpu_without_arithmetic_in_bfloat16_is_told_of():
    """One whose oneDNN sums in float32, and whose bitsandbytes multiplies in it."""
    lesser = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", LESSER]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | lesser, capture_output=True, text=True, check=True)
    for name, (told, really) in json.loads(done.stdout.splitlines()[-1]).items():
        assert told == pytest.approx(really, rel=0.1), name
