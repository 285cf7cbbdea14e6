"""What the commands for problem files refuse: one line that says what to mend, and nothing is made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlef.sources.convert import FORMATS, USES_SANDBOX
from tests.small_runs import files_of_at_most
from tests.test_cli import PROBLEM, assert_refused, rlef

OF_ROWS = [name for name in FORMATS if name != "kattis"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every wrong kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.jsonl").write_text("hello\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    (tmp_path / "plain.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 10_000)[:20])
    (tmp_path / "table.csv").write_text("id,statement\n")
    (tmp_path / "empty.parquet").write_bytes(b"")
    parquet.write_table(pa.table({"other": [1, 2]}), tmp_path / "other.parquet")
    parquet.write_table(pa.table({"other": pa.array([], pa.int64())}), tmp_path / "no.parquet")
    whole = (tmp_path / "other.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused_and_nothing_made(folder: Path, arguments: str, message: str) -> None:
    before = contents(folder)
    assert_refused(rlef("problems", *arguments.split()), message)
    assert contents(folder) == before


UNUSABLE = {
    "absent.jsonl": "absent.jsonl: there is no such file; name what was downloaded",
    "folder": "folder: give JSON lines (.jsonl, .jsonl.gz) or a .parquet file",
    "table.csv": "table.csv: give JSON lines (.jsonl, .jsonl.gz) or a .parquet file",
    "empty.jsonl": "empty.jsonl: no problem in it; give files of ",
    "no.parquet": "no.parquet: no problem in it; give files of ",
    "good.jsonl": "good.jsonl: none of 1 problems can be used as ",
    "text.jsonl": "the first is set aside, unreadable: text.jsonl, line 1 (not JSON (",
    "latin.jsonl": "the first is set aside, unreadable: latin.jsonl, line 1 (not JSON ('utf-8' codec ",
    "other.parquet": "other.parquet: none of 2 problems can be used as ",
    "empty.parquet": "empty.parquet: not a whole parquet file (after 0 rows: ",
    "cut.parquet": "cut.parquet: not a whole parquet file (after 0 rows: ",
    "plain.jsonl.gz": "plain.jsonl.gz: not a whole gzip file (Not a gzipped file (b'pl')); fetch it again",
    "cut.jsonl.gz": "cut.jsonl.gz: not a whole gzip file (Compressed file ended before ",
}


@pytest.mark.parametrize("format_name", OF_ROWS)
def test_a_file_of_nothing_usable_is_refused_in_every_format(folder: Path, format_name: str) -> None:
    (folder / "made.jsonl").write_text("as it was\n")
    names = ("absent.jsonl", "good.jsonl") if format_name in USES_SANDBOX else UNUSABLE
    for name in names:
        assert_refused_and_nothing_made(folder, f"convert {format_name} {name} made.jsonl", UNUSABLE[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert kattis good.jsonl made.jsonl", "good.jsonl: give the folder of a problem package, or one"),
        ("convert kattis folder made.jsonl", "folder: no problem.yaml here, nor one folder below; give a "),
        ("convert csv good.jsonl made.jsonl", "there is no format 'csv'; use one of codecontests, "),
        ("convert apps good.jsonl folder", "folder is a folder; name a file to write"),
        ("convert apps good.jsonl ./good.jsonl", "good.jsonl is named twice; name another file to write"),
        (
            "convert apps good.jsonl good.jsonl/x",
            "good.jsonl/x cannot be written (File exists); name ",
        ),
        (
            "convert apps good.jsonl /proc/none/x",
            "/proc/none/x cannot be written (No such file or ",
        ),
        ("convert apps good.jsonl a --report a", "a is named twice; name another file to write"),
        ("convert apps good.jsonl a --report folder", "folder is a folder; name a file to write"),
        ("convert apps good.jsonl a --against folder", "'folder' is a folder; give a JSONL file of problems"),
        ("convert apps good.jsonl a --against text.jsonl", "text.jsonl, line 1: not JSON ("),
        ("check absent", "there is no file 'absent'; give a JSONL file of problems"),
        ("check folder", "'folder' is a folder; give a JSONL file of problems"),
        ("check empty.jsonl", "empty.jsonl holds no problem; put one JSON object on each line"),
        ("check other.parquet", "other.parquet, line 1: not JSON ("),
        ("check good.jsonl --output good.jsonl", "good.jsonl is named twice; name another file to write"),
        ("check good.jsonl --output folder", "folder is a folder; name a file to write"),
        ("check good.jsonl --allow-missing moat", "the sandbox does not start: allow_missing names 'moat': "),
        ("select absent a --rates folder", "there is no file 'absent'; give a JSONL file of problems"),
        ("select good.jsonl a --rates folder", "folder/evaluation.json is missing: name the folder of an "),
        ("select good.jsonl a --rates good.jsonl", "good.jsonl/evaluation.json is missing: name the folder "),
        ("contamination good.jsonl absent", "there is no file 'absent'; give a JSONL file of problems"),
        ("contamination good.jsonl empty.jsonl", "empty.jsonl holds no problem; put one JSON object on "),
        ("contamination empty.jsonl good.jsonl", "empty.jsonl holds no problem; put one JSON object on "),
        ("contamination good.jsonl latin.jsonl", "latin.jsonl, line 1: not JSON ("),
        ("contamination good.jsonl good.jsonl --output good.jsonl", "good.jsonl is named twice; name "),
    ],
)
def test_what_cannot_be_read_or_written_is_refused(folder: Path, arguments: str, message: str) -> None:
    assert_refused_and_nothing_made(folder, arguments, message)


def test_a_disk_that_is_full_is_told_in_one_line_and_leaves_nothing(folder: Path) -> None:
    with files_of_at_most(10):
        arguments = "contamination good.jsonl good.jsonl --output found.json"
        assert_refused_and_nothing_made(folder, arguments, "found.json: File too large; see to it, and try")
