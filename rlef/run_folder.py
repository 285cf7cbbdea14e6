"""A run's folder: `runs/<name>/` with its settings, checkpoints, metrics, summary and report. Nothing is
overwritten."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlef.config import Config, ConfigError
from rlef.files import write_text
from rlef.settings_file import explain

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
_LAUNCH_FILE = ".launch.json"

# What may differ between a run and its continuation, because no weight and no figure depends on it, or by
# rounding alone, and a run that was out of memory or lost a machine must be able to go on with what there is.
_FREE_TO_CHANGE = {
    "run.steps",
    "run.output_dir",
    "run.name",
    "run.max_skipped_updates",
    "parallel.processes",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.offload_reference",
    "parallel.sampling_processes",
    "parallel.silence_s",
    "parallel.sequence_parallel",
    "parallel.recompute",
    "parallel.distributed_optimizer",
    "parallel.threads_per_process",
    "parallel.timeout_s",
    "rollout.slots",
    "rollout.timeout_s",
    "ppo.micro_batch_tokens",
    "vllm.memory_fraction",
    "vllm.tensor_parallel",
    "executor.workers",
    "executor.allow_missing",
    "executor.memory_cgroup",
    "evaluation.every_steps",
    "evaluation.budgets",
    "evaluation.turn_limits",
    "evaluation.feedback",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.asynchronous",
    "server.url",
    "server.model",
    "server.api_key_env",
    "server.concurrency",
    "server.timeout_s",
    "server.retries",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Where a run writes, and the checkpoint that it must start from, if the user named one."""

    path: Path
    checkpoint: Path | None
    is_finished: bool = False  # by this launch, before it was started again

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS


@contextmanager
def only_one_run(config: Config) -> Iterator[None]:
    """Hold the run's name on this machine, so that a second command cannot write to the same folder.

    Raises:
        ConfigError: another process holds it.
    """
    directory = Path(config.run.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / f".{config.run.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"run.output_dir: {directory} cannot be written ({error.strerror}); name another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run.name: a run {config.run.name!r} is under way in {directory}; "
                "wait for it, or name another"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.output_dir: {directory} cannot lock files ({error.strerror}), and without a lock two "
                "runs could write to one folder; mount it with locks (Lustre: -o flock), or name another"
            ) from None
        yield


def open_run_folder(
    config: Config, *, resume: str, launchers: Collection[str] = ()
) -> tuple[RunFolder, str | None]:
    """The folder for a run, and a line to tell the user when there is something to tell.

    `resume` is "auto" (continue an unfinished run, else start anew), "never" (start anew), or the path of a
    checkpoint folder. Starting anew moves an earlier run of the same name aside. Called once, before any
    process trains.

    `launchers` are names of the torchruns that start the run's processes. Where one of them has opened the
    folder before, it has started its processes again: the run then goes on, whatever `resume` says.

    Raises:
        ConfigError: the checkpoint does not exist, or the settings differ from those of the run to continue.
    """
    path = Path(config.run.output_dir) / config.run.name
    try:
        launch = _read_launch(path)
        if launch is not None and not launch.launchers.isdisjoint(launchers):
            opened = _go_on(path, config, resume, launch)
        else:
            opened = _open(path, config, resume)
            launch = _Launch(launchers=frozenset(), checkpoints=_checkpoints(path))
        if launchers:
            _write_launch(path, replace(launch, launchers=frozenset(launchers)))
    except OSError as error:
        raise ConfigError(
            f"run.output_dir: {path} cannot be written ({error.strerror}); name another folder"
        ) from None
    return opened


def _open(path: Path, config: Config, resume: str) -> tuple[RunFolder, str | None]:
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise ConfigError(
                f"--resume {resume}: there is no such checkpoint folder; give one, or auto, or never"
            )
        if checkpoint.resolve().parent.parent != path.resolve():
            raise ConfigError(
                f"--resume {resume}: not a checkpoint of the run {path}; "
                "set run.output_dir and run.name to its run"
            )
        _require_same_settings(path, config)
        return RunFolder(path=path, checkpoint=checkpoint), f"continuing {path} from {checkpoint.name}"
    if resume == "auto" and _is_unfinished(path, config.run.steps):
        _require_same_settings(path, config)
        return RunFolder(path=path, checkpoint=None), f"continuing the unfinished run in {path}"
    return RunFolder(path=path, checkpoint=None), _start_anew(path, config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """Who opened a folder, and what was in it before."""

    launchers: frozenset[str]
    checkpoints: Mapping[str, int]  # when each was written, in nanoseconds


def _go_on(path: Path, config: Config, resume: str, launch: _Launch) -> tuple[RunFolder, str | None]:
    """The folder once more, for processes that were started again."""
    if not _is_unfinished(path, config.run.steps):
        return RunFolder(path=path, checkpoint=None, is_finished=True), f"the run in {path} is finished"
    _require_same_settings(path, config)
    has_saved = any(launch.checkpoints.get(name) != written for name, written in _checkpoints(path).items())
    named = None if has_saved or resume in ("auto", "never") else Path(resume)
    if named is not None and not named.is_dir():  # ended while it was replaced: the newest is its like
        named = None
    return RunFolder(path=path, checkpoint=named), f"continuing the unfinished run in {path}"


def _checkpoints(path: Path) -> dict[str, int]:
    return {folder.name: folder.stat().st_mtime_ns for folder in (path / CHECKPOINTS).glob("step-*")}


def _read_launch(path: Path) -> _Launch | None:
    try:
        read = json.loads((path / _LAUNCH_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Launch(launchers=frozenset(read["launchers"]), checkpoints=read["checkpoints"])


def _write_launch(path: Path, launch: _Launch) -> None:
    written = {"launchers": sorted(launch.launchers), "checkpoints": launch.checkpoints}
    write_text(path / _LAUNCH_FILE, json.dumps(written) + "\n")


def _start_anew(path: Path, config: Config) -> str | None:
    note = None
    if path.exists():
        aside = _free_name(path)
        path.rename(aside)
        note = f"the earlier run of that name is now in {aside}"
    path.mkdir(parents=True)
    write_text(path / CONFIG_FILE, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    return note


def read_run_config(path: Path) -> Config:
    """The settings that a run was started with."""
    file = path / CONFIG_FILE
    try:
        return Config.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} is not a run's folder: it has no {CONFIG_FILE}") from None
    except ValidationError as error:
        raise ConfigError(f"{file} is not what a run of this version writes: {explain(error)}") from None


def _is_unfinished(path: Path, steps: int) -> bool:
    """Whether there is something to do: no final evaluation yet, or one after too few steps."""
    if not (path / CONFIG_FILE).exists():
        return False
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return True
    return summary.get("final") is None or summary.get("steps", steps) < steps


def _require_same_settings(path: Path, config: Config) -> None:
    saved, wanted = (
        _flatten(read_run_config(path).model_dump(mode="json")),
        _flatten(config.model_dump(mode="json")),
    )
    for name, value in wanted.items():
        if name in _FREE_TO_CHANGE or saved.get(name) == value:
            continue
        raise ConfigError(
            f"{name} = {value!r}, but the run in {path} was started with {saved.get(name)!r}; use that, "
            "or start anew with --resume never or another run.name"
        )


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in tree.items() for key, value in table.items()}


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside
