# Every target sets up what it needs: `make quickstart` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
JOBS ?= 2
TORCH ?= 2.14.1
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install format check test test-all gpu quickstart bench wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv with the pinned tools and libraries

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

format: install  ## rewrite the code in the house format
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

check: install  ## ruff, mypy --strict, codespell (the ratchets are tests)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/codespell src tests benchmarks examples docs README.md CHANGELOG.md

test: install  ## the tests, in under ten minutes on two cores
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow"

test-all: install  ## the slow tests as well
	$(BIN)/python -m pytest -q -n $(JOBS)

gpu: install  ## parity and benchmarks on a GPU
	$(BIN)/python -m pytest -q tests/gpu
	$(BIN)/dkl bench losses --device cuda --dtype bfloat16 --shapes 8192x32000,4096x128256 --out runs/bench/losses_gpu.jsonl

quickstart: install  ## train, attack, compare and report on real digits, in about six minutes
	$(BIN)/python examples/quickstart.py --out $(OUT)

bench: install  ## the measurements of docs/performance.md, on an idle machine (about half an hour)
	$(BIN)/python benchmarks/performance.py --out runs/bench

wheel: install  ## build the wheel and try it in an environment with torch alone
	rm -rf dist build/torch-alone
	$(BIN)/python -m build --no-isolation --wheel
	$(PYTHON) -m venv build/torch-alone
	build/torch-alone/bin/python -m pip install --quiet 'torch==$(TORCH)' dist/*.whl
	cd build && torch-alone/bin/python -c "import torch, dkl; a = torch.randn(4, 10, requires_grad=True); \
	  dkl.ikl_loss(a, torch.randn(4, 10)).backward(); print('dkl', dkl.__version__, 'with torch', torch.__version__, a.grad.norm().item())"

clean:  ## remove the environment, caches and builds (never runs/)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
