"""PSFT: the loss by hand and by brute force, and a model that learns with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import wan_folder
from torch import Tensor

from posttrain.core.files import read_jsonl
from posttrain.methods import psft
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

SHAPE = (2, 3, 4, 2, 2)  # B C F H W


class Answers:
    """A model that answers what a function of (z_t, t) says."""

    def __init__(
        self,
        answer: Callable[[Tensor, Tensor], Tensor],
        n_cond_frames: int = 1,
        times: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.velocity = lambda z_BCFHW, t_BF, text_BLD, condition: answer(z_BCFHW, t_BF)
        self.n_cond_frames, self.times = n_cond_frames, times


def clips(dtype: torch.dtype = torch.float32) -> Batch:
    z0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Batch(ids=("a", "b"), z0_BCFHW=z0, text_BLD=torch.zeros(2, 1, 1))


def exact(z0: Tensor, z_t: Tensor, t_BF: Tensor) -> Tensor:
    """eps - z_0, found from z_t = (1 - t) z_0 + t eps; 0 on the clean frame."""
    t = t_BF[:, None, :, None, None]
    return torch.where(t > 0, (z_t - z0) / t.clamp(min=1e-9), 0.0)


def loss_of(
    answer: Callable[[Tensor, Tensor], Tensor], batch: Batch, **config: object
) -> tuple[Tensor, dict[str, Tensor]]:
    return psft.psft_loss(Answers(answer), batch, psft.Config(**config), Random(0, 0, [0, 1]))


def test_without_a_given_frame_all_are_noisy_and_bear_the_loss() -> None:
    """Off by 1 on frame 0 of the first clip, by 2 on all of the second: (1/4 + 4) / 2."""
    batch, seen = clips(torch.float64), []
    off = torch.zeros(2, 1, 4, 1, 1, dtype=torch.float64)
    off[0, 0, 0], off[1] = 1, 2

    def answer(z: Tensor, t_BF: Tensor) -> Tensor:
        seen.append(t_BF)
        return exact(batch.z0_BCFHW, z, t_BF) + off

    loss, _ = psft.psft_loss(Answers(answer, n_cond_frames=0), batch, psft.Config(), Random(0, 0, [0, 1]))
    assert loss.item() == pytest.approx((1 / 4 + 4) / 2, rel=1e-6)
    assert (seen[0] == seen[0][:, :1]).all()
    assert (seen[0] > 0).all()


def test_an_expert_sees_its_times() -> None:
    batch, seen = clips(), []
    for step in range(20):
        model = Answers(lambda z, t: seen.append(t) or z, n_cond_frames=0, times=(0.5, 0.6))
        psft.psft_loss(model, batch, psft.Config(), Random(0, step, [0, 1]))
    times = torch.cat(seen)
    assert (times >= 0.5).all()
    assert (times < 0.6).all()
    assert len(times[:, 0].unique()) == 40


def test_the_exact_velocity_has_no_loss() -> None:
    batch = clips(torch.float64)
    loss, metrics = loss_of(lambda z, t: exact(batch.z0_BCFHW, z, t), batch)
    assert loss < 1e-10
    explained, power = metrics["explained"]
    assert explained / power > 1 - 1e-10


def test_hand_value() -> None:
    """Off by 1 on frame 1, by 2 on frame 3 of the first clip, by 3 everywhere on the second: (5/3 + 9) / 2."""
    batch = clips(torch.float64)
    off = torch.zeros(2, 1, 4, 1, 1, dtype=torch.float64)
    off[0, 0, 1], off[0, 0, 3], off[1] = 1, 2, 3
    loss, _ = loss_of(lambda z, t: exact(batch.z0_BCFHW, z, t) + off, batch)
    assert loss.item() == pytest.approx((5 / 3 + 9) / 2, rel=1e-6)


def test_the_clean_frame_is_given_and_bears_no_loss() -> None:
    batch = clips()
    seen: list[tuple[Tensor, Tensor]] = []

    def answer(z: Tensor, t: Tensor, wrong: Tensor) -> Tensor:
        seen.append((z, t))
        return wrong

    wrong = torch.full(SHAPE, 0.5, requires_grad=True)
    loss, _ = loss_of(lambda z, t: answer(z, t, wrong), batch)
    (gradient,) = torch.autograd.grad(loss, wrong)
    z_t, t_BF = seen[0]
    assert torch.equal(z_t[:, :, 0], batch.z0_BCFHW[:, :, 0])
    assert (t_BF[:, 0] == 0).all()
    assert (t_BF[:, 1:] == t_BF[:, 1:2]).all()
    assert (t_BF[:, 1] > 0).all()
    assert gradient[:, :, 0].abs().max() == 0
    assert gradient[:, :, 1:].abs().min() > 0
    far = wrong.detach().clone()
    far[:, :, 0] = 1e6
    assert torch.equal(loss_of(lambda z, t: answer(z, t, far), batch)[0], loss)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_brute_force(timesteps: str, shift: float) -> None:
    """Element by element in float64, from the same draws: first the time, then the noise."""
    batch, random = clips(), Random(0, 0, [0, 1])
    draw = random.uniform() if timesteps == "uniform" else random.normal()
    eps = random.normal(*SHAPE[1:]).double().numpy()
    z0, total = batch.z0_BCFHW.double().numpy(), 0.0
    for b in range(2):
        u = float(draw[b]) if timesteps == "uniform" else 1 / (1 + np.exp(-float(draw[b])))
        t = shift * u / (1 + (shift - 1) * u)
        errors = []
        for index in np.ndindex(*SHAPE[1:]):
            if index[1] > 0:
                z_t = (1 - t) * z0[b][index] + t * eps[b][index]
                errors.append((np.sin(z_t) * t - (eps[b][index] - z0[b][index])) ** 2)
        total += np.mean(errors) / 2
    answer: Callable[[Tensor, Tensor], Tensor] = lambda z, t: z.sin() * t[:, None, :, None, None]  # noqa: E731
    assert loss_of(answer, batch, timesteps=timesteps, shift=shift)[0].item() == pytest.approx(total, rel=1e-5)


class Texts(Answers):
    """It answers 0 and keeps what it is asked; without a caption it has the text "" at half its size."""

    def __init__(self) -> None:
        super().__init__(lambda z, t: z)
        self.velocity, self.asked = self._velocity, list[tuple[Tensor, Tensor, Tensor]]()

    def _velocity(self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: object) -> Tensor:
        self.asked.append((z_BCFHW, t_BF, text_BLD))
        return torch.zeros_like(z_BCFHW)

    def without_caption(self, text_BLD: Tensor, empty_1LD: Tensor) -> Tensor:
        return 0.5 * empty_1LD.expand_as(text_BLD)


def test_dropped_captions() -> None:
    """The share p of them; times, noise and order are those of a training without; none at p = 0, all at p = 1."""
    batch, empty_1LD, model, counts = clips(), torch.full((1, 1, 1), -2.0), Texts(), {}
    batch = replace(batch, text_BLD=torch.tensor([3.0, 5.0]).view(2, 1, 1))
    for p in (0.0, 0.1, 1.0):
        for step in range(300):
            psft.psft_loss(model, batch, psft.Config(drop_caption=p), Random(0, step, [0, 1]), empty_1LD)
        asked, model.asked = model.asked, []
        z, t, text = (torch.stack(parts) for parts in zip(*asked, strict=True))
        if p == 0.0:
            z_without, t_without = z, t
        assert torch.equal(z, z_without)
        assert torch.equal(t, t_without)
        dropped = text.flatten(1) == -1
        assert (dropped | (text.flatten(1) == torch.tensor([3.0, 5.0]))).all()
        counts[p] = int(dropped.sum())
    assert counts == {0.0: 0, 0.1: pytest.approx(60, abs=3 * (600 * 0.09) ** 0.5), 1.0: 600}


class Still:
    """One latent clip under several names."""

    ids = ("a", "b", "c", "d")
    key = "still"

    def __init__(self, text_LD: Tensor) -> None:
        self.text_LD = text_LD

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: Sequence[int]) -> Batch:
        z0 = torch.linspace(-2, 2, 8)[:, None, None, None].expand(8, 3, 4, 4)
        count = len(indices)
        return Batch(
            tuple(self.ids[i] for i in indices), z0.repeat(count, 1, 1, 1, 1), self.text_LD.repeat(count, 1, 1)
        )


@pytest.mark.slow
def test_the_share_explained_does_not_depend_on_how_a_batch_is_split(folder: Path, tmp_path: Path) -> None:
    """1 - sum of errors / sum of squares, of clips of which some are four times as bright as others."""

    class Different(Still):
        def load(self, indices: Sequence[int]) -> Batch:
            batch = super().load(indices)
            scale = torch.tensor([1.0, 4.0, 1.0, 4.0])[list(indices)]
            return replace(batch, z0_BCFHW=batch.z0_BCFHW * scale[:, None, None, None, None])

    found = []
    for parts in (1, 2, 4):
        wan = load(ModelConfig(path=str(folder), adapter=AdapterConfig(rank=2)))
        settings = TrainConfig(steps=1, batch=4, accumulate=parts, lr=1e-3)
        run = Run(tmp_path / str(parts), wan.module, Different(wan.encode_text(["a ball."])[0]), settings)
        wan.module = run.module
        psft.train(run, wan, psft.Config())
        found += read_jsonl(tmp_path / str(parts) / "log.jsonl")
    assert [row["explained"] for row in found] == pytest.approx([found[0]["explained"]] * 3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "lr"),
    [({"init": "random"}, 2e-3), ({"adapter": AdapterConfig(rank=8)}, 2e-2)],
    ids=["all weights from random", "an adapter"],
)
def test_it_learns(tmp_path: Path, model: dict[str, object], lr: float) -> None:
    folder = wan_folder(tmp_path / "wan")
    wan = load(ModelConfig(path=str(folder), **model))
    frozen = {name: p.clone() for name, p in wan.module.named_parameters() if not p.requires_grad}
    run = Run(
        tmp_path / "run", wan.module, Still(wan.encode_text(["a ball."])[0]), TrainConfig(steps=40, batch=8, lr=lr)
    )
    wan.module = run.module
    psft.train(run, wan, psft.Config())
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert len(rows) == 40
    start, end = (np.mean([row["explained"] for row in rows[part]]) for part in (slice(4), slice(-4, None)))
    assert end > start + 0.2
    assert all(torch.equal(p, frozen[name]) for name, p in wan.module.named_parameters() if name in frozen)
