# From a fresh clone: `make run` decodes, `make test` checks everything.
#   make run ARGS="drafter=none"         Hydra overrides go in ARGS, instead of those below
#   make test PYTEST_ARGS="-m slow"      any pytest option
#   make run PYTHON=python3.12 VENV=../specdec-env
#   make test PINNED=0               the newest releases instead of those in constraints.txt
#   make newest                      a short test with pre-releases of what changes most, beside the pinned rest

PYTHON ?= python3
VENV ?= .venv
# Fast anywhere: text is looked up, and the tree is chosen by what passes cost on this machine.
ARGS ?= drafter=ngram tree=cost_aware tree.rates=zoo_ngram prompts.limit=20
PYTEST_ARGS ?=
# Installed first where there is no NVIDIA GPU: a plain `torch` may bring gigabytes of CUDA libraries.
# To name an index of CPU builds: make CPU_TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
CPU_TORCH ?= torch==2.13.0 triton==3.9.0
PINNED ?= 1

# Where releases of hydra and transformers show: settings, the command, loading, refusals, tokens.
SHORT ?= tests/lab/test_settings.py tests/lab/test_build.py tests/core/test_run.py tests/models/test_load.py \
	tests/models/test_probe.py tests/lab/test_launcher.py

BIN := $(VENV)/bin
NEWEST := $(VENV)/newest
STAMP := $(VENV)/.installed
# -q twice keeps errors and drops warnings. Python compiles what is imported when it is, which is a small part.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q
INSTALL := $(PIP) install --no-compile
VERSIONS := $(if $(filter 0,$(PINNED)),,-c constraints.txt)

# Tests start many processes, and each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup run test pytest newest lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make run [ARGS=...]          decode; ARGS are Hydra overrides"
	@echo "make test [PYTEST_ARGS=...]  lint, types and tests"
	@echo "make newest                  a short test on the newest hydra and transformers"
	@echo "make lint                    ruff and mypy alone; make pytest: the tests alone"
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
		$(INSTALL) $(VERSIONS) $(CPU_TORCH); \
	fi
	@echo "[setup] specdec-lab, editable, with development tools (minutes the first time)"
	@$(INSTALL) $(VERSIONS) -e '.[dev]'
	@$(INSTALL) $(VERSIONS) --no-deps --target $(VENV)/apart --upgrade torchao compressed-tensors loguru
	@touch $@
	@echo "[setup] done"

run: setup
	$(BIN)/python -m specdec.run $(ARGS)

# Beside each other: mypy uses one core.
test: setup
	@$(MAKE) --no-print-directory -j 2 lint pytest

pytest: setup
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# A second environment that sees the first, and has newer hydra and transformers. What fails here is reported alone.
newest: setup
	@$(BIN)/python -m venv $(NEWEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth"
	@{ $(NEWEST)/bin/python -m pip --disable-pip-version-check -q -q install --upgrade --pre hydra-core transformers \
		&& $(NEWEST)/bin/python -m pip --disable-pip-version-check list 2>/dev/null | grep -E '^(hydra-core|omegaconf|transformers) ' \
		&& $(NEWEST)/bin/python -m pytest -q -n auto -p no:cacheprovider -m 'not slow and not gpu' $(SHORT); } \
		|| echo "[newest] the newest releases cannot be had, or a test fails with them: see above; the pinned ones stand"

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
