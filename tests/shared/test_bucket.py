"""Buckets: the 4n+1 rule, the grid, and the nearest aspect ratio."""

import math
from itertools import pairwise

import pytest

from shared.bucket import ASPECT_LIMIT, aspect_sizes, nearest_size, parse_resolution, round_frames
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 1), (2, 1), (3, 5), (4, 5), (8, 9), (12, 13), (16, 17), (81, 81), (83, 85)]
)
def test_frames_go_to_the_nearest_4n_plus_1_ties_up(asked: int, given: int) -> None:
    assert round_frames(asked) == given


def test_no_4n_plus_1_is_nearer_than_the_one_given() -> None:
    for asked in range(1, 200):
        assert min(abs(asked - (4 * n + 1)) for n in range(60)) == abs(asked - round_frames(asked))


@pytest.mark.parametrize("grid", [16, 32])
@pytest.mark.parametrize("side", [256, 384, 512, 768])
def test_sizes_lie_on_the_grid_near_the_area_and_within_the_aspect_limit(side: int, grid: int) -> None:
    for height, width in aspect_sizes(side, grid):
        assert height % grid == 0
        assert width % grid == 0
        assert 1 / ASPECT_LIMIT <= width / height <= ASPECT_LIMIT
        assert abs(height * width / side**2 - 1) <= grid / min(height, width)


def test_a_square_source_gets_the_square() -> None:
    assert nearest_size(1000, 1000, 512, 32) == (512, 512)


def test_the_bucket_is_the_nearest_in_log_aspect() -> None:
    for height, width in [(1080, 1920), (720, 1280), (1920, 1080), (480, 640), (100, 1000)]:
        chosen = nearest_size(height, width, 512, 32)
        miss = abs(math.log(chosen[1] / chosen[0] * height / width))
        assert all(miss <= abs(math.log(w / h * height / width)) + 1e-9 for h, w in aspect_sizes(512, 32))


@pytest.mark.parametrize("side", [256, 512])
def test_between_two_aspects_the_border_is_their_geometric_mean(side: int) -> None:
    for low, high in pairwise(sorted({width / height for height, width in aspect_sizes(side, 32)})):
        for wanted, display in ((low, math.sqrt(low * high) * 0.9999), (high, math.sqrt(low * high) * 1.0001)):
            height, width = nearest_size(1000, 1000 * display, side, 32)
            assert width / height == wanted


def test_an_exact_resolution_is_taken_as_it_is() -> None:
    assert nearest_size(1000, 300, (832, 480), 16) == (480, 832)


@pytest.mark.parametrize(("text", "sizes"), [("512", [512]), ("384, 512,384", [384, 512]), ("832x480", [(832, 480)])])
def test_resolutions_parse(text: str, sizes: list[object]) -> None:
    assert parse_resolution(text) == sizes


@pytest.mark.parametrize("text", ["", "abc", "512x", "0", "-5", "512;640"])
def test_nonsense_resolutions_are_refused_by_value(text: str) -> None:
    with pytest.raises(ConfigError, match="resolution"):
        parse_resolution(text)
