"""Rewards worked out by hand, and the table of the study of rewards."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.squares import GENERATOR, SIZE, random, scene, square
from torch import Tensor

from posttrain.metrics import pisa
from posttrain.rewards import depth, flow, segmentation, trajectory
from posttrain.rewards.base import contrast
from posttrain.studies import rewards as matrix


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    GENERATOR.manual_seed(0)


def path_error(p_BFHW: Tensor, m_BFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
    """In pictures whose contrast is not in question."""
    return trajectory.path_error(p_BFHW, m_BFHW, mask0_BHW, torch.ones(p_BFHW.shape[:2]))


# ---------------------------------------------------------------------- by hand


def test_soft_iou_of_moved_squares() -> None:
    m = square((10, 10), (10, 10), (10, 10))
    p = square((10, 10), (10, 14), (40, 40)).double()
    # the same; moved by half its side: 32 of 96; disjoint
    assert segmentation.soft_iou(p, m, m[:, 0]).item() == pytest.approx((1 + 1 / 3 + 0) / 3)
    # half sure of all of it, and of nothing else: 32 of 64
    assert segmentation.soft_iou(0.5 * m.double(), m, m[:, 0]).item() == pytest.approx(0.5)


def test_soft_iou_rewards_absence_where_there_is_nothing() -> None:
    first, gone = square((10, 10))[:, 0], square(None)
    assert segmentation.soft_iou(0.0 * gone, gone, first).item() == 1.0
    # twice the object's area where nothing should be: 64 of 128 + 64
    assert segmentation.soft_iou(square((0, 0), side=8).double() * 2, gone, first).item() == pytest.approx(1 / 3)


def test_soft_iou_of_hard_masks_is_the_metrics() -> None:
    found, true = (torch.rand(1, 6, 16, 16, generator=GENERATOR) > 0.6 for _ in range(2))
    from posttrain.metrics import masks

    expected = masks.iou(found[0].numpy(), true[0].numpy()).mean()
    assert segmentation.soft_iou(found.double(), true, true[:, 0]).item() == pytest.approx(expected)


def test_path_error_is_the_metrics_l2() -> None:
    """A mask 3 and 4 pixels away on 64 x 64: 5 / (64 sqrt 2)."""
    true, found = square((10, 10), (20, 10)), square((13, 14), (20, 10))
    got = path_error(found.double(), true, true[:, 0]).item()
    assert got == pytest.approx(-5 / (64 * 2**0.5) / 2)
    true, found = square((10, 10), (20, 10), (30, 12)), square((10, 10), (22, 10), (35, 20))
    expected = pisa.score(found[0].numpy(), true[0].numpy(), pisa.even_times(true.shape[1], 16), 16)["l2"]
    assert -path_error(found.double(), true, true[:, 0]).item() == pytest.approx(expected)


def test_path_error_of_what_is_gone_is_the_largest() -> None:
    true = square((10, 10), (20, 10))
    assert path_error(torch.zeros(true.shape), true, true[:, 0]).item() == -1
    # a quarter of its area at the right place: half of it counts as gone
    assert path_error(0.25 * true.double(), true, true[:, 0]).item() == pytest.approx(-0.5)
    # all over the picture: 2 x 64 of 4096 pixels count
    everywhere = torch.ones(true.shape, dtype=torch.float64)
    got = path_error(everywhere, true, true[:, 0]).item()
    assert -1 < got < -1 + 2 * 64 / 4096
    # a faint background does not count, nor how small the object is
    small = square((10, 10), (20, 10), side=1)
    assert path_error((small + 0.04).double(), small, small[:, 0]).item() == pytest.approx(0, abs=1e-9)
    # in a picture of half the contrast that is asked for
    dim = trajectory.path_error(true.double(), true, true[:, 0], torch.tensor([[1.0, 0.5]]))
    assert dim.item() == -0.25
    # where the true object is hidden nothing is asked
    assert path_error(everywhere[:, :1], square(None), true[:, 0]).item() == 0


def test_path_error_is_not_rounded_under_autocast() -> None:
    true, found = square((50, 30)), square((50, 31)).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        error = path_error(found, true, true[:, 0])
    assert error.item() == pytest.approx(-1 / (64 * 2**0.5), rel=1e-5)
    assert torch.autograd.grad(error.sum(), found)[0].abs().sum() > 0


def test_path_error_points_downhill_from_any_distance() -> None:
    """However far off a mask is, moving it towards the truth raises the reward; the soft IoU stays where it is."""
    true = square((50, 30))
    for row in (0, 10, 20, 30):
        p = square((row, 30)).double()
        change = p.roll(1, 2) - p
        p.requires_grad_()
        (along,) = torch.autograd.grad(path_error(p, true, true[:, 0]).sum(), p)
        assert (along * change).sum() > 0.4 / (64 * 2**0.5)  # a half of a pixel: what is entered is faint as yet
        (along,) = torch.autograd.grad(segmentation.soft_iou(p, true, true[:, 0]).sum(), p)
        assert (along * change).sum() == 0


def test_flow_error_by_hand() -> None:
    """4 of 16 pixels should move by (3, -1): in their region a still clip is off by 2, in the image by 0.5."""
    true = torch.zeros(1, 1, 2, 4, 4)
    true[0, 0, :, :2, :2] = torch.tensor([3.0, -1.0]).view(2, 1, 1)
    objects, everywhere = true[:, :, 0] != 0, torch.ones(1, 1, 4, 4, dtype=torch.bool)
    sure, unsure = torch.ones(1, 1), torch.full((1, 1), 0.75)
    assert flow.flow_error(torch.zeros_like(true), true, objects, sure).item() == -2
    assert flow.flow_error(torch.zeros_like(true), true, everywhere, sure).item() == -0.5
    assert flow.flow_error(true, true, objects, sure).item() == 0
    assert flow.flow_error(true, true, objects, unsure).item() == -0.25 * 4


def disc_flow(heights_F: np.ndarray) -> tuple[Tensor, Tensor]:
    """Exact flow (1, F - 1, 2, H, W) of a disc of radius 5 at these rows, and its masks (1, F, H, W)."""
    rows = torch.arange(SIZE, dtype=torch.float64)
    heights = torch.from_numpy(heights_F)
    masks = (rows[:, None] - heights.view(-1, 1, 1)) ** 2 + (rows - 32) ** 2 < 25
    down = masks[:-1] * heights.diff().view(-1, 1, 1)
    return torch.stack([torch.zeros_like(down), down], 1)[None], masks[None]


def test_the_trap_of_flow_over_the_whole_image() -> None:
    """There a disc that hovers beats one that falls almost right; where it should be, it does not."""
    t = np.arange(17) / 16

    def fall(g: float, late: int = 0) -> np.ndarray:
        return 8 + np.minimum(g * np.maximum(t - late / 16, 0) ** 2 / 2, 48)

    true, masks = disc_flow(fall(250.0))
    clips = {"still": fall(0.0), "late": fall(250.0, 1), "weak": fall(0.7 * 250.0)}
    sure = torch.ones(1, 16)
    for whole in (True, False):
        region = torch.ones_like(masks[:, 1:]) if whole else masks[:, :-1] | masks[:, 1:]
        got = {name: flow.flow_error(disc_flow(path)[0], true, region, sure).item() for name, path in clips.items()}
        assert (got["still"] > max(got["late"], got["weak"])) == whole


def test_depth_error_by_hand() -> None:
    true = torch.tensor([[0.0, 0.5], [1.0, 0.5]]).view(1, 1, 2, 2)
    assert depth.depth_error(true, true, torch.ones(1, 1)).item() == 0
    # one of four pixels is off by a quarter of the range
    off = true + torch.tensor([[0.25, 0.0], [0.0, 0.0]])
    assert depth.depth_error(off, true, torch.ones(1, 1)).item() == pytest.approx(-1 / 16)
    assert depth.depth_error(off, true, torch.full((1, 1), 0.5)).item() == pytest.approx(-1 / 32 - 0.5)


def test_scale_and_shift_are_least_squares() -> None:
    q, true = random(3, 5, 7), random(3, 5, 7)
    for i, (s, o) in enumerate(zip(*depth.fit(q, true), strict=True)):
        basis = np.stack([q[i].flatten().numpy(), np.ones(35)], 1)
        expected, *_ = np.linalg.lstsq(basis, true[i].flatten().numpy(), rcond=None)
        np.testing.assert_allclose([s, o], expected)
    s, o = depth.fit(torch.ones(1, 5, 7), true[:1])
    assert (s.item(), o.item()) == (0, pytest.approx(true[0].mean().item()))


def test_contrast_is_that_of_the_true_pictures() -> None:
    true = random(1, 3, 4, 8, 8)
    shown = torch.stack([true[:, :, 0], true[:, :, 1], 0.25 * true[:, :, 2] + 0.3, 0 * true[:, :, 3]], 2)
    torch.testing.assert_close(contrast(shown, true), torch.tensor([[1, 0.5, 0]], dtype=torch.float64))


@pytest.mark.parametrize("name", ["soft_iou", "path_error", "flow_error", "depth_error", "fit", "contrast"])
def test_gradients_are_exact_in_double_precision(name: str) -> None:
    m = random(2, 3, 6, 6) > 0.7
    maps, moved, shown = (random(2, 3, 6, 6), random(2, 3)), random(2, 3, 2, 6, 6), random(1, 3, 3, 4, 4)
    cases: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], Tensor]] = {
        "soft_iou": (lambda p: segmentation.soft_iou(p, m, m[:, 0]), random(2, 3, 6, 6)),
        "path_error": (lambda p: path_error(p, m, m[:, 0]), random(2, 3, 6, 6) ** 4),
        "flow_error": (lambda f: flow.flow_error(f, moved, m, maps[1]), random(2, 3, 2, 6, 6)),
        "depth_error": (lambda q: depth.depth_error(q, maps[0], maps[1]), random(2, 3, 6, 6)),
        "fit": (lambda q: depth.fit(q, maps[0][:, 0]), random(2, 6, 6)),
        "contrast": (lambda v: contrast(0.25 * v, shown), random(1, 3, 3, 4, 4)),
    }
    function, x = cases[name]
    assert torch.autograd.gradcheck(function, x.requires_grad_())


# ---------------------------------------------------------------------- the command


def test_a_sum_of_columns_adds_values_and_slopes() -> None:
    judged = {
        "a": [matrix.Judged(0, "hover", 1.0, 2.0, 3.0, None, 4.0)],
        "b": [matrix.Judged(0, "hover", 1.0, 5.0, -1.0, None)],
    }
    assert matrix.total(judged, {"a": 1.0, "b": 2.0}) == [matrix.Judged(0, "hover", 1.0, 12.0, 1.0, None)]


def test_rho_is_the_median_over_groups() -> None:
    def group(number: int, *rewards: float) -> list[matrix.Judged]:
        kinds = (matrix.TRUE, "hover", "hover", "hover")
        return [matrix.Judged(number, kind, i / 3, r) for i, (kind, r) in enumerate(zip(kinds, rewards, strict=True))]

    clips = group(0, 4, 3, 2, 1) + group(1, 4, 2, 3, 1) + group(2, 1, 1, 1, 1)
    assert matrix.rho(clips, "hover") == pytest.approx(-0.8)  # -1, -.8, and 0 of the blind one
    assert np.isnan(matrix.rho(clips, "melt"))


def test_a_step_nearer_moves_the_object_by_a_pixel() -> None:
    batch = scene(3)
    away = square((4, 20), (30, 20), (12, 35))
    shown = torch.where(away[:, None], torch.tensor(0.9), batch.video_BCFHW)
    change = matrix.nearer(matrix.Violated("teleport", 1.0, shown, away), batch)
    assert not change[:, :, 0].any()
    moved = (shown + change)[0, 0] == 0.9
    assert torch.equal(moved[1] & ~(batch.instances_BFHW[0, 1] > 0), square((29, 20))[0, 0])
    assert torch.equal(moved[2] & ~(batch.instances_BFHW[0, 2] > 0), square((12, 34))[0, 0])


def test_what_a_step_gains_by_hand() -> None:
    """A square that should fall by two rows hangs. Two rows of 8 pixels each are 1 and 2 pixels from where they should
    be, and as many are missed: in one of two pictures 2 x (8 + 16) / 64 pixels, which a step towards the truth undoes.
    """
    batch = scene(2)
    video = matrix.impostors(batch)["frozen"]

    def follow(video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
        return video_BCFHW[:, 0] - 0.5  # the square alone is as red

    way = batch.video_BCFHW - video
    assert matrix.gain(video, way, batch, follow) == pytest.approx(0.75 / (SIZE * 2**0.5) / 2)
    assert matrix.gain(video, 1e-9 * way, batch, follow) == pytest.approx(0.75 / (SIZE * 2**0.5) / 2)
    assert matrix.gain(video, -way, batch, follow) <= 0
    assert matrix.gain(video, 0 * way, batch, follow) == 0
