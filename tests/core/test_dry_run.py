"""A dry run counts what is alive, and leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from torch import nn

from quant_core.backend import Workspace
from quant_core.dry_run import dry_run
from quant_core.errors import SpecError

CPU = torch.device("cpu")
ROW = 1024 * 4  # bytes of 1024 float32


class Component(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.inner = nn.Linear(1024, 1024, bias=False, device="meta")
        self.run = run

    def forward(self, values):
        return self.run(self, values)


class Pipeline:
    """Calls its component with ten rows of numbers."""

    def __init__(self, run):
        self.component = Component(run)

    def __call__(self, calls=1):
        for _ in range(calls):
            result = self.component(torch.ones(10, 1024))
        return result


def run(body, workspaces=None, **arguments):
    pipeline = Pipeline(body)
    with torch.no_grad():
        model = pipeline.component
        workspaces = {model.inner: workspaces} if workspaces else {}
        return dry_run(pipeline, {"component": model}, arguments, workspaces, CPU)


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        (lambda self, values: values, 10),
        (lambda self, values: values.mul_(2), 10),
        (lambda self, values: values.T[:5], 10),
        (lambda self, values: values + 1, 20),
        (lambda self, values: values + 1 + 1, 30),
        (lambda self, values: self.inner(values), 20),
        (lambda self, values: self.inner(values.double().float()), 40),
        (lambda self, values: values + torch.arange(1024), 22),
        (lambda self, values: nn.functional.scaled_dot_product_attention(*[values[None, None]] * 3), 20 + 10 / 1024),
    ],
)
def test_bytes_alive_are_counted(body, rows):
    found = run(body)
    assert found.failure == ""
    assert found.peaks == {"component": int(rows * ROW)}


def test_results_are_zeros_on_the_cpu_of_the_right_shape():
    result = run(lambda self, values: {"sample": (values + 1).half()}).result["sample"]
    assert (result.device, result.dtype, result.shape) == (CPU, torch.float16, (10, 1024))
    assert not result.any()


def test_what_a_quantized_layer_takes_is_added_while_it_runs():
    asked = []

    def of_rows(rows):
        asked.append(rows)
        return Workspace(100 * ROW, 1 * ROW)

    assert run(lambda self, values: self.inner(values), of_rows).peaks == {"component": 110 * ROW}
    assert asked == [10]
    spread = run(lambda self, values: self.inner(values), lambda rows: Workspace(2 * ROW, 50 * ROW))
    assert spread.peaks == {"component": 70 * ROW}


def test_the_same_shapes_are_computed_once():
    calls = []
    run(lambda self, values: calls.append(values) or values + 1, calls=5)
    assert len(calls) == 1


def test_what_was_seen_until_a_failure_is_kept():
    found = run(lambda self, values: (values + 1).sum().item())
    assert found.peaks == {"component": 20 * ROW + 4}
    assert found.unfinished == "component" and found.failure


def test_a_pipeline_that_refuses_its_arguments_says_so():
    with pytest.raises(SpecError, match="Pipeline refuses the request: .* unexpected keyword argument 'fps'"):
        run(lambda self, values: values, fps=1)


def test_out_of_memory_is_not_taken_for_an_answer():
    def fail(self, values):
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        run(fail)


def test_nothing_is_left_behind():
    gc.collect()
    gc.disable()
    try:
        pipeline = Pipeline(lambda self, values: self.inner(values))
        model, before = pipeline.component, nn.functional.scaled_dot_product_attention
        attributes = set(vars(model)), set(vars(model.inner))
        found = dry_run(pipeline, {"component": model}, {}, {model.inner: lambda rows: Workspace(1, 1)}, CPU)
        assert (set(vars(model)), set(vars(model.inner))) == attributes
        assert nn.functional.scaled_dot_product_attention is before
        assert torch.ones(1).device == CPU and not torch.is_inference_mode_enabled()
        held = weakref.ref(model)
        del pipeline, model, found
        assert held() is None
    finally:
        gc.enable()
