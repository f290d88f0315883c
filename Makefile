# Every target builds what it needs; a fresh machine needs only Python 3.11+ and make.
#   make stress-test ARGS="--preset laptop"     make VENV=$VIRTUAL_ENV test     make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUNS ?= runs

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.stability-probes-installed

.DEFAULT_GOAL := help
.PHONY: help install stress-test representations verify-bounds tensorboard tensorboard-demo docs test test-all lint

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(INSTALLED) ## build the virtual environment

stress-test: $(INSTALLED) ## train softmax and sigmoid attention until one explodes
	$(BIN)/python -m experiments.stress_test $(ARGS)

representations: $(INSTALLED) ## train softmax and sigmoid attention on labelled cells
	$(BIN)/python -m experiments.representations $(ARGS)

verify-bounds: $(INSTALLED) ## check the attention derivative bounds over every finite value
	$(BIN)/python -m experiments.verify_bounds $(ARGS)

tensorboard: $(INSTALLED) ## open the recorded runs in TensorBoard (RUNS=directory)
	$(BIN)/python -m tensorboard.main --logdir $(RUNS) $(ARGS)

tensorboard-demo: $(RUNS)/published-160m ## open the published runs of 160M parameters in TensorBoard
	$(BIN)/python -m tensorboard.main --logdir $< $(ARGS)

$(RUNS)/published-160m: $(wildcard docs/results/stress-160m/*.zip) | $(INSTALLED)
	rm -rf $@ $@.part
	$(BIN)/python -m experiments.records_to_tensorboard docs/results/stress-160m --out $@.part
	mv $@.part $@

docs: $(INSTALLED) ## build docs/ as a site, in build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs $(ARGS)

test: lint ## lint, unit tests, doctests, README blocks
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# pytest answers 5 when it finds no test to run.
test-all: $(INSTALLED) ## the slow tests, which `make test` leaves out
	$(BIN)/python -m pytest -m slow $(ARGS) || { test $$? -eq 5 && echo "There are no slow tests."; }

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# Shell command, true when the Python $(1) has package $(2), at version $(3) or newer.
has = $(1) -c "from importlib.metadata import version; numbers = lambda v: [int(n) for n in v.split('.')[:2]]; \
	raise SystemExit(numbers(version('$(2)')) < numbers('$(3)'))" 2>/dev/null

# A torch in setup.cfg's range is kept, whoever installed it: a CPU build put into $(VENV) beforehand, or the
# CUDA build of an image's own Python, which a new environment then sees through --system-site-packages. Its
# pin is dropped, and so is that of triton where there is one: each CUDA build of torch brings its own.

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $$($(call has,$(PYTHON),torch,2.11) && echo --system-site-packages) $(VENV)
	kept=none; \
	if $(call has,$(BIN)/python,torch,2.11); then kept="$$kept|torch"; fi; \
	if $(call has,$(BIN)/python,triton,0.0); then kept="$$kept|triton"; fi; \
	grep -vE "^($$kept)==" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[cells,docs,test]'
	touch $@
