"""What loading a quantized component costs: diffusers alone, our first load and our second, out of the store.

python benchmarks/load.py [--quick] [--check] [--size 2B] [--only torchao/int8wo ...] [--save]

A pipeline with a random transformer of Flux's shape and tiny other components is made in a folder. Each way to load it
runs in processes of its own, which take turns; of seconds the least counts, of bytes the most. All files are in
the operating system's cache. Every stored tensor is read after a load, as part of its seconds, since what is mapped is
else not there yet. Seconds are of the transformer alone, after the imports; `whole` is all of load_pipeline, too. RAM
is the process's own (anonymous), above what it had before the load. `files` is safetensors alone: each tensor of
the stored files copied into memory. diffusers refuses bitsandbytes on a CPU and cannot make GGUF: the
refusal is taken away here, and GGUF has no figure of its.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from machine import machine
from random_pipeline import SHAPES, make

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 2**20
WAYS = ("plain", "first", "second", "files", "plain image", "our image")
BACKENDS = (
    "bitsandbytes_4bit/nf4",
    "bitsandbytes_8bit/int8",
    "torchao/int8wo",
    "torchao/fp8wo",
    "quanto/int8",
    "quanto/float8",
    "quanto/int4",
    "gguf/Q8_0",
    "gguf/Q4_0",
)


class Target(NamedTuple):
    """The most that a figure may be of another."""

    what: str
    base: str
    most: float
    formula: Callable[[dict], float]  # of way -> figures

    def ratio(self, seen: dict) -> float | None:
        """What it is, None where a way has no figures."""
        try:
            return self.formula(seen)
        except KeyError:
            return None


TARGETS = (
    Target(
        "first load",
        "(1.15 plain diffusers + write)",
        1.0,
        lambda seen: seen["first"]["seconds"] / (1.15 * seen["plain"]["seconds"] + seen["files"]["write"]),
    ),
    Target("second load", "plain diffusers", 0.1, lambda seen: seen["second"]["seconds"] / seen["plain"]["seconds"]),
    Target("second load", "its files alone", 1.3, lambda seen: seen["second"]["seconds"] / seen["files"]["seconds"]),
    Target(
        "peak of the first load", "footprint", 1.25, lambda seen: seen["first"]["peak"] / seen["first"]["footprint"]
    ),
    Target(
        "RAM after the first load", "footprint", 1.05, lambda seen: seen["first"]["after"] / seen["first"]["footprint"]
    ),
    Target(
        "RAM after the second load",
        "footprint",
        1.05,
        lambda seen: seen["second"]["after"] / seen["second"]["footprint"],
    ),
    Target(
        "first image", "plain diffusers", 1 / 3, lambda seen: seen["our image"]["image"] / seen["plain image"]["image"]
    ),
)


def measure(way: str, spec: str, folder: Path, store: Path) -> dict:
    """The figures of one way to load, from a fresh process, or the `error` it ended with."""
    arguments = [way, spec, str(folder), str(store), str(time.monotonic())]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/one_load.py", *arguments], capture_output=True, text=True
    )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it died"]
    return {"error": lines[-1]} if done.returncode else json.loads(lines[-1])


def merge(runs: list[dict]) -> dict:
    """Least seconds and most bytes of some runs."""
    if wrong := [run for run in runs if "error" in run]:
        return wrong[0]
    most = ("peak", "after", "footprint", "stored", "kind")
    return {key: (max if key in most else min)(run[key] for run in runs) for key in runs[0]}


def check(spec: str, seen: dict) -> Iterator[str]:
    """The targets that a backend misses."""
    for way, found in seen.items():
        if "error" in found and not way.startswith("plain"):
            yield f"{spec}: {way} failed: {found['error']}"
    for way, kind in (("first", "stored"), ("second", "store")):
        if seen[way].get("kind", kind) != kind:
            yield f"{spec}: the {way} load was {seen[way]['kind']!r} instead of {kind!r}"
    for target in TARGETS:
        if (found := target.ratio(seen) or 0) > target.most:
            yield f"{spec}: {target.what} is {found:.3f} of {target.base}, at most {target.most:.3g}"


def worst(found: dict[str, dict]) -> Iterator[str]:
    """Each target with the backend that comes nearest to missing it, or misses it most."""
    for target in TARGETS:
        ratios = {spec: value for spec, seen in found.items() if (value := target.ratio(seen)) is not None}
        if ratios:
            spec = max(ratios, key=ratios.__getitem__)
            yield f"{target.what}: {ratios[spec]:.3f} of {target.base} at worst ({spec}), at most {target.most:.3g}"


# heading -> (scale, decimals, column -> (way, figure)), with the targets whose ratios are columns, too
TABLES = {
    "seconds": (
        1,
        3,
        {
            "plain": ("plain", "seconds"),
            "first": ("first", "seconds"),
            "second": ("second", "seconds"),
            "files": ("files", "seconds"),
            "write": ("files", "write"),
            "first, whole": ("first", "whole"),
            "second, whole": ("second", "whole"),
        },
        TARGETS[:3],
    ),
    "RAM in MiB": (
        MIB,
        0,
        {
            "footprint": ("first", "footprint"),
            "stored": ("files", "stored"),
            "plain, peak": ("plain", "peak"),
            "first, peak": ("first", "peak"),
            "second, peak": ("second", "peak"),
            "plain, after": ("plain", "after"),
            "first, after": ("first", "after"),
            "second, after": ("second", "after"),
        },
        TARGETS[3:6],
    ),
    "first image in seconds": (
        1,
        2,
        {
            "plain": ("plain image", "image"),
            "second": ("our image", "image"),
            "plain, with imports": ("plain image", "with imports"),
            "second, with imports": ("our image", "with imports"),
        },
        TARGETS[6:],
    ),
}


def tables(found: dict[str, dict]) -> Iterator[str]:
    """The figures as lines of Markdown."""
    for heading, (scale, decimals, columns, targets) in TABLES.items():
        names = [*columns, *(f"{target.what} / {target.base}" for target in targets)]
        yield f"| {' | '.join([heading, *names])} |"
        yield f"|---|{'---:|' * len(names)}"
        for spec, seen in found.items():
            values = [(seen[way].get(key), scale, decimals) for way, key in columns.values()]
            values += [(target.ratio(seen), 1, 3) for target in targets]
            cells = ("-" if value is None else f"{value / unit:.{places}f}" for value, unit, places in values)
            yield f"| {' | '.join([spec, *cells])} |"
        yield ""


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 million weights and one run instead of three")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--size", choices=SHAPES, help="weights of the transformer; 500M if not --quick")
    parser.add_argument("--only", nargs="+", choices=BACKENDS, default=BACKENDS, help="these backends")
    parser.add_argument("--repeat", type=int, help="runs of each; 3 if not --quick")
    parser.add_argument("--folder", type=Path, help="keep the pipeline there, and use it again")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/load-SIZE.md")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    size = args.size or ("60M" if args.quick else "500M")
    repeat = args.repeat or (1 if args.quick else 3)
    runs: dict[str, dict] = {spec: {way: [] for way in WAYS} for spec in args.only}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)) / size
        if not folder.exists():
            from quant_core.availability import quiet_libraries

            making = folder.with_name(f"{size}.part")
            shutil.rmtree(making, ignore_errors=True)
            with quiet_libraries():
                make(size, making)
            making.rename(folder)
        if any(spec.startswith("quanto/") for spec in args.only):  # which compiles this at its very first use
            build = "from optimum.quanto.library.extensions.cpp import ext; ext.lib"
            subprocess.run([sys.executable, "-c", build], capture_output=True)
        for file in folder.rglob("*.safetensors"):
            with file.open("rb") as stream:
                while stream.read(16 * MIB):
                    pass
        for _ in range(repeat):
            for spec in args.only:
                with tempfile.TemporaryDirectory(dir=folder.parent) as store:
                    for way in WAYS:
                        unable = way.startswith("plain") and spec.startswith("gguf/")
                        runs[spec][way].append({} if unable else measure(way, spec, folder, Path(store)))
                print(spec, json.dumps({way: done[-1] for way, done in runs[spec].items()}), file=sys.stderr)
    found = {spec: {way: merge(done) for way, done in ways.items()} for spec, ways in runs.items()}
    missed = [line for spec, seen in found.items() for line in check(spec, seen)]
    said = [f"{size} weights, runs of each: {repeat}", "", *tables(found)]
    for spec, seen in found.items():
        if "error" in seen["plain"]:
            said += [f"{spec}: plain diffusers does not load it: {seen['plain']['error']}", ""]
    said += ["Missed:", "", *(f"- {line}" for line in missed), ""] if missed else ["All targets are met.", ""]
    said += [f"- {line}" for line in worst(found)]
    print("\n".join(said))
    if args.save:
        command = f"python benchmarks/load.py --size {size} --repeat {repeat}"
        head = ["# What loading a quantized component costs", "", f"`{command}`, {machine()}.", ""]
        (ROOT / f"benchmarks/results/load-{size}.md").write_text("\n".join([*head, *said, ""]))
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
