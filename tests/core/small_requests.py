"""One small request for each of the tiny pipelines and the demo."""

from quant_core import GenerateRequest, LoadRequest, load_pipeline, parse_plan

EXTRA = {
    "pixart": {"use_resolution_binning": False},
    "wan": {"num_frames": 5},
    "demo": {"max_sequence_length": 16},
    "hunyuanvideo15": {"num_frames": 5},
    "motif": {"num_frames": 5, "max_sequence_length": 16},
}
SIDES = {"pixart": 16, "sd": 16, "sd3": 16, "wan": 32, "zimage": 32, "demo": 32}  # pixels
FAMILY_SIDES = {"controlnets": 16}  # of the others 32


def small(name, prompt="a cat", steps=2, extra=(), **settings):
    """A request that the pipeline of that name answers in a moment."""
    extra = EXTRA.get(name, {}) | dict(extra)
    length = extra.pop("max_sequence_length", None)
    side = SIDES.get(name) or FAMILY_SIDES.get(name, 32)
    return GenerateRequest(
        prompt, width=side, height=side, steps=steps, max_sequence_length=length, extra=extra, **settings
    )


def load(tiny, name, plan=""):
    """The tiny pipeline of that name, or the demo."""
    return load_pipeline(LoadRequest("demo" if name == "demo" else str(tiny(name)), parse_plan(plan or "none")))
