# make run    set up, and generate with the default models (ARGS="..." adds flags)
# make test   set up, and run the tests
# make lint   set up, and check format and style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint clean

run: $(VENV)/run
	@$(BIN)/python main.py $(ARGS)

test: $(VENV)/dev
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

# One file per set of requirements, newer than them once they are installed.
$(VENV)/run: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement $<
	@touch $@

# Installing the one set installs the other.
$(VENV)/dev: requirements-dev.txt requirements.txt | $(BIN)/python
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement $<
	@touch $(VENV)/run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
