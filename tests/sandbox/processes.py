"""Looking at processes from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def process_tree(pid: int) -> list[int]:
    """Pids of a process, of its children, and of theirs."""
    return sorted({pid, *_below(pid, _parents_and_sessions())})


def descendants(worker: int) -> list[int]:
    """Pids of the processes that a worker made for programs: all but the first of its pid namespace, which
    does nothing but live as long as the worker."""
    return [pid for pid in _below(worker, _parents_and_sessions()) if not is_first_of_its_namespace(pid)]


def family(worker: int) -> list[int]:
    """Descendants, and what is left in the session that the worker leads: orphans are still in it."""
    known = _parents_and_sessions()
    session = {member for member, (_, session) in known.items() if session == worker} - {worker}
    found = session | set(_below(worker, known))
    return sorted(pid for pid in found if not is_first_of_its_namespace(pid))


def is_first_of_its_namespace(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    [pids] = [line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")]
    return len(pids) > 1 and pids[-1] == "1"


def _parents_and_sessions() -> dict[int, tuple[int, int]]:
    known = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            known[int(entry.name)] = int(fields[1]), int(fields[3])
    return known


def _below(pid: int, known: dict[int, tuple[int, int]]) -> list[int]:
    found, added = set(), {pid}
    while added:
        added = {child for child, (parent, _) in known.items() if parent in added} - found
        found |= added
    return sorted(found)


def memory_of(pid: int) -> bytes:
    image = b""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
        for line in maps:
            fields = line.split()
            if "w" in fields[1] and "[v" not in line:
                begin, end = (int(address, 16) for address in fields[0].split("-"))
                memory.seek(begin)
                try:
                    image += memory.read(end - begin)
                except OSError:
                    continue
    return image


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
