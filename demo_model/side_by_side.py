"""The demo: the bundled model in 16 bit and quantized by three backends, side by side.

python -m demo_model.side_by_side OUT.png
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from quant_core import (
    DEMO,
    GenerateRequest,
    LoadRequest,
    format_plan,
    format_report,
    generate,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
)

PLAN = parse_plan("transformer=torchao/int8wo,text_encoder_2=bitsandbytes_4bit/nf4,text_encoder=gguf/Q8_0")
PROMPTS = {  # and their seeds
    "a lake, a yellow house in the middle, a sailboat with a red sail, two oak trees, "
    "the sun, a clear sky at noon": 13,
    "desert dunes, a purple house on the right, an orange hot air balloon, the sun, a cloudy sky at sunset": 1,
    "snowy mountains, a red house on the left, three pine trees, a full moon, a clear sky at night": 2,
    "green hills, a white house on the left, a blue hot air balloon, one oak tree, the sun at dawn": 18,
}
SIZE, STEPS, TOKENS, SCALE, MARGIN = 128, 20, 48, 2, 22
REQUEST = GenerateRequest(
    "", width=SIZE, height=SIZE, steps=STEPS, max_sequence_length=TOKENS, extra={"true_cfg_scale": 3.0}
)


def main(out: Path) -> None:
    """Generate the prompts twice, print what the quantized pipeline is and how long it took, and save the picture."""
    rows = []
    for label, plan in (("16 bit", parse_plan("none")), ("quantized", PLAN)):
        began = time.perf_counter()
        pipeline = load_pipeline(LoadRequest(DEMO, plan))
        loaded = time.perf_counter()
        generate(pipeline, replace(REQUEST, prompt="a lake", steps=1))  # whatever the first use costs
        warm = time.perf_counter()
        images = [
            generate(pipeline, replace(REQUEST, prompt=prompt, seed=seed))[0] for prompt, seed in PROMPTS.items()
        ]
        done = time.perf_counter()
        stored = sum(report.footprint for report in inspect_pipeline(pipeline)) / 2**20
        seconds = f"loaded in {loaded - began:.1f} s, {len(images)} images in {done - warm:.1f} s"
        print(f"{label}: {stored:.1f} MiB, {seconds}")
        rows.append((f"{label}, {stored:.1f} MiB", images))
    print(f"\n{format_plan(PLAN)}\n{format_report(inspect_pipeline(pipeline))}")
    out.parent.mkdir(parents=True, exist_ok=True)
    _grid(rows).save(out, optimize=True)
    print(f"\n{out}: 16 bit above, quantized below")


def _grid(rows: list[tuple[str, list[torch.Tensor]]]) -> Image.Image:
    side = SIZE * SCALE
    picture = Image.new("RGB", (side * len(PROMPTS), (side + MARGIN) * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate(rows):
        draw.text((6, row * (side + MARGIN) + 5), label, fill="black")
        for column, image in enumerate(images):
            tile = Image.fromarray((image * 255).round().byte().numpy())
            picture.paste(
                tile.resize((side, side), Image.Resampling.LANCZOS), (column * side, row * (side + MARGIN) + MARGIN)
            )
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo_model.side_by_side OUT.png")
    main(Path(sys.argv[1]))
