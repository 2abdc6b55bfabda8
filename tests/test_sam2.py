"""posttrain/models/sam2.py: transformers' SAM 2 for many clips at once, with gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from posttrain.models import sam2
from posttrain.models.base import ModelConfig
from posttrain.pocket import folder

FRAMES, SIZE = 4, 32


def config() -> Sam2VideoConfig:
    """The embedded architecture."""
    return Sam2VideoConfig.from_pretrained(folder("sam2"))


@pytest.fixture(scope="module")
def net() -> sam2.Sam2Tracker:
    """Weights large enough for the memory to matter."""
    net = sam2.new(config())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def scene(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(batch, SIZE, SIZE, dtype=torch.bool)
    for i in range(batch):
        mask[i, 4 + 5 * i : 12 + 5 * i, 8:16] = True
    return torch.rand(batch, 3, FRAMES, SIZE, SIZE, generator=generator) * 2 - 1, mask


def stock(net: sam2.Sam2Tracker, video_CFHW: Tensor, mask_HW: Tensor) -> Tensor:
    """What transformers' own forward, frame by frame under inference_mode, makes of one clip."""
    sam = Sam2VideoModel(net.sam.config).eval()
    sam.load_state_dict(net.sam.state_dict())
    size = (net.sam.config.image_size,) * 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (sam2.MEAN, sam2.STD))
    pictures = F.interpolate((video_CFHW.transpose(0, 1) + 1) / 2, size, mode="bilinear", antialias=True)
    session = Sam2VideoInferenceSession(
        video=(pictures - mean) / std, video_height=SIZE, video_width=SIZE, dtype=torch.float32
    )
    session.add_mask_inputs(session.obj_id_to_idx(1), 0, F.interpolate(mask_HW[None, None].float(), size))
    session.obj_with_new_inputs = [1]
    return torch.cat([sam(session, frame_idx=t).pred_masks[:, 0] for t in range(len(pictures))])


def test_one_clip_is_bit_equal_to_transformers(net: sam2.Sam2Tracker) -> None:
    video, mask = scene(1)
    with torch.no_grad():
        logits = net(video, mask)[0]
    expected = F.interpolate(stock(net, video[0], mask[0])[:, None], (SIZE, SIZE), mode="bilinear")[:, 0]
    assert torch.equal(logits, expected)
    assert (logits[1] - logits[2]).std() > 0.01


def test_many_clips_are_as_many_single_ones(net: sam2.Sam2Tracker) -> None:
    video, mask = scene(3)
    with torch.no_grad():
        together = net(video, mask)
        apart = torch.cat([net(video[i : i + 1], mask[i : i + 1]) for i in range(3)])
    assert together.shape == (3, FRAMES, SIZE, SIZE)
    # memories are rounded to bf16, so that a last bit before it can become 0.4% behind it
    assert torch.allclose(together, apart, atol=0.02 * apart[:, 1:].std())
    assert torch.equal(together[:, 0] > 0, mask)


def test_memory_matters_and_the_teachers_replaces_its_own(net: sam2.Sam2Tracker) -> None:
    video, mask = scene()
    teacher = torch.rand(2, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) > 0.5
    with torch.no_grad():
        free, taught, moved = net(video, mask), net(video, mask, teacher), net(video, mask.roll(9, 1))
    assert torch.equal(free[:, :2], taught[:, :2])
    assert not torch.allclose(free[:, 2:], taught[:, 2:])
    assert not torch.allclose(free[:, 1:], moved[:, 1:])


def test_gradient_reaches_every_picture_through_the_memory(net: sam2.Sam2Tracker) -> None:
    video, mask = scene(1)
    video.requires_grad_()
    net(video, mask)[:, 3].sum().backward()
    assert video.grad is not None
    per_frame = video.grad.abs().sum((0, 1, 3, 4))
    assert (per_frame > 0).all()
    assert torch.isfinite(per_frame).all()


def test_the_object_never_counts_as_gone(net: sam2.Sam2Tracker) -> None:
    """Grey pictures without any object still give logits, not SAM 2's constant -1024 that has no gradient."""
    video, mask = scene(1)
    with torch.no_grad():
        assert net(0 * video, mask).min() > -1000
    assert not any(p.requires_grad for p in net.sam.mask_decoder.pred_obj_score_head.parameters())


def test_stays_in_evaluation_mode(net: sam2.Sam2Tracker) -> None:
    assert not net.train().training
    assert not net.sam.training


def test_saved_and_loaded_as_transformers_does(net: sam2.Sam2Tracker, tmp_path: Path) -> None:
    sam2.Model(net).save(tmp_path / "sam2")
    video, mask = scene(1)
    loaded = sam2.load(ModelConfig(family="sam2", path=str(tmp_path / "sam2")))
    plain = Sam2VideoModel.from_pretrained(tmp_path / "sam2")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.sam.parameters(), strict=True))
    with torch.no_grad():
        assert torch.allclose(loaded(video, mask), net(video, mask), atol=1e-4)
