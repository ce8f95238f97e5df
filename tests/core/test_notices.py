"""What a user must be told of a run that succeeded is in the pipeline's notices, the PNG's record and the JSON."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from quant_core import (
    CompareRequest,
    GenerateRequest,
    LoadRequest,
    Optimization,
    SensitivityRequest,
    SpecError,
    generate,
    load_pipeline,
    optimize,
    parse_plan,
    parse_spec,
)
from quant_core.__main__ import main
from quant_core.cut_texts import watching
from quant_core.picture import describe
from quant_core.texts import cleaned, notices_of_syntax, texts_of

from .simulated_device import Card, manage
from .small_requests import small
from .tiny_pipelines import clip_tokenizer, t5_tokenizer

END = "and a red dragon"
LONG = "a hill, " * 14 + END  # the tiny tokenizers have a token for each character


def told(pipelines, name, **settings):
    pipeline = pipelines(name)
    generate(pipeline, small(name, steps=1, **settings))
    assert all(len(notice) <= 300 and notice.endswith(".") for notice in pipeline.notices)
    return pipeline.notices


def test_of_a_text_that_all_encoders_read_nothing_is_told(pipelines):
    for name in ("sd", "sd3", "wan", "demo", "pixart", "zimage"):
        assert told(pipelines, name) == [], name


def test_a_text_beyond_what_clip_reads_is_told(pipelines):
    (notice,) = told(pipelines, "sd", prompt=LONG)
    assert notice.startswith("text_encoder (CLIPTextModel) reads 77 of ")
    assert "tokens of the prompt, without 'll" in notice and notice.endswith("and a red dragon'.")
    (notice,) = told(pipelines, "sd", negative_prompt=LONG)
    assert "tokens of the negative_prompt, without " in notice
    assert len(told(pipelines, "sd", prompt=["a", LONG, LONG + " again"])) == 2
    assert told(pipelines, "sd") == [], "those of the run before are gone"


def test_an_encoder_that_reads_all_of_it_is_told_beside_those_that_do_not(pipelines):
    (notice,) = told(pipelines, "sd3", prompt=LONG)
    clips = "text_encoder (CLIPTextModelWithProjection) and text_encoder_2 (CLIPTextModelWithProjection) read 77 of "
    assert notice.startswith(clips) and notice.endswith("; text_encoder_3 (T5EncoderModel) reads all of it.")
    clip, t5 = told(pipelines, "sd3", prompt=LONG * 3)
    assert "; " not in clip
    assert t5.startswith("text_encoder_3 (T5EncoderModel) reads 256 of 386 tokens of the prompt, without ")
    assert t5.endswith("; a max_sequence_length of 386 reads all of it.")
    assert "reads all of it" in told(pipelines, "sd3", prompt=LONG * 3, extra={"max_sequence_length": 386})[0]
    clip, t5 = told(pipelines, "demo", prompt=LONG, extra={"max_sequence_length": 16})
    assert "text_encoder_2 (T5EncoderModel) reads 16 of " in t5


@pytest.mark.parametrize(("name", "text"), [("wan", LONG * 5), ("pixart", LONG.upper() * 7)])  # which makes it lower
def test_a_text_beyond_what_t5_reads_is_told(pipelines, name, text):
    (notice,) = told(pipelines, name, prompt=text)
    assert "T5EncoderModel) reads " in notice and "tokens of the prompt, without " in notice


def test_a_text_beyond_what_a_language_model_reads_is_told(pipelines):
    (notice,) = told(pipelines, "zimage", prompt="a hill, " * 4 + END, extra={"max_sequence_length": 40})
    assert notice == (
        "text_encoder (Qwen3Model) reads 40 of 48 tokens of the prompt, without 'd dragon'; "
        "a max_sequence_length of 48 reads all of it."
    )


def test_a_remembered_text_is_told_again(tiny):
    pipeline = load_pipeline(LoadRequest(str(tiny("sd"))))
    manage(pipeline, Card())
    for _ in range(2):
        generate(pipeline, small("sd", steps=1, prompt=LONG))
        assert len(pipeline.notices) == 1
    assert pipeline.memory.size


class Pipe:
    """Leaves a text whole, and cuts it afterwards as some pipelines do."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def __call__(self, prompt, max_sequence_length=20):
        return self.tokenizer("to be drawn: " + prompt + " (end)").input_ids[:max_sequence_length]


def test_what_a_pipeline_cuts_after_its_tokenizer_is_told():
    pipe = Pipe(tokenizer=t5_tokenizer())
    for prompt, count in ((LONG, 1), ("a hill", 0)):
        with watching(pipe, {"prompt": prompt}) as readings:
            pipe(prompt)
        assert len(list(readings.notices(pipe))) == count
    with watching(pipe, {"prompt": LONG, "max_sequence_length": 200}) as readings:
        pipe(LONG)
    assert not list(readings.notices(pipe))


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_text_that_is_cut_at_its_start_that_is_told(side):
    tokenizer = clip_tokenizer()
    tokenizer.truncation_side = side
    pipe = Pipe(tokenizer=tokenizer)
    with watching(pipe, {"prompt": LONG}) as readings:
        tokenizer(LONG, truncation=True)
    (notice,) = readings.notices(pipe)
    assert ("red dragon" in notice) == (side == "right")


def test_a_cut_in_what_a_template_adds_is_none_of_the_text():
    pipe = Pipe(tokenizer=t5_tokenizer())
    with watching(pipe, {"prompt": "a hill"}) as readings:
        pipe.tokenizer("a hill, as drawn by hand", truncation=True, max_length=10)
    assert not list(readings.notices(pipe))


def test_tokenizers_are_what_they_were_however_a_run_ends():
    tokenizer = clip_tokenizer()
    kind, before = type(tokenizer), tokenizer(LONG).input_ids
    with pytest.raises(KeyError), watching(Pipe(tokenizer=tokenizer), {"prompt": LONG}):
        assert isinstance(tokenizer, kind) and tokenizer(LONG).input_ids == before
        raise KeyError
    assert type(tokenizer) is kind and tokenizer(LONG).input_ids == before


SYNTAX = ["(red:1.5)", "(a red cat:.5)", "((red))", "[cat:dog:0.5]", "[[red]]", "<lora:detail:0.8>", "embedding:bad"]


@pytest.mark.parametrize("text", [*SYNTAX, "BREAK", "(красный:1.2)"])
def test_syntax_that_is_read_as_it_is_written_is_told(text):
    (notice,) = notices_of_syntax(texts_of({"negative_prompt": f"a house, {text} in rain"}))
    assert repr(text) in notice


@pytest.mark.parametrize(
    "text",
    [
        "a house (red) in rain",
        "a clock (12:30), (John 3:16)",
        "a sign [EXIT], and 'BREAK GLASS'",
        "breakfast at a BREAKWATER",
        '{"lens": ["a:1", "b"], "box": [[1, 2], [3, 4]]}',
        "f(g(x)), 3 < 4 > 1, the word embedding: good",
        "a plan (width:3), (price: 2.50), (take:12.5), ((a + b) / 2), ((1, 2))",
        "[scene:2] [INT: 10] a barn",
        "a poster, BREAK DANCE tonight",
        "a sign: DO NOT BREAK glass, and one that says BREAK",
        "BREAK the ice",
    ],
)
def test_ordinary_text_is_not_told_of(text):
    assert not list(notices_of_syntax({"prompt": [text]}))


@pytest.mark.parametrize("start", ["[[", "((", "(a:", "[a:", "<lora:", "a BREAK", "embedding:"])
@pytest.mark.parametrize("more", ["a", " ", "1", ":"])
def test_a_text_of_a_million_letters_is_looked_through(start, more):
    # In the square of its length this would take most of an hour.
    (notice,) = notices_of_syntax({"prompt": [start + more * 1_000_000 + "\n(red:1.5)"]})
    assert notice.endswith("'(red:1.5)'.")


def test_a_text_that_two_arguments_have_is_one():
    texts = texts_of({"prompt": ["a", "b", "a", " "], "prompt_2": "b", "negative_prompt": "c"})
    assert texts == {"prompt": ["a", "b"], "prompt_2": [], "negative_prompt": ["c"]}


def test_syntax_is_told_once_and_briefly(pipelines):
    texts = " ".join(f"(word{'d' * number}:1.5)" for number in range(60))
    (notice,) = told(pipelines, "sd3", prompt=["(red:1.5) " * 3, "(red:1.5)"])
    assert notice.count("red") == 1
    (notice,) = notices_of_syntax({"prompt": [texts]})
    assert len(notice) <= 300 and notice.endswith(" and 56 more.")


def test_a_byte_order_mark_is_left_out_and_half_a_character_refused():
    request = GenerateRequest(["\ufeffa cat", "a dog"], "\ufeffrain", extra={"prompt_2": "a\ufeff cat", "a": 1})
    assert (request.prompt, request.negative_prompt) == (["a cat", "a dog"], "rain")
    assert dict(request.extra) == {"prompt_2": "a cat", "a": 1}
    for name, settings in {
        "prompt": {"prompt": "caf\ud83d"},
        "prompt_2": {"extra": {"prompt_2": ["caf\ud83d"]}},
    }.items():
        with pytest.raises(SpecError) as error:
            GenerateRequest(**{"prompt": "a"} | settings)
        assert str(error.value).startswith(f"{name} has '\\ud83d' as its character 4, which is half of a character ")
    assert cleaned("prompt", "\U0001f431 水 e\u0301") == "\U0001f431 水 e\u0301"


@pytest.fixture
def flagged(copy):
    """The folder of a tiny pipeline whose safety checker flags every picture."""
    from safetensors.torch import load_file, save_file

    folder = copy("sd")
    file = folder / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    weights["concept_embeds_weights"].fill_(-1)
    save_file(weights, file, {"format": "pt"})
    return folder


SMALL = ["--prompt", "a cat", "--width", "16", "--height", "16", "--steps", "1"]


def test_a_picture_that_the_safety_checker_made_black_is_told(flagged, tmp_path, capfd):
    sentence = (
        "The safety checker of StableDiffusionPipeline flagged picture 1 of 1, which it made black; another seed or "
        "prompt may pass."
    )
    out = tmp_path / "a.png"
    assert main(["generate", str(flagged), *SMALL, "--out", str(out)]) == 0
    assert sentence in capfd.readouterr().err.splitlines()
    assert json.loads(Image.open(out).text["quantized_diffusers"])["notices"] == [sentence]
    assert main(["generate", str(flagged), *SMALL, "--out", str(out), "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["notices"] == [sentence] and said.err.endswith(f"{sentence}\n")
    pipeline = load_pipeline(LoadRequest(str(flagged)))
    assert generate(pipeline, small("sd", steps=1, images_per_prompt=2)).max() == 0
    assert [notice.split(", ")[0][-6:] for notice in pipeline.notices] == ["1 of 2", "2 of 2"]


def test_each_handle_has_the_notices_of_its_own_last_run(pipelines):
    pipeline = pipelines("sd")
    other = optimize(pipeline, Optimization(), "cpu")
    other = pipeline.with_optimization(None, pipeline.device) if other is pipeline else other
    told(pipelines, "sd", prompt=LONG)
    assert pipeline.notices and not other.notices
    generate(other, small("sd", steps=1))
    assert pipeline.notices and not other.notices
    assert describe(pipeline, small("sd"), "sd")["notices"] == pipeline.notices
    assert "notices" not in describe(other, small("sd"), "sd")


def test_what_else_a_pipeline_made_is_told():
    from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput

    from quant_core.results import notices_of_result

    video = torch.zeros(1, 2, 3, 8, 8)
    result = LTX2PipelineOutput(frames=video, audio=torch.zeros(1, 2, 100))
    (notice,) = notices_of_result(result, video[0].permute(0, 2, 3, 1), "LTX2Pipeline")
    assert notice == "LTX2Pipeline also made audio, which is left out here."
    assert not list(notices_of_result(SimpleNamespace(frames=video, audio=None), video[0], "LTX2Pipeline"))


@pytest.mark.parametrize("command", ["compare", "sensitivity"])
def test_what_is_measured_tells_it_of_its_prompts(tiny, tmp_path, capfd, command):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a cat\n{LONG}\n", encoding="utf-8-sig")
    schemes = {"compare": ["--plan", "unet=torchao/int8wo"], "sensitivity": ["--scheme", "torchao/int8wo"]}[command]
    arguments = [command, str(tiny("sd")), *schemes, "--prompts", str(file), *SMALL[2:], "--store", "off"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    prompts = told["prompts"] if command == "compare" else told["settings"]["prompt"]
    assert prompts == ["a cat", LONG]
    (notice,) = told["notices"]
    assert "reads 77 of 99 tokens of the prompt" in notice
    assert main(arguments) == 0
    assert capfd.readouterr().out.splitlines()[-1] == notice


def test_prompts_that_cannot_be_read_are_refused_before_anything_is_loaded():
    for make in (
        lambda prompts: CompareRequest(LoadRequest("demo"), {"a": parse_plan("torchao/int8wo")}, prompts),
        lambda prompts: SensitivityRequest(LoadRequest("demo"), [parse_spec("torchao/int8wo")], prompts),
    ):
        assert make(["\ufeffa cat"]).prompts == ("a cat",)
        with pytest.raises(SpecError, match="^prompts has .* half of a character"):
            make(["caf\ud83d"])
