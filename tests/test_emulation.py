"""The CUDA emulator itself: what it has to compute, and that each misuse it claims to catch is caught."""

import math
import subprocess

import pytest
from emulation.build import HERE, ROOT, SANITIZE

pytestmark = pytest.mark.sources

CAUGHT = {
    "barrier_that_some_never_reach": "a part of the block reached a barrier",
    "two_barriers_at_once": "the block waits at different barriers",
    "shuffle_that_some_never_reach": "a part of its mask reached a warp operation",
    "lanes_that_disagree_about_the_mask": "lanes of one warp are at different warp operations",
    "lane_outside_its_own_mask": "is not in its own mask",
    "shuffle_from_outside_the_mask": "reads lane 20 outside the mask",
    "index_beyond_shared_memory": "heap-buffer-overflow",
    "copy_that_nobody_waits_for": "ended before its asynchronous copies had arrived",
    "copy_to_a_crooked_address": "is not aligned",
    "matrix_at_a_crooked_address": "not aligned to 16 bytes",
    "barrier_that_nobody_made": "an mbarrier is not initialised",
    "arrivals_beyond_the_phase": "more threads arrive at an mbarrier",
    "bytes_that_never_arrive": "nothing can run: thread",
    "box_inside_of_a_pattern": "a box that is swizzled begins at 128",
    "box_that_nobody_waits_for": "the block ended before its boxes had arrived",
    "product_without_a_fence": "wgmma without a fence",
    "product_that_nobody_waits_for": "ended before its products were waited for",
    "product_of_three_warps": "different numbers of products",
    "too_many_threads": "a block of 1056 threads",
    "too_much_shared_memory": "bytes of shared memory",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "misuse"
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    flags = ["-std=c++20", "-O1", "-g1", "-DINFLECTION_EMULATION", "-Wno-unknown-pragmas", *includes, *SANITIZE[:1]]
    sources = ["-x", "c++", str(HERE / "misuse.cu"), *map(str, sorted(HERE.glob("*.cpp")))]
    subprocess.run(["c++", *flags, *sources, "-o", str(path)], check=True)
    return path


def run(program, case, seed=0):
    return subprocess.run([str(program), case, str(seed)], capture_output=True, text=True, errors="replace")


def numbers(program, case, seed=0):
    done = run(program, case, seed)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("case", CAUGHT)
def test_misuse_ends_the_program_and_is_named(program, case):
    done = run(program, case)
    assert done.returncode != 0
    assert CAUGHT[case] in done.stderr


def test_barriers_and_shuffles_add_up_in_any_order_of_threads(program):
    for seed in range(5):
        assert numbers(program, "sum_of_block", seed) == [2016.0] * 64


def test_shared_memory_that_was_never_written_reads_as_nan(program):
    assert all(math.isnan(x) for x in numbers(program, "shared_memory_never_written"))


def test_a_race_shows_in_the_result_and_changes_with_the_order_of_threads(program):
    right = [float((i + 1) % 64) for i in range(64)]
    races = [numbers(program, "neighbour_read_without_a_barrier", seed) for seed in range(4)]
    assert all(any(math.isnan(x) for x in race) for race in races)
    assert len({str(race) for race in races}) > 1
    assert all(x == y or math.isnan(x) for race in races for x, y in zip(race, right, strict=True))
    assert numbers(program, "counter_that_is_not_atomic")[0] < 64


def test_an_asynchronous_copy_arrives_when_it_is_waited_for_and_not_before(program):
    assert numbers(program, "copy_read_when_it_has_arrived") == [float(i) for i in range(64)]
    assert any(math.isnan(x) for x in numbers(program, "copy_read_too_early"))


@pytest.mark.parametrize("case", ["product_by_columns", "product_by_rows"])
def test_fragments_of_tensor_cores_lie_as_the_manual_says(program, case):
    done = run(program, case)
    assert done.returncode == 0, done.stdout + done.stderr


RIGHT = ["box_inside", "box_across_the_ends", "box_before_the_beginning", "phases", "product_of_bf16", "product_of_f16"]


@pytest.mark.parametrize("case", RIGHT)
def test_boxes_phases_and_products_of_a_group_are_what_the_manual_says(program, case):
    for seed in range(3):  # boxes arrive at other times
        done = run(program, case, seed)
        assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("case", ["product_read_too_early", "product_of_a_matrix_overwritten"])
def test_a_product_is_carried_out_when_it_is_waited_for_and_not_before(program, case):
    done = run(program, case)
    assert done.returncode == 1 and ("is nan" in done.stdout) == (case == "product_read_too_early")


def test_numbers_in_pairs_are_compared_as_the_manual_says(program):
    found = [int(x) for x in numbers(program, "pairs")]
    assert found[::2] == found[1::2]  # front and back
    nan, one, minus_zero, least, infinity = 0x7FFF, 0x3C00, 0x8000, 0x0001, 0x7C00
    assert found[:16:2] == [nan, nan, 0, 0, least, infinity, one | 0x8000, one]  # max.NaN
    assert found[16:32:2] == [one, one, minus_zero, minus_zero, least | 0x8000, one, infinity | 0x8000, one]  # min
    assert found[32:48:2] == [0, 0, 0xFFFF, 0xFFFF, 0, 0, 0, 0xFFFF]  # set.eq
    assert found[48::2] == [nan, nan, 0, 0, least, 0x7F80, 0xBF80, 0x3F80]  # max.NaN.bf16x2
