"""The prompts that quality is measured on, with what each asks for, so that the judge can tell what was painted.

A line per prompt, as JSON: `{"prompt": "at noon, a lake, ...", "asks": {"land": "a lake", ...}}`. The scenes are drawn
with the seed that no training stage uses, and each caption names all there is in its scene.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from demo_model.dataset import EVALUATION_SEED
from demo_model.scenes import ATTRIBUTES, Scenes, caption, rows, sample_scenes, visible

COUNT = 200


def write_prompts(file: Path, count: int = COUNT) -> None:
    """Draw the prompts; the same on every machine."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(EVALUATION_SEED))
    rng = random.Random(EVALUATION_SEED)
    lines = []
    for scene, seen in zip(rows(scenes), rows(visible(scenes)), strict=True):
        asks = {name: values[scene[name]] for name, values in ATTRIBUTES.items() if seen[name]}
        lines.append(json.dumps({"prompt": caption(scene, rng, complete=True), "asks": asks}))
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_prompts(file: Path, count: int) -> tuple[list[str], Scenes]:
    """The first prompts of a file and what they ask for; what a scene does not show is 0, as in what is drawn."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
    scenes = {
        name: torch.tensor([values.index(line["asks"].get(name, values[0])) for line in lines])
        for name, values in ATTRIBUTES.items()
    }
    return [line["prompt"] for line in lines], scenes
