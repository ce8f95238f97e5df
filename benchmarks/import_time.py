"""What the pack adds to ComfyUI's start: milliseconds to import its nodes, and the libraries that brings in.

python benchmarks/import_time.py [--quick] [--check]

torch is imported first, as ComfyUI has it anyway; ComfyUI itself is the stand-in of the tests, so that only the pack
is measured. Target: at most 0.25 of the time that importing torch takes in the same process, and none of the heavy
libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("diffusers", "transformers", "accelerate", "bitsandbytes", "torchao", "optimum", "gguf")
TARGET = 0.25  # of the time of `import torch`

_CHILD = """
import importlib.util, json, sys, time
sys.path.insert(0, {fake!r})
began = time.perf_counter()
import torch
torch_done = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", {entry!r}, submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
import asyncio
extension = asyncio.run(pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
schemas = [node.define_schema() for node in nodes]
done = time.perf_counter()
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps({{"torch": torch_done - began, "pack": done - torch_done, "heavy": heavy, "nodes": len(schemas)}}))
"""


def measure() -> dict:
    """One fresh process: seconds of `import torch`, of the pack's nodes and schemas, and the heavy libraries seen."""
    code = _CHILD.format(
        fake=str(ROOT / "tests/fake_comfy"), entry=str(ROOT / "__init__.py"), root=str(ROOT), heavy=HEAVY
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Print the medians; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 runs instead of 9")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    runs = [measure() for _ in range(3 if args.quick else 9)]
    pack = statistics.median(run["pack"] for run in runs)
    ratio = statistics.median(run["pack"] / run["torch"] for run in runs)
    heavy = sorted({name for run in runs for name in run["heavy"]})
    print(f"nodes: {runs[0]['nodes']}, runs: {len(runs)}")
    print(f"importing the pack and all schemas: {pack * 1000:.0f} ms, {ratio:.3f} of `import torch` (target {TARGET})")
    print(f"heavy libraries imported: {', '.join(heavy) or 'none'} (target none)")
    return int(args.check and (ratio > TARGET or bool(heavy)))


if __name__ == "__main__":
    sys.exit(main())
