"""posttrain/rewards: values worked out by hand, laws, exact gradients, and what each sees of filmed violations."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import posttrain
from posttrain.benchmarks import rewards as matrix
from posttrain.data.clips import Split, open_split
from posttrain.metrics import pisa
from posttrain.models import depth as depth_model
from posttrain.models import sam2
from posttrain.models.base import ModelConfig
from posttrain.recipe import Part, resolve
from posttrain.rewards import depth, flow, segmentation, trajectory
from posttrain.rewards.base import Reward, contrast, load_all, total, truths
from posttrain.types import Batch
from sim import counterfactual, dataset

NAMES = matrix.names()
KINDS = {kind for name in NAMES for kind in resolve("rewards", name).RANKS}
FIELDS = ("instances_BFHW", "target_B", "flow_BFCHW", "depth_BFHW")
WEIGHTS = (("depth", 2.0), ("flow", -0.5))
SIZE = 64
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    GENERATOR.manual_seed(0)


def square(*corners: tuple[int, int] | None, side: int = 8) -> Tensor:
    """Masks (1, F, H, W) of a square whose upper left corner (row, column) is given; None: nothing is there."""
    masks = torch.zeros(1, len(corners), SIZE, SIZE, dtype=torch.bool)
    for t, corner in enumerate(corners):
        if corner is not None:
            masks[0, t, corner[0] : corner[0] + side, corner[1] : corner[1] + side] = True
    return masks


def random(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=GENERATOR)


def path_error(p_BFHW: Tensor, m_BFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
    """In pictures whose contrast is not in question."""
    return trajectory.path_error(p_BFHW, m_BFHW, mask0_BHW, torch.ones(p_BFHW.shape[:2]))


def slope(function: Callable[[Tensor], Tensor], x: Tensor, way: Tensor, step: float) -> float:
    """The derivative of `function` along `way`, by central differences."""
    with torch.no_grad():
        return float((function(x + step * way) - function(x - step * way)).sum() / (2 * step))


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
    expected = pisa.score(found[0].numpy(), true[0].numpy(), 16, 16)["l2"]
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


# ---------------------------------------------------------------------- through the networks


def scene(frames: int) -> Batch:
    """A red square that falls before a wall of coloured waves, with everything that is known of it."""
    masks = square(*[(4 + 2 * t * t, 20) for t in range(frames)])
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wall = torch.stack([(rows / 7).sin(), (columns / 9).cos(), ((rows + columns) / 8).sin()]) * 0.4
    red = torch.tensor([0.9, -0.7, -0.7]).view(1, 3, 1, 1, 1)
    video = torch.where(masks[:, None], red, wall[None, :, None])
    down = torch.zeros(1, frames, 2, SIZE, SIZE)
    for t in range(frames):
        down[0, t, 1] = masks[0, t] * (4 * t + 2)
    return Batch(
        ids=("square",),
        video_BCFHW=video,
        instances_BFHW=masks.to(torch.uint8),
        target_B=torch.tensor([1]),
        flow_BFCHW=down,
        depth_BFHW=torch.where(masks, 1.5, 3.0),
    )


def test_depth_gradient_in_double_precision() -> None:
    """The whole way through Depth Anything against finite differences."""
    net, batch = depth_model.load(ModelConfig(family="depth", path="pocket")).module.double(), scene(3)
    video, way = batch.video_BCFHW.double(), random(1, 3, 3, SIZE, SIZE) - 0.5

    def reward(x: Tensor) -> Tensor:
        return depth.depth_error(net(x), 1 / batch.depth_BFHW.double(), torch.ones(1, 3))

    _, gradient = matrix.with_gradient(lambda x, _: reward(x), video, batch)
    assert (gradient * way).sum().item() == pytest.approx(slope(reward, video, way, 1e-7), rel=1e-4)


def test_segmentation_and_trajectory_gradients_in_double_precision() -> None:
    """Through SAM 2, along changes of the last picture: it is never remembered, and memories are rounded to bf16, so
    that differences along changes of the others are those of a staircase. transformers keeps softmax and rotations in
    single precision, which leaves 0.3%.
    """
    net, batch = sam2.load(ModelConfig(family="sam2", path="pocket")).tracker.double(), scene(3)
    m = batch.instances_BFHW > 0
    video = batch.video_BCFHW.double() + 0.1 * random(1, 3, 3, SIZE, SIZE)
    way = torch.zeros_like(video)
    way[:, :, 2] = random(1, 3, SIZE, SIZE) - 0.5
    for value in (segmentation.soft_iou, path_error):

        def reward(x: Tensor, value: Callable[..., Tensor] = value) -> Tensor:
            return value(net(x, m[:, 0]).sigmoid()[:, 1:], m[:, 1:], m[:, 0])

        _, gradient = matrix.with_gradient(lambda x, _: reward(x), video, batch)
        assert (gradient * way).sum().item() == pytest.approx(slope(reward, video, way, 1e-5), rel=1e-2)


# ---------------------------------------------------------------------- on filmed violations


@pytest.fixture(scope="module")
def rewards() -> dict[str, Reward]:
    return {name: resolve("rewards", name).load(resolve("rewards", name).Config()) for name in NAMES}


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """A group of recipes/pocket/violations.yaml's kind, but short."""
    config = counterfactual.Config(
        width=64, height=64, frames=13, dropped=(1, 1), pile=(0, 0), drop=(0.5, 0.8), size=(0.3, 0.35),
        region=(0.7, 0.0), camera_gap=1.6, camera_height=(0.5, 0.5), camera_step=(0.0, 0.0), target_pixels=(9, 24),
        texture=0.0, studio=True, contrast=0.4, sun=(82.0, 90.0), restitution=(0.2, 0.3),
        shapes=("ball", "barrel", "box"),
        violations={kind: sweep for kind, (_, _, sweep) in counterfactual.KINDS.items() if kind in KINDS},
    )  # fmt: skip
    out = tmp_path_factory.mktemp("filmed")
    dataset.write(out, dataset.Film("counterfactual", config, seed=5), {"test_unseen": 1}, workers=1)
    return open_split(out, "test_unseen")


def test_every_declared_kind_is_ranked(filmed: Split, rewards: dict[str, Reward]) -> None:
    groups = matrix.group_numbers(filmed)
    for name in NAMES:
        ranked = resolve("rewards", name).RANKS
        clips = []
        for group in groups:
            batch = matrix.truth(filmed, group)
            with torch.no_grad():
                clips.append(matrix.Judged(group, matrix.TRUE, 0.0, rewards[name](batch.video_BCFHW, batch).item()))
                for other in matrix.violated(filmed, group, ranked):
                    value = rewards[name](other.video_BCFHW, batch).item()
                    clips.append(matrix.Judged(group, other.kind, other.severity, value))
        assert {
            kind: matrix.rho(clips, kind) for kind in ranked if matrix.rho(clips, kind) > 1e-6 - matrix.ASKED
        } == {}, name


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_truth_is_liked(name: str, filmed: Split, rewards: dict[str, Reward]) -> None:
    """A blank, a flat and a noisy clip are below the true one and below one that hovers."""
    batch = matrix.truth(filmed, matrix.group_numbers(filmed)[0])
    clips = matrix.impostors(batch)
    with torch.no_grad():
        got = {kind: rewards[name](video, batch).item() for kind, video in clips.items()}
        true = rewards[name](batch.video_BCFHW, batch).item()
    assert max(got["blank"], got["flat"], got["noise"]) < got["frozen"] < true


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_everywhere(name: str, rewards: dict[str, Reward]) -> None:
    """From the true clip to one whose object is gone, every picture after the first gets a gradient."""
    batch = scene(5)
    empty = batch.video_BCFHW.clone()
    empty[:, :, 1:] = torch.where(batch.instances_BFHW[:, None, 1:] > 0, -0.1, empty[:, :, 1:])
    for share in (0.05, 0.5, 1.0):
        video = (1 - share) * batch.video_BCFHW + share * empty
        _, gradient = matrix.with_gradient(rewards[name], video, batch)
        assert gradient.isfinite().all()
        assert (gradient[:, :, 1:].abs().sum((0, 1, 3, 4)) > 0).all()


def test_a_clip_does_not_depend_on_its_neighbours(rewards: dict[str, Reward]) -> None:
    one, other = scene(4), scene(4)
    other.video_BCFHW.neg_()
    both = Batch(("a", "b"), **{n: torch.cat([getattr(one, n), getattr(other, n)]) for n in ("video_BCFHW", *FIELDS)})
    for name, reward in rewards.items():
        with torch.no_grad():
            together = reward(both.video_BCFHW, both)
            apart = torch.cat([reward(batch.video_BCFHW, batch) for batch in (one, other)])
        assert together.shape == (2,), name
        torch.testing.assert_close(
            together, apart, atol=2e-2 if name in ("segmentation", "trajectory") else 1e-4, rtol=0
        )


# ---------------------------------------------------------------------- by name


def test_a_weighted_sum_is_one_line_of_a_recipe() -> None:
    parts = [Part(name, resolve("rewards", name), resolve("rewards", name).Config(weight=w)) for name, w in WEIGHTS]
    assert truths(parts) == ("depth", "flow")
    batch = scene(3)
    with torch.no_grad():
        value, found = total(load_all(parts))(batch.video_BCFHW, batch)
    assert list(found) == ["depth", "flow"]
    torch.testing.assert_close(value, 2 * found["depth"] - 0.5 * found["flow"])


BRIGHTNESS = '''
"""The brighter, the better."""

from posttrain.rewards.base import RewardConfig

TRUTHS, RANKS = (), ()


class Config(RewardConfig):
    bias: float = 0.0


def load(config, device="cpu"):
    return lambda video_BCFHW, batch: video_BCFHW.mean((1, 2, 3, 4)) + config.bias
'''
USE = """
from typing import Annotated
import torch
from posttrain.recipe import In, Part, load
from posttrain.rewards import base
from posttrain.types import Batch, Strict

class Recipe(Strict):
    rewards: tuple[Annotated[Part, In("rewards")], ...]

reward = base.total(base.load_all(load("recipe.yaml", [], Recipe).rewards))
total, found = reward(torch.full((2, 3, 4, 5, 6), 0.25), Batch(("a", "b")))
print(total.tolist(), list(found))
"""


def test_adding_a_reward_is_one_file_and_one_line(tmp_path: Path) -> None:
    """As README.md says it, in a copy of the package."""
    weights = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(Path(posttrain.__file__).parent, tmp_path / "posttrain", ignore=weights)
    (tmp_path / "posttrain" / "rewards" / "brightness.py").write_text(BRIGHTNESS)
    (tmp_path / "recipe.yaml").write_text("rewards: [{name: brightness, weight: 2.0, bias: 0.5}]\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[1.5, 1.5] ['brightness']\n"


# ---------------------------------------------------------------------- the command


def test_a_sum_of_columns_adds_values_and_slopes() -> None:
    judged = {
        "a": [matrix.Judged(0, "hover", 1.0, 2.0, 3.0, None)],
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
