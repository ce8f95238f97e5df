"""Pipelines with a component that is quantized on disk, as diffusers itself saves it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, SpecError, generate, inspect_pipeline, load_pipeline, parse_plan

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo_model/pipeline"
SMALL = GenerateRequest("a lake at noon", width=128, height=128, steps=2, seed=3, max_sequence_length=48)


def config(method):
    if method == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


@pytest.fixture(scope="module", params=["torchao", "quanto"])
def saved(request, tmp_path_factory):
    """(method, folder) of the demo with its transformer saved in int8 by diffusers."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in DEMO.rglob("*.safetensors"):
        if weights.parent.name != "transformer":
            shutil.copy(weights, folder / weights.relative_to(DEMO))
    model = FluxTransformer2DModel.from_pretrained(
        DEMO, subfolder="transformer", quantization_config=config(request.param), torch_dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "transformer")
    return request.param, folder


def test_it_loads_without_a_plan_and_paints_what_quantizing_at_load_paints(saved):
    method, folder = saved
    scheme = {"torchao": "torchao/int8wo", "quanto": "quanto/int8"}[method]
    fresh = load_pipeline(LoadRequest("demo", parse_plan(f"transformer={scheme}")))
    expected = sha(generate(fresh, SMALL))
    # In a process of its own: quanto's int8 weights as read from a file have ended the interpreter.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.core.test_prequantized import *\n"
        "print(sha(generate(load_pipeline(LoadRequest(sys.argv[2])), SMALL)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == expected


def sha(images):
    import hashlib

    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_the_report_names_the_method_and_what_is_stored(saved):
    method, folder = saved
    reports = {report.name: report for report in inspect_pipeline(load_pipeline(LoadRequest(str(folder))))}
    assert reports["transformer"].is_quantized and reports["transformer"].method == method
    assert reports["transformer"].requested == "" and reports["transformer"].device == "cpu"
    assert reports["transformer"].footprint < 0.55 * reports["transformer"].bytes_16bit
    assert not reports["text_encoder"].is_quantized


def test_a_plan_that_names_it_is_refused_and_a_default_leaves_it(saved):
    method, folder = saved
    with pytest.raises(SpecError) as error:
        load_pipeline(LoadRequest(str(folder), parse_plan("transformer=torchao/fp8wo")))
    assert str(error.value) == (
        f"transformer cannot be quantized as torchao/fp8wo: its checkpoint is quantized already, with {method}; "
        "leave transformer out of the plan, or load the checkpoint that it was made from."
    )
    pipeline = load_pipeline(LoadRequest(str(folder), parse_plan("torchao/fp8wo")))
    assert pipeline.specs.keys() == {"text_encoder", "text_encoder_2"}
    assert pipeline.notes == {"transformer": f"stays as it is: its checkpoint is quantized already, with {method}"}
