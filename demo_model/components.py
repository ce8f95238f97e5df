"""The parts of the demo pipeline: built from scratch or loaded from an earlier run in float32."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def build_vae(resume: Path | None, size: int) -> AutoencoderKL:
    """Build the VAE: 16 latent channels at an eighth of the image side."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 96, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    if resume:
        earlier = AutoencoderKL.from_pretrained(resume / "pipeline" / "vae", torch_dtype=torch.float32)
        vae.load_state_dict(earlier.state_dict())
        vae.register_to_config(shift_factor=earlier.config.shift_factor, scaling_factor=earlier.config.scaling_factor)
    return vae


def build_clip(resume: Path | None, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder whose pooled output modulates the transformer."""
    if resume:
        return CLIPTextModel.from_pretrained(resume / "pipeline" / "text_encoder", dtype=torch.float32)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=128,
        )
    )


def build_t5(resume: Path | None, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Build the text encoder whose token features the transformer attends to."""
    if resume:
        return T5EncoderModel.from_pretrained(resume / "pipeline" / "text_encoder_2", dtype=torch.float32)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=256,
            d_kv=64,
            d_ff=512,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def build_transformer(resume: Path | None) -> FluxTransformer2DModel:
    """Build the flow transformer: every linear layer divides by 64, most by 256."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    if resume:
        folder = resume / "pipeline" / "transformer"
        earlier = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
        transformer.load_state_dict(earlier.state_dict())
    return transformer
