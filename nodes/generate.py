"""From a prompt to images."""

import logging

from ..quant_core import GenerateRequest, SpecError, format_runs, generate, parse_json
from .comfy_node import Node
from .comfy_progress import step_reporter
from .comfy_runtime import io, ui
from .types import CATEGORY, PipelineType
from .widgets import seed_input

DEFAULT = " leaves the pipeline's own default."


class Generate(Node):
    """Runs a pipeline."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_Generate",
            display_name="Generate",
            category=CATEGORY,
            description="Runs the pipeline as diffusers would. Shows progress and previews; cancelling stops it "
            "between the blocks of a model.",
            search_aliases=["diffusers sampler", "text to image", "run pipeline", "quantized sampler"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="From Load Quantized Pipeline."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What to paint."),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What not to paint, where the pipeline takes one. Flux does with true_cfg_scale in extra.",
                ),
                *size_inputs(),
                seed_input("Of the noise, which is the same on every device."),
                io.Int.Input(
                    "images_per_prompt", default=1, min=1, max=64, optional=True, tooltip="How many images at once."
                ),
                io.Int.Input(
                    "max_sequence_length",
                    default=0,
                    min=0,
                    max=8192,
                    optional=True,
                    advanced=True,
                    tooltip="Tokens of the prompt that are read; 0" + DEFAULT,
                ),
                io.String.Input(
                    "extra",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder='{"true_cfg_scale": 4.0}',
                    tooltip='Further arguments of the pipeline\'s call as a JSON object, as {"true_cfg_scale": 4.0}. '
                    "They are checked against its signature.",
                ),
                io.Boolean.Input(
                    "remember_prompts",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Text encoders answer from memory what they have answered before, with the same bits: a "
                    "new seed neither runs nor loads them.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="All images; of a video pipeline its frames.")],
            has_intermediate_output=True,  # so that its notices come back with a cached result
        )

    @classmethod
    def run(cls, pipeline, prompt, **settings):
        request = request_of(prompt, **settings)
        images = generate(pipeline, request, step_reporter(pipeline, request))
        if text := format_runs(pipeline):
            logging.info("Generate: %s.", text)
        for notice in pipeline.notices:
            logging.warning("Generate: %s", notice)
        return io.NodeOutput(images, ui=ui.PreviewText("\n".join(pipeline.notices)) if pipeline.notices else None)


def size_inputs():
    """The widgets of a run's size, steps and guidance."""
    return [
        io.Int.Input("width", default=0, min=0, max=16384, step=16, tooltip="In pixels; 0" + DEFAULT),
        io.Int.Input("height", default=0, min=0, max=16384, step=16, tooltip="In pixels; 0" + DEFAULT),
        io.Int.Input("steps", default=0, min=0, max=10000, tooltip="Denoising steps; 0" + DEFAULT),
        io.Float.Input(
            "guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, tooltip="Guidance scale; -1" + DEFAULT
        ),
    ]


def request_of(
    prompt,
    width,
    height,
    steps,
    guidance,
    seed,
    negative_prompt="",
    images_per_prompt=1,
    max_sequence_length=0,
    extra="",
    remember_prompts=True,
):
    """The request that the widgets say.

    Raises:
        SpecError: one of them is out of its range.
    """
    return GenerateRequest(
        prompt,
        negative_prompt.strip() or None,
        width or None,
        height or None,
        steps or None,
        None if guidance == -1 else guidance,
        seed,
        images_per_prompt if images_per_prompt > 1 else None,
        max_sequence_length or None,
        _object(extra),
        remember=remember_prompts,
    )


def _object(text):
    value = parse_json("extra", text.strip() or "{}")
    if not isinstance(value, dict):
        raise SpecError(f'extra is {text.strip()!r}; it takes a JSON object, as {{"true_cfg_scale": 4.0}}.')
    return value
