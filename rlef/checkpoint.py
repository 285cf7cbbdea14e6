"""Checkpoints that survive a kill -9 at any moment, and that any layout can load.

A checkpoint is a folder `step-000123`, in which each process writes its part (`checkpoint_files.py`). It is
written under a hidden name, every file is synced, and one rename makes it valid; until then the one before it
stays. Loading verifies, and steps back past whatever is damaged. All processes must see the same folder; they
agree on every decision.

Asynchronously, a step waits only until the tensors are copied to host memory. A thread does the rest. It has
a process group of its own for what all must agree on, since no two threads may use one at a time; and what it
meets is raised on all processes by their next call.

Why not torch.distributed.checkpoint or megatron's dist_checkpointing: the index of both is a pickle, which
runs what it holds; neither knows whether a file is damaged, nor writes beside its place; and both would need
a planner and a reader of ours for flat ranges of an optimiser. Of safetensors a slice is read, and no code.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Self, TypeVar

import torch.distributed

from rlef.checkpoint_files import (
    Checkpoint,
    CheckpointError,
    StoredFile,
    as_json,
    read_checkpoint,
    read_manifest,
    verify,
    write_index,
    write_part,
)
from rlef.config import Config, ConfigError
from rlef.files import sync
from rlef.pieces import HeldState, Piece
from rlef.ports import ParallelState

# A checkpoint is `step-N`. `.step-N.replaced` is a whole one too, seen only if the process died between the
# two renames that put a new step-N in the place of an old one. Whatever has another hidden name is rubbish.
_LOADABLE = re.compile(r"step-\d{6,}|\.step-\d{6,}\.replaced")
_RUBBISH = re.compile(r"\.step-\d{6,}\.(writing|removed)")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


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
        asynchronous: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        """`timeout_s` is of one wait for the other processes."""
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}: keep at least 1")
        if world_size > 1 and not torch.distributed.is_initialized():
            raise ValueError(f"world_size is {world_size}: initialise torch.distributed before the store")
        self._directory = directory
        self._keep = keep
        self._rank = rank
        self._world_size = world_size
        self._asynchronous = asynchronous
        self._timeout_s = timeout_s
        self._newest: Path | None = None
        self._under_way: Future[Path] | None = None
        self._group = None
        if world_size > 1:
            limit = timedelta(seconds=timeout_s)
            self._group = torch.distributed.new_group(backend="gloo", timeout=limit)

    @classmethod
    def of_run(cls, directory: Path, config: Config, parallel: ParallelState) -> Self:
        """The store of a run with these settings, for this process."""
        return cls(
            directory,
            keep=config.checkpoint.keep,
            rank=parallel.rank,
            world_size=parallel.world_size,
            asynchronous=config.checkpoint.asynchronous,
            timeout_s=config.parallel.timeout_s,
        )

    def save(
        self,
        step: int,
        states: Mapping[str, HeldState],
        shared: Mapping[str, Any],
        rollouts: str = "",
    ) -> None:
        """Write this process's part of `states`, its `rollouts` and, from rank 0, what is the same for all.

        Afterwards the `keep` newest remain. Checkpoints of later steps, damaged ones or those of a
        continuation that was abandoned by resuming further back, are removed: a run has one history.
        Asynchronously, this returns when the tensors may change, and `finish` when it is done.

        Raises:
            ValueError: `shared` or a network's facts hold what JSON does not; nothing was written.
            CheckpointError: a process could not write this one or, asynchronously, the one before, as when
                the disk is full; the earlier ones are as they were.
        """
        self.finish()
        facts = {name: state.facts for name, state in states.items()}
        common = self._together(lambda: as_json({"step": step, "states": facts, "shared": shared}))
        pieces = [
            replace(piece, name=f"{name}/{piece.name}")
            for name, state in states.items()
            for piece in state.pieces
            if piece.is_written
        ]
        if not self._asynchronous:
            self._newest = self._write(step, pieces, rollouts, common)
            return
        copies = [replace(piece, data=piece.data.to("cpu", copy=True)) for piece in pieces]
        self._under_way = _in_thread(lambda: self._write(step, copies, rollouts, common))

    def finish(self) -> Path | None:
        """Wait for the save under way, if there is one; the newest checkpoint that was saved or loaded.

        Raises:
            CheckpointError: a process could not write it.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._newest = under_way.result()
        return self._newest

    def close(self) -> None:
        """Let a save under way come to its end, good or bad, when something else has ended the run.

        Not collective: the others may be gone.
        """
        if self._under_way is not None:
            wait([self._under_way], self._timeout_s)

    def load_latest(self) -> Checkpoint | None:
        """The newest valid checkpoint, or None if there is none. A damaged one is logged and passed over.

        Raises:
            ConfigError: it has another format. To pass over it would be to lose it with the next save.
        """
        for path in self._on_first(self._newest_first):
            try:
                return self.load(path)
            except CheckpointError as error:
                if self._rank == 0:
                    _log.warning("%s; using the checkpoint before it", error)
        return None

    def load(self, path: Path) -> Checkpoint:
        """The checkpoint in the folder `path`, each file of which one of the processes has verified.

        Raises:
            CheckpointError: it is missing or damaged.
            ConfigError: it has another format.
        """
        files = self._on_first(lambda: read_manifest(path))
        own = list(files.values())[self._rank :: self._world_size]
        self._together(lambda: verify(path, own))
        checkpoint = self._together(lambda: read_checkpoint(path, files))
        self._newest = path
        return checkpoint

    def _write(self, step: int, pieces: Sequence[Piece], rollouts: str, common: str) -> Path:
        writing = self._directory / f".{_name(step)}.writing"
        self._on_first(lambda: self._make_room(writing))
        try:
            own = self._together(lambda: write_part(writing, self._rank, pieces, rollouts))
            files = [file for each in self._gather(own) for file in each]
            return self._on_first(lambda: self._publish(step, writing, files, common))
        except CheckpointError:
            if self._rank == 0:  # all have given up, and a full disk wants the room
                shutil.rmtree(writing, ignore_errors=True)
            raise

    def _make_room(self, writing: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if _RUBBISH.fullmatch(path.name):
                shutil.rmtree(path)
        writing.mkdir()

    def _publish(self, step: int, writing: Path, files: Sequence[StoredFile], common: str) -> Path:
        write_index(writing, files, common)
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
        except (ValueError, MemoryError) as error:
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
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.strip(".").removeprefix("step-").removesuffix(".replaced"))


def _in_thread(action: Callable[[], _T]) -> Future[_T]:
    """Run `action` in a thread that does not keep a process alive whose run has ended otherwise."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
