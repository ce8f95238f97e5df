"""The published table: its prompts, its judge, its figures and intervals, and that a run that was cut off goes on."""

import json
import math

import intervals
import pytest
import quality
import quality_run
import torch
from quality_prompts import COUNT, read_prompts, write_prompts
from quality_report import figures
from quality_targets import DEFAULT, EVERYWHERE, check, check_automatic, check_default

from demo_model.dataset import EVALUATION_SEED
from demo_model.judge import adherence, load_judge
from demo_model.painter import draw_jitter, paint
from demo_model.scenes import sample_scenes, visible
from quant_core import DeviceUnsupported, format_plan
from quant_core.metrics import mean_psnr, psnr, psnr_each, relative_error, ssim

PLANS = ["torchao/int8wo", "gguf/Q4_0"]
FILE = "quality-demo.json"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_interval_of_constants_has_no_width():
    columns = torch.full((50,), 0.25), torch.full((50,), 0.5)
    assert intervals.interval(intervals.mean, columns[0]) == (0.25, 0.25)
    assert intervals.interval(intervals.share, *columns) == (0.5, 0.5)


def test_rows_are_drawn_with_all_their_columns():
    whole = 1 + noise(50)
    low, high = intervals.interval(intervals.share, whole / 2, whole)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_the_interval_of_a_mean_is_the_textbook_s():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = intervals.interval(intervals.mean, values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(400), rel=0.05)
    assert intervals.interval(intervals.mean, values) == (low, high)
    assert intervals.interval(intervals.mean, values, seed=1) != (low, high)


def test_decibels_of_errors_are_those_of_the_pictures():
    images, others = noise(3, 16, 16, 3), noise(3, 16, 16, 3, seed=1)
    errors = (images.double() - others.double()).square().mean((1, 2, 3))
    assert intervals.decibels(errors).item() == pytest.approx(psnr(images, others))


def test_the_prompts_are_those_that_are_drawn(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_bytes() == quality.PROMPTS.read_bytes()
    prompts, scenes = read_prompts(quality.PROMPTS, COUNT)
    assert len(set(prompts)) == COUNT == 200
    drawn = sample_scenes(COUNT, torch.Generator().manual_seed(EVALUATION_SEED))
    for name, seen in visible(drawn).items():
        assert torch.equal(scenes[name][seen], drawn[name][seen])
        assert torch.equal(visible(scenes)[name], seen)


def test_the_judge_sees_what_the_prompts_ask_for():
    _, scenes = read_prompts(quality.PROMPTS, 100)
    pictures = paint(scenes, draw_jitter(100, torch.Generator().manual_seed(7)), 128)
    images = (pictures.permute(0, 2, 3, 1) / 2 + 0.5).unsqueeze(0)
    others = {name: values.roll(1) for name, values in scenes.items()}

    def share(wanted):
        asked = quality_run.asked(quality_run.Task([""] * 100, wanted, 1))
        return (sum(quality_run.seen_as_asked(images, wanted).values()) / sum(asked.values())).mean().item()

    assert share(scenes) > 0.98
    assert share(others) < 0.6


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A quick run, and what each plan painted."""
    out, painted = tmp_path_factory.mktemp("quality"), []
    patch, paint_plan = pytest.MonkeyPatch(), quality_run.paint
    patch.setattr(quality_run, "paint", lambda *given: painted.append(paint_plan(*given)) or painted[-1])
    plans = [*PLANS, "torchao/int4wo"]
    code = quality.main(["--quick", "--check", "--prompts", "4", "--out", str(out), "--plans", *plans])
    patch.undo()
    return code, out, painted


def test_the_figures_are_those_of_the_pictures(real):
    code, out, (reference, _, *painted) = real
    assert code == 0
    results = json.loads((out / FILE).read_text())
    found = figures(results)
    assert found["16 bit"].psnr == math.inf and found["16 bit"].ssim == 1 and not any(found["16 bit"].latent_errors)
    _, scenes = read_prompts(quality.PROMPTS, 4)
    judge = load_judge(quality_run.JUDGE)
    for label, plan in zip(PLANS, painted, strict=True):
        images, others = plan.images[0], reference.images[0]
        assert images.shape == (4, 128, 128, 3)
        assert found[label].psnr == pytest.approx(mean_psnr(psnr_each(images, others)), abs=0.01)
        assert found[label].psnr_together == pytest.approx(psnr(images, others), abs=0.01)
        assert found[label].ssim == pytest.approx(ssim(images, others), abs=1e-4)
        assert found[label].psnr_interval[0] <= found[label].psnr <= found[label].psnr_interval[1]
        errors = [
            relative_error(*pair) for pair in zip(plan.latents[0, :, -1], reference.latents[0, :, -1], strict=True)
        ]
        assert found[label].latent_errors[-1] == pytest.approx(sum(errors) / 4, rel=1e-3)
        scores = adherence(judge, images.permute(0, 3, 1, 2) * 2 - 1, scenes).values()
        right = sum(share * count for share, count in scores if count)
        assert found[label].adherence == pytest.approx(100 * right / sum(count for _, count in scores), rel=1e-5)
        assert found[label].footprint < found["16 bit"].footprint
    assert found[PLANS[0]].psnr > found[PLANS[1]].psnr + 3  # 8 bit against 4


def test_the_page_has_every_plan_and_says_what_could_not_run(real):
    _, out, _ = real
    text = (out / FILE).with_suffix(".md").read_text(encoding="utf-8")
    assert text == quality.page(json.loads((out / FILE).read_text()))
    assert all(f"| {label} |" in text for label in ("16 bit", *PLANS))
    assert "4 pictures (4 prompts x 1 seed)" in text and "LPIPS is left out" in text
    assert "torchao/int4wo needs a CUDA GPU" in text


@pytest.fixture
def painter(monkeypatch):
    """Instead of the demo: pictures of noise, by plan. Its `painted` are the plans, its `drift` makes runs differ."""

    class Painter:
        painted: list = []
        drift = 0.0

        def __call__(self, task, plan):
            text = format_plan(plan)
            self.painted = [*self.painted, text]
            if text == "torchao/int4wo":
                raise DeviceUnsupported("torchao/int4wo needs a GPU.")
            shape = task.seeds, len(task.prompts)
            images = noise(*shape, 16, 16, 3) * 0.9 + self.drift * len(self.painted)
            latents = noise(*shape, quality_run.STEPS, 4, 2)
            if text != "none":
                images, latents = images + (0.01 if "8" in text else 0.05), latents * 1.1
            measured = {"footprint": 10 + len(text), "bytes_16bit": 100, "peak": None, "seconds_per_step": 0.1}
            return quality_run.Painted(images, latents, measured)

    made = Painter()
    monkeypatch.setattr(quality_run, "paint", made)
    return made


def go(out, *more):
    return quality.main(["--prompts", "3", "--seeds", "2", "--out", str(out), *more])


def test_a_run_that_was_cut_off_goes_on(painter, tmp_path, monkeypatch):
    compare = quality_run.compare

    def cut(*given):
        if len(painter.painted) == 4:
            raise KeyboardInterrupt
        return compare(*given)

    monkeypatch.setattr(quality_run, "compare", cut)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "--plans", *PLANS)
    assert list(json.loads((tmp_path / FILE).read_text())["plans"]) == ["16 bit", PLANS[0]]
    painter.painted = []
    assert go(tmp_path, "--plans", *PLANS, "torchao/int4wo") == 0
    assert painter.painted == ["none", PLANS[1], "torchao/int4wo"]
    painter.painted = []
    assert go(tmp_path, "--plans", *PLANS, "torchao/int4wo") == 0 and painter.painted == []
    assert go(tmp_path, "--again", "--plans", PLANS[1]) == 0 and painter.painted == ["none", PLANS[1]]
    assert set(json.loads((tmp_path / FILE).read_text())["plans"]) == {"16 bit", *PLANS}


def test_results_of_other_settings_are_not_mixed(painter, tmp_path):
    go(tmp_path, "--plans", PLANS[0])
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(SystemExit, match="quality-demo.json has prompts 3, not 4; .*give --again"):
        quality.main(["--prompts", "4", "--seeds", "2", "--out", str(tmp_path)])
    painter.drift = 0.001
    with pytest.raises(SystemExit, match="16-bit pictures are not those"):
        go(tmp_path, "--plans", PLANS[1])
    assert (tmp_path / FILE).read_bytes() == before


def test_a_reference_that_differs_from_itself_ends_it(painter, tmp_path):
    painter.drift = 0.001
    with pytest.raises(SystemExit, match="16 bit differs from itself"):
        go(tmp_path, "--plans", PLANS[0])
    assert not (tmp_path / FILE).exists()


def test_a_missed_target_is_said_and_fails_the_check(painter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quality_targets.FLOOR", 39.0)
    assert go(tmp_path, "--check", "--plans", PLANS[0]) == 0  # 0.01 everywhere: 40 dB
    assert capsys.readouterr().out.endswith("All targets are met.\n")
    monkeypatch.setattr("quality_targets.FLOOR", 41.0)
    assert go(tmp_path, "--plans", PLANS[0]) == 0
    assert go(tmp_path, "--check", "--plans", PLANS[0]) == 1
    assert "torchao/int8wo: PSNR is 40.0 dB, at least 41" in capsys.readouterr().out


def test_the_targets(painter, tmp_path):
    go(tmp_path, "--plans", PLANS[0])
    found = figures(json.loads((tmp_path / FILE).read_text()))
    row = found[PLANS[0]]
    assert list(check(found)) == []
    worse = found | {PLANS[0]: row._replace(lost_interval=(0.2, 0.4))}
    assert list(check(worse)) == ["torchao/int8wo: 0.2 to 0.4% of adherence are lost, and 0 is not among these"]
    unequal = found | {"16 bit": found["16 bit"]._replace(psnr=80.0)}
    assert list(check(unequal)) == ["16 bit is 80.0 dB from itself, and should be equal"]

    def plan(label, psnr, footprint=20):
        return {label: row._replace(label=label, psnr=psnr, footprint=footprint)}

    assert list(check_default(plan(DEFAULT, 36.0))) == []
    assert list(check_default(plan(DEFAULT, 36.0) | plan(EVERYWHERE, 32.0))) == []
    assert len(list(check_default(plan(DEFAULT, 36.0) | plan(EVERYWHERE, 34.0)))) == 1
    others = plan("a", 40.0, 20) | plan("b", 50.0, 30)
    assert list(check_automatic(others | plan("auto 25", 40.0, 25))) == []
    assert list(check_automatic(others | plan("auto 25", 39.5, 25))) == ["auto 25: a is no larger and 0.5 dB better"]


@pytest.mark.parametrize("wrong", [["--prompts", "30"], ["--prompts", "0"], ["--seeds", "0"], ["--plans", "x/y"]])
def test_what_cannot_be_measured_is_said(wrong, painter, tmp_path):
    with pytest.raises(SystemExit) as error:
        quality.main(["--quick", *wrong, "--out", str(tmp_path)])
    assert error.value.code == 2
