"""Comparing plans: the reference is equal to itself, distances are what the metrics say, one pipeline at a time."""

import csv
import gc
import io
import json
import math
import weakref

import pytest
import torch

from quant_core import (
    CompareRequest,
    GenerateRequest,
    LoadRequest,
    QuantError,
    SpecError,
    compare,
    comparison,
    comparison_csv,
    comparison_data,
    footprint,
    format_comparison,
    generate,
    labelled,
    load_pipeline,
    parse_plan,
)
from quant_core.__main__ import main
from quant_core.comparison_chart import Point, chart, draw_chart
from quant_core.comparison_picture import differences, grid
from quant_core.metrics import mean_psnr, psnr, psnr_each, relative_error, ssim

SETTINGS = GenerateRequest("", width=64, height=64, steps=3, max_sequence_length=48)
PLANS = ("torchao/int8wo", "transformer=bitsandbytes_4bit/nf4", "gguf/Q4_0")


def request(source="demo", plans=PLANS, **others):
    given = {"prompts": ["a lake at noon", "snowy mountains"], "seeds": (3, 4), "settings": SETTINGS} | others
    return CompareRequest(LoadRequest(str(source)), {text: parse_plan(text) for text in plans}, **given)


@pytest.fixture(scope="module")
def found():
    return compare(request())


def test_the_figures_are_those_of_the_pictures_and_latents(found):
    reference, *plans = found.plans
    assert reference.psnr == math.inf and reference.ssim == pytest.approx(1) and set(reference.latent_errors) == {0.0}
    for plan in plans:
        images = found.images[plan.label]
        assert images.shape == (4, 64, 64, 3)
        assert plan.psnr == mean_psnr(plan.psnr_each) < math.inf
        assert plan.psnr_each == psnr_each(images, found.images["16 bit"])
        assert plan.psnr_together == psnr(images, found.images["16 bit"])
        assert plan.ssim_each[2] == ssim(images[2:3], found.images["16 bit"][2:3])
        assert len(plan.latent_errors) == 3 and all(error > 0 for error in plan.latent_errors)
        assert plan.footprint < reference.footprint == reference.bytes_16bit
        assert plan.seconds_per_step > 0 and plan.load_seconds > 0
    assert plans[0].psnr > plans[2].psnr  # 8 bit against 4


def test_a_plan_s_picture_and_latents_are_its_own_pipeline_s(found):
    pipeline = load_pipeline(LoadRequest("demo", parse_plan(PLANS[1])))
    (plan,) = (plan for plan in found.plans if plan.label == PLANS[1])
    assert plan.footprint == sum(footprint(model) for model in pipeline.models.values())
    last = {}
    for name, source in (("plan", pipeline), ("reference", load_pipeline(LoadRequest("demo")))):
        for prompt in ("a lake at noon", "snowy mountains"):
            for seed in (3, 4):
                steps = []
                given = GenerateRequest(prompt, width=64, height=64, steps=3, max_sequence_length=48, seed=seed)
                image = generate(source, given, lambda step, steps=steps: steps.append(step.latents.clone()))
                last.setdefault(name, []).append(steps[-1])
    assert torch.equal(image, found.images["16 bit"][3:])
    errors = [relative_error(*pair) for pair in zip(last["plan"], last["reference"], strict=True)]
    assert plan.latent_errors[-1] == pytest.approx(sum(errors) / 4, rel=1e-6)


def test_one_pipeline_is_in_memory_at_a_time(monkeypatch):
    alive, load = [], comparison.load_pipeline

    def watched(*given):
        gc.collect()
        assert not [pipeline for pipeline in alive if pipeline() is not None]
        made = load(*given)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(comparison, "load_pipeline", watched)
    compare(request(prompts=["a lake"], seeds=(1,)))
    assert len(alive) == 4


@pytest.mark.parametrize("name", ["sd3", "sd", "zimage"])
def test_the_reference_of_every_pipeline_is_equal_to_itself(tiny, name):
    settings = GenerateRequest("", width=16, height=16, steps=2)
    plan = "torchao/int8wo"
    reference, other = compare(request(tiny(name), [plan], seeds=(1,), settings=settings)).plans
    assert reference.psnr == math.inf and reference.ssim == 1 and not any(reference.latent_errors)
    assert other.label == plan


def test_a_reference_that_differs_from_itself_ends_it(monkeypatch):
    noise = iter(range(100))
    run = comparison.generate

    def unsteady(*given):
        return (run(*given) + 0.001 * next(noise)).clamp(0, 1)

    monkeypatch.setattr(comparison, "generate", unsteady)
    with pytest.raises(QuantError, match="reference differs from itself by .* dB PSNR"):
        compare(request(prompts=["a lake"], seeds=(1,)))


class Stop(BaseException):
    pass


def test_it_stops_within_a_step_and_leaves_no_pipeline(monkeypatch):
    told, alive, load = [], [], comparison.load_pipeline
    monkeypatch.setattr(comparison, "load_pipeline", lambda *given: alive.append(load(*given)) or alive.pop())

    def stop(*progress):
        told.append(progress)
        if progress[2] == PLANS[0] and progress[0] == 9:
            raise Stop

    with pytest.raises(Stop):
        compare(request(), stop)
    assert told[-1] == (9, 20, PLANS[0])


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"plans": ()}, "at least one plan"),
        ({"prompts": []}, "at least one prompt"),
        ({"seeds": ()}, "one seed"),
    ],
)
def test_what_cannot_be_compared_is_said(others, sentence):
    with pytest.raises(SpecError, match=sentence):
        request(**others)


def test_it_is_told_as_table_json_and_csv(found):
    table = format_comparison(found)
    assert all(text in table for text in (*PLANS, "equal", "is equal to itself", "LPIPS is left out"))
    data = json.loads(json.dumps(comparison_data(found), allow_nan=False))
    assert data["plans"][0]["equal"] and data["plans"][0]["psnr"] is None
    assert data["plans"][1]["psnr"] == found.plans[1].psnr
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    assert len(rows) == 4 * 4 and {row["prompt"] for row in rows} == set(found.prompts)
    assert float(rows[5]["psnr"]) == found.plans[1].psnr_each[1]


@pytest.fixture
def written(monkeypatch):
    """(box, text) of all that is written into pictures."""
    from PIL import ImageDraw

    boxes, draw = [], ImageDraw.ImageDraw.text

    def noted(self, place, text, *rest, **named):
        boxes.append((self.textbbox(place, text, *rest[1:2], **named), text))
        return draw(self, place, text, *rest, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return boxes


def check_apart(picture, boxes):
    assert boxes
    for index, (one, text) in enumerate(boxes):
        assert one[0] >= 0 and one[1] >= 0 and one[2] <= picture.width and one[3] <= picture.height, text
        for other, against in boxes[index + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (text, against)


@pytest.mark.parametrize("make", [grid, differences, chart])
def test_the_pictures_hold_every_image_and_no_label_covers_another(make, found, written):
    check_apart(make(found), written)


def test_a_crowded_chart_has_every_label(written):
    points = [Point(f"torchao/plan_{n}", (12 + n % 5 // 2) << 20, 30.0 + n % 7 + n / 50) for n in range(24)]
    check_apart(draw_chart(points, 25 << 20, (1000, 720)), written)
    assert {f"{point.label}  {point.psnr:.1f}" for point in points} <= {text for _, text in written}


def test_the_command(tmp_path, capsys):
    small = ["--width", "64", "--height", "64", "--steps", "2", "--max-sequence-length", "48"]
    (tmp_path / "prompts.txt").write_text("a lake\n\nsnowy mountains\n")
    arguments = ["compare", "demo", "--plan", "torchao/int8wo", "--plan", "gguf/Q4_0", *small]
    out = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--json"]
    assert main([*arguments, *out]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [plan["label"] for plan in data["plans"]] == ["16 bit", "torchao/int8wo", "gguf/Q4_0"]
    assert data["prompts"] == ["a lake", "snowy mountains"]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"grid.png", "differences.png", "chart.png", "comparison.json", "comparison.csv"}
    assert json.loads((tmp_path / "out/comparison.json").read_text())["plans"][0]["equal"]
    for wrong, sentence in (
        (["--prompts", "absent.txt"], "cannot be read"),
        ([], "needs a prompt"),
        (["--prompt", "a lake", "--pictures", "0"], "at least 1"),
        (["--prompt", "a lake", "--plan", "none/none"], "Unknown backend"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_a_plan_with_a_long_text_goes_by_its_number_and_stands_below_the_table(tmp_path, capsys):
    long = "transformer=gguf/Q4_0?skip=norm_out|proj_out|x_embedder|context_embedder|time_text_embed"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(parse_plan("transformer=torchao/int8wo").to_dict()))
    size = ["--prompt", "a lake", "--width", "64", "--height", "64", "--steps", "1"]
    assert main(["compare", "demo", "--plan", long, "--plan", str(file), *size]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("plan 1  ") for line in lines) and f"plan 1: {long}" in lines
    assert labelled([(long, 1), ("a", 2), (long, 1)]) == {"plan 1": 1, "a": 2}
