"""Load, run and inspect quantized diffusers pipelines. Knows nothing of ComfyUI."""

from .autoplan import FITS, AutoPlan, AutoPlanRequest, auto_plan, auto_plan_data, expected_psnr, format_auto_plan
from .backend import Backend, Option, Scheme
from .backends import backends, get_backend
from .byte_size import parse_size
from .comparison import ComparedPlan, CompareRequest, Comparison, compare, labelled
from .comparison_chart import chart
from .comparison_picture import differences, grid
from .comparison_report import comparison_csv, comparison_data, format_comparison
from .drawing import THEMES, as_image
from .errors import (
    BackendUnavailable,
    DeviceUnsupported,
    QuantError,
    SourceError,
    SpecError,
    StoreError,
    did_you_mean,
    dispensable,
)
from .estimate import ComponentEstimate, Estimate, activations, estimate, estimate_data, format_estimate, needs
from .expectation import usable_specs
from .fitting import what_fits
from .forecast import PeakReport, forecast, peak_data, peak_report
from .generation import Step, generate
from .inspection import ComponentReport, footprint, format_report, inspect_pipeline, report_data
from .inspection_picture import inspection_picture
from .latents import vae_channels
from .layer_report import LayerReport, format_layers, inspect_layers, layer_data
from .loading import DTYPES, LoadRequest, load_pipeline
from .locating import DEMO, find_folder
from .managing import manage
from .model_note import SavedComponent, format_saved
from .notation import format_plan, parse_plan, parse_spec, plan_from_diffusers, without_folders
from .optimization import Optimization, choose, format_runs, optimize, parse_optimization, ways
from .pipeline import QuantizedPipeline
from .placement import Placement
from .preview import Budget, LatentRGB, Preview, latent_rgb
from .progress import Pace, bytes_done
from .request import OUTPUTS, TYPICAL_PROMPT, GenerateRequest
from .requirements import missing, why_not_installed
from .saving import check_target, save_pipeline
from .sensitivity import SensitivityRequest, measure_sensitivity
from .sensitivity_data import Sensitivity, format_sensitivity, parse_sensitivity, read_sensitivity
from .settings import Setting, Way
from .source import PipelineIndex, read_index
from .specs import QuantPlan, QuantSpec
from .store import OFF, Store, default_store
from .user_text import parse_json

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Budget",
    "ComponentEstimate",
    "ComponentReport",
    "CompareRequest",
    "ComparedPlan",
    "Comparison",
    "DEMO",
    "DTYPES",
    "DeviceUnsupported",
    "Estimate",
    "GenerateRequest",
    "LatentRGB",
    "LayerReport",
    "LoadRequest",
    "OFF",
    "OUTPUTS",
    "Optimization",
    "Option",
    "PeakReport",
    "Pace",
    "PipelineIndex",
    "Placement",
    "Preview",
    "QuantError",
    "QuantPlan",
    "QuantSpec",
    "QuantizedPipeline",
    "Scheme",
    "Setting",
    "SavedComponent",
    "SourceError",
    "SpecError",
    "Step",
    "Store",
    "StoreError",
    "TYPICAL_PROMPT",
    "THEMES",
    "Way",
    "activations",
    "as_image",
    "backends",
    "bytes_done",
    "chart",
    "choose",
    "check_target",
    "compare",
    "comparison_csv",
    "comparison_data",
    "default_store",
    "did_you_mean",
    "differences",
    "dispensable",
    "estimate",
    "estimate_data",
    "find_folder",
    "forecast",
    "footprint",
    "format_comparison",
    "format_estimate",
    "format_layers",
    "format_plan",
    "format_report",
    "format_runs",
    "format_saved",
    "generate",
    "get_backend",
    "grid",
    "inspect_layers",
    "inspect_pipeline",
    "labelled",
    "inspection_picture",
    "latent_rgb",
    "layer_data",
    "load_pipeline",
    "manage",
    "missing",
    "needs",
    "optimize",
    "parse_json",
    "parse_optimization",
    "parse_plan",
    "parse_size",
    "parse_spec",
    "peak_data",
    "peak_report",
    "plan_from_diffusers",
    "read_index",
    "report_data",
    "save_pipeline",
    "vae_channels",
    "ways",
    "what_fits",
    "why_not_installed",
    "without_folders",
    "FITS",
    "AutoPlan",
    "AutoPlanRequest",
    "auto_plan",
    "auto_plan_data",
    "expected_psnr",
    "format_auto_plan",
    "usable_specs",
    "SensitivityRequest",
    "measure_sensitivity",
    "Sensitivity",
    "format_sensitivity",
    "parse_sensitivity",
    "read_sensitivity",
]
