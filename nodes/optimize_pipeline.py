"""A pipeline whose runs are faster or smaller."""

from ..quant_core import Optimization, optimize, ways
from .comfy_node import Node
from .comfy_runtime import io
from .types import CATEGORY, PipelineType
from .widgets import setting_of, way_choice

_TOOLTIPS = {
    "compile": "torch.compile: half a minute or more before the first picture, and kept in the store for later "
    "starts. A new seed, prompt or number of steps costs nothing more, a new size once.",
    "attention": "What computes attention, where the denoiser lets one choose; off leaves diffusers' own choice.",
    "cache": "Reuse what the denoiser computed at earlier steps, where it changes little. It costs quality.",
    "offload": "managed: by ComfyUI's memory manager. The others are diffusers' own, as its documentation has them.",
}
_FIRST = {"compile": "auto", "offload": "managed"}  # what a new node shows


class OptimizePipeline(Node):
    """Compiling, attention, step caching, offloading."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_OptimizePipeline",
            display_name="Optimize Pipeline",
            category=CATEGORY,
            description="Makes the runs of a pipeline faster or smaller. What cannot work together is refused before "
            "anything is run; the pipeline that goes in stays as it is.",
            search_aliases=[
                "torch compile",
                "compile",
                "speed",
                "attention",
                "first block cache",
                "teacache",
                "offload",
            ],
            inputs=[
                PipelineType.Input("pipeline", tooltip="From Load Quantized Pipeline."),
                *(
                    io.DynamicCombo.Input(part, options=_choices(part), optional=True, tooltip=tooltip)
                    for part, tooltip in _TOOLTIPS.items()
                ),
            ],
            outputs=[PipelineType.Output("pipeline", tooltip="To Generate and Inspect Quantization.")],
        )

    @classmethod
    def run(cls, pipeline, **choices):
        settings = {part: setting_of(part, choices.get(part)) for part in _TOOLTIPS}
        return io.NodeOutput(optimize(pipeline, Optimization(**settings)))


def _choices(part):
    found = [way_choice(way) for way in ways(part)]
    off = io.DynamicCombo.Option("off", [])
    return sorted([off, *found], key=lambda choice: choice.key != _FIRST.get(part, "off"))
