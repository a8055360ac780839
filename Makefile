# Two commands: `make train` and `make test`. Both make a virtual environment in .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
data ?=

.PHONY: train test test-slow lint clean

# torch first, and this build of it: on machines without CUDA a range would pull gigabytes of CUDA libraries.
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(BIN)/.tested: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

train: $(BIN)/.installed
	$(BIN)/meshwright train $(if $(data),data=$(data)) $(ARGS)

test: $(BIN)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

# The long matrices: every schedule on every model, four ranks, odd modules, the families of Hugging Face.
test-slow: $(BIN)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(BIN)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
