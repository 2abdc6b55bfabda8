"""PhyGDPO's loop: with each kind of reference, with cached errors, and cut off."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.core.meter import Meter
from posttrain.methods import gdpo
from posttrain.methods.gdpo import Config, physics_weights
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch


class Pairs:
    """Four groups of latents, or fewer: the winners all alike, three losers of noise; the first frame is the same."""

    key = "pairs"

    def __init__(self, text_LD: Tensor, count: int = 4) -> None:
        self.text_LD, self.ids = text_LD, tuple("abcd"[:count])
        self.z0_BCFHW = torch.linspace(-2, 2, 8)[:, None, None, None].expand(4, 8, 3, 4, 4)
        self.losers_BMCFHW = torch.randn(4, 3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.losers_BMCFHW[:, :, :, 0] = self.z0_BCFHW[:, None, :, 0]
        self.scores_BM2 = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: Sequence[int]) -> Batch:
        some, text_BLD = list(indices), self.text_LD.expand(len(indices), -1, -1)
        semantic_adherence_BM, physical_commonsense_BM = self.scores_BM2[some].unbind(-1)
        ids = tuple(self.ids[i] for i in some)
        return Batch(
            ids,
            self.z0_BCFHW[some],
            text_BLD,
            losers_BMCFHW=self.losers_BMCFHW[some],
            semantic_adherence_BM=semantic_adherence_BM,
            physical_commonsense_BM=physical_commonsense_BM,
        )


def adapted(folder: Path, **config: Any) -> Wan:
    return load(ModelConfig(path=str(folder), **{"adapter": AdapterConfig(rank=4)} | config))


def disturb(wan: Wan) -> None:
    """Stand in for training: B is no longer zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(9)
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)


@contextmanager
def gradients_of_each_step() -> Iterator[list[list[Tensor]]]:
    seen: list[list[Tensor]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def trained(
    out: Path, wan: Wan, config: Config, disturbed: bool = False, groups: int = 4, **train: Any
) -> tuple[list[dict[str, Any]], list[list[Tensor]]]:
    """The log, and the gradients that AdamW got."""
    settings = {"steps": 3, "batch": 2, "lr": 1e-3, "clip": 1e9} | train
    inputs = gdpo.inputs(wan, config)
    if disturbed:
        disturb(wan)
    run = Run(out, wan.module, Pairs(wan.encode_text(["a ball."])[0], groups), TrainConfig(**settings))
    wan.module = run.module
    with gradients_of_each_step() as seen:
        gdpo.train(run, wan, config, **inputs)
    return read_jsonl(out / "log.jsonl"), seen


def start_of(config: Config) -> float:
    """What the loss is where policy and reference agree, without physics rewarding: of a batch, so gamma is 1."""
    return {"pair": 3 * math.log(2), "sum": 3 * math.log(2), "exact": math.log(4)}[config.mode]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["pair", "sum", "exact"])
def test_it_starts_where_it_must(folder: Path, tmp_path: Path, mode: str, precision: str) -> None:
    """Also in bf16: the new adapter adds zero, so that the two errors are the same bits."""
    config = Config(mode=mode, physics=None)
    rows, _ = trained(tmp_path, adapted(folder), config, precision=precision, steps=1)
    assert rows[0]["loss"] == pytest.approx(start_of(config), rel=1e-6)
    assert (rows[0]["margin"], rows[0]["accuracy"]) == (0, 0)
    assert rows[0]["err_w"] == rows[0]["err_w_ref"] > 0
    assert rows[0]["err_l"] == rows[0]["err_l_ref"] != rows[0]["err_w"]
    assert rows[0]["grad_norm"] > 0


def test_physics_rewarding_reaches_the_loss(folder: Path, tmp_path: Path) -> None:
    rows, _ = trained(tmp_path, adapted(folder), Config(mode="sum"), steps=1, batch=4)
    _, gamma = physics_weights(*Pairs(torch.zeros(1, 1)).scores_BM2.unbind(-1))
    assert rows[0]["loss"] == pytest.approx(gamma.sum(1).mean().item() * math.log(2), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block_checkpointing", [False, True])
def test_the_reference_is_the_base_to_the_bit(
    folder: Path, tmp_path: Path, precision: str, block_checkpointing: bool
) -> None:
    """While the adapter and its average move on: that of a copy made at the start."""
    options = {"precision": precision, "block_checkpointing": block_checkpointing, "ema": 0.9, "lr": 1e-2}
    rows, _ = trained(tmp_path / "lora", adapted(folder), Config(mode="sum"), steps=5, **options)
    copied, _ = trained(
        tmp_path / "copy", adapted(folder), Config(mode="sum", reference="full_copy"), steps=5, **options
    )
    for name in ("err_w_ref", "err_l_ref", "err_w", "err_l", "loss"):
        assert [row[name] for row in copied] == [row[name] for row in rows], name
    assert all(row["err_l"] != row["err_l_ref"] for row in rows[1:])


def test_the_reference_stays(folder: Path, tmp_path: Path) -> None:
    """One group with one draw of (t, eps), each step asked anew."""
    wan, config = adapted(folder), Config(mode="sum", cached_draws=1)
    run = Run(tmp_path, wan.module, Pairs(wan.encode_text(["a ball."])[0], 1), TrainConfig(steps=4, batch=1, lr=1e-2))
    wan.module, seen, own = run.module, [], []
    for batch in run.batches():
        drawn = gdpo.draw(wan, batch, config, run)
        with torch.no_grad(), gdpo.reference(wan, None, "fp32"):
            seen.append(gdpo.errors(wan, drawn, config))
        own.append(gdpo.errors(wan, drawn, config))
        run.step(gdpo.compare(own[-1], seen[-1], drawn, config)[0])
    assert torch.equal(seen[0], own[0])
    assert all(torch.equal(seen[0], later) for later in seen)
    assert not any(torch.equal(seen[0], later) for later in own[1:])


def test_the_losses_gradient_is_the_adapters_alone(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder)
    frozen = {name: p.clone() for name, p in wan.module.named_parameters() if not p.requires_grad}
    trained(tmp_path, wan, Config())
    assert all(torch.equal(p, frozen[name]) for name, p in wan.module.named_parameters() if name in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pair", "sum", "exact"])
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16", "block_checkpointing": True}, {"accumulate": 2}], ids=str
)
def test_in_turn_has_the_gradients_of_together(
    folder: Path, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    """From a disturbed adapter, where the coefficients are all different."""
    found = {}
    for backward in ("together", "in_turn"):
        config = Config(mode=mode, backward=backward, beta_T=10.0)
        found[backward] = trained(tmp_path / backward, adapted(folder), config, disturbed=True, batch=4, **options)
    (rows, together), (others, in_turn) = found["together"], found["in_turn"]
    tolerance = 2e-2 if "precision" in options else 1e-4  # a batch of another size is rounded in another way
    for row, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=tolerance)
        assert other["margin"] == pytest.approx(row["margin"], rel=tolerance, abs=tolerance / 10)
    norm = torch.cat([g.flatten() for g in together[0]]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(together[0], in_turn[0], strict=True)]).norm()
    assert norm > 1e-3
    assert apart < tolerance * norm


def test_in_turn_logs_the_loss_itself(folder: Path, tmp_path: Path) -> None:
    """At the start log(1 + m), where the part that has the gradient is a thousand times as large."""
    config = Config(mode="exact", physics=None, backward="in_turn", beta_T=1e5)
    rows, _ = trained(tmp_path, adapted(folder), config, steps=1)
    assert rows[0]["loss"] == pytest.approx(math.log(4), rel=1e-7)


@pytest.mark.slow
def test_in_turn_has_the_memory_of_one(folder: Path, tmp_path: Path) -> None:
    """Bytes alive at the worst moment of a step, of four members: less than 0.4 of what they take together."""
    peaks = {}
    for backward in ("together", "in_turn"):
        wan, config = adapted(folder), Config(mode="sum", backward=backward)
        data, settings = Pairs(wan.encode_text(["a ball."])[0]), TrainConfig(steps=1, batch=4, lr=1e-3)
        run = Run(tmp_path / backward, wan.module, data, settings)
        wan.module = run.module
        with Meter() as meter:
            gdpo.train(run, wan, config, base=None)
        peaks[backward] = meter.peak
    assert peaks["in_turn"] < 0.4 * peaks["together"]


@contextmanager
def counted(wan: Wan) -> Iterator[list[int]]:
    """How many clips each forward call of the transformer had."""
    calls: list[int] = []
    hook = lora.unwrap(wan.transformer).register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        hook.remove()


def test_cached_errors_are_those_that_would_be_asked_for(folder: Path, tmp_path: Path) -> None:
    """Of 2 draws each, over 3 epochs: every loss is that of asking again, and the reference is asked once for each."""
    config, wan = Config(mode="exact", cached_draws=2), adapted(folder)
    run = Run(tmp_path, wan.module, Pairs(wan.encode_text(["a ball."])[0]), TrainConfig(steps=6, batch=2, lr=1e-2))
    wan.module, cache, names = run.module, {}, set()
    for batch in run.batches():
        drawn = gdpo.draw(wan, batch, config, run)
        with torch.no_grad(), gdpo.reference(wan, None, "fp32"):
            with counted(wan) as calls:
                kept = gdpo.cached_errors(wan, drawn, config, cache)
            asked = gdpo.errors(wan, drawn, config)
        torch.testing.assert_close(kept, asked, rtol=1e-6, atol=0)
        assert calls == [4] * len(set(drawn.names) - names)
        names |= set(drawn.names)
        run.step(*gdpo.compare(gdpo.errors(wan, drawn, config), kept, drawn, config)[:1])
    assert set(cache) == names
    assert len(names) <= 8 < 12
    assert {name[0] for name in names} == set("abcd")
    assert {name[1] for name in names} == {0, 1}


def test_a_run_asks_its_cached_reference_once(folder: Path, tmp_path: Path) -> None:
    """One group with one draw over 3 steps: the reference's one call has its 4 members, as each of the policy's."""
    wan = adapted(folder)
    with counted(wan) as calls:
        trained(tmp_path, wan, Config(mode="sum", cached_draws=1), groups=1, batch=1)
    assert calls == [4] * (1 + 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [Config(), Config(cached_draws=2), Config(backward="in_turn")], ids=["new draws", "cached", "in turn"]
)
def test_a_run_that_was_cut_off_ends_the_same(folder: Path, tmp_path: Path, config: Config) -> None:
    options = {"steps": 6, "checkpoint_every": 2}
    whole, _ = trained(tmp_path / "whole", adapted(folder), config, **options)

    class CutOff(Exception):
        pass

    wan = adapted(folder)
    run = Run(
        tmp_path / "cut",
        wan.module,
        Pairs(wan.encode_text(["a ball."])[0]),
        TrainConfig(batch=2, lr=1e-3, clip=1e9, **options),
    )
    wan.module, calls = run.module, 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise CutOff

    hook = register_optimizer_step_pre_hook(stop)
    with pytest.raises(CutOff):
        gdpo.train(run, wan, config, base=None)
    hook.remove()
    rows, _ = trained(tmp_path / "cut", adapted(folder), config, **options)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


@pytest.mark.slow
def test_it_learns_what_to_prefer(folder: Path, tmp_path: Path) -> None:
    rows, _ = trained(tmp_path, adapted(folder), Config(beta_T=100.0), steps=30, batch=4, lr=1e-2, clip=1.0)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert np.mean([row["accuracy"] for row in rows[-5:]]) > 0.9
    assert rows[-1]["margin"] > 0


def test_what_pair_draws_is_pair_of_all(folder: Path, tmp_path: Path) -> None:
    """The loop runs only the loser that it draws; with all errors, the loss of that one is the same."""
    wan, config = adapted(folder), Config(mode="pair", cached_draws=1)
    run = Run(tmp_path, wan.module, Pairs(wan.encode_text(["a ball."])[0]), TrainConfig(steps=4, batch=4, lr=1e-2))
    disturb(wan)
    batch, chosen = next(run.batches()), set()
    drawn = gdpo.draw(wan, batch, config, run)
    assert drawn.z0_BNCFHW.shape[1] == 2
    for b, name in enumerate(drawn.names):
        assert torch.equal(drawn.z0_BNCFHW[b, 1], batch.losers_BMCFHW[b, name[2]])
        alpha, gamma = physics_weights(
            batch.semantic_adherence_BM[b, name[2]], batch.physical_commonsense_BM[b, name[2]]
        )
        assert drawn.alpha_BM[b].item() == alpha.item()
        assert drawn.gamma_BM[b].item() == pytest.approx(3 * gamma.item())
        chosen.add(name[2])
    assert len(chosen) > 1
    assert torch.equal(drawn.eps_BNCFHW[:, 0], drawn.eps_BNCFHW[:, 1])


def test_independent_noise_has_the_same_time(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder)
    run = Run(tmp_path, wan.module, Pairs(wan.encode_text(["a ball."])[0]), TrainConfig(steps=1, batch=4, lr=1e-2))
    drawn = gdpo.draw(wan, next(run.batches()), Config(mode="sum", noise="independent"), run)
    assert drawn.t_B.shape == (4,)
    assert len({drawn.eps_BNCFHW[b, n].sum().item() for b in range(4) for n in range(4)}) == 16


def test_all_members_have_the_winners_first_frame_and_it_bears_no_loss(folder: Path, tmp_path: Path) -> None:
    """Where a loser has another one, as a sample through the autoencoder has, nothing changes."""
    wan, config, found = adapted(folder), Config(mode="sum", noise="independent"), []
    for first in (0.0, 1e3):
        data = Pairs(wan.encode_text(["a ball."])[0])
        data.losers_BMCFHW[:, :, :, 0] = first
        run = Run(tmp_path / str(first), wan.module, data, TrainConfig(steps=1, batch=4, lr=1e-2))
        drawn = gdpo.draw(wan, next(run.batches()), config, run)
        found.append(gdpo.errors(wan, drawn, config))
        drawn.eps_BNCFHW[:, :, :, 0] = 1e3
        found.append(gdpo.errors(wan, drawn, config))
    assert found[0].shape == (4, 4)
    assert all(torch.equal(found[0], other) for other in found)


def test_without_scores_there_is_no_physics_rewarding(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder)
    run = Run(tmp_path, wan.module, Pairs(wan.encode_text(["a ball."])[0]), TrainConfig(steps=1, batch=4, lr=1e-2))
    batch = next(run.batches())
    bare = Batch(batch.ids, batch.z0_BCFHW, batch.text_BLD, losers_BMCFHW=batch.losers_BMCFHW)
    with pytest.raises(UserError) as raised:
        gdpo.draw(wan, bare, Config(), run)
    assert (raised.value.code, raised.value.field) == ("required", "method.physics")
    assert (gdpo.draw(wan, bare, Config(physics=None), run).alpha_BM == 1).all()


def test_a_reference_that_is_not_the_start_is_refused(folder: Path) -> None:
    wan = adapted(folder)
    disturb(wan)
    with pytest.raises(UserError) as raised:
        gdpo.inputs(wan, Config())
    assert (raised.value.code, raised.value.field) == ("conflict", "model.start")
    bare = load(ModelConfig(path=str(folder)))
    with pytest.raises(UserError) as raised:
        gdpo.inputs(bare, Config())
    assert (raised.value.code, raised.value.field) == ("required", "model.adapter")
    copied = gdpo.inputs(bare, Config(reference="full_copy"))["base"]
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in bare.module.parameters())


def test_all_weights_train_beside_a_copy(folder: Path, tmp_path: Path) -> None:
    config = Config(mode="sum", reference="full_copy", cached_draws=1)
    rows, _ = trained(tmp_path, adapted(folder, adapter=None), config, steps=4, batch=1, groups=1)
    assert len({row["err_l_ref"] for row in rows}) == 1
    assert len({row["err_l"] for row in rows}) == 4
