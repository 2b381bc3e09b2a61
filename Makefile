# Two environments in the checkout: .venv runs and tests jaxfw, .venv-oracle adds transformers and torch.
PYTHON ?= python3
WORKDIR ?= runs/quickstart
PIP = -m pip install --quiet --disable-pip-version-check
BIN = .venv/bin/python
ORACLE = .venv-oracle/bin/python

.PHONY: help install demo test oracle bench gpu clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## make .venv and install jaxfw into it
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN) $(PIP) --editable .
	touch $@

demo: install  ## train a small LLaMA, save, load, generate; page in runs/quickstart/report.html
	$(BIN) -m jaxfw.launch --config=configs/quickstart.py --workdir=$(WORKDIR)

.venv/dev: .venv/installed
	$(BIN) $(PIP) --editable '.[dev]'
	touch $@
test: .venv/dev  ## lint, types, unit tests, doctests
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pyright --pythonpath $(BIN)
	$(BIN) -m pytest -n 2

.venv-oracle/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oracle
	$(ORACLE) $(PIP) torch==2.13.0
	$(ORACLE) $(PIP) --editable '.[dev,oracle]'
	$(ORACLE) $(PIP) --target .venv-oracle/transformers4 'transformers==4.57.*'
	touch $@
oracle: .venv-oracle/installed  ## compare with transformers (5, and 4 for files) and torch; installs them, on the CPU
	JAXFW_TRANSFORMERS4=$(CURDIR)/.venv-oracle/transformers4 $(ORACLE) -m pytest -n 2 tests/oracle

bench: .venv-oracle/installed  ## speed beside transformers and torch, on this machine's CPU
	$(ORACLE) -m experiments.bench.cpu_lm

gpu: install  ## every check and benchmark that needs a GPU, in one call
	$(BIN) -m experiments.gpu

clean:  ## remove both environments and what runs and tools left
	rm -rf .venv .venv-oracle runs build .pytest_cache .ruff_cache .hypothesis
