"""What honest programs do must work."""

from __future__ import annotations

import pytest

from rlef_sandbox import Executor, Limits, Test, Verdict

IDIOMS = {
    "input": "n = int(input())\nprint(n + int(input()))",
    "standard_input_lines": "import sys\nprint(sum(int(line) for line in sys.stdin))",
    "standard_input_read": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "standard_input_readline": "import sys\ninput = sys.stdin.readline\nprint(int(input()) + int(input()))",
    "standard_input_buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "buffer_readline": "import sys\nread = sys.stdin.buffer.readline\nprint(int(read()) + int(read()))",
    "open_0": "print(sum(map(int, open(0))))",
    "os_read": "import os\nprint(sum(map(int, os.read(0, 1000).split())))",
    "fstat_and_read": "import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))",
    "mmap_of_standard_input": (
        "import mmap\nprint(sum(map(int, mmap.mmap(0, 0, access=mmap.ACCESS_READ).read().split())))"
    ),
    "end_of_file": (
        "total = 0\ntry:\n    while True:\n        total += int(input())\nexcept EOFError:\n    print(total)"
    ),
    "main_guard": "def main():\n    print(sum(map(int, open(0))))\nif __name__ == '__main__':\n    main()",
    "globals_and_recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\nmemo = {}\ndef f(n):\n    if n not in memo:\n"
        "        memo[n] = 0 if n == 0 else f(n - 1) + 1\n    return memo[n]\nf(50_000)\nprint(7)"
    ),
    "thread_with_a_large_stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(512 << 20)\n"
        "def deep(n):\n    return n and 1 + deep(n - 1)\ndef main():\n    deep(20_000)\n    print(7)\n"
        "thread = threading.Thread(target=main)\nthread.start()\nthread.join()"
    ),
    "thread_that_nobody_joins": "import threading\nthreading.Thread(target=lambda: print(7)).start()",
    "thread_pool": (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
        "    print(sum(pool.map(int, ['3', '4'])))"
    ),
    "stack_limit_raised": (
        "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 29, resource.RLIM_INFINITY))\nprint(7)"
    ),
    "asyncio": "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    print(7)\nasyncio.run(main())",
    "alarm": (
        "import signal\nrung = []\nsignal.signal(signal.SIGALRM, lambda *_: rung.append(7))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile not rung: pass\nprint(rung[0])"
    ),
    "write_to_the_buffer": "import sys\nsys.stdout.buffer.write(b'7\\n')",
    "os_write": "import os\nos.write(1, b'7\\n')",
    "print_into_a_replaced_standard_output": (
        "import io, sys\nkept = sys.stdout\nsys.stdout = io.StringIO()\nprint(7)\nkept.write(sys.stdout.getvalue())"
    ),
    "file_on_descriptor_1_left_open": "out = open(1, 'w')\nout.write('7\\n')",
    "write_method_of_a_file_left_open": "write = open(1, 'w').write\nwrite('7\\n')",
    "exit_function": "import atexit\natexit.register(print, 7)",
    "destructor": "class Late:\n    def __del__(self):\n        print(7)\nkept = Late()",
    "exit_in_the_middle": "print(7)\nexit()\nprint(8)",
    "random_state": "import random\nrandom.seed(1)\nassert 0 <= random.random() < 1\nprint(7)",
    "numbers_and_dates": (
        "import cmath, datetime, decimal, fractions, json, statistics\nprint(json.loads('7'))"
    ),
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(7).x)",
    "pickle_of_a_class_of_main": (
        "import pickle\nclass P:\n    x = 7\nprint(pickle.loads(pickle.dumps(P())).x)"
    ),
    "annotations_resolved_in_main": (
        "import typing\nclass P:\n    x: 'P'\nassert typing.get_type_hints(P)['x'] is P\nprint(7)"
    ),
    "hashing": "import hashlib\nhashlib.sha256(b'x').hexdigest()\nhashlib.md5(b'x')\nprint(7)",
    "ctypes": "import ctypes\nprint(ctypes.c_int(7).value)",
    "ctypes_callback": "import ctypes\nprint(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7)())",
    "private_map": (
        "import mmap\nroom = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nroom.write(b'7')\nprint(room[:1].decode())"
    ),
    "pair_of_sockets": "import socket\na, b = socket.socketpair()\na.sendall(b'7')\nprint(b.recv(9).decode())",
    "queue_between_threads": (
        "import queue, threading\nbox = queue.Queue()\nthreading.Thread(target=box.put, args=[7]).start()\nprint(box.get())"
    ),
    "warnings": "import warnings\nwarnings.warn('careful')\nprint(7)",
    "inspect_the_source": "import linecache\nprint(7 if 'linecache' in linecache.getline('solution.py', 1) else 8)",
    "home_of_the_user": "import os\nos.path.expanduser('~')\nprint(7)",
    "temporary_text_in_memory": "import io\nprint(io.StringIO('7').read())",
    "large_integers": "import sys\nsys.set_int_max_str_digits(0)\nassert len(str(2**20000)) == 6021\nprint(7)",
    "regular_expression": "import re\nprint(re.sub(r'(a+)', '7', 'aaa'))",
    "generator_left_suspended": "def f():\n    yield 7\n    yield 8\ng = f()\nprint(next(g))",
    "descriptor_flags": "import os, fcntl\nfcntl.fcntl(0, fcntl.F_GETFL)\nos.dup2(1, 5)\nos.write(5, b'7\\n')",
    "no_standard_input_left": "import sys\nsys.stdin.close()\nprint(7)",
    "unicode": "print('\N{SNOWMAN}' and 7)",
    "coding_line": "# -*- coding: utf-8 -*-\nprint(7)",
    "carriage_returns_in_the_source": "x = 7\r\nif x:\r\n    print(x)\r\n",
    "no_line_break_at_the_end": "import sys\nsys.stdout.write('7')",
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_idiom_passes(run, idiom):
    result = run(IDIOMS[idiom], "3\n4\n", "7\n")

    assert (result.verdict, result.stderr if idiom != "warnings" else "") == (Verdict.PASSED, "")


def test_input_at_end_of_file_raises_eof_error(run):
    result = run("input()")

    assert result.stderr.endswith("EOFError: EOF when reading a line\n")


def test_endless_recursion_is_an_ordinary_error(run):
    result = run("def f():\n    f()\nf()")

    assert result.verdict is Verdict.EXCEPTION
    assert result.stderr.splitlines()[-1] == "RecursionError: maximum recursion depth exceeded"


def test_flush_that_fails_at_exit_sets_the_exit_status(run):
    result = run("import os\nprint('lost')\nos.close(1)", expected="")

    assert (result.verdict, result.exit_code) == (Verdict.EXCEPTION, 120)


def test_output_longer_than_a_pipe_does_not_block(run):
    result = run("print('x' * 300_000)", expected="x" * 300_000)

    assert result.verdict is Verdict.PASSED


def test_input_longer_than_a_pipe_arrives_whole(run):
    assert run("print(len(input()))", "y" * 500_000, "500000").verdict is Verdict.PASSED


def test_same_program_says_the_same_in_every_worker():
    program = "import random\nprint({'a', 'b', 'c', 'd'}, hash('x'), random.random())"
    with Executor(workers=2) as pair:
        results = pair.run_many([_job(program) for _ in range(6)])

    assert len({result.stdout for [result] in results}) == 1


def _job(program: str):
    from rlef_sandbox import Job

    return Job(program, [Test("", "")], limits=Limits(cpu_s=5.0))
