PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/halfbyte/kernels/native/*)

.PHONY: install demo test check bench clean format

# torch first: the extension is built against the torch that it will run with.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'setuptools>=77' wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))
	$(BIN)/pytest -q -m 'not slow and not real and not gpu'

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))
	$(BIN)/pytest -q -m 'not gpu'

format: install
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

bench: install
	$(BIN)/python -m benchmarks

demo: install
	$(BIN)/halfbyte demo

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f src/halfbyte/kernels/*.so
