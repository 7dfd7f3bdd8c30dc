# make run    set up, and translate with the default models, the bundled pair at first
#             (ARGS="--prompt ..." runs main.py with these flags instead)
# make serve  set up, and answer over HTTP with the default models (ARGS goes to
#             serve.py)
# make test   set up, and run the tests (ARGS="-k ..." goes to pytest)
# make check  set up, and find out whether it is exact and how fast on this machine: a
#             report to send (ARGS=--quick: within 4 minutes, not 10)
# make bench  set up, and measure the default models (ARGS goes to benchmark.py)
# make lint   set up, and check format, style, and that imports point down

VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))
# The first Python that is neither too old nor too new; PYTHON=... names another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.14 python3.11 \
  python3.10; do $$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

.PHONY: run serve test check bench lint clean

run: $(VENV)/run
ifdef ARGS
	@$(BIN)/python main.py $(ARGS)
else
	@$(BIN)/python main.py --color --compare --prompt - < demo/examples.txt
endif

serve: $(VENV)/serve
	@$(BIN)/python serve.py $(ARGS)

test: $(VENV)/dev
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/run
	@$(BIN)/python check.py $(ARGS)

bench: $(VENV)/dev
	@$(BIN)/python benchmark.py $(ARGS)

lint: $(VENV)/dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports || { cat $(VENV)/imports; exit 1; }

# One file per set of requirements, newer than them once they are installed.
$(VENV)/run: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement $<
	@touch $@

$(VENV)/serve: requirements-serve.txt requirements.txt | $(BIN)/python
	@echo "installing requirements-serve.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement $<
	@touch $(VENV)/run $@

# Installing the one set installs the others.
$(VENV)/dev: requirements-dev.txt requirements-causal.txt requirements-serve.txt \
  requirements.txt | $(BIN)/python
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement $<
	@touch $(VENV)/run $(VENV)/serve $@

# Made anew when it does not run, after an upgrade of the Python it was made from say.
ifneq ($(shell $(BIN)/python -c 'print(1)' 2>/dev/null),1)
.PHONY: $(BIN)/python
$(VENV)/run $(VENV)/serve $(VENV)/dev: $(BIN)/python
endif

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || \
	  { echo "Python 3.10 to 3.14 is needed: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 2; }

clean:
	rm -rf $(VENV)
