# Set-up, tests and the demo. Every target installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= .venv-extras
CONSTRAINTS ?= requirements.lock
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUNS ?= runs/demo

MEGABLOCKS := $(VENV)/.megablocks
TRACKERS := $(EXTRAS)/.installed
DOCS := $(VENV)/.docs

.PHONY: help setup setup-megablocks setup-docs test test-elsewhere test-lowest test-extras lint types demo short-demo \
	docs wheel-check lock clean

help:
	@echo "make demo    dense Qwen2 -> upcycle -> train MoE variants -> compare, three seeds, on real text (10 minutes)"
	@echo "make test    all tests; make test-elsewhere: in another world, make test-lowest: with the lowest versions"
	@echo "make test-extras   the optional packages (W&B, trackio, Parquet, GGUF), each with its real client, without a network"
	@echo "make setup-megablocks   MegaBlocks, stk and triton beside torch; without a GPU their tests run interpreted"
	@echo "make docs    the documentation as a site, in build/docs; warnings are errors"
	@echo "make wheel-check   build the wheel, install it into a clean environment, use it from an empty folder"
	@echo "make lint    ruff; make types: mypy; make clean: remove runs/demo and the virtual environment"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV): takes a minute or two the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) hatchling editables setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[dev]'
	@touch $(INSTALLED)

# MegaBlocks pins a torch of its own, so it comes without its dependencies; it needs no compiled extension here.
# A triton that came with torch (a GPU build) is kept.
setup-megablocks: $(MEGABLOCKS)

$(MEGABLOCKS): $(INSTALLED)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.7.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools wheel packaging
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		stanford-stk==0.7.1 megablocks==0.10.0
	@touch $(MEGABLOCKS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

# Another processor's kernels (no AVX in torch, no AVX-512 in oneDNN, plain ones in MKL), three threads, another order
# for each commit (SHUFFLE repeats one), and an installed package whose `moelab` entry point imports torch. Without what
# compiles for GPUs, what starts torchrun, and what kills, damages, installs or types, which none of that changes; nor
# does it plans of runs and of memory, statistics in numpy, and bits that are read back.
SAME_EVERYWHERE := tests/hostile $(addprefix tests/unit/tools/,sweep experiments compare) \
	$(addprefix tests/unit/test_,benchmarks.py house_rules.py plugin_docs.py golden.py) \
	$(addprefix tests/unit/core/,parallel/test_saving.py planning/test_budget.py planning/test_traffic.py) \
	tests/unit/upcycling/test_one_reader.py \
	$(addprefix tests/flow/test_,kills.py damage.py trust.py template.py wheel.py documentation.py)
SHUFFLE ?= $(or $(shell git rev-parse --short HEAD 2>/dev/null),0)
test-elsewhere: $(INSTALLED)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=3 OMP_WAIT_POLICY=passive \
		PYTHONPATH=$(CURDIR)/tests/elsewhere \
		$(BIN)/python -m pytest -n 2 -q -m 'not interpreter and not processes and not gpu' --shuffle=$(SHUFFLE) \
		$(addprefix --ignore=,$(SAME_EVERYWHERE))

test-lowest:
	$(MAKE) setup-megablocks test VENV=.venv-lowest CONSTRAINTS=requirements.lowest

# The extras that a run can use, in an environment of their own above $(VENV): it stays as requirements.lock says. The
# network is needed to install them, and not by the tests.
test-extras: $(TRACKERS)
	MOELAB_REQUIRE_EXTRAS=1 OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -n 2 -q tests/optional

$(TRACKERS): $(INSTALLED) requirements.extras
	$(PYTHON) -m venv $(EXTRAS)
	@echo 'import site; site.addsitedir("$(abspath $(shell ls -d $(VENV)/lib/python*/site-packages 2>/dev/null))")' \
		> $$(ls -d $(EXTRAS)/lib/python*/site-packages)/below.pth
	@grep -v '^pillow==' $(CONSTRAINTS) > $(EXTRAS)/constraints  # trackio 0.43 takes none of 13 yet
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c $(EXTRAS)/constraints -r requirements.extras
	@touch $(TRACKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# SEEDS="0 1" or SEEDS=0..4: how often all of it is done.
SEEDS ?= 0..2
demo: $(INSTALLED)
	@$(BIN)/moelab demo --out $(RUNS) --seeds "$(SEEDS)"

short-demo: $(INSTALLED)
	@$(BIN)/moelab demo --out $(RUNS) --seeds 0,1 \
		train.steps=4 evaluation.sequences=8 evaluation.sample_tokens=8 data.source.max_bytes_per_domain=300000

setup-docs: $(DOCS)

docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "open build/docs/index.html"

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[docs]'
	@touch $(DOCS)

wheel-check: $(INSTALLED)
	@.ci/wheel $(BIN)/python

lock: $(INSTALLED)
	@{ head -2 requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/^torch==\([0-9.]*\).*/torch==\1/'; } > .lock.new
	@mv .lock.new requirements.lock

clean:
	rm -rf $(VENV) $(RUNS)
