PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-all check setup setup-dev docs bench clean

demo: setup  ## The main job: train, compare and report on real digits (about five minutes on two cores).
	$(BIN)/hansfree suite configs/coloured-digits.yaml

test: setup-dev  ## The fast tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-all: setup-dev  ## All tests, the slow ones too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: setup-dev  ## Formatting, lint, types, layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: setup  ## The method cards, from the code.
	$(BIN)/python -c "from hansfree.listing import method_cards; print(method_cards(), end='')" > docs/methods.md

bench: setup  ## What a step of each method costs, relative to ERM's.
	$(BIN)/python bench/step_cost.py configs/coloured-digits.yaml

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[digits,vision]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
