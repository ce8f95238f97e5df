"""What `estimate` says against what a pipeline then takes, and how long saying it takes.

Two pipelines of Flux's shape are made in a temporary folder: one of 500 million random weights, which is run, and one
of 12 billion weights that are a hole in a sparse file, which is only estimated.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OFF = 0.10  # the most that a peak may be off
SECONDS = 20.0  # the most that estimating the large pipeline may take
SIZE = {"width": 512, "height": 512}
PLANS = ("none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0", "quanto/int8", "bitsandbytes_8bit/int8")

# name -> (transformer, T5, CLIP, VAE)
SHAPES = {
    "500M": (
        {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 10, "num_single_layers": 20},
        {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "d_kv": 64},
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 2},
    ),
    "12B": (
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38},
        {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    ),
}


def components(name: str):
    """The components of a shape, with random weights or on PyTorch's meta device, as the caller has set it."""
    import diffusers
    import transformers

    from tests.core.tiny_pipelines import LETTERS

    denoiser, t5, clip, vae = SHAPES[name]
    head = denoiser["attention_head_dim"]
    words = 2 * len(LETTERS) + 2
    yield (
        "transformer",
        diffusers.FluxTransformer2DModel(
            **denoiser,
            in_channels=64,
            joint_attention_dim=t5["d_model"],
            pooled_projection_dim=clip["hidden_size"],
            guidance_embeds=name == "12B",
            axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
        ),
    )
    yield (
        "vae",
        diffusers.AutoencoderKL(
            **vae,
            latent_channels=16,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
    )
    config = transformers.CLIPTextConfig(
        **clip, vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1
    )
    yield "text_encoder", transformers.CLIPTextModel(config)
    config = transformers.T5Config(**t5, vocab_size=32128, feed_forward_proj="gated-gelu")
    yield "text_encoder_2", transformers.T5EncoderModel(config)


def save(name: str, folder: Path) -> None:
    """A pipeline of that shape: with random weights, or as configs and the headers of sparse weight files."""
    import diffusers
    import torch

    from tests.core.tiny_pipelines import clip_tokenizer, t5_tokenizer

    hollow = name == "12B"
    torch.manual_seed(0)
    with torch.device("meta" if hollow else "cpu"):
        made = dict(components(name))
    for part, model in made.items():
        if not hollow:
            model.to(torch.bfloat16).save_pretrained(folder / part, max_shard_size="100GB")
            continue
        (folder / part).mkdir(parents=True)
        (model.save_config if hasattr(model, "save_config") else model.config.save_pretrained)(folder / part)
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        header, at = {}, 0
        for key, tensor in model.state_dict().items():
            end = at + tensor.numel() * 2
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        with (folder / part / f"{stem}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", type(scheduler).__name__]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5Tokenizer"]}
    index |= {part: [type(model).__module__.split(".")[0], type(model).__name__] for part, model in made.items()}
    (folder / "model_index.json").write_text(json.dumps(index))


def child(folder: str, plan: str) -> dict:
    """Estimate, load and run in this process: the bytes said, by the allocator's record, and by the process's peak."""
    import torch

    from quant_core import GenerateRequest, LoadRequest, estimate, footprint, generate, load_pipeline, parse_plan
    from quant_core.allocator import give_back
    from tests.core.measured import measured_activations

    torch.set_num_threads(1)
    request = GenerateRequest("a lake", steps=1, **SIZE)
    load = LoadRequest(folder, parse_plan(plan))
    began = time.perf_counter()
    said = estimate(load, request)
    seconds = time.perf_counter() - began
    pipeline = load_pipeline(load)
    weights = sum(map(footprint, pipeline.models.values()))
    taken = measured_activations(pipeline, request)
    give_back()
    peak = before = _memory("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    generate(pipeline, request)
    done.set()
    watcher.join()
    return {
        "plan": plan,
        "said": said.peak_resident,
        "taken": weights + max(taken.values()),
        "weights": (sum(part.footprint for part in said.components), weights),
        "activations": max(part.activations for part in said.components),
        "growth": peak - before,
        "seconds": seconds,
    }


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def time_of_large(folder: str) -> dict:
    """Seconds of an estimate of the large pipeline after the imports, and of a second one."""
    from quant_core import GenerateRequest, LoadRequest, estimate, format_estimate, parse_plan
    from quant_core.availability import import_diffusers

    import_diffusers()
    load = LoadRequest(folder, parse_plan("bitsandbytes_4bit/nf4"), device="cuda")
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = estimate(load, GenerateRequest("a lake"))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "table": format_estimate(found), "memory": _memory("VmHWM")}


def _in_child(call: str) -> dict:
    code = f"import json; from benchmarks.estimate import *; print('RESULT', json.dumps({call}))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.split("RESULT ", 1)[1])


def main() -> int:
    """Print the figures; 1 if a target is missed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one plan instead of six")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    lines, missed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        for name in SHAPES:
            save(name, Path(scratch, name))
        large = _in_child(f"time_of_large({str(Path(scratch, '12B'))!r})")
        for plan in PLANS[:1] if args.quick else PLANS:
            row = _in_child(f"child({str(Path(scratch, '500M'))!r}, {plan!r})")
            off = row["said"] / row["taken"] - 1
            missed |= abs(off) > OFF or row["weights"][0] != row["weights"][1]
            sizes = [value / 2**20 for value in (row["said"], row["taken"], row["activations"], row["growth"])]
            lines.append(
                f"{plan:<24} peak said {sizes[0]:7.1f} MiB, taken {sizes[1]:7.1f} ({off:+.1%}); "
                f"activations said {sizes[2]:6.1f}, growth of the process {sizes[3]:6.1f}; {row['seconds']:.1f} s"
            )
            print(lines[-1], flush=True)
    missed |= max(large["seconds"]) > SECONDS
    print(f"\n{large['table']}\n")
    first, second = large["seconds"]
    print(f"estimating 12 billion weights: {first:.1f} s, again {second:.1f} s (target {SECONDS:.0f}), ", end="")
    print(f"with {large['memory'] / 2**20:.0f} MiB of memory at most")
    print(f"every peak within {OFF:.0%} of what the allocator recorded, every footprint exact: {not missed}")
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
