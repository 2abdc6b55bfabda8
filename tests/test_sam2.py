"""posttrain/nets/sam2.py: transformers' SAM 2 for many clips at once, with gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.nets import sam2
from posttrain.pocket import folder

FRAMES, SIZE = 4, 32
FAR = 6  # frames; more than are remembered


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


@pytest.mark.parametrize("multimask", [False, True])
def test_clicks_are_followed_as_transformers_does(multimask: bool) -> None:
    """Through the library's own forward and session, over more frames than are remembered."""
    settings = config()
    settings.multimask_output_in_sam = multimask  # as published checkpoints have it: one click, three masks, the best
    torch.manual_seed(4)
    sam = Sam2VideoModel(settings).eval()
    with torch.no_grad():
        for p in sam.parameters():
            p.add_(0.03 * torch.randn(p.shape))
    video = torch.rand(3, FAR, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    points, labels = ([[30.0, 8.0]], [1]) if multimask else ([[30.0, 8.0], [3.0, 20.0]], [1, 0])

    size = (settings.image_size,) * 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (sam2.MEAN, sam2.STD))
    pictures = F.interpolate((video.transpose(0, 1) + 1) / 2, size, mode="bilinear", antialias=True)
    session = Sam2VideoInferenceSession((pictures - mean) / std, video_height=32, video_width=48, dtype=torch.float32)
    scaled = torch.tensor(points) * torch.tensor([size[1] / 48, size[0] / 32])  # as the library's processor does
    session.add_point_inputs(
        session.obj_id_to_idx(1), 0, {"point_coords": scaled[None, None], "point_labels": torch.tensor([[labels]])}
    )
    session.obj_with_new_inputs = [1]
    expected = torch.cat([sam(session, frame_idx=t).pred_masks for t in range(FAR)])
    expected = F.interpolate(expected.float(), (32, 48), mode="bilinear")[:, 0]

    net = sam2.Sam2Tracker(sam)
    frames = (video[None, :, t] for t in range(FAR))
    with torch.no_grad():
        logits = torch.cat(list(net.follow(frames, FAR, points_P2=torch.tensor(points), labels_P=torch.tensor(labels))))
    assert logits.shape == (FAR, 1, 32, 48)
    assert torch.equal(logits[:, 0], expected)
    assert (logits[0] - logits[-1]).std() > 1e-3
    moved = next(
        iter(net.follow([video[None, :, 0]], 1, points_P2=torch.tensor([[3.0, 3.0]]), labels_P=torch.tensor([1])))
    )
    assert not torch.equal(moved[0], logits[0])


def test_a_long_video_needs_no_more_memory_than_a_short_one(net: sam2.Sam2Tracker) -> None:
    video, mask = scene(1)
    kept: list[int] = []
    prepare = net.sam._prepare_memory_conditioned_features

    def spy(inference_session: Sam2VideoInferenceSession, **rest: object) -> Tensor:
        kept.append(sum(len(outputs) for outputs in inference_session.output_dict_per_obj[0].values()))
        return prepare(inference_session=inference_session, **rest)

    net.sam._prepare_memory_conditioned_features = spy
    try:
        with torch.no_grad():
            list(net.follow((video[:, :, t % FRAMES] for t in range(FAR + 2)), FAR + 2, mask))
    finally:
        del net.sam._prepare_memory_conditioned_features
    assert kept[:3] == [1, 2, 3]
    assert max(kept) == kept[-1] == 1 + max(net.sam.config.num_maskmem, net.sam.config.max_object_pointers_in_encoder)


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


def test_what_is_trained_gets_a_gradient(net: sam2.Sam2Tracker) -> None:
    """All of it: processes that share a batch would wait for each other's."""
    net.zero_grad()
    video, mask = scene()
    net(video, mask)[:, 1:].square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]


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


def test_what_is_no_sam2_is_named(net: sam2.Sam2Tracker, tmp_path: Path) -> None:
    def load(path: Path | str) -> None:
        sam2.load(ModelConfig(family="sam2", path=str(path)))

    with pytest.raises(
        UserError, match=r"nowhere/config\.json: does not exist; name the folder of a Sam2VideoModel or a hub"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^owner/name: cannot be loaded as a Sam2VideoModel"):  # no network in tests
        load("owner/name")
    sam2.Model(net).save(tmp_path / "sam2")
    weights = load_file(tmp_path / "sam2" / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tmp_path / "sam2" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"sam2: lacks mask_decoder\.iou_token\.weight; it is no whole Sam2VideoModel"):
        load(tmp_path / "sam2")
