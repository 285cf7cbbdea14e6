"""Attacks that take more than one program, or a look at the worker while it runs. The others: catalogue.py."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

import pytest

from rlef_sandbox import Executor, Job, Test, Verdict
from tests.sandbox.processes import descendants, memory_of, process_tree, wait_until


def test_environment_holds_nothing_of_the_caller(executor, monkeypatch):
    monkeypatch.setenv("RLEF_SECRET", "REACHED")
    with Executor(workers=1) as own:
        [result] = own.run("import os\nprint(sorted(os.environ), os.getcwd())", [Test("", "")])

    assert result.stdout == "['LC_CTYPE', 'LD_BIND_NOW', 'PYTHONHASHSEED'] /\n"


def test_expected_output_is_in_no_memory_that_the_program_can_read(executor):
    needle = "expected-" + "needle"
    program = (
        "import gc, sys\nfound = []\nneedle = 'expected-' + 'needle'\n"
        "for thing in gc.get_objects():\n    if isinstance(thing, dict):\n"
        "        found += [1 for value in thing.values() if isinstance(value, (str, bytes)) and needle in str(value) "
        "and value is not needle]\n"
        "frame = sys._getframe()\nwhile frame:\n"
        "    found += [1 for name, value in frame.f_locals.items() if name != 'needle' and value == needle]\n"
        "    frame = frame.f_back\nprint('REACHED' if found else 'nothing')"
    )

    result = executor.run(program, [Test("", needle)])[0]

    assert result.stdout == "nothing\n"


@pytest.mark.parametrize("tests", [1, 3])  # without a solution process, and with one
def test_expected_output_never_enters_a_worker_process(executor, tests):
    secret = "seldom" + "-seen-" + str(os.getpid())
    thread = Thread(target=executor.run, args=("import time; time.sleep(1)", [Test("", secret)] * tests))
    thread.start()
    [worker] = executor.worker_pids()
    wait_until(lambda: len(descendants(worker)) == (1 if tests == 1 else 2))
    images = [memory_of(pid) for pid in process_tree(worker)]
    thread.join()

    assert sum(b"time.sleep(1)" in image for image in images) == (1 if tests == 1 else 2)
    assert not any(secret.encode() in image for image in images)


@pytest.mark.parametrize("tests", [2, 3])  # without a solution process, and with one
def test_a_test_finds_nothing_of_the_test_before(executor, tests):
    program = (
        "import builtins, sys, atexit\nprint(getattr(builtins, 'left', None), 'left' in globals(), 'left' in sys.modules)\n"
        "builtins.left = left = input()\nsys.modules['left'] = sys\nprint = builtins.print = None\n"
        "atexit.register(sys.stdout.write, '')"
    )

    results = executor.run(program, [Test(str(i), "none false false") for i in range(tests)])

    assert [result.verdict for result in results] == [Verdict.PASSED] * tests


def test_a_program_finds_nothing_of_the_program_before(executor):
    executor.run(
        "import math, sys\nmath.pi = 3\nsys.path.append('x')\nsys.setrecursionlimit(50)", [Test("", "")]
    )

    result = executor.run(
        "import math, sys\nprint(math.pi, 'x' in sys.path, sys.getrecursionlimit())", [Test("", "")]
    )[0]

    assert result.stdout == "3.141592653589793 False 1000\n"


def test_next_input_is_not_readable_while_a_test_runs(executor):
    program = "import gc\nprint('tupni-dnoces'[::-1] in str(gc.get_objects()))"

    [first, _] = executor.run(program, [Test("", "False"), Test("second-input", "")])

    assert first.stdout == "False\n"


def test_nothing_outside_is_changed(executor, tmp_path: Path):
    target = tmp_path / "kept"
    target.write_text("kept")
    target.chmod(0o666)
    tmp_path.chmod(0o777)
    programs = [
        f"open({str(target)!r}, 'w').write('changed')",
        f"import os; os.remove({str(target)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"print('REACHED', open({str(target)!r}).read())",
    ]

    results = executor.run_many([Job(program, [Test("", "")]) for program in programs])

    assert [result.verdict for [result] in results] == [Verdict.EXCEPTION] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert target.read_text() == "kept"
