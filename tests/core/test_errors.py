"""How an error names itself: to who imported the engine, and to the user of a host that loaded it by path."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from quant_pack.quant_core import errors as loaded_by_path

from quant_core import errors

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.QuantError)]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_s_type_holds_no_path(name):
    assert getattr(loaded_by_path, name).__module__ == "quantized_diffusers"
    assert getattr(errors, name).__module__ == "quant_core.errors"


def test_one_that_was_imported_goes_from_process_to_process():
    script = (
        "import pickle, sys; from quant_core import SpecError; sys.stdout.buffer.write(pickle.dumps(SpecError('x')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert type(pickle.loads(done.stdout)) is errors.SpecError


def test_a_subclass_made_elsewhere_is_named_alike():
    class Own(loaded_by_path.StoreError):
        pass

    assert f"{Own.__module__}.{Own.__name__}" == "quantized_diffusers.Own"
