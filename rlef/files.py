"""Files that are whole or not there: written beside their place, synced, and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path to write to instead of `path`, whose place the new file takes when the block has ended.

    If the block raises, `path` is as it was before; so it is after a crash or a power cut before the end, and
    after one later the new file is whole.
    """
    writing = path.with_name(f".{path.name}.writing")
    try:
        with naming(path):
            yield writing
            sync(writing)
            writing.replace(path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system from inside names the file: one that `write` meets does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8, by `replacing`; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing:
        writing.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
