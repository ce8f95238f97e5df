"""What speeding up costs and brings on a CPU: ours beside bare diffusers with the same options.

python benchmarks/cpu.py [--quick] [--check] [--scale 500M] [--save]

A pipeline with a random transformer of Flux's shape in 16 bit and tiny other components is made in a folder.
Overhead: the bare call and ours take turns in one process, each on weights of its own, text encoders included; the
median of the ratios of processor time counts. Graphs: those that torch.compile traces in runs that differ, in a first
process and in a second one, which finds the code of the first. Step caches: what they reuse and the time that leaves;
the weights are random, so what depends on how much a pass changes says nothing of real ones. Memory: the most that a
process of its own holds. Targets: OVERHEAD and MEMORY of diffusers; no graph for a new seed, prompt or number of
steps, or for a third size; no code made in a second process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import machine  # noqa: E402
from random_pipeline import SHAPES, make  # noqa: E402

OVERHEAD, MEMORY = 1.02, 1.02  # of diffusers
SIZE, STEPS = 128, 4
CACHED_STEPS = 12
ANEW = ("first run", "new size")  # what may be compiled, once
MIB = 2**20


def ask(kind: str, folder: Path, steps: int, turns: int, *more: str) -> Any:
    """The figures of a fresh process, or its `error`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # else code is kept there, and not in the store
    numbers = map(str, (SIZE, steps, turns))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/cpu_run.py", kind, folder, folder.parent / "store", *numbers, *more],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it died"]
    return {"error": lines[-1]} if done.returncode else json.loads(lines[-1])


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All figures, by what they are of."""
    turns, schemes = (5, ["none"]) if quick else (15, ["none", "torchao/int8wo"])
    found: dict[str, Any] = {}
    asked = {
        "overhead, eager": ("overhead", STEPS, turns, "off"),
        "graphs, first process": ("graphs", STEPS, 1),
        "graphs, second process": ("graphs", STEPS, 1),
        "overhead, compiled": ("overhead", STEPS, turns, "blocks"),
        "caches": ("cached", CACHED_STEPS, 1 if quick else 3),
    }
    asked |= {
        f"memory, {kind}, {scheme}": ("memory", STEPS, 1, kind, scheme)
        for scheme in schemes
        for kind in ("diffusers", "ours", "streamed")
    }
    for name, (kind, steps, count, *more) in asked.items():
        found[name] = ask(kind, folder, steps, count, *more)
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def ratio(found: dict[str, Any]) -> float:
    """The median over the turns of ours to diffusers."""
    return statistics.median(ours / bare for ours, bare in zip(found["ours"], found["diffusers"], strict=True))


def report(found: dict[str, Any]) -> Iterator[str]:
    """The figures as Markdown."""
    right = {name: figures for name, figures in found.items() if "error" not in figures}
    yield from (
        "| seconds of processor time | diffusers | ours | ratio | pictures differ by |",
        "|---|---:|---:|---:|---:|",
    )
    for name, figures in right.items():
        if name.startswith("overhead"):
            seconds = [f"{statistics.median(figures[side]):.3f}" for side in ("diffusers", "ours")]
            yield f"| {name} | {' | '.join(seconds)} | {ratio(figures):.3f} | {figures['difference']:.4f} |"
    yield from ("", "| run | process | graphs | code made anew | seconds |", "|---|---|---:|---:|---:|")
    for name, runs in right.items():
        for run in runs if name.startswith("graphs") else ():
            process = name.removeprefix("graphs, ")
            yield f"| {run['run']} | {process} | {run['graphs']} | {run['compiled']} | {run['seconds']:.2f} |"
    if caches := right.get("caches"):
        base = statistics.median(caches["off"]["seconds"])
        yield from ("", "| step cache | passes reused | of | time of that without |", "|---|---:|---:|---:|")
        for name, figures in caches.items():
            if "cache" in figures:
                of = figures["cache"]
                share = statistics.median(figures["seconds"]) / base
                yield f"| {name} | {of['reused']} | {of['passes']} | {share:.3f} |"
    yield from ("", "| MiB at most | all | without mapped files | of diffusers |", "|---|---:|---:|---:|")
    for name, figures in right.items():
        if name.startswith("memory"):
            base = right.get(f"memory, diffusers, {name.split(', ')[2]}")
            share = f"{figures['peak'] / base['peak']:.3f}" if base else "-"
            sizes = " | ".join(f"{figures[kind] / MIB:.0f}" for kind in ("peak", "own"))
            yield f"| {name.removeprefix('memory, ')} | {sizes} | {share} |"


def missed(found: dict[str, Any]) -> Iterator[str]:
    """The targets that are missed, and what failed."""
    yield from (f"{name} failed: {figures['error']}" for name, figures in found.items() if "error" in figures)
    right = {name: figures for name, figures in found.items() if "error" not in figures}
    for name, figures in right.items():
        if name.startswith("overhead") and ratio(figures) > OVERHEAD:
            yield f"{name} is {ratio(figures):.3f} of diffusers, at most {OVERHEAD}"
        if name == "overhead, eager" and figures["difference"]:
            yield f"{name}: the pictures differ by {figures['difference']:.4f}"
        for run in figures if name.startswith("graphs") else ():
            if run["graphs"] and run["run"] not in ANEW:
                yield f"{name}: {run['run']} traces {run['graphs']} graphs, at most 0"
            if run["compiled"] and name == "graphs, second process":
                yield f"{name}: {run['run']} makes code for {run['compiled']} graphs, at most 0"
            if run["eager"]:
                yield f"{name}: {run['run']} is not compiled: {run['eager']}"
    whole, bare = right.get("memory, ours, none"), right.get("memory, diffusers, none")
    if whole and bare and whole["peak"] > MEMORY * bare["peak"]:
        yield f"peak memory in 16 bit is {whole['peak'] / bare['peak']:.3f} of diffusers, at most {MEMORY}"


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 million weights, 5 turns instead of 15")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--scale", choices=SHAPES, help="weights of the transformer; 500M if not --quick")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-SCALE.md")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    scale = args.scale or ("60M" if args.quick else "500M")
    with tempfile.TemporaryDirectory() as scratch:
        from quant_core.availability import quiet_libraries

        folder = Path(scratch, scale)
        with quiet_libraries():
            make(scale, folder)
        found = measure(folder, args.quick)
    wrong = list(missed(found))
    said = [f"{scale} weights, {SIZE} x {SIZE} pixels, {STEPS} steps; {CACHED_STEPS} for step caches.", ""]
    said += [*report(found), ""]
    said += ["Missed:", "", *(f"- {line}" for line in wrong)] if wrong else ["All targets are met."]
    print("\n".join(said))
    if args.save:
        command = f"python benchmarks/cpu.py {'--quick ' * args.quick}--scale {scale} --save"
        head = ["# Speed on a CPU", "", f"`{command}`, {machine()}.", ""]
        (ROOT / f"benchmarks/results/cpu-{scale}.md").write_text("\n".join([*head, *said, ""]), encoding="utf-8")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
