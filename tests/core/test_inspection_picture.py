"""The picture of an inspection: nothing covers anything, all is on it, and it can be read in both themes."""

from itertools import combinations

import pytest

from quant_core import (
    THEMES,
    GenerateRequest,
    LoadRequest,
    PeakReport,
    SpecError,
    as_image,
    generate,
    inspect_layers,
    inspect_pipeline,
    inspection_picture,
    layer_drawing,
    load_pipeline,
    parse_plan,
    peak_report,
)
from quant_core.drawing import overlap
from quant_core.errors import gib
from quant_core.inspection import ComponentReport
from quant_core.inspection_picture import inspection_sheet
from quant_core.layer_cells import Palette
from quant_core.layer_map import sections
from quant_core.layer_report import LayerReport

THREE = "transformer=torchao/int8wo?skip=proj_out,text_encoder_2=bitsandbytes_4bit/nf4,text_encoder=gguf/Q8_0"
PEAK = PeakReport(1024, 1024, 31 << 30, 14 << 30, 3 << 30, 13 << 30, "allocated by PyTorch on the GPU")
JOINT = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out")]
JOINT += ["norm1.linear", "norm1_context.linear", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj"]
SINGLE = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
FLUX = [
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.guidance_embedder.linear_2", "x_embedder"),
    *(f"transformer_blocks.{block}.{name}" for block in range(19) for name in JOINT),
    *(f"single_transformer_blocks.{block}.{name}" for block in range(38) for name in SINGLE),
    "proj_out",
]
T5 = [f"encoder.block.{block}.layer.0.SelfAttention.{name}" for block in range(24) for name in "qkvo"]
INNER = ["attn1.to_q", "attn1.to_k", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "ff.net.0.proj", "ff.net.2"]
UNET = ["time_embedding.linear_1", "time_embedding.linear_2"]
UNET += [
    f"down_blocks.{block}.attentions.{number}.{name}"
    for block in (1, 2)
    for number in (0, 1)
    for name in ["proj_in", *(f"transformer_blocks.{inner}.{name}" for inner in range(10) for name in INNER)]
]
LONG = "a_component_with_a_name_that_nobody_would_give_to_anything_but_a_test_of_pictures"


def component(name, names, form="Int8Tensor", left_out=(), error=0.008, extra=2**27):
    """A made-up component with layers of these names."""
    layers = []
    for place, layer in enumerate(names):
        why, size = "skipped by the plan" if layer in left_out else "", 2 * 3072 * 3072
        measured = None if why or error is None else error * (1 + place % 7 / 5)
        stored = (f"{form}", True, size // 2) if not why else ("bfloat16", False, size)
        layers.append(LayerReport(name, layer, (3072, 3072), *stored, size, why, measured, ""))
    quantized = sum(layer.is_quantized for layer in layers)
    report = ComponentReport(
        name=name,
        class_name=f"{name}Model",
        library="diffusers",
        requested="torchao/int8wo",
        is_quantized=bool(quantized),
        method="torchao",
        formats={form: quantized} if quantized else {},
        parameters=1,
        footprint=extra + sum(layer.footprint for layer in layers),
        bytes_16bit=extra + sum(layer.bytes_16bit for layer in layers),
        left_out={layer.name: layer.left_out for layer in layers if layer.left_out},
        note="",
        dtype="bfloat16",
        device="cuda:0",
        compilable=True,
        origin="store",
        load_seconds=1.0,
        origin_note="",
    )
    return report, layers


def inspection(*components, peak=PEAK, title="FluxPipeline, made up"):
    return [report for report, _ in components], [layer for _, layers in components for layer in layers], peak, title


@pytest.fixture(scope="module")
def three():
    plan = parse_plan(
        "transformer=torchao/int8wo?skip=proj_out,text_encoder_2=bitsandbytes_4bit/nf4,text_encoder=gguf/Q8_0"
    )
    pipeline = load_pipeline(LoadRequest("demo", plan))
    generate(pipeline, GenerateRequest("a lake", width=64, height=64, steps=1, max_sequence_length=16))
    layers = inspect_layers(pipeline, errors=True)
    return inspect_pipeline(pipeline), layers, peak_report(pipeline), pipeline.title


MADE_UP = {
    "flux": inspection(
        component("text_encoder_2", T5, "nf4", error=0.09),
        component("transformer", FLUX, left_out=("proj_out",)),
        component("vae", []),
    ),
    "unet, no peak": inspection(component("unet", UNET, "qfloat8"), peak=None),
    "one component": inspection(component("transformer", ["proj_in", "proj_out"]), title=""),
    "no errors": inspection(component("transformer", FLUX, error=None)),
    "500 layers without blocks": inspection(component("unet", [f"layer_{number}" for number in range(500)])),
    "200 blocks": inspection(component("transformer", [f"blocks.{number}.linear" for number in range(200)])),
    "many formats": inspection(*(component(f"text_encoder_{n}", T5[:8], f"format_{n}") for n in range(9))),
    "long names": inspection(
        component(LONG, [f"{LONG}.{number}.{LONG}.{LONG}.to_q" for number in range(70)], LONG, (LONG,)),
        component(f"{LONG}_2", [f"{LONG}.{LONG}", f"{LONG}.{LONG}_2"], f"{LONG}_2", (f"{LONG}.{LONG}",)),
        title=f"{LONG}, {LONG}, {LONG}",
    ),
    "nothing": inspection(peak=None),
    "large sizes": inspection(
        component("transformer", FLUX, extra=900 * 2**40),
        peak=PeakReport(None, None, 2**60, 2**59, None, 2**61, LONG * 3),
    ),
}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["demo", *MADE_UP])
def test_no_label_covers_another_and_all_are_on_the_sheet(name, theme, three):
    given = three if name == "demo" else MADE_UP[name]
    sheet = inspection_sheet(*given, theme)
    picture = inspection_picture(*given, theme)
    assert picture.size[0] == sheet.width and sheet.labels
    for text, box in sheet.labels:
        assert text.strip() and box[0] >= 0 and box[1] >= 0, text
        assert box[2] <= picture.width and box[3] <= picture.height, text
    for one, other in combinations(sheet.labels, 2):
        assert not overlap(one.box, other.box), (one, other)


@pytest.mark.parametrize("name", ["demo", "flux", "unet, no peak", "200 blocks", "500 layers without blocks"])
def test_every_layer_has_a_cell_that_no_other_cell_and_no_label_covers(name, three, monkeypatch):
    drawn, draw = [], layer_drawing.draw_cell

    def noted(sheet, palette, layer, x, y):
        drawn.append((layer, (x, y, x + layer_drawing.INSIDE, y + layer_drawing.INSIDE)))
        draw(sheet, palette, layer, x, y)

    monkeypatch.setattr(layer_drawing, "draw_cell", noted)
    reports, layers, peak, title = three if name == "demo" else MADE_UP[name]
    sheet = inspection_sheet(reports, layers, peak, title)
    wanted = [layer for layer in layers if layer.component != "vae"]  # of which no layer is quantized
    assert sorted(id(layer) for layer, _ in drawn) == sorted(map(id, wanted))
    corners = {box[:2] for _, box in drawn}
    assert len(corners) == len(drawn)
    for _, box in drawn:
        assert box[0] >= 0 and box[2] <= sheet.width
        assert not [label for label in sheet.labels if overlap(label.box, box)]


def test_exact_sizes_and_the_summary_of_errors_are_on_it(three):
    reports, layers, peak, title = three
    texts = [label.text for label in inspection_sheet(*three).labels]
    for report in reports:
        assert report.name in texts and gib(report.bytes_16bit) in texts
        assert f"{gib(report.footprint)}, {report.footprint / report.bytes_16bit:.1%}" in texts
    for size in (peak.resident, peak.in_turn, peak.measured):
        assert gib(size) in texts
    assert title in texts and "left out (1)" in texts and "nf4 (14)" in texts and "Int8Tensor (53)" in texts
    assert any(text.startswith("14 linear layers, all nf4; error 9.") for text in texts)


def test_blocks_are_columns_and_what_is_in_none_stands_apart():
    found = {section.title: section for section in sections(component("transformer", FLUX)[1])}
    assert list(found) == ["", "transformer_blocks", "single_transformer_blocks"]
    assert found[""].rows == (*FLUX[:3], "proj_out") and found[""].columns == ("",)
    assert found["transformer_blocks"].columns == tuple(map(str, range(19)))
    assert found["transformer_blocks"].rows == tuple(JOINT)
    assert found["single_transformer_blocks"].cells["37", "proj_out"].name == "single_transformer_blocks.37.proj_out"


def test_blocks_of_blocks_are_looked_into_where_they_are_large():
    found = {section.title: section for section in sections(component("unet", UNET)[1])}
    assert found["down_blocks.2.attentions.1.transformer_blocks"].columns == tuple(map(str, range(10)))
    assert found["down_blocks.2.attentions.1.transformer_blocks"].rows == tuple(INNER)
    assert found["down_blocks.2.attentions.1"].rows == ("proj_in",)
    assert sum(len(section.cells) for section in found.values()) == len(UNET)


@pytest.mark.parametrize("theme", THEMES)
def test_a_larger_error_is_a_stronger_colour_and_each_format_has_its_own(theme):
    def strength(colour):
        return sum(abs(one - other) for one, other in zip(colour, THEMES[theme].paper, strict=True))

    layers = [*component("transformer", FLUX)[1], *component("text_encoder", T5, "nf4", error=0.09)[1]]
    palette = Palette(layers, THEMES[theme])
    assert palette.span == (0.005, 0.2)
    assert len(set(palette.colours.values())) == 2
    for name in palette.colours:
        strengths = [strength(palette.shade(name, error)) for error in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)]
        assert strengths == sorted(set(strengths)) and strengths[0] > 60
        assert palette.shade(name, 0.2) == palette.shade(name, None) == palette.colours[name]
    assert Palette(component("transformer", FLUX, error=None)[1], THEMES[theme]).span is None


def luminance(colour):
    """As WCAG 2 defines it."""
    parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_and_colours_stand_out_from_the_paper(theme):
    def contrast(colour):
        light, dark = sorted((luminance(colour), luminance(theme.paper)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(theme.ink) > 12 and contrast(theme.faint) > 4.5
    assert all(contrast(colour) > 3 for colour in theme.colours)


def test_it_becomes_an_image_and_an_unknown_theme_is_told(three):
    image = as_image(inspection_picture(*three))
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3 and 0 <= image.min() < image.max() <= 1
    with pytest.raises(SpecError, match="theme is 'blue'; use one of: dark, light."):
        inspection_picture(*three, theme="blue")
