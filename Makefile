# What CI runs is what a person runs. `make demo` and `make test` do everything, from a fresh clone on.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests start hundreds of processes, which would compile this package again without bytecode files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-all test-light coverage lint bench package clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	# On all cores, where pip uses one; without files that are hardly used. It fails for a few files
	# that need a newer Python.
	$(BIN)/python -m compileall -q -j 0 -x '/(transformers/models|tests?)/' $(VENV)/lib > /dev/null 2>&1 || true
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

# One more than cores, because some tests wait for other processes.
TEST_WORKERS ?= $(shell expr $$(nproc 2> /dev/null || echo 1) + 1)

# A worker gets a range of neighbouring tests, so that it builds what the tests of a module share only once.
test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not slow and not gpu"

# With slow tests, and with more random examples: before a release.
test-all: setup
	THOROUGH_TESTS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not gpu"

# In an environment of its own with the packages of `pip install sftprep`, which has no torch.
LIGHT := .venv-light
LIGHT_TESTS := tests/packing tests/pipeline/test_build.py tests/stream/test_equal_to_build.py

test-light:
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet -c constraints.txt . pytest hypothesis pytest-xdist zstandard
	! $(LIGHT)/bin/python -c "import torch" 2> /dev/null
	$(LIGHT)/bin/python -m pytest -n $(TEST_WORKERS) $(LIGHT_TESTS)

# The wheel and the sdist in dist/.
package: setup
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

coverage: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not slow and not gpu" --cov --cov-report=term

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.packing --quick

clean:
	rm -rf $(VENV) $(LIGHT) dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
