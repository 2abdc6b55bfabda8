"""STDiT3, the transformer of Open-Sora v1.2: blocks that attend within a frame, and blocks that attend along time.

Parameter names and shapes, the order of arithmetic and every rounding are those of the published model. What is said of
it here holds for its own terms: times from 0 (data) to 1000 (noise), velocity = data - noise. model.py has ours.

Shapes: B clips, T latent frames, H W latent cells, S tokens of a frame (patches of 2 x 2 cells, row by row), C width,
L text tokens, D text width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from posttrain.models.opensora.weights import Published

# name endings of the layers that get an adapter
TARGETS = (
    *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
    *("mlp.fc1", "mlp.fc2"),
)
NULL = "y_embedder.y_embedding"  # the learned text that stands for none
FREQUENCIES = 256  # width of the sinusoidal embedding of a scalar


def rope_frequencies(head_dim: int) -> Tensor:
    """theta_k = 10000^(-2k / head_dim), k = 0 .. head_dim / 2 - 1; float32."""
    return 1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)


def position_embedding(
    rows: int, columns: int, width: int, scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """e_SC of a frame's patches: [e(column) | e(row)], e(p) = [sin(p w_k) | cos(p w_k)], w_k = 10000^(-2k / (C / 2)).

    Positions are index / scale * base / count, base = round(sqrt(S)). The table w_k is rounded to `dtype`, as casting
    the published model rounds it; the rest is done in float32 at least, and the result is cast.
    """
    base = round(math.sqrt(rows * columns))
    half = width // 2
    frequencies = (1 / 10000 ** (torch.arange(0, half, 2, device=device).float() / half)).to(dtype)

    def embed(count: int) -> Tensor:
        positions = torch.arange(count, device=device) / scale * (base / count)
        angles = positions[:, None] * frequencies  # float32 x bfloat16 is float32
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_column = embed(columns)[None, :].expand(rows, -1, -1)
    by_row = embed(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).to(dtype)


def rotate(x: Tensor, angles_TK: Tensor) -> Tensor:
    """Turn the pairs (2k, 2k + 1) of x (..., T, 2K) by their angles, in the dtype that both promote to."""
    cos, sin = angles_TK.cos().repeat_interleave(2, -1), angles_TK.sin().repeat_interleave(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) over the last axis in float32, cast back, times the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Rope(nn.Module):
    """The frequencies of the rotary embedding along time: saved, never trained, rounded when the model is cast."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(rope_frequencies(head_dim), requires_grad=False)

    def forward(self, frames: int) -> Tensor:
        """Angles (T, head_dim / 2), frame number times frequency, in the dtype of the frequencies."""
        return torch.arange(frames, device=self.freqs.device).to(self.freqs.dtype)[:, None] * self.freqs


class PatchEmbed(nn.Module):
    def __init__(self, patch: Sequence[int], channels: int, width: int) -> None:
        super().__init__()
        size: Any = tuple(patch)
        self.proj = nn.Conv3d(channels, width, kernel_size=size, stride=size)


class ScalarEmbed(nn.Module):
    """A number v, as [cos(v f_k) | sin(v f_k)], f_k = 10000^(-k / 128) in float32, and two linear maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, v_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=v_B.device).float() / half)
        angles = v_B.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbed(nn.Module):
    """The text's width to the model's. `y_embedding` stands for no caption at all."""

    y_embedding: Tensor

    def __init__(self, text_width: int, width: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.y_proj = Mlp(text_width, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, text_width) / text_width**0.5)
        self.dropout = dropout

    def forward(self, y_BLD: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped_B = (torch.rand(len(y_BLD)) < self.dropout).to(y_BLD.device)
            null_LD = self.y_embedding[: y_BLD.shape[1]].to(y_BLD.dtype)
            y_BLD = torch.where(dropped_B[:, None, None], null_LD, y_BLD)
        return self.y_proj(y_BLD)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLC: Tensor, angles_LK: Tensor | None = None) -> Tensor:
        """Each of N sequences attends to itself; `angles_LK` turns queries and keys."""
        q, k, v = self.qkv(x_NLC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles_LK is not None:
            q, k = rotate(q, angles_LK), rotate(k, angles_LK)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, y_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Each clip attends to those tokens of its own text that the mask has True; None: to all of them.

        Masked tokens weigh exactly zero, so the result is that of packing the valid tokens.
        """
        q = self.q_linear(x_BNC).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y_BLC).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x += g1 attn(mod1(x)); x += cross_attn(x, y); x += g2 mlp(mod2(x)), with mod(x) = LN(x) (1 + sc) + sh."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, heads, qk_norm)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, hidden, width)

    def forward(
        self, x_BTSC: Tensor, y_BLC: Tensor, mask_BL: Tensor | None, modulation_BT6C: Tensor, angles_TK: Tensor
    ) -> Tensor:
        """`modulation_BT6C` is what the times add to the table; where it has one frame, it holds for all."""
        table = (self.scale_shift_table + modulation_BT6C)[:, :, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)
        batch, frames, tokens, _ = x_BTSC.shape

        h_BTSC = _norm(x_BTSC) * (1 + scale1) + shift1
        if self.temporal:
            h_NTC = self.attn(h_BTSC.transpose(1, 2).flatten(0, 1), angles_TK)
            h_BTSC = h_NTC.unflatten(0, (batch, tokens)).transpose(1, 2)
        else:
            h_BTSC = self.attn(h_BTSC.flatten(0, 1)).unflatten(0, (batch, frames))
        x_BTSC = x_BTSC + gate1 * h_BTSC
        x_BTSC = x_BTSC + self.cross_attn(x_BTSC.flatten(1, 2), y_BLC, mask_BL).unflatten(1, (frames, tokens))
        return x_BTSC + gate2 * self.mlp(_norm(x_BTSC) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, out)

    def forward(self, x_BTSC: Tensor, t_BC: Tensor, t0_BC: Tensor | None, x_mask_BT: Tensor | None) -> Tensor:
        """Frames that the mask has False are normalised twice, as in the published code: see `STDiT3.forward`."""

        def modulate(x_BTSC: Tensor, t_BC: Tensor) -> Tensor:
            shift, scale = (self.scale_shift_table + t_BC[:, None])[:, :, None, None].unbind(1)
            return _norm(x_BTSC) * (1 + scale) + shift

        x_BTSC = modulate(x_BTSC, t_BC)
        if t0_BC is not None and x_mask_BT is not None:
            x_BTSC = torch.where(x_mask_BT[:, :, None, None], x_BTSC, modulate(x_BTSC, t0_BC))
        return self.linear(x_BTSC)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class STDiT3(Published, PeftAdapterMixin):
    """The transformer; its defaults are those of the published STDiT3-XL/2.

    Args:
        hidden_size: C, a multiple of 4 and of `num_heads`.
        depth: pairs of a spatial and a temporal block.
        caption_channels: D.
        model_max_length: L of the learned text that stands for none.
        pred_sigma: 2 x in_channels come out, of which the second half is not used.
        input_sq_size: side in pixels of the size at which positions are whole numbers.
        class_dropout_prob: in train mode, with this probability a clip's text is replaced by the learned one.
        skip_y_embedder: `forward` gets texts that are through `y_embedder` and packed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        pred_sigma: bool = True,
        input_sq_size: int = 512,
        class_dropout_prob: float = 0.1,
        skip_y_embedder: bool = False,
    ) -> None:
        super().__init__()
        if patch_size[0] != 1 or hidden_size % 4 or hidden_size % (2 * num_heads):
            raise ValueError(f"patch_size {patch_size}, hidden_size {hidden_size}, num_heads {num_heads}: do not fit")
        self.gradient_checkpointing = False
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.rope = Rope(hidden_size // num_heads)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder, self.fps_embedder = ScalarEmbed(hidden_size), ScalarEmbed(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbed(caption_channels, hidden_size, model_max_length, class_dropout_prob)

        def blocks(temporal: bool) -> nn.ModuleList:
            hidden = int(hidden_size * mlp_ratio)
            return nn.ModuleList(Block(hidden_size, num_heads, hidden, qk_norm, temporal) for _ in range(depth))

        self.spatial_blocks, self.temporal_blocks = blocks(temporal=False), blocks(temporal=True)
        self.final_layer = FinalLayer(hidden_size, math.prod(patch_size) * self.out_channels)
        self._initialise()

    @classmethod
    def constants(cls, config: dict[str, Any]) -> dict[str, Tensor]:
        """The learned text that stands for none is zero where it is lacking: then guidance means little."""
        return {
            "rope.freqs": rope_frequencies(config["hidden_size"] // config["num_heads"]),
            NULL: torch.zeros(config["model_max_length"], config["caption_channels"]),
        }

    def _initialise(self) -> None:
        """Weights to train from scratch: at first the frames do not see each other along time."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        fps: Any = self.fps_embedder.mlp
        nn.init.normal_(fps[0].weight, std=0.02)
        nn.init.zeros_(fps[2].weight)
        temporal: Any = self.temporal_blocks
        for block in temporal:
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | list[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | Sequence[float] | None = None,
        width: Tensor | Sequence[float] | None = None,
        **ignored: Any,
    ) -> Tensor:
        """What the model says of noisy latents: (B, out_channels, T, H, W), float32; the first 4 are data - noise.

        Everything is cast to the dtype of the weights, the timestep too: in bfloat16, 950 acts as 952.

        Frames that `x_mask` has False count as clean: their blocks are told time 0. The last layer normalises what it
        has already modulated once more for them, as the published code does; a sampler throws these frames away.

        Args:
            x: latents (B, 4, T, H, W); odd sizes are padded with zeros to the right and below.
            timestep: (B,) in 0 .. 1000.
            y: text (B, 1, L, D). With `skip_y_embedder`: (1, sum of lengths, C).
            mask: (B', L), 1 for valid tokens, repeated to B; None: all are valid. With `skip_y_embedder`: the lengths.
            x_mask: (B, T) bool; None: no frame is clean.
            fps: (B'',), repeated to B.
            height, width: of the clip in pixels, (B,) or numbers in a list; the first one counts for all.
        """
        if fps is None or height is None or width is None:
            raise ValueError("fps, height and width are needed")
        dtype = self.x_embedder.proj.weight.dtype
        x, timestep, y = x.to(dtype), timestep.to(dtype), y.to(dtype)
        (batch, _, frames, *size), (_, patch_h, patch_w) = x.shape, self.config.patch_size
        x = F.pad(x, (0, -size[1] % patch_w, 0, -size[0] % patch_h))
        rows, columns = x.shape[3] // patch_h, x.shape[4] // patch_w

        scale = (float(height[0]) * float(width[0])) ** 0.5 / self.config.input_sq_size
        position_SC = position_embedding(rows, columns, self.config.hidden_size, scale, dtype, x.device)
        x_BTSC = self.x_embedder.proj(x).flatten(3).permute(0, 2, 3, 1)
        x_BTSC = x_BTSC + position_SC.to(x_BTSC.dtype)

        fps_BC = self.fps_embedder(fps.reshape(-1), dtype)
        fps_BC = fps_BC.repeat(batch // len(fps_BC), 1)
        t_BC = self.t_embedder(timestep, dtype) + fps_BC
        modulation_BT6C = self.t_block(t_BC).unflatten(1, (1, 6, -1))
        t0_BC = None
        if x_mask is not None:
            x_mask = x_mask.bool()
            t0_BC = self.t_embedder(torch.zeros_like(timestep), dtype) + fps_BC
            clean_BT6C = self.t_block(t0_BC).unflatten(1, (1, 6, -1))
            modulation_BT6C = torch.where(x_mask[:, :, None, None], modulation_BT6C, clean_BT6C)

        y_BLC, mask_BL = self._text(y, mask, batch)
        angles_TK = self.rope(frames)
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                inputs = x_BTSC, y_BLC, mask_BL, modulation_BT6C, angles_TK
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    x_BTSC = self._gradient_checkpointing_func(block, *inputs)
                else:
                    x_BTSC = block(*inputs)

        out = self.final_layer(x_BTSC, t_BC, t0_BC, x_mask)
        out = out.unflatten(3, (patch_h, patch_w, -1)).unflatten(2, (rows, columns))  # B T rows columns ph pw out
        out = out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return out[..., : size[0], : size[1]].to(torch.promote_types(out.dtype, torch.float32))

    def _text(self, y: Tensor, mask: Tensor | list[int] | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """y_BLC and the mask of its valid tokens."""
        if self.config.skip_y_embedder:
            lengths = mask.long().tolist() if isinstance(mask, Tensor) else list(mask or [])
            y_BLC = nn.utils.rnn.pad_sequence(list(y.squeeze(0).split(lengths)), batch_first=True)
            index_L = torch.arange(y_BLC.shape[1], device=y.device)
            return y_BLC, index_L < torch.tensor(lengths, device=y.device)[:, None]
        y_BLC = self.y_embedder(y.squeeze(1))
        if mask is None:
            return y_BLC, None
        assert isinstance(mask, Tensor)
        mask_BL = mask.reshape(-1, mask.shape[-1]) != 0
        return y_BLC, mask_BL.repeat(batch // len(mask_BL), 1)


def initialise(config: dict[str, Any], seed: int) -> STDiT3:
    """A transformer of this architecture with weights drawn from `seed`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return STDiT3.from_config(config).eval()
