"""A FluxPipeline of random weights in a folder, in one of several sizes, for what is measured of large ones."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARD = 2**30  # bytes of a file, of a transformer that takes more than two
SHAPES = {  # weights -> heads, their width, double blocks, single blocks
    "60M": (8, 64, 3, 8),
    "500M": (16, 64, 7, 15),
    "2B": (16, 128, 6, 17),
}


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


def write_weights(shapes: dict, folder: Path, stem: str = "diffusion_pytorch_model", device: str = "cpu") -> None:
    """Random weights in safetensors' format (its README, Format), drawn on a device, one in memory at a time."""
    import torch

    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    most = SHARD if sum(sizes.values()) > 2 * SHARD else sum(sizes.values())
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if sum(map(sizes.get, shards[-1])) + size > most:
            shards.append([])
        shards[-1].append(name)
    homes = {}
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
                weight = torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                file.write(weight.cpu().view(torch.int16).numpy().data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
