import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from rlef import checkpoint_files
from rlef.checkpoint import CheckpointStore
from rlef.checkpoint_files import Checkpoint, CheckpointError
from rlef.config import ConfigError
from rlef.pieces import HeldState, Piece
from tests.small_runs import files_of_at_most


def state_of(step: int, *, numbers: int = 3) -> dict[str, HeldState]:
    """Of a network that counts, with a vector of the step's number and a matrix."""
    vector, matrix = torch.full((numbers,), float(step)), torch.full((2, 2), -float(step))
    pieces = [
        Piece(name="weight/vector", offsets=(0,), data=vector),
        Piece(name="weight/matrix", offsets=(0, 0), data=matrix),
    ]
    return {"net": HeldState(facts={"updates": step}, pieces=pieces)}


def save(directory: Path, step: int, *, keep: int = 2, asynchronous: bool = False) -> Path:
    store = CheckpointStore(directory, keep=keep, asynchronous=asynchronous)
    store.save(step, state_of(step), {"seed": 7, "step": step}, f"rollouts of {step}")
    path = store.finish()
    assert path is not None
    return path


def load(directory: Path) -> Checkpoint | None:
    return CheckpointStore(directory, keep=2).load_latest()


def read(checkpoint: Checkpoint, name: str, *sizes: int) -> torch.Tensor:
    """A whole tensor of the network."""
    whole = torch.full(sizes, torch.nan)
    checkpoint.states["net"].read([Piece(name=f"weight/{name}", offsets=(0,) * len(sizes), data=whole)])
    return whole


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether all that `save` gave is there, of one step."""
    step = checkpoint.step
    return (
        checkpoint.states["net"].facts == {"updates": step}
        and checkpoint.shared == {"seed": 7, "step": step}
        and checkpoint.rollouts == [f"rollouts of {step}"]
        and torch.equal(read(checkpoint, "vector", 3), torch.full((3,), float(step)))
        and torch.equal(read(checkpoint, "matrix", 2, 2), torch.full((2, 2), -float(step)))
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process and give its wait status."""
    child = os.fork()
    if child == 0:
        gc.disable()  # garbage of other tests may belong to threads that this process has not
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_is_what_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    path = save(tmp_path, 5, asynchronous=asynchronous)
    loaded = load(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.path) == (5, path)
    assert is_whole(loaded)


def test_both_ways_to_save_write_the_same_bytes(tmp_path: Path) -> None:
    first, second = (save(tmp_path / str(way), 3, asynchronous=way) for way in (False, True))
    assert names(first) == names(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names(first))


def test_optimizer_and_random_states_survive_unchanged(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    numbers = np.random.default_rng(3)
    generator = dict(numbers.bit_generator.state)
    tensors = {"exp_avg": optimizer.state[weight]["exp_avg"], "random": torch.get_rng_state()}
    pieces = [Piece(name=name, offsets=(0,), data=tensor) for name, tensor in tensors.items()]
    CheckpointStore(tmp_path, keep=1).save(1, {"net": HeldState(facts={}, pieces=pieces)}, generator)
    loaded = load(tmp_path)
    assert loaded is not None
    resumed = np.random.default_rng()
    resumed.bit_generator.state = loaded.shared
    assert resumed.random() == numbers.random()
    for name, tensor in tensors.items():
        target = torch.zeros_like(tensor)
        loaded.states["net"].read([Piece(name=name, offsets=(0,), data=target)])
        assert torch.equal(target, tensor)


@pytest.mark.parametrize(
    "value", [1, 1.5, 1e-300, 0.1 + 0.2, float("inf"), True, None, "text", 1 << 100, [1, {"a": ["b"]}]]
)
def test_every_value_that_save_accepts_loads_again(tmp_path: Path, value: Any) -> None:
    CheckpointStore(tmp_path, keep=1).save(1, {}, {"value": value, "nested": [{"1": [value]}]})
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.shared == {"value": value, "nested": [{"1": [value]}]}


@pytest.mark.parametrize(
    "value", [np.float64(1.0), np.ones(2), {1, 2}, (1, 2), b"bytes", Path("here"), print]
)
def test_a_type_that_would_not_load_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"shared\['outer'\]\[1\] is a .*convert it"):
        CheckpointStore(tmp_path, keep=1).save(1, {}, {"outer": [0, value]})
    assert names(tmp_path) == []


def test_a_key_that_json_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a key of shared is 1: a checkpoint's keys are strings"):
        CheckpointStore(tmp_path, keep=1).save(1, {}, {1: "one"})  # type: ignore[dict-item]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).load_latest() is None
    assert load(tmp_path) is None


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
    CheckpointStore(tmp_path, keep=2).save(4, {}, {"weight": "new"})
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.shared == {"weight": "new"}
    assert names(tmp_path) == ["step-000004"]


def test_an_abandoned_continuation_does_not_outlive_the_next_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["step-000010", "step-000015"]


def test_leftover_temporary_folders_go_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".step-000001.writing").mkdir()
    (tmp_path / ".step-000001.removed").mkdir()
    (tmp_path / ".step-000001.removed" / "rank-00000-0000.safetensors").write_text("half")
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


@pytest.mark.parametrize(
    "name", ["rank-00000-0000.safetensors", "rollouts-00000.json", "common.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_newest_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-000002" / name)
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    (message,) = caplog.messages
    assert "step-000002" in message
    assert "delete the folder; using the checkpoint before it" in message
    assert "\n" not in message


def test_none_valid_is_none_for_auto_and_an_error_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    truncate(path / "rank-00000-0000.safetensors")
    store = CheckpointStore(tmp_path, keep=2)
    assert store.load_latest() is None
    with pytest.raises(
        CheckpointError, match=r"rank-00000-0000\.safetensors has \d+ bytes instead of \d+: delete the folder"
    ):
        store.load(path)


def test_a_path_that_is_no_checkpoint_is_an_error_that_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere is not a folder: name one like runs/NAME/checkpoints/step-0"
    ):
        CheckpointStore(tmp_path, keep=1).load(tmp_path / "nowhere")


def test_another_format_is_refused_by_its_number_and_never_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To start from the one before it would be to lose it with the next save."""
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files, "FORMAT", 99)
    path = save(tmp_path, 2)
    monkeypatch.undo()
    for loading in (lambda: load(tmp_path), lambda: CheckpointStore(tmp_path, keep=1).load(path)):
        with pytest.raises(
            ConfigError, match="step-000002 has format 99, this rlef reads 2: use the rlef that wrote it, or"
        ):
            loading()


def test_a_folder_of_the_first_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "step-000001"
    path.mkdir()
    layout = {"parallel.processes": 1, "parallel.tensor": 1}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "layout": layout, "files": []}))
    with pytest.raises(ConfigError, match="step-000001 has format 1, this rlef reads 2"):
        load(tmp_path)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("numbers", [3, 1_000_000])
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, numbers: int, asynchronous: bool
) -> None:
    save(tmp_path, 1)
    store = CheckpointStore(tmp_path, keep=2, asynchronous=asynchronous)

    def save_all() -> None:
        store.save(2, state_of(2, numbers=numbers), {})
        store.finish()

    with files_of_at_most(100), pytest.raises(CheckpointError) as raised:
        save_all()
    file = tmp_path / ".step-000002.writing" / "rank-00000-0000.safetensors"
    assert str(raised.value) == (
        f"[Errno 27] File too large: '{file}': check the disk's free space and permissions; "
        "earlier checkpoints are whole"
    )
    assert names(tmp_path) == ["step-000001"]  # the room is given back
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def test_a_full_disk_is_told_by_the_next_save_which_writes_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, asynchronous=True)
    store.save(1, state_of(1), {})
    assert store.finish() == tmp_path / "step-000001"
    with files_of_at_most(100):
        store.save(2, state_of(2), {})
        store.close()  # until the thread has given up
    with pytest.raises(CheckpointError, match=r"File too large: .*earlier checkpoints are whole"):
        store.save(3, state_of(3), {})
    assert names(tmp_path) == ["step-000001"]
    assert store.finish() == tmp_path / "step-000001"  # told once
    store.save(4, state_of(4), {})
    assert store.finish() == tmp_path / "step-000004"


def test_what_changes_after_an_asynchronous_save_is_not_in_it(tmp_path: Path) -> None:
    writing_begins = Event()
    store = CheckpointStore(tmp_path, keep=1, asynchronous=True)
    make_room = store._make_room

    def wait_and_make_room(writing: Path) -> None:
        assert writing_begins.wait(60)
        make_room(writing)

    store._make_room = wait_and_make_room  # type: ignore[method-assign]
    state = state_of(5)
    store.save(5, state, {"seed": 7, "step": 5}, "rollouts of 5")
    for piece in state["net"].pieces:
        piece.data.zero_()  # as the next update would
    writing_begins.set()
    store.finish()
    loaded = load(tmp_path)
    assert loaded is not None
    assert is_whole(loaded)


def test_close_lets_a_save_under_way_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, asynchronous=True)
    store.save(1, state_of(1, numbers=1_000_000), {})
    store.close()
    assert names(tmp_path) == ["step-000001"]


def kill_self_before_change(moment: int) -> None:
    """SIGKILL this process when Python is about to make its `moment`-th change to the file system."""
    changes = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") or (
            event == "open" and arguments[1] is not None and "w" in arguments[1]
        )
        if is_change and next(changes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.parametrize("asynchronous", [False, True])
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
    asynchronous: bool,
) -> None:
    found = set()
    for moment in itertools.count(1):
        directory = tmp_path / str(moment)
        for step in already_there:
            save(directory, step, keep=3)

        def die_while_saving(moment: int = moment, directory: Path = directory) -> None:
            kill_self_before_change(moment)
            save(directory, 3, asynchronous=asynchronous)

        status = in_child(die_while_saving)
        loaded = load(directory)
        found.add(loaded.step if loaded else None)
        assert loaded is None or is_whole(loaded)
        save(directory, 10, keep=1)
        assert names(directory) == ["step-000010"]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert moment > 4
    assert found == may_be_found
    assert caplog.messages == []  # nothing half-written was ever taken for a checkpoint


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_in_the_middle_of_writing_a_file_leaves_the_checkpoint_before(
    tmp_path: Path, asynchronous: bool
) -> None:
    save(tmp_path, 1)
    file = tmp_path / ".step-000002.writing" / "rank-00000-0000.safetensors"

    def die() -> None:
        while not file.exists() or file.stat().st_size == 0:
            time.sleep(0.0001)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_while_writing() -> None:
        Thread(target=die).start()
        store = CheckpointStore(tmp_path, keep=2, asynchronous=asynchronous)
        store.save(2, state_of(2, numbers=20_000_000), {})  # 80 MB, of which some is written
        store.finish()

    assert os.WTERMSIG(in_child(die_while_writing)) == signal.SIGKILL
    assert names(tmp_path) == [".step-000002.writing", "step-000001"]
    assert not (file.parent / "manifest.json").exists()
    loaded = load(tmp_path)
    assert loaded is not None
    assert is_whole(loaded)
    assert loaded.step == 1


def run_two_ranks(directory: Path, action: Callable[[int], Any], *, killed: int | None = None) -> list[Any]:
    """Run `action(rank)` in two gloo processes and give what they return, rank by rank.

    `killed`: this one is expected to kill itself, and returns nothing.
    """
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def process(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=2
        )
        answers.put((rank, action(rank)))
        if killed is None:
            torch.distributed.destroy_process_group()

    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for started in processes:
        started.start()
    for rank, started in enumerate(processes):
        started.join(timeout=120)
        assert started.exitcode == (-signal.SIGKILL if rank == killed else 0)
    return [answer for _, answer in sorted(answers.get() for _ in range(2 - (killed is not None)))]


def half_of(rank: int, step: int) -> dict[str, HeldState]:
    """One of two rows, full of 10 * step + rank."""
    row = torch.full((1, 3), 10.0 * step + rank)
    return {"net": HeldState(facts={}, pieces=[Piece(name="weight/rows", offsets=(rank, 0), data=row)])}


@pytest.mark.multiprocess
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_write_one_whole_and_pass_over_a_checkpoint_of_which_one_file_is_damaged(
    tmp_path: Path, asynchronous: bool
) -> None:
    directory = tmp_path / "checkpoints"

    def save_damage_load(rank: int) -> tuple[int, list[float], list[str]]:
        store = CheckpointStore(directory, keep=2, rank=rank, world_size=2, asynchronous=asynchronous)
        for step in (1, 2):
            store.save(step, half_of(rank, step), {"ours": step}, f"rollouts of {rank}")
            torch.distributed.all_reduce(torch.ones(1))  # as training does meanwhile
        store.finish()
        if rank == 0:
            truncate(directory / "step-000002" / "rank-00001-0000.safetensors")
        torch.distributed.barrier()
        loaded = store.load_latest()
        assert loaded is not None
        assert loaded.shared == {"ours": loaded.step}
        return loaded.step, read(loaded, "rows", 2, 3)[:, 0].tolist(), sorted(loaded.rollouts)

    rollouts = ["rollouts of 0", "rollouts of 1"]
    assert run_two_ranks(tmp_path, save_damage_load) == [(1, [10.0, 11.0], rollouts)] * 2
    loaded = load(directory)  # by another number of processes
    assert loaded is not None
    assert read(loaded, "rows", 2, 3)[:, 0].tolist() == [10.0, 11.0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fault_of_one_rank_is_raised_on_both_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, asynchronous: bool
) -> None:
    directory = tmp_path / "checkpoints"

    def save_with_a_full_disk(rank: int) -> str:
        store = CheckpointStore(directory, keep=1, rank=rank, world_size=2, asynchronous=asynchronous)
        store.save(1, half_of(rank, 1), {})
        store.finish()

        def save_again() -> None:
            store.save(2, half_of(rank, 2), {})
            store.finish()

        with files_of_at_most(50 if rank == 1 else 1 << 30), pytest.raises(CheckpointError) as raised:
            save_again()
        return str(raised.value)

    first, second = run_two_ranks(tmp_path, save_with_a_full_disk)
    assert first == second
    assert "File too large: " in first
    assert "rank-00001-0000.safetensors" in first
    assert names(directory) == ["step-000001"]


@pytest.mark.multiprocess
def test_a_rank_that_is_killed_while_a_save_is_under_way_leaves_the_earlier_checkpoint(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "checkpoints"

    def save_and_kill(rank: int) -> str:
        store = CheckpointStore(directory, keep=1, rank=rank, world_size=2, asynchronous=True, timeout_s=20)
        store.save(1, half_of(rank, 1), {})
        store.finish()
        if rank == 1:
            kill_self_before_change(1)  # the first file that it writes
        store.save(2, half_of(rank, 2), {})
        with pytest.raises(RuntimeError, match="gloo") as raised:
            store.finish()
        return str(raised.value)

    run_two_ranks(tmp_path, save_and_kill, killed=1)
    assert names(directory) == [".step-000002.writing", "step-000001"]
    loaded = load(directory)
    assert loaded is not None
    assert read(loaded, "rows", 2, 3)[:, 0].tolist() == [10.0, 11.0]
