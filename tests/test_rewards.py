"""posttrain/rewards: values worked out by hand, laws, exact gradients, and what each sees of filmed violations."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from helpers.unrounded import Unrounded
from torch import Tensor, nn
from torch.nn import functional as F

import posttrain.rewards
from posttrain.core.recipe import Plugin, PluginFrom, Strict, load, plugins, resolve
from posttrain.data.dataset import Split, open_split
from posttrain.flow import SamplerConfig
from posttrain.methods.oro import Sampling, oro_loss
from posttrain.metrics import pisa
from posttrain.models.base import ModelConfig
from posttrain.models.wan import loading as wan_model
from posttrain.models.wan.model import Wan
from posttrain.rewards import depth, flow, segmentation, trajectory
from posttrain.rewards.base import Reward, contrast, load_all, total, truths
from posttrain.studies import rewards as matrix
from posttrain.types import Batch, Random
from sim import dataset
from sim.worlds import counterfactual

ROOT = Path(__file__).parent.parent
NAMES = plugins("rewards")
RANKED_BY_BOTH = (matrix.TRUE, *set(segmentation.RANKS).intersection(trajectory.RANKS))
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


def networks(reward: Callable[..., object]) -> Iterator[nn.Module]:
    """Those that a reward's function asks, in it and in the functions that it calls."""
    for part in inspect.getclosurevars(reward).nonlocals.values():
        if isinstance(part, nn.Module):
            yield part
        elif inspect.isfunction(part):
            yield from networks(part)


def loaded(name: str) -> Reward:
    return resolve("rewards", name).load(resolve("rewards", name).Config())


@pytest.fixture(scope="module")
def exact() -> dict[str, Reward]:
    """The rewards, their embedded networks (if there are any) in float64, to be asked in Unrounded."""
    rewards = {name: loaded(name) for name in NAMES}
    for reward in rewards.values():
        for network in networks(reward):
            network.double()
    return rewards


def double(batch: Batch) -> Batch:
    wide = {
        name: value.double()
        for name, value in vars(batch).items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    return replace(batch, **wide)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_in_pixels_is_that_of_finite_differences(name: str, exact: dict[str, Reward]) -> None:
    """Through the embedded network and, of SAM 2, its memory of earlier pictures, along a change of all pictures.

    What training rounds (to float32, and to bf16 in SAM 2's memory) is up to 0.24% of the gradient's size (measured).
    """
    batch = double(scene(4))
    video, way = batch.video_BCFHW + 0.1 * random(1, 3, 4, SIZE, SIZE), random(1, 3, 4, SIZE, SIZE) - 0.5

    def reward(x: Tensor) -> Tensor:
        return exact[name](x, batch)

    with Unrounded():
        _, gradient = matrix.with_gradient(exact[name], video, batch)
        assert (gradient * way).sum().item() == pytest.approx(slope(reward, video, way, 1e-7), rel=1e-5)
    _, rounded = matrix.with_gradient(loaded(name), video.float(), scene(4))
    assert (rounded - gradient).norm() < 0.01 * gradient.norm()


@pytest.fixture(scope="module")
def pocket() -> Wan:
    """The embedded Wan in float64, whose pixels stay in the range: the clamp has a gradient of its own."""
    wan = wan_model.load(ModelConfig(path="pocket"))
    for module in (wan.transformer, wan.vae):
        module.double()
    wan.dtype = torch.float64
    with torch.no_grad():
        for parameter in wan.vae.decoder.conv_out.parameters():
            parameter.mul_(0.8)
    return wan


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_in_weights_is_that_of_finite_differences(
    name: str, exact: dict[str, Reward], pocket: Wan
) -> None:
    """Through three steps of the sampler, the decoder and the reward, as ORO takes it: its length, along itself.

    Measured: 3e-6 for flow, which has the most corners, and less than 3e-7 for the others.
    """
    batch = double(scene(5))
    with Unrounded(), torch.no_grad():
        batch = replace(batch, z0_BCFHW=pocket.encode(batch.video_BCFHW))
    batch = replace(batch, text_BLD=pocket.encode_text(["a red box falls."]).double())
    parameters, config = list(pocket.transformer.parameters()), Sampling(sampler=SamplerConfig(steps=3))

    def loss() -> Tensor:
        value, metrics = oro_loss(pocket, batch, total({name: (1.0, exact[name])}), config, Random(0, 0, [0]))
        assert metrics["saturated"] == 0
        return value

    def moved(h: float) -> float:
        """The loss after a step of length h along the gradient."""
        shifts = [h / length * g for g in gradient]
        for p, shift in zip(parameters, shifts, strict=True):
            p.add_(shift)
        value = float(loss())
        for p, shift in zip(parameters, shifts, strict=True):
            p.sub_(shift)
        return value

    with Unrounded():
        gradient = torch.autograd.grad(loss(), parameters)
        length = torch.stack([g.norm() for g in gradient]).norm()
        with torch.no_grad():
            assert (moved(1e-6) - moved(-1e-6)) / 2e-6 == pytest.approx(float(length), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_is_the_same_under_autocast(name: str, dtype: torch.dtype) -> None:
    """As full-size recipes train it (precision: bf16), of a decoder's pictures in float32 or bf16: float32, its value
    off by 1% of itself and 0.01 at most, its gradient's direction by a cosine of 0.99 (measured: 0.5%, 0.994)."""
    reward, batch = loaded(name), scene(5)
    video = batch.video_BCFHW + 0.1 * torch.randn(batch.video_BCFHW.shape, generator=GENERATOR)

    def asked(video: Tensor) -> tuple[Tensor, Tensor]:
        video = video.clone().requires_grad_()
        value = reward(video, batch)
        return value, torch.autograd.grad(value.sum(), video)[0].float()

    expected, gradient = asked(video)
    with torch.autocast("cpu", torch.bfloat16):
        got, rounded = asked(video.to(dtype))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)
    assert F.cosine_similarity(rounded.flatten(), gradient.flatten(), 0) > 0.99


# ---------------------------------------------------------------------- on filmed violations


@pytest.fixture(scope="module")
def rewards() -> dict[str, Reward]:
    return {name: loaded(name) for name in NAMES}


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Groups of recipes/pocket/violations.yaml's kind, but short."""
    world = dict(
        name="counterfactual", width=64, height=64, frames=13, dropped=(1, 1), pile=(0, 0), drop=(0.5, 0.8),
        size=(0.3, 0.35),
        region=(0.7, 0.0), camera_gap=1.6, camera_height=(0.5, 0.5), camera_step=(0.0, 0.0), target_pixels=(9, 24),
        texture=0.0, studio=True, contrast=0.4, sun=(82.0, 90.0), restitution=(0.2, 0.3),
        shapes=("ball", "barrel", "box"),
        violations={kind: sweep for kind, (_, _, sweep) in counterfactual.VIOLATIONS.items() if kind in KINDS},
    )  # fmt: skip
    out = tmp_path_factory.mktemp("filmed")
    dataset.write(out, dataset.Job(world=world, seed=5), {"test_unseen": 1}, workers=1)
    return open_split(out, "test_unseen")


def repeated(batch: Batch, count: int) -> Batch:
    tensors = {name: v.repeat_interleave(count, 0) for name, v in vars(batch).items() if torch.is_tensor(v)}
    return replace(batch, ids=batch.ids * count, **tensors)


@pytest.mark.slow
def test_every_declared_kind_is_ranked(filmed: Split, rewards: dict[str, Reward]) -> None:
    """In each group at three severities or more beside the truth. `object` is the sum of two others, see below."""
    judged: dict[str, list[matrix.Judged]] = {name: [] for name in NAMES}
    for group in matrix.group_numbers(filmed):
        batch = matrix.truth(filmed, group)
        clips = [matrix.Violated(matrix.TRUE, 0.0, batch.video_BCFHW, batch.instances_BFHW)]
        clips += matrix.violated(filmed, group)
        for kind in KINDS:
            assert len({clip.severity for clip in clips if clip.kind == kind}) >= 3, kind
        for name in (name for name in NAMES if name != "object"):
            asked = [clip for clip in clips if clip.kind in (matrix.TRUE, *resolve("rewards", name).RANKS)]
            with torch.no_grad():
                values = rewards[name](torch.cat([clip.video_BCFHW for clip in asked]), repeated(batch, len(asked)))
            pairs = zip(asked, values.tolist(), strict=True)
            judged[name] += [matrix.Judged(group, clip.kind, clip.severity, value) for clip, value in pairs]
    weights = {"segmentation": 1.0, "trajectory": resolve("rewards", "object").Config().distance}
    ranked = {name: [clip for clip in judged[name] if clip.kind in RANKED_BY_BOTH] for name in weights}
    judged["object"] = matrix.total(ranked, weights)
    for name in NAMES:
        orders = {kind: matrix.rho(judged[name], kind) for kind in resolve("rewards", name).RANKS}
        assert all(order <= 1e-6 - matrix.ASKED for order in orders.values()), (name, orders)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_truth_is_liked(name: str, filmed: Split, rewards: dict[str, Reward]) -> None:
    """A blank, a flat and a noisy clip are below the true one and below one that hovers."""
    batch = matrix.truth(filmed, matrix.group_numbers(filmed)[0])
    clips = matrix.impostors(batch)
    with torch.no_grad():
        got = {kind: rewards[name](video, batch).item() for kind, video in clips.items()}
        true = rewards[name](batch.video_BCFHW, batch).item()
    assert max(got["blank"], got["flat"], got["noise"]) < got["frozen"] < true


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_clip_does_not_depend_on_its_neighbours(exact: dict[str, Reward]) -> None:
    one, other = double(scene(4)), double(scene(4))
    other.video_BCFHW.neg_()
    both = Batch(("a", "b"), **{n: torch.cat([getattr(one, n), getattr(other, n)]) for n in ("video_BCFHW", *FIELDS)})
    for name, reward in exact.items():
        with torch.no_grad(), Unrounded():
            together = reward(both.video_BCFHW, both)
            apart = torch.cat([reward(batch.video_BCFHW, batch) for batch in (one, other)])
        assert together.shape == (2,), name
        torch.testing.assert_close(together, apart, atol=1e-9, rtol=0)


def test_object_is_segmentation_and_trajectory_in_one_look(rewards: dict[str, Reward]) -> None:
    batch, part = scene(4), resolve("rewards", "object")
    video = matrix.impostors(batch)["frozen"]
    with torch.no_grad():
        shape, place = (rewards[name](video, batch) for name in ("segmentation", "trajectory"))
        both = part.load(part.Config(distance=2.0))(video, batch)
    assert min(shape.item(), -place.item()) > 0.01
    torch.testing.assert_close(both, shape + 2 * place)


# ---------------------------------------------------------------------- by name


def test_a_weighted_sum_is_one_line_of_a_recipe() -> None:
    parts = [Plugin(name, resolve("rewards", name), resolve("rewards", name).Config(weight=w)) for name, w in WEIGHTS]
    assert truths(parts) == ("depth", "flow")
    batch = scene(3)
    with torch.no_grad():
        value, found = total(load_all(parts))(batch.video_BCFHW, batch)
    assert list(found) == ["depth", "flow"]
    torch.testing.assert_close(value, 2 * found["depth"] - 0.5 * found["flow"])


class Recipe(Strict):
    rewards: tuple[Annotated[Plugin, PluginFrom("rewards")], ...]


@pytest.fixture
def example(tmp_path: Path) -> Iterator[tuple[Plugin, ...]]:
    """What the line of a recipe that CONTRIBUTING.md gives means, with its file in a folder that the resolver knows."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## A new reward\n")[1].split("\n##")[0]
    file = re.search(r"`posttrain/rewards/<name>\.py`:\n```python\n(.*?)```", section, re.DOTALL).group(1)
    line = re.search(r"`(rewards: .*?)`", section).group(1)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "near.py").write_text(file)
    (tmp_path / "recipe.yaml").write_text(line.replace("<name>", "near"))
    posttrain.rewards.__path__.append(str(tmp_path / "plugins"))
    importlib.invalidate_caches()
    yield load(tmp_path / "recipe.yaml", [], Recipe).rewards
    posttrain.rewards.__path__.remove(str(tmp_path / "plugins"))
    del sys.modules["posttrain.rewards.near"], posttrain.rewards.near


def test_adding_a_reward_is_one_file_and_one_line(example: tuple[Plugin, ...], filmed: Split) -> None:
    """The file and the line that CONTRIBUTING.md gives. The laws of all rewards hold for it."""
    assert [(part.name, part.config.weight) for part in example] == [("object", 1.0), ("near", 0.1)]
    true, video = torch.zeros(2, 3, 4, 5, 6), torch.full((2, 3, 4, 5, 6), 0.5)
    value, parts = total(load_all(example[1:]))(video, Batch(("a", "b"), video_BCFHW=true))
    torch.testing.assert_close(value, torch.tensor([-0.05, -0.05]))
    assert list(parts) == ["near"]
    assert not list(networks(loaded("near")))
    rewards = {"near": loaded("near")}
    test_the_gradient_in_pixels_is_that_of_finite_differences("near", rewards)
    for dtype in (torch.float32, torch.bfloat16):
        test_a_reward_is_the_same_under_autocast("near", dtype)
    test_gradients_are_finite_and_everywhere("near", rewards)
    test_a_clip_does_not_depend_on_its_neighbours(rewards)
    test_nothing_but_the_truth_is_liked("near", filmed, rewards)


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
