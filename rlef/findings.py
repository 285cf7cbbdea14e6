"""What `rlef doctor` says: one finding for each thing that it looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from rlef.config import Config


class Level(StrEnum):
    """A run starts with warnings, and not with faults."""

    GOOD = "good"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    found: str
    mend: str = ""  # what to do about it, unless it is good

    @classmethod
    def good(cls, subject: str, found: str) -> Finding:
        return cls(level=Level.GOOD, subject=subject, found=found)

    @classmethod
    def warning(cls, subject: str, found: str, mend: str) -> Finding:
        return cls(level=Level.WARNING, subject=subject, found=found, mend=mend)

    @classmethod
    def fault(cls, subject: str, found: str, mend: str) -> Finding:
        return cls(level=Level.FAULT, subject=subject, found=found, mend=mend)


def spans_nodes(config: Config) -> bool:
    """Whether the run has more processes than this machine has GPUs."""
    return 0 < torch.cuda.device_count() < config.parallel.processes


def readable_size(number: float) -> str:
    """Of bytes."""
    power = min(4, int(math.log(max(number, 1), 1024)))
    return f"{number / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
