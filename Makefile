# Both targets do all their own set-up; they need Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV ?= .venv
# A full path: tests and commands run in other folders too.
export AFTERIMAGE_WEIGHTS ?= $(abspath $(wildcard ../shared/weights))

# Tests start many processes, each of which would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long clean

demo: $(VENV)/.ready
	$(VENV)/bin/afterimage study quickstart --output-dir demo

test: $(VENV)/.ready-test
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/lint-imports
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal -m "not long"

# Clusters and ranks killed at random, whole studies on them, memory with many images: one process, a quiet machine.
test-long: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -p no:xdist -m long

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "afterimage needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python pyproject.toml
	@echo "installing afterimage into $(VENV) (PyTorch is large: this takes minutes the first time)"
	$(VENV)/bin/python -m pip install --quiet --editable '.[fast]'
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) demo build dist
