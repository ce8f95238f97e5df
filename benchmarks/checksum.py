"""What it costs to know a checkpoint by all its bytes: the first time, and from then on.

python benchmarks/checksum.py [--quick] [--check]

A safetensors file of random weights is in the operating system's cache. Copying its tensors into memory, making its
checksum and finding that again take turns; of seconds the least counts. Targets: the first checksum takes at most what
copying takes, since quantizing reads the same weights and does more with them, and finding it again 0.01 of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from machine import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGETS = {"first": 1.0, "again": 0.01}  # of copying the tensors


def seconds(what: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def measure(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """The least seconds of each way, of `count` tensors of 32 MiB."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from quant_core import digests

    file = folder / "weights.safetensors"
    generator = torch.Generator().manual_seed(0)
    made = {f"{n}": torch.randn(4096, 4096, generator=generator).bfloat16() for n in range(count)}
    save_file(made, file)
    made.clear()

    def copy() -> None:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name).clone()

    def check(memory: str) -> str:
        return digests.checksum(file, folder / memory, lambda: None)

    time.sleep(2 * digests._RESTED)  # a file that was just written is not remembered
    check("kept")
    found: dict[str, list[float]] = {"copy": [], "first": [], "again": []}
    for number in range(rounds):
        found["copy"].append(seconds(copy))
        found["first"].append(seconds(lambda number=number: check(f"{number}")))
        found["again"].append(seconds(lambda: check("kept")))
    return {way: min(times) for way, times in found.items()}


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MiB and 3 rounds instead of 2 GiB and 7")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    count, rounds = (8, 3) if args.quick else (64, 7)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), count, rounds)
    size = count / 32  # GiB
    print(machine())
    print(f"copying {size:g} GiB of tensors: {found['copy'] * 1000:.1f} ms, {size / found['copy']:.1f} GiB/s")
    missed = False
    for way, most in TARGETS.items():
        ratio = found[way] / found["copy"]
        missed |= ratio > most
        print(f"checksum, {way}: {found[way] * 1000:.1f} ms, {ratio:.4f} of copying (target {most})")
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
