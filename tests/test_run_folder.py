"""Which folder a run writes to: a new one, or that of the run it continues."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rlef.config import Config, ConfigError
from rlef.run_folder import RunFolder, only_one_run, open_run_folder, read_run_config
from tests.small_runs import small_config


def started(folder: Path, *overrides: str) -> tuple[Config, Path]:
    """A run that was opened and went no further, with one checkpoint folder."""
    config = small_config(folder, *overrides)
    opened, _ = open_run_folder(config, resume="auto")
    (opened.checkpoints / "step-000001").mkdir(parents=True)
    return config, opened.path


def finish(run: Path, *, steps: int = 2) -> None:
    (run / "summary.json").write_text(json.dumps({"start": {}, "final": {}, "steps": steps}))


def error_of(config: Config, resume: str) -> str:
    with pytest.raises(ConfigError) as caught:
        open_run_folder(config, resume=resume)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_new_run_gets_a_folder_with_its_settings(tmp_path: Path) -> None:
    config = small_config(tmp_path, "run.seed=7", 'executor.allow_missing=["landlock"]')
    folder, note = open_run_folder(config, resume="auto")
    assert (folder.path, folder.checkpoint, note) == (tmp_path / "small", None, None)
    assert read_run_config(folder.path) == config


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    folder, note = open_run_folder(config, resume="auto")
    assert note == f"continuing the unfinished run in {run}"
    assert (folder.path, folder.checkpoint) == (run, None)
    assert (folder.checkpoints / "step-000001").exists()


def test_a_run_that_has_evaluated_only_its_start_is_unfinished(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    (run / "summary.json").write_text('{"start": {}, "final": null}')
    _, note = open_run_folder(config, resume="auto")
    assert note == f"continuing the unfinished run in {run}"


def test_a_finished_run_is_moved_aside(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    finish(run)
    folder, note = open_run_folder(config, resume="auto")
    assert note == f"the earlier run of that name is now in {tmp_path / 'small.1'}"
    assert (tmp_path / "small.1" / "checkpoints" / "step-000001").exists()
    assert [file.name for file in folder.path.iterdir()] == ["config.json"]


def test_a_finished_run_with_more_steps_to_do_is_continued(tmp_path: Path) -> None:
    _, run = started(tmp_path)
    finish(run, steps=2)
    _, note = open_run_folder(small_config(tmp_path, "run.steps=3"), resume="auto")
    assert note == f"continuing the unfinished run in {run}"


def test_never_moves_an_unfinished_run_aside_too(tmp_path: Path) -> None:
    config, _ = started(tmp_path)
    open_run_folder(config, resume="never")
    assert (tmp_path / "small.1" / "checkpoints").exists()
    assert not (tmp_path / "small" / "checkpoints").exists()


def test_runs_moved_aside_are_numbered(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    for _ in range(3):
        open_run_folder(config, resume="never")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"small", "small.1", "small.2"}


def test_a_folder_that_is_no_run_is_moved_aside_and_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("years of work")
    open_run_folder(small_config(tmp_path), resume="auto")
    assert (tmp_path / "small.1" / "thesis.txt").read_text() == "years of work"


def test_a_named_checkpoint_is_where_the_run_starts(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    checkpoint = run / "checkpoints" / "step-000001"
    folder, note = open_run_folder(config, resume=str(checkpoint))
    assert (folder.path, folder.checkpoint) == (run, checkpoint)
    assert note == f"continuing {run} from step-000001"


def test_a_finished_run_continues_from_a_named_checkpoint(tmp_path: Path) -> None:
    _, run = started(tmp_path)
    finish(run)
    longer = small_config(tmp_path, "run.steps=9")
    folder, _ = open_run_folder(longer, resume=str(run / "checkpoints" / "step-000001"))
    assert folder.path == run


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    message = error_of(small_config(tmp_path), str(tmp_path / "nowhere"))
    assert message == (
        f"--resume {tmp_path / 'nowhere'}: there is no such checkpoint folder; give one, or auto, or never"
    )


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    _, other = started(tmp_path, "run.name=other")
    message = error_of(small_config(tmp_path), str(other / "checkpoints" / "step-000001"))
    assert f"not a checkpoint of the run {tmp_path / 'small'}; set run.output_dir and run.name" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=5", "run.seed = 5, but the run in {run} was started with 1; "),
        (
            "model.path=elsewhere",
            "model.path = 'elsewhere', but the run in {run} was started with 'embedded'; ",
        ),
        ("optimizer.lr=0.5", "optimizer.lr = 0.5, but the run in {run} was started with 0.3; "),
    ],
)
def test_a_setting_that_weights_depend_on_may_not_change(tmp_path: Path, override: str, message: str) -> None:
    _, run = started(tmp_path)
    mend = "use that, or start anew with --resume never or another run.name"
    assert error_of(small_config(tmp_path, override), "auto") == message.format(run=run) + mend


@pytest.mark.parametrize(
    "override",
    [
        *("run.steps=9", "checkpoint.every_steps=7", "evaluation.every_steps=3", "executor.workers=2"),
        *("parallel.processes=2", "parallel.distributed_optimizer=true", "checkpoint.asynchronous=false"),
    ],
)
def test_a_setting_that_no_weight_depends_on_may_change(tmp_path: Path, override: str) -> None:
    _, run = started(tmp_path)
    folder, _ = open_run_folder(small_config(tmp_path, override), resume="auto")
    assert folder.path == run


def test_a_damaged_settings_file_of_a_run_is_named(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    whole = (run / "config.json").read_text()
    (run / "config.json").write_text(whole[: len(whole) // 2])
    assert error_of(config, "auto").startswith(
        f"{run / 'config.json'} is not what a run of this version writes: "
    )


def test_a_settings_file_of_another_version_names_the_setting(tmp_path: Path) -> None:
    config, run = started(tmp_path)
    settings = json.loads((run / "config.json").read_text())
    settings["run"]["colour"] = "red"
    (run / "config.json").write_text(json.dumps(settings))
    assert "unknown setting 'run.colour'" in error_of(config, "auto")


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder: it has no config\.json"):
        read_run_config(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(small_config(tmp_path, f"run.output_dir={tmp_path}/file"), "auto")
    assert message.startswith(f"run.output_dir: {tmp_path}/file/small cannot be written (Not a directory)")


def launched(folder: Path, resume: str, launcher: str) -> tuple[RunFolder, str | None]:
    """Opened by processes of a torchrun of that name."""
    return open_run_folder(small_config(folder), resume=resume, launchers={launcher, f"other {launcher}"})


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_torchrun_that_starts_its_processes_again_goes_on(resume: str, tmp_path: Path) -> None:
    launched(tmp_path, "never", "first")
    save(tmp_path, 1)
    folder, note = launched(tmp_path, resume, "first")
    assert note == f"continuing the unfinished run in {tmp_path / 'small'}"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]


def test_another_torchrun_starts_anew_if_it_is_told_to(tmp_path: Path) -> None:
    launched(tmp_path, "never", "first")
    save(tmp_path, 1)
    folder, note = launched(tmp_path, "never", "second")
    assert note == f"the earlier run of that name is now in {tmp_path / 'small.1'}"
    assert not folder.checkpoints.exists()


def test_a_run_that_its_torchrun_has_finished_is_finished_for_no_other(tmp_path: Path) -> None:
    launched(tmp_path, "auto", "first")
    finish(tmp_path / "small")
    folder, note = launched(tmp_path, "auto", "first")
    assert (folder.is_finished, note) == (True, f"the run in {tmp_path / 'small'} is finished")
    folder, note = launched(tmp_path, "auto", "second")
    assert (folder.is_finished, note) == (False, f"the earlier run of that name is now in {tmp_path}/small.1")


def test_a_named_checkpoint_is_left_behind_by_a_restart_after_the_next_one(tmp_path: Path) -> None:
    """Those of later steps count no more from the first opening on."""
    open_run_folder(small_config(tmp_path), resume="auto")
    named, later = save(tmp_path, 1), save(tmp_path, 5)
    for _ in range(2):
        folder, _ = launched(tmp_path, str(named), "first")
        assert folder.checkpoint == named
    later.rmdir()
    save(tmp_path, 2)
    folder, _ = launched(tmp_path, str(named), "first")
    assert folder.checkpoint is None


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / "small" / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    return checkpoint


def test_a_run_that_is_under_way_is_not_started_a_second_time(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with (
        only_one_run(config),
        pytest.raises(
            ConfigError, match=r"run.name: a run 'small' is under way in .*; wait for it, or name another"
        ),
        only_one_run(config),
    ):
        raise AssertionError("the second run must not begin")
    with only_one_run(config):
        pass  # free again


def test_a_process_that_was_killed_holds_no_name(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    child = os.fork()
    if child == 0:
        with only_one_run(config):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with only_one_run(config):
        pass
