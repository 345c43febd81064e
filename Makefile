# make demo, make test: all set-up on a machine that has Python >= 3.10, make and a C++ compiler.
# make test TORCH=2.15.0 for another torch; each has an environment of its own.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv$(if $(filter 2.13.0,$(TORCH)),,-$(TORCH))
BIN := $(VENV)/bin
# Where torch, built for CPUs, does not bring its own.
TRITON := $(if $(filter 2.13.0,$(TORCH)),triton==3.7.0,triton)
# Bytecode is written where it is used, which saves a minute; without it every process that imports torch takes 13 s more.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check
# These pin another torch or transformers, or ask for a GPU's packages; their losses and hooks need neither.
UNPINNED := addict==2.4.0 axolotl==0.19.0 nemo-automodel==0.7.0 torchtitan==0.3.0
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations 15

.PHONY: demo test test-all lint format docs wheel bench scaling clean

demo: $(VENV)/.ready
	$(BIN)/compiled-loss demo $(ARGS)

test: $(VENV)/.ready
	$(PYTEST) -m "not slow" $(ARGS)

# The slow tests as well, on every torch that is supported.
test-all:
	$(MAKE) TORCH=2.13.0 test-whole
	$(MAKE) TORCH=2.11.0 test-whole
	$(MAKE) TORCH=2.15.0 test-whole

.PHONY: test-whole
test-whole: $(VENV)/.ready
	$(PYTEST) $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/figures.py --check

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

wheel: $(VENV)/.ready
	$(BIN)/python tools/check_wheel.py dist --torch $(TORCH)

bench: $(VENV)/.ready
	$(BIN)/python -m benches.run $(ARGS)
	$(BIN)/python tools/figures.py

scaling: $(VENV)/.ready
	$(BIN)/python -m benches.scaling
	$(BIN)/python tools/figures.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==$(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	$(PIP) -c constraints.txt -e '.[demo,docs,inspect,integrations,test,dev]'
	$(PIP) --no-deps $(UNPINNED)
	touch $@

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
