# `make demo` trains, `make test` checks, `make test-all` checks what takes minutes too, `make docs`
# builds the site, `make bench` measures speed and memory; all set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint format docs bench clean

demo: $(VENV)/.train
	$(BIN)/python -m train density --dataset digits --workdir runs/demo --restart

# Several processes compile the same small functions.
test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: lint $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL)

# With the tests marked slow.
test-all: lint $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL) -m ""

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Executes the notebooks that changed since the last build (after `rm -rf site`, all of them);
# IRESNET_JAX_SMOKE=1 takes fewer steps.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site/html

# Resumes: what lies in runs/benchmarks is not measured again.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks all --write docs/PERFORMANCE.md

$(VENV)/.train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.bench: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) .jax_cache docs/guide docs/api/generated site
