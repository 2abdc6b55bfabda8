"""posttrain/metrics/physics.py: discs that fall as the closed form says, laws, and what cannot be measured."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from posttrain.data.schema import ClipRow
from posttrain.metrics import physics
from posttrain.metrics.physics import QUANTITIES, Measure
from posttrain.studies import violations
from sim.physics.analytic import Fall, fall_time

SIZE, FRAMES, FPS, FOCAL, DEPTH = 64, 33, 16.0, 70.0, 1.6
PIXEL = DEPTH / FOCAL  # metres
DROP, RADIUS = 0.7, 0.14  # metres
START = 0.3  # metres from the picture's top to the centre
G = 9.81


def discs(
    fallen_F: np.ndarray,
    x_F: np.ndarray | float = 0.73,
    radius_F: np.ndarray | float = RADIUS,
    floor: float | None = None,
    size: int = SIZE,
) -> np.ndarray:
    """Masks (F, H, W) of a disc whose centre has `fallen_F` metres; nothing is seen `floor` metres below its start."""
    pixel = PIXEL * SIZE / size
    centres = (np.arange(size) + 0.5) * pixel
    x_F, radius_F = np.broadcast_to(x_F, fallen_F.shape), np.broadcast_to(radius_F, fallen_F.shape)
    dx, dy = centres - x_F[:, None, None], centres[:, None] - (START + fallen_F)[:, None, None]
    masks = dx**2 + dy**2 <= radius_F[:, None, None] ** 2
    return masks if floor is None else masks & (centres[:, None] <= START + floor)


def times(frames: int = FRAMES, fps: float = FPS) -> np.ndarray:
    return np.arange(frames) / fps


def bounce(gravity: float = G, release: float = 0.0, restitution: float = 0.5, drop: float = DROP) -> np.ndarray:
    """Metres fallen at the frames by a ball that lands `drop` below and bounces."""
    height, _ = Fall(drop, restitution, gravity).at(np.maximum(times() - release, 0.0))
    return drop - height


def measure(masks_FHW: np.ndarray, drop: float | None = DROP) -> dict[str, Any]:
    return physics.scorecard(masks_FHW, times(len(masks_FHW)), FOCAL, DEPTH, drop)


def near(measure: Measure, truth: float, within: float = 3.0) -> bool:
    return abs(measure.value - truth) <= within * measure.sigma


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("release", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("restitution", [0.0, 0.4, 0.8])
def test_a_bouncing_ball(share: float, release: float, restitution: float) -> None:
    card = measure(discs(bounce(share * G, release, restitution)))
    speed = math.sqrt(2 * share * G * DROP)
    truth = {
        "g": share * G,
        "release": release,
        "contact": release + fall_time(DROP, share * G),
        "penetration": 0.0,
        "energy_fall": (share - 1) * G * DROP,
        "energy_contact": (restitution**2 - 1) * speed**2 / 2,
        "restitution": restitution,
        "drift": 0.0,
        "jump": 0.0,
        "size": 0.0,
    }
    assert not [(name, card[name], value) for name, value in truth.items() if not near(card[name], value)]
    assert card["permanence"] == (1, 0)
    assert card["g"].value == pytest.approx(share * G, rel=0.05)
    assert card["contact"].value == pytest.approx(truth["contact"], abs=0.1 / FPS)


def test_the_fit_is_exact_without_pixels() -> None:
    fall = physics.fit_fall(times(), -bounce(release=0.11, restitution=0.6), 1 / FPS, PIXEL, SIZE)
    speed = math.sqrt(2 * G * DROP)
    expected = [0.0, G, 0.11, 0.11 + fall_time(DROP), 0.6 * speed, -G]
    assert fall.parameters == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_uncertainty_is_that_of_the_noise() -> None:
    """Paths with NOISE on every frame: errors are as large as the fit's sigma says, SCALE aside."""
    rng = np.random.default_rng(0)
    noise = physics.NOISE * PIXEL
    errors = []
    for _ in range(100):
        fall = physics.fit_fall(times(), -bounce() + rng.normal(scale=noise, size=FRAMES), 1 / FPS, PIXEL, SIZE)
        errors.append((fall.parameters[:3] - (0, G, 0)) / np.sqrt(np.diag(fall.covariance)[:3]))
    assert np.std(errors, axis=0) == pytest.approx(np.ones(3), abs=0.3)
    assert np.abs(np.mean(errors, axis=0)).max() < 0.5


def test_distance_and_lens_do_not_matter() -> None:
    """A picture twice as large, through twice the focal length or from half the distance, is the same world."""
    masks = discs(bounce(), 0.5 + 0.3 * times())
    large = np.kron(masks, np.ones((1, 2, 2), bool))
    card, far = measure(masks), physics.scorecard(masks, times(), FOCAL / 2, DEPTH / 2, DROP)
    longer = physics.scorecard(large, times(), 2 * FOCAL, DEPTH, DROP)
    closer = physics.scorecard(large, times(), FOCAL, DEPTH / 2, DROP)
    for name in QUANTITIES:
        assert far[name] == pytest.approx(card[name], rel=1e-6)
        assert closer[name] == pytest.approx(longer[name], rel=1e-6)
        assert longer[name].value == pytest.approx(card[name].value, rel=1e-3, abs=1e-3)


def test_a_film_played_at_half_speed_shows_a_quarter_of_g() -> None:
    masks = discs(bounce())
    card, slow = measure(masks), physics.scorecard(masks, 2 * times(), FOCAL, DEPTH, DROP)
    assert slow["g"].value == pytest.approx(card["g"].value / 4, rel=1e-4)
    assert slow["contact"].value == pytest.approx(card["contact"].value * 2, rel=1e-4)
    assert slow["restitution"].value == pytest.approx(card["restitution"].value, rel=1e-3)
    assert slow["penetration"].value == pytest.approx(card["penetration"].value, abs=1e-4)


def test_mirror() -> None:
    masks = discs(bounce(), 0.4 + 0.5 * times() + 0.2 * (times() > 0.2))
    card, mirrored = measure(masks), measure(masks[:, :, ::-1])
    for name in QUANTITIES:
        sign = -1 if name in ("drift", "jump") else 1
        assert mirrored[name].value == pytest.approx(sign * card[name].value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("drift", [-0.8, 0.0, 0.3])
@pytest.mark.parametrize("jump", [-0.1, 0.2, 0.4])
def test_a_jump_is_no_drift(drift: float, jump: float) -> None:
    """The step is at half the fall."""
    x_F = 0.73 - drift * 0.2 + np.where(times() > fall_time(DROP) / 2, jump, 0) + drift * np.minimum(times(), 0.4)
    card = measure(discs(bounce(restitution=0.0), x_F))
    assert near(card["drift"], drift)
    assert near(card["jump"], jump)
    assert near(card["g"], G)


@pytest.mark.parametrize("depth", [0.03, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("seen_through", [True, False])
def test_penetration(depth: float, seen_through: bool) -> None:
    """A ball bounces below the surface, which hides its lower part or does not."""
    fallen = bounce(drop=DROP + depth, restitution=0.3)
    masks = discs(fallen, floor=None if seen_through else DROP + RADIUS)
    card = measure(masks)
    assert near(card["penetration"], depth)
    assert card["penetration"].value == pytest.approx(depth, abs=0.02)
    assert near(card["g"], G)


def test_a_wide_foot_that_sinks() -> None:
    """The centre that is seen rises while the foot goes under; how deep cannot be told, but it is not in the air."""
    fallen = np.minimum(G * times() ** 2 / 2, DROP + 0.07)
    rows = (np.arange(SIZE) + 0.5) * PIXEL
    from_centre = rows - (START + fallen)[:, None]
    masks = np.zeros((FRAMES, SIZE, SIZE), bool)
    masks[:, :, 31:33] = ((-RADIUS <= from_centre) & (from_centre <= RADIUS))[..., None]
    masks[:, :, 18:46] |= ((RADIUS - 0.07 <= from_centre) & (from_centre <= RADIUS))[..., None]
    masks &= (rows <= START + DROP + RADIUS)[None, :, None]
    found = measure(masks)["penetration"]
    assert -found.sigma < found.value < 0.07 + found.sigma


def test_what_goes_into_the_ground_whole_sank_at_least_so_far() -> None:
    """It falls on and on behind the surface: no contact, but a depth."""
    fallen = G * times() ** 2 / 2
    card = measure(discs(fallen, floor=0.4 + RADIUS), drop=0.4)
    assert card["permanence"].value < 0.3
    assert card["penetration"] is not None
    assert 0.07 < card["penetration"].value < 0.35


@pytest.mark.parametrize("missing", [0.1, 0.3, 0.6])
def test_what_stops_in_the_air_penetrates_less_than_nothing(missing: float) -> None:
    fallen = np.minimum(G * times() ** 2 / 2, (1 - missing) * DROP)
    card = measure(discs(fallen))
    assert near(card["penetration"], -missing * DROP)
    assert near(card["restitution"], 0)
    assert near(card["g"], G)


@pytest.mark.parametrize("gain", [0.0, 0.3, 0.9])
def test_energy_won_at_the_contact(gain: float) -> None:
    """A ball flies off with the speed of a fall from DROP + gain metres."""
    contact = fall_time(DROP)
    since = np.maximum(times() - contact, 0)
    fallen = G * np.minimum(times(), contact) ** 2 / 2
    card = measure(discs(fallen - math.sqrt(2 * G * (DROP + gain)) * since + G * since**2 / 2)[:12])
    assert near(card["energy_contact"], G * gain)
    assert near(card["energy_fall"], 0)
    assert near(card["restitution"], math.sqrt(1 + gain / DROP))


@pytest.mark.parametrize("left", [1.0, 0.8, 0.5])
def test_melting_and_permanence(left: float) -> None:
    masks = discs(bounce(), radius_F=RADIUS * left ** (times() / times()[-1]))
    masks[24:] = False
    card = measure(masks)
    assert card["permanence"].value == pytest.approx(24 / 33)
    assert card["size"].value == pytest.approx(math.log(left) / times()[-1], abs=0.02)
    assert near(card["g"], G)
    assert near(card["penetration"], 0)


def test_what_hovers() -> None:
    card = measure(discs(np.zeros(FRAMES)))
    absent = {"release", "contact", "restitution", "penetration", "energy_contact"}
    assert {name for name, m in card.items() if m is None} == absent
    assert all(near(card[name], 0) for name in ("g", "energy_fall", "drift", "jump", "size"))


def test_what_rises() -> None:
    """Out of the picture: frames in which its edge cuts the ball tell no centre."""
    fallen = 0.7 - G * times() ** 2 / 2
    card = measure(discs(fallen))
    assert near(card["g"], -G)
    assert card["g"].value == pytest.approx(-G, rel=0.06)
    assert card["contact"] is None
    assert card["penetration"] is None
    assert card["energy_fall"].value > 5


def test_what_never_lands() -> None:
    fallen = 0.2 * G * np.minimum(times(), 0.6) ** 2 / 2
    card = measure(discs(fallen)[:10])
    assert near(card["g"], 0.2 * G)
    assert [card[name] for name in ("contact", "restitution", "penetration", "energy_contact")] == [None] * 4
    assert near(card["energy_fall"], -0.8 * G * fallen[9])


def test_without_a_drop_height_only_penetration_is_missing() -> None:
    card = measure(discs(bounce()), drop=None)
    assert {name for name, m in card.items() if m is None} == {"penetration"}


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_too_few_frames(frames: int) -> None:
    masks = discs(bounce())
    masks[frames:] = False
    card = measure(masks)
    assert card["permanence"] == (frames / FRAMES, 0)
    assert [name for name in QUANTITIES if card[name] is not None] == ["permanence"]
    if frames:
        assert measure(masks[:frames])["permanence"] == (1, 0)


def test_the_rate_does_not_matter() -> None:
    """One fall, filmed at 10 to 60 frames per second and at any moments: g within 3%, contact within 5 ms."""
    moments = {rate: times(2 * rate + 1, rate) for rate in (10, 24, 30, 60)}
    some = np.random.default_rng(0).choice(np.arange(1, 60), 45, replace=False)
    moments[0] = np.array([0, *np.sort(some), 60]) / 30
    moments[30] = moments[30].round(2)  # as GIF counts time
    for at in moments.values():
        masks = discs(DROP - Fall(DROP, 0.4, G).at(at)[0])
        card = physics.scorecard(masks, at, FOCAL, DEPTH, DROP)
        assert card["g"].value == pytest.approx(G, rel=0.03)
        assert card["contact"].value == pytest.approx(fall_time(DROP), abs=0.005)
        masks[at > 1.5] = False
        assert physics.scorecard(masks, at, FOCAL, DEPTH, DROP)["permanence"].value == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("seed", range(8))
def test_any_masks_have_a_scorecard(seed: int) -> None:
    """Random rectangles, some of them missing: numbers are finite or None."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((int(rng.integers(1, 30)), 48, 40), bool)
    for mask in masks:
        x, y, w, h = rng.integers(0, 30, 4)
        mask[y : y + h, x : x + w] = rng.random() < 0.8
    card = physics.scorecard(masks, times(len(masks), 24), 30, 2, 0.3)
    assert tuple(card) == QUANTITIES
    assert all(m is None or (math.isfinite(m.value) and math.isfinite(m.sigma) and m.sigma >= 0) for m in card.values())


def test_bad_input() -> None:
    masks = discs(bounce())
    for wrong, name in ((masks[0], "masks_FHW"), (masks[:0], "masks_FHW"), (masks * 0.5, "masks_FHW")):
        with pytest.raises(ValueError, match=name):
            physics.scorecard(wrong, times(len(wrong)), FOCAL, DEPTH)
    for wrong in (times(5), times() + 1, times()[::-1], times() * math.nan):
        with pytest.raises(ValueError, match="times"):
            physics.scorecard(masks, wrong, FOCAL, DEPTH)
    good = {"focal": FOCAL, "depth": DEPTH, "drop_height": DROP, "gravity": G}
    for name in good:
        for number in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=name):
                physics.scorecard(masks, times(), **(good | {name: number}))


@pytest.mark.parametrize("restitution", [0.0, 0.5, 0.9])
def test_truth_of_a_simulated_bounce(restitution: float) -> None:
    contact = fall_time(DROP)
    row = ClipRow("a.mp4", "", FPS, 33, (64, 64), gravity=(0, 0, -G), contact_time=contact)
    truth = violations.truth(row, DROP - bounce(restitution=restitution))
    if restitution:
        assert truth["restitution"] == pytest.approx(restitution)
        assert truth["energy_contact"] == pytest.approx((restitution**2 - 1) * G * DROP)
    else:
        assert truth["restitution"] is None  # it never flies
    assert (truth["g"], truth["contact"], truth["jump"], truth["permanence"]) == (G, contact, 0, 1)


def test_tables() -> None:
    """Errors of -1 and 3 with a sigma of 2; a kind whose g follows its value, and whose drift is a magnitude."""
    card: dict[str, Measure | None] = dict.fromkeys(QUANTITIES, Measure(0.0, 1.0))
    zero: dict[str, float | None] = dict.fromkeys(QUANTITIES, 0.0)
    true = [violations.Measured(card | {"g": Measure(g, 2.0)}, None, 0.0, zero) for g in (-1.0, 3.0)]
    assert "| g | m/s² | 2 | +1.0000 | 2.0000 | 2.0000 | 1.00 |" in violations.accuracy(true).splitlines()
    unknown = [violations.Measured(card, None, 0.0, zero | {"restitution": None})]
    assert "| restitution | 1 | 0 | – | – | – | – |" in violations.accuracy(unknown).splitlines()
    heavier = [
        violations.Measured(
            card | {"g": Measure(value, 1.0), "drift": Measure(-value, 1.0), "contact": None}, "heavy", value, {}
        )
        for value in (1.0, 2.0, 3.0)
    ]
    line = violations.response([*true, *heavier]).splitlines()[-1]
    cells = dict(zip(("kind", *QUANTITIES), line.strip("| ").split(" | "), strict=True))
    assert cells["kind"] == "heavy 1 2 3"
    assert cells["g"] == "1 2 3 (**+1.00**)"
    assert cells["drift"] == "1 2 3 (**+1.00**)"
    assert cells["contact"] == "– – –"
    assert cells["size"] == "0 0 0"


@pytest.mark.slow
def test_figure(tmp_path: Path) -> None:
    """A kind whose g follows its severity and whose contact most clips lack; true clips count at severity 0."""
    card: dict[str, Measure | None] = dict.fromkeys(QUANTITIES, Measure(0.0, 1.0))
    true = [violations.Measured(card | {"g": Measure(g, 2.0)}, None, 0.0, {}) for g in (9.0, 10.0)]
    scores: dict[str, float | None] = dict.fromkeys(violations.PISA, 0.5)
    light = [
        violations.Measured(
            card | {"g": Measure(g, 1.0), "contact": None}, "light", value, {}, severity, scores | {"l2": severity}
        )
        for g, value, severity in ((6.0, 0.5, 0.1), (4.0, 0.5, 0.3), (1.0, 0.1, 0.8))
    ]
    points, rho = violations.line([*true, *light], "light", "g")
    assert points == [(pytest.approx(0.2), 5.0), (pytest.approx(0.8), 1.0)]
    assert rho == pytest.approx(spearmanr([0.2, 0.2, 0.8, 0, 0], [6, 4, 1, 9, 10]).statistic)
    assert violations.line([*true, *light], "light", "contact") == ([], 0.0)
    assert violations.line([*true, *light], "light", "l2")[0] == [
        (pytest.approx(0.2), pytest.approx(0.2)),
        (pytest.approx(0.8), 0.8),
    ]
    violations.figure([*true, *light], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > picture.height > 100  # sixteen columns, one row
        assert len(picture.getcolors(1 << 24)) > 10
