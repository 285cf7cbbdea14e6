"""What compilers make of the Triton kernels, read from the machine code: no GPU and no driver is needed.

    python bench/kernels.py --aot [--targets sm_90 gfx942] [--kernels statistics] [--accept]

Each kernel is compiled as it is launched, in every configuration that ships, for each target. The table shows
registers, shared memory, spills and, of kernels that stream through memory, the bytes that their loops move
per element, how many accesses are at least 128 bits wide, and the busiest pipe's time over that of DRAM; of
matrix products, the matrix instructions and copies to shared memory in their loop, and the busiest pipe's
clocks after the loop over the matrix clocks of the tile. The last line is JSON.

`--accept` writes the baseline, which `tests/kernels/test_aot.py` lets only improve.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))

import triton

from bench.configurations import configurations
from bench.machine_code import TARGETS, Report, faults, report

BASELINE = Path(__file__).with_name("kernels_aot.json")


def read_baseline() -> dict[str, Report]:
    held = json.loads(BASELINE.read_text(encoding="utf-8"))
    return {name: Report(**values) for name, values in held["reports"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aot", action="store_true", required=True, help="compile and read the machine code")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--kernels", default="", help="those whose name begins so")
    parser.add_argument("--accept", action="store_true", help=f"write what was found into {BASELINE.name}")
    arguments = parser.parse_args()

    reports: dict[str, Report] = {}
    failed = False
    print(f"{'kernel':32} target  regs spills shared   load  store wide  pipe")
    for configuration in configurations():
        if not configuration.name.startswith(arguments.kernels):
            continue
        for target in (each for each in configuration.targets if each in arguments.targets):
            found = report(configuration, target)
            reports[f"{configuration.name} {target}"] = found
            print(f"{configuration.name:32} {target:7} {as_row(found)}")
            for fault in faults(configuration, found, target):
                failed = True
                print(f"  FAULT: {fault}")
    result = {"triton": triton.__version__, "reports": {name: asdict(each) for name, each in reports.items()}}
    if arguments.accept:
        accept({name: asdict(each) for name, each in reports.items()})
    print(json.dumps(result))
    sys.exit(failed)


def as_row(found: Report) -> str:
    row = f"{found.registers:4} {found.spills:6} {found.shared:6}"
    if found.loaded is not None:
        row += f" {found.loaded:6.2f} {found.stored:6.2f} {found.wide:4.0%}"
    if found.products is not None:
        row += f" {found.products:6} {found.copies or 0:6}     "
    return f"{row}  {found.pipe} {found.pipe_over_dram or found.after_loop}" if found.pipe else row


def accept(reports: dict[str, object]) -> None:
    """Put them in the place of those held; forget kernels that are no more."""
    held = json.loads(BASELINE.read_text(encoding="utf-8"))["reports"]
    known = {
        f"{configuration.name} {target}"
        for configuration in configurations()
        for target in configuration.targets
    }
    lines = [
        f"  {json.dumps(name)}: {json.dumps(each)}"
        for name, each in sorted((held | reports).items())
        if name in known
    ]
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "reports": {{\n'
    BASELINE.write_text(head + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
