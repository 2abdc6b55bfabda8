"""posttrain/pretraining/segmenter.py: windows of clips, the loss, and training either segmenter."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from helpers.falling import write_dataset
from helpers.tiny import TINY_VAE
from torch import Tensor
from transformers import Sam2VideoConfig

from posttrain import cli
from posttrain.core.files import read_jsonl
from posttrain.nets import sam2, tracker
from posttrain.pocket import folder
from posttrain.pretraining import segmenter
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

FRAMES, SIZE = 9, 32
PLAIN = segmenter.Config(lengths=(3,), max_stride=2, twin=0, recolour=0, degrade=0, teacher=0)


class Squares:
    """Clips of a red square (1) moving right and a blue one (2) at rest; a speck (3) too small to follow."""

    def __init__(self, count: int = 4) -> None:
        self.ids = [f"clip{i}" for i in range(count)]
        self.key = "squares"

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: list[int]) -> Batch:
        video = torch.full((len(indices), 3, FRAMES, SIZE, SIZE), -0.2)
        instances = torch.zeros(len(indices), FRAMES, SIZE, SIZE, dtype=torch.uint8)
        for k, i in enumerate(indices):
            for t in range(FRAMES):
                for body, (x, y, side) in enumerate([(2 + 2 * t, 4 + i, 6), (20, 20, 7), (2, 28, 2)], 1):
                    instances[k, t, y : y + side, x : x + side] = body
                    video[k, :, t, y : y + side, x : x + side] = torch.eye(3)[(body + 1) % 3].view(3, 1, 1)
        ids = tuple(self.ids[i] for i in indices)
        return Batch(ids=ids, video_BCFHW=video, instances_BFHW=instances)


def draw(config: segmenter.Config, steps: int = 20) -> list[tuple[Tensor, Tensor]]:
    batch = Squares().load([0, 1, 2, 3])
    return [segmenter.windows(batch, config, Random(0, step, range(4))) for step in range(steps)]


def test_windows_follow_one_body_with_its_own_mask() -> None:
    """Whatever is mirrored, reversed or skipped: the mask marks pixels of one colour, those of one large body."""
    colours = set()
    for video, mask in draw(PLAIN):
        assert video.shape == (4, 3, 3, SIZE, SIZE)
        assert mask.shape == (4, 3, SIZE, SIZE)
        assert mask.dtype == torch.bool
        for v, m in zip(video, mask, strict=True):
            inside = v[:, m].unique(dim=1)
            assert inside.shape[1] == 1
            colours.add(tuple(inside[:, 0].tolist()))
            assert (m.sum((1, 2)) >= 36).all()
            # nothing of that colour is left out
            assert ((v == inside[:, :, None, None]).all(0) == m).all()
    assert colours == {(0.0, 0.0, 1.0), (1.0, 0.0, 0.0)}


def test_windows_skip_and_reverse_time() -> None:
    steps = set()
    for _, mask in draw(PLAIN):
        for m in mask:
            columns = m.any(1).float()
            centre = (columns * torch.arange(SIZE)).sum(1) / columns.sum(1)
            steps.add(round(float(centre[1] - centre[0])))
            assert centre[2] - centre[1] == pytest.approx(float(centre[1] - centre[0]))
    assert steps == {-4, -2, 0, 2, 4}


def test_windows_depend_on_the_random_numbers_alone() -> None:
    config = segmenter.Config(lengths=(2, 4))
    first, second = draw(config, 4), draw(config, 4)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))
    assert {video.shape[2] for video, _ in first} == {2, 4}


def test_colours_and_noise_stay_in_range_and_leave_the_mask() -> None:
    config = PLAIN.model_copy(update={"recolour": 1.0, "degrade": 1.0})
    for (video, mask), (plain, same) in zip(draw(config), draw(PLAIN), strict=True):
        assert video.abs().max() <= 1
        assert torch.equal(mask, same)
        assert not torch.allclose(video, plain)


def test_a_twin_looks_like_the_body_and_stays_behind_it() -> None:
    video, mask = draw(PLAIN, 1)[0]
    doubled = segmenter.twin(video[0], mask[0], torch.tensor([0.5, 0.25]))
    assert torch.equal(doubled[:, mask[0]], video[0][:, mask[0]])
    copy = mask[0].roll((SIZE // 2, SIZE // 4), (1, 2)) & ~mask[0]
    assert torch.equal(doubled[:, copy], video[0][:, mask[0]][:, :1].expand(3, int(copy.sum())))
    assert torch.equal(doubled[:, ~copy], video[0][:, ~copy])


def test_crowds_are_preferred() -> None:
    """A body passes another one in the second half of a clip; the windows of a crowd are all there."""
    instances = torch.zeros(FRAMES, SIZE, SIZE, dtype=torch.uint8)
    instances[:, 4:10, 4:10] = 1
    instances[FRAMES // 2 :, 4:10, 10:16] = 2
    mask = instances == 1
    assert segmenter.touching(mask[:2], instances[:2]) == 0
    assert segmenter.touching(mask[-2:], instances[-2:]) == 6
    assert segmenter.touching(mask[FRAMES // 2 - 1 : FRAMES // 2 + 1], instances[FRAMES // 2 - 1 :][:2]) == 3


def test_windows_are_of_what_is_shown() -> None:
    batch = Squares().load([0, 1, 2, 3])

    def darken(name: str, video: Tensor) -> Tensor:
        assert video.shape == (3, FRAMES, SIZE, SIZE)
        return torch.full_like(video, -1.0 if name == "clip2" else 1.0)

    video, _ = segmenter.windows(batch, PLAIN, Random(0, 0, range(4)), darken)
    assert [v.unique().tolist() for v in video] == [[1], [1], [-1], [1]]


def test_a_clip_without_bodies_has_empty_masks() -> None:
    batch = Squares().load([0])
    assert batch.instances_BFHW is not None
    empty = replace(batch, instances_BFHW=torch.zeros_like(batch.instances_BFHW))
    _, mask = segmenter.windows(empty, PLAIN, Random(0, 0, [0]))
    assert not mask.any()


def test_loss_by_hand() -> None:
    """A mask of 8 of 16 pixels, met by logits of 0 (p = 1/2): BCE is log 2."""
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    loss, metrics = segmenter.segmenter_loss(lambda v, m, t: torch.zeros(1, 2, 4, 4), mask, mask, PLAIN, False)
    dice = 1 - (2 * 0.5 * 8 + 1) / (8 + 8 + 1)
    assert metrics["bce"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["dice"] == pytest.approx(dice)
    assert float(loss) == pytest.approx(PLAIN.bce * 0.693147 + dice, abs=1e-4)
    assert metrics["iou"] == 0


def test_perfect_logits_have_no_loss() -> None:
    _, mask = segmenter.windows(Squares().load([0, 1]), PLAIN, Random(0, 0, [0, 1]))
    loss, metrics = segmenter.segmenter_loss(lambda v, m, t: 200.0 * mask - 100, mask, mask, PLAIN, False)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert metrics["iou"] == 1


@pytest.mark.slow
def test_the_tracker_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tracker.Model(tracker.Tracker((8, 16, 16)))
    train = TrainConfig(steps=15, batch=4, lr=1e-2)
    run = Run(tmp_path, model.module, Squares(), train)
    segmenter.train(run, model, PLAIN)
    ious = [row["iou"] for row in read_jsonl(tmp_path / "log.jsonl")]
    assert ious[0] < 0.2
    assert sum(ious[-5:]) / 5 > 0.8


@pytest.mark.slow
def test_sam2_takes_a_step(tmp_path: Path) -> None:
    model = sam2.Model(sam2.new(Sam2VideoConfig.from_pretrained(folder("sam2"))))
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    run = Run(tmp_path, model.module, Squares(), TrainConfig(steps=1, batch=2, lr=1e-3))
    segmenter.train(run, model, PLAIN.model_copy(update={"teacher": 1.0}))
    moved = {name for name, p in run.module.named_parameters() if not torch.equal(p, before[name])}
    assert any("memory_attention" in name for name in moved)
    assert any("vision_encoder" in name for name in moved)
    assert not any("pred_obj_score_head" in name for name in moved)


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=5)
    vae = AutoencoderKLWan.from_config(TINY_VAE)
    vae.save_pretrained("wan/vae")
    recipe: dict[str, Any] = {
        "run": "try",
        "model": {"family": "tracker", "path": "pocket", "init": "random"},
        "data": {"clips": "drops"},
        "method": {"name": "segmenter", "lengths": [2], "decoded": {"path": "wan", "share": 1.0}},
        "train": {"steps": 1, "batch": 1, "lr": 0.01},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    for _ in range(2):
        assert cli.main(["train", "recipe.yaml"]) == 0
    assert "training: runs/try/adapter is complete" in capsys.readouterr().err
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained("wan/vae")
    assert cli.main(["train", "recipe.yaml"]) == 1
    assert "step-000001: was made with another method.decoded; " in capsys.readouterr().err
    shutil.rmtree("runs/try/checkpoints")
    assert cli.main(["train", "recipe.yaml"]) == 1
    assert "runs/try/adapter: was trained with another method.decoded; choose" in capsys.readouterr().err
