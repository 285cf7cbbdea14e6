"""Two nodes on this machine: network namespaces, joined by a link that can be cut.

The namespaces have no names. Each lives as long as a process that waits in it for the end of its input, which
comes when the test ends, whatever ends it; and nothing in them reaches any other network.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

LINK = "veth0"  # the interface's name, in both


@dataclass(frozen=True)
class Node:
    """One namespace, with an address on the link and the loop-back."""

    holder: int  # process id of the one that waits in it
    address: str

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` there."""
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", *command]

    def ip(self, *words: str) -> str:
        return _run(self.inside("ip", *words))

    def cut_off(self) -> None:
        self.ip("link", "set", LINK, "down")

    def come_back(self) -> None:
        self.ip("link", "set", LINK, "up")

    def bytes_sent(self) -> int:
        """Over the link, so far."""
        return int(_run(self.inside("cat", "/proc/net/dev")).split(f"{LINK}:")[1].split()[8])


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Wants the right to make namespaces, as root has it."""
    with _holder() as first, _holder() as second:
        nodes = Node(first, "10.99.0.1"), Node(second, "10.99.0.2")
        nodes[0].ip("link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(second))
        for node in nodes:
            node.ip("address", "add", f"{node.address}/30", "dev", LINK)
            node.ip("link", "set", "lo", "up")
            node.ip("link", "set", LINK, "up")
        yield nodes


@contextmanager
def _holder() -> Iterator[int]:
    with subprocess.Popen(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"entered\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"entered\n", "no network namespace can be made; be root"
        yield process.pid


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
