# `make demo` and `make test` work on a fresh clone: they make .venv and install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# versions to install; another file tests other versions
CONSTRAINTS ?= constraints.txt

SEED ?= 0
RUN := digits$(if $(filter-out 0,$(SEED)),-seed$(SEED))
FRESH ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=

SCENES := demo-segment demo-detect demo-panoptic

# the recipes that `make recipes` runs; patterns with spaces between
RECIPES ?= *

# how long `make soak` runs
MINUTES ?= 10

.PHONY: help demo $(SCENES) $(SCENES:%=%-scratch) test test-slow gpu soak recipes lint docs examples tables clean

help:
	@echo "make demo            train biformer_atto on handwritten digits, evaluate it, write a report"
	@echo "                     again: continues; FRESH=1 starts from scratch and renames the old run; SEED=1"
	@echo "make demo-segment    transfer it to the segmentation of scenes of digits; FRESH=1 as above"
	@echo "make demo-detect     transfer it to finding digits in scenes; FRESH=1 as above"
	@echo "make demo-panoptic   transfer it to both at once: a mask for each digit, and one for the background; FRESH=1 as above"
	@echo "make demo-segment-scratch, demo-detect-scratch, demo-panoptic-scratch    the same from random weights, beside the"
	@echo "                     former in one report"
	@echo "make test            the test suite; make test-slow runs what takes longer"
	@echo "make gpu             everything that wants a GPU, within 25 minutes: checks, verdict on the kernels, benchmarks"
	@echo "make soak            kill and fuzz the trainer for MINUTES=10, with new seeds that are printed"
	@echo "make recipes         run every packaged recipe on miniature data sets: about 20 minutes on one CPU core"
	@echo "                     some of them: RECIPES='imagenet/cswin_* coco/*'"
	@echo "make lint            formatting, lint, spelling, which room imports which, types"
	@echo "make docs            build the documentation site into site/; a broken link fails"
	@echo "make examples        run every script in examples/"
	@echo "make tables          rewrite the generated tables in README.md and docs/"

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m tessel.train configs/demo/digits.yaml run.name=$(RUN) run.seed=$(SEED) \
		$(if $(FRESH),run.fresh=true) $(DEMO_ARGS)
	$(BIN)/python -m tessel.train.evaluate runs/$(RUN)
	$(BIN)/python -m tessel.train.report runs/$(RUN)

runs/digits/DONE:
	$(MAKE) demo SEED=0 FRESH= DEMO_ARGS=

$(SCENES): demo-%: $(INSTALLED) runs/digits/DONE
	$(BIN)/python -m tessel.train configs/demo/digit_$*.yaml $(if $(FRESH),run.fresh=true) $(DEMO_ARGS)
	$(BIN)/python -m tessel.train.evaluate runs/digit_$* --overlays 16
	$(BIN)/python -m tessel.train.report runs/digit_$*
	@echo "  make demo-$*-scratch    the same from random weights, and the curves of both in one report"

$(SCENES:demo-%=runs/digit_%/DONE): runs/digit_%/DONE:
	$(MAKE) demo-$* FRESH= DEMO_ARGS=

$(SCENES:%=%-scratch): demo-%-scratch: $(INSTALLED) runs/digit_%/DONE
	$(BIN)/python -m tessel.train configs/demo/digit_$*.yaml model.init_from=null run.name=digit_$*_scratch \
		$(if $(FRESH),run.fresh=true) $(DEMO_ARGS)
	$(BIN)/python -m tessel.train.evaluate runs/digit_$*_scratch --overlays 16
	$(BIN)/python -m tessel.train.report runs/digit_$* runs/digit_$*_scratch --out runs/digit_$*_compared

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

soak: $(INSTALLED)
	$(BIN)/python tests/soak.py $(MINUTES)

recipes: $(INSTALLED)
	$(BIN)/python tests/recipe_runner.py $(patsubst %,'%',$(RECIPES))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright

# as a module: the script's own folder, $(BIN), holds a file `tessel`, which the reference would take for the package
docs: $(INSTALLED)
	$(BIN)/python -m zensical build --strict --clean
	rm -f site/*.py

examples: $(INSTALLED)
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

tables: $(INSTALLED)
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/recipes.py

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
