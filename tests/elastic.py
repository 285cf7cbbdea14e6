"""`python -m tests.elastic OPTIONS -m MODULE ARGUMENTS`: torchrun, but it forks its processes.

They come from a process that has imported rlef, which takes longer than all that they do. Options, agent,
rendezvous and restarts are torchrun's own; MODULE has a `main`.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

import rlef.train  # noqa: F401  here, once


def run(module: str, *arguments: str) -> None:
    sys.argv[1:] = arguments
    try:
        importlib.import_module(module).main()
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    options = parse_args(sys.argv[1:])
    config, _, _ = config_from_args(options)
    start = elastic_launch(replace(config, start_method="fork"), run)
    start(options.training_script, *options.training_script_args)
