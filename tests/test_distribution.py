"""posttrain/metrics/distribution.py: hand values, brute force, integrals, and tests that reject what they should."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, ks_2samp, kstest

from posttrain.data.schema import Camera, ClipRow, facts
from posttrain.evaluation.benchmarks import distribution as benchmark
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import Record
from posttrain.metrics import distribution as d
from posttrain.metrics import pisa as metric
from posttrain.metrics.pisa import first_frame_after

CAMERA, FPS, FRAMES = 0.5, 16, 33
BETAS = [0.1, 0.35, -0.02, -0.1]  # the last one's ray meets the floor at 5 m
POCKET = 64 / 32 * 35  # focal length in pixels


def brute_force(beta: float, count: int, seed: int = 0) -> np.ndarray:
    """Fall times of depths drawn from U(2, 18), without those below the floor."""
    y = CAMERA + beta * np.random.default_rng(seed).uniform(2, 18, count)
    return np.sqrt(2 * y[y > 0] / 9.81)


def frames_of(times: np.ndarray) -> list[int | None]:
    return [k if (k := first_frame_after(t, FPS)) < FRAMES else None for t in times]


def draw(beta: float, rng: np.random.Generator, count: int = 128) -> list[int | None]:
    return frames_of(d.quantile(rng.random(count), d.drop_heights(beta, CAMERA)))


def law(beta: float, errors: d.Errors | None = None) -> np.ndarray:
    return d.frame_pmf(d.drop_heights(beta, CAMERA), FPS, FRAMES, errors=errors)


def test_slope_by_hand() -> None:
    np.testing.assert_allclose(d.slope(np.array([100, 128]), 256, 35 / 32 * 256), [0.1, 0])  # f = 35 mm, sensor 32 mm
    masks = np.zeros((3, 64, 64), bool)
    masks[0, 10:20, 5] = masks[1, 63, 5] = True
    np.testing.assert_array_equal(d.bottoms(masks), [20, 64, np.nan])
    np.testing.assert_allclose(d.slope(d.bottoms(masks), 64, POCKET), [12 / 70, -32 / 70, np.nan])


def test_drop_heights_by_hand() -> None:
    assert d.drop_heights(0.1, 0.5) == pytest.approx((0.7, 2.3))
    assert d.drop_heights(-0.02, 0.5) == pytest.approx((0.14, 0.46))
    assert d.drop_heights(-0.1, 0.5) == pytest.approx((0.0, 0.3))
    assert d.drop_heights(0.0, 0.5) == (0.5, 0.5)
    with pytest.raises(ValueError, match="below the floor from 2"):
        d.drop_heights(-0.3, 0.5)


def test_density_by_hand() -> None:
    heights = d.drop_heights(0.1, 0.5)
    assert d.density(np.array(0.5), heights) == pytest.approx(9.81 * 0.5 / (16 * 0.1))
    limits = np.sqrt(2 * np.array([0.7, 2.3]) / 9.81)
    np.testing.assert_array_equal(d.density(limits + np.array([-1e-6, 1e-6]), heights), [0, 0])
    assert d.density(np.array(-0.5), heights) == 0
    cut = d.drop_heights(-0.1, 0.5)  # 3 m of depth are left
    assert d.density(np.array(0.1), cut) == pytest.approx(9.81 * 0.1 / (3 * 0.1))


@pytest.mark.parametrize("beta", BETAS)
def test_density_integrates_to_the_cdf(beta: float) -> None:
    heights = d.drop_heights(beta, CAMERA)
    first, last = d.quantile(np.array([0.0, 1.0]), heights)
    assert quad(d.density, first, last, args=(heights,))[0] == pytest.approx(1, abs=1e-12)
    for t in np.linspace(first, last, 7):
        assert d.cdf(t, heights) == pytest.approx(quad(d.density, first, t, args=(heights,))[0], abs=1e-12)
        assert d.cdf(d.quantile(d.cdf(t, heights), heights), heights) == pytest.approx(d.cdf(t, heights), abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_law_equals_brute_force(beta: float) -> None:
    times = brute_force(beta, 400_000)
    heights = d.drop_heights(beta, CAMERA)
    assert kstest(times, lambda t: d.cdf(t, heights)).pvalue > 1e-3
    counts = np.bincount(np.ceil(times * FPS).astype(int), minlength=FRAMES + 1)
    pmf = law(beta)
    assert pmf.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(counts / len(times), pmf, atol=5 * 0.5 / math.sqrt(len(times)))


def test_one_height_is_a_point_mass() -> None:
    heights = d.drop_heights(0.0, CAMERA)
    t = math.sqrt(2 * CAMERA / 9.81)  # 5.11 frames
    assert d.cdf(np.array([t - 1e-9, t + 1e-9]), heights).tolist() == [0, 1]
    assert d.quantile(np.array([0.0, 0.3, 1.0]), heights) == pytest.approx([t] * 3)
    assert np.flatnonzero(law(0.0)).tolist() == [6]
    assert d.ks_test([6] * 20, law(0.0), np.random.default_rng(0))["p_value"] == 1
    assert d.ks_test([6] * 19 + [5], law(0.0), np.random.default_rng(0)) == {"statistic": 0.05, "p_value": 1 / 1000}


def test_frames_hold_the_times_up_to_them() -> None:
    """A contact at a frame's own time belongs to it, as in pisa.first_frame_after; none in the clip comes last."""
    height = 9.81 * (5 / FPS) ** 2 / 2
    assert d.frame_pmf((height, height), FPS, FRAMES)[first_frame_after(5 / FPS, FPS)] == 1
    assert d.frame_pmf((0.0, 0.0), FPS, FRAMES)[first_frame_after(0.0, FPS)] == 1
    assert d.frame_pmf((20.0, 20.0), FPS, FRAMES)[-1] == 1  # 2.02 s, and the last frame is at 2 s
    pmf = d.frame_pmf((9.81 / 2, 3 * 9.81 / 2), FPS, 17)  # t^2 from 1 to 3, the clip ends at 1
    assert pmf[-1] == pytest.approx(1, abs=1e-9)


def test_errors_of_the_estimator_are_convolved_in() -> None:
    errors = d.estimator_errors([5, 7, 6, None], [5, 6, 6, 6])
    assert errors == {0: 0.5, 1: 0.25, None: 0.25}
    assert law(0.0, errors)[[6, 7, FRAMES]].tolist() == [0.5, 0.25, 0.25]
    assert law(0.1, errors).sum() == pytest.approx(1)
    late = d.frame_pmf((4.0, 20.0), FPS, FRAMES, errors={40: 1.0})  # what is found too late is not found
    assert late[-1] == pytest.approx(1)
    exact, moved = law(0.1), law(0.1, {1: 1.0})
    np.testing.assert_allclose(moved[1:-1], exact[:-2])


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, -0.02])
def test_it_rejects_its_nominal_5_percent_and_the_continuous_test_does_not(beta: float) -> None:
    rng, heights, pmf, repeats = np.random.default_rng(1), d.drop_heights(beta, CAMERA), law(beta), 400
    samples = [draw(beta, rng) for _ in range(repeats)]
    ours = sum(d.ks_test(sample, pmf, rng, 199)["p_value"] <= 0.05 for sample in samples)
    low, high = binom.interval(0.999, repeats, 0.05)
    assert low <= ours <= high
    continuous = [kstest([k / FPS for k in sample], lambda t: d.cdf(t, heights)).pvalue for sample in samples]
    assert np.mean(np.array(continuous) <= 0.05) > 0.99
    drawn = [[k / FPS for k in draw(beta, rng, 1000)] for _ in range(20)]  # the paper's: 1,000 quantised draws
    theirs = [ks_2samp([k / FPS for k in sample], drawn[i % 20]).pvalue for i, sample in enumerate(samples)]
    assert np.mean(np.array(theirs) <= 0.05) < 0.03


def test_it_rejects_models_that_cover_too_little() -> None:
    rng, pmf = np.random.default_rng(2), law(0.1)
    middle = int(np.argmax(pmf.cumsum() > 0.5))
    for frozen in ([None] * 128, [middle] * 128, draw(0.1, rng)[:64] + [middle] * 64):
        assert d.ks_test(frozen, pmf, rng)["p_value"] <= 0.002
    narrow = frames_of(d.quantile(rng.uniform(0.25, 0.75, 128), d.drop_heights(0.1, CAMERA)))
    assert d.ks_test(narrow, pmf, rng)["p_value"] <= 0.002


def test_a_late_estimator_is_no_reason_to_reject_if_it_is_known() -> None:
    """One frame late: always rejected, unless calibration on true clips has told."""
    rng, pmf = np.random.default_rng(3), law(0.1)
    samples = [draw(0.1, rng) for _ in range(100)]
    late = [[k if k is None else k + 1 for k in sample] for sample in samples]
    assert all(d.ks_test(sample, pmf, rng, 199)["p_value"] <= 0.05 for sample in late)
    errors = d.estimator_errors(late[0], [k for k in samples[0] if k is not None])
    assert errors == {1: 1.0}
    rejected = sum(d.ks_test(sample, law(0.1, errors), rng, 199)["p_value"] <= 0.05 for sample in late)
    assert rejected <= binom.ppf(0.999, 100, 0.05)


def test_impact_frames_outside_the_clip_are_refused() -> None:
    for frames in ([], [FRAMES], [-1]):
        with pytest.raises(ValueError, match="impact frames"):
            d.ks_test(frames, law(0.1), np.random.default_rng(0))


@pytest.mark.parametrize(("beta", "depth"), [(0.1, 7.0), (-0.03, 9.0)])
def test_lifting_gives_the_fall_back(beta: float, depth: float) -> None:
    start = CAMERA + beta * depth
    t_drop = math.sqrt(2 * start / 9.81)
    t = np.arange(math.floor(t_drop * FPS) + 1) / FPS
    true = start - 9.81 * t**2 / 2
    z, heights = d.lift((true - CAMERA) / depth, t_drop, CAMERA)
    assert z == pytest.approx(depth)
    np.testing.assert_allclose(heights, true)
    assert d.fall_error(heights, np.arange(len(heights)) / FPS, t_drop) == pytest.approx(0, abs=1e-12)
    assert d.fall_error(np.append(heights + 0.1, 7.0), np.arange(len(heights) + 1) / FPS, t_drop) == pytest.approx(
        0.1
    )  # after the fall is no fall


def test_what_is_level_with_the_camera_cannot_be_lifted() -> None:
    z, heights = d.lift(np.array([0.0, -0.1]), 0.3, CAMERA)
    assert math.isnan(z)
    assert np.isnan(heights).all()
    assert math.isnan(d.fall_error(heights, np.arange(len(heights)) / FPS, 0.3))
    assert Counter(np.isnan(d.lift(np.array([0.1, np.nan]), 0.5, CAMERA)[1]).tolist()) == {False: 1, True: 1}


def fall(beta: float, depth: float) -> tuple[np.ndarray, ClipRow]:
    """Masks of a square that falls at some depth and stays on the floor, 256 pixels high, and its metadata row."""
    y = np.maximum(CAMERA + beta * depth - 9.81 * (np.arange(FRAMES) / FPS) ** 2 / 2, 0)
    rows = np.round(128 - 280 * (y - CAMERA) / depth).astype(int)
    masks = np.zeros((FRAMES, 256, 256), bool)
    for mask, row in zip(masks, rows, strict=True):
        mask[row - 30 : row, 100:130] = True
    camera = Camera((0.0, 0.0, CAMERA), ((280.0, 0, 128), (0, 280.0, 128), (0, 0, 1)))
    time = math.sqrt(2 * (CAMERA + beta * depth) / 9.81)
    known = {"beta": beta, "camera": camera, "gravity": (0, 0, -9.81), "contact_time": time, "depths": (2.0, 18.0)}
    return masks, ClipRow("a.mp4", "", FPS, FRAMES, (256, 256), **known)


FACTS = ("group", "beta", "depths", "camera", "gravity", "contact_time", "fps")


def record(
    model: str,
    frames_by_clip: list[list[int | None]],
    rows: list[ClipRow],
    lifted: list | None = None,
    group: int | None = None,
) -> Record:
    """As posttrain/evaluation/evaluate.py writes it, a group per row or one of all."""
    clips = [
        ClipScore(
            {},
            str(i),
            impact_frames=found,
            lifted=lifted or [None] * len(found),
            truth=facts(replace(row, group=i if group is None else group), FACTS),
        )
        for i, (found, row) in enumerate(zip(frames_by_clip, rows, strict=True))
    ]
    return Record(model, model, "falls", "falls", "", [256, 256], 1, len(clips), "pisa", FPS, FRAMES, 0.0, tuple(clips))


def test_a_run_that_covers_its_falls_and_one_that_does_not() -> None:
    rng = np.random.default_rng(4)
    rows = [fall(beta, 4.0)[1] for beta in (0.1, 0.2, -0.02, 0.3)]
    found = [draw(row.beta, rng) for row in rows]
    result = benchmark.falls(record("psft", found, rows), None, rng)
    assert result["rejected"] == np.mean([picture["p_value"] <= 0.05 for picture in result["pictures"]]) <= 0.25
    assert result["never"] == np.mean([frame is None for frames in found for frame in frames])
    assert (result["lifted"], result["fall_error"], result["inside"]) == (0, None, None)
    for picture in result["pictures"]:
        assert len(picture["pmf"]) == len(picture["measured"]) == FRAMES + 1
        assert sum(picture["measured"]) == pytest.approx(1)
        assert picture["videos"] == len(found[0])
    same = [[frames[0]] * 128 for frames in found]
    assert benchmark.falls(record("psft", same, rows), None, rng)["rejected"] == 1
    late = record("truth", [[first_frame_after(row.contact_time, FPS) + 1] for row in rows], rows)
    assert benchmark.falls(record("psft", found, rows), late, rng)["rejected"] == 1
    nearer = [replace(row, depths=(2.0, 6.0)) for row in rows]
    assert benchmark.falls(record("psft", found, nearer), None, rng)["rejected"] >= 0.75


def test_clips_of_one_picture_are_tested_together() -> None:
    row = fall(0.2, 4.0)[1]
    found = draw(0.2, np.random.default_rng(0))
    halves = record("psft", [found[:64], found[64:]], [row, row], group=7)
    whole = benchmark.falls(record("psft", [found], [row]), None, np.random.default_rng(1))
    assert benchmark.falls(halves, None, np.random.default_rng(1)) == whole


def test_what_is_lifted_is_counted() -> None:
    row = fall(0.2, 4.0)[1]
    lifts = [{"depth": depth, "fall_error": off} for depth, off in ((3.0, 0.1), (30.0, None), (9.0, 0.3))]
    result = benchmark.falls(record("psft", [[9] * 4], [row], [*lifts, None]), None, np.random.default_rng(0))
    assert (result["lifted"], result["fall_error"]) == (3, pytest.approx(0.2))
    assert result["inside"] == pytest.approx(2 / 3)


def test_true_clips_calibrate_and_can_be_lifted() -> None:
    falls = [(fall(0.2, depth), depth) for depth in (2.5, 5.0, 10.0)]
    found = [[metric.impact_frame(masks, metric.even_times(len(masks), FPS))] for (masks, _), _ in falls]
    clips = record("truth", found, [row for (_, row), _ in falls]).clips
    errors = benchmark.calibrate(clips)
    assert set(errors) <= {-1, 0, 1}
    assert sum(errors.values()) == pytest.approx(1)
    never = record("truth", [[None]], [replace(falls[0][0][1], contact_time=None)]).clips  # cut before it lands
    assert benchmark.calibrate([*never, *clips]) == errors
    for (masks, row), depth in falls:
        smaller = benchmark.lifted(masks[:, ::2, ::2], metric.even_times(len(masks), FPS), row)
        assert smaller is not None
        assert smaller["depth"] == pytest.approx(depth, rel=0.15)
        lifted = benchmark.lifted(masks, metric.even_times(len(masks), FPS), row)
        assert lifted is not None
        assert lifted["depth"] == pytest.approx(depth, rel=0.1)
        assert lifted["heights"][0] == pytest.approx(CAMERA + 0.2 * depth, rel=0.1)
        assert lifted["fall_error"] < 0.05 * lifted["heights"][0]
    frozen = np.repeat(falls[0][0][0][:1], FRAMES, axis=0)
    assert benchmark.lifted(frozen, metric.even_times(len(frozen), FPS), falls[0][0][1]) is None
    level, row = fall(0.0, 3.0)
    assert benchmark.lifted(level, metric.even_times(len(level), FPS), row) is None
