"""posttrain/pretraining/flow_net.py and depth_net.py: what is drawn, the losses, and that training lowers them."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.falling import SIZE, write_dataset

from posttrain import cli
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.models.base import ModelConfig
from posttrain.nets import depth, raft
from posttrain.pretraining import depth_net, flow_net
from posttrain.types import Batch, Random

FRAMES, SIDE = 6, 32
FLOW = flow_net.Config(recolour=0, degrade=0, pairs=2, shifted=0)
DEPTH = depth_net.Config(recolour=0, degrade=0, pictures=3)


def clips(count: int) -> Batch:
    """A square that moves by (3, 1) pixels a frame (x, y) before a ramp, 1 metre away and the ramp 4."""
    video = torch.linspace(-1, 1, SIDE).repeat(count, 3, FRAMES, SIDE, 1)
    instances = torch.zeros(count, FRAMES, SIDE, SIDE, dtype=torch.uint8)
    flow = torch.zeros(count, FRAMES, 2, SIDE, SIDE)
    for t in range(FRAMES):
        place = (..., t, slice(4 + t, 12 + t), slice(3 + 3 * t, 11 + 3 * t))
        instances[place] = 1
        video[place] = 1.0
        flow[:, t, :, 4 + t : 12 + t, 3 + 3 * t : 11 + 3 * t] = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    truths = {"flow_BFCHW": flow, "depth_BFHW": torch.where(instances > 0, 1.0, 4.0)}
    return Batch(tuple(map(str, range(count))), video_BCFHW=video, instances_BFHW=instances, **truths)


def test_mirrored_pairs_have_mirrored_flow() -> None:
    """Whatever is mirrored: moving the first frame's square by its flow gives the second picture's."""
    directions = set()
    for step in range(8):
        pair, flow, bodies = flow_net.draw(clips(2), FLOW, Random(0, step, range(2)))
        assert pair.shape == (4, 3, 2, SIDE, SIDE)
        assert flow.shape == (4, 2, SIDE, SIDE)
        for p, f, b in zip(pair, flow, bodies, strict=True):
            x, y = (int(v) for v in f.flatten(1).amax(1) + f.flatten(1).amin(1))
            first = (f != 0).all(0)
            second = first.roll((y, x), (0, 1))
            assert (p[:, 0, first] == 1).all()
            assert (p[:, 1, second] == 1).all()
            assert torch.equal(b, first | second)
            directions.add((x, y))
    assert directions == {(3, 1), (-3, 1), (3, -1), (-3, -1)}


def test_a_shifted_picture_has_its_shift_in_the_flow() -> None:
    """Every pixel that stays inside is found where the flow says."""
    pair = torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1, 1)
    moved, flow = flow_net.shift(pair, torch.zeros(2, 7, 9), x=2, y=-3)
    assert torch.equal(flow, torch.tensor([2.0, -3.0]).view(2, 1, 1).expand(2, 7, 9))
    assert torch.equal(moved[:, 0], pair[:, 0])
    assert torch.equal(moved[:, 1, :4, 2:], pair[:, 0, 3:, :7])


def test_the_flow_loss_by_hand() -> None:
    """One of four pixels is a body's: its weight is 1 + 1, the mean weight 5/4, |f - f*| 2 there and 1 elsewhere."""
    true = torch.zeros(1, 2, 2, 2)
    bodies = torch.tensor([[[True, False], [False, False]]])
    wrong = torch.ones(1, 2, 2, 2)
    wrong[0, :, 0, 0] = 2
    one = (2 * 2 + 3 * 1) / 4 / (5 / 4)
    loss, metrics = flow_net.flow_loss([wrong, wrong, true], true, bodies, weight=1.0)
    assert loss.item() == pytest.approx((0.8**2 + 0.8) * one)
    assert (metrics["epe"], metrics["epe_bodies"]) == (0, (0, 1))
    _, metrics = flow_net.flow_loss([wrong], true, bodies, weight=1.0)
    assert metrics["epe"].item() == pytest.approx(2**0.5 * 5 / 4)
    assert metrics["epe_bodies"] == (pytest.approx(2**0.5 * 2), 1)


def test_pictures_have_their_own_inverse_depth() -> None:
    places = set()
    for step in range(12):
        pictures, inverse, bodies = depth_net.draw(clips(2), DEPTH, Random(0, step, range(2)))
        assert pictures.shape == (6, 3, SIDE, SIDE)
        assert torch.equal(inverse, torch.where(bodies, 1.0, 0.25))
        assert (pictures.movedim(1, -1)[bodies] == 1).all()
        places |= {int(b.any(0).nonzero()[0]) for b in bodies}
    assert places == {3, 6, 9, 12, 15, 18, 21}  # of both mirrorings


def test_the_depth_loss_by_hand() -> None:
    """Of 2 x 2 pixels the body's is off by .4: with b = 1, (2 x .4 / 4) / (5 / 4), and edges of .4 / 2 in each axis."""
    answer, true = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    answer[0, 0, 0] = 0.4
    bodies = torch.tensor([[[True, False], [False, False]]])
    loss, metrics = depth_net.depth_loss(answer, true, bodies, depth_net.Config(bodies=1, difference=0.5))
    assert loss.item() == pytest.approx(0.2 / 1.25 + 0.5 * 0.2)
    assert metrics["error"].item() == pytest.approx(0.1)
    assert metrics["error_bodies"] == (pytest.approx(0.4), 1)


def test_errors_on_bodies_do_not_depend_on_how_a_batch_is_split() -> None:
    """One body pixel that is off by 0.4 in one picture, three that are right in the other: 0.1, not 0.2."""
    bodies = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])
    true, answer, estimate = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, 2)
    answer[0, 0, 0] = estimate[0, 0, 0, 0] = 0.4
    config = depth_net.Config()
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        errors = [depth_net.depth_loss(answer[p], true[p], bodies[p], config)[1]["error_bodies"] for p in parts]
        epes = [
            flow_net.flow_loss([estimate[p]], torch.zeros(2, 2, 2, 2)[p], bodies[p], 1.0)[1]["epe_bodies"]
            for p in parts
        ]
        for found in (errors, epes):
            assert float(sum(a for a, _ in found) / sum(b for _, b in found)) == pytest.approx(0.1)


def test_flow_and_depth_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=5)
    flow = np.random.default_rng(0).normal(size=(5, SIZE, SIZE, 2)).astype(np.float16)
    depths = np.full((5, SIZE, SIZE), np.inf, np.float32)
    for i in range(2):
        path = tmp_path / "drops" / "train" / f"{i:05d}.npz"
        with np.load(path) as stored:
            np.savez(path, instances=stored["instances"], flow=flow, depth=depths)
    plain = DataConfig(clips=str(tmp_path / "drops"))
    batch = Clips(plain, truths=("flow", "depth")).load([1, 0])
    np.testing.assert_array_equal(batch.flow_BFCHW[0, :, 1], flow[..., 1])
    assert batch.flow_BFCHW.dtype == torch.float32
    assert batch.depth_BFHW.shape == (2, 5, SIZE, SIZE)
    assert Clips(plain).load([0]).flow_BFCHW is None
    np.savez(tmp_path / "drops" / "train" / "00000.npz", instances=np.zeros((5, SIZE, SIZE), np.uint8))
    with pytest.raises(UserError, match=r"00000\.npz: is missing or damaged"):
        Clips(plain, truths=("flow",))
    wanted = plain.model_copy(update={"frames": 3, "fps": 8.0, "size": (16, 16)})
    with pytest.raises(UserError, match=r"train: flow are only known for clips of `sim make`") as error:
        Clips(wanted, preload=False, truths=("flow",))
    assert (error.value.code, error.value.field) == ("mismatch", "data.frames")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["raft", "depth"])
def test_training_lowers_the_loss_and_what_is_saved_loads(family: str, tmp_path: Path) -> None:
    """Through the command, on drawn squares."""
    write_dataset(tmp_path / "drops", ["train"], clips=3, frames=9)
    for path in (tmp_path / "drops" / "train").glob("*.npz"):
        with np.load(path) as stored:
            inside = stored["instances"] > 0
        tops = inside.any(2).argmax(1)
        flow = np.zeros((*inside.shape, 2), np.float16)
        flow[..., 1] = inside * np.diff(tops, append=tops[-1])[:, None, None]
        np.savez(path, instances=inside.astype(np.uint8), flow=flow, depth=np.where(inside, 1.5, 3.0))
    method = {"raft": "flow_net, shifted: 0", "depth": "depth_net"}[family]
    (tmp_path / "recipe.yaml").write_text(
        f"run: net\nmodel: {{family: {family}, path: pocket, init: random}}\ndata: {{clips: drops}}\n"
        f"method: {{name: {method}}}\ntrain: {{steps: 8, batch: 3, lr: 2.0e-3}}\n"
    )
    with contextlib.chdir(tmp_path):
        assert cli.main(["train", "recipe.yaml"]) == 0
    losses = [row["loss"] for row in read_jsonl(tmp_path / "runs/net/log.jsonl")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    config = ModelConfig(family=family, path=str(tmp_path / "runs/net/adapter"))
    loaded = {"raft": raft, "depth": depth}[family].load(config)
    with torch.no_grad():
        seen = loaded(torch.zeros(1, 3, 2, SIZE, SIZE))
    assert seen.shape == {"raft": (1, 1, 2, SIZE, SIZE), "depth": (1, 2, SIZE, SIZE)}[family]


def test_what_is_no_depth_anything_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/config\.json: does not exist; name the folder of a DepthAnything"):
        depth.load(ModelConfig(family="depth", path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"^owner/name: cannot be loaded as a DepthAnything"):  # no network in tests
        depth.load(ModelConfig(family="depth", path="owner/name"))
