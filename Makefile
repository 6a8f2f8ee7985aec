# `make demo` trains, `make test` checks, `make test-all` checks what takes minutes too,
# `make test-newest` checks with the newest Python and JAX, `make docs` builds the site, `make bench`
# measures speed and memory, `make package` builds wheel and sdist; all but `test-newest` set up .venv
# on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
# The newest Python of the path and of pyenv that runs.
NEWEST_PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1*/bin/python; do "$$python" -c \
	"import sys; print('%d.%d.%d' % sys.version_info[:3], sys.executable)" 2>/dev/null; done \
	| sort -V | tail -n 1 | cut -d " " -f 2)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

# Before a command of the same line: says every 5 s that it lasts.
SAYING = n=0; (while sleep 5; do n=$$((n + 5)); echo "$(1) … $$n s"; done) & \
	saying=$$!; trap 'kill $$saying' EXIT; trap 'exit 130' INT TERM;

.PHONY: demo test test-all test-newest lint format docs bench package clean

demo: $(VENV)/.train
	@echo "Training on the digits; loading JAX …"
	@$(BIN)/python -m train density --dataset digits --workdir runs/demo --restart

# Several processes compile the same small functions.
test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: lint $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL)

# With the tests marked slow.
test-all: lint $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL) -m ""

# With the newest Python at hand and the newest releases that pip finds, looked up each time.
test-newest: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test-newest:
	"$(NEWEST_PYTHON)" -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	$(NEWEST)/bin/python -c "import sys, jax; print(sys.version, 'jax', jax.__version__)"
	$(NEWEST)/bin/python -m pytest $(IN_PARALLEL)

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

# Wheel and sdist, in dist/, as an index would take them.
package: $(VENV)/.package
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(VENV)/.train: pyproject.toml
	@echo "Installing what training needs into $(VENV), once: a minute or two …"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call SAYING,installing) $(BIN)/python -m pip install --quiet --editable '.[train]'
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

$(VENV)/.package: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[package]'
	touch $@

clean:
	rm -rf build dist $(VENV) $(NEWEST) .jax_cache docs/guide docs/api/generated site
