"""posttrain/nets/tracker.py: a small recurrent U-Net that follows one object."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.nets import tracker

WIDTHS = (8, 8, 16)


@pytest.fixture
def net() -> tracker.Tracker:
    torch.manual_seed(0)
    return tracker.Tracker(WIDTHS)


def scene(batch: int = 2, frames: int = 4, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise clips and a square in their first frame."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(batch, size, size, dtype=torch.bool)
    mask[:, 8:16, 8:16] = True
    return torch.rand(batch, 3, frames, size, size, generator=generator) * 2 - 1, mask


def test_first_frame_is_the_given_mask(net: tracker.Tracker) -> None:
    video, mask = scene()
    logits = net(video, mask)
    assert logits.shape == (2, 4, 32, 32)
    assert torch.equal(logits[:, 0] > 0, mask)
    assert torch.equal(logits[:, 0].abs(), torch.full_like(logits[:, 0], tracker.GIVEN))


def test_future_pictures_do_not_matter(net: tracker.Tracker) -> None:
    video, mask = scene()
    changed = video.clone()
    changed[:, :, 3] = 0
    assert torch.equal(net(video, mask)[:, :3], net(changed, mask)[:, :3])


def test_a_clip_does_not_depend_on_its_batch(net: tracker.Tracker) -> None:
    video, mask = scene(3)
    mask[1] = mask[1].roll(7, 0)
    assert torch.allclose(net(video, mask)[1], net(video[1:2], mask[1:2])[0], atol=1e-5)


def test_its_own_masks_are_fed_back_and_the_teachers_replace_them(net: tracker.Tracker) -> None:
    video, mask = scene()
    free = net(video, mask)
    taught = net(video, mask, free <= 0)
    assert torch.equal(free[:, :2], taught[:, :2])  # frame 1 sees frame 0's mask in both
    assert not torch.allclose(free[:, 2:], taught[:, 2:])


def test_gradient_reaches_every_picture_through_the_masks(net: tracker.Tracker) -> None:
    video, mask = scene()
    video.requires_grad_()
    net(video, mask)[:, 3].sum().backward()
    assert video.grad is not None
    assert (video.grad.abs().sum((0, 1, 3, 4)) > 0).all()


def test_saved_and_loaded(net: tracker.Tracker, tmp_path: Path) -> None:
    tracker.Model(net).save(tmp_path / "tracker")
    video, mask = scene()
    loaded = tracker.load(ModelConfig(family="tracker", path=str(tmp_path / "tracker")))
    assert torch.equal(loaded(video, mask), net(video, mask))
    fresh = tracker.load(ModelConfig(family="tracker", path=str(tmp_path / "tracker"), init="random", seed=7))
    assert not torch.equal(fresh(video, mask), net(video, mask))


def test_missing_weights_are_named(net: tracker.Tracker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        tracker.load(ModelConfig(family="tracker", path=str(tmp_path)))
    tracker.Model(net).save(tmp_path / "tracker")
    (tmp_path / "tracker" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        tracker.load(ModelConfig(family="tracker", path=str(tmp_path / "tracker")))
