# One environment, four uses of it. `make` alone prints the list.

VENV ?= .venv
# Interpreters to try, the first one of 3.10 or newer wins.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python3.10
# Passed on to pip, e.g. PIP_ARGS="--index-url URL".
PIP_ARGS ?=
# Processes that run the tests, each with one thread and up to 3 GB of memory.
JOBS ?= 2
STAMP = $(VENV)/.soundwave-installed

.PHONY: help setup demo test ptx lint clean

help:
	@echo "make setup   create $(VENV) and install soundwave with the versions of constraints.txt"
	@echo "make demo    train the three stages on the embedded default and show the result in runs/demo"
	@echo "             QUICK=1: a few minutes only, in runs/demo-quick;  SEED=1: another corpus and initialisation"
	@echo "make test    run the tests"
	@echo "make ptx     run every kernel as compiled code, emulated, and write docs/ptx.md and docs/ptx-barriers.md: a quarter of an hour"
	@echo "make lint    check style and formatting"
	@echo "make clean   remove $(VENV), build outputs and caches of tools; runs/ stays"
	@echo "Variables:   PYTHON=python3.12 (3.10 or newer)   VENV=$(VENV)   JOBS=$(JOBS) (of test, ptx)   PIP_ARGS=\"--index-url URL\""

setup: $(STAMP)

# Every candidate is run: a launcher may exist for a version that is not installed. The stamp is written last, so that
# whatever fails before it is done again by the next call.
$(STAMP): setup.py pyproject.toml constraints.txt
	@rm -f $@
	@if $(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then exit 0; fi; \
	found=; \
	for candidate in $(PYTHON); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "soundwave needs Python 3.10 or newer, but found none of: $(PYTHON). Name one: make setup PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$found cannot create environments: its module venv or ensurepip is missing. On Debian or Ubuntu: apt install python3-venv" >&2; \
		exit 1; \
	fi; \
	clear=; if [ -e $(VENV)/pyvenv.cfg ]; then clear=--clear; fi; \
	"$$found" -m venv $$clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(VENV)/bin/soundwave demo $(if $(filter-out 0,$(QUICK)),--quick) $(if $(SEED),--seed $(SEED))

test: setup
	@$(VENV)/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Under the interpreter Triton compiles nothing.
ptx: export TRITON_INTERPRET = 0
ptx: setup
	@$(VENV)/bin/python -m tests.ptx sweep --jobs $(JOBS) --write docs/ptx.md
	@$(VENV)/bin/python -m tests.ptx mutate --jobs $(JOBS) --write docs/ptx-barriers.md

lint: setup
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check

clean:
	@if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find kernels soundwave tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
