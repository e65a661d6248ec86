import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_train.images.crop import Box, random_resized_crop

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
sides = st.integers(1, 5000)


@given(sides, sides, st.integers(0, 2**32), st.sampled_from([RATIO, (0.4, 0.5), (2.0, 3.0)]))
def test_every_box_lies_in_the_image(
    width: int, height: int, seed: int, ratio: tuple[float, float]
) -> None:
    box = random_resized_crop(np.random.default_rng(seed), width, height, SCALE, ratio)
    assert box.width >= 1 and box.height >= 1 and box.left >= 0 and box.top >= 0
    assert box.left + box.width <= width and box.top + box.height <= height


def test_shares_aspects_and_places_are_spread_as_the_paper_says() -> None:
    rng = np.random.default_rng(0)
    boxes = [random_resized_crop(rng, 1000, 1000, (0.1, 0.5), RATIO) for _ in range(4000)]
    share = np.array([b.width * b.height / 1e6 for b in boxes])
    aspect = np.array([math.log(b.width / b.height) for b in boxes])
    place = np.array([b.left / (1000 - b.width) for b in boxes])
    for values, low, high in (
        (share, 0.1, 0.5),
        (aspect, -math.log(4 / 3), math.log(4 / 3)),
        (place, 0, 1),
    ):
        assert low - 0.01 <= values.min() and values.max() <= high + 0.01
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert np.std(values) == pytest.approx((high - low) / math.sqrt(12), rel=0.03)  # uniform


def test_a_generator_in_the_same_state_gives_the_same_box() -> None:
    boxes = [
        random_resized_crop(np.random.Generator(np.random.Philox(key=7)), 500, 375, SCALE, RATIO)
        for _ in "ab"
    ]
    assert (
        boxes == [Box(left=94, top=132, width=181, height=162)] * 2
    )  # and for ever: a resumed run depends on it


@pytest.mark.parametrize(
    ("width", "height", "box"), [(1000, 10, Box(493, 0, 13, 10)), (1, 900, Box(0, 449, 1, 1))]
)
def test_an_image_too_thin_for_any_try_gets_the_central_box(
    width: int, height: int, box: Box
) -> None:
    assert random_resized_crop(np.random.default_rng(0), width, height, (1.0, 1.0), RATIO) == box
