# make quickstart : a trained, sampled and measured comparison on real digits, and a page to look at
# make test       : the default test suite
# make docs       : the documentation site, build/docs/index.html
# The tests take torch-fidelity without its requirements: torchvision, which they do not need, weighs gigabytes.
# Options: PYTHON (3.11 or newer), PIP_ARGS (for instance a CPU-only index of PyTorch, see README.md).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow docs lint clean

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/jlt quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"jlt needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt $(PIP_ARGS) -e '.[$*]'
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torch-fidelity)
	@touch $@

clean:
	rm -rf $(VENV) build dist
