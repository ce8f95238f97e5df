"""Layers that a backend must not or cannot quantize are left out and listed, and the pipeline runs."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, generate, inspect_pipeline, load_pipeline, parse_plan

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = "its model keeps it in float32"
EACH = ["bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0", "quanto/int8", "quanto/int4", "quanto/float8"]
EACH += ["torchao/int8wo", "torchao/fp8wo", "torchao/nvfp4wo"]

VIDEO = GenerateRequest("a cat", width=32, height=32, steps=2, extra={"num_frames": 5})
IMAGE = GenerateRequest("a cat", width=32, height=32, steps=2)


def load(folder, plan):
    pipeline = load_pipeline(LoadRequest(str(folder), parse_plan(plan)))
    return pipeline, {report.name: report for report in inspect_pipeline(pipeline)}


@pytest.mark.parametrize("scheme", EACH)
def test_modules_that_a_model_keeps_in_float32_are_kept_by_every_backend(tiny, scheme):
    pipeline, reports = load(tiny("wan"), f"transformer={scheme}?skip=none")
    kept = {"condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2"}
    assert reports["transformer"].left_out == dict.fromkeys(kept, FLOAT32)
    model = pipeline.pipe.transformer
    for name in kept:
        assert type(model.get_submodule(name)) is torch.nn.Linear
    for name, parameter in model.named_parameters():
        if any(part in ("time_embedder", "scale_shift_table", "norm2") for part in name.split(".")):
            assert parameter.dtype == torch.float32, name
    assert generate(pipeline, VIDEO).isfinite().all()


ROWS_OF_682 = {  # Z-Image's feed-forward: w1 and w3 have 682 rows, w2 has 682 columns
    "bitsandbytes_4bit/nf4": (0, ""),
    "bitsandbytes_8bit/int8": (0, ""),
    "gguf/Q8_0": (1, "in_features 682 is not a multiple of 32"),
    "gguf/Q4_0": (1, "in_features 682 is not a multiple of 32"),
    "quanto/float8": (0, ""),
    "quanto/int2": (1, "in_features 682 is not a multiple of 32"),
    "quanto/int4": (1, "in_features 682 is not a multiple of 32"),
    "torchao/int8wo": (0, ""),
    "torchao/fp8wo": (0, ""),
    "torchao/nvfp4wo": (3, "out_features 682 is not a multiple of 16"),
}


@pytest.mark.parametrize(("scheme", "of_three", "reason"), [(key, *value) for key, value in ROWS_OF_682.items()])
def test_sizes_that_a_scheme_does_not_divide_are_left_out_and_not_fatal(tiny, scheme, of_three, reason):
    pipeline, reports = load(tiny("zimage"), f"transformer={scheme}?skip=none")
    report = reports["transformer"]
    left_out = {name: why for name, why in report.left_out.items() if ".feed_forward." in name}
    blocks = 3  # one layer, one refiner of noise and one of context
    assert len(left_out) == of_three * blocks
    assert not reason or reason in left_out.values()
    linear = {name for name, part in pipeline.pipe.transformer.named_modules() if isinstance(part, torch.nn.Linear)}
    assert sum(report.formats.values()) + len(report.left_out) == len(linear)
    assert set(report.left_out) <= linear
    assert generate(pipeline, IMAGE).isfinite().all()


def digest(folder):
    """Of an image by quanto int8, whose kernel for the CPU ends the interpreter where it meets 682 columns."""
    torch.set_num_threads(1)
    pipeline, reports = load(folder, "transformer=quanto/int8")
    left_out = reports["transformer"].left_out
    assert set(left_out.values()) == {"in_features 682 is not a multiple of 16"}, left_out
    assert len(left_out) == 3 and all(name.endswith(".w2") for name in left_out)
    return hashlib.sha256(generate(pipeline, IMAGE).numpy().tobytes()).hexdigest()


def test_quanto_int8_leaves_out_columns_that_its_kernel_cannot_read(tiny):
    code = f"from tests.core.test_layers_left_out import digest; print(digest({str(tiny('zimage'))!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout.strip()) == 64


def test_what_is_left_out_is_in_the_table_for_people(tiny):
    from quant_core import format_report

    pipeline, _ = load(tiny("wan"), "transformer=torchao/int8wo?skip=proj_out")
    text = format_report(inspect_pipeline(pipeline))
    assert "3 left out" in text
    assert f"transformer: 2 left out, {FLOAT32}: condition_embedder.time_embedder.linear_1, " in text
    assert "transformer: 1 left out, skipped by the plan: proj_out" in text
    assert max(map(len, text.splitlines())) < 200
