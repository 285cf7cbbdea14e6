"""Rows of files that are broken, hostile or huge: each is told, and the rows after it are read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlef.config import ConfigError
from rlef.sources.common import Reason, UnusableProblemError, rows_of
from rlef.sources.convert import convert
from tests.sources import examples

MOST = 1 << 20
GOOD = b'{"name": "good"}'


def reasons(path: Path) -> list[str]:
    return [
        row.reason if isinstance(row, UnusableProblemError) else row["name"] for _, row in rows_of(path, MOST)
    ]


@contextmanager
def memory_below(most_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most_bytes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"name": "\xff"}', Reason.UNREADABLE),
        (b'{"name": "\\ud800"}', Reason.UNREADABLE),
        (b'{"name": "cut', Reason.UNREADABLE),
        (b"[" * 200_000 + b"]" * 200_000, Reason.UNREADABLE),
        (b'{"a":' * 100_000, Reason.UNREADABLE),
        (b'{"n": ' + b"1" * 10_000 + b"}", Reason.UNREADABLE),
        (b"[1]", Reason.INVALID),
        (b"null", Reason.INVALID),
        (b'{"name": "' + b"x" * MOST + b'"}', Reason.TOO_LARGE),
    ],
)
def test_a_bad_line_is_told_and_the_next_is_read(tmp_path: Path, line: bytes, reason: Reason) -> None:
    for name, ending in (("a.jsonl", b"\n"), ("b.jsonl", b"\r\n")):
        path = tmp_path / name
        path.write_bytes(ending.join([GOOD, line, b"", GOOD]))  # and no line end after the last
        assert reasons(path) == ["good", reason, "good"]


def test_a_line_of_200_megabytes_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, 2)
        file.write(b"\n" + GOOD + b"\n")
    with memory_below(8 << 20):
        assert reasons(path) == [Reason.TOO_LARGE, "good"]


def test_a_gzip_bomb_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))
        file.write(b"\n" + GOOD)
    assert path.stat().st_size < 200_000
    with memory_below(8 << 20):
        assert reasons(path) == [Reason.TOO_LARGE, "good"]


def broken_text(path: Path) -> None:
    """A parquet file whose second text is not UTF-8, which pyarrow writes as it is given."""
    buffers = pa.array([b"good", b"\xff\xff", b"good"], pa.binary()).buffers()
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    parquet.write_table(pa.table({"name": texts}), path)


def test_text_in_parquet_that_is_none_is_told_and_the_next_row_is_read(tmp_path: Path) -> None:
    broken_text(tmp_path / "a.parquet")
    assert reasons(tmp_path / "a.parquet") == ["good", Reason.UNREADABLE, "good"]


def test_a_large_row_of_parquet_is_not_turned_into_python(tmp_path: Path) -> None:
    rows = [{"name": "x" * (20 << 20)}, {"name": "good"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    del rows
    with memory_below(8 << 20):  # of Python's own; a page of the file is Arrow's
        assert reasons(tmp_path / "a.parquet") == [Reason.TOO_LARGE, "good"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_cut_off_is_refused_as_a_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("gz"):
        examples.json_lines(path, [{"name": "good"}] * 1000)
    else:
        broken_text(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=rf"{name}: not a whole (gzip|parquet) file .* fetch it again"):
        reasons(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"a.csv: give JSON lines \(.jsonl, .jsonl.gz\) or a .parquet file"):
        reasons(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"time_limit": {"seconds": 10**9, "nanos": 0}}, Reason.INVALID, "'time_limit_s'"),
        ({"time_limit": {"seconds": 10**9, "nanos": -1}}, Reason.INVALID, "'nanos' is -1"),
        ({"memory_limit_bytes": 1}, Reason.INVALID, "'memory_limit_bytes'"),
        ({"memory_limit_bytes": 2**60}, Reason.INVALID, "'memory_limit_bytes'"),
        (
            {"private_tests": {"input": ["x" * 3000], "output": [""]}},
            Reason.TOO_LARGE,
            "'private_tests.0': 3,000 bytes, and problems.max_test_bytes = 2,048",
        ),
        ({"private_tests": {"input": ["x" * 2000] * 17, "output": [""] * 17}}, Reason.TOO_LARGE, "32,768"),
    ],
)
def test_limits_and_sizes_beyond_all_use_are_set_aside(
    tmp_path: Path, change: examples.Row, reason: Reason, said: str
) -> None:
    path = examples.code_contests(tmp_path / "p.parquet", change, {"name": "good"})
    made = convert(
        "codecontests", [path], tmp_path / "out.jsonl", choices=examples.choices(max_test_bytes=2048)
    )
    (bad,) = made.set_aside
    assert bad.reason is reason
    assert said in bad.detail
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == "good"
