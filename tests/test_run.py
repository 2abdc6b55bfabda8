"""A run: the same numbers whether it is cut off or not, whole batch or micro-batches, and clear ends."""

import errno
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.forked import launch
from pydantic import ValidationError
from torch import nn

from posttrain.core.errors import UserError
from posttrain.training.optim import Optimizer, TrainConfig
from posttrain.training.run import Run, sample_order
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


class Cut(Exception):
    """What a loop's body may raise."""


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


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_cut_off_between_any_two_updates_it_ends_the_same(tmp_path, every):
    """Before the gradient of each of the 16 micro-batches, and started again."""
    whole = rolled(tmp_path / "whole")
    for cut in range(16):
        folder = tmp_path / str(cut)
        with pytest.raises(Cut):
            rolled(folder, cut, every)
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert left == [f"step-{step:06d}" for step in (3, 6) if 2 * step <= cut]  # between rollouts alone
        assert_same(whole, rolled(folder, every=every))
        assert log(tmp_path / "whole") == log(folder)


def asked(folder: Path) -> None:
    """Asked to stop in the first update of the second rollout."""
    folder.mkdir()
    sys.stderr = open(folder / "stderr", "w", buffering=1)
    run = Run(folder, network(), Points(), config(checkpoint_every=100))
    for batch in run.rollouts(lambda batch: batch, updates=3):
        if run.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        run.step(run.module(batch.video_BCFHW).square().mean())


@pytest.mark.slow
def test_asked_to_stop_it_ends_with_the_rollout(tmp_path):
    process = launch(asked, tmp_path / "run")
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]
    assert (tmp_path / "run" / "stderr").read_text().startswith("SIGTERM: saved step 6 of 8")


def child(folder: Path, pause: float) -> None:
    """A whole run in a process of its own; what it says goes to a file."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    weights = train(Run(folder, network(), Points(), config(steps=40, accumulate=2, checkpoint_every=2)), pause)
    torch.save(weights, folder / "end.pt")


def start(folder: Path, pause: float = 0.0) -> Any:
    folder.mkdir(exist_ok=True)
    return launch(child, folder, pause)


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


def steps_in(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(process: Any, folder: Path, steps: int) -> None:
    while steps_in(folder) < steps:
        assert process.is_alive()
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = start(whole)
    moments = random.Random(0)
    kills = 0
    while steps_in(cut) < 36:
        process = start(cut)
        wait_for_steps(process, cut, steps_in(cut) + 4)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    last = start(cut)
    last.join()
    undisturbed.join()
    assert undisturbed.exitcode == last.exitcode == 0
    assert "continues from step" in (cut / "stderr").read_text()
    assert_same(torch.load(whole / "end.pt"), torch.load(cut / "end.pt"))
    assert log(whole) == log(cut)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["step-000038", "step-000040"]  # no remnants


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(tmp_path, number):
    process = start(tmp_path, pause=0.02)
    wait_for_steps(process, tmp_path, 5)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    steps = steps_in(tmp_path)
    said = (tmp_path / "stderr").read_text()
    assert said == f"{number.name}: saved step {steps} of 40; start again to continue\n"
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    whole = train(Run(tmp_path / "whole", network(), Points(), config()))
    train(Run(tmp_path / "cut", network(), Points(), config()))
    kept = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000006", "step-000008"]  # the last two
    with open(kept[-1] / "state.pt", "rb+") as stream:
        stream.truncate(100)
    run = Run(tmp_path / "cut", network(), Points(), config())
    assert "step-000008: is damaged" in capsys.readouterr().err
    assert run.steps == 6
    assert_same(whole, train(run))
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


@pytest.mark.parametrize("damage", [lambda path: path.write_text(path.read_text().replace("1", "2", 1)), Path.unlink])
def test_a_damaged_log_is_said(tmp_path, capsys, damage):
    train(Run(tmp_path, network(), Points(), config()))
    train(Run(tmp_path, network(), Points(), config()))
    assert "log.jsonl" not in capsys.readouterr().err
    damage(tmp_path / "log.jsonl")
    train(Run(tmp_path, network(), Points(), config()))
    assert "log.jsonl: is missing or not what was written" in capsys.readouterr().err


def test_a_disk_that_does_not_answer_loses_no_checkpoint(tmp_path, monkeypatch):
    train(Run(tmp_path, network(), Points(), config()))
    before = log(tmp_path)

    def silent(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", silent)
        with pytest.raises(OSError, match="Input/output error"):
            Run(tmp_path, network(), Points(), config())
    assert Run(tmp_path, network(), Points(), config()).steps == 8
    assert log(tmp_path) == before


def test_the_log_stays_until_training_begins_again(tmp_path):
    train(Run(tmp_path, network(), Points(), config()))
    shutil.rmtree(tmp_path / "checkpoints")
    run = Run(tmp_path, network(), Points(), config())
    assert len(log(tmp_path)) == 8
    train(run)
    assert [row["step"] for row in log(tmp_path)] == list(range(1, 9))


def test_a_finished_run_started_again_gives_its_weights(tmp_path):
    assert_same(
        train(Run(tmp_path, network(), Points(), config())), train(Run(tmp_path, network(), Points(), config()))
    )


def test_other_settings_or_clips_do_not_continue_a_run(tmp_path):
    train(Run(tmp_path, network(), Points(), config()))
    with pytest.raises(UserError, match="step-000008") as raised:
        Run(tmp_path, network(), Points(), config(lr=2e-2))
    assert (raised.value.code, raised.value.field) == ("other_run", "train.lr")
    other = Points()
    other.key = "other points"
    with pytest.raises(UserError) as raised:
        Run(tmp_path, network(), other, config())
    assert (raised.value.code, raised.value.field) == ("other_run", "data")
    start = network()
    start[0].bias.data += 1  # frozen, so in no checkpoint
    with pytest.raises(UserError) as raised:
        Run(tmp_path, start, Points(), config())
    assert (raised.value.code, raised.value.field) == ("other_run", "model")
    assert len(log(tmp_path)) == 8  # and nothing was lost


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
