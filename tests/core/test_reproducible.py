"""The same plan and seed give the same picture, bit for bit: in another process, after moves, in any grad mode."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, Placement, generate, load_pipeline, parse_plan

from .simulated_device import CPU, DEVICE

ROOT = Path(__file__).resolve().parents[2]
PLANS = [
    "torchao/int8wo",
    "bitsandbytes_4bit/nf4",
    "gguf/Q8_0",
    "transformer=bitsandbytes_8bit/int8,text_encoder_2=quanto/float8",
]
REQUEST = GenerateRequest("a green triangle", width=128, height=128, steps=2, seed=123)


def digest(plan):
    torch.set_num_threads(1)
    images = generate(load_pipeline(LoadRequest("demo", parse_plan(plan))), REQUEST)
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_a_fresh_process_makes_the_same_picture(tmp_path):
    code = "import sys; from tests.core.test_reproducible import digest; print(*map(digest, sys.argv[1:]), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code, *PLANS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    expected = [digest(plan) for plan in PLANS]
    assert done.stdout.split() == expected
    assert len(set(expected)) == len(PLANS), "different plans make different pictures"


@pytest.mark.parametrize("plan", PLANS)
def test_the_seed_decides_and_inference_mode_does_not(plan):
    inside = torch.inference_mode()
    with inside:
        pipeline = load_pipeline(LoadRequest("demo", parse_plan(plan)))
        first = generate(pipeline, REQUEST)
        for module in pipeline.models.values():
            placement = Placement(module, DEVICE, CPU)
            placement.load(0)
            placement.load(placement.size)
            placement.evict()
    with torch.enable_grad():
        assert torch.equal(generate(pipeline, REQUEST), first)
    other = GenerateRequest(REQUEST.prompt, width=128, height=128, steps=2, seed=124)
    assert not torch.equal(generate(pipeline, other), first)
    assert torch.equal(generate(load_pipeline(LoadRequest("demo", parse_plan(plan))), REQUEST), first)
