"""Problem packages, whose submissions say by their folder what the verdict should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlef import validators
from rlef.config import ConfigError
from rlef.problem_check import check_problems
from rlef.records import Problem, Validator
from rlef.sources.common import Found, Reason, SetAside
from rlef_sandbox import Executor, Test, Tokens
from tests.sources import examples


def only(folder: Path, **changes: int) -> Problem:
    (found,) = examples.read("kattis", folder, **changes)
    assert isinstance(found, Found), found
    return found.problem


def set_aside(folder: Path, **changes: int) -> SetAside:
    (outcome,) = examples.read("kattis", folder, **changes)
    assert isinstance(outcome, SetAside), outcome
    return outcome


def test_every_verdict_is_as_labelled(tmp_path: Path, executor: Executor) -> None:
    for name in examples.KATTIS_FILES:
        examples.kattis(tmp_path, name)
    found = examples.read("kattis", tmp_path, executor)
    problems = [each.problem for each in found if isinstance(each, Found)]
    checks = list(check_problems(problems, executor, runs=1, solutions=9))
    assert [check.id for check in checks] == ["double", "parts", "table", "terms", "third", "triple"]
    assert [check.solutions for check in checks] == [2, 2, 1, 2, 2, 1]
    assert [check.incorrect_solutions for check in checks] == [4, 3, 3, 2, 2, 2]
    assert all(check.is_sound for check in checks), checks


def test_samples_are_public_and_shown_and_all_groups_of_secrets_are_private(tmp_path: Path) -> None:
    problem = only(examples.kattis(tmp_path, "double"))
    assert problem.public_tests == (Test("2\n", "4\n"),)
    assert problem.private_tests == (Test("3\r\n", "6"), Test("1000000\n", "2000000\n"))
    assert problem.statement.endswith("Sample input 1:\n2\n\nSample output 1:\n4\n")
    assert problem.judge == Tokens(ignore_case=True)


@pytest.mark.parametrize(
    ("name", "time_limit_s", "memory_limit_bytes"),
    [("double", 1.0, 1_000_000_000), ("third", 2.0, 512 << 20), ("parts", 1.5, 1_000_000_000)],
)
def test_limits_are_the_packages_where_it_has_some(
    tmp_path: Path, name: str, time_limit_s: float, memory_limit_bytes: int
) -> None:
    problem = only(examples.kattis(tmp_path, name))
    assert (problem.time_limit_s, problem.memory_limit_bytes) == (time_limit_s, memory_limit_bytes)


@pytest.mark.parametrize(
    ("flags", "judge"),
    [
        ("case_sensitive", Tokens()),
        ("float_absolute_tolerance 1e-3", Tokens(absolute=1e-3, ignore_case=True)),
        ("float_relative_tolerance 1e-3", Tokens(relative=1e-3, ignore_case=True)),
        ("float_tolerance .5 case_sensitive", Tokens(absolute=0.5, relative=0.5)),
    ],
)
def test_flags_of_the_default_validator_are_a_judge(tmp_path: Path, flags: str, judge: Tokens) -> None:
    yaml = f"validator_flags: {flags}\n"
    assert only(examples.kattis(tmp_path, "double", **{"problem.yaml": yaml})).judge == judge


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"data/sample/1.in": None}, Reason.NO_PUBLIC_TESTS, ""),
        ({"data/secret/1.ans": None}, Reason.INVALID, "1.in has no 1.ans"),
        ({"problem.yaml": "validation: custom interactive\n"}, Reason.INTERACTIVE, ""),
        ({"problem.yaml": "type: [pass-fail, interactive]\n"}, Reason.INTERACTIVE, ""),
        ({"problem.yaml": "type: [pass-fail, multi-pass]\n"}, Reason.UNSUPPORTED, "'multi-pass'"),
        ({"problem.yaml": "type: scoring\nvalidation: custom score\n"}, Reason.UNSUPPORTED, "gives scores"),
        ({"problem.yaml": "validation: custom\n"}, Reason.UNSUPPORTED, "output validators: none"),
        ({"output_validators/Check.java": "class Check {}"}, Reason.UNSUPPORTED, "Check.java"),
        ({"problem.yaml": "validator_flags: fuzzy\n"}, Reason.INVALID, "no flag 'fuzzy'"),
        ({"problem.yaml": "validator_flags: float_tolerance x\n"}, Reason.INVALID, "'x' is no tolerance"),
        ({"problem.yaml": "limits: {time_limit: -1}\n"}, Reason.INVALID, "time_limit is -1"),
        ({"problem.yaml": "a: [\n"}, Reason.UNREADABLE, "not YAML"),
        ({"problem.yaml": "!!python/object/apply:os.system [exit]\n"}, Reason.UNREADABLE, "not YAML"),
        ({"problem.yaml": "- a\n"}, Reason.INVALID, "no map"),
        ({"problem_statement/problem.en.tex": None}, Reason.UNSUPPORTED, "no statement"),
        (
            {"data/secret/large/testdata.yaml": "output_validator_flags: case_sensitive\n"},
            Reason.UNSUPPORTED,
            "",
        ),
        ({".timelimit": "soon"}, Reason.INVALID, "'soon'"),
    ],
)
def test_a_package_that_cannot_be_used_is_set_aside(
    tmp_path: Path, changes: dict[str, str | None], reason: Reason, said: str
) -> None:
    outcome = set_aside(examples.kattis(tmp_path, "double", **changes))
    assert (outcome.reason, outcome.id) == (reason, "double")
    assert said in outcome.detail


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"check/build": "#!/bin/sh\n"}, "output validators: build, validate.cc, validate.h; one in C++"),
        ({"check/helper.py": ""}, "helper.py"),
        ({"check/more/deep.h": ""}, "more"),
        ({"other/validate.cc": "int main() {}\n"}, "validate.cc, validate.h, validate.cc"),
        ({"check/validate.cc": None}, "output validators: validate.h"),
        ({"check/validate.cc": '#include "validate.hpp"\n'}, "validate.hpp: No such file"),
        ({"check/validate.cc": '#include "/etc/passwd"\n'}, "/etc/passwd: No such file"),
        (
            {"check/validate.cc": "template <int n> int f() { return f<n + 1>(); }\nint main() { f<0>(); }"},
            "depth",
        ),
    ],
)
def test_validators_that_are_no_one_program_in_cpp_or_do_not_compile_are_set_aside(
    tmp_path: Path, executor: Executor, changes: dict[str, str | None], said: str
) -> None:
    files = {f"output_validators/{path}": text for path, text in changes.items()}
    (outcome,) = examples.read("kattis", examples.kattis(tmp_path, "terms", **files), executor)
    assert isinstance(outcome, SetAside)
    assert outcome.reason is Reason.UNSUPPORTED
    assert said in outcome.detail


def test_without_a_compiler_a_validator_in_cpp_is_set_aside_with_the_mend(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validators, "_SEEN_IN_SANDBOX", str(tmp_path))
    (outcome,) = examples.read("kattis", examples.kattis(tmp_path, "terms"), executor)
    assert isinstance(outcome, SetAside)
    assert "apt-get install g++" in outcome.detail


def test_a_validator_in_cpp_is_kept_as_its_sources_and_flags(tmp_path: Path, executor: Executor) -> None:
    flat = {"output_validators/check/validate.cc": None, "output_validators/check/validate.h": None}
    flat["output_validators/check.cpp"] = "int main() { return 43; }\n"
    package = examples.kattis(tmp_path, "terms", **flat)
    (package / "output_validators/check/.gitignore").unlink()
    (package / "output_validators/check").rmdir()
    (outcome,) = examples.read("kattis", package, executor)
    assert isinstance(outcome, Found)
    assert outcome.problem.judge == Validator(
        files={"check.cpp": "int main() { return 43; }\n"}, flags=("strict", "it's $HOME")
    )


def test_a_link_out_of_the_package_is_not_followed(tmp_path: Path) -> None:
    package = examples.kattis(tmp_path, "double", **{"data/secret/1.in": None})
    (package / "data/secret/1.in").symlink_to("/etc/hostname")
    assert "data/secret/1.in is no file of the package" in set_aside(package).detail


def test_a_large_file_a_pipe_and_text_that_is_none_are_set_aside(tmp_path: Path) -> None:
    package = examples.kattis(tmp_path, "double")
    secret = package / "data/secret/1.in"
    secret.write_bytes(b"\xff\xfe")
    assert set_aside(package).reason is Reason.UNREADABLE
    os.truncate(secret, 200 << 20)
    assert "209,715,200 bytes" in set_aside(package).detail
    secret.unlink()
    os.mkfifo(secret)
    assert set_aside(package).reason is Reason.INVALID


def test_a_folder_without_packages_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="give"):
            examples.read("kattis", path)
