# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SEEDS ?= 2000
JOBS ?= 2

.PHONY: demo demo-vllm demo-fsdp test test-vllm check format sim bench clean help

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Weight bus needs Python 3.11 or later; this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing into $(VENV), about two minutes the first time'
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing into $(VENV), about two minutes the first time'
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## Train a real model while engines follow it, every version proven
	@.ci/libraries p2p
	@$(BIN)/weightbus demo --report build/demo

demo-vllm: $(VLLM_VENV)/.vllm ## The same with vLLM servers, on CPUs: about five minutes
	@.ci/libraries p2p
	@$(VLLM_VENV)/bin/weightbus demo --engine vllm

demo-fsdp: $(VENV)/.demo ## Train with FSDP2 on two ranks, each version proven in two engines
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/fsdp_trainer.py

test: $(VENV)/.dev ## Run all tests
	@.ci/libraries p2p network languages browser
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

$(VLLM_VENV)/.vllm: pyproject.toml constraints-vllm.txt .ci/vllm
	PYTHON='$(PYTHON)' .ci/vllm $(VLLM_VENV)
	@touch $@

test-vllm: $(VLLM_VENV)/.vllm ## Run the tests of real vLLM, on CPUs, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

check: $(VENV)/.dev ## Lint, formatting, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sim: $(VENV)/.dev ## Simulate rounds under faults: make sim SEEDS=100000
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

bench: $(VENV)/.dev ## Measure planning; results go to benchmarks/results
	$(BIN)/python -m benchmarks.planning

clean: ## Remove the virtual environments and caches
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
