"""One way to load a quantized component, measured in this process, which `load.py` starts for it.

python benchmarks/one_load.py WAY SPEC FOLDER STORE STARTED

Prints the figures as JSON, seconds and bytes. STARTED is a reading of the monotonic clock, from before the process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 2**20
IMAGE = {"width": 32, "height": 32, "max_sequence_length": 16}


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

    return load_pipeline(LoadRequest(str(folder), parse_plan(f"transformer={spec}?skip=none"), store=store))


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


def figures(way: str, spec: str, folder: Path, store: Path, started: float) -> dict:
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
            return files(store)
        if way in ("plain image", "our image"):
            paint(way, spec, folder, store)
            now = time.monotonic()
            return {"image": now - imported, "with imports": now - started}
        return load(way, spec, folder, store)


if __name__ == "__main__":
    way, spec, folder, store, started = sys.argv[1:]
    print(json.dumps(figures(way, spec, Path(folder), Path(store), float(started))))
