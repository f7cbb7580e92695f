PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/halfbyte/kernels/native/*)
CPP := $(filter %.cpp %.h,$(NATIVE)) $(wildcard scripts/*.cpp scripts/*.h)

# Threads of the tests that wait for each other soon sleep: spinning starves whatever else runs here.
export GOMP_SPINCOUNT ?= 2000

.PHONY: install demo test check lint bench clean format

# torch first: the extension is built against the torch that it will run with.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'setuptools>=77' wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

# What a change must pass: a minute or two.
check: lint
	$(BIN)/pytest -q -m 'not slow and not real and not gpu'

# Everything, real models included: up to a quarter of an hour.
test: lint
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal -m 'not gpu'

format: install
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

bench: install
	$(BIN)/python -m benchmarks

demo: install
	$(BIN)/halfbyte demo

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info halfbyte-demo
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f src/halfbyte/kernels/*.so
