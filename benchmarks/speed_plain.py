"""Flux as diffusers alone loads, compiles and offloads it, by its guide "Compile and offloading quantized models"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_rows import SCHEMES, Row

DTYPE = torch.bfloat16


def load(row: Row, folder: Path, device: torch.device) -> Any:
    """The pipeline of a row, on its device as far as the row says, to be compiled when it first runs."""
    import diffusers

    parts = _quantized(row.scheme, folder, device)
    pipe = diffusers.FluxPipeline.from_pretrained(folder, dtype=DTYPE, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    match row.memory:
        case "resident":
            pipe.to(device)
        case "offloaded":
            torch._dynamo.config.cache_size_limit = 1000
            pipe.enable_model_cpu_offload(device=device)
        case "budget":
            pipe.enable_group_offload(
                onload_device=device,
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=device.type == "cuda",
                exclude_modules=["vae"],  # whose decode() is not the forward() that brings what is in no block
            )
    if row.scheme == "nf4":
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
    match row.compile:
        case "blocks":
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        case "whole":
            pipe.transformer.to(memory_format=torch.channels_last)
            pipe.transformer.compile(mode="max-autotune", fullgraph=True)
    return pipe


def painter(pipe: Any, size: int, steps: int, tokens: int) -> Callable[[int, Callable[[], None]], torch.Tensor]:
    """A function from a seed, and what to call after each step, to images (N, C, H, W) in 0..1 on the CPU."""

    def paint(seed: int, on_step: Callable[[], None]) -> torch.Tensor:
        def at_end(pipe, step, timestep, state):
            on_step()
            return state

        return (
            pipe(
                f"a lake at noon, {seed}",
                width=size,
                height=size,
                num_inference_steps=steps,
                max_sequence_length=tokens,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="pt",
                callback_on_step_end=at_end,
            )
            .images.float()
            .cpu()
        )

    return paint


def _quantized(scheme: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """The components that a scheme quantizes."""
    import diffusers
    import transformers

    library, kind = SCHEMES[scheme].diffusers
    if library == "none":
        return {}
    given = {"dtype": DTYPE, "local_files_only": True}
    if library == "bitsandbytes":
        _allow_cpu()
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": DTYPE}
        return {
            "transformer": diffusers.FluxTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", quantization_config=diffusers.BitsAndBytesConfig(**config), **given
            ),
            "text_encoder_2": transformers.T5EncoderModel.from_pretrained(
                folder,
                subfolder="text_encoder_2",
                quantization_config=transformers.BitsAndBytesConfig(**config),
                dtype=DTYPE,
                local_files_only=True,
            ),
        }
    from torchao import quantization

    rows = {"granularity": quantization.PerRow()} if scheme == "fp8dq_row" else {}
    config = diffusers.TorchAoConfig(getattr(quantization, kind)(**rows))
    there = {"device_map": "cuda"} if device.type == "cuda" else {}  # quantized there, which some formats need
    return {
        "transformer": diffusers.FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", quantization_config=config, **given, **there
        )
    }


def _allow_cpu() -> None:
    """Where there is no GPU, take away that diffusers wants one for bitsandbytes, which does without, and switch off
    its kernel for AVX512-BF16, which cannot be compiled."""
    if torch.cuda.is_available():
        return
    import bitsandbytes
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    quantizer.validate_environment = lambda self, *args, **kwargs: None
    quantizer.update_device_map = lambda self, device_map: device_map or {"": "cpu"}
