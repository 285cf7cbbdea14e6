"""`python -m rlef_sandbox check [--json]`: which layers of isolation this machine gives."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rlef_sandbox import SandboxFault, check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlef_sandbox")
    commands = parser.add_subparsers(dest="command", required=True)
    check_command = commands.add_parser("check", help="list the layers of isolation that this machine gives")
    check_command.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args()
    try:
        reports = check()
    except SandboxFault as fault:
        print(fault, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"layers": [asdict(report) for report in reports]}))
        return 0
    width = max(len(report.layer.value) for report in reports)
    for report in reports:
        state = "given" if report.given else f"missing ({report.reason}): {report.loss}"
        print(f"{report.layer.value:{width}}  {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
