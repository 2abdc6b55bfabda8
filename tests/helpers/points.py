"""A small network that a run trains on points."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch


class Points:
    """Thirteen points; the one named 'bad' can be made infinite."""

    def __init__(self, bad: float = 0.0) -> None:
        self.ids = [f"p{i}" for i in range(12)] + ["bad"]
        self.video = torch.randn(13, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        self.video[12] += bad
        self.key = f"points {bad}"

    def __len__(self) -> int:
        return 13

    def load(self, indices: Any) -> Batch:
        return Batch(ids=tuple(self.ids[i] for i in indices), video_BCFHW=self.video[list(indices)])


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, 4))
    net[0].bias.requires_grad_(False)
    return net


def config(**changes: Any) -> TrainConfig:
    values = {"steps": 8, "batch": 4, "lr": 1e-2, "schedule": "cosine", "warmup": 2, "ema": 0.9, "checkpoint_every": 3}
    return TrainConfig(**{**values, **changes})


def train(run: Run, pause: float = 0.0) -> dict[str, torch.Tensor]:
    for batch in run.batches():
        x = batch.video_BCFHW
        assert x is not None
        noise = run.random.normal(*x.shape[1:])
        run.step((run.module(x + noise) - x).square().mean(), noise=noise.mean())
        time.sleep(pause)
    return {k: v.clone() for k, v in run.finish().state_dict().items()}


def log(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Cut(Exception):
    """What a loop's body may raise."""


def rolled(folder: Path, cut: int | None = None, every: int = 1) -> dict[str, torch.Tensor]:
    """Several updates on each rollout: the model's own answers, which count the more the nearer they are to the truth.

    It is cut off before the gradient of micro-batch `cut` of those that it sees.
    """
    run = Run(folder, network(), Points(), config(accumulate=2, checkpoint_every=every))

    def rollout(batch: Batch) -> tuple[torch.Tensor, ...]:
        x = batch.video_BCFHW
        with torch.no_grad():
            answer = run.module(x + run.random.normal(*x.shape[1:]))
        score = -(answer - x).square().flatten(1).mean(1)
        return x, answer, (score - score.mean()).exp().view(-1, 1, 1, 1, 1)

    for number, (x, answer, weight) in enumerate(run.rollouts(rollout, updates=3)):
        if number == cut:
            raise Cut
        noise = run.random.normal(*x.shape[1:])
        loss = (weight * (run.module(x + noise) - answer).square()).mean()
        run.step(loss, answer=answer.mean(), x=x.mean(), noise=noise.mean())
    return {k: v.clone() for k, v in run.finish().state_dict().items()}
