"""The nodes, as ComfyUI's extension."""

import logging

from ..quant_core import why_not_installed
from .auto_plan import AutoMapping
from .comfy_runtime import ComfyExtension
from .compare_quant import CompareQuant
from .generate import Generate
from .inspect_quant import InspectQuant
from .load_pipeline import LoadQuantizedPipeline
from .optimize_pipeline import OptimizePipeline
from .quant_config import QuantConfig
from .quant_mapping import QuantMapping
from .save_pipeline import SaveQuantizedPipeline
from .sensitivity import MeasureSensitivity

NODES = [
    QuantConfig,
    QuantMapping,
    LoadQuantizedPipeline,
    OptimizePipeline,
    Generate,
    InspectQuant,
    SaveQuantizedPipeline,
    CompareQuant,
    MeasureSensitivity,
    AutoMapping,
]


class QuantizedDiffusers(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self):
        """Say at the start what else shows at the first run only."""
        if why := why_not_installed():
            logging.warning("Quantized Diffusers: %s", why)

    async def get_node_list(self):
        """The node classes."""
        return NODES
