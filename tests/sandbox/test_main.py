"""`python -m rlef_sandbox`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_sandbox import NAMESPACES
from tests.sandbox.machines import LIKE_DOCKER, as_user

ADD = "print(sum(map(int, input().split())))\n"


def call(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlef_sandbox", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in {"add.py": ADD, "input": "2 3\n", "right": "5\n", "wrong": "6\n"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_run_shows_what_the_program_printed_and_how_it_ended(files: Path):
    done = call("run", files / "add.py", "--input", files / "input")

    assert (done.returncode, done.stdout) == (0, "5\n")
    assert done.stderr.startswith("ended well, exit status 0, ")


@pytest.mark.parametrize(
    ("expected", "status", "verdict"), [("right", 0, "passed"), ("wrong", 1, "wrong_output")]
)
def test_run_compares_with_an_expected_output(files: Path, expected, status, verdict):
    done = call("run", files / "add.py", "--input", files / "input", "--expected", files / expected)

    assert done.returncode == status
    assert done.stderr.startswith(verdict)


def test_run_gives_the_program_the_bytes_of_its_input_file(tmp_path: Path):
    (tmp_path / "input").write_bytes(b"\xff\r\n")

    done = call(
        "run", "-", "--input", tmp_path / "input", stdin="import sys; print(sys.stdin.buffer.read().hex())"
    )

    assert (done.returncode, done.stdout) == (0, "ff0d0a\n")


def test_run_reads_a_program_from_standard_input():
    done = call("run", "-", stdin="1 / 0")

    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "exception, exit status 1" in done.stderr


def test_run_names_the_limit_that_stopped_the_program():
    done = call("run", "-", "--cpu-s", "0.2", stdin="while True: pass")

    assert done.returncode == 1
    assert "timeout, stopped by cpu_limit, signal 9" in done.stderr


def test_run_gives_the_whole_result_as_json(files: Path):
    done = call("run", files / "add.py", "--input", files / "input", "--expected", files / "right", "--json")

    result = json.loads(done.stdout)
    assert (result["verdict"], result["stdout"], result["exit_code"]) == ("passed", "5\n", 0)
    assert done.stderr == ""


def test_exec_runs_a_command_with_files_in_its_folder(files: Path):
    script = "cat input; read sum; echo $sum; exit 4"
    done = call(
        "exec",
        "--may-fork",
        "--file",
        files / "input",
        "--input",
        files / "right",
        "--",
        "/bin/sh",
        "-c",
        script,
    )

    assert (done.returncode, done.stdout) == (1, "2 3\n5\n")
    assert done.stderr.startswith("exception, exit status 4, ")


@pytest.mark.parametrize(("expected", "status"), [("right", 0), ("wrong", 1)])
def test_exec_compares_with_an_expected_output(files: Path, expected: str, status: int):
    assert call("exec", "--expected", files / expected, "--", "/bin/echo", "5").returncode == status


def test_exec_lets_a_command_write_and_read_what_it_is_told_to(open_folder: Path):
    (open_folder / "add.py").write_text(ADD)
    command = ["/bin/sh", "-c", f"cat {open_folder}/add.py > copy; cat copy"]
    done = call("exec", "--may-fork", "--readable", open_folder, "--file-bytes", "4096", "--", *command)

    assert (done.returncode, done.stdout) == (0, ADD)


def test_bench_gives_its_figures_as_json():
    done = call("bench", "--seconds", "0.01", "--json")

    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert (found["bench"], found["workers"]) == ("rlef_sandbox", 1)
    assert [row["tests_per_program"] for row in found["rows"]] == [1, 20]
    assert [baseline["name"].partition(" ")[0] for baseline in found["baselines"]] == [
        "fork",
        "subprocess.run",
    ]
    figures = [value for cost in found["rows"] + found["baselines"] for value in cost.values()]
    figures += [*found["latency_s"].values(), found["worker_memory_bytes"], found["machine"]["cores"]]
    assert all(figure > 0 for figure in figures if not isinstance(figure, str))


def test_bench_shows_a_line_for_each_way_of_running_a_test():
    done = call("bench", "--seconds", "0.01", "--workers", "2")

    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert "workers: 2" in lines[0]
    assert [line.split("  ")[0] for line in lines[4:8]] == [
        "rlef_sandbox, tests per program: 1",
        "rlef_sandbox, tests per program: 20",
        "fork and exit of a warm interpreter (the floor)",
        "subprocess.run of python -I -S, no isolation",
    ]


def test_bench_runs_without_the_layers_that_it_is_told_to_do_without(open_folder: Path):
    allowed = [f"--allow-missing={layer.value}" for layer in NAMESPACES]
    arguments = ["bench", "--seconds", "0.01", "--json", *allowed]
    command = f"import runpy, sys\nsys.argv[1:] = {arguments}\nrunpy.run_module('rlef_sandbox', run_name='__main__')"

    found = json.loads(as_user("root", LIKE_DOCKER + command, open_folder))

    assert set(found["machine"]["layers_missing"]) == {layer.value for layer in NAMESPACES}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere.py"), "No such file or directory: 'nowhere.py'"),
        (("run", "-", "--memory-bytes", "5"), "memory_bytes is 5: give a whole number of at least"),
        (("run", "-", "--allow-missing", "magic"), "allow_missing names 'magic': the layers are"),
        (("exec", "--", "ls"), "arguments[0] is 'ls': give an absolute path, or './name'"),
        (("exec", "--", "/bin/nowhere"), "cannot execute /bin/nowhere: No such file or directory"),
        (("exec", "--file", "nowhere", "--", "./nowhere"), "No such file or directory: 'nowhere'"),
        (("bench", "--allow-missing", "magic"), "allow_missing names 'magic': the layers are"),
        (("bench", "--workers", "0"), "workers is 0: give a whole number from 1 to"),
        (("bench", "--seconds", "0"), "seconds is 0.0: give a number in (0, 3600]"),
        (("bench", "--seconds", "nan"), "seconds is nan: give a number in (0, 3600]"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(arguments, said):
    done = call(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
