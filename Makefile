# Needs Python 3.11 or newer with pip, and a C compiler. Every target makes its own environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKED := src tests examples benchmarks docs

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test any-dtype test-ranks test-faults fuzz lint format hooks benchmark clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# torch goes first and alone, so that no other package's range picks a different build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $$($(PYTHON) --version) is too old for the development set-up" >&2; \
		     echo "hint: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,gguf]'
	@touch $@

demo: $(INSTALLED)  ## fine-tune SmolLM2-135M on the example task; show before and after
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## every check: lint, types, layers, tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory any-dtype
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Whatever this CPU computes best in, each test must pass on a CPU of the other kind too.
SAMPLE := tests/model/test_auto_dtype.py tests/build tests/estimate tests/bench tests/surface/test_api.py
any-dtype: $(INSTALLED)  ## a sample of the tests with model.dtype=auto as bfloat16 and as float32
	@printf '%s\n' bfloat16 float32 | OMP_NUM_THREADS=1 xargs -P 2 -I DTYPE env TUNESMITH_TEST_DTYPE=DTYPE \
		$(BIN)/python -m pytest -q -m any_dtype $(SAMPLE)

test-ranks: $(INSTALLED)  ## the longer tests of several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -q tests/distributed tests/verify

test-faults: $(INSTALLED)  ## 200 kills at random moments, each run gone on with to the bit; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py --kills 200 --results benchmarks/results/faults.md

fuzz: $(INSTALLED)  ## random input for the readers, the renderer, recipes and commands, for longer
	TUNESMITH_FUZZ=$(or $(EXAMPLES),3000) $(BIN)/python -m pytest -n 2 -q tests/fuzz

lint: $(INSTALLED)  ## style, types, import rules
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports --no-cache

format: $(INSTALLED)  ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

hooks: $(INSTALLED)  ## git hooks that check format, lint and the form of commit subjects
	git config core.hooksPath .githooks

benchmark: $(INSTALLED)  ## tokens/s and memory against TRL, in turn on this machine (DATA=rows.jsonl)
	$(BIN)/python examples/smollm2.py .cache/smollm2
	$(BIN)/python benchmarks/vs_trl.py --model .cache/smollm2 $(if $(DATA),--data $(DATA))

clean:  ## remove what the targets above made
	rm -rf $(VENV) .cache runs build dist
