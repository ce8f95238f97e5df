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
import gc
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 2**20
SHARD = 2**30  # bytes of a file, of a transformer that takes more than two
IMAGE = {"width": 32, "height": 32, "max_sequence_length": 16}
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
SHAPES = {  # weights -> heads, their width, double blocks, single blocks
    "60M": (8, 64, 3, 8),
    "500M": (16, 64, 7, 15),
    "2B": (16, 128, 6, 17),
}
TARGETS = (  # what, of what, the most, as computed from: way -> figures
    (
        "first load",
        "(1.15 plain diffusers + write)",
        1.0,
        lambda seen: seen["first"]["seconds"] / (1.15 * seen["plain"]["seconds"] + seen["files"]["write"]),
    ),
    ("second load", "plain diffusers", 0.1, lambda seen: seen["second"]["seconds"] / seen["plain"]["seconds"]),
    ("second load", "its files alone", 1.3, lambda seen: seen["second"]["seconds"] / seen["files"]["seconds"]),
    ("peak of the first load", "footprint", 1.25, lambda seen: seen["first"]["peak"] / seen["first"]["footprint"]),
    ("RAM after the first load", "footprint", 1.05, lambda seen: seen["first"]["after"] / seen["first"]["footprint"]),
    (
        "RAM after the second load",
        "footprint",
        1.05,
        lambda seen: seen["second"]["after"] / seen["second"]["footprint"],
    ),
    ("first image", "plain diffusers", 1 / 3, lambda seen: seen["our image"]["image"] / seen["plain image"]["image"]),
)


def make(size: str, folder: Path) -> None:
    """A FluxPipeline with a random transformer of that size, in bfloat16 and always with the same weights."""
    import diffusers
    import torch
    import transformers

    from tests.core.tiny_pipelines import T5_SIZES, clip_tokenizer, image_vae, t5, t5_tokenizer

    heads, width, double, single = SHAPES[size]
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    last = len(tokenizer) - 1
    words = {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **words))
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            num_layers=double,
            num_single_layers=single,
            in_channels=64,
            joint_attention_dim=T5_SIZES["d_model"],
            pooled_projection_dim=sizes["hidden_size"],
            axes_dims_rope=(width // 8, width * 7 // 16, width * 7 // 16),
        )
    transformer.save_config(folder / "transformer")
    write_weights({name: tensor.shape for name, tensor in transformer.state_dict().items()}, folder / "transformer")
    diffusers.FluxPipeline(
        transformer=None,
        vae=image_vae(16),
        text_encoder=encoder,
        text_encoder_2=t5(),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).to(torch.bfloat16).save_pretrained(folder)
    index = folder / "model_index.json"
    named = json.loads(index.read_text()) | {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    index.write_text(json.dumps(named))


def write_weights(shapes: dict, folder: Path) -> None:
    """Random weights in safetensors' format (its README, Format), one tensor in memory at a time."""
    import torch

    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    most = SHARD if sum(sizes.values()) > 2 * SHARD else sum(sizes.values())
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if sum(map(sizes.get, shards[-1])) + size > most:
            shards.append([])
        shards[-1].append(name)
    stem, homes = "diffusion_pytorch_model", {}
    for number, names in enumerate(shards, 1):
        tag = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + sizes[name]]}
            homes[name], at = f"{stem}{tag}.safetensors", at + sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"{stem}{tag}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                weight = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02)
                file.write(weight.view(torch.int16).numpy().data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def anonymous() -> int:
    """Bytes of memory that are this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def watched() -> Iterator[dict]:
    """Measures a block: the `peak` of anonymous memory and that `after` it, in bytes above what was there before."""
    from quant_core.allocator import give_back

    gc.collect()
    give_back()
    before, done, seen = anonymous(), threading.Event(), [0]

    def watch():
        while not done.wait(0.005):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found: dict = {}
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        seen.append(anonymous())
    found |= {"peak": max(seen) - before, "after": seen[-1] - before}


def read(tensor) -> None:
    """Every byte of a plain tensor, read once, as it lies in memory."""
    import torch

    with torch._C.DisableTorchFunctionSubclass():  # GGUF's class would take the sum for packed weights
        order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
        data = tensor.permute(order).reshape(-1).view(torch.uint8)
        whole = data.numel() % 8 == 0 and data.storage_offset() % 8 == 0
        (data.view(torch.int64) if whole else data).sum()


def plain(folder: Path, spec: str):
    """The transformer as diffusers alone loads it."""
    import diffusers
    import torch

    match spec.split("/"):
        case "bitsandbytes_4bit", kind:
            config = diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16
            )
        case "bitsandbytes_8bit", _:
            config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
        case "torchao", scheme:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

            kinds = {"int8wo": Int8WeightOnlyConfig, "fp8wo": Float8WeightOnlyConfig}
            config = diffusers.TorchAoConfig(kinds[scheme]())
        case "quanto", dtype:
            config = diffusers.QuantoConfig(weights_dtype=dtype)
    if spec.startswith("bitsandbytes") and not torch.cuda.is_available():
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            quantizer.validate_environment = lambda self, *args, **kwargs: None
            quantizer.update_device_map = lambda self, device_map: device_map or {"": "cpu"}
    return diffusers.FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=config, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    )


def ours(folder: Path, spec: str, store: Path):
    """The pipeline as we load it."""
    from quant_core import LoadRequest, load_pipeline, parse_plan

    return load_pipeline(LoadRequest(str(folder), parse_plan(f"transformer={spec}"), store=store))


def load(way: str, spec: str, folder: Path, store: Path) -> dict:
    """Seconds and bytes of one load."""
    from quant_core import LoadRequest, footprint, load_pipeline
    from quant_core.inspection import stored_tensors

    load_pipeline(LoadRequest("demo"))  # what libraries import when they load for the first time
    with watched() as found:
        began = time.perf_counter()
        if way == "plain":
            module = plain(folder, spec)
            found["whole"] = found["own"] = time.perf_counter() - began
        else:
            pipeline = ours(folder, spec, store)
            found["whole"] = time.perf_counter() - began
            module, origin = pipeline.pipe.transformer, pipeline.origins["transformer"]
            found |= {"own": origin.seconds, "kind": origin.kind}
        began = time.perf_counter()
        for tensor in stored_tensors(module):
            read(tensor)
        touching = time.perf_counter() - began
    found["seconds"] = found.pop("own") + touching
    found["footprint"] = footprint(module) if way == "plain" else sum(map(footprint, pipeline.models.values()))
    return found | {"whole": found["whole"] + touching}


def paint(way: str, spec: str, folder: Path, store: Path) -> None:
    """Load the pipeline and make one image of two steps."""
    import diffusers
    import torch

    from quant_core import GenerateRequest, generate

    if way == "our image":
        generate(ours(folder, spec, store), GenerateRequest("a lake", steps=2, seed=0, **IMAGE))
        return
    transformer = plain(folder, spec)
    pipe = diffusers.FluxPipeline.from_pretrained(folder, transformer=transformer, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe("a lake", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **IMAGE)


def files(folder: Path) -> dict:
    """Seconds to read all stored files of a folder into memory, and to write as many bytes to the disk."""
    from safetensors.torch import load_file

    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf"))
    if not paths:
        raise FileNotFoundError("the store holds no weights")
    began = time.perf_counter()
    held = [
        path.read_bytes() if path.suffix == ".gguf" else {key: value.clone() for key, value in load_file(path).items()}
        for path in paths
    ]
    seconds = time.perf_counter() - began
    del held
    scratch, write = folder / "scratch", 0.0
    with scratch.open("wb") as copy:
        for path in paths:
            with path.open("rb") as source:
                while part := source.read(16 * MIB):
                    began = time.perf_counter()
                    copy.write(part)
                    write += time.perf_counter() - began
        began = time.perf_counter()
        copy.flush()
        os.fsync(copy.fileno())
        write += time.perf_counter() - began
    scratch.unlink()
    return {"seconds": seconds, "write": write, "stored": sum(path.stat().st_size for path in paths)}


def child(way: str, spec: str, folder: str, store: str, started: str) -> dict:
    """The figures of one way to load, in this process, which was started at a reading of the monotonic clock."""
    import diffusers
    import transformers

    from quant_core import get_backend
    from quant_core.availability import ensure_available, quiet_libraries

    ensure_available(get_backend(spec.split("/")[0]))
    for name in ("FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "T5EncoderModel", "CLIPTokenizer", "T5Tokenizer"):
        getattr(transformers, name)
    imported = time.monotonic()
    with quiet_libraries():
        if way == "files":
            return files(Path(store))
        if way in ("plain image", "our image"):
            paint(way, spec, Path(folder), Path(store))
            now = time.monotonic()
            return {"image": now - imported, "with imports": now - float(started)}
        return load(way, spec, Path(folder), Path(store))


def measure(way: str, spec: str, folder: Path, store: Path) -> dict:
    """The same from a fresh process, or the `error` it ended with."""
    arguments = [way, spec, str(folder), str(store), str(time.monotonic())]
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it died"]
    return {"error": lines[-1]} if done.returncode else json.loads(lines[-1])


def merge(runs: list[dict]) -> dict:
    """Least seconds and most bytes of some runs."""
    if wrong := [run for run in runs if "error" in run]:
        return wrong[0]
    most = ("peak", "after", "footprint", "stored", "kind")
    return {key: (max if key in most else min)(run[key] for run in runs) for key in runs[0]}


def ratio(target: tuple, seen: dict) -> float | None:
    """What a target is about, None where a way has no figures."""
    try:
        return target[3](seen)
    except KeyError:
        return None


def check(spec: str, seen: dict) -> Iterator[str]:
    """The targets that a backend misses."""
    for way, found in seen.items():
        if "error" in found and not way.startswith("plain"):
            yield f"{spec}: {way} failed: {found['error']}"
    for way, kind in (("first", "stored"), ("second", "store")):
        if seen[way].get("kind", kind) != kind:
            yield f"{spec}: the {way} load was {seen[way]['kind']!r} instead of {kind!r}"
    for target in TARGETS:
        what, base, most, _ = target
        if (found := ratio(target, seen) or 0) > most:
            yield f"{spec}: {what} is {found:.3f} of {base}, at most {most:.3g}"


def worst(found: dict[str, dict]) -> Iterator[str]:
    """Each target with the backend that comes nearest to missing it, or misses it most."""
    for target in TARGETS:
        what, base, most, _ = target
        ratios = {spec: value for spec, seen in found.items() if (value := ratio(target, seen)) is not None}
        if ratios:
            spec = max(ratios, key=ratios.__getitem__)
            yield f"{what}: {ratios[spec]:.3f} of {base} at worst ({spec}), at most {most:.3g}"


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
        names = [*columns, *(f"{what} / {base}" for what, base, *_ in targets)]
        yield f"| {' | '.join([heading, *names])} |"
        yield f"|---|{'---:|' * len(names)}"
        for spec, seen in found.items():
            values = [(seen[way].get(key), scale, decimals) for way, key in columns.values()]
            values += [(ratio(target, seen), 1, 3) for target in targets]
            cells = ("-" if value is None else f"{value / unit:.{places}f}" for value, unit, places in values)
            yield f"| {' | '.join([spec, *cells])} |"
        yield ""


def machine() -> str:
    """What the figures were measured with."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    names = ("torch", "diffusers", "torchao", "bitsandbytes", "optimum-quanto", "gguf", "safetensors")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    cores = f"{os.cpu_count()} virtual cores of {model}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    return f"{cores}, Python {platform.python_version()}, {versions}"


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 million weights and one run instead of three")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--size", choices=SHAPES, help="weights of the transformer; 500M if not --quick")
    parser.add_argument("--only", nargs="+", choices=BACKENDS, default=BACKENDS, help="these backends")
    parser.add_argument("--repeat", type=int, help="runs of each; 3 if not --quick")
    parser.add_argument("--folder", type=Path, help="keep the pipeline there, and use it again")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/load.md")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.child:
        print(json.dumps(child(*args.child)))
        return 0
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
        head = ["# What loading a quantized component costs", "", f"`python benchmarks/load.py`, {machine()}.", ""]
        (ROOT / "benchmarks/results/load.md").write_text("\n".join([*head, *said, ""]))
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
