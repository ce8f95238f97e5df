"""Train the judge on paintings."""

from pathlib import Path

import torch
import torch.nn.functional as F

from .dataset import Paintings
from .judge import Judge, adherence, load_judge, save_judge
from .scenes import visible
from .schedule import Clock, set_rate


def train_judge(
    out: Path, resume: Path | None, minutes: float, paintings: Paintings, fresh: Paintings, batch: int, device: str
) -> None:
    """Train for `minutes` with `batch` paintings a step, score on `fresh` ones and write out/judge.safetensors."""
    judge = load_judge(resume / "judge.safetensors", device) if resume else Judge().to(device)
    judge.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    clock, step = Clock(minutes), 0
    while clock.progress < 1:
        index = torch.randint(0, paintings.count, (batch,), device=device)
        scenes, image = paintings.select(index), paintings.images(index)
        # generated pictures are less clean than paintings
        image = image + torch.randn_like(image) * 0.06 * torch.rand(batch, 1, 1, 1, device=device)
        with torch.autocast(device, torch.bfloat16):
            logits = judge(image)
        seen = visible(scenes)
        loss = sum(
            F.cross_entropy(logits[name].float(), scenes[name], reduction="none").mul(seen[name]).mean()
            for name in logits
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_rate(optimizer, 1e-3, step, clock.progress)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            clock.log("judge", step, "loss", round(loss.item(), 4))
    scores = adherence(judge.eval(), fresh.images(slice(None)), fresh.scenes)
    clock.log("judge", step, "steps;", {name: round(score, 3) for name, (score, _) in scores.items()})
    save_judge(judge, out / "judge.safetensors")
