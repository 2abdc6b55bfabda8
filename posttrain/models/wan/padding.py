"""Wan's text attention without the cost of padding: of 512 tokens, only the real ones are computed; equal results."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from posttrain.models.base import text_lengths


class FoldedTextAttention(WanAttnProcessor):
    """Text attention that counts equal padding keys instead of visiting each.

    All padded tokens have one key and one value, so n of them weigh softmax(.. + log n) of a single one. The
    log-counts arrive as the last channel of the text (`fold_padding`), so each call carries its own and block
    checkpointing recomputes the same numbers. Softmax in float32: log n is too coarse in bfloat16.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None, rotary_emb: None
    ) -> Tensor:
        text = encoder_hidden_states[..., :-1].type_as(hidden_states)
        bias_BL = encoder_hidden_states[..., -1].detach()  # flash attention takes only a constant bias
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2).to(bias_BL.dtype) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BL[:, None, None])
        return attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(hidden_states))


def fold_padding(transformer: WanTransformer3DModel) -> None:
    """Let `transformer` attend to one padded text token per caption instead of hundreds, with equal results.

    A transformer that also attends to pictures is not changed: diffusers takes its last 512 tokens as the text.
    """
    if transformer.config.image_dim is not None or transformer.config.added_kv_proj_dim is not None:
        return

    def fold(_: nn.Module, inputs: tuple[Tensor], text_BLE: Tensor) -> Tensor:
        (text_BLD,) = inputs
        place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
        real_B = text_lengths(text_BLD)
        kept = min(int(real_B.max()) + 1, text_BLD.shape[1])
        weight_B = (text_BLD.shape[1] - real_B) / (kept - real_B).clamp(min=1)  # equal pads per pad that is kept
        bias_BL = torch.where(place_L[:kept] < real_B[:, None], 0.0, weight_B[:, None].log())
        text_BLE = text_BLE[:, :kept].to(torch.promote_types(text_BLE.dtype, bias_BL.dtype))
        return torch.cat([text_BLE, bias_BL[..., None]], dim=-1)

    transformer.condition_embedder.text_embedder.register_forward_hook(fold)
    for block in transformer.blocks:
        block.attn2.set_processor(FoldedTextAttention())
