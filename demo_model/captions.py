"""Tokenised captions of a set of scenes, several wordings of each."""

import random

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from .scenes import caption, rows
from .vocabulary import CLIP_LENGTH

SHORT = 48
"""T5 tokens that every caption fits into."""
DROPOUT = 0.08
"""Share of captions replaced by the empty one, so that classifier-free guidance works."""


class Captions:
    """Token ids of `wordings` captions of every scene, [wordings, scenes, length], and of the empty caption."""

    def __init__(
        self,
        scenes: dict[str, torch.Tensor],
        clip: CLIPTokenizer,
        t5: T5TokenizerFast,
        wordings: int,
        seed: int,
        device: str,
    ) -> None:
        rng = random.Random(seed)
        scene_rows = rows(scenes)
        texts = [caption(scene, rng) for _ in range(wordings) for scene in scene_rows]
        self.wordings, self.device = wordings, device
        self.clip_ids = self._ids(clip, texts, CLIP_LENGTH).view(wordings, len(scene_rows), -1)
        self.t5_ids = self._ids(t5, texts, SHORT).view(wordings, len(scene_rows), -1)
        self.clip_empty, self.t5_empty = self._ids(clip, [""], CLIP_LENGTH), self._ids(t5, [""], SHORT)

    def _ids(self, tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], length: int) -> torch.Tensor:
        encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        return torch.tensor(encoded, dtype=torch.int16, device=self.device)

    def draw(self, index: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLIP ids [n, 77] and T5 ids [n, length] of one wording, or none, of each indexed scene."""
        wording = torch.randint(0, self.wordings, index.shape, device=self.device)
        dropped = torch.rand(index.shape, device=self.device)[:, None] < DROPOUT
        clip_ids = torch.where(dropped, self.clip_empty, self.clip_ids[wording, index]).long()
        t5_ids = torch.where(dropped, self.t5_empty, self.t5_ids[wording, index]).long()
        return clip_ids, torch.nn.functional.pad(t5_ids, (0, length - SHORT))
