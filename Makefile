# The whole project from here. `make tour` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
TORCH ?= default          # default: pip decides which build of torch comes; cpu: PyTorch's CPU index
EXTRAS ?= all,dev
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup tour tour-short test test-slow lint types imports format bench docs tables constraints clean

help:            ## show the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(READY)  ## create .venv and install everything into it (TORCH=cpu for the CPU build of torch)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weightshare needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
ifeq ($(strip $(TORCH)),cpu)
	$(BIN)/pip install --quiet --constraint constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
endif
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

tour: $(READY)   ## every system on real data, about five minutes on two cores
	$(BIN)/weightshare tour --out runs/tour --overwrite true

tour-short: $(READY)  ## a one-minute cut of the tour
	$(BIN)/weightshare tour --out runs/tour-short --short true --overwrite true

test: $(READY)   ## the tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

test-slow: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(READY)   ## ruff: style and mistakes
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

imports: $(READY)  ## the layers of the house, see docs/architecture.md
	$(BIN)/lint-imports

format: $(READY)  ## format and fix what can be fixed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(READY)  ## every benchmark at quick size; each prints its table and writes benchmarks/results/
	for script in $$(find benchmarks -name '[a-z]*.py' | sort); do $(BIN)/python $$script --quick || exit 1; done

tables: $(READY)  ## write the figures of benchmarks/results/ into README.md and docs/
	$(BIN)/python benchmarks/_tables.py

docs: $(READY)   ## the documentation site, strict
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

constraints:     ## renew constraints.txt from a fresh environment
	rm -rf .venv-new && $(PYTHON) -m venv .venv-new
	.venv-new/bin/pip install --quiet --editable '.[all,dev,docs,onnx]'
	(echo "# The exact set that was tested. Renew with: make constraints"; \
		.venv-new/bin/pip freeze --exclude-editable | sed 's/+cpu//') > constraints.txt
	rm -rf .venv-new

clean:           ## remove the environment and what tools left behind
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache site
