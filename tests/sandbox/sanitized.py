"""A pytest plugin: the same tests on a core that was built with sanitizers. `make sanitize` uses it.

The supervisor's thread lives in this process, so the sanitizers' runtime is preloaded here; workers are given it
too, and with it every process that they fork. Leaks are not looked for: the interpreter has its own.

With RLEF_PLAIN_WORKERS, as for `make sanitize-threads` and `make sanitize-leaks`, workers have the core that is
installed: what is looked at is the process of the supervisor.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

LEFT_OUT = {
    "call_open_by_handle_at]": "the sanitizer's wrapper reads the null pointer that this test passes",
    "rights-lock_memory]": "the sanitizer makes mlock do nothing",
    "test_environment_holds_nothing_of_the_caller": "the runtime is preloaded by an environment variable",
    "test_expected_output_never_enters_a_worker_process": "it reads all memory, and shadow memory is terabytes",
    "test_a_test_has_few_page_faults": "shadow memory has faults of its own",
    "test_layers_that_are_left_hold": "it starts an executor in a process of its own, from a copy of the package",
    "test_interpreter_that_programs_cannot_read": "so does this",
    "test_bench_runs_without_the_layers": "and this",
    "test_catalogue_holds": "and these",
    "test_without_namespaces_an_executable": "and this",
    "test_workers_that_cannot_be_isolated_any_more": "without descriptors the runtime ends them, in its own words",
    "charges_it_with_more[": "shadow memory is an eighth of what is held, and counts",
    "test_thousands_of_runs_leave_no_charge": "shadow memory is charged too",
    "test_limit_further_up_is_a_fault": "and so it is here",
    "using_up-multiply_huge_integers": "with shadow memory it passes another limit first",
    "using_up-keep_small_objects_without_end": "so does this",
    "using_up-grow_the_stack_past_the_memory_limit": "the runtime reports the fault that the program makes on purpose",
    "signals-read_from_nowhere": "here too",
    "reading-find_the_caller's_environment": "the runtime is preloaded by an environment variable",
}


def load_core() -> None:
    [path] = Path(os.environ["RLEF_SANITIZED_BUILD"]).glob("_core.*.so")
    name = "rlef_sandbox._core"
    spec = spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def give_workers_the_plain_core() -> None:
    from rlef_sandbox import _core

    [path] = Path(sysconfig.get_path("platlib"), "rlef_sandbox").glob("_core.*.so")
    _core.__file__ = str(path)


def give_workers_the_runtime() -> None:
    from rlef_sandbox import workers

    kept = [f"{name}={os.environ[name]}" for name in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")]
    workers._ENVIRONMENT = (*workers._ENVIRONMENT, *kept)


def look_at_every_result() -> None:
    """A sanitizer in a program's process can only write to that program's standard error."""
    from rlef_sandbox import Result

    initialise = Result.__init__

    def checked(self, *args, **kwargs) -> None:
        initialise(self, *args, **kwargs)
        assert "AddressSanitizer: " not in self.stderr and "runtime error: " not in self.stderr, self.stderr

    Result.__init__ = checked


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(name in item.name for name in LEFT_OUT)]
    if len(items) > 100:  # all of them, not some that were asked for by name
        for name, reason in LEFT_OUT.items():
            assert any(name in item.name for item in items), f"there is no test {name}: {reason}"
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


load_core()
if "RLEF_PLAIN_WORKERS" in os.environ:
    give_workers_the_plain_core()
else:
    give_workers_the_runtime()
    look_at_every_result()
