"""posttrain/metrics/pisa.py: hand values, brute force, and laws."""

import math

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


def brute_force_chamfer(a: np.ndarray, b: np.ndarray) -> float:
    p, q = np.argwhere(a).astype(np.float64), np.argwhere(b).astype(np.float64)
    distance = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    return float(distance.min(1).mean() + distance.min(0).mean())


def test_hand_vector_of_a_displaced_mask() -> None:
    true, generated = clip(), clip(dx=3, dy=4)
    assert pisa.score(generated, true, 16, 16)["l2"] == pytest.approx(5 / UNIT)
    assert pisa.score(generated, true, 16, 16)["l2"] == pytest.approx(0.05524, abs=5e-6)
    assert pisa.score(generated, true, 16, 16, "released")["l2"] == pytest.approx(0.03867, abs=5e-6)


def test_hand_vector_of_single_pixels() -> None:
    true, generated = np.zeros((2, 1, SIZE, SIZE), np.uint8)
    true[0, 10, 10] = generated[0, 14, 13] = 1
    for convention, l2 in (("paper", 5.0), ("released", 3.5)):
        scores = pisa.score(generated, true, 16, 16, convention)
        assert scores["l2"] == pytest.approx(l2 / UNIT)
        assert scores["chamfer"] == pytest.approx(10 / UNIT)  # 5 pixels there, 5 back
        assert scores["iou"] == 0
        assert scores["vanished"] == 0


def test_hand_vector_of_a_frame_with_half_the_object() -> None:
    true = np.zeros((1, SIZE, SIZE), bool)
    true[0, 20, 20:24] = True
    generated = true.copy()
    generated[0, 20, 22:] = False
    scores = pisa.score(generated, true, 16, 16)
    assert scores["l2"] == pytest.approx(1 / UNIT)
    assert scores["chamfer"] == pytest.approx((0 + (1 + 2) / 4) / UNIT)
    assert scores["iou"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_chamfer_equals_brute_force(seed: int, convention: pisa.Convention) -> None:
    a, b = random_masks(seed), random_masks(seed + 100)
    expected = np.mean([brute_force_chamfer(x, y) for x, y in zip(a, b, strict=True)]) / UNIT
    assert pisa.score(a, b, 16, 16, convention)["chamfer"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_identity_and_symmetry(convention: pisa.Convention) -> None:
    a, b = random_masks(1), random_masks(2)
    assert pisa.score(a, a, 16, 16, convention) == {"l2": 0, "chamfer": 0, "iou": 1, "vanished": 0}
    assert pisa.score(a, b, 16, 16, convention) == pytest.approx(pisa.score(b, a, 16, 16, convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_moving_both_clips_changes_nothing(convention: pisa.Convention) -> None:
    a, b = random_masks(1), random_masks(2)
    moved = [np.roll(masks, (5, 7), (1, 2)) for masks in (a, b)]
    assert pisa.score(*moved, 16, 16, convention) == pytest.approx(pisa.score(a, b, 16, 16, convention))


def test_scale_free() -> None:
    a, b = random_masks(1), random_masks(2)
    large = [np.kron(masks, np.ones((1, 4, 4), bool)) for masks in (a, b)]
    small, big = pisa.score(a, b, 16, 16), pisa.score(*large, 16, 16)
    assert big["l2"] == pytest.approx(small["l2"])
    assert big["iou"] == pytest.approx(small["iou"])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_mask_values(dtype: type) -> None:
    a, b = random_masks(1), random_masks(2)
    expected = pisa.score(a, b, 16, 16)
    assert pisa.score(a.astype(dtype), b.astype(dtype), 16, 16) == expected
    if dtype is not bool:
        assert pisa.score(a.astype(dtype) * dtype(255), b.astype(dtype), 16, 16) == expected


def test_released_takes_only_ones_for_the_object() -> None:
    a = random_masks(1).astype(np.uint8) * 255
    scores = pisa.score(a, a, 16, 16, "released")
    assert math.isnan(scores["l2"])
    assert math.isnan(scores["chamfer"])
    assert scores["iou"] == 1


def test_released_forgives_a_vanished_object_and_paper_does_not() -> None:
    true = clip()
    generated = true.copy()
    generated[1:] = False
    assert pisa.score(generated, true, 16, 16, "released") == {
        "l2": 0,
        "chamfer": 0,
        "iou": pytest.approx(1 / 6),
        "vanished": pytest.approx(5 / 6),
    }
    assert pisa.score(generated, true, 16, 16) == {
        "l2": pytest.approx(5 / 6),
        "chamfer": pytest.approx(2 * 5 / 6),
        "iou": pytest.approx(1 / 6),
        "vanished": pytest.approx(5 / 6),
    }


@pytest.mark.parametrize("shape", [(64, 64), (40, 64), (64, 40)])
def test_vanishing_never_pays(shape: tuple[int, int]) -> None:
    """A pixel in the farthest corner, the worst mask there is, still scores no worse than none."""
    true, generated = np.zeros((2, 3, *shape), bool)
    true[:, 0, 0] = generated[:, -1, -1] = True
    gone = generated.copy()
    gone[1] = False
    present, absent = (pisa.score(masks, true, 16, 16) for masks in (generated, gone))
    assert absent["l2"] >= present["l2"]
    assert absent["chamfer"] >= present["chamfer"]
    assert absent["iou"] <= present["iou"]
    assert absent["vanished"] == pytest.approx(1 / 3)


def test_frames_without_a_true_object_count_by_iou_alone() -> None:
    true = clip(4)
    generated = clip(4, dx=3, dy=4)
    true[2:] = False
    generated[3] = False
    scores = pisa.score(generated, true, 16, 16)
    seen = pisa.score(generated[:2], true[:2], 16, 16)
    assert scores["l2"] == pytest.approx(5 / UNIT)
    assert scores["chamfer"] == pytest.approx(seen["chamfer"])
    assert scores["iou"] == pytest.approx((2 * seen["iou"] + 0 + 1) / 4)
    assert scores["vanished"] == 0


def test_no_true_object_at_all_has_no_distance() -> None:
    empty = np.zeros((2, SIZE, SIZE), bool)
    scores = pisa.score(empty, empty, 16, 16)
    assert math.isnan(scores["l2"])
    assert scores["iou"] == 1


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("released", [0, 7, 15, 22, 30, 37]), ("paper", [0, 8, 15, 23, 30, 38])],
)
def test_frames_are_matched_in_time(convention: pisa.Convention, expected: list[int]) -> None:
    assert pisa.true_frames(6, 100, 16, 120, convention).tolist() == expected
    assert pisa.true_frames(33, 240, 16, 120, convention)[-1] <= 239
    # frames past the end of the true clip are not compared
    assert pisa.true_frames(6, 20, 16, 120, convention).tolist() == expected[:3]
    # a true clip with fewer frames per second repeats
    assert pisa.true_frames(6, 3, 16, 8, "released").tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_faster_camera_changes_nothing(convention: pisa.Convention) -> None:
    slow = clip(8)
    fast = np.repeat(clip(8), 3, axis=0)  # 48 frames per second; each of the slow frames is shown three times
    assert pisa.score(slow, fast, 16, 48, convention)["iou"] == 1
    assert pisa.score(slow[:5], fast, 16, 48, convention)["l2"] == 0


def test_wrong_input_is_refused() -> None:
    masks = clip()
    with pytest.raises(ValueError, match="shape"):
        pisa.score(masks[0], masks, 16, 16)
    with pytest.raises(ValueError, match="picture sizes"):
        pisa.score(masks[:, :32], masks, 16, 16)
    with pytest.raises(ValueError, match="frame rates"):
        pisa.score(masks, masks, 0, 16)
    with pytest.raises(ValueError, match="convention"):
        pisa.score(masks, masks, 16, 16, "mean")
    with pytest.raises(ValueError, match="threshold"):
        pisa.score(masks * 0.3, masks, 16, 16)


# ---------------------------------------------------------------------------------------------------- time of impact


def test_drop_time() -> None:
    assert pisa.drop_time(1.0) == pytest.approx(0.451524, abs=1e-6)
    assert pisa.drop_time(9.81 * 0.5**2 / 2) == pytest.approx(0.5)


def test_time_error_formula() -> None:
    # the object lands between frames 7 and 8 of 16 per second: 0.4375 s to 0.5 s
    assert pisa.frame_time_error(8, 0.45, 16) == 0
    assert pisa.frame_time_error(8, 0.4375, 16) == 0
    assert pisa.frame_time_error(8, 0.5, 16) == 0
    assert pisa.frame_time_error(8, 0.55, 16) == pytest.approx(0.05)
    assert pisa.frame_time_error(8, 0.40, 16) == pytest.approx(0.0375)


@pytest.mark.parametrize("contact", [0.26, 0.3125, 0.4, 0.5, 0.61])
def test_known_contact_has_no_time_error(contact: float) -> None:
    frame = pisa.first_frame_after(contact, 16)
    assert (frame - 1) / 16 <= contact <= frame / 16
    assert pisa.frame_time_error(frame, contact, 16) == 0


def fall(contact: float, restitution: float, delay: float = 0.0, frames: int = 33, fps: float = 16) -> np.ndarray:
    """Discs falling freely at 28 pixels per metre, bouncing once or resting; at rest for `delay` seconds first."""
    t = np.maximum(np.arange(frames) / fps - delay, 0)
    after = np.maximum(t - contact, 0)
    bounce = np.maximum(restitution * 9.81 * contact * after - 9.81 * after**2 / 2, 0)
    height = 9.81 * np.minimum(t, contact) ** 2 / 2 - bounce
    return np.stack([blob(32, 8 + 28 * y, 4.6) for y in height])


@pytest.mark.parametrize("contact", np.linspace(0.3, 0.55, 6))
@pytest.mark.parametrize("restitution", [0.0, 0.3, 0.6])
def test_contact_is_found_with_and_without_a_bounce(contact: float, restitution: float) -> None:
    found = pisa.contact_time(fall(contact, restitution), 16)
    assert found is not None
    assert abs(found - contact) < 0.5 / 16  # half a frame, from masks of whole pixels


def test_a_late_start_is_a_late_contact() -> None:
    found = pisa.contact_time(fall(0.45, 0.2, delay=1 / 16), 16)
    assert found == pytest.approx(0.45 + 1 / 16, abs=0.5 / 16)


@pytest.mark.parametrize("drift", [0.0, 0.2, 0.5])
def test_no_contact_is_an_outcome(drift: float) -> None:
    masks = np.stack([blob(20 + drift * i, 20 + drift * i) for i in range(33)])
    result = pisa.time_error(masks, 16, drop_height=1.0)
    assert result == {
        "time_error": None,
        "impact_frame": None,
        "no_contact": 1,
        "t_drop": pytest.approx(math.sqrt(2 / 9.81)),
    }


def test_no_contact_while_still_falling() -> None:
    assert pisa.contact_time(fall(0.6, 0.0, frames=8), 16) is None


def test_no_contact_of_a_vanished_object() -> None:
    masks = fall(0.45, 0.0)
    masks[1:] = False
    assert pisa.time_error(masks, 16, drop_height=1.0)["no_contact"] == 1


def test_time_error_of_true_and_late_clips() -> None:
    t_c = 0.46
    height = 9.81 * t_c**2 / 2
    assert pisa.time_error(fall(t_c, 0.3), 16, height)["time_error"] == pytest.approx(0, abs=1e-9)
    late = pisa.time_error(fall(0.6, 0.3), 16, height)
    assert late["no_contact"] == 0
    assert late["time_error"] == pytest.approx(9 / 16 - t_c)
    # twice as slow a world: the same clip shown at half the frames per second
    assert pisa.time_error(fall(t_c, 0.3), 8, height)["time_error"] == pytest.approx(7 / 8 - t_c)
