"""Open-Sora's loss, sampler, masks and tables against what is worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.models.opensora.conditioning import (
    IMAGE_SIZES,
    MASK_RATIOS,
    apply_mask_strategy,
    choose_bucket,
    draw_frame_mask,
    frame_mask,
    image_size,
    num_frames,
    parse_mask_strategy,
)
from posttrain.models.opensora.rflow import add_noise, draw_timesteps, rflow_loss, rflow_sample, timestep_transform

Calls = list[dict[str, Any]]


class Linear:
    """v = 2 x + t / 1000 + mean(y), in 4 of 8 channels; the others must not count."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **others: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "y": y, **others})
        v = 2 * x + (t / 1000)[:, None, None, None, None]
        if y is not None:
            v = v + y.mean(dim=(1, 2, 3))[:, None, None, None, None]
        return torch.cat([v, torch.full_like(v, 1e9)], dim=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("frames", "height", "width", "r"),
    [(1, 512, 512, 1), (32, 256, 256, 0.5 * math.sqrt(5)), (51, 512, 1024, math.sqrt(30)), (7, 512, 512, 1)],
)
def test_transform(frames: int, height: int, width: int, r: float) -> None:
    t = torch.tensor([0.0, 250.0, 1000.0])
    u = 0.25
    wanted = torch.tensor([0.0, 1000 * r * u / (1 + (r - 1) * u), 1000.0])
    size = (torch.full((3,), float(n)) for n in (frames, height, width))
    torch.testing.assert_close(timestep_transform(t, *size), wanted)
    torch.testing.assert_close(timestep_transform(t, frames, height, width), wanted)
    torch.testing.assert_close(timestep_transform(t[1:2], frames, height, width, scale=2.0)[0].item(),
                               1000 * 2 * r * u / (1 + (2 * r - 1) * u))  # fmt: skip


def test_transform_of_the_first_clip_decides_on_pictures() -> None:
    """As published: whether clips are pictures is read off the first one."""
    t = timestep_transform(torch.tensor([500.0, 500.0]), torch.tensor([1, 51]), 512, 512)
    assert t.tolist() == [500.0, 500.0]


def test_times_are_drawn_in_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind, middle in (("uniform", 1 / 4), ("logit-normal", 0.137), ("discrete", 1 / 4)):
        t = draw_timesteps(kind, 20_000, generator).double()  # type: ignore[arg-type]
        assert 0 <= t.min() < t.max() <= 1000
        assert float((t < 250).double().mean()) == pytest.approx(middle, abs=0.01)  # P(n < logit 1/4) = 0.136


def test_loss() -> None:
    x, eps, t = noise(2, 4, 3, 2, 2), noise(2, 4, 3, 2, 2, seed=1), torch.tensor([250.0, 1000.0])
    model = Linear()
    y = noise(2, 1, 5, 6, seed=2)
    losses = rflow_loss(model, x, eps, t, y=y, y_mask="told", fps=16)
    for b, u in enumerate((0.25, 1.0)):
        x_t = (1 - u) * x[b] + u * eps[b]
        error = 2 * x_t + u + y[b].mean() - (x[b] - eps[b])
        torch.testing.assert_close(losses[b], error.square().mean())
    assert model.calls[0]["mask"] == "told"
    assert model.calls[0]["fps"] == 16
    assert "x_mask" not in model.calls[0]


def test_loss_of_masked_frames() -> None:
    x, eps, t = noise(2, 4, 3, 2, 2), noise(2, 4, 3, 2, 2, seed=1), torch.tensor([400.0, 700.0])
    mask = torch.tensor([[False, True, True], [True, False, False]])
    model = Linear()
    losses = rflow_loss(model, x, eps, t, mask)
    (call,) = model.calls
    assert torch.equal(call["x_mask"], mask)
    assert torch.equal(call["t"], t)
    for b, u in enumerate((0.4, 0.7)):
        assert torch.equal(call["x"][b][:, ~mask[b]], x[b][:, ~mask[b]])
        x_t = (1 - u) * x[b][:, mask[b]] + u * eps[b][:, mask[b]]
        error = 2 * x_t + u - (x - eps)[b][:, mask[b]]
        torch.testing.assert_close(losses[b], error.square().mean())
    assert torch.isnan(rflow_loss(model, x, eps, t, torch.zeros(2, 3, dtype=torch.bool))).all()


def by_hand(z: Tensor, times: list[float], shift: float) -> Tensor:
    """Euler steps of v = 2 z + t / 1000 + shift."""
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        z = z + (2 * z + t / 1000 + shift) * (t - after) / 1000
    return z


def test_sampler() -> None:
    z, y, null = noise(2, 4, 3, 2, 2), noise(2, 1, 5, 6, seed=2), noise(9, 6, seed=3)
    model = Linear()
    out = rflow_sample(model, z, 4, 3.0, y=y, y_null=null, y_mask="told")
    at_null = null[:5].mean()
    for b in range(2):
        shift = float(at_null + 3.0 * (y[b].mean() - at_null))
        torch.testing.assert_close(out[b], by_hand(z[b], [1000, 750, 500, 250], shift), rtol=1e-5, atol=1e-5)
    assert len(model.calls) == 4
    assert model.calls[0]["mask"] == "told"
    assert "x_mask" not in model.calls[0]


def test_sampler_transforms_and_rounds_its_times() -> None:
    z, size = noise(2, 4, 3, 2, 2), {"num_frames": 32, "height": 256, "width": 256}
    model = Linear()
    out = rflow_sample(model, z, 3, 1.0, discrete=True, **size)
    r = 0.5 * math.sqrt(5)
    times = [1000 * r * u / (1 + (r - 1) * u) for u in (1.0, 0.667, 0.333)]
    torch.testing.assert_close(out, by_hand(z, times, 0.0), rtol=1e-5, atol=1e-5)
    plain = rflow_sample(model, z, 3, 1.0, transform=False, **size)
    torch.testing.assert_close(plain, by_hand(z, [1000, 2000 / 3, 1000 / 3], 0.0), rtol=1e-5, atol=1e-5)


def test_sampler_with_kept_and_edited_frames() -> None:
    """Frame 0 is kept, frame 1 made, frame 2 edited at strength 0.5: it starts at t = 500, the third of four steps."""
    z, model = noise(1, 4, 3, 2, 2), Linear()
    mask = torch.tensor([[0.0, 1.0, 0.5]])
    out = rflow_sample(model, z, 4, 2.0, mask, torch.Generator().manual_seed(9))
    assert torch.equal(out[:, :, 0], z[:, :, 0])
    torch.testing.assert_close(out[:, :, 1], by_hand(z[:, :, 1], [1000, 750, 500, 250], 0.0))

    generator = torch.Generator().manual_seed(9)
    fresh = [torch.randn(z.shape, generator=generator) for _ in range(3)][2]  # one is drawn at every step
    started = 0.5 * z[:, :, 2] + 0.5 * fresh[:, :, 2]
    torch.testing.assert_close(out[:, :, 2], by_hand(started, [500, 250], 0.0))
    seen = [call["x_mask"].tolist() for call in model.calls]
    assert seen == [[[False, True, False]] * 2] * 2 + [[[False, True, True]] * 2] * 2
    for call in model.calls:
        assert torch.equal(call["x"][:1, :, 0], z[:, :, 0])


def test_frames_to_make_take_part_from_the_first_step() -> None:
    """Also where rounding transforms 1000 to a little more."""
    z, ones, model = noise(1, 4, 2, 2, 2), torch.ones(1, 2), Linear()
    size = {"num_frames": 1, "height": 64, "width": 96}
    assert float(timestep_transform(torch.tensor([1000.0]), *size.values())) > 1000
    assert torch.equal(rflow_sample(model, z, 2, 1.0, ones, **size), rflow_sample(model, z, 2, 1.0, **size))
    assert bool(model.calls[0]["x_mask"].all())


def test_sampler_is_differentiable_and_ends_in_float32() -> None:
    z = noise(1, 4, 2, 2, 2).bfloat16().requires_grad_()
    out = rflow_sample(lambda x, t, **_: 0.5 * x.float(), z, 2, 1.0)
    assert out.dtype == torch.float32
    out.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 1.25**2))


def test_noise_is_added_in_float32() -> None:
    x, eps = torch.ones(1, 1, 1, 1, 1).bfloat16(), torch.zeros(1, 1, 1, 1, 1).bfloat16()
    assert float(add_noise(x, eps, torch.tensor([3.0]))) == pytest.approx(0.997)


# ------------------------------------------------------------------------------------------------ masks


def test_parse_mask_strategy() -> None:
    assert parse_mask_strategy("") == []
    assert parse_mask_strategy(None) == []
    assert parse_mask_strategy("0") == [(0, 0, 0, 0, 1, 0.0)]
    assert parse_mask_strategy("0;1,2,-3,-4,5,0.5") == [(0, 0, 0, 0, 1, 0.0), (1, 2, -3, -4, 5, 0.5)]
    for wrong in ("a", "0,,1", "0,0,0,0,1,0,0"):
        with pytest.raises(UserError) as error:
            parse_mask_strategy(wrong)
        assert (error.value.code, error.value.field) == ("value", "mask_strategy")


def test_apply_mask_strategy() -> None:
    z = noise(3, 4, 9, 2, 2)
    first, second = noise(4, 1, 2, 2, seed=1), noise(4, 7, 2, 2, seed=2)
    out, mask = apply_mask_strategy(z, [[first], [first, second], []], ["0", "0,1,-2,-3,9,0.25;1", ""])
    assert torch.equal(out[0, :, 0], first[:, 0])
    assert torch.equal(out[1, :, 6:8], second[:, 5:])  # as long as the reference lasts
    assert mask.tolist() == [[0.0] + [1.0] * 8, [1.0] * 6 + [0.25] * 2 + [1.0], [1.0] * 9]
    untouched = mask == 1
    assert torch.equal(out.movedim(1, 2)[untouched], z.movedim(1, 2)[untouched])

    again, mask = apply_mask_strategy(z, [[first], [first, second], []], ["0", "0,1,-2,-3,9,0.25;1", ""], loop=1)
    assert torch.equal(again[1, :, 0], first[:, 0])
    assert mask[0].tolist() == [1.0] * 9
    with pytest.raises(UserError) as error:
        apply_mask_strategy(z, [[first]] * 3, ["0,1", "", ""])
    assert error.value.field == "mask_strategy"


@pytest.mark.parametrize(("start", "snapped"), [(0, 0), (2, 0), (3, 5), (7, 5), (8, 10), (12, 10), (13, 10)])
def test_starts_are_snapped(start: int, snapped: int) -> None:
    """To multiples of 5, never beyond the last whole piece of the 15 frames."""
    reference = noise(4, 1, 2, 2, seed=1)
    _, mask = apply_mask_strategy(noise(1, 4, 15, 2, 2), [[reference]], [f"0,0,0,{start},1"], align=5)
    assert (mask[0] == 0).nonzero().flatten().tolist() == [snapped]


def given(kind: str, T: int, times: int = 60) -> set[tuple[int, ...]]:
    """Which frames are given, in so many draws."""
    rng = np.random.default_rng(0)
    masks = [frame_mask(kind, T, rng) for _ in range(times)]
    assert all(mask.dtype == torch.bool and mask.shape == (T,) and bool(mask.any()) for mask in masks)
    return {tuple((~mask).nonzero().flatten().tolist()) for mask in masks}


def test_training_masks() -> None:
    assert given("identity", 8) == {()}
    assert given("image_head", 8) == {(0,)}
    assert given("image_tail", 8) == {(7,)}
    assert given("image_head_tail", 8) == {(0, 7)}
    assert given("image_random", 4) == {(0,), (1,), (2,), (3,)}
    assert given("quarter_head", 9) == {(0,), (0, 1)}
    assert given("quarter_tail", 9) == {(8,), (7, 8)}
    assert given("quarter_head_tail", 9) == {(0, 8), (0, 1, 7, 8)}
    assert given("quarter_random", 8, 400) == {(i,) for i in range(8)} | {(i, i + 1) for i in range(7)}
    assert given("intepolate", 5) == {(0, 2, 4), (1, 3)}
    assert len(given("random", 9)) > 40
    with pytest.raises(UserError):
        frame_mask("quarter_middle", 8, np.random.default_rng(0))


def test_training_masks_of_short_clips() -> None:
    """One latent frame is always made; with T // 4 = 0 one frame is given; something is always left to make."""
    kinds = ["random", "intepolate"]
    kinds += [f"{size}_{where}" for size in ("quarter", "image") for where in ("random", "head", "tail", "head_tail")]
    for kind in kinds:
        assert given(kind, 1) == {()}
        for T in (2, 3):
            assert all(len(frames) < T for frames in given(kind, T))
    assert given("quarter_head", 3) == {(0,)}


def test_masks_are_drawn_by_their_ratios() -> None:
    rng = np.random.default_rng(0)
    ratios = {"image_head": 0.2, "image_tail": 0.3}
    drawn = [tuple(draw_frame_mask(ratios, 5, rng).tolist()) for _ in range(4000)]
    head, tail, none = (False, True, True, True, True), (True, True, True, True, False), (True,) * 5
    assert [drawn.count(mask) / 4000 for mask in (head, tail, none)] == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


def test_a_quarter_of_the_clips_is_masked_as_published() -> None:
    assert sum(MASK_RATIOS.values()) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    drawn = [draw_frame_mask(MASK_RATIOS, 9, rng) for _ in range(4000)]
    assert sum(not mask.all() for mask in drawn) / 4000 == pytest.approx(0.25, abs=0.02)
    head = torch.tensor([False] + [True] * 8)  # image_head, now and then quarter_head
    assert sum(torch.equal(mask, head) for mask in drawn) / 4000 == pytest.approx(0.221, abs=0.02)


# ------------------------------------------------------------------------------------------------ tables


def test_lengths_and_sizes() -> None:
    assert [num_frames(name) for name in ("2s", "4s", "8s", "16s", "32s")] == [51, 102, 204, 408, 816]
    assert [num_frames(name) for name in ("1x", "2x", "4x", "8x", "16x", "32", 17)] == [51, 102, 204, 408, 816, 32, 17]
    assert image_size("240p", "9:16") == (240, 426)
    for wrong in (lambda: num_frames("3s"), lambda: num_frames("0"), lambda: image_size("240p", "1:1")):
        with pytest.raises(UserError):
            wrong()


def test_buckets() -> None:
    areas = {"240p": math.prod(IMAGE_SIZES["240p", "9:16"]), "large": 500_000}
    config = {"240p": {51: (1.0, 4), 102: ((0.5, 1.0), 2), 1: (1.0, 8)}, "large": {51: ((1.0, 0.5), 1), 17: (1.0, 1)}}

    def share(frames: int, area: int, interval: int = 1) -> dict[Any, float]:
        rng = np.random.default_rng(0)
        chosen = [choose_bucket(config, areas, frames, area, rng, interval) for _ in range(2000)]
        return {bucket: chosen.count(bucket) / 2000 for bucket in set(chosen)}

    assert share(1, 240 * 426) == {("240p", 1, 8): 1.0}
    assert share(51, 240 * 426) == {None: 1.0}  # strictly more is asked for
    assert share(52, 240 * 426) == {("240p", 51, 4): 1.0}
    assert share(103, 240 * 426, interval=2) == {("240p", 51, 4): 1.0}
    assert share(52, math.ceil(0.8 * 240 * 426)) == {("240p", 51, 4): 1.0}
    assert share(52, math.ceil(0.8 * 240 * 426) - 1) == {None: 1.0}
    assert share(103, 240 * 426) == {("240p", 102, 2): pytest.approx(0.5, abs=0.05), None: pytest.approx(0.5, abs=0.05)}
    assert share(52, 400_000) == {
        ("large", 51, 1): pytest.approx(0.5, abs=0.05),
        ("large", 17, 1): pytest.approx(0.5, abs=0.05),
    }
