"""SIGINT and SIGTERM: a run saves and leaves after the step under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist


class StopRequest:
    """While inside, the first signal of each kind is a request; a second one ends the process at once."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        """`on_request` is called by the signal's handler, so it may do little."""
        self._on_request = on_request
        self._asked: set[int] = set()

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
        if number in self._asked:  # a second time: the user will not wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked.add(number)  # by number: a terminal's Ctrl-C arrives beside the launcher's SIGTERM
        self._on_request()
