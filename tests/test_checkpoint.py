import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from rlef import checkpoint
from rlef.checkpoint import CheckpointError, CheckpointStore
from rlef.config import ConfigError
from tests.small_runs import files_of_at_most


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((3,), float(step)), "cursor": [step, "split"], "nothing": None}


def save(directory: Path, step: int, *, keep: int = 2) -> Path:
    return CheckpointStore(directory, keep=keep).save(step, state_of(step), {"seed": 7, "step": step})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process and give its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    loaded = CheckpointStore(tmp_path, keep=2).load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.path) == (5, path)
    assert torch.equal(loaded.rank_state["weight"], torch.tensor([5.0, 5.0, 5.0]))
    assert loaded.rank_state["cursor"] == [5, "split"]
    assert loaded.shared == {"seed": 7, "step": 5}


def test_optimizer_and_random_states_survive_unchanged(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    numbers = np.random.default_rng(3)
    state = {
        "adam": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": numbers.bit_generator.state,
    }
    CheckpointStore(tmp_path, keep=1).save(1, state, {})
    loaded = CheckpointStore(tmp_path, keep=1).load_latest()
    assert loaded is not None
    resumed = np.random.default_rng()
    resumed.bit_generator.state = loaded.rank_state["numpy"]
    assert resumed.random() == numbers.random()
    assert torch.equal(loaded.rank_state["torch"], state["torch"])
    saved_moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(loaded.rank_state["adam"]["state"][0]["exp_avg"], saved_moment)


@pytest.mark.parametrize(
    "value", [1, 1.5, True, None, "text", b"bytes", 1 << 100, torch.float32, torch.Size([2])]
)
def test_every_scalar_that_save_accepts_loads_again(tmp_path: Path, value: Any) -> None:
    CheckpointStore(tmp_path, keep=1).save(1, {"value": value, "nested": ({1: [value]},)}, {})
    loaded = CheckpointStore(tmp_path, keep=1).load_latest()
    assert loaded is not None
    assert dict(loaded.rank_state) == {"value": value, "nested": ({1: [value]},)}


@pytest.mark.parametrize("value", [np.float64(1.0), np.ones(2), {1, 2}, Path("here"), print])
def test_a_type_that_would_not_load_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"rank_state\['outer'\]\[1\] is a .*convert it"):
        CheckpointStore(tmp_path, keep=1).save(1, {"outer": [0, value]}, {})
    assert names(tmp_path) == []


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).load_latest() is None
    assert CheckpointStore(tmp_path, keep=1).load_latest() is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000011"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=5)
    loaded = CheckpointStore(tmp_path, keep=5).load_latest()
    assert loaded is not None
    assert loaded.step == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    CheckpointStore(tmp_path, keep=2).save(4, {"weight": "new"}, {})
    loaded = CheckpointStore(tmp_path, keep=2).load_latest()
    assert loaded is not None
    assert loaded.rank_state == {"weight": "new"}
    assert names(tmp_path) == ["step-000004"]


def test_an_abandoned_continuation_does_not_outlive_the_next_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["step-000010", "step-000015"]


def test_leftover_temporary_folders_go_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.writing").mkdir()
    (tmp_path / ".step-000001.removed").mkdir()
    (tmp_path / ".step-000001.removed" / "rank-00000.pt").write_text("half")
    (tmp_path / "notes").mkdir()
    save(tmp_path, 2)
    assert names(tmp_path) == ["notes", "step-000002"]


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["rank-00000.pt", "shared.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_newest_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-000002" / name)
    loaded = CheckpointStore(tmp_path, keep=2).load_latest()
    assert loaded is not None
    assert loaded.step == 1
    (message,) = caplog.messages
    assert "step-000002" in message
    assert "delete the folder; using the checkpoint before it" in message
    assert "\n" not in message


def test_none_valid_is_none_for_auto_and_an_error_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    truncate(path / "rank-00000.pt")
    store = CheckpointStore(tmp_path, keep=2)
    assert store.load_latest() is None
    with pytest.raises(
        CheckpointError, match=r"rank-00000\.pt has \d+ bytes instead of \d+: delete the folder"
    ):
        store.load(path)


def test_a_path_that_is_no_checkpoint_is_an_error_that_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere is not a folder: name one like runs/NAME/checkpoints/step-0"
    ):
        CheckpointStore(tmp_path, keep=1).load(tmp_path / "nowhere")


def test_a_later_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99, this rlef reads 1: use the rlef that wrote it"):
        CheckpointStore(tmp_path, keep=1).load(path)


def test_another_layout_is_refused_with_both_numbers(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, keep=1, layout={"parallel.tensor": 2}).save(1, {}, {})
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 1, but .*step-000001 was saved with 2: set"):
        CheckpointStore(tmp_path, keep=1, layout={"parallel.tensor": 1}).load_latest()


def test_an_optimizer_that_is_split_otherwise_is_refused_with_words_that_a_run_file_takes(
    tmp_path: Path,
) -> None:
    name = "parallel.distributed_optimizer"
    CheckpointStore(tmp_path, keep=1, layout={name: True}).save(1, {}, {})
    with pytest.raises(ConfigError, match=rf"{name} is false, but .* with true: set {name}=true to continue"):
        CheckpointStore(tmp_path, keep=1, layout={name: False}).load_latest()


@pytest.mark.parametrize("numbers", [3, 1_000_000])  # torch hides what a large tensor's write met
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path: Path, numbers: int) -> None:
    save(tmp_path, 1)
    with files_of_at_most(200), pytest.raises(CheckpointError) as raised:
        CheckpointStore(tmp_path, keep=2).save(2, {"weight": torch.ones(numbers)}, {})
    file = tmp_path / ".step-000002.writing" / "rank-00000.pt"
    assert str(raised.value) == (
        f"[Errno 27] File too large: '{file}': check the disk's free space and permissions; "
        "earlier checkpoints are whole"
    )
    assert names(tmp_path) == ["step-000001"]  # the room is given back
    loaded = CheckpointStore(tmp_path, keep=2).load_latest()
    assert loaded is not None
    assert loaded.step == 1


def kill_self_before_change(moment: int) -> None:
    """SIGKILL this process when Python is about to make its `moment`-th change to the file system."""
    changes = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and arguments[1] is not None and "w" in arguments[1]
        )
        if is_change and next(changes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("already_there", "may_be_found"),
    [
        ((), {None, 3}),
        ((1, 2, 3), {3}),
        ((1, 2, 9), {9, 2, 3}),  # 9 is of an abandoned continuation: it goes before 3 takes its place
    ],
)
def test_a_kill_before_any_change_to_the_file_system_leaves_a_whole_checkpoint(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    already_there: tuple[int, ...],
    may_be_found: set[int | None],
) -> None:
    found = set()
    for moment in itertools.count(1):
        directory = tmp_path / str(moment)
        for step in already_there:
            save(directory, step, keep=3)

        def die_while_saving(moment: int = moment, directory: Path = directory) -> None:
            kill_self_before_change(moment)
            save(directory, 3)

        status = in_child(die_while_saving)
        loaded = CheckpointStore(directory, keep=2).load_latest()
        found.add(loaded.step if loaded else None)
        assert loaded is None or torch.equal(loaded.rank_state["weight"], state_of(loaded.step)["weight"])
        save(directory, 10, keep=1)
        assert names(directory) == ["step-000010"]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert moment > 4
    assert found == may_be_found
    assert caplog.messages == []  # nothing half-written was ever taken for a checkpoint


def test_a_kill_in_the_middle_of_writing_a_file_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def die_while_writing() -> None:
        class Dying(checkpoint._HashingFile):
            def write(self, data: bytes) -> int:
                written = super().write(data)
                self.flush()
                if self.bytes > 100_000:
                    os.kill(os.getpid(), signal.SIGKILL)
                return written

        checkpoint._HashingFile = Dying  # type: ignore[misc]
        CheckpointStore(tmp_path, keep=2).save(2, {f"{index}": torch.ones(10_000) for index in range(10)}, {})

    status = in_child(die_while_writing)
    assert os.WIFSIGNALED(status)
    assert (tmp_path / ".step-000002.writing" / "rank-00000.pt").stat().st_size > 100_000
    loaded = CheckpointStore(tmp_path, keep=2).load_latest()
    assert loaded is not None
    assert loaded.step == 1


def run_two_ranks(directory: Path, action: Callable[[int], Any]) -> list[Any]:
    """Run `action(rank)` in two gloo processes and give what they return, rank by rank."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def process(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=2
        )
        answers.put((rank, action(rank)))
        torch.distributed.destroy_process_group()

    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for started in processes:
        started.start()
    for started in processes:
        started.join(timeout=60)
        assert started.exitcode == 0
    return [answer for _, answer in sorted(answers.get() for _ in range(2))]


@pytest.mark.multiprocess
def test_two_ranks_get_their_own_state_and_pass_over_a_checkpoint_that_is_damaged_for_one(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "checkpoints"

    def save_damage_load(rank: int) -> tuple[int, int, int]:
        store = CheckpointStore(directory, keep=2, rank=rank, world_size=2)
        for step in (1, 2):
            store.save(step, {"mine": 10 * step + rank}, {"ours": step})
        if rank == 0:
            truncate(directory / "step-000002" / "rank-00001.pt")
        torch.distributed.barrier()
        loaded = store.load_latest()
        assert loaded is not None
        return loaded.step, loaded.rank_state["mine"], loaded.shared["ours"]

    assert run_two_ranks(tmp_path, save_damage_load) == [(1, 10, 1), (1, 11, 1)]


@pytest.mark.multiprocess
def test_a_fault_of_one_rank_is_raised_on_both(tmp_path: Path) -> None:
    def save_with_a_bad_rank(rank: int) -> str:
        store = CheckpointStore(tmp_path / "checkpoints", keep=1, rank=rank, world_size=2)
        with pytest.raises(ValueError, match="convert it") as raised:
            store.save(1, {"state": print if rank == 1 else 0}, {})
        return str(raised.value)

    first, second = run_two_ranks(tmp_path, save_with_a_bad_rank)
    assert first == second
    assert first.startswith("rank_state['state'] is a builtin_function_or_method")


@pytest.mark.multiprocess
def test_another_number_of_processes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_two_ranks(
        tmp_path,
        lambda rank: str(CheckpointStore(directory, keep=1, rank=rank, world_size=2).save(3, {}, {})),
    )
    with pytest.raises(
        ConfigError, match=r"parallel\.processes is 1, but .*step-000003 was saved with 2: set"
    ):
        CheckpointStore(directory, keep=1).load_latest()
