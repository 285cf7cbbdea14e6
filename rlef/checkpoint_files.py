"""The files of one checkpoint: written and verified by one process, without a word to the others.

Each process writes pieces of whole tensors (`pieces.py`) as safetensors files `rank-00000-0000.safetensors`,
whose keys are `network/kind/tensor@offsets`, and its rollouts under way as `rollouts-00000.json`. The first
adds `common.json`, which holds what all share, and `manifest.json`, which holds the size and SHA-256 of each
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlef.config import ConfigError
from rlef.files import naming, sync, write_text
from rlef.pieces import Box, Piece, State, overlaps

FORMAT = 2
MANIFEST = "manifest.json"
COMMON = "common.json"
FILE_BYTES = 256 * 1024**2
"""Of pieces in one file; a larger piece has one to itself. A reader maps one file at a time."""

_ROLLOUTS = re.compile(r"rollouts-\d+\.json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names the file, the fault and the mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What every process gets back."""

    step: int  # steps completed; telemetry cuts metrics.jsonl back to it
    path: Path
    states: Mapping[str, State]  # of each network; read when a network asks
    shared: Mapping[str, Any]
    rollouts: list[str]  # what each process saved of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What a checkpoint is verified by."""

    name: str
    bytes: int
    sha256: str


def as_json(value: Any) -> str:
    """Find out now, not when the run is to be resumed, what would not come back as it is."""
    _require_json(value, "")
    return json.dumps(value, indent=1)


def _require_json(value: Any, place: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"a key of {place} is {key!r}: a checkpoint's keys are strings")
            _require_json(item, f"{place}[{key!r}]" if place else key)
    elif type(value) is list:
        for index, item in enumerate(value):
            _require_json(item, f"{place}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise ValueError(
            f"{place} is a {type(value).__qualname__}: beside tensors a checkpoint holds numbers, strings, "
            "None, and dicts and lists of these; convert it"
        )


def write_part(folder: Path, rank: int, pieces: Sequence[Piece], rollouts: str) -> list[StoredFile]:
    """One process's files."""
    files = [
        _write_pieces(folder / f"rank-{rank:05d}-{number:04d}.safetensors", group)
        for number, group in enumerate(_by_file(pieces))
    ]
    if rollouts:
        files.append(_write_text(folder / f"rollouts-{rank:05d}.json", rollouts))
    return files


def write_index(folder: Path, files: Sequence[StoredFile], common: str) -> None:
    """What makes a folder with the `files` of all processes a checkpoint."""
    files = [*files, _write_text(folder / COMMON, common)]
    manifest = {"format": FORMAT, "files": [asdict(file) for file in files]}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _by_file(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    for piece in pieces:
        if group and sum(other.data.nbytes for other in group) + piece.data.nbytes > FILE_BYTES:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _write_pieces(path: Path, pieces: Sequence[Piece]) -> StoredFile:
    tensors = {_key(piece): piece.data.to("cpu").contiguous() for piece in pieces}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise _of_system(error, path) from None
    path.chmod(mode)  # safetensors closes it to everyone else
    return _synced(path)


def _key(piece: Piece) -> str:
    return f"{piece.name}@{','.join(map(str, piece.offsets))}"


def _of_system(error: SafetensorError, path: Path) -> Exception:
    """What the system said, of which the library keeps only the words."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    if said is None:
        return CheckpointError(f"{path} cannot be written ({error}): check its disk")
    return OSError(int(said[1]), os.strerror(int(said[1])), str(path))


def _write_text(path: Path, text: str) -> StoredFile:
    with naming(path):
        path.write_text(text, encoding="utf-8")
    return _synced(path)


def _synced(path: Path) -> StoredFile:
    with naming(path):
        sync(path)
    return StoredFile(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, StoredFile]:
    """The files of a checkpoint by name.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
        ConfigError: it has another format, which is as good as damaged but must not be passed over.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name one like runs/NAME/checkpoints/step-000050")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        written_as = manifest["format"]
        files = {}
        if written_as == FORMAT:
            files = {file["name"]: StoredFile(**file) for file in manifest["files"]}
    except FileNotFoundError:
        raise CheckpointError(f"{path / MANIFEST} is missing: delete the folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error}): delete the folder") from None
    if written_as != FORMAT:
        raise ConfigError(
            f"{path} has format {written_as}, this rlef reads {FORMAT}: use the rlef that wrote it, "
            "or start anew with --resume never"
        )
    if COMMON not in files:
        raise CheckpointError(f"{path / MANIFEST} is damaged (no entry for {COMMON}): delete the folder")
    return files


def verify(path: Path, files: Iterable[StoredFile]) -> None:
    """Raises CheckpointError at the first that is missing or damaged."""
    for expected in files:
        file = path / expected.name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: delete the folder")
        size = file.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{file} has {size} bytes instead of {expected.bytes}: delete the folder")
        if _sha256(file) != expected.sha256:
            raise CheckpointError(f"{file} does not have the SHA-256 of its manifest: delete the folder")


def read_checkpoint(path: Path, names: Iterable[str]) -> Checkpoint:
    """From its files, which are verified: all but the tensors, of which only the keys are read."""
    common = json.loads((path / COMMON).read_bytes())
    parts = _stored_pieces(path / name for name in names if name.endswith(".safetensors"))
    return Checkpoint(
        step=common["step"],
        path=path,
        states={
            network: _StoredState(facts, parts.get(network, {}))
            for network, facts in common["states"].items()
        },
        shared=common["shared"],
        rollouts=[(path / name).read_text(encoding="utf-8") for name in names if _ROLLOUTS.fullmatch(name)],
    )


def _stored_pieces(files: Iterable[Path]) -> dict[str, dict[str, list[_StoredPiece]]]:
    """By network and whole tensor."""
    parts: dict[str, dict[str, list[_StoredPiece]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                place, offsets = key.rsplit("@", 1)
                network, name = place.split("/", 1)
                box = Box(
                    offsets=tuple(map(int, offsets.split(","))),
                    sizes=tuple(opened.get_slice(key).get_shape()),
                )
                of_network = parts.setdefault(network, {})
                of_network.setdefault(name, []).append(_StoredPiece(file=file, key=key, box=box))
    return parts


class _StoredState:
    """The pieces of one network in the files of a checkpoint."""

    def __init__(self, facts: Mapping[str, Any], parts: Mapping[str, Sequence[_StoredPiece]]) -> None:
        self.facts = facts
        self._parts = parts

    def read(self, targets: Iterable[Piece]) -> None:
        try:
            found = list(overlaps(targets, self._parts))
        except ValueError as error:
            raise CheckpointError(f"a checkpoint is not whole: {error}") from None
        by_file: dict[Path, list[tuple[Piece, _StoredPiece, Box]]] = {}
        for copy in found:
            by_file.setdefault(copy[1].file, []).append(copy)
        for file, copies in by_file.items():
            # Pages of a mapped file count as this process's memory until it is closed.
            with safe_open(file, framework="pt") as opened:
                for target, part, common in copies:
                    read = opened.get_slice(part.key)[common.within(part.box)]
                    target.data[common.within(target.box)].copy_(read)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredPiece:
    file: Path
    key: str
    box: Box
