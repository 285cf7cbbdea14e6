# Two commands: `make train` and `make test`. Each prepares .venv first; a second call starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
export OMP_NUM_THREADS ?= 1

venv := .venv
bin := $(venv)/bin
inputs := pyproject.toml constraints.txt CMakeLists.txt $(sort $(wildcard csrc/*))
key := $(shell cat $(inputs) | sha256sum | cut -c1-16)
ready := $(venv)/ready-$(key)
cpp := $(filter %.cpp %.hpp,$(inputs))

.PHONY: train test lint format clean

train: $(ready)
	$(bin)/rlef train configs/tiny.toml

test: $(ready)
	$(bin)/python -m pytest
	$(MAKE) lint

lint: $(ready)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(cpp)

format: $(ready)
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp)

# The stamp's name is a digest of everything that the environment is made from.
$(ready):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlef needs Python 3.11 or newer: set PYTHON")'
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[train,dev]'
	rm -f $(venv)/ready-*
	touch $@

clean:
	rm -rf $(venv) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
