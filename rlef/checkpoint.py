"""Checkpoints that survive a kill -9 at any moment.

A checkpoint is a folder `step-000123` with one `rank-00000.pt` per process, `shared.pt` and `manifest.json`,
which holds the size and SHA-256 of each file. It is written under a hidden name, every file is synced, and
one rename makes it valid; until then the one before it stays. Loading verifies, and steps back past whatever
is damaged. All processes must see the same folder; they agree on every decision through torch.distributed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import torch
import torch.distributed

from rlef.config import Config, ConfigError
from rlef.files import naming, sync, write_text
from rlef.ports import ParallelState

FORMAT = 1
MANIFEST = "manifest.json"
SHARED = "shared.pt"

# A checkpoint is `step-N`. `.step-N.replaced` is a whole one too, seen only if the process died between the
# two renames that put a new step-N in the place of an old one. Whatever has another hidden name is rubbish.
_LOADABLE = re.compile(r"step-\d{6,}|\.step-\d{6,}\.replaced")
_RUBBISH = re.compile(r"\.step-\d{6,}\.(writing|removed)")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names the file, the fault and the mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What one process gets back."""

    step: int  # steps completed; telemetry cuts metrics.jsonl back to it
    path: Path
    rank_state: Mapping[str, Any]
    shared: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    format: int
    step: int
    layout: dict[str, int]
    files: dict[str, _File]


class CheckpointStore:
    """The checkpoints of one run.

    Every method is collective: all processes call it, and all return or all raise.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        rank: int = 0,
        world_size: int = 1,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        """`layout` names settings that a shard depends on, as `{"parallel.tensor": 2}`; a load must match."""
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}: keep at least 1")
        if world_size > 1 and not torch.distributed.is_initialized():
            raise ValueError(f"world_size is {world_size}: initialise torch.distributed before the store")
        self._directory = directory
        self._keep = keep
        self._rank = rank
        self._world_size = world_size
        self._layout = {"parallel.processes": world_size, **(layout or {})}

    @classmethod
    def of_run(cls, directory: Path, config: Config, parallel: ParallelState) -> Self:
        """The store of a run with these settings, for this process."""
        return cls(
            directory,
            keep=config.checkpoint.keep,
            rank=parallel.rank,
            world_size=parallel.world_size,
            layout={
                "parallel.tensor": config.parallel.tensor,
                "parallel.pipeline": config.parallel.pipeline,
                "parallel.distributed_optimizer": config.parallel.distributed_optimizer,
            },
        )

    def save(self, step: int, rank_state: Mapping[str, Any], shared: Mapping[str, Any]) -> Path:
        """Write this process's `rank_state` and, from rank 0, what is the same for all.

        Afterwards the `keep` newest remain. Checkpoints of later steps, damaged ones or those of a
        continuation that was abandoned by resuming further back, are removed: a run has one history.

        Raises:
            ValueError: a state holds a type that would not load again; nothing was written.
            CheckpointError: a process could not write, as when the disk is full; the earlier ones are as they
                were.
        """
        self._together(lambda: _require_loadable(dict(rank_state), "rank_state"))
        self._together(lambda: _require_loadable(dict(shared), "shared"))
        writing = self._directory / f".{_name(step)}.writing"
        self._on_first(lambda: self._make_room(writing))
        try:
            own_file = self._together(lambda: _write(writing / _rank_name(self._rank), rank_state))
            files = self._gather(own_file)
            return self._on_first(lambda: self._publish(step, writing, files, shared))
        except CheckpointError:
            if self._rank == 0:  # all have given up, and a full disk wants the room
                shutil.rmtree(writing, ignore_errors=True)
            raise

    def load_latest(self) -> Checkpoint | None:
        """The newest valid checkpoint, or None if there is none. A damaged one is logged and passed over.

        Raises:
            ConfigError: it was saved with another number of processes or another layout.
        """
        for path in self._on_first(self._newest_first):
            try:
                return self.load(path)
            except CheckpointError as error:
                if self._rank == 0:
                    _log.warning("%s; using the checkpoint before it", error)
        return None

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint in the folder `path`.

        Raises:
            CheckpointError: it is missing or damaged.
            ConfigError: it was saved with another number of processes or another layout.
        """
        manifest = self._on_first(lambda: _read_manifest(path))
        self._require_layout(path, manifest)
        rank_state = self._together(lambda: _read(path, manifest, _rank_name(self._rank)))
        shared = self._together(lambda: _read(path, manifest, SHARED))
        return Checkpoint(step=manifest.step, path=path, rank_state=rank_state, shared=shared)

    def _make_room(self, writing: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if _RUBBISH.fullmatch(path.name):
                shutil.rmtree(path)
        writing.mkdir()

    def _publish(self, step: int, writing: Path, files: list[_File], shared: Mapping[str, Any]) -> Path:
        files = [*files, _write(writing / SHARED, shared)]
        manifest = {
            "format": FORMAT,
            "step": step,
            "layout": self._layout,
            "files": [asdict(file) for file in files],
        }
        write_text(writing / MANIFEST, json.dumps(manifest, indent=1))

        final = self._directory / _name(step)
        for path in self._newest_first():
            if _step_of(path) > step:
                self._remove(path)
        if final.exists():
            replaced = self._directory / f".{_name(step)}.replaced"
            if replaced.exists():
                self._remove(replaced)
            final.rename(replaced)
        writing.rename(final)
        sync(self._directory)

        whole = [path for path in self._newest_first() if path.name.startswith("step-")]
        for path in self._newest_first():
            if path not in whole[: self._keep]:
                self._remove(path)
        return final

    def _remove(self, path: Path) -> None:
        """Hide, then delete, so that a half-deleted folder never looks like a checkpoint."""
        hidden = self._directory / f".{_name(_step_of(path))}.removed"
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
        shutil.rmtree(hidden)

    def _newest_first(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        found = [path for path in self._directory.iterdir() if _LOADABLE.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_step_of(path), path.name.startswith("step-")), reverse=True)

    def _require_layout(self, path: Path, manifest: _Manifest) -> None:
        for setting, saved in manifest.layout.items():
            present = self._layout.get(setting)
            if present != saved:
                here, there = json.dumps(present), json.dumps(saved)  # as a run file writes them
                raise ConfigError(
                    f"{setting} is {here}, but {path} was saved with {there}: "
                    f"set {setting}={there} to continue it, or another run.name to start anew"
                )

    def _together(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every process; if it fails on any, raise on all what the first of them met."""
        result: _T | None = None
        fault: Exception | None = None
        try:
            result = action()
        except OSError as error:
            fault = CheckpointError(
                f"{error}: check the disk's free space and permissions; earlier checkpoints are whole"
            )
        except ValueError as error:
            fault = error
        for met in self._gather(fault):
            if met is not None:
                raise met
        return result  # type: ignore[return-value]  # no fault: the action returned

    def _on_first(self, action: Callable[[], _T]) -> _T:
        """Run `action` on rank 0 and give its result, or its fault, to all."""
        result = self._together(lambda: action() if self._rank == 0 else None)
        return self._gather(result)[0]  # type: ignore[return-value]  # rank 0's is the action's

    def _gather(self, value: _T) -> list[_T]:
        if self._world_size == 1:
            return [value]
        values: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(values, value)
        return values


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _step_of(path: Path) -> int:
    return int(path.name.strip(".").removeprefix("step-").removesuffix(".replaced"))


def _require_loadable(value: Any, place: str) -> None:
    """Find out now, not when the run is to be resumed, what `torch.load(weights_only=True)` would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_loadable(key, f"a key of {place}")
            _require_loadable(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_loadable(item, f"{place}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in _SCALARS):
        raise ValueError(
            f"{place} is a {type(value).__qualname__}: a checkpoint holds tensors, numbers, strings, None, "
            "and dicts, lists and tuples of these; convert it"
        )


_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


class _HashingFile:
    """A file that keeps the size and the hash of what is written to it, so that nothing is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = 0
        self.hash = hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as fault:
            self.fault = fault
            raise
        self.bytes += len(data)
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, state: Mapping[str, Any]) -> _File:
    with naming(path):
        with path.open("wb") as file:
            hashing = _HashingFile(file)
            try:
                torch.save(dict(state), hashing)  # type: ignore[arg-type]  # it only needs write and flush
            except RuntimeError:
                if hashing.fault is None:
                    raise
                raise hashing.fault from None  # of which torch says only that a position is unexpected
        sync(path)
    return _File(name=path.name, bytes=hashing.bytes, sha256=hashing.hash.hexdigest())


def _read_manifest(path: Path) -> _Manifest:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name one like runs/NAME/checkpoints/{_name(50)}")
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        files = {file["name"]: _File(**file) for file in raw.pop("files")}
        manifest = _Manifest(**raw, files=files)
    except FileNotFoundError:
        raise CheckpointError(f"{path / MANIFEST} is missing: delete the folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({error}): delete the folder") from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, this rlef reads {FORMAT}: use the rlef that wrote it"
        )
    return manifest


def _read(path: Path, manifest: _Manifest, name: str) -> Mapping[str, Any]:
    """Verify one file against the manifest and load it."""
    file = path / name
    if name not in manifest.files:
        raise CheckpointError(f"{path / MANIFEST} is damaged (no entry for {name}): delete the folder")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: delete the folder")
    expected = manifest.files[name]
    if file.stat().st_size != expected.bytes:
        raise CheckpointError(
            f"{file} has {file.stat().st_size} bytes instead of {expected.bytes}: delete the folder"
        )
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != expected.sha256:
            raise CheckpointError(f"{file} does not have the SHA-256 of its manifest: delete the folder")
    try:
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} does not load ({reason}): use the versions that wrote it") from None
    return state
