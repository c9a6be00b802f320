# From a fresh clone: `make run` decodes, `make test` checks everything.
#   make run ARGS="drafter=none"         Hydra overrides go in ARGS
#   make test PYTEST_ARGS="-m slow"      any pytest option
#   make run PYTHON=python3.12 VENV=../specdec-env
#   make test PINNED=0               the newest releases instead of those in constraints.txt

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
# Installed first where there is no NVIDIA GPU: a plain `torch` may bring gigabytes of CUDA libraries.
# To name an index of CPU builds: make CPU_TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
CPU_TORCH ?= torch==2.13.0 triton==3.9.0
PINNED ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -q twice keeps errors and drops warnings.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q
VERSIONS := $(if $(filter 0,$(PINNED)),,-c constraints.txt)

.PHONY: help setup run test lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make run [ARGS=...]          decode; ARGS are Hydra overrides"
	@echo "make test [PYTEST_ARGS=...]  lint, types and tests"
	@echo "make lint                    ruff and mypy alone"
	@echo "make format                  let ruff mend what it can"
	@echo "make clean                   remove the environment, caches and builds"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "[setup] environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "[setup] NVIDIA GPU found: pip picks the torch build"; \
	else \
		echo "[setup] no NVIDIA GPU: $(CPU_TORCH)"; \
		$(PIP) install $(VERSIONS) $(CPU_TORCH); \
	fi
	@echo "[setup] specdec-lab, editable, with development tools (minutes the first time)"
	@$(PIP) install $(VERSIONS) -e '.[dev]'
	@$(PIP) install $(VERSIONS) --no-deps --target $(VENV)/apart --upgrade torchao
	@touch $@
	@echo "[setup] done"

run: setup
	@$(BIN)/python -m specdec.run $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
