"""Short trainings for test_distributed.py, which runs them in one process and in several."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from posttrain.flow import SamplerConfig
from posttrain.methods import gdpo, oro, psft
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.rewards.base import total
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch


class Noise:
    """Seven latent clips of noise, each with two losers, and one text for all."""

    ids, key = tuple("abcdefg"), "noise"

    def __init__(self, text_LD: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.z0_BCFHW, self.text_LD = torch.randn(7, 8, 3, 4, 4, generator=generator), text_LD

    def __len__(self) -> int:
        return 7

    def load(self, indices: Sequence[int]) -> Batch:
        text_BLD = self.text_LD.expand(len(indices), -1, -1)
        z0_BCFHW = self.z0_BCFHW[list(indices)]
        losers_BMCFHW = torch.stack([z0_BCFHW.flip(1), z0_BCFHW.flip(3)], dim=1)
        video_BCFHW = (
            z0_BCFHW[:, :3, :1].repeat_interleave(8, 3).repeat_interleave(8, 4).tanh()
        )  # of ORO, the first picture
        return Batch(tuple(self.ids[i] for i in indices), z0_BCFHW, text_BLD, video_BCFHW, losers_BMCFHW=losers_BMCFHW)


def bright(video_BCFHW: Tensor, batch: Batch) -> Tensor:
    return video_BCFHW.flatten(1).mean(1)


def gradients(folder: Path, wan_folder: Path, rewarded: bool = False) -> dict[str, Tensor]:
    """The gradients that AdamW gets in the first step, for all weights of a small Wan, from two micro-batches.

    The method is PSFT, or with `rewarded` ORO, whose backward pass calls the wrapped transformer for each sampler step.
    """
    wan = load(ModelConfig(path=str(wan_folder)))
    config = TrainConfig(steps=1, batch=4, accumulate=2, lr=1e-3, clip=1e9)
    run = Run(folder, wan.module, Noise(wan.encode_text(["a ball falls."])[0]), config)
    names, wan.module, seen = [name for name, _ in wan.module.named_parameters()], run.module, {}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.update(zip(names, [p.grad.clone() for p in optimizer.param_groups[0]["params"]], strict=True))

    hook = register_optimizer_step_pre_hook(look)
    if rewarded:
        how = oro.Sampling(sampler=SamplerConfig(steps=3))
        for batch in run.batches():
            run.step(oro.oro_loss(wan, batch, total({"bright": (1.0, bright)}), how, run.random)[0])
    else:
        psft.train(run, wan, psft.Config())
    hook.remove()
    return seen


PREFERENCES = {
    "pair": gdpo.Config(physics=None, cached_draws=2),
    "in turn": gdpo.Config(physics=None, mode="exact", backward="in_turn"),
}


def preferences(folder: Path, wan_folder: Path) -> None:
    """Five steps of GDPO on an adapter, with each config of PREFERENCES; the curves are in the logs.

    With cached draws, one process may have to compute the reference more often than the other.
    """
    for name, config in PREFERENCES.items():
        wan = load(ModelConfig(path=str(wan_folder), adapter=AdapterConfig(rank=2)))
        inputs = gdpo.inputs(wan, config)
        data = Noise(wan.encode_text(["a ball falls."])[0])
        run = Run(folder / name, wan.module, data, TrainConfig(steps=5, batch=4, lr=1e-2, ema=0.9))
        wan.module = run.module
        gdpo.train(run, wan, config, **inputs)


def curve(folder: Path) -> None:
    """Ten steps of a small network in float64; the curve is in the log."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4)).double()
    config = TrainConfig(steps=10, batch=8, accumulate=2, lr=1e-2, clip=0.5, schedule="cosine", warmup=2, ema=0.9)
    run = Run(folder, net, Noise(torch.zeros(1, 1)), config)
    for batch in run.batches():
        x = batch.z0_BCFHW.double()
        noise = run.random.normal(*x.shape[1:])
        run.step((run.module(x + noise) - x).square().mean())


def train(out: Path, wan: Path) -> None:
    """All trainings of this file; called in each of several processes."""
    for name in ("gradients", "rewarded"):
        found = gradients(out / f"{name}-of-two", wan, name == "rewarded")
        if torch.distributed.get_rank() == 0:
            torch.save(found, out / f"{name}.pt")
    curve(out / "curve")
    preferences(out / "preferences", wan)
    torch.distributed.destroy_process_group()
