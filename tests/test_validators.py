"""Output validators in C++: real compilers and real validators, in the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlef import validators
from rlef.cli import main
from rlef.config import Config, ConfigError
from rlef.execution import SparingExecutor
from rlef.judging import job_of
from rlef.problems import load, write_jsonl
from rlef.records import Problem, Validator
from rlef.validators import VALIDATOR_LIMITS, checker_of, require_validators
from rlef_sandbox import Checker, Job, SandboxFault, Test, Verdict
from tests.small_runs import one_process_job, run_file

# What it does is said by its flag; without one it accepts the sum, and wants all that the format promises it.
FILES = {
    "validate.cc": r"""
#include "say.h"

long deep(long calls) {
    volatile long here[16];
    here[calls % 16] = calls;
    return calls == 0 ? 0 : deep(calls - 1) + here[calls % 16];
}

int main(int argc, char** argv) {
    const std::string flag = argc > 4 ? argv[4] : "";
    for (volatile long turns = 0; flag == "loop"; turns = turns + 1) {}
    while (flag == "fork") fork();
    if (flag == "crash") std::abort();
    if (flag == "deep") return deep(1'000'000) > 0 ? 42 : 43;
    if (flag == "zero") return 0;
    if (flag == "seven") return 7;
    std::ifstream question(argv[1]), answer(argv[2]);
    std::string known(std::istreambuf_iterator<char>(answer), {});
    if (!(std::ofstream(std::string(argv[3]) + "judgemessage.txt") << "seen" << std::flush)) return 7;
    if (known != " \n" || (argc > 4 && (argc != 6 || std::string(argv[5]) != "it's \"$HOME\" * "))) return 7;
    return said(question, std::cin);
}
""",
    "say.h": "#include <cstdlib>\n#include <fstream>\n#include <iostream>\n#include <string>\n"
    "#include <unistd.h>\nint said(std::istream&, std::istream&);\n",
    "say.cpp": '#include "say.h"\nint said(std::istream& input, std::istream& output) {\n'
    "    long a, b, sum;\n    return input >> a >> b && output >> sum && a + b == sum ? 42 : 43;\n}\n",
}
ADD = "print(sum(map(int, input().split())))"


@pytest.fixture(scope="module")
def executor() -> Iterator[SparingExecutor]:
    """One for all tests: the validator is compiled once."""
    with SparingExecutor(workers=1, cache_bytes=1 << 20) as executor:
        yield executor


def problem(*flags: str, files: dict[str, str] = FILES) -> Problem:
    return Problem(
        id="sum",
        statement="Add.",
        public_tests=(Test("1 2\n", " \n"),),
        private_tests=(Test("20 30\n", " \n"),),
        time_limit_s=5.0,
        memory_limit_bytes=256 << 20,
        source="test",
        judge=Validator(files=files, flags=flags),
    )


def job(program: str, *flags: str) -> Job:
    given = problem(*flags)
    return job_of(given, program, [*given.public_tests, *given.private_tests])


def verdicts(executor: SparingExecutor, *jobs: Job) -> list[list[str]]:
    return [[result.verdict.value for result in results] for results in executor.run_many(jobs)]


def test_a_validator_of_several_files_says_yes_and_no(executor: SparingExecutor) -> None:
    found = verdicts(executor, job(ADD), job("print(3)"), job("print('x')"), job("1 / 0"))
    assert found == [["passed"] * 2, ["passed", "wrong_output"], ["wrong_output"] * 2, ["exception"] * 2]


def test_flags_reach_the_validator_as_they_are(executor: SparingExecutor) -> None:
    assert verdicts(executor, job(ADD, "--", 'it\'s "$HOME" * ')) == [["passed"] * 2]
    assert verdicts(executor, job(ADD, "--", "its $HOME")) == [["wrong_output"] * 2]


def test_a_validator_may_recurse_as_deep_as_its_memory_allows(executor: SparingExecutor) -> None:
    """As those of trees and graphs do, on systems without a limit of the stack."""
    assert verdicts(executor, job(ADD, "deep")) == [["passed"] * 2]


@pytest.mark.parametrize("flag", ["crash", "zero", "seven"])
def test_an_output_on_which_a_validator_fails_is_rejected_and_the_run_goes_on(
    executor: SparingExecutor, flag: str
) -> None:
    assert verdicts(executor, job(ADD, flag), job(ADD)) == [["wrong_output"] * 2, ["passed"] * 2]


@pytest.mark.parametrize("flag", ["loop", "fork"])
def test_a_validator_beyond_its_limits_is_a_fault_and_no_verdict(
    executor: SparingExecutor, flag: str
) -> None:
    endless = job(ADD, flag)
    assert isinstance(endless.judge, Checker)
    assert endless.judge.limits == VALIDATOR_LIMITS
    short = replace(endless.judge, limits=replace(VALIDATOR_LIMITS, cpu_s=0.3, processes=8))
    with pytest.raises(SandboxFault, match="the checker failed on test 0"):
        executor.run_many([replace(endless, judge=short)])
    assert verdicts(executor, job(ADD)) == [["passed"] * 2]


def test_equal_sources_are_compiled_once_whatever_runs_them_and_with_which_flags(
    executor: SparingExecutor,
) -> None:
    verdicts(executor, job(ADD))
    executor.take_tally()
    jobs = [job(ADD), job("print(3)"), job(ADD, "zero")]
    assert len(verdicts(executor, *jobs)) == len(jobs)
    programs = executor.take_tally().programs
    require_validators([], executor)
    assert asyncio.run(executor.run_many_async(jobs[:1]))[0][0].verdict is Verdict.PASSED
    assert executor.take_tally().programs * len(jobs) == programs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int main() { return yes; }", "error: .yes. was not declared"),
        ('#include "/etc/passwd"\n', "/etc/passwd: No such file"),
        ('#include "../judging.py"\n', "judging.py: No such file"),
    ],
)
def test_a_validator_that_does_not_compile_is_named_before_anything_runs(
    executor: SparingExecutor, source: str, said: str
) -> None:
    broken = replace(problem(files={"a.cc": source}), id="broken")
    with pytest.raises(ConfigError, match=f"problem 'broken': field 'judge.validator'.*{said}"):
        require_validators([problem(), broken, replace(broken, id="another")], executor)
    with pytest.raises(SandboxFault, match="the checker cannot be built: exception: "):
        executor.run_many([job_of(broken, ADD, broken.public_tests)])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_no_run_begins_with_a_validator_that_does_not_compile(
    tmp_path: Path, random_model: Path, command: str
) -> None:
    broken = problem(files={"a.cc": "int main() { return yes; }"})
    write_jsonl(tmp_path / "broken.jsonl", iter([broken]))
    settings = [f"model.path={random_model}", f"problems.eval={tmp_path / 'broken.jsonl'}"]
    with one_process_job():
        result = CliRunner().invoke(main, [command, str(run_file(tmp_path)), *settings])
    assert result.exit_code == 2
    assert "rlef: error: problem 'sum': field 'judge.validator': it does not compile here" in result.output


def test_without_a_compiler_loading_the_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "problems.jsonl", iter([problem()]))
    config = Config.model_validate({"problems": {"train": str(tmp_path / "problems.jsonl")}})
    assert load(config, "train")[0].judge == problem().judge
    monkeypatch.setattr(validators, "_SEEN_IN_SANDBOX", str(tmp_path))
    with pytest.raises(ConfigError, match=r"problems.train: .*problem 'sum': .*apt-get install g\+\+"):
        load(config, "train")


def test_the_compiler_is_given_names_that_are_no_options() -> None:
    build = checker_of(Validator(files={"a.cc": "", "b.cpp": "", "c.h": ""})).build
    assert build is not None
    assert list(build.arguments[-2:]) == ["./a.cc", "./b.cpp"]
