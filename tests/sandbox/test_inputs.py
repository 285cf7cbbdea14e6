"""What a program finds on its standard input."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlef_sandbox import Executor, Test, Verdict
from tests.sandbox.conftest import RunOnce

SHOW_BYTES = "import sys; print(sys.stdin.buffer.read().hex())"


@given(inputs=st.lists(st.binary(), min_size=1, max_size=4))
def test_bytes_are_read_as_they_are(executor: Executor, inputs: list[bytes]):
    results = executor.run(SHOW_BYTES, [Test(data, data.hex()) for data in inputs])

    assert [result.stdout for result in results] == [data.hex() + "\n" for data in inputs]
    assert {result.verdict for result in results} == {Verdict.PASSED}


@given(text=st.text())
def test_text_is_read_as_the_bytes_of_its_utf8(executor: Executor, text: str):
    as_text, as_bytes = executor.run(SHOW_BYTES, [Test(text, ""), Test(text.encode(), "")])

    assert as_text.stdout == as_bytes.stdout == text.encode().hex() + "\n"


def test_a_megabyte_of_bytes_arrives_whole(run: RunOnce):
    program = "import sys; print(sys.stdin.buffer.read() == bytes(range(256)) * 4096)"

    assert run(program, bytes(range(256)) * 4096, "True\n").verdict is Verdict.PASSED


def test_a_program_that_reads_text_finds_surrogates_where_bytes_are_no_text(run: RunOnce):
    assert run("print(ascii(input()))", b"a\xff\n").stdout == "'a\\udcff'\n"
