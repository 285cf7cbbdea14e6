"""What the commands of the command line share: how an error is told, and what is checked before any work."""

from __future__ import annotations

import functools
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rlef.arithmetic import check_context
from rlef.config import Config, ConfigError
from rlef.launch import processes_here
from rlef_sandbox import SandboxFault

if TYPE_CHECKING:  # what they import takes a second
    from rlef.problems import Part
    from rlef.records import Problem

_F = TypeVar("_F", bound=Callable[..., Any])


def errors_in_one_line(command: _F) -> _F:
    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            sys.exit(refuse(error))
        except OSError as error:
            if error.filename is None:
                raise
            sys.exit(refuse(ConfigError(f"{error.filename}: {error.strerror}; see to it, and try again")))

    return guarded  # type: ignore[return-value]


def refuse(error: ValueError) -> int:
    """Tell the user what to mend, once for the processes of a machine; the exit status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        place = "" if os.environ.get("RANK", "0") == "0" else f"on {socket.gethostname()}: "
        click.echo(f"rlef: error: {place}{error}", err=True)
    return 2


def require_writable(file: Path) -> None:
    """Before minutes of work: the file's folder can be made, and written to."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); name another place") from None


def require_file(file: Path, what: str) -> None:
    """`what` is what the file should be, in a word or two."""
    if not file.is_file():
        found = f"{str(file)!r} is a folder" if file.is_dir() else f"there is no file {str(file)!r}"
        raise ConfigError(f"{found}; give {what}")


def require_other_file(output: Path, others: Sequence[Path]) -> None:
    """What is written takes the place of nothing that is read, or written too."""
    if output.resolve() in {path.resolve() for path in others}:
        raise ConfigError(f"{output} is named twice; name another file to write")


def require_empty(output: Path) -> None:
    """Before hours of work: the folder can be written, and nothing in it is lost."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        occupied = any(output.iterdir())
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}); name another folder") from None
    if occupied:
        raise ConfigError(f"{output} is not empty; name another folder")


def check_inputs(config: Config) -> None:
    """Read the model's shape, the dialog markers and the problem files, and start the sandbox once.

    A `ConfigError` says what to mend.
    """
    from rlef.families import read_shape
    from rlef.pretrained import StoredWeights, model_folder
    from rlef.prompts import Dialog
    from rlef.samplers import check_sampler
    from rlef.shards import check_layout, check_weights

    folder = model_folder(config.model.path)
    shape = read_shape(folder)
    check_weights(StoredWeights(folder), shape)
    check_layout(shape, config.parallel, config.parallel.learners)
    check_context(config, shape.max_position_embeddings)
    check_sampler(config, shape)
    dialog = Dialog.read(folder, config.rollout)
    dialog.check_vocabulary(shape.vocab_size)
    for loaded in check_problems_and_executor(config).values():
        for problem in loaded:
            dialog.check_stub(problem.stub, problem.id)


def check_problems_and_executor(config: Config) -> dict[Part, list[Problem]]:
    """The problems as `problems.check` gives them."""
    from rlef import problems
    from rlef.execution import open_executor, share_of_cores
    from rlef.unrelated import check_random_feedback

    loaded = problems.check(config)
    check_random_feedback(config, loaded["train"])
    here = processes_here(config.parallel.processes)
    share_of_cores(config.executor, os.sched_getaffinity(0), processes=here, index=0)
    try:
        open_executor(config.executor, workers=1).close()
    except (ValueError, SandboxFault) as error:
        raise ConfigError(f"executor: {error}") from None
    return loaded
