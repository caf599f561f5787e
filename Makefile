# `make test` and `make demo` set everything up by themselves, in .venv; a second run finds it there.
# PYTHON chooses the interpreter for the environment: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Byte code is compiled while installing: where Python may not write it, every later import would compile anew.
export UV_COMPILE_BYTECODE := 1
# One thread for each of the pytest workers: they share the machine's cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: test test-slow notebook demo lint bench sanitize wheels compilers clean setup

test: lint
	$(PYTEST) -m "not slow"

# examples/finetune.ipynb from its first cell to its last.
notebook: $(READY)
	$(PYTEST) -n 0 tests/test_finetune_examples.py -m slow

# What need not run each time: more sizes of models through compilers, wheels with CUDA, long loops of damaged files.
test-slow: $(READY)
	$(PYTEST) -m slow

demo: $(READY)
	$(BIN)/python examples/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

# The CPU kernels, and the thread blocks of the CUDA kernels on the host, under sanitizers: needs a C++ compiler alone.
# For CUDA on a GPU: tests/sanitize/cuda.sh.
sanitize:
	tests/sanitize/run.sh
	tests/cuda_host/run.sh

# manylinux wheels in dist/, each tested under the oldest and the newest torch (docs/building.md); needs a network.
wheels:
	packaging/build_wheels.sh

# Every C++ source through clang for aarch64 and macOS: needs the package ziglang.
compilers: $(READY)
	PYTHON=$(BIN)/python packaging/check_compilers.sh

setup: $(READY)

# uv installs several times faster than pip: the one on PATH, else one fetched into the environment, else pip.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard cuda/* cuda/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "medgmae needs Python 3.10 or newer; make PYTHON=python3.11")'
	@set -e; \
	if uv --version >/dev/null 2>&1; then \
	    test -x $(BIN)/python || uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV); \
	    install="uv pip install --python $(BIN)/python"; \
	else \
	    test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	    if $(BIN)/python -m pip install --quiet uv; then install="$(BIN)/uv pip install --python $(BIN)/python"; \
	    else install="$(BIN)/python -m pip install"; fi; \
	fi; \
	echo "Installing into $(VENV) and compiling the native module: a minute or two, with CUDA kernels if there is nvcc;" \
	    "MEDGMAE_CUDA=0 make ... leaves them out"; \
	set -x; $$install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info medgmae/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
