# Pagoda: `make serve` and `make test` are the two commands; `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := hatch_build.py $(shell find pagoda/csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-long clients check check-triton-newest gpu-check wheel bench bench-quick bench-peers bench-scale clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# The runtime alone: numpy and our native library, no torch. A minute, not gigabytes.
$(VENV)/.runtime: pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable .
	@touch $@

# What the tests compare with: torch and transformers, triton, the openai client. Never CUDA without a GPU.
$(VENV)/.test: $(VENV)/.runtime scripts/install_torch.sh
	sh scripts/install_torch.sh $(BIN)/python
	$(PIP) install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.runtime
	$(PIP) install --quiet --editable '.[lint]'
	@touch $@

setup: $(VENV)/.test $(VENV)/.lint ## install everything, the tests' and linters' needs included
	$(BIN)/pagoda fetch

serve: $(VENV)/.runtime ## serve the default model on http://127.0.0.1:8000 (ARGS="--port 9000" ...)
	$(BIN)/pagoda serve $(ARGS)

test: $(VENV)/.test ## run the test suite
	$(BIN)/pagoda fetch --if-possible
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: $(VENV)/.test ## the tests that take minutes, the real clients among them
	$(BIN)/python -m pytest -m "long" $(ARGS)
	sh scripts/sanitize.sh $(BIN)/python tests/kernels

clients: $(VENV)/.test ## run the real clients and write docs/clients.md (ARGS="LangChain DSPy" ...)
	$(BIN)/python -m tests.clients $(ARGS)

check: $(VENV)/.lint ## run the linters
	$(BIN)/ruff check .
	$(BIN)/mypy pagoda/base pagoda/engine
	$(BIN)/lint-imports

# CI pins Triton; this is for every week: the kernels, interpreted and compiled for all targets, with the newest one.
check-triton-newest: $(VENV)/.test ## test the GPU kernels with the newest Triton
	sh scripts/triton_newest.sh $(BIN)/python

wheel: $(VENV)/.runtime ## build one binary wheel with all instruction sets and test it where there is no compiler
	sh scripts/build_wheel.sh $(BIN)/python

# matplotlib draws the reports' plots
$(VENV)/.bench: $(VENV)/.runtime
	$(PIP) install --quiet matplotlib
	@touch $@

bench: $(VENV)/.bench ## workloads W1 to W6 of the default model beside this machine's ceilings, into docs/benchmarks
	$(BIN)/python benchmarks/workloads.py --report $(ARGS)

bench-quick: $(VENV)/.bench ## two minutes: what moved since the last report
	$(BIN)/python benchmarks/workloads.py --work W1,W2-512,W3,W5 --rounds 3 --compare

bench-peers: $(VENV)/.bench ## beside llama.cpp, OpenVINO, vLLM and transformers, each installed under build/peers (ARGS="--work W1,W3" ...)
	$(BIN)/python -m benchmarks.peers --report $(ARGS)

gpu-check: ## everything that needs a GPU, with $(PYTHON)'s own torch, from the checkout (ARGS="--wheels FOLDER" ...)
	$(PYTHON) scripts/gpu_check.py $(ARGS)

bench-scale: $(VENV)/.bench ## what scheduling costs by running requests and blocks
	$(BIN)/python benchmarks/scale.py --report

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist
	find pagoda -name '*.so' -delete
