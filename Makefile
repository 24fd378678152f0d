# Two commands for a newcomer: `make test` and `make demo`. Each needs only Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: help test test-all demo lint types docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make test    make a virtual environment and run the tests"
	@echo "make test-all  the slow tests too: every transformers family in every way"
	@echo "make demo    train three small MoE language models and compare their routers (DEMO_ARGS='--steps 50')"
	@echo "make lint    ruff, formatting included"
	@echo "make types   mypy --strict"
	@echo "make docs    build the documentation into site/, in strict mode"
	@echo "make bench   time the engines against softmax + topk and a sequential DP"
	@echo "make clean   remove the virtual environment and caches"

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "==> making a virtual environment in $(VENV) and installing circuitroute with its tests (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

test: $(VENV)/.installed
	@echo "==> running the tests, and noting which raise statements they reach"
	@rm -rf .raises
	@RAISES=$(CURDIR)/.raises $(BIN)/python -m pytest -q -n auto
	@$(BIN)/python -m tests.raises .raises

test-all: $(VENV)/.installed
	@echo "==> running all tests, the slow ones too"
	@$(BIN)/python -m pytest -q -n auto -m ""

demo: $(VENV)/.installed
	@echo "==> training the demo models"
	@$(BIN)/circuitroute demo $(DEMO_ARGS)

lint: $(VENV)/.installed
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed
	@echo "==> mypy"
	@$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	@echo "==> installing what builds the documentation"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	@echo "==> building the documentation into site/ (a warning is an error)"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "==> open site/index.html"

bench: $(VENV)/.installed
	@echo "==> benchmarks"
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .raises .pytest_cache .mypy_cache .ruff_cache build dist site
