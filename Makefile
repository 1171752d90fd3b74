PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-all check setup setup-dev docs truth bench bench-explanations clean

demo: setup  ## The main job: train, compare and report on real digits (about a quarter of an hour on two cores).
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

docs: setup-dev  ## The method cards, and the table of measures, from the code and its tests.
	$(BIN)/python -c "from hansfree.listing import method_cards; print(method_cards(), end='')" > docs/methods.md
	$(BIN)/python tests/reference/test_measures.py

truth: setup-dev  ## Which explainer is right on which network: docs/explainers.md, measured (about a quarter of an hour on two cores).
	$(BIN)/python bench/table_of_truth.py --resume

bench-explanations: setup-dev  ## What an explanation step costs beside a cross-entropy step, and elsewhere.
	$(BIN)/python bench/explanations.py --curves --out bench/README.md

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
