"""What convolutions take is told for the kernel that PyTorch chooses: oneDNN's, or its own where the CPU has no
arithmetic in the dtype."""

import pytest
import torch
from torch import nn

from quant_core import GenerateRequest, LoadRequest, activations, load_pipeline
from quant_core.convolution_scratch import convolution_scratch

from .measured import measured_activations, peak_of

CPU = torch.device("cpu")
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
    assert convolution_scratch((*on_meta, None, *geometry), result.to("meta"), CPU) == peak - held


def test_a_decoder_that_pytorch_computes_alone_is_estimated(own_kernels):
    pipeline = load_pipeline(LoadRequest("demo", dtype="float32"))
    request = GenerateRequest("a lake", width=64, height=64, steps=1)
    assert activations(pipeline, request)["vae"] == pytest.approx(
        measured_activations(pipeline, request)["vae"], rel=0.1
    )


def test_another_device_is_not_asked_about():
    values, weight = torch.zeros(1, 8, 16, 16, device="meta"), torch.zeros(8, 8, 3, 3, device="meta")
    arguments = (values, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert convolution_scratch(arguments, values, torch.device("cuda")) == values.nbytes
