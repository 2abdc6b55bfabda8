"""posttrain/nets/raft.py: torchvision's flow with its whole gradient, in a clip's own pixels; which weights load."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.nets import raft


@pytest.mark.slow
def test_flow_is_torchvisions_with_the_whole_gradient() -> None:
    """The same flow; and the gradient is its derivative, which torchvision's, cut before every update, is not."""
    net = raft.load(ModelConfig(family="raft", path="pocket")).flow
    generator = torch.Generator().manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1, (64, 64), mode="bilinear")
    video = torch.stack([picture.roll(2 * t, 2) for t in range(3)], 2)
    way = torch.rand(1, 3, 3, 64, 64, generator=generator, dtype=torch.float64) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(net.see(video), net(video)[-1], atol=1e-4, rtol=1e-4)

    def weighed(flow_BFCHW: Tensor) -> Tensor:
        return (flow_BFCHW * torch.linspace(-1, 1, 64)).sum()

    (cut,) = torch.autograd.grad(weighed(net(video.requires_grad_())[-1]), video)
    net, video = net.double(), video.detach().double().requires_grad_()
    (whole,) = torch.autograd.grad(weighed(net.see(video)), video)
    with torch.no_grad():
        ahead, back = (weighed(net.see(video + step * way)) for step in (1e-7, -1e-7))
    expected = (ahead - back).item() / 2e-7
    assert (whole * way).sum().item() == pytest.approx(expected, rel=1e-4)
    assert (cut * way).sum().item() != pytest.approx(expected, rel=0.1)


def original(net: raft.raft.RAFT) -> dict[str, Tensor]:
    """The large RAFT's weights under the names of the original code, written from its source: the inverse map."""
    named = {}
    for name, value in net.state_dict().items():
        for ours, theirs in (
            ("feature_encoder.", "fnet."), ("context_encoder.", "cnet."), ("convnormrelu1.0.", "conv1."),
            ("convnormrelu1.1.", "norm1."), ("convnormrelu2.0.", "conv2."), ("convnormrelu2.1.", "norm2."),
            ("convnormrelu.0.", "conv1."), ("convnormrelu.1.", "norm1."), ("net.conv.", "net.conv2."),
            ("motion_encoder.convcorr1.0", "encoder.convc1"), ("motion_encoder.convcorr2.0", "encoder.convc2"),
            ("motion_encoder.convflow1.0", "encoder.convf1"), ("motion_encoder.convflow2.0", "encoder.convf2"),
            ("motion_encoder.conv.0", "encoder.conv"), ("mask_predictor.convrelu.0", "update_block.mask.0"),
            ("mask_predictor.conv", "update_block.mask.2"),
            *((f"recurrent_block.convgru{n}.conv{g}", f"gru.conv{g}{n}") for n in "12" for g in "zrq"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        named[f"module.{name}"] = value
        if ".downsample.1." in name:  # the same norm under two names
            named["module." + name.replace("downsample.1", "norm3")] = value
    return named


def test_the_original_codes_weights_load(tmp_path: Path) -> None:
    """raft-things.pth has 179 tensors under these names; each finds its place, and none is left over."""
    net = raft.optical_flow.raft_large(weights=None)
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value.float()).to(value.dtype) for name, value in net.state_dict().items()}
    net.load_state_dict(weights)
    theirs = original(net)
    assert len(theirs) == 179
    assert "module.cnet.layer2.0.norm3.running_mean" in theirs
    assert "module.update_block.gru.convq2.bias" in theirs
    torch.save(theirs, tmp_path / "things.pth")
    loaded = raft.load(ModelConfig(family="raft", path=str(tmp_path / "things.pth"))).flow.net.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_torchvisions_weights_load_from_a_file(tmp_path: Path) -> None:
    for name in ("raft_large", "raft_small"):
        net = getattr(raft.optical_flow, name)(weights=None)
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
        loaded = raft.load(ModelConfig(family="raft", path=str(tmp_path / f"{name}.pth"))).flow.net
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))


def test_what_is_no_raft_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name, code in (
        ("nowhere", "missing"), ("other.pth", "mismatch"), ("list.pth", "format"), ("code.pth", "damaged")
    ):  # fmt: skip
        with pytest.raises(UserError, match=name) as raised:
            raft.load(ModelConfig(family="raft", path=str(tmp_path / name)))
        assert (raised.value.code, raised.value.field) == (code, "path")


def test_flow_of_a_wide_picture_under_autocast() -> None:
    """Coordinates from 256 on are steps of a pixel and more in bf16: flow is as good at the right as at the left.

    Measured: 0.12 pixels at most, at either side.
    """
    net = raft.load(ModelConfig(family="raft", path="pocket")).flow
    picture = torch.rand(1, 3, 16, 104, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = F.interpolate(picture, (128, 832), mode="bilinear")
    video = torch.stack([picture, picture.roll(3, 3)], 2)
    with torch.no_grad():
        exact = net.see(video)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net.see(video)
    assert rounded.dtype == torch.float32
    left, _, right = ((rounded - exact).abs() * (video.shape[-1] / 832)).chunk(3, -1)
    assert max(left.max(), right.max()) < 0.25
    assert right.mean() < 2 * left.mean()


def test_flow_of_a_small_clip_is_in_its_own_pixels() -> None:
    """Whatever its size, RAFT sees at least 128 pixels, and what it answers is scaled back, each axis by its own."""
    net = raft.load(ModelConfig(family="raft", path="pocket")).flow
    picture = torch.rand(1, 3, 2, 128, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = F.interpolate(picture[:, :, 0], (64, 80), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert net.see(picture).shape == (1, 1, 2, 128, 160)
        half = net.see(torch.stack([small, small.roll(2, 3)], 2))
        enlarged = F.interpolate(torch.cat([small, small.roll(2, 3)]), (128, 160), mode="bilinear")
        whole = net.see(enlarged.unflatten(0, (1, 2)).transpose(1, 2))
    expected = F.interpolate(whole[:, 0] / 2, (64, 80), mode="bilinear", antialias=True)
    torch.testing.assert_close(half[:, 0], expected)
