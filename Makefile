# Environments in the checkout: .venv runs and tests jaxfw, .venv-oracle adds transformers and torch, .venv-oracle-kv kvpress.
PYTHON ?= python3
WORKDIR ?= runs/quickstart
CUDA ?= cuda13
PIP = -m pip install --quiet --disable-pip-version-check
# compat: otherwise a script in the folder above a clone named jaxfw imports that folder, an empty namespace.
# jax's CUDA plugin, where it is installed to compile without a GPU, would complain that it finds no driver.
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK ?= 1
EDITABLE = --config-settings editable_mode=compat --editable
BIN = .venv/bin/python
ORACLE = .venv-oracle/bin/python

.PHONY: help install demo test oracle oracle-kv kv bench-kv bench notebook soak h200 embedded card gpu clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed  ## make .venv and install jaxfw into it
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN) $(PIP) $(EDITABLE) .
	touch $@

demo: install  ## train a small LLaMA, save, load, generate; page in runs/quickstart/report.html
	$(BIN) -m jaxfw.launch --config=configs/quickstart.py --workdir=$(WORKDIR)

.venv/dev: .venv/installed
	$(BIN) $(PIP) $(EDITABLE) '.[dev,aot]'
	touch $@
test: .venv/dev  ## lint, types, unit tests, doctests
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pyright --pythonpath $(BIN)
	$(BIN) -m pytest -n 2 --dist worksteal

.venv-oracle/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oracle
	$(ORACLE) $(PIP) torch==2.13.0
	$(ORACLE) $(PIP) $(EDITABLE) '.[dev,oracle]'
	$(ORACLE) $(PIP) --target .venv-oracle/transformers4 'transformers==4.57.*'
	touch $@
oracle: .venv-oracle/installed  ## compare with transformers (5, and 4 for files) and torch; installs them, on the CPU
	JAXFW_TRANSFORMERS4=$(CURDIR)/.venv-oracle/transformers4 $(ORACLE) -m pytest -n 2 --dist worksteal tests/oracle

.venv-oracle-kv/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oracle-kv
	.venv-oracle-kv/bin/python $(PIP) torch==2.13.0
	.venv-oracle-kv/bin/python $(PIP) $(EDITABLE) '.[oracle-kv]'
	touch $@
oracle-kv: .venv-oracle-kv/installed  ## compare cache compression with kvpress: what it keeps, end to end; write its fixtures anew
	.venv-oracle-kv/bin/python -m tests.oracle_kv.kvpress_cases
	.venv-oracle-kv/bin/python -m pytest -n 2 --dist worksteal tests/oracle_kv

kv: .venv/installed  ## the study of cache compression on the embedded model, and ShotKV's claim
	$(BIN) -m jaxfw.launch --config=configs/kv.py --workdir=runs/kv
	$(BIN) -m jaxfw.launch --config=configs/kv.py:claim --workdir=runs/kv-claim
	$(BIN) -m experiments.kv.ship runs/kv runs/kv-claim
bench-kv: .venv-oracle-kv/installed  ## decoding with a compressed cache: against the full one, and beside kvpress
	.venv-oracle-kv/bin/python -m experiments.bench.kv

bench: .venv-oracle/installed  ## speed and loading beside transformers and torch, and what the seams cost, on this CPU
	$(ORACLE) -m experiments.bench.cpu_lm
	$(ORACLE) -m experiments.bench.seams
	$(ORACLE) -m experiments.bench.load
	$(ORACLE) -m experiments.bench.checkpoint
	$(ORACLE) -m experiments.bench.packing
	$(ORACLE) -m experiments.bench.families
	$(ORACLE) -m experiments.bench.harness

soak: .venv/dev  ## kill training runs 20 times each, on one device, on eight, as two processes; compare the bits
	$(BIN) -m experiments.soak

h200: .venv/dev  ## what kernels and published models become on H200s, compiled here without one: tables of bytes and calls
	$(BIN) -m experiments.kernels
	$(BIN) -m experiments.sharding
	$(BIN) -m experiments.h200

embedded: .venv/installed  ## train the embedded model from nothing, in three stages (an hour on two cores): runs/embedded
	$(BIN) -m jaxfw.launch --config=configs/embedded.py:stage=1 --workdir=runs/stage-1
	$(BIN) -m jaxfw.launch --config=configs/embedded.py:stage=2 --config.init=runs/stage-1 --workdir=runs/stage-2
	$(BIN) -m jaxfw.launch --config=configs/embedded.py:stage=3 --config.init=runs/stage-2 --workdir=runs/stage-3
	$(BIN) -m experiments.embedded.ship runs/stage-3 runs/embedded

card: .venv/installed  ## measure the embedded model that comes with jaxfw, and write its card anew
	$(BIN) -m experiments.embedded.card

notebook: .venv/dev  ## docs/tour.ipynb and docs/forgetting.ipynb from their .py, executed
	.venv/bin/jupytext --quiet --to ipynb --set-kernel python3 docs/tour.py docs/forgetting.py
	PYTHONPATH=$(CURDIR) .venv/bin/jupyter-execute --inplace docs/tour.ipynb docs/forgetting.ipynb

.venv/$(CUDA): .venv/installed
	$(BIN) $(PIP) $(EDITABLE) '.[$(CUDA)]'
	touch $@
gpu: .venv/$(CUDA)  ## every check and benchmark that needs a GPU, in one call (CUDA=cuda12 for older drivers)
	$(BIN) -m experiments.gpu

clean:  ## remove both environments and what runs and tools left
	rm -rf .venv .venv-oracle .venv-oracle-kv runs build .pytest_cache .ruff_cache .hypothesis
