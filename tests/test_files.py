from __future__ import annotations

from pathlib import Path

import pytest

from rlef.files import replacing, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_file_takes_the_place_of_the_old_one_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with replacing(path) as writing:
        writing.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == {"figures.json"}


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail_half_way() -> None:
        with replacing(path) as writing:
            writing.write_text("ne")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fail_half_way()
    assert path.read_text() == "old"
    assert names(tmp_path) == {"figures.json"}


def test_text_is_written_as_utf8_into_a_folder_that_is_made(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "notes.txt", "größer\n")
    assert (tmp_path / "new" / "notes.txt").read_bytes() == "größer\n".encode()
