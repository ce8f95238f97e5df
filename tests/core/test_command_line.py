"""`python -m quant_core`: what it prints and saves, and one sentence with exit code 2 for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from quant_core import GenerateRequest, LoadRequest, backends, format_plan, generate, load_pipeline, parse_plan
from quant_core.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PLAN = "transformer=torchao/int8wo,default=bitsandbytes_4bit/nf4?double_quant=true"


def run(*arguments):
    """(exit code, stdout, stderr) of a process of its own."""
    command = [sys.executable, "-m", "quant_core", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_backends_are_listed_as_json_and_for_people():
    code, out, err = run("backends", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["backend"] for row in rows] == list(backends())
    for row in rows:
        backend = backends()[row["backend"]]
        assert [scheme["scheme"] for scheme in row["schemes"]] == [scheme.name for scheme in backend.schemes]
        assert [option["option"] for option in row["options"]] == [option.name for option in backend.options]
        assert row["install"].startswith("pip install '") and isinstance(row["installed"], bool)
    code, out, err = run("backends")
    assert (code, err) == (0, "")
    assert all(row["backend"] in out and row["title"] in out for row in rows)


def test_inspect_prints_what_is_stored():
    code, out, err = run("inspect", "demo", "--plan", PLAN, "--json")
    assert (code, err) == (0, "")
    reports = {report["name"]: report for report in json.loads(out)["components"]}
    assert set(reports["transformer"]["formats"]) == {"Int8Tensor"}
    assert set(reports["text_encoder_2"]["formats"]) == {"nf4 double quant"}
    assert reports["vae"]["formats"] == {}
    assert json.loads(out)["footprint"] == sum(report["footprint"] for report in reports.values())


def test_generate_saves_pictures_with_what_made_them(tmp_path):
    arguments = ("--prompt", "a red circle", "--width", 128, "--height", 128, "--steps", 2, "--seed", 5)
    code, out, err = run(
        "generate", "demo", "--plan", PLAN, *arguments, "--images-per-prompt", 2, "--out", tmp_path / "a.png", "--json"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    files = [tmp_path / "a-0.png", tmp_path / "a-1.png"]
    assert told["files"] == [str(file) for file in files]
    assert told["seconds"].keys() == {"load", "generate"} and told["inspection"]["components"]

    request = GenerateRequest("a red circle", width=128, height=128, steps=2, seed=5, images_per_prompt=2)
    expected = generate(load_pipeline(LoadRequest("demo", parse_plan(PLAN))), request)
    for file, image in zip(files, expected, strict=True):
        picture = Image.open(file)
        assert picture.size == (128, 128)
        assert picture.tobytes() == (image * 255).round().byte().numpy().tobytes()
        record = json.loads(picture.text["quantized_diffusers"])
        assert record["prompt"] == "a red circle" and record["plan"] == format_plan(parse_plan(PLAN))
        assert (record["width"], record["height"], record["steps"], record["seed"]) == (128, 128, 2, 5)
        assert record["model"] == "demo" and record["pipeline"] == "FluxPipeline"
        assert record["versions"]["diffusers"] and "guidance" not in record


def test_a_picture_tells_nothing_of_the_disk_it_came_from(tmp_path, tiny, capfd):
    model = tiny("sd3")
    cache = tmp_path / "cache"
    plan = {"components": {"transformer": {"backend": "gguf", "scheme": "Q8_0"}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    small = ["--prompt", "a", "--width", "16", "--height", "16", "--steps", "1"]
    out = tmp_path / "a.png"
    assert main(["generate", str(model), "--plan", str(tmp_path / "plan.json"), *small, "--out", str(out)]) == 0
    load_pipeline(LoadRequest(str(model), parse_plan("transformer=gguf/Q8_0"), store=cache))
    (file,) = cache.glob("*/*.gguf")
    assert (
        main(["generate", str(model), "--plan", f"transformer=gguf/file?path={file}", *small, "--out", str(out)]) == 0
    )
    record = Image.open(out).text["quantized_diffusers"]
    assert f"path={file.name}" in record
    for folder in (tmp_path, model.parent, ROOT, Path.home()):
        assert str(folder) not in record
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")
    capfd.readouterr()


GENERATE = ("generate", "demo", "--prompt", "a", "--out")
BAD = [
    ((), "the following arguments are required: COMMAND; see python -m quant_core --help."),
    (("paint",), "argument COMMAND: invalid choice: 'paint'"),
    (("inspect",), "the following arguments are required: MODEL"),
    (("inspect", "demo", "--pla", "none"), "unrecognized arguments: --pla"),
    (("generate", "demo", "--out", "a.png"), "the following arguments are required: --prompt"),
    ((*GENERATE, "a.png", "--steps", "two"), "argument --steps: invalid int value: 'two'"),
    (
        ("inspect", "/nowhere"),
        "/nowhere is not a folder; give the folder of a diffusers pipeline, 'demo', or a hub id ",
    ),
    (
        ("estimate", ""),
        "The model is named by an empty text; give the folder of a diffusers pipeline, 'demo' or a hub id.",
    ),
    (("inspect", "."), "is not a diffusers pipeline: it has no model_index.json."),
    (("inspect", "demo", "--plan", "torchao"), "'torchao' is no part of a plan; write component=backend/scheme, "),
    (("inspect", "demo", "--plan", "unet=quanto/int8"), "No component 'unet' in this FluxPipeline"),
    (
        ("estimate", "demo", "--plan", "absent.json"),
        "--plan is absent.json, and there is no such file; give a .json file that is there, or a plan as ",
    ),
    (("estimate", "demo", "--plan", " absent.JSON"), "--plan is absent.JSON, and there is no such file; give a "),
    (("estimate", "demo", "--plan", "{tmp}/bytes.json"), "/bytes.json, which is no text in UTF-8; give a JSON file."),
    (("estimate", "demo", "--plan", "{tmp}/folder.json"), "/folder.json, and there is no such file; give a .json "),
    (("estimate", "demo", "--plan", "README.md/a.json"), "--plan is README.md/a.json, and there is no such file; "),
    (("estimate", "demo", "--budget", "12"), "--budget is '12', which has no unit; write 12GiB or 12MiB."),
    (("estimate", "demo", "--budget", "12T"), "--budget is '12T'; it takes a size in G, GB, GiB, M, MB or MiB, as "),
    (("estimate", "demo", "--budget", "9" * 400 + "G"), "it takes a size in G, GB, GiB, M, MB or MiB, as 8GiB."),
    (
        ("inspect", "demo", "--plan", "demo_model/pipeline/model_index.json"),
        "A plan is an object with components and ",
    ),
    (
        ("inspect", "demo", "--plan", "torchao/int4wo", "--device", "cpu"),
        "torchao/int4wo needs a CUDA GPU of compute ",
    ),
    (("inspect", "demo", "--dtype", "int8"), "dtype is 'int8'; use one of: bfloat16, float16, float32."),
    (("inspect", "demo", "--device", "tpu"), "device is 'tpu'; use one of: cpu, cuda."),
    (("inspect", "demo", "--variant", "fp16"), "No component has weights of the variant 'fp16'; load it without a "),
    ((*GENERATE, "a.jpg"), "--out is a.jpg; it must end in .png."),
    ((*GENERATE, "absent/a.png"), "--out is absent/a.png, and the folder absent does not exist."),
    ((*GENERATE, "a.png", "--steps", "0"), "steps is 0; it takes a whole number from 1 to 10000."),
    ((*GENERATE, "a.png", "--extra", "[1]"), "--extra is '[1]'; it takes a JSON object."),
    ((*GENERATE, "a.png", "--extra", "{"), "--extra is no valid JSON: Expecting property name enclosed in double "),
    ((*GENERATE, "a.png", "--extra", '{"a": 1, "a": 2}'), "--extra gives 'a' twice; give it once."),
    ((*GENERATE, "a.png", "--extra", '{"generator": 1}'), "generator is set by the engine and cannot be given."),
    ((*GENERATE, "a.png", "--extra", '{"fps": 1}'), "FluxPipeline takes no fps"),
    ((*GENERATE, "a.png", "--extra", '{"sigmas": ["a"]}'), "sigmas is ['a']; it takes a list of finite numbers."),
    ((*GENERATE, "a.png", "--width", "8"), "width is 8; FluxPipeline takes multiples of 16: 16."),
    ((*GENERATE, "a.png", "--negative-prompt", "rain"), "ignores negative_prompt while true_cfg_scale is 1.0"),
    ((*GENERATE, "a.png", "--guidance", "3.5"), "This FluxTransformer2DModel ignores guidance"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, capfd, monkeypatch, tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.json").mkdir()
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    monkeypatch.chdir(ROOT)
    capfd.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith(".\n") and sentence in err
    assert not (ROOT / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("inspect", "demo", "--plan", "transformer=bitsandbytes_4bit/nf4?skip=x"),
            "Skip pattern 'x' matches no module",
        ),
        ((*GENERATE, "a.png", "--steps", "1", "--extra", '{"fps": 1}'), "FluxPipeline takes no fps"),
    ],
)
def test_the_libraries_add_nothing_to_the_sentence(arguments, sentence):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and sentence in err
    assert err.count("\n") == 1 and err.endswith(".\n")
