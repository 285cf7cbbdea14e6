"""Whether many executions leave anything behind: processes, open files, memory, temporary files.

    python bench/endurance.py [--executions 100000]

Programs of several kinds, good and bad, run in batches on one executor. What this process and each worker
hold is read after a tenth of the executions and at the end. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlef_sandbox import Executor, Job, Limits, Test

PROGRAMS = (
    "print(int(input()) + 1)",
    "print(sum(int(x) for x in input().split()))",
    "1 / 0",
    "print(",
    "import os; os._exit(250)",
    "import threading\nfor i in range(3): threading.Thread(target=print, args=(i,)).start()",
    "import socket; socket.socket()",
    "while True: print('x' * 1000)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:  # of its own: what others leave in the machine's is not ours
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        report = endure(arguments.executions)
        left = sorted(path.name for path in Path(folder).iterdir())
    print(json.dumps({"bench": "endurance", **report, "temporary_files": left}))


def endure(executions: int) -> dict[str, Any]:
    started = time.monotonic()
    with Executor(limits=Limits(output_bytes=100_000)) as executor:
        workers = executor.worker_pids()
        run(executor, executions // 10)
        early = {pid: holdings(pid) for pid in (os.getpid(), *workers)}
        run(executor, executions - executions // 10)
        time.sleep(1)
        late = {pid: holdings(pid) for pid in (os.getpid(), *workers)}
        return {
            "executions": executions,
            "seconds": time.monotonic() - started,
            "restarts": executor.restarts(),
            "zombies": zombies(workers),
            "held_by_us": [early.pop(os.getpid()), late.pop(os.getpid())],
            "held_by_workers": [list(early.values()), list(late.values())],
        }


def run(executor: Executor, executions: int) -> None:
    while executions > 0:
        jobs = [Job(program, [Test("1\n", "2\n")] * (1 + i % 5)) for i, program in enumerate(PROGRAMS * 25)]
        executor.run_many(jobs)
        executions -= sum(len(job.tests) for job in jobs)


def holdings(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    [resident] = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")]
    return {"open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())), "resident_bytes": resident}


def zombies(parents: list[int]) -> int:
    """Children of this process and of the workers that have ended and that nobody has waited for."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        count += state == "Z" and int(parent) in {os.getpid(), *parents}
    return count


if __name__ == "__main__":
    main()
