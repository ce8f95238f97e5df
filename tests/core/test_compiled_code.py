"""The code that torch.compile made: found again at the next start, and kept where nobody else can write."""

import json
import os
import subprocess
import sys
from pathlib import Path

from quant_core import compiling
from quant_core.compiled_code import kept_in

from .small_requests import load

ROOT = Path(__file__).resolve().parents[2]


def test_quantizing_leaves_the_process_s_settings_alone(tiny):
    """torchao would set Inductor's, by which compiled code is found again."""
    import torch._inductor.config as inductor

    before = inductor.save_config_portable()
    pipeline = load(tiny, "demo", "torchao/int8wo")
    assert inductor.save_config_portable() == before
    _, settings = compiling._settings(pipeline)
    assert settings["coordinate_descent_tuning"] and not settings["pattern_matcher"]


RUN = """
import json, sys, torch
torch.set_num_threads(1)
from quant_core import *
pipeline = load_pipeline(LoadRequest(sys.argv[4], parse_plan(sys.argv[1]), store=sys.argv[2]))
if sys.argv[3]:
    moved = optimize(pipeline, parse_optimization(offload="model"))
    generate(moved, GenerateRequest("a dog", width=16, height=16, steps=1))
request = GenerateRequest("a cat", width=16, height=16, steps=2)
handle = optimize(pipeline, parse_optimization(compile="blocks"))
ours, plain = generate(handle, request), generate(pipeline, request)
print(json.dumps({**handle.reports["compile"].data(), "distance": (ours - plain).abs().mean().item()}))
"""


def test_a_second_start_makes_no_code(tiny, tmp_path):
    """By Inductor, for real."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    found = []
    for before in ("", "offloaded"):
        command = [sys.executable, "-c", RUN, "torchao/int8wo", str(tmp_path), before, str(tiny("sd"))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["graphs"] == second["graphs"] > 0
    assert (first["compiled"], second["compiled"]) == (first["graphs"], 0)
    assert first["distance"] == second["distance"] < 0.02, "as far as 16 bit is from itself compiled"
    assert any((tmp_path / "compiled").rglob("*.so"))
    listed = subprocess.run(
        [sys.executable, "-m", "quant_core", "store", "list", "--store", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "compiled code" in listed.stdout


def test_code_is_kept_only_where_nobody_else_can_write(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with kept_in(tmp_path):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert (tmp_path / "compiled").stat().st_mode & 0o077 == 0
    for folder in (tmp_path / "compiled", tmp_path):
        folder.chmod(0o777)
        with kept_in(tmp_path):
            assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        folder.chmod(0o700)
    assert caplog.text.count("which others can write") == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with kept_in(tmp_path / "store"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not (tmp_path / "store").exists()
