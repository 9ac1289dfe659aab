# Everything happens in .venv; `make help` lists what there is.

VENV  ?= .venv
TORCH ?= torch==2.13.0
JOBS  ?= 2
ARGS  ?=

# The oldest Python that has it all comes first: wheels for the newest one are the last to appear.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

BIN     := $(VENV)/bin
KERNELS := hf_sparse/inference/kernels
SETUP   := setup.cfg pyproject.toml $(wildcard setup.py hf_sparse/inference/kernels/build.py hf_sparse/inference/kernels/native/*.*)
INSTALL := $(BIN)/python tools/pip_install.py $(VENV)/pip.log

# Nothing below needs a network once the environment stands.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help demo test check sanitize format tables api clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@printf '\n  VENV=%s  TORCH=%s  PYTHON=%s  JOBS=%s\n' '$(VENV)' '$(TORCH)' '$(PYTHON)' '$(JOBS)'

demo: $(VENV)/.demo ## prune a real model on real text and print what it gained; ARGS=--smoke for a minute's version
	@$(OFFLINE) $(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/.dev ## the whole suite, doctests included; ARGS='-k name' for a part of it
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --durations=10 $(ARGS)

check: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/.torch ## the native kernels under AddressSanitizer and UBSan, every instruction set emulated
	$(BIN)/python $(KERNELS)/build.py test

format: $(VENV)/.dev ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/.demo ## write the tables of README.md and docs/ anew from benchmarks/results/
	@$(BIN)/python benchmarks/tables.py

api: $(VENV)/.dev ## write docs/api.md anew from the docstrings
	@$(BIN)/python tools/api_reference.py

clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

distclean: clean ## remove the environment as well
	rm -rf $(VENV)

# torch first and alone: a later step then finds it and takes no other.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "No Python of 3.11 or newer found. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24.1'
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(SETUP) | $(VENV)/.torch
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(SETUP) | $(VENV)/.torch
	@$(INSTALL) --editable '.[demo,test,quality]'
	@touch $(VENV)/.demo $@
