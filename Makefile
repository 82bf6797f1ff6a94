# megadpo: `make demo` runs the main job, `make test` runs the tests. Both make their own .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test test-gpu bench-gpu test-long mutants lint parity soak clean

help:
	@echo "make demo     the main job on this machine: a model, preferences, DPO on TP2 x PP2, export (no GPU needed)"
	@echo "make test     lint, types, layers and all tests"
	@echo "make test-gpu the tests that need a CUDA device (the others skip them)"
	@echo "make bench-gpu a Llama of 8B's shape on this machine's GPU, beside TRL; writes tools/results/h200.md"
	@echo "make test-long the tests that take minutes"
	@echo "make mutants  puts known mistakes of preference trainers into the objectives; the tests must see every one"
	@echo "make lint     only lint, types and layers"
	@echo "make parity   20 steps against TRL's DPOTrainer on six grids; needs ../shared"
	@echo "make soak     faults by the hundred, about 45 minutes; writes the scorecard of docs/reliability.md"
	@echo "make install  only make .venv"
	@echo "make clean    remove .venv and caches"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("megadpo needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# Triton comes with torch's CUDA builds; without one its kernels are tested in its interpreter
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
	touch $@

demo: install
	$(BIN)/python tools/demo.py

# Two workers (pytest-xdist), a file on one of them: see tests/conftest.py. `pytest` alone runs the same in one process.
test: lint
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test-gpu: install
	$(BIN)/python tools/gpu_parts.py
	$(BIN)/python -m pytest -m gpu -p no:xdist -rs

bench-gpu: install
	$(BIN)/python tools/bench_gpu.py

test-long: install
	$(BIN)/python -m pytest -m slow

mutants: install
	$(BIN)/python tools/mutants.py --write

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

parity: install
	$(BIN)/python tools/parity.py --model ../shared/models/stories260k --data ../shared/data/stories_pairs_train.jsonl --grids

soak: install
	nice -n 19 $(BIN)/python tools/soak.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
