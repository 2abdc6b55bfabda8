"""posttrain/metrics/pisa.py: hand values, brute force, and laws."""

import math
from typing import Any

import numpy as np
import pytest

from posttrain.metrics import pisa

SIZE = 64
UNIT = math.sqrt(2) * SIZE
CONVENTIONS = ["paper", "released"]


def blob(x: float, y: float, radius: float = 5.0, size: int = SIZE) -> np.ndarray:
    """A disc (H, W) around pixel (x, y)."""
    rows, columns = np.mgrid[:size, :size]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def clip(frames: int = 6, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """A disc that moves down 3 pixels per frame, displaced by (dx, dy)."""
    return np.stack([blob(30 + dx, 12 + 3 * i + dy) for i in range(frames)])


def random_masks(seed: int, frames: int = 3) -> np.ndarray:
    """Ragged masks: random pixels of a random rectangle."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((frames, SIZE, SIZE), bool)
    for mask in masks:
        x, y, w, h = rng.integers(4, 28, 4)
        mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.7
        mask[y, x] = True
    return masks


def score(generated: np.ndarray, true: np.ndarray, fps: float, fps_true: float, *convention: Any) -> dict[str, float]:
    """Of a video at one rate."""
    return pisa.score(generated, true, pisa.even_times(len(generated), fps), fps_true, *convention)


def brute_force_chamfer(a: np.ndarray, b: np.ndarray) -> float:
    p, q = np.argwhere(a).astype(np.float64), np.argwhere(b).astype(np.float64)
    distance = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    return float(distance.min(1).mean() + distance.min(0).mean())


def test_hand_vector_of_a_displaced_mask() -> None:
    true, generated = clip(), clip(dx=3, dy=4)
    assert score(generated, true, 16, 16)["l2"] == pytest.approx(5 / UNIT)
    assert score(generated, true, 16, 16)["l2"] == pytest.approx(0.05524, abs=5e-6)
    assert score(generated, true, 16, 16, "released")["l2"] == pytest.approx(0.03867, abs=5e-6)


def test_hand_vector_of_single_pixels() -> None:
    true, generated = np.zeros((2, 1, SIZE, SIZE), np.uint8)
    true[0, 10, 10] = generated[0, 14, 13] = 1
    for convention, l2 in (("paper", 5.0), ("released", 3.5)):
        scores = score(generated, true, 16, 16, convention)
        assert scores["l2"] == pytest.approx(l2 / UNIT)
        assert scores["chamfer"] == pytest.approx(10 / UNIT)  # 5 pixels there, 5 back
        assert scores["iou"] == 0
        assert scores["vanished"] == 0


def test_hand_vector_of_a_frame_with_half_the_object() -> None:
    true = np.zeros((1, SIZE, SIZE), bool)
    true[0, 20, 20:24] = True
    generated = true.copy()
    generated[0, 20, 22:] = False
    scores = score(generated, true, 16, 16)
    assert scores["l2"] == pytest.approx(1 / UNIT)
    assert scores["chamfer"] == pytest.approx((0 + (1 + 2) / 4) / UNIT)
    assert scores["iou"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_chamfer_equals_brute_force(seed: int, convention: pisa.Convention) -> None:
    a, b = random_masks(seed), random_masks(seed + 100)
    expected = np.mean([brute_force_chamfer(x, y) for x, y in zip(a, b, strict=True)]) / UNIT
    assert score(a, b, 16, 16, convention)["chamfer"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_identity_and_symmetry(convention: pisa.Convention) -> None:
    a, b = random_masks(1), random_masks(2)
    assert score(a, a, 16, 16, convention) == {"l2": 0, "chamfer": 0, "iou": 1, "vanished": 0, "span": 1}
    assert score(a, b, 16, 16, convention) == pytest.approx(score(b, a, 16, 16, convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_moving_both_clips_changes_nothing(convention: pisa.Convention) -> None:
    a, b = random_masks(1), random_masks(2)
    moved = [np.roll(masks, (5, 7), (1, 2)) for masks in (a, b)]
    assert score(*moved, 16, 16, convention) == pytest.approx(score(a, b, 16, 16, convention))


def test_scale_free() -> None:
    a, b = random_masks(1), random_masks(2)
    large = [np.kron(masks, np.ones((1, 4, 4), bool)) for masks in (a, b)]
    small, big = score(a, b, 16, 16), score(*large, 16, 16)
    assert big["l2"] == pytest.approx(small["l2"])
    assert big["iou"] == pytest.approx(small["iou"])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_mask_values(dtype: type) -> None:
    a, b = random_masks(1), random_masks(2)
    expected = score(a, b, 16, 16)
    assert score(a.astype(dtype), b.astype(dtype), 16, 16) == expected
    if dtype is not bool:
        assert score(a.astype(dtype) * dtype(255), b.astype(dtype), 16, 16) == expected


def test_released_takes_only_ones_for_the_object() -> None:
    a = random_masks(1).astype(np.uint8) * 255
    scores = score(a, a, 16, 16, "released")
    assert math.isnan(scores["l2"])
    assert math.isnan(scores["chamfer"])
    assert scores["iou"] == 1


def test_released_forgives_a_vanished_object_and_paper_does_not() -> None:
    true = clip()
    generated = true.copy()
    generated[1:] = False
    assert score(generated, true, 16, 16, "released") == {
        "l2": 0,
        "chamfer": 0,
        "iou": pytest.approx(1 / 6),
        "vanished": pytest.approx(5 / 6),
        "span": 1,
    }
    assert score(generated, true, 16, 16) == {
        "l2": pytest.approx(5 / 6),
        "chamfer": pytest.approx(2 * 5 / 6),
        "iou": pytest.approx(1 / 6),
        "vanished": pytest.approx(5 / 6),
        "span": 1,
    }


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (64, 40)])
def test_vanishing_never_pays(shape: tuple[int, int]) -> None:
    """A pixel in the farthest corner, the worst mask there is, still scores no worse than none."""
    true, generated = np.zeros((2, 3, *shape), bool)
    true[:, 0, 0] = generated[:, -1, -1] = True
    gone = generated.copy()
    gone[1] = False
    present, absent = (score(masks, true, 16, 16) for masks in (generated, gone))
    assert absent["l2"] >= present["l2"]
    assert absent["chamfer"] >= present["chamfer"]
    assert absent["iou"] <= present["iou"]
    assert absent["vanished"] == pytest.approx(1 / 3)


def test_frames_without_a_true_object_count_by_iou_alone() -> None:
    true = clip(4)
    generated = clip(4, dx=3, dy=4)
    true[2:] = False
    generated[3] = False
    scores = score(generated, true, 16, 16)
    seen = score(generated[:2], true[:2], 16, 16)
    assert scores["l2"] == pytest.approx(5 / UNIT)
    assert scores["chamfer"] == pytest.approx(seen["chamfer"])
    assert scores["iou"] == pytest.approx((2 * seen["iou"] + 0 + 1) / 4)
    assert scores["vanished"] == 0


def test_no_true_object_at_all_has_no_distance() -> None:
    empty = np.zeros((2, SIZE, SIZE), bool)
    scores = score(empty, empty, 16, 16)
    assert math.isnan(scores["l2"])
    assert scores["iou"] == 1


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("released", [0, 7, 15, 22, 30, 37]), ("paper", [0, 8, 15, 23, 30, 38])],
)
def test_frames_are_matched_in_time(convention: pisa.Convention, expected: list[int]) -> None:
    at_16 = pisa.even_times(6, 16)
    assert pisa.true_frames(at_16, 100, 120, convention).tolist() == expected
    assert pisa.true_frames(pisa.even_times(33, 16), 240, 120, convention)[-1] <= 239
    # frames past the end of the true clip are not compared
    assert pisa.true_frames(at_16, 20, 120, convention).tolist() == expected[:3]
    # a true clip with fewer frames per second repeats
    assert pisa.true_frames(at_16, 3, 8, "released").tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("convention", "rate"), [("paper", 24), ("paper", 60), ("released", 24), ("released", 60)])
def test_times_that_a_file_rounds_lead_to_the_same_frames(convention: pisa.Convention, rate: int) -> None:
    """WebM counts thousandths of a second: 300 frames against 120 true ones per second, of which rate is a part."""
    times = pisa.even_times(300, rate)
    assert pisa.true_frames(times.round(3), 10_000, 120, convention).tolist() == [i * 120 // rate for i in range(300)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_faster_camera_changes_nothing(convention: pisa.Convention) -> None:
    slow = clip(8)
    fast = np.repeat(clip(8), 3, axis=0)  # 48 frames per second; each of the slow frames is shown three times
    assert score(slow, fast, 16, 48, convention)["iou"] == 1
    assert score(slow[:5], fast, 16, 48, convention)["l2"] == (0 if convention == "released" else 3 / 8)


@pytest.mark.parametrize("frames", [5, 31])
def test_what_a_short_video_lacks_is_charged_by_hand(frames: int) -> None:
    """The first frame of a disc that falls a pixel a frame, frozen: 33 true frames, of which `frames` are there."""
    true = np.stack([blob(30, 12 + i) for i in range(33)])
    frozen = np.repeat(true[:1], frames, 0)
    lacking, gaps = 33 - frames, np.arange(frames)
    found, cut = score(frozen, true, 16, 16), score(frozen, true, 16, 16, "released")
    assert found["l2"] == pytest.approx((gaps.sum() / UNIT + lacking) / 33)
    assert found["vanished"] == pytest.approx(lacking / 33)
    assert found["span"] == pytest.approx(frames / 33)
    assert cut["l2"] == pytest.approx(gaps.mean() / 2 / UNIT)
    assert (cut["span"], cut["vanished"]) == (found["span"], 0)
    whole = score(np.repeat(true[:1], 33, 0), true, 16, 16)
    assert whole["l2"] < found["l2"]
    assert whole["iou"] >= found["iou"]
    assert whole["span"] == 1


def test_the_last_picture_is_shown_for_a_whole_frame() -> None:
    """Two seconds at 24 frames per second, and 32 of 33 frames, reach the true frame at 2 s, which is compared."""
    true = np.stack([blob(30, 12 + i) for i in range(33)])
    found = score(true[:32], true, 16, 16)
    assert found["l2"] == pytest.approx(1 / UNIT / 33)
    assert (found["span"], found["vanished"]) == (1, 0)
    at_24 = np.stack([blob(30, 12 + 16 * t) for t in pisa.even_times(48, 24)])
    assert score(at_24, true, 24, 16)["span"] == 1
    assert score(at_24[:46], true, 24, 16)["span"] == pytest.approx(46 / 49)


def test_missing_frames_without_a_true_object_are_right() -> None:
    true = clip(6)
    true[3:] = False
    found = score(true[:3], true, 16, 16)
    assert found == {"l2": 0, "chamfer": 0, "iou": 1, "vanished": 0, "span": pytest.approx(0.5)}


def test_a_frame_counts_by_the_time_that_it_stands_for() -> None:
    """Crowded early frames, in which nothing has moved yet, do not outweigh the late ones. By hand: 0 and 1 s."""
    true = np.stack([blob(20, 20 + 10 * (i > 4)) for i in range(9)])  # 8 frames per second, it jumps after 0.5 s
    held = np.repeat(true[:1], 5, 0)
    times = np.array([0.0, 0.01, 0.02, 0.03, 1.0])  # steps of 0.25 s on average
    late = (1.125 - 0.515) / (1.125 + 0.125)
    found = pisa.score(held, true, times, 8)
    assert found["l2"] == pytest.approx(late * 10 / UNIT)
    assert found["span"] == 1
    assert pisa.score(held, true, times, 8, "released")["l2"] == pytest.approx(10 / 5 / 2 / UNIT)


def test_other_rates_of_one_fall_give_the_same_numbers() -> None:
    """Filmed at 24, 30, 60 frames per second and at any moments: L2 within 0.002, the contact within a gap."""
    true, late = fall(0.46, 0.3), 1 / 16
    expected = score(fall(0.46, 0.3, late), true, 16, 16)
    rng = np.random.default_rng(0)
    moments = {rate: pisa.even_times(2 * rate + 1, rate) for rate in (24, 30, 60)}
    moments[0] = np.array([0, *np.sort(rng.choice(np.arange(1, 60), 40, replace=False)), 60]) / 30
    for times in moments.values():
        masks = fall(0.46, 0.3, late, times=times)
        found = pisa.score(masks, true, times, 16)
        assert found["l2"] == pytest.approx(expected["l2"], abs=0.002)
        assert found["iou"] == pytest.approx(expected["iou"], abs=0.02)
        assert found["span"] > 0.95
        assert pisa.contact_time(masks, times) == pytest.approx(0.46 + late, abs=0.4 * np.diff(times).max())


def test_wrong_input_is_refused() -> None:
    masks = clip()
    with pytest.raises(ValueError, match="shape"):
        score(masks[0], masks, 16, 16)
    with pytest.raises(ValueError, match="picture sizes"):
        score(masks[:, :32], masks, 16, 16)
    with pytest.raises(ValueError, match="frame rate"):
        score(masks, masks, 16, 0)
    for wrong in (np.arange(5), np.arange(6) + 1, np.zeros(6), np.arange(6) * np.nan):
        with pytest.raises(ValueError, match="times"):
            pisa.score(masks, masks, wrong, 16)
    with pytest.raises(ValueError, match="convention"):
        score(masks, masks, 16, 16, "mean")
    with pytest.raises(ValueError, match="threshold"):
        score(masks * 0.3, masks, 16, 16)


# ---------------------------------------------------------------------------------------------------- time of impact


def test_drop_time() -> None:
    assert pisa.drop_time(1.0) == pytest.approx(0.451524, abs=1e-6)
    assert pisa.drop_time(9.81 * 0.5**2 / 2) == pytest.approx(0.5)


def test_time_error_formula() -> None:
    # the object lands between frames 7 and 8 of 16 per second: 0.4375 s to 0.5 s
    times = pisa.even_times(33, 16)
    assert pisa.frame_time_error(8, 0.45, times) == 0
    assert pisa.frame_time_error(8, 0.4375, times) == 0
    assert pisa.frame_time_error(8, 0.5, times) == 0
    assert pisa.frame_time_error(8, 0.55, times) == pytest.approx(0.05)
    assert pisa.frame_time_error(8, 0.40, times) == pytest.approx(0.0375)
    assert pisa.frame_time_error(1, 0.2, np.array([0.0, 0.4, 0.5])) == 0
    assert pisa.frame_time_error(2, 0.2, np.array([0.0, 0.4, 0.5])) == pytest.approx(0.2)


@pytest.mark.parametrize("contact", [0.26, 0.3125, 0.4, 0.5, 0.61])
def test_known_contact_has_no_time_error(contact: float) -> None:
    frame = pisa.first_frame_after(contact, 16)
    assert (frame - 1) / 16 <= contact <= frame / 16
    assert pisa.frame_time_error(frame, contact, pisa.even_times(33, 16)) == 0


AT_16 = pisa.even_times(33, 16)


def fall(contact: float, restitution: float, delay: float = 0.0, times: np.ndarray = AT_16) -> np.ndarray:
    """Discs falling freely at 28 pixels per metre, bouncing once or resting; at rest for `delay` seconds first."""
    t = np.maximum(times - delay, 0)
    after = np.maximum(t - contact, 0)
    bounce = np.maximum(restitution * 9.81 * contact * after - 9.81 * after**2 / 2, 0)
    height = 9.81 * np.minimum(t, contact) ** 2 / 2 - bounce
    return np.stack([blob(32, 8 + 28 * y, 4.6) for y in height])


@pytest.mark.parametrize("contact", np.linspace(0.3, 0.55, 6))
@pytest.mark.parametrize("restitution", [0.0, 0.3, 0.6])
def test_contact_is_found_with_and_without_a_bounce(contact: float, restitution: float) -> None:
    found = pisa.contact_time(fall(contact, restitution), AT_16)
    assert found is not None
    assert abs(found - contact) < 0.5 / 16  # half a frame, from masks of whole pixels


def test_a_late_start_is_a_late_contact() -> None:
    found = pisa.contact_time(fall(0.45, 0.2, delay=1 / 16), AT_16)
    assert found == pytest.approx(0.45 + 1 / 16, abs=0.5 / 16)


@pytest.mark.parametrize("drift", [0.0, 0.2, 0.5])
def test_no_contact_is_an_outcome(drift: float) -> None:
    masks = np.stack([blob(20 + drift * i, 20 + drift * i) for i in range(33)])
    result = pisa.time_error(masks, AT_16, drop_height=1.0)
    assert result == {
        "time_error": None,
        "time_offset": None,
        "impact_frame": None,
        "no_contact": 1,
        "t_drop": pytest.approx(math.sqrt(2 / 9.81)),
    }


def test_no_contact_while_still_falling() -> None:
    assert pisa.contact_time(fall(0.6, 0.0, times=AT_16[:8]), AT_16[:8]) is None


def test_no_contact_of_a_vanished_object() -> None:
    masks = fall(0.45, 0.0)
    masks[1:] = False
    assert pisa.time_error(masks, AT_16, drop_height=1.0)["no_contact"] == 1


def test_time_error_of_true_and_late_clips() -> None:
    t_c = 0.46
    height = 9.81 * t_c**2 / 2
    assert pisa.time_error(fall(t_c, 0.3), AT_16, height)["time_error"] == pytest.approx(0, abs=1e-9)
    late = pisa.time_error(fall(0.6, 0.3), AT_16, height)
    assert late["no_contact"] == 0
    assert late["time_error"] == pytest.approx(9 / 16 - t_c)
    # twice as slow a world: the same clip shown at half the frames per second
    assert pisa.time_error(fall(t_c, 0.3), 2 * AT_16, height)["time_error"] == pytest.approx(7 / 8 - t_c)


def test_the_offset_is_signed_and_sees_less_than_a_frame() -> None:
    """Contacts 15 ms early: a quarter of a frame, for which the paper's error is mostly 0."""
    early = [pisa.time_error(fall(t - 0.015, 0.3), AT_16, 9.81 * t**2 / 2) for t in np.linspace(0.42, 0.54, 8)]
    assert np.mean([found["time_offset"] for found in early]) == pytest.approx(-15, abs=6)
    assert np.mean([found["time_error"] == 0 for found in early]) > 0.5
