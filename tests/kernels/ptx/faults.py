"""What a simulated program can do wrong. The machine adds the line of the program to each message."""

from __future__ import annotations


class Fault(Exception):  # noqa: N818
    """Something that no correct program does on any machine."""


class Race(Fault):
    """Two threads touch the same memory, one of them writes, and nothing says which comes first."""


class InFlight(Fault):
    """Shared memory is touched while an asynchronous copy to it may still be under way."""


class Uninitialised(Fault):
    """Shared memory or a register is read that nothing was written to."""


class OutOfBounds(Fault):
    """An access reaches memory that belongs to no argument of the launch."""


class Misaligned(Fault):
    """An access of so many bytes begins at an address that they do not divide."""


class Stuck(Fault):
    """Threads wait for one another at different places."""


class Unsupported(Fault):
    """The simulator does not know the instruction: teach it, or it would have to guess."""
