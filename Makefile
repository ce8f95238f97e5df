# make demo   sets up and runs the main job on the bundled model
# make test   sets up and runs linter and tests
#
# PyTorch: where pip's own find-links hold a build of it for this Python (a CPU build, say), that one is installed
# first and alone, so that nothing else pulls several GB of CUDA packages. Otherwise a torch that is in .venv already
# is kept, and pip chooses one where there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/python -m demo_model.side_by_side out/demo.png

test: setup lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q --no-index --no-deps torch 2>/dev/null || true
	$(BIN)/pip install -q -r requirements.txt 'pytest>=8.2' 'ruff>=0.14' pytest-xdist websocket-client torchmetrics peft
	@touch $@

clean:
	rm -rf $(VENV) out
