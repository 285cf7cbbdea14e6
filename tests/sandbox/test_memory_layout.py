"""What makes a test cheap: how little of the worker's memory its process has to copy or to map anew."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import NamedTuple

from rlef_sandbox import Executor, Test

COLLAPSE = 25  # MADV_COLLAPSE
MOST_FAULTS = {1: 250, 20: 190}  # by the tests of a program; twice what CPython 3.11 needs
COUNT_FAULTS = "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"


class Mapping(NamedTuple):
    begin: int
    end: int
    permissions: str
    path: str


def mappings(pid: int | str) -> list[Mapping]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split(None, 5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        found.append(Mapping(begin, end, permissions, path[0] if path else ""))
    return found


def huge_page_bytes() -> int:
    """0 where the kernel gives none that is asked for."""
    file = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if not file.exists():
        return 0
    size = int(file.read_text())
    room = mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(room))
    ctypes.memset(begin, 1, 2 * size)
    page = -(-begin // size) * size
    libc = ctypes.CDLL(None)
    given = libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), COLLAPSE) == 0
    return size if given else 0


def pages_of(pid: int | str, at: Mapping) -> list[bytes]:
    with open(f"/proc/{pid}/mem", "rb") as file:
        file.seek(at.begin)
        content = file.read(at.end - at.begin)
    return [content[i : i + mmap.PAGESIZE] for i in range(0, len(content), mmap.PAGESIZE)]


def test_no_whole_huge_page_of_code_is_left_to_its_file(executor):
    size = huge_page_bytes()
    [worker] = executor.worker_pids()
    code = [at for at in mappings(worker) if at.permissions == "r-xp" and at.path.startswith("/")]

    assert not [at for at in code if size and -(-at.begin // size) * size + size <= at.end]


def test_code_in_huge_pages_is_that_of_the_file_and_cannot_be_written(executor):
    [worker] = executor.worker_pids()
    of_files = [at for at in mappings("self") if at.path.startswith("/") and "w" not in at.permissions]
    known = {page for at in of_files if "r" in at.permissions for page in pages_of("self", at)}
    moved = [at for at in mappings(worker) if "x" in at.permissions and not at.path]

    for at in moved:
        pages = pages_of(worker, at)
        assert at.permissions == "r-xp"
        assert sum(page in known for page in pages) > 0.9 * len(pages)  # the loader writes to some


def test_a_test_has_few_page_faults():
    """Nothing depends on their number but the cost of a test, of which they are the larger part."""
    with Executor(workers=1) as executor:
        for tests, most in MOST_FAULTS.items():
            results = executor.run(COUNT_FAULTS, [Test("", "")] * tests)
            faults = [int(result.stdout) for result in results]
            assert max(faults) < most, faults
