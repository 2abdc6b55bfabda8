"""A run: the same numbers in whole batches or micro-batches, on one process or two, and clear ends."""

import math
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.forked import launch
from helpers.points import Cut, Points, assert_same, config, log, network, rolled, train
from pydantic import ValidationError
from torch import nn

from posttrain.core.errors import UserError
from posttrain.training.optim import Optimizer
from posttrain.training.run import Run, sample_order


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = sample_order(3, 13, range(13)), sample_order(3, 13, range(13, 26))
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert sample_order(3, 13, range(10, 16)) == first[10:] + second[:3]
    assert sample_order(4, 13, range(13)) != first


def test_the_log_has_a_row_per_step_and_the_schedule(tmp_path):
    train(Run(tmp_path, network(), Points(), config(clip=0.1)))
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [round(row["lr"], 6) for row in rows[:3]] == [0.005, 0.01, 0.01]  # warm-up, then the top of the cosine
    assert rows[-1]["lr"] < rows[3]["lr"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"loss", "noise", "grad_norm"} <= rows[0].keys()


def test_the_cosine_ends_where_it_is_told(tmp_path):
    """Half-way between both ends in the middle; the last step is one short of the end."""
    train(Run(tmp_path, network(), Points(), config(warmup=0, lr_end=1e-3)))
    rates = [row["lr"] for row in log(tmp_path)]
    assert rates == pytest.approx([1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    for changes in ({"schedule": "constant", "lr_end": 1e-3}, {"lr_end": 1.0}):
        with pytest.raises(ValidationError, match="lr_end needs schedule: cosine"):
            config(**changes)


def test_frozen_parameters_stay_and_are_not_stored(tmp_path):
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    after = train(Run(tmp_path, net, Points(), config()))
    assert torch.equal(before["0.bias"], after["0.bias"])
    assert not torch.equal(before["0.weight"], after["0.weight"])
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "checkpoints" / "step-000008" / "weights.safetensors")
    assert sorted(stored) == ["0.weight", "3.bias", "3.weight"]


def test_accumulated_micro_batches_give_the_whole_batchs_gradient(tmp_path):
    plain = network()
    plain[2].p = 0.0
    split = network()
    split[2].p = 0.0
    whole = train(Run(tmp_path / "whole", plain, Points(), config(ema=0.0)))
    parts = train(Run(tmp_path / "parts", split, Points(), config(ema=0.0, accumulate=4)))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=1e-6)
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_average_is_the_one_that_is_written_down():
    net = network()
    optimizer = Optimizer(net, config(schedule="constant"), Accelerator(cpu=True))
    weight, average = net[3].weight, None
    for step in range(5):
        optimizer.module(Points().video[step]).square().mean().backward()
        optimizer.clip()
        optimizer.step()
        decay = 0.0 if step == 0 else min((1 + step) / (10 + step), 0.9)
        average = weight.detach().clone() if average is None else average + (1 - decay) * (weight - average).detach()
        own = weight.detach().clone()
        with optimizer.averaged():
            torch.testing.assert_close(weight, average)
        assert torch.equal(weight, own)
    optimizer.finish()
    torch.testing.assert_close(weight, average)


def test_bf16_computes_in_bf16_and_keeps_float_weights(tmp_path):
    run = Run(tmp_path, network(), Points(), config(steps=2, precision="bf16"))
    for batch in run.batches():
        assert run.module[0](batch.video_BCFHW).dtype == torch.bfloat16
        loss = run.module(batch.video_BCFHW).square().mean()
        assert loss.dtype == torch.float32
        run.step(loss)
    net = run.finish()
    assert net[0].weight.dtype == torch.float32
    assert net(Points().video[:1]).dtype == torch.float32  # nothing of the precision is left in it


def test_validation_joins_the_log_and_sees_the_average(tmp_path):
    seen = []

    def validate(step: int) -> tuple[dict[str, float], dict[str, Path]]:
        seen.append((step, run.module[3].weight.detach().clone()))
        torch.manual_seed(1)  # must not disturb the training
        return {"score": float(step)}, {}

    run = Run(tmp_path / "a", network(), Points(), config(), validate, validate_every=3)
    after = train(run)
    assert [row.get("score") for row in log(tmp_path / "a")] == [None, None, 3, None, None, 6, None, 8]
    assert torch.equal(seen[-1][1], after["3.weight"])
    assert_same(after, train(Run(tmp_path / "b", network(), Points(), config())))


def test_block_checkpointing_reaches_the_module_and_changes_nothing(tmp_path):
    from diffusers import WanTransformer3DModel

    def wan() -> nn.Module:
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=8, freq_dim=16,
            ffn_dim=16, num_layers=2,
        )  # fmt: skip

    ends = []
    for name, on in (("plain", False), ("recomputed", True)):
        run = Run(tmp_path / name, wan(), Points(), config(steps=2, block_checkpointing=on))
        assert run.module.is_gradient_checkpointing is on
        for batch in run.batches():
            out = run.module(batch.video_BCFHW, torch.full((4,), 500.0), torch.zeros(4, 3, 8), return_dict=False)[0]
            run.step((out - batch.video_BCFHW).square().mean())
        ends.append(run.finish().state_dict())
    assert_same(*ends)


def test_what_a_micro_batch_opens_is_closed_whatever_happens(tmp_path):
    """Precision, attention and the handlers of signals are as before, after a step and after an error in the loop."""
    before = signal.getsignal(signal.SIGTERM)

    def usual() -> bool:
        ours = torch.is_autocast_enabled("cpu") or not torch.backends.cuda.flash_sdp_enabled()
        return not ours and signal.getsignal(signal.SIGTERM) is before

    def validate(step: int) -> tuple[dict[str, float], dict[str, Path]]:
        assert not torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.flash_sdp_enabled()
        return {"seen": 1.0}, {}

    def begun() -> Run:
        return Run(tmp_path, network(), Points(), config(precision="bf16"), validate, validate_every=1)

    def cut_off() -> None:
        run = begun()
        for number, batch in enumerate(run.batches()):
            assert torch.is_autocast_enabled("cpu")
            assert not torch.backends.cuda.flash_sdp_enabled()
            run.step(run.module(batch.video_BCFHW).square().mean())
            if number == 2:
                raise Cut

    with pytest.raises(Cut):
        cut_off()
    assert usual()
    train(begun())
    assert usual()
    assert [row["seen"] for row in log(tmp_path)] == [1.0] * 8


def test_a_batch_without_its_step_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="called 0 times"):
        list(Run(tmp_path, network(), Points(), config()).batches())


def test_a_rollout_serves_several_updates(tmp_path):
    """Its clips and answers stay, its noise does not; the last has fewer, where there are no more steps."""
    rolled(tmp_path)
    rows = log(tmp_path)
    for name in ("answer", "x"):
        values = [row[name] for row in rows]
        assert values[0] == values[1] == values[2] != values[3] == values[4] == values[5] != values[6] == values[7]
    assert len({row["noise"] for row in rows}) == 8
    # clips in the order of a run that takes each batch once
    seen = [sample_order(0, 13, range(4 * number, 4 * number + 4)) for number in (0, 0, 0, 1, 1, 1, 2, 2)]
    clips = Points().video.flatten(1).mean(1)
    assert [row["x"] for row in rows] == pytest.approx([float(clips[order].mean()) for order in seen], abs=1e-6)


def test_one_update_is_a_batch(tmp_path):
    ends = []
    for name in ("batches", "rollouts"):
        run = Run(tmp_path / name, network(), Points(), config(accumulate=2))
        for batch in run.batches() if name == "batches" else run.rollouts(lambda batch: batch, updates=1):
            run.step((run.module(batch.video_BCFHW) + run.random.normal(3, 2, 4, 4)).square().mean())
        ends.append(run.finish().state_dict())
    assert_same(*ends)
    assert log(tmp_path / "batches") == log(tmp_path / "rollouts")


def rank(folder: Path, number: int, port: int) -> None:
    """One of two processes of a distributed run on the CPU."""
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {**{k: str(v) for k, v in places.items()}, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    net = network()
    net[2].p = 0.0
    run = Run(folder, net, Points(), config(accumulate=2))
    assert run.accelerator.num_processes == 2
    weights = train(run)
    if number == 0:
        torch.save(weights, folder / "end.pt")


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path):
    net = network()
    net[2].p = 0.0
    alone = train(Run(tmp_path / "one", net, Points(), config()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [launch(rank, tmp_path / "two", number, port) for number in range(2)]:
        process.join()
        assert process.exitcode == 0
    together = torch.load(tmp_path / "two" / "end.pt")
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-6)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])  # 1e30: a finite loss can have an infinite gradient
def test_not_a_number_names_the_clips_and_keeps_the_last_checkpoint(tmp_path, bad):
    run = Run(tmp_path, network(), Points(bad), config(batch=1, steps=13, checkpoint_every=1, schedule="constant"))
    step = sample_order(0, 13, range(13)).index(12)
    assert step > 0
    kept = rf"{tmp_path}/checkpoints/step-{step:06d}"
    with pytest.raises(UserError, match=rf" step {step + 1}, clips bad; .*{kept};") as raised:
        train(run)
    assert (raised.value.code, raised.value.field) == ("not_finite", "train.lr" if math.isfinite(bad) else "")
    assert len(log(tmp_path)) == step
    assert Run(tmp_path, network(), Points(bad), config(batch=1, steps=13, schedule="constant")).steps == step


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError) as raised:
        Run(tmp_path, network(), Points(), config(accumulate=3))
    assert (raised.value.code, raised.value.field) == ("mismatch", "train.batch")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(a folder on the way is a file\)"):
        Run(tmp_path / "file" / "run", network(), Points(), config())
