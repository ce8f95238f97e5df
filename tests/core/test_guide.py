"""The snippets of diffusers' guide to compiling and offloading: what README says is the same is."""

import re
import shlex
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from quant_core import compiled_forward
from quant_core.__main__ import main
from quant_core.request import call_arguments

from .small_requests import load, small

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
PLAN = "transformer=bitsandbytes_4bit/nf4,text_encoder_2=bitsandbytes_4bit/nf4"
CPU = torch.device("cpu")


def eager(pipe):
    pass


def compiled(pipe):
    pipe.transformer.compile(fullgraph=True, backend="eager")


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer.compile(backend="eager")


def offloaded_blocks(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def in_groups(pipe):
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    pipe.transformer.compile(backend="eager")


GUIDE = {  # what README says is the same -> what the guide does, for a CPU and without making code
    f"--plan {PLAN}": eager,
    "--compile whole,mode=max-autotune-no-cudagraphs,full_graph": compiled,
    "--offload model --compile whole": offloaded,
    "--offload model --compile blocks,full_graph": offloaded_blocks,
    "--offload managed --compile blocks": in_groups,
}


def test_readme_names_each_of_them():
    (table,) = re.findall(r"\| diffusers' guide \|.*?\n\n", README, re.DOTALL)
    assert re.findall(r"\| `(--[^`]+)` \|", table) == list(GUIDE)


@pytest.mark.parametrize("ours", GUIDE)
def test_it_gives_the_same_picture(tiny, tmp_path, monkeypatch, capsys, ours):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    plain = load(tiny, "demo", PLAN)
    GUIDE[ours](plain.pipe)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1000):
        (theirs,) = plain.pipe(**call_arguments(plain, small("demo")) | {"output_type": "np"}).images
    torch._dynamo.reset()
    out = tmp_path / "ours.png"
    said = shlex.split(ours)
    plan = [] if "--plan" in said else ["--plan", PLAN]
    size = ["--width", "32", "--height", "32", "--steps", "2", "--max-sequence-length", "16"]
    assert main(["generate", "demo", *plan, *said, "--prompt", "a cat", *size, "--out", str(out)]) == 0
    assert numpy.array_equal(numpy.asarray(Image.open(out)), (theirs * 255).round().astype("uint8"))
    told = capsys.readouterr().out
    assert "does not compile" not in told
    for part in ("--compile ", "--offload model"):  # managed has nothing to say
        assert (part[2:] in told) == (part in ours)
