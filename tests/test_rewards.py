"""posttrain/rewards: exact gradients through their networks, what each sees of filmed violations, and a new one."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
from helpers.squares import GENERATOR, SIZE, random, scene
from helpers.unrounded import Unrounded
from torch import Tensor, nn
from torch.nn import functional as F

import posttrain.rewards
from posttrain.core.recipe import Plugin, PluginFrom, Strict, load, plugins, resolve
from posttrain.data.dataset import Split, open_split
from posttrain.flow import SamplerConfig
from posttrain.methods.oro import Sampling, oro_loss
from posttrain.models.base import ModelConfig
from posttrain.models.wan import loading as wan_model
from posttrain.models.wan.model import Wan
from posttrain.rewards import segmentation, trajectory
from posttrain.rewards.base import Reward, load_all, total, truths
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    GENERATOR.manual_seed(0)


def slope(function: Callable[[Tensor], Tensor], x: Tensor, way: Tensor, step: float) -> float:
    """The derivative of `function` along `way`, by central differences."""
    with torch.no_grad():
        return float((function(x + step * way) - function(x - step * way)).sum() / (2 * step))


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
