"""The script of a worker process: a warm interpreter that forks itself for each program.

It runs outside the package, in an interpreter without site-packages, and is trusted: programs run only in its
grandchildren. Arguments: the path of the compiled core, and the supervisor's process id.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import sys
from _thread import _count as running_threads
from types import CodeType, ModuleType

if __name__ == "__main__":  # outside the package: the file beside this one
    from values import text_of  # type: ignore[import-not-found]

    del sys.modules["values"]  # programs find no module of ours
else:
    from rlef_sandbox.values import text_of

SOCKET = 3
CHECKED = (0, 3, 4)  # a checker's input, expected output, and output to check
MAIN_STACK_BYTES = 512 << 20  # room for deep recursion; the kernel fixes it when a process image starts
SOURCE_NAME = "solution.py"

# What programs import most, so that they find it loaded. Each extension module makes each fork dearer.
WARM_MODULES = (
    "bisect",
    "collections",
    "copy",
    "functools",
    "heapq",
    "io",
    "itertools",
    "math",
    "operator",
    "re",
    "string",
    "threading",
    "time",
    "traceback",
    "typing",
)

WARM_ROUNDS = (
    20  # after some calls the interpreter rewrites code for what it has met, and then leaves it alone
)

# Of CPython's allocator, 3.10 and newer. Were they different, _begin_new_pools would gain nothing.
BLOCK_STEP, LARGEST_BLOCK = 16, 512
POOL_BYTES, POOL_HEADER_BYTES = 16 << 10, 48
MOST_FILLER_BYTES = 1 << 20  # of each size
_fillers: list[object] = []

REHEARSAL_INPUT = b"3\n1 2 3\nabc\n4 5\n"
REHEARSAL = b"""
import sys
from collections import Counter, defaultdict

class Pair:
    def __init__(self, left, right):
        self.left, self.right = left, right

def solve(numbers):
    seen = defaultdict(list)
    for index, number in enumerate(sorted(numbers, key=lambda value: -value)):
        seen[number % 2].append(Pair(index, number))
    return {key: [pair.right for pair in pairs] for key, pairs in seen.items()}

count = int(input())
numbers = list(map(int, input().split()))
print(sum(numbers), max(numbers), *numbers[::-1])
print(f"{count / 2:.3f}", " ".join(str(number) for number in numbers), sep="|")
print(solve(numbers), Counter(input().strip()).most_common(1), len(set(numbers)))
for line in sys.stdin:
    sys.stdout.write(line.upper())
    sys.stdout.flush()
[][0]
"""


def main() -> None:
    core_path, supervisor = sys.argv[1], int(sys.argv[2])
    _want_descriptors()
    _restart_with_large_stack()
    core = _load_core(core_path)
    readable, hidden = _file_view()
    _warm_up()
    core.serve(
        socket=SOCKET,
        supervisor=supervisor,
        readable=readable,
        hidden=hidden,
        compile=_compile,
        run=_run,
    )


def _want_descriptors() -> None:
    """A caller that has few left is no reason for a worker to fail. Programs have a limit of their own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _restart_with_large_stack() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = MAIN_STACK_BYTES if hard == resource.RLIM_INFINITY else min(MAIN_STACK_BYTES, hard)
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execve(sys.executable, sys.orig_argv, os.environ)


def _load_core(path: str) -> ModuleType:
    from importlib.machinery import ExtensionFileLoader, ModuleSpec
    from importlib.util import module_from_spec

    loader = ExtensionFileLoader("_core", path)
    module = module_from_spec(ModuleSpec("_core", loader, origin=path))
    loader.exec_module(module)
    return module


def _file_view() -> tuple[list[str], list[str]]:
    """What programs may read: the standard library without installed packages, and shared libraries."""
    import sysconfig

    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != own and os.path.isdir(path)]
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    libraries = [os.path.join(root, multiarch) for root in ("/lib", "/usr/lib")] if multiarch else []
    libraries += ["/lib64", "/usr/lib64", "/usr/share/zoneinfo"]
    readable = [path for path in [*sys.path, *libraries] if os.path.isdir(path)]
    packages = [os.path.join(path, name) for path in sys.path for name in ("site-packages", "dist-packages")]
    return outermost(readable), [path for path in packages if os.path.isdir(path)]


def outermost(paths: list[str]) -> list[str]:
    """Without those that lie below another one."""
    return [path for path in paths if not any(path.startswith(other + os.sep) for other in paths)]


def _warm_up() -> None:
    """Load and touch what programs will use, so that their processes share it, and freeze the heap."""
    import gc
    import importlib
    import site

    # No module acts after a fork. `random` would reseed itself, which makes programs unrepeatable.
    # `threading` would renew what other threads can have left in disorder, but no process here has any when
    # it forks, and that dirties sixty pages in each test.
    register_at_fork, os.register_at_fork = os.register_at_fork, lambda **_: None
    random = importlib.import_module("random")
    for name in WARM_MODULES:
        importlib.import_module(name)
    os.register_at_fork = register_at_fork
    random.seed(0)
    site.setquit()  # exit() and quit(), which -S leaves out
    sys.argv[:] = [SOURCE_NAME]
    sys.orig_argv[:] = [sys.executable, SOURCE_NAME]  # as for a script; it named the files of the sandbox
    for _ in range(WARM_ROUNDS):
        _rehearse()
    _new_main_module()
    gc.collect()
    gc.freeze()
    _begin_new_pools()


def _begin_new_pools() -> None:
    """Fill what is free in the pools from which the interpreter takes small blocks, up to the first block of
    a new pool of each size. There the next blocks lie on the page of the pool's header, and a test copies one
    page for them instead of two."""
    for size in range(BLOCK_STEP, LARGEST_BLOCK + 1, BLOCK_STEP):
        for _ in range(MOST_FILLER_BYTES // size):
            filler = _block(size)
            _fillers.append(filler)
            if id(filler) % POOL_BYTES == POOL_HEADER_BYTES:
                break


def _block(size: int) -> object:
    if size == sys.getsizeof(object()):
        return object()
    return float(size) if size == BLOCK_STEP * 2 else bytes(size - sys.getsizeof(b""))


def _rehearse() -> None:
    """Run the rehearsal as a program would be, on files that replace the standard streams for a while."""
    kept = [os.dup(stream) for stream in range(3)]
    for stream in range(3):
        file = os.memfd_create("rehearsal")
        os.dup2(file, stream)
        os.close(file)
    os.pwrite(0, REHEARSAL_INPUT, 0)
    _new_main_module()
    program = _compile(REHEARSAL)
    assert isinstance(program, CodeType)
    _run(program, "")
    for stream, file in enumerate(kept):
        getattr(sys, ("stdin", "stdout", "stderr")[stream]).seek(0)
        os.dup2(file, stream)
        os.close(file)


def _new_main_module() -> None:
    import builtins

    module = ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__=SOURCE_NAME)
    sys.modules["__main__"] = module


def _compile(source: bytes) -> CodeType | tuple[str, bool, bool]:
    """The program, or (what the interpreter says, whether the syntax is at fault, whether memory ran out)."""
    try:
        code = compile(source, SOURCE_NAME, "exec", dont_inherit=True)
    except BaseException as error:
        syntax = isinstance(error, (SyntaxError, ValueError))
        return _description(error, source), syntax, isinstance(error, MemoryError)
    _remember_source(source)
    return code


def _remember_source(source: bytes) -> None:
    """Lets tracebacks quote the lines of a file that does not exist."""
    import linecache

    text = source.decode("utf-8", "replace")
    linecache.cache[SOURCE_NAME] = (len(text), None, text.splitlines(keepends=True), SOURCE_NAME)


def _description(error: BaseException, source: bytes) -> str:
    import traceback

    _remember_source(source)
    error.__traceback__ = None  # it holds only frames of this file
    return "".join(traceback.format_exception(error))


def _run(code: CodeType, function: str) -> tuple[int, bool]:
    """Run the program in `__main__`, or call its function, and end as the interpreter would, but for freeing
    what it holds.

    Returns the exit status, and whether an uncaught MemoryError ended it.
    """
    namespace = sys.modules["__main__"].__dict__
    memory_error = False
    try:
        if function:
            _call(code, function)
        else:
            exec(code, namespace)
        status = 0
    except SystemExit as request:
        status = _exit_status(request.code)
    except BaseException as error:
        memory_error = isinstance(error, MemoryError)
        _report(error)
        status = 1
    return _finish(namespace, status), memory_error


def _call(code: CodeType, function: str) -> None:
    """Load the program as a module, call its function with the arguments on standard input, and write what it
    returns to standard output. What it prints goes to standard error."""
    output, sys.stdout = sys.stdout, sys.stderr
    namespace = sys.modules["__main__"].__dict__
    namespace["__name__"] = "solution"
    exec(code, namespace)
    if function in namespace:
        target = namespace[function]
    elif "Solution" in namespace:
        target = getattr(namespace["Solution"](), function)
    else:
        raise NameError(f"the program has no function {function!r}")
    value = target(*_arguments())
    try:
        text = text_of(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"what {function} returned is no JSON value: {error}") from None
    output.write(text + "\n")
    output.flush()


def _arguments() -> list[object]:
    """Of a function: the JSON on standard input. Of a checker: what that and two more descriptors hold."""
    try:
        os.fstat(CHECKED[-1])
    except OSError:
        return list(json.loads(sys.stdin.readline()))
    return [open(file, encoding="utf-8", errors="surrogateescape", newline="").read() for file in CHECKED]


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """Print the traceback as for a script, without this file's frames."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, frames)
    else:
        traceback.print_exception(type(error), error, frames)


def _finish(namespace: dict[str, object], status: int) -> int:
    """What matters of the interpreter's end: threads, exit functions, and output that is still in buffers."""
    if running_threads():
        import threading

        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    for name in list(namespace):  # files left open are written when nothing refers to them any more
        if name != "__builtins__":
            namespace[name] = None
    for stream in streams:
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            status = status or 120
    return status


if __name__ == "__main__":
    main()
