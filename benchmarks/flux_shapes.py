"""Pipelines of Flux's shape in several sizes: their components, and a folder with random weights of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# name -> (transformer, T5, CLIP, VAE); 12B is FLUX.1-dev, with T5-XXL and CLIP-L
SHAPES = {
    "tiny": (
        {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 3},
        {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    ),
    "500M": (
        {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 10, "num_single_layers": 20},
        {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "d_kv": 64},
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 2},
    ),
    "2B": (
        {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 6, "num_single_layers": 17},
        {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "d_kv": 64},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    ),
    "12B": (
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38},
        {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    ),
}


def components(name: str) -> Iterator[tuple[str, Any]]:
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


def write_random(name: str, folder: Path, device: str) -> None:
    """A pipeline of that shape in bfloat16, its weights drawn on a device, one at a time and always the same there."""
    import torch
    from random_pipeline import write_weights

    torch.manual_seed(0)
    with torch.device("meta"):
        made = dict(components(name))
    for part, model in made.items():
        (folder / part).mkdir(parents=True)
        save_config(model, folder / part)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # T5's, which is its `shared.weight`
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_weights(shapes, folder / part, stem, device)
    write_index(made, folder)


def save_config(model: Any, folder: Path) -> None:
    """A component's config.json, of diffusers or transformers."""
    (model.save_config if hasattr(model, "save_config") else model.config.save_pretrained)(folder)


def write_index(made: dict[str, Any], folder: Path) -> None:
    """What a pipeline has beside its models: tokenizers of letters, the scheduler and model_index.json."""
    import diffusers

    from tests.core.tiny_pipelines import clip_tokenizer, t5_tokenizer

    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", type(scheduler).__name__]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5Tokenizer"]}
    index |= {part: [type(model).__module__.split(".")[0], type(model).__name__] for part, model in made.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
