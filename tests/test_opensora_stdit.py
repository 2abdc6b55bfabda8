"""STDiT3 against its published names and shapes, and against the specification worked frame by frame in float64."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.models import lora
from posttrain.models.opensora.stdit import TARGETS, STDiT3, initialise, position_embedding

TINY: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 12, "model_max_length": 9}
KEYS = json.loads((Path(__file__).parent / "helpers" / "opensora_keys.json").read_text())


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> STDiT3:
    """Tiny, with nothing left at zero."""
    made = initialise(TINY | changes, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made.to(dtype)


def inputs(
    size: tuple[int, int] = (5, 6),
    frames: int = 3,
    lengths: tuple[int, ...] = (4, 9),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    batch = len(lengths)
    return {
        "x": torch.randn(batch, 4, frames, *size, generator=generator).to(dtype),
        "timestep": torch.tensor([700.0, 33.0, 950.0])[:batch].to(dtype),
        "y": torch.randn(batch, 1, 9, 12, generator=generator).to(dtype),
        "mask": (torch.arange(9) < torch.tensor(lengths)[:, None]).long(),
        "fps": torch.tensor([16.0, 24.0, 16.0])[:batch],
        "height": torch.full((batch,), 8.0 * size[0]),
        "width": torch.full((batch,), 8.0 * size[1]),
    }


# ------------------------------------------------- the specification, one clip, one frame, one token list at a time


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.fc2", F.gelu(linear(weights, f"{name}.fc1", x), approximate="tanh"))


def scalar(weights: dict[str, Tensor], name: str, v: float) -> Tensor:
    k = torch.arange(128).float()
    angles = v * torch.exp(-math.log(10000) * k / 128)
    embedded = torch.cat([angles.cos(), angles.sin()]).double()
    return linear(weights, f"{name}.mlp.2", F.silu(linear(weights, f"{name}.mlp.0", embedded)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(N, C) to (M, C)."""
    q, k, v = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def self_attention(weights: dict[str, Tensor], name: str, x: Tensor, heads: int, turned: bool) -> Tensor:
    q, k, v = linear(weights, f"{name}.qkv", x).chunk(3, dim=1)

    def prepare(x: Tensor, which: str) -> Tensor:
        x = x.unflatten(1, (heads, -1))
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.{which}_norm.weight"]
        if turned:
            half = x.shape[-1] // 2
            as_complex = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
            angles = torch.arange(len(x)).double()[:, None] * weights["rope.freqs"]
            x = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
        return x.flatten(1)

    return linear(weights, f"{name}.proj", attend(prepare(q, "q"), prepare(k, "k"), v, heads))


def reference(made: STDiT3, given: dict[str, Tensor], b: int) -> Tensor:
    """The answer for clip b alone: (8, T, H, W)."""
    weights, heads = made.state_dict(), made.config.num_heads
    x, (h, w) = given["x"][b], given["x"].shape[3:]
    frames, rows, columns = x.shape[1], math.ceil(h / 2), math.ceil(w / 2)
    width = made.config.hidden_size
    scale = math.sqrt(float(given["height"][0] * given["width"][0])) / 512
    base = round(math.sqrt(rows * columns))
    omega = [10000 ** (-2 * k / (width / 2)) for k in range(width // 4)]

    def e(p: float) -> list[float]:
        return [math.sin(p * o) for o in omega] + [math.cos(p * o) for o in omega]

    kernel = weights["x_embedder.proj.weight"].flatten(1)
    tokens = torch.zeros(frames, rows * columns, width, dtype=torch.float64)
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = torch.zeros(4, 2, 2, dtype=torch.float64)
                cut = x[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
                patch[:, : cut.shape[1], : cut.shape[2]] = cut
                place = e(c / scale * base / columns) + e(r / scale * base / rows)
                token = kernel @ patch.flatten() + weights["x_embedder.proj.bias"]
                tokens[f, r * columns + c] = token + torch.tensor(place, dtype=torch.float64)

    fps = scalar(weights, "fps_embedder", float(given["fps"][b % len(given["fps"])]))
    noisy = given["x_mask"][b].tolist() if "x_mask" in given else [True] * frames
    t = scalar(weights, "t_embedder", float(given["timestep"][b])) + fps
    t0 = scalar(weights, "t_embedder", 0.0) + fps
    changes = [linear(weights, "t_block.1", F.silu(t if n else t0)).view(6, width) for n in noisy]
    y = mlp(weights, "y_embedder.y_proj", given["y"][b, 0])
    if "mask" in given:
        y = y[given["mask"][b % len(given["mask"])] != 0]

    for i in range(made.config.depth):
        for kind in ("spatial", "temporal"):
            name = f"{kind}_blocks.{i}"
            table = [weights[f"{name}.scale_shift_table"] + change for change in changes]
            h_TSC = torch.stack([norm(tokens[f]) * (1 + table[f][1]) + table[f][0] for f in range(frames)])
            if kind == "spatial":
                seen = [self_attention(weights, f"{name}.attn", h_TSC[f], heads, False) for f in range(frames)]
                h_TSC = torch.stack(seen)
            else:
                per_place = [
                    self_attention(weights, f"{name}.attn", h_TSC[:, s], heads, True) for s in range(rows * columns)
                ]
                h_TSC = torch.stack(per_place, dim=1)
            tokens = torch.stack([tokens[f] + table[f][2] * h_TSC[f] for f in range(frames)])
            flat = tokens.flatten(0, 1)
            k, v = linear(weights, f"{name}.cross_attn.kv_linear", y).chunk(2, dim=1)
            read = attend(linear(weights, f"{name}.cross_attn.q_linear", flat), k, v, heads)
            tokens = tokens + linear(weights, f"{name}.cross_attn.proj", read).view_as(tokens)
            rest = [
                mlp(weights, f"{name}.mlp", norm(tokens[f]) * (1 + table[f][4]) + table[f][3]) for f in range(frames)
            ]
            tokens = torch.stack([tokens[f] + table[f][5] * rest[f] for f in range(frames)])

    table = weights["final_layer.scale_shift_table"]
    out = torch.zeros(8, frames, 2 * rows, 2 * columns, dtype=torch.float64)
    for f in range(frames):
        last = norm(tokens[f]) * (1 + table[1] + t) + table[0] + t
        if not noisy[f]:
            last = norm(last) * (1 + table[1] + t0) + table[0] + t0
        for s, token in enumerate(linear(weights, "final_layer.linear", last)):
            r, c = divmod(s, columns)
            out[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = token.view(2, 2, 8).permute(2, 0, 1)
    return out[..., :h, :w]


# ---------------------------------------------------------------------------------------------------- tests


@pytest.mark.slow
def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        made = STDiT3()
    assert {name: list(tensor.shape) for name, tensor in made.state_dict().items()} == KEYS["stdit3"]
    assert sum(tensor.numel() for tensor in made.state_dict().values()) == 1_208_872_772
    assert [name for name, parameter in made.named_parameters() if not parameter.requires_grad] == ["rope.freqs"]
    assert "y_embedder.y_embedding" in dict(made.named_buffers())


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_the_specification(size: tuple[int, int], masked: bool) -> None:
    made, given = model(), inputs(size)
    if masked:
        given["x_mask"] = torch.tensor([[False, True, True], [True, False, True]])
    with torch.no_grad():
        out = made(**given)
        assert out.shape == (2, 8, 3, *size)
        for b in range(2):
            torch.testing.assert_close(out[b], reference(made, given, b), rtol=1e-5, atol=2e-6)


def test_gradients_are_those_of_the_specification() -> None:
    made, given = model(depth=1), inputs((3, 4), frames=2)
    given["x_mask"] = torch.tensor([[False, True], [True, True]])
    given["x"].requires_grad_()
    weights = torch.randn(2, 8, 2, 3, 4, generator=torch.Generator().manual_seed(6)).double()
    names = ["spatial_blocks.0.attn.qkv.weight", "temporal_blocks.0.attn.q_norm.weight", "t_block.1.bias"]
    names += ["temporal_blocks.0.cross_attn.kv_linear.weight", "final_layer.scale_shift_table"]
    leaves = [given["x"], *(made.get_parameter(name) for name in names)]
    ours = torch.autograd.grad((made(**given) * weights).sum(), leaves)
    made.state_dict = lambda: dict(made.named_parameters())  # type: ignore[method-assign, assignment, return-value]
    theirs = torch.autograd.grad(sum((reference(made, given, b) * weights[b]).sum() for b in range(2)), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_all_frames_noisy_is_no_mask() -> None:
    made, given = model(torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(made(**given), made(**given, x_mask=torch.ones(2, 3, dtype=torch.bool)))


def test_text_beyond_the_mask_does_not_count() -> None:
    made, given = model(), inputs()
    other = given | {"y": given["y"] + 100 * (1 - given["mask"])[:, None, :, None]}
    with torch.no_grad():
        assert torch.equal(made(**given), made(**other))
        packed = mlp_of(made, given)
        skipping = STDiT3.from_config(made.config, skip_y_embedder=True).double()
        skipping.load_state_dict(made.state_dict())
        lengths = given["mask"].sum(1)
        torch.testing.assert_close(skipping(**given | {"y": packed, "mask": lengths}), made(**given))
        del given["mask"]
        torch.testing.assert_close(made(**given)[0], reference(made, given, 0), rtol=1e-5, atol=2e-6)


def mlp_of(made: STDiT3, given: dict[str, Tensor]) -> Tensor:
    y = made.y_embedder(given["y"].squeeze(1))
    return y[given["mask"] != 0][None]


def test_a_short_mask_and_fps_are_repeated() -> None:
    """As guidance asks: the half without text takes the masks of the half with it."""
    made, given = model(), inputs()
    twice = {name: torch.cat([given[name]] * 2) for name in ("x", "timestep", "y")}
    with torch.no_grad():
        torch.testing.assert_close(made(**given | twice), torch.cat([made(**given)] * 2))


def test_the_timestep_is_rounded_as_the_weights() -> None:
    made, given = model(torch.bfloat16), inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        outs = [made(**given | {"timestep": torch.tensor([t, t])}) for t in (950.0, 952.0, 948.0)]
    assert outs[0].dtype == torch.float32
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_bfloat16_is_near_float64() -> None:
    """Where the timestep needs no rounding; the tables are rounded with the weights."""
    exact, given = model(), inputs() | {"timestep": torch.tensor([704.0, 33.0], dtype=torch.float64)}
    cast = copy.deepcopy(exact).to(torch.bfloat16)
    assert torch.equal(cast.rope.freqs.float(), exact.rope.freqs.float().bfloat16().float())
    with torch.no_grad():
        wanted, cast_out = exact(**given), cast(**given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = copy.deepcopy(exact).float()(**{k: v.float() for k, v in given.items()})
    spread = float(wanted.std())
    assert float((cast_out - wanted).abs().mean()) < 0.03 * spread
    assert float((mixed - wanted).abs().mean()) < 0.03 * spread
    assert mixed.dtype == torch.float32


def test_positions_are_rounded_as_the_weights_and_width_comes_first() -> None:
    cpu = torch.device("cpu")
    exact = position_embedding(2, 3, 16, 0.5, torch.float32, cpu)
    assert torch.equal(exact[0, :4], torch.zeros(4))  # sines of column 0
    assert torch.equal(exact[0, :8], exact[3, :8])  # both tokens of column 0
    assert torch.equal(exact[0, 8:], exact[2, 8:])  # all tokens of row 0
    coarse = position_embedding(2, 3, 16, 0.5, torch.bfloat16, cpu)
    table = (1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)).bfloat16().float()
    column = 1 / 0.5 * (round(math.sqrt(6)) / 3)
    assert torch.equal(coarse[1, :4], (column * table).sin().bfloat16())


def test_checkpointed_blocks_have_the_same_gradient() -> None:
    made, given = model(torch.float32), inputs(dtype=torch.float32)
    gradients = []
    for checkpointed in (False, True):
        made.zero_grad()
        if checkpointed:
            made.enable_gradient_checkpointing()
        made(**given).square().sum().backward()
        gradients.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_captions_are_dropped_in_train_mode_alone() -> None:
    made, given = model(class_dropout_prob=1.0), inputs()
    null = made.y_embedder.y_embedding.expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted = made(**given | {"y": null})
        assert not torch.equal(made(**given), wanted)
        torch.testing.assert_close(made.train()(**given), wanted)


def test_an_adapter_sits_on_the_listed_layers() -> None:
    made, given = model(torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        before = made(**given)
    lora.attach(made, 2, None, TARGETS, seed=0)
    with torch.no_grad():
        assert torch.equal(made(**given), before)
    adapted = {name.split(".lora_A")[0] for name, _ in made.named_parameters() if ".lora_A" in name}
    assert adapted == {f"{kind}_blocks.{i}.{t}" for kind in ("spatial", "temporal") for i in range(2) for t in TARGETS}


def test_save_and_load(tmp_path: Path) -> None:
    made, given = model(torch.float32), inputs(dtype=torch.float32)
    made.save_pretrained(tmp_path)
    again = STDiT3.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**given), made(**given))
