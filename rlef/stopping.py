"""SIGINT and SIGTERM: a run saves and leaves after the step under way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

_SAME_SIGNAL_S = 3.0  # within which one request to stop may arrive several times


class StopRequest:
    """While inside, the first signal of each kind is a request; a second one ends the process at once."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        """`on_request` is called by the signal's handler, so it may do little."""
        self._on_request = on_request
        self._asked: dict[int, float] = {}

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, *, others: bool = False) -> bool:
        """Collective: whether any process has been asked, or one knows of `others` that have."""
        asked = torch.tensor(int(bool(self._asked) or others))
        if torch.cuda.is_available():
            asked = asked.cuda()
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        # By number: a terminal's Ctrl-C arrives beside the launcher's SIGTERM. And a scheduler signals this
        # process and its launcher, which passes the same signal on.
        if time.monotonic() - self._asked.setdefault(number, time.monotonic()) > _SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)  # a second time: the user will not wait
            os.kill(os.getpid(), number)
        self._on_request()
