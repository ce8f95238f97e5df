"""The two tokenizers, built from captions: byte-level BPE for CLIP, whole words for T5."""

import json
import math
import random
import re
import string
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from .scenes import caption, rows, sample_scenes

CLIP_LENGTH = 77
T5_LENGTH = 512
LETTERS = string.ascii_lowercase
PUNCTUATION = ".-'!?:;"


def sample_captions(count: int) -> list[str]:
    """Write the captions that the vocabularies are counted on."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(1))
    rng = random.Random(0)
    return [caption(scene, rng) for scene in rows(scenes)]


def build_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train a byte-level BPE of 1000 entries that can spell any text."""
    spelling = [f"{a} {a}{b}" for a in LETTERS for b in LETTERS] + list(string.digits) + [",", *PUNCTUATION]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(captions + spelling, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """Make a unigram vocabulary of the captions' words, with single characters to spell all others."""
    counts = Counter(word for text in captions for word in re.findall(r"[a-z]+|,", text))
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("," if word == "," else f"▁{word}", math.log(n / total)) for word, n in counts.most_common()]
    pieces += [(letter, -12.0) for letter in LETTERS + LETTERS.upper() + string.digits + PUNCTUATION]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def load_tokenizers(resume: Path | None) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Load the CLIP and T5 tokenizers of an earlier run, or build them."""
    if resume:
        return (
            CLIPTokenizer.from_pretrained(resume / "pipeline" / "tokenizer"),
            T5TokenizerFast.from_pretrained(resume / "pipeline" / "tokenizer_2"),
        )
    captions = sample_captions(20_000)
    return build_clip_tokenizer(captions), build_t5_tokenizer(captions)
