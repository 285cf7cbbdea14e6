"""What a user may ask for."""

from __future__ import annotations

import pytest

from rlef_sandbox import Limits, Result, Test, Verdict


def test_wall_limit_follows_the_cpu_limit_unless_given():
    assert Limits(cpu_s=2.0).wall_limit_s == 8.0
    assert Limits(cpu_s=2.0, wall_s=3.0).wall_limit_s == 3.0


@pytest.mark.parametrize("name", ["cpu_s", "wall_s"])
@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e6, "1", True])
def test_time_out_of_range_is_named(name, seconds):
    with pytest.raises(ValueError, match=rf"{name} is .*: give a number of seconds in \(0, 86400\]"):
        Limits(**{name: seconds})


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("memory_bytes", 1000, 1 << 20),
        ("processes", 0, 1),
        ("output_bytes", 0, 1),
        ("kept_output_bytes", -1, 0),
        ("open_files", 3, 16),
        ("memory_bytes", 1e9, 1 << 20),
        ("memory_bytes", 2**62, 1 << 20),
        ("processes", True, 1),
    ],
)
def test_size_out_of_range_is_named(name, value, least):
    with pytest.raises(ValueError, match=rf"{name} is .*: give a whole number of at least {least}"):
        Limits(**{name: value})


def test_verdicts_are_their_names():
    assert [verdict.value for verdict in Verdict] == [
        "passed",
        "wrong_output",
        "exception",
        "timeout",
        "out_of_memory",
        "output_limit",
        "syntax_error",
        "security",
        "skipped",
    ]


@pytest.mark.parametrize("given", [3, None, bytearray(b"3"), ["3\n"]])
def test_input_that_is_neither_text_nor_bytes_is_named(given):
    with pytest.raises(TypeError) as caught:
        Test(given, "3")

    assert str(caught.value) == f"input is {given!r}: give a str, or bytes where it is no text"


def test_expected_output_that_is_no_text_is_named_and_cut():
    with pytest.raises(TypeError, match=r"^expected_output is b'xxx.*\.\.\..*xxx': give a str$") as caught:
        Test("3", b"x" * 10_000)  # type: ignore[arg-type]

    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(("record", "name"), [(Test("1", "2"), "input"), (Limits(), "cpu_s")])
def test_records_cannot_be_changed(record, name):
    with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
        setattr(record, name, 3)


def test_result_has_no_default():
    with pytest.raises(TypeError, match="verdict"):
        Result()
