"""Each kind of finding: a small kernel that has the fault, and its corrected twin, of which nothing is found."""

import tracemalloc

import numpy as np
import pytest

from tests.ptx import EmulationError, Unsupported
from tests.ptx.handwritten import address, run
from tests.ptx.races import PAGE, Shadow

MODES = [
    pytest.param({"lockstep": True}, id="lockstep"),
    pytest.param({"order": "forward"}, id="forward"),
    pytest.param({"order": "reverse"}, id="reverse"),
    pytest.param({"order": "random", "preempt": True, "seed": 3}, id="random"),
]
every_mode = pytest.mark.parametrize("mode", MODES)

OWN = "shl.b32 %r1, %r0, 2; mov.b32 %r2, smem; add.s32 %r1, %r1, %r2;"  # %r1: 4 bytes of shared memory a thread
OTHER = "xor.b32 %r3, %r0, 32; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r2;"  # %r3: those of a thread of another warp
NEIGHBOUR = "xor.b32 %r3, %r0, 1; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r2;"  # of another lane
GLOBAL = address("rd21", 0, 4)  # %rd21: this thread's 4 bytes of the first array
OUT = address("rd22", 1, 4)


def kinds(report) -> list[str]:
    return sorted({kind for kind, _ in report.findings})


def numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype="u4")


# --- races


@every_mode
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "there"])
def test_a_barrier_between_warps_in_shared_memory(missing, mode):
    body = f"{OWN} {OTHER} st.shared.b32 [%r1], %r0; {{}} ld.shared.b32 %r4, [%r3]; {OUT} st.global.b32 [%rd22], %r4;"
    out = numbers(64)
    report = run(body.format("" if missing else "bar.sync 0;"), out, out, threads=64, shared=256, **mode)
    assert ("race" in kinds(report)) == missing
    if not missing:
        assert report.findings == [] and (out == numbers(64) ^ 32).all() and report.barriers == 1


@every_mode
def test_a_skipped_barrier_is_missed(mode):
    body = f"{OWN} {OTHER} st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r4, [%r3]; bar.sync 0;"
    settings = {"threads": 64, "shared": 256, **mode}
    assert "race" in kinds(run(body, numbers(1), skip_barriers=(0,), **settings))
    assert kinds(run(body, numbers(1), skip_barriers=(1,), **settings)) == []


@every_mode
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "there"])
def test_a_barrier_before_memory_is_used_again(missing, mode):
    """The second write must wait for the readers of the first."""
    body = f"""{OWN} {OTHER} st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r4, [%r3];
        {"" if missing else "bar.sync 0;"} st.shared.b32 [%r1], 7; {OUT} st.global.b32 [%rd22], %r4;"""
    assert kinds(run(body, numbers(64), numbers(64), threads=64, shared=256, **mode)) == (["race"] if missing else [])


@every_mode
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "there"])
def test_a_barrier_between_warps_in_global_memory(missing, mode):
    body = f"""{GLOBAL} st.global.b32 [%rd21], %r0; {"" if missing else "bar.sync 0;"}
        xor.b32 %r3, %r0, 32; mul.wide.u32 %rd23, %r3, 4; add.s64 %rd23, %rd23, %rd0; ld.global.b32 %r4, [%rd23];"""
    assert kinds(run(body, numbers(64), threads=64, **mode)) == (["race"] if missing else [])


@every_mode
@pytest.mark.parametrize(("value", "found"), [("%r0", ["race"]), ("5", [])])
def test_two_warps_may_write_the_same_value_only(value, found, mode):
    body = f"st.global.b32 [%rd0], {value};"
    assert kinds(run(body, numbers(1), threads=64, **mode))[:1] == found


@every_mode
@pytest.mark.parametrize("reader", [0, 32, 64])
def test_one_of_several_writers_of_a_value_must_not_read_before_the_others_write(reader, mode):
    """As where each warp stores the same result: three warps write 5, one of them has read these bytes."""
    body = f"setp.eq.u32 %p1, %r0, {reader}; @%p1 ld.global.b32 %r4, [%rd0]; {{}} st.global.b32 [%rd0], 5;"
    assert kinds(run(body.format(""), numbers(1), threads=96, **mode)) == ["race"]
    assert kinds(run(body.format("bar.sync 0;"), numbers(1), threads=96, **mode)) == []


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(("offset", "found"), [(0, []), (4, ["race"])], ids=["own", "next"])
def test_blocks_of_a_grid_are_not_ordered(offset, found, order):
    """Each block writes its own number, and reads that of its own or of the next block."""
    body = f"""mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd23, %r5, 4; add.s64 %rd23, %rd23, %rd0;
        setp.eq.s32 %p1, %r0, 0; @%p1 st.global.b32 [%rd23], %r5; @%p1 ld.global.b32 %r6, [%rd23+{offset}];"""
    assert kinds(run(body, numbers(5), blocks=4, order=order)) == found


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_block_that_writes_what_others_have_read(order):
    body = """ld.global.b32 %r6, [%rd0]; bar.sync 0; mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 2;
        @%p1 st.global.b32 [%rd0], 1;"""
    assert kinds(run(body, numbers(1), blocks=4, order=order)) == ["race"]
    assert (
        kinds(run(body.replace("st.global.b32 [%rd0]", "st.global.b32 [%rd1]"), numbers(1), numbers(1), blocks=4)) == []
    )


def test_the_last_of_several_readers_must_not_write_either():
    body = """mov.u32 %r5, %ctaid.x; ld.global.b32 %r6, [%rd0]; bar.sync 0; setp.eq.s32 %p1, %r5, 2;
        @%p1 ld.global.b32 %r6, [%rd0]; bar.sync 0; @%p1 st.global.b32 [%rd1], %r5; bar.sync 0;
        @%p1 ld.global.b32 %r6, [%rd0]; bar.sync 0; @%p1 st.global.b32 [{}], %r5;"""
    x, y = numbers(1), numbers(1)
    assert kinds(run(body.format("%rd0"), x, y, blocks=3)) == ["race"]
    assert kinds(run(body.format("%rd1"), x, y, blocks=3)) == []


@pytest.mark.parametrize("lockstep", [True, False])
def test_lanes_of_a_warp_need_bar_warp_sync(lockstep):
    body = f"{OWN} {NEIGHBOUR} st.shared.b32 [%r1], %r0; {{}} ld.shared.b32 %r4, [%r3];"
    settings = {"threads": 64, "shared": 256, "lockstep": lockstep}
    assert kinds(run(body.format(""), numbers(1), lanes=True, **settings)) == ["lanes"]
    assert kinds(run(body.format(""), numbers(1), **settings)) == []  # only if asked for
    for barrier in ("bar.warp.sync -1;", "bar.warp.sync 0xffffffff;", "bar.sync 0;"):
        assert kinds(run(body.format(barrier), numbers(1), lanes=True, **settings)) == []
    skipped = run(body.format("bar.warp.sync -1;"), numbers(1), lanes=True, skip_warp_sync=True, **settings)
    assert kinds(skipped) == ["lanes"]


def test_a_race_is_told_with_both_instructions_and_their_lines():
    place = "\n.loc 1 12 3 // f.py:12:3 @[ kernel.py:45:6 ]\n"
    body = f"{OWN} {OTHER} {place} st.shared.b32 [%r1], %r0; ld.shared.b32 %r4, [%r3];"
    ((kind, text),) = run(body, numbers(1), threads=64, shared=256, lockstep=True).findings
    assert kind == "race"
    for part in (
        "shared memory",
        "reads",
        "writes",
        "kernel.py:45",
        "st.shared.b32 [%r1], %r0",
        "ld.shared.b32 %r4, [%r3]",
    ):
        assert part in text


# --- memory that is not there, or not written


@every_mode
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "there"])
def test_shared_memory_is_written_before_it_is_read(missing, mode):
    body = f"""{OWN} {"" if missing else "st.shared.b32 [%r1], %r0;"} ld.shared.b32 %r4, [%r1];
        {OUT} st.global.b32 [%rd22], %r4;"""
    out = numbers(64)
    assert kinds(run(body, out, out, threads=64, shared=256, **mode)) == (["uninit"] if missing else [])
    assert (out == (0xA5A5A5A5 if missing else numbers(64))).all()


def test_shared_memory_of_a_block_is_not_the_next_ones():
    body = f"""{OWN} mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 0; @%p1 st.shared.b32 [%r1], %r0;
        ld.shared.b32 %r4, [%r1];"""
    assert kinds(run(body, numbers(1), shared=128, blocks=2)) == ["uninit"]
    assert kinds(run(body, numbers(1), shared=128, blocks=1)) == []


@pytest.mark.parametrize("access", ["ld.global.b32 %r4, [%rd21+{}];", "st.global.b32 [%rd21+{}], %r0;"])
def test_global_memory_has_bounds(access):
    x = np.zeros(256, "u4")[64:96]
    assert run(f"{GLOBAL} {access.format(0)}", x).findings == []
    for offset in (4, -4, 1 << 40):
        with pytest.raises(EmulationError, match=r"^bounds: line \d+.*: 4 bytes at byte|^bounds: line \d+.*at address"):
            run(f"{GLOBAL} {access.format(offset)}", x)
    guarded = f"{GLOBAL} setp.lt.u32 %p1, %r0, 31; @%p1 {access.format(4)}"
    assert run(guarded, x).findings == []


def test_two_arrays_side_by_side_are_not_one():
    x = np.zeros(64, "u4")
    with pytest.raises(EmulationError, match="bounds"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+120];", x[:32], x[32:])


@pytest.mark.parametrize("access", ["ld.shared.b32 %r4, [%r1+{}];", "st.shared.b32 [%r1+{}], %r0;"])
def test_shared_memory_has_bounds(access):
    body = f"{OWN} st.shared.b32 [%r1], %r0; {access}"
    assert run(body.format(0), numbers(1), shared=128).findings == []
    for offset in (4, -4):
        with pytest.raises(EmulationError, match=r"^bounds: .*of shared memory, which has 128"):
            run(body.format(offset), numbers(1), shared=128)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_a_vector_is_aligned_to_its_size(space):
    base = {"global": "%rd0", "shared": "smem"}[space]
    fill = "mov.b32 %r9, smem; " + "".join(f"st.shared.b32 [%r9+{4 * i}], %r9; " for i in range(8))
    x = np.zeros(64, "u4")
    x = x[(-x.ctypes.data // 4) % 4 :][:32]  # begins at a multiple of 16
    for offset, ok in ((0, True), (16, True), (8, False), (4, False)):
        body = f"{fill} ld.{space}.v4.b32 {{%r1, %r2, %r3, %r4}}, [{base}+{offset}];"
        if ok:
            assert run(body, x, shared=64).findings == []
        else:
            with pytest.raises(EmulationError, match=r"^align: "):
                run(body, x, shared=64)


def test_arrays_that_begin_at_odd_places_are_read_rightly():
    """The address is a multiple of 8, but the array begins 4 bytes before one."""
    x, out = numbers(40), np.zeros(2, "u4")
    x = x[1 - x.ctypes.data // 4 % 2 :][:33]
    body = "ld.global.v2.b32 {%r1, %r2}, [%rd0+12]; st.global.b32 [%rd1], %r2; st.global.v2.b32 [%rd0+20], {%r1, %r1};"
    assert run(body, x, out).findings == []
    assert out[0] == x[0] + 4 and x[5] == x[6] == x[0] + 3


# --- divergence


@every_mode
def test_a_barrier_that_some_lanes_do_not_reach(mode):
    body = "setp.lt.u32 %p1, %r0, {}; @!%p1 bra $SKIP; bar.sync 0;\n$SKIP: mov.b32 %r1, 0;"
    for lanes in (16, 32):
        with pytest.raises(EmulationError, match="^diverged"):
            run(body.format(lanes), numbers(1), threads=64, **mode)
    assert run(body.format(64), numbers(1), threads=64, **mode).barriers == 1


def test_warps_that_wait_at_different_barriers():
    body = """setp.lt.u32 %p1, %r0, 32; @%p1 bra $ONE; bar.sync 0; bra.uni $END;
        $ONE: bar.sync 0; $END: mov.b32 %r1, 0;"""
    with pytest.raises(EmulationError, match="^diverged: warps wait at different barriers"):
        run(body, numbers(1), threads=64)


@every_mode
@pytest.mark.parametrize(
    "collective", ["shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", "redux.sync.add.s32 %r2, %r0, -1;", "bar.warp.sync -1;"]
)
def test_a_collective_of_a_warp_needs_all_its_lanes(collective, mode):
    body = "setp.lt.u32 %p1, %r0, {}; @!%p1 bra $SKIP; {}\n$SKIP: mov.b32 %r1, 0;"
    with pytest.raises(EmulationError, match="^diverged"):
        run(body.format(16, collective), numbers(1), threads=64, **mode)
    assert run(body.format(32, collective), numbers(1), threads=64, **mode).findings == []
    with pytest.raises(EmulationError, match="^diverged"):
        run("setp.lt.u32 %p1, %r0, 31; @%p1 " + collective, numbers(1), threads=64, **mode)
    with pytest.raises(Unsupported, match="some lanes of a warp"):
        run(collective.replace("-1;", "65535;"), numbers(1), threads=64, **mode)


@every_mode
def test_lanes_part_and_meet_again(mode):
    """A loop of as many turns as the thread's number, modulo 4; then every lane adds its neighbour's count."""
    body = f"""mov.b32 %r1, 0; and.b32 %r2, %r0, 3;
        $LOOP: setp.ge.u32 %p1, %r1, %r2; @%p1 bra $DONE; add.s32 %r1, %r1, 1; bra.uni $LOOP;
        $DONE: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; add.s32 %r3, %r3, %r1; {GLOBAL} st.global.b32 [%rd21], %r3;"""
    out = numbers(64)
    assert run(body, out, threads=64, **mode).findings == []
    assert out.tolist() == [(t & 3) + ((t ^ 1) & 3) for t in range(64)]


def test_lanes_that_return_early_are_gone():
    out = numbers(64)
    body = f"{GLOBAL} setp.lt.u32 %p1, %r0, 10; @%p1 ret; st.global.b32 [%rd21], 7;"
    for mode in ({"lockstep": True}, {}):
        out[:] = numbers(64)
        run(body, out, threads=64, **mode)
        assert out.tolist() == [*range(10), *[7] * 54]


def test_an_endless_loop_is_told():
    with pytest.raises(EmulationError, match="^hangs"):
        run("$LOOP: bra.uni $LOOP;", numbers(1), limit=1000)


# --- what lands later: cp.async, and what wgmma reads


COPY = f"{OWN} {GLOBAL} cp.async.ca.shared.global [%r1], [%rd21], 4, {{size}}; cp.async.commit_group;"


@every_mode
def test_cp_async_is_waited_for_before_it_is_read(mode):
    x, out = numbers(64) + 100, numbers(64)
    read = f"ld.shared.b32 %r4, [%r1]; {OUT} st.global.b32 [%rd22], %r4;"
    settings = {"threads": 64, "shared": 256, **mode}
    report = run(COPY.format(size=4) + read + "cp.async.wait_group 0;", x, out, **settings)
    assert kinds(report) == ["async", "uninit"] and (out == 0xA5A5A5A5).all()
    assert run(COPY.format(size=4) + "cp.async.wait_group 0;" + read, x, out, **settings).findings == []
    assert (out == x).all()
    assert run(COPY.format(size=0) + "cp.async.wait_group 0;" + read, x, out, **settings).findings == []
    assert (out == 0).all()  # of 0 bytes to read, zeros are written


@every_mode
def test_the_wait_leaves_the_newest_groups_under_way(mode):
    x = numbers(64)
    body = f"""{COPY.format(size=4)} cp.async.ca.shared.global [%r1+256], [%rd21], 4, 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %r4, [%r1+{{}}]; cp.async.wait_group 0;"""
    assert run(body.format(0), x, threads=64, shared=512, **mode).findings == []
    assert "async" in kinds(run(body.format(256), x, threads=64, shared=512, **mode))


@every_mode
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "there"])
def test_others_need_a_barrier_behind_the_wait(missing, mode):
    body = f"""{COPY.format(size=4)} {OTHER} cp.async.wait_group 0; {"" if missing else "bar.sync 0;"}
        ld.shared.b32 %r4, [%r3];"""
    found = kinds(run(body, numbers(64), threads=64, shared=256, **mode))
    assert ("race" in found) == missing and (missing or found == [])


def test_a_copy_under_way_races_with_a_write_behind_a_later_barrier():
    body = f"""{COPY.format(size=4)} {OTHER} bar.sync 0; {{}} st.shared.b32 [%r3], 1; cp.async.wait_group 0;"""
    settings = {"threads": 64, "shared": 256, "lockstep": True}
    assert "race" in kinds(run(body.format(""), numbers(64), **settings))
    assert "race" in kinds(run(body.format("").replace("1; cp", "1; bar.sync 0; cp"), numbers(64), **settings))
    assert kinds(run(body.format("cp.async.wait_group 0; bar.sync 0;"), numbers(64), **settings)) == []


def test_other_lanes_need_bar_warp_sync_behind_the_wait():
    body = f"{COPY.format(size=4)} {NEIGHBOUR} cp.async.wait_group 0; {{}} ld.shared.b32 %r4, [%r3];"
    settings = {"shared": 128, "lanes": True}
    assert kinds(run("mov.b32 %r2, smem;" + body.format(""), numbers(32), **settings)) == ["lanes"]
    assert kinds(run("mov.b32 %r2, smem;" + body.format("bar.warp.sync -1;"), numbers(32), **settings)) == []


def test_a_copy_of_what_is_out_of_bounds():
    with pytest.raises(EmulationError, match="^bounds"):
        run(COPY.format(size=4), numbers(8), shared=128)
    assert run(COPY.format(size=0) + "cp.async.wait_group 0;", numbers(8), shared=128).findings == []  # reads nothing


# --- what it costs


def test_a_shadow_holds_the_pages_that_were_touched():
    shadow = Shadow(24 << 30)
    far = np.array([0, 5 * PAGE + 3, (24 << 30) - 1])
    places = shadow.places(far)
    shadow.arrays["owner"][places] = [1, 2, 3]
    assert shadow.arrays["owner"][shadow.places(far[::-1])].tolist() == [3, 2, 1]
    assert shadow.pages == 3 and all(array.nbytes < 64 << 20 for array in shadow.arrays.values())
    assert (shadow.arrays["owner"][shadow.places(far + [1, 1, -1])] == 0).all()


def test_a_huge_array_of_which_little_is_touched(tmp_path):
    x = np.memmap(tmp_path / "sparse", "u1", "w+", shape=(24 << 30,))  # of a file without pages on the disk
    body = f"""{GLOBAL} ld.global.b32 %r1, [%rd21]; st.global.b32 [%rd21], %r0; bar.sync 0;
        st.global.b32 [%rd21+{(24 << 30) - 128}], 9;"""
    tracemalloc.start()
    try:
        assert run(body, x, blocks=1).findings == []
        assert kinds(run(body, x, blocks=2)) == ["race"]
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert x[4] == 1 and x[-4] == 9
