"""Measure the demo model: prompt adherence per attribute, VAE sharpness, and a grid of sample pictures.

python -m demo_model.evaluate [FOLDER] [--scenes 256] [--steps 12] [--length 48] [--table FILE.md] [--grid FILE.png]
"""

import argparse
import math
import random
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image

from .captions import SHORT
from .dataset import EVALUATION_SEED, Paintings
from .judge import adherence, load_judge
from .scenes import caption, rows
from .train_vae import peak_signal_to_noise

BATCH = 32

PROMPTS = [
    "a red house on the left, three pine trees, snowy mountains, a full moon at night, a clear sky",
    "a lake, a yellow house in the middle, a sailboat with a red sail, two oak trees, the sun, a clear sky at noon",
    "desert dunes, a purple house on the right, an orange hot air balloon, the sun at sunset, a cloudy sky",
    "green hills, a white house on the left, three oak trees, a blue hot air balloon at dawn, the sun",
    "snowy mountains, no house, a green hot air balloon, a crescent moon, a cloudy sky at night",
    "a lake, a blue house on the right, a sailboat with a white sail, one pine tree, the sun at sunset",
    "a landscape",
    "green hills, two pine trees, a red hot air balloon at noon",
]


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share observed in `count` trials."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def generate(pipe: FluxPipeline, prompts: list[str], steps: int, length: int, size: int, cfg: float) -> torch.Tensor:
    """Make one picture per prompt, seeds 0, 1, 2 ..., as images [n, 3, size, size] in [-1, 1]."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        pictures.append(
            pipe(
                batch,
                negative_prompt=[""] * len(batch) if cfg > 1 else None,
                true_cfg_scale=cfg,
                num_inference_steps=steps,
                max_sequence_length=length,
                height=size,
                width=size,
                guidance_scale=1.0,
                generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
            )
            .images.float()
            .cpu()
        )
    return torch.cat(pictures) * 2 - 1


def reconstruct(pipe: FluxPipeline, paintings: Paintings) -> torch.Tensor:
    """Pass the paintings through the VAE, which bounds what any sampler can show."""
    parts = []
    with torch.no_grad():
        for chunk in paintings.chunks():
            latents = pipe.vae.encode(paintings.images(chunk).to(pipe.vae.dtype)).latent_dist.mean
            parts.append(pipe.vae.decode(latents).sample.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def save_grid(images: torch.Tensor, path: Path, columns: int = 4) -> None:
    """Write images in [-1, 1] as one picture, row by row."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    size = pixels.shape[1]
    grid = Image.new("RGB", (size * columns, size * -(-len(pixels) // columns)))
    for i, picture in enumerate(pixels):
        grid.paste(Image.fromarray(picture), (i % columns * size, i // columns * size))
    grid.save(path, optimize=True)


def main() -> None:
    """Print the table and write it and the grid where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--scenes", type=int, default=256, help="how many captions that name everything to judge")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=SHORT, help="T5 tokens that captions are padded to")
    parser.add_argument("--cfg", type=float, default=1.0, help="true classifier-free guidance scale; 1 is none")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = FluxPipeline.from_pretrained(args.folder / "pipeline", torch_dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.vae.config.sample_size
    if args.grid:
        pictures = [generate(pipe, PROMPTS, *setting, size, args.cfg) for setting in ((20, SHORT), (8, 512))]
        save_grid(torch.cat(pictures), args.grid)
    judge = load_judge(args.folder / "judge.safetensors", device)
    paintings = Paintings(args.scenes, size, EVALUATION_SEED, device)
    scenes = {name: values[: args.scenes] for name, values in paintings.scenes.items()}
    painted = paintings.images(slice(0, args.scenes))
    rng = random.Random(0)
    prompts = [caption(scene, rng, complete=True) for scene in rows(scenes)]
    scores = [
        adherence(judge, images, scenes)
        for images in (
            painted,
            reconstruct(pipe, paintings)[: args.scenes],
            generate(pipe, prompts, args.steps, args.length, size, args.cfg),
        )
    ]
    lines = ["| attribute | paintings | through the VAE | generated | 95% interval | n |", "|---|---|---|---|---|---|"]
    for name in scenes:
        (painting, _), (reconstruction, _), (share, count) = (score[name] for score in scores)
        low, high = wilson_interval(share, count)
        lines.append(
            f"| {name} | {painting:.2f} | {reconstruction:.2f} | {share:.2f} | {low:.2f} to {high:.2f} | {count} |"
        )
    psnr = peak_signal_to_noise(pipe.vae, paintings)
    lines += ["", f"{args.scenes} captions, {args.steps} steps; VAE {psnr:.2f} dB on fresh paintings"]
    print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
