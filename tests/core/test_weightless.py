"""Tokenizers, schedulers and processors are opened before the first weight; what is wrong with one is told by name."""

import json
import string
import struct
import sys

import pytest
import torch
import transformers

from quant_core import (
    BackendUnavailable,
    GenerateRequest,
    LoadRequest,
    SourceError,
    estimate,
    generate,
    load_pipeline,
    parse_plan,
    reading,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_FILE = "is a Git LFS pointer, not the file itself; run git lfs pull in the model's folder, or download it again."
BOM = "begins with a byte order mark, which neither diffusers nor transformers reads; save it as UTF-8 without one."
LOST = "has no vocabulary: its folder does not hold tokenizer.json, nor {}; download the model again."
SCHEDULER, TOKENS = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
TOKENS_3, CONFIG_3 = "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer_config.json"
NO_WORDS = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'

# the file, what it becomes (None: it is gone), and the sentence
WRONG = [
    (TOKENS, POINTER, f"tokenizer: its tokenizer.json {NO_FILE}"),
    ("tokenizer_3/spiece.model", POINTER, f"tokenizer_3: its spiece.model {NO_FILE}"),
    (CONFIG_3, POINTER, f"tokenizer_3: its tokenizer_config.json {NO_FILE}"),
    ("vae/config.json", POINTER, f"component vae of this pipeline: its config.json {NO_FILE}"),
    (SCHEDULER, b'{"shift": ', "scheduler: its scheduler_config.json is damaged (Expecting value: line 1 column"),
    (SCHEDULER, b'"owner/name"', "scheduler: its scheduler_config.json holds no JSON object."),
    (SCHEDULER, b"5", "scheduler: its scheduler_config.json holds no JSON object."),
    (SCHEDULER, b'\xef\xbb\xbf{"shift": 1.0}', f"scheduler: its scheduler_config.json {BOM}"),
    (SCHEDULER, b'{"shift": "x"}', "scheduler does not load as a FlowMatchEulerDiscreteScheduler: "),
    (SCHEDULER, b'{"num_train_timesteps": -1}', "scheduler does not load as a FlowMatchEulerDiscreteScheduler: "),
    ("model_index.json", b'\xef\xbb\xbf{"_class_name": "a"}', BOM),
    (TOKENS, b"{", "tokenizer: its tokenizer.json is damaged (Expecting property name"),
    ("tokenizer/vocab.json", b"[1]", "tokenizer: its vocab.json holds no JSON object."),
    ("tokenizer/added_tokens.json", b"[1]", "tokenizer: its added_tokens.json holds no JSON object."),
    (TOKENS, b"{}", "tokenizer does not load as a CLIPTokenizer: KeyError: "),
    (TOKENS, NO_WORDS, "tokenizer has no vocabulary: it knows 2 tokens, all of them special; download the model"),
    (TOKENS, None, "tokenizer " + LOST.format("vocab.json and merges.txt")),
    (TOKENS_3, None, "tokenizer_3 " + LOST.format("spiece.model")),
    (CONFIG_3, b'{"extra_ids": "x"}', "tokenizer_3 does not load as a T5Tokenizer: "),
    (CONFIG_3, b'{"model_max_length": -1, "padding_side": 5}', "tokenizer_3 does not load as a T5Tokenizer: "),
    ("text_encoder_3/config.json", b"{", "component text_encoder_3 of this pipeline: its config.json is damaged ("),
]


@pytest.fixture
def weights_stay(monkeypatch):
    """To read a weight is a failure."""
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))


def refusals(folder, plan, kind=SourceError):
    """What a load and an estimate say, which is the same."""
    with pytest.raises(kind) as load:
        load_pipeline(LoadRequest(str(folder), parse_plan(plan)))
    with pytest.raises(kind) as looked:
        estimate(LoadRequest(str(folder), parse_plan(plan)), GenerateRequest("a", width=16, height=16))
    assert str(load.value) == str(looked.value)
    assert "\n" not in str(load.value) and str(load.value).endswith(".") and len(str(load.value)) <= 300
    return str(load.value)


@pytest.mark.parametrize(("file", "content", "sentence"), WRONG, ids=[f"{row[0]}-{n}" for n, row in enumerate(WRONG)])
def test_what_is_wrong_is_told_by_name_before_weights_are_read(
    copy, weights_stay, no_network, file, content, sentence
):
    model = copy("sd3")
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_bytes(content)
    assert sentence in refusals(model, "torchao/int8wo")


@pytest.mark.parametrize("component", ["scheduler", "tokenizer", "tokenizer_3"])
def test_files_that_no_library_opens_are_left_alone(copy, component):
    model = copy("sd3")
    for name in ("examples.json", "._tokenizer_config.json", "._scheduler_config.json", "._vocab.txt", ".index.json"):
        (model / component / name).write_bytes(POINTER if name.endswith(".txt") else b"[1]")
    assert load_pipeline(LoadRequest(str(model), parse_plan("none"))).models


def test_a_folder_of_a_system_s_own_files_alone_is_empty(copy, weights_stay):
    model = copy("sd3")
    (model / SCHEDULER).rename(model / "scheduler/._scheduler_config.json")
    assert refusals(model, "none") == "scheduler is named in model_index.json, but the pipeline has no files of it."


def test_a_component_that_the_class_needs_is_named_before_weights_are_read(copy, edit, weights_stay):
    model = copy("sd3")
    edit(model / "model_index.json", scheduler=[None, None])
    assert refusals(model, "none") == "model_index.json names no scheduler, which each StableDiffusion3Pipeline has."


def test_a_class_whose_package_is_missing_says_which(copy, edit, weights_stay):
    model = copy("sd3")
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    said = refusals(model, "none", BackendUnavailable)
    assert said.startswith("scheduler does not load here: DPMSolverSDEScheduler requires the torchsde library")
    assert said.endswith("; install it with pip.")


def test_words_beyond_an_embedding_are_another_model_s(copy, weights_stay):
    model = copy("sd3")
    tokens = json.loads((model / TOKENS_3).read_text())
    tokens["model"]["vocab"] = [*tokens["model"]["vocab"], *([word, -9.0] for word in ("red", "green", "blue"))] * 2
    (model / TOKENS_3).write_text(json.dumps(tokens))
    sentence = "tokenizer_3 does not belong to text_encoder_3: it has tokens up to number "
    assert refusals(model, "none").startswith(sentence)


def test_added_tokens_beyond_an_embedding_are_left_alone(copy):
    """Some models have tokens that no prompt uses and nobody made an embedding for."""
    model = copy("sd3")
    tokenizer = transformers.T5Tokenizer.from_pretrained(model / "tokenizer_3")
    tokenizer.add_tokens([f"<unused_{number}>" for number in range(64)], special_tokens=True)
    tokenizer.save_pretrained(model / "tokenizer_3")
    assert len(load_pipeline(LoadRequest(str(model))).pipe.tokenizer_3) > 64


def bert(model, edit, words):
    """Let the first text encoder be a BERT with a tokenizer of a vocab.txt alone."""
    for file in (model / "tokenizer").iterdir():
        file.unlink()
    (model / "tokenizer/vocab.txt").write_bytes(words)
    edit(model / "model_index.json", tokenizer=["transformers", "BertTokenizer"])


def test_a_vocabulary_of_lines_that_is_a_pointer_is_told_as_one(copy, edit, weights_stay):
    model = copy("sd3")
    bert(model, edit, POINTER)
    assert refusals(model, "none") == f"tokenizer: its vocab.txt {NO_FILE}"


def varint(number):
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def field(number, kind, value):
    """A field of a protocol buffer (its documentation, Encoding): a varint, bytes or four bytes."""
    length = varint(len(value)) if kind == 2 else b""
    return varint(number << 3 | kind) + length + value


def sentencepiece_model(tokens):
    """A unigram ModelProto (sentencepiece's sentencepiece_model.proto) of tokens, their scores and types."""
    data = b""
    for text, score, kind in tokens:
        piece = field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))
        data += field(1, 2, piece)
    trainer = [(3, 1), (40, 2), (41, 2**64 - 1), (42, 1), (43, 0)]  # unigram; the numbers of unk, bos, eos, pad
    normalizer = field(1, 2, b"identity") + b"".join(field(number, 0, varint(1)) for number in (3, 4, 5))
    return (
        data
        + field(2, 2, b"".join(field(*pair[:1], 0, varint(pair[1])) for pair in trainer))
        + field(3, 2, normalizer)
    )


@pytest.fixture
def only_spiece(copy):
    """A pipeline whose T5 tokenizer is a spiece.model, without a tokenizer.json."""
    model = copy("pixart")
    (model / TOKENS).unlink()
    words = [(letter, -8.0, 1) for letter in string.ascii_lowercase]
    special = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -2.0, 1)]
    (model / "tokenizer/spiece.model").write_bytes(sentencepiece_model([*special, *words]))
    return model


def test_a_sentencepiece_model_alone_is_a_vocabulary(only_spiece):
    pipeline = load_pipeline(LoadRequest(str(only_spiece)))
    assert pipeline.pipe.tokenizer("a bc").input_ids == [3, 4, 3, 5, 6, 1]
    request = GenerateRequest("a", width=16, height=16, steps=1, extra={"use_resolution_binning": False})
    assert torch.isfinite(generate(pipeline, request)).all()


def test_what_reads_a_sentencepiece_model_is_named_where_it_is_missing(only_spiece, weights_stay, monkeypatch):
    from quant_core import availability

    monkeypatch.setattr(availability, "missing", lambda requires: [item for item in requires if item == "protobuf"])
    sentence = "tokenizer, which is a spiece.model, needs: pip install 'protobuf'"
    with pytest.raises(BackendUnavailable) as error:
        load_pipeline(LoadRequest(str(only_spiece)))
    assert str(error.value) == sentence


def test_each_is_opened_once(copy, monkeypatch):
    """What was checked is what the pipeline has."""
    opened = []
    real = transformers.CLIPTokenizer.from_pretrained.__func__
    monkeypatch.setattr(
        transformers.CLIPTokenizer,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: opened.append(real(cls, *a, **k)) or opened[-1]),
    )
    pipeline = load_pipeline(LoadRequest(str(copy("sd"))))
    assert len(opened) == 1 and pipeline.pipe.tokenizer is opened[0]


def test_nothing_of_the_model_is_imported(copy, edit, tmp_path):
    """Opening a component of its files runs no file."""
    model = copy("sd3")
    (model / "scheduler/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    edit(model / SCHEDULER, auto_map={"AutoScheduler": "own.Own"})
    load_pipeline(LoadRequest(str(model)))
    assert not (tmp_path / "ran").exists() and "own" not in sys.modules
