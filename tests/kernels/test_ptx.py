"""The simulator of compiled kernels, on programs whose outcome is known."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.ptx import machine
from tests.kernels.ptx.faults import (
    InFlight,
    Misaligned,
    OutOfBounds,
    Race,
    Stuck,
    Uninitialised,
    Unsupported,
)
from tests.kernels.ptx.snippets import program, result_of, run

OWN_WORD = "mov.b32 %r2, global_smem; add.s32 %r3, %r2, %r1;"  # %r3: the address of this thread's word
NEXT_WORD = "xor.b32 %r4, %r1, 128; add.s32 %r4, %r2, %r4;"  # %r4: that of the same lane in the other warp
STORE_OWN, LOAD_NEXT = "st.shared.b32 [%r3], %r0;", "ld.shared.b32 %r9, [%r4];"
TWO_WARPS = {"threads": 64, "shared": 256}


def test_threads_know_who_they_are() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    body = """
        mov.u32 %r2, %ctaid.x;
        mov.u32 %r3, %ntid.x;
        mad.lo.s32 %r0, %r2, %r3, %r0;
        st.global.b32 [%rd0 + word], %r0;
    """
    run(body, out, grid=(2,))
    assert out.tolist() == list(range(64))


def test_a_predicate_spares_the_other_threads() -> None:
    assert result_of("mov.b32 %r9, -1; setp.lt.u32 %p1, %r0, 2; @%p1 mov.b32 %r9, 5;")[:4] == [5, 5, -1, -1]
    assert result_of("mov.b32 %r9, -1; setp.lt.u32 %p1, %r0, 2; @!%p1 mov.b32 %r9, 5;")[:4] == [-1, -1, 5, 5]


def test_what_only_a_predicate_writes_is_poison_elsewhere() -> None:
    found = result_of("setp.lt.u32 %p1, %r0, 1; @%p1 mov.b32 %r9, 5;")
    assert found[:2] == [5, -1]


def test_threads_that_part_take_both_ways_and_meet_again() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 16;
        @%p1 bra $low;
        mov.b32 %r8, 1;
        bra.uni $meet;
    $low:
        mov.b32 %r8, 2;
    $meet:
        shfl.sync.idx.b32 %r9, %r8, 0, 31, -1;
        add.s32 %r9, %r9, %r8;
    """
    assert result_of(body) == [4] * 16 + [3] * 16


def test_each_thread_leaves_a_loop_when_it_is_done() -> None:
    body = """
        mov.b32 %r9, 0;
    $again:
        add.s32 %r9, %r9, 3;
        sub.s32 %r0, %r0, 1;
        setp.ge.s32 %p1, %r0, 0;
        @%p1 bra $again;
        mov.u32 %r0, %tid.x;
    """
    assert result_of(body) == [3 * (thread + 1) for thread in range(32)]


@pytest.mark.parametrize(
    ("mode", "by", "limits", "source"),
    [
        ("bfly", 3, 31, lambda lane: lane ^ 3),
        ("up", 1, 0, lambda lane: max(lane - 1, 0)),
        ("down", 4, 31, lambda lane: lane + 4 if lane < 28 else lane),
        ("idx", 7, 31, lambda lane: 7),
        ("up", 1, 24 << 8, lambda lane: lane - 1 if lane % 8 else lane),  # segments of eight lanes
        ("idx", 1, (24 << 8) | 31, lambda lane: lane // 8 * 8 + 1),
    ],
)
def test_a_shuffle_reads_another_lane(mode: str, by: int, limits: int, source) -> None:
    found = result_of(f"shfl.sync.{mode}.b32 %r9, %r0, {by}, {limits}, -1;")
    assert found == [source(lane) for lane in range(32)]


def test_a_shuffle_from_a_lane_that_takes_no_part_is_a_fault() -> None:
    with pytest.raises(Race, match="takes no part"):
        result_of("setp.lt.u32 %p1, %r0, 8; @%p1 shfl.sync.bfly.b32 %r9, %r0, 16, 31, -1;")


def test_warps_exchange_through_shared_memory_across_a_barrier() -> None:
    body = f"{OWN_WORD} {NEXT_WORD} {STORE_OWN} bar.sync 0; {LOAD_NEXT}"
    assert result_of(body, **TWO_WARPS) == [*range(32, 64), *range(32)]


def test_a_read_with_no_barrier_is_a_race_though_this_order_would_give_the_right_value() -> None:
    with pytest.raises(Race, match=r"line \d+: ld.shared.b32 %r9.* reads what another thread wrote"):
        result_of(f"{OWN_WORD} {NEXT_WORD} {STORE_OWN} {LOAD_NEXT}", **TWO_WARPS)


def test_a_write_after_a_read_needs_a_barrier_too() -> None:
    body = f"{OWN_WORD} {NEXT_WORD} {STORE_OWN} bar.sync 0; {LOAD_NEXT}"
    with pytest.raises(Race, match="overwrites what another thread reads"):
        result_of(f"{body} {STORE_OWN}", **TWO_WARPS)
    result_of(f"{body} bar.sync 0; {STORE_OWN}", **TWO_WARPS)


def test_a_write_is_a_race_with_each_of_several_readers() -> None:
    everyone_reads = f"{OWN_WORD} {STORE_OWN} bar.sync 0; ld.shared.b32 %r9, [global_smem];"
    with pytest.raises(Race, match="thread 0 overwrites what another thread reads"):
        result_of(f"{everyone_reads} setp.eq.u32 %p1, %r0, 0; @%p1 {STORE_OWN}", **TWO_WARPS)


def test_a_barrier_of_the_warp_orders_the_warp_and_no_other() -> None:
    neighbour = "xor.b32 %r4, %r1, {}; add.s32 %r4, %r2, %r4;"
    within, across = (f"{OWN_WORD} {neighbour.format(by)} {STORE_OWN}" for by in (4, 128))
    assert result_of(f"{within} bar.warp.sync -1; {LOAD_NEXT}", **TWO_WARPS)[:4] == [1, 0, 3, 2]
    with pytest.raises(Race):
        result_of(f"{within} {LOAD_NEXT}", **TWO_WARPS)
    with pytest.raises(Race):
        result_of(f"{across} bar.warp.sync -1; {LOAD_NEXT}", **TWO_WARPS)


def test_warps_may_write_the_same_value_to_one_place_but_not_different_ones() -> None:
    store = "mov.b32 %r9, 7; st.shared.b32 [global_smem], {};"
    assert result_of(store.format("%r9"), **TWO_WARPS) == [7] * 64
    with pytest.raises(Race, match="different values"):
        result_of(store.format("%r0"), **TWO_WARPS)


def test_of_the_threads_of_a_warp_that_write_to_one_place_any_may_win() -> None:
    body = "st.shared.b32 [global_smem], %r0; bar.warp.sync -1; ld.shared.b32 %r9, [global_smem];"
    (value,) = set(result_of(body, shared=16))
    assert value in range(32)


def test_blocks_must_not_share_what_they_write() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(Race, match="overwrites what another thread wrote"):
        run("mov.u32 %r2, %ctaid.x; st.global.b32 [%rd0 + word], %r2;", out, grid=(2,))
    read = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1;\nld.global.b32 %r3, [%rd0 + word];\n"
    with pytest.raises(Race, match="overwrites what another thread reads"):
        run(f"{read}@%p1 st.global.b32 [%rd0 + word], %r0;", out, grid=(2,))


def test_threads_that_wait_at_different_barriers_are_stuck() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra $low;
        bar.sync 0;
        bra.uni $meet;
    $low:
        bar.sync 0;
    $meet:
        mov.b32 %r9, 0;
    """
    with pytest.raises(Stuck, match="wait at the barriers"):
        result_of(body, threads=64)


def test_a_loop_without_an_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ENDLESS", 100)
    with pytest.raises(Stuck, match="does not end"):
        result_of("$again: bra.uni $again;")


COPY = f"""
    {OWN_WORD} {NEXT_WORD}
    mad.wide.u32 %rd9, %r0, 4, %rd1;
    cp.async.ca.shared.global [%r3], [%rd9], 4;
    cp.async.commit_group;
"""


def copied(rest: str) -> list[int]:
    out = torch.zeros(64, dtype=torch.int32)
    source = torch.arange(64, dtype=torch.int32) + 100
    run(f"{COPY} {rest}\nst.global.b32 [%rd0 + word], %r9;", out, source, **TWO_WARPS)
    return out.tolist()


def test_a_copy_is_seen_by_its_own_thread_after_a_wait_and_by_others_after_a_barrier() -> None:
    own = "ld.shared.b32 %r9, [%r3];"
    assert copied(f"cp.async.wait_group 0; {own}") == list(range(100, 164))
    assert copied(f"cp.async.wait_all; {own}") == list(range(100, 164))
    assert copied(f"cp.async.wait_group 0; bar.sync 0; {LOAD_NEXT}") == [*range(132, 164), *range(100, 132)]


def test_a_copy_that_nobody_waited_for_may_not_be_touched() -> None:
    for rest in (LOAD_NEXT, "ld.shared.b32 %r9, [%r3];", STORE_OWN):
        with pytest.raises(InFlight, match="under way"):
            copied(f"bar.sync 0; {rest} mov.b32 %r9, 0;")


def test_a_wait_is_no_barrier() -> None:
    with pytest.raises(Race, match="reads what another thread wrote"):
        copied(f"cp.async.wait_group 0; {LOAD_NEXT}")
    with pytest.raises(Race, match="reads what another thread wrote"):
        copied(f"bar.sync 0; cp.async.wait_group 0; {LOAD_NEXT}")


def test_a_wait_for_all_but_the_last_group_leaves_that_one_under_way() -> None:
    second = "cp.async.ca.shared.global [%r3+256], [%rd9], 4; cp.async.commit_group; cp.async.wait_group 1;"
    out, source = torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32)

    def run_with(offset: int) -> None:
        body = f"{COPY} {second} ld.shared.b32 %r9, [%r3+{offset}]; cp.async.wait_all;"
        run(f"{body}\nst.global.b32 [%rd0 + word], %r9;", out, source, threads=64, shared=512)

    run_with(0)
    assert out.tolist() == source.tolist()
    with pytest.raises(InFlight):
        run_with(256)


def test_a_copy_of_nothing_writes_zeros_and_reads_nothing() -> None:
    out, source = torch.ones(32, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    body = f"""
        {OWN_WORD}
        mad.wide.u32 %rd9, %r0, 4, %rd1;
        setp.eq.u32 %p1, %r0, 0;
        selp.b32 %r5, 4, 0, %p1;
        cp.async.ca.shared.global [%r3], [%rd9], 4, %r5;
        cp.async.wait_all;
        ld.shared.b32 %r9, [%r3];
        st.global.b32 [%rd0 + word], %r9;
    """
    run(body, out, source, shared=128)
    assert out.tolist() == [1] + [0] * 31


def test_a_program_may_not_end_while_copies_are_under_way() -> None:
    with pytest.raises(InFlight, match="ends"):
        copied("mov.b32 %r9, 0;")


def test_shared_memory_that_nothing_was_written_to_may_not_be_read() -> None:
    with pytest.raises(Uninitialised, match="shared memory"):
        result_of("ld.shared.b32 %r9, [global_smem];", shared=16)


def test_a_register_that_was_never_written_may_not_be_read() -> None:
    with pytest.raises(Uninitialised, match="%r9"):
        result_of("")


def test_an_access_outside_of_its_tensor_is_a_fault() -> None:
    held = torch.arange(40, dtype=torch.int32)
    load = "ld.global.b32 %r9, [%rd0 + word];"
    run(load, held)
    run(load, held[8:])
    for tensor in (held[:31], held[9:], held[:32:2], held.to(torch.int64)[:0]):
        with pytest.raises(OutOfBounds):
            run(load, tensor)
    with pytest.raises(OutOfBounds, match="shared memory at 16 of 16"):
        result_of("st.shared.b32 [global_smem+16], %r0;", shared=16)


def test_a_wide_access_must_be_aligned() -> None:
    held = torch.zeros(64, dtype=torch.int32)
    load = "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0];"
    run(load, held[4:])
    with pytest.raises(Misaligned, match="16 bytes"):
        run(load, held[3:])
    with pytest.raises(Misaligned):
        result_of("st.shared.v2.b32 [global_smem+4], {%r0, %r0};", shared=16)


def test_bytes_and_sectors_are_counted() -> None:
    held, out = torch.arange(1024, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    load = "ld.global.b32 %r9, [%rd1];"
    traffic = run(f"mad.wide.u32 %rd1, %r0, 4, %rd1;\n{load}\nst.global.b32 [%rd0 + word], %r9;", out, held)
    assert (traffic.loaded, traffic.stored) == (128, 128)
    # A storage begins at a multiple of 32 bytes.
    assert (traffic.loaded_sectors, traffic.stored_sectors) == (4, 4)
    assert run(f"mad.wide.u32 %rd1, %r0, 128, %rd1; {load}", out, held).loaded_sectors == 32
    assert run(f"setp.lt.u32 %p1, %r0, 2; @%p1 {load}", out, held).loaded == 8


def test_an_unknown_instruction_or_modifier_is_named() -> None:
    with pytest.raises(Unsupported, match=r"line \d+: brev.b32 %r9, %r0"):
        result_of("brev.b32 %r9, %r0;")
    with pytest.raises(Unsupported, match=r"add.sat.s32 .*: add does not know sat"):
        result_of("add.sat.s32 %r9, %r0, %r0;")
    with pytest.raises(Unsupported, match=r"bar.sync 1, 32"):
        result_of("bar.sync 1, 32;")


def test_registers_may_be_declared_one_by_one_between_braces() -> None:
    body = "{ .reg .b32 half; .reg .pred p; shl.b32 half, %r0, 1; setp.gt.u32 p, half, 2; @p mov.b32 half, 9;"
    assert result_of(f"{body} mov.b32 %r9, half; }}")[:4] == [0, 2, 9, 9]


def test_an_instruction_can_be_taken_out() -> None:
    whole = program(f"{OWN_WORD} {STORE_OWN} bar.sync 0;", shared=128)
    (place,) = whole.places("bar", "sync")
    rest = whole.without(place)
    assert not rest.places("bar")
    assert len(rest.instructions) == len(whole.instructions)
