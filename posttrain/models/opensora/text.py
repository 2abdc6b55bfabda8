"""Text for Open-Sora: the last layer of T5, and the preprocessing of prompts.

Training uses captions unchanged. The published sampling script appends scores and then cleans the text: see `prompt`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import UserError

AESTHETIC = 6.5  # the score that the published script asks for


def with_scores(
    caption: str, aesthetic: float | None = None, motion: float | None = None, camera: str | None = None
) -> str:
    """The caption with " aesthetic score: 6.5." and the like behind it, each unless it has one or none is given."""
    scores = {
        "aesthetic score:": None if aesthetic is None else f"{aesthetic:.1f}",
        "motion score:": None if motion is None else f"{motion:.1f}",
        "camera motion:": camera,
    }
    for name, value in scores.items():
        if value is not None and name not in caption:
            caption = f"{caption} {name} {value}."
    return caption


def clean(caption: str) -> str:
    """The caption as diffusers' PixArt pipeline cleans it, which it does twice: in small letters, without addresses.

    Raises:
        UserError: beautifulsoup4 is not installed, without which the pipeline would not clean.
    """
    from diffusers import PixArtAlphaPipeline
    from diffusers.utils import is_bs4_available

    if not is_bs4_available():
        raise UserError("cleaning prompts needs beautifulsoup4; pip install beautifulsoup4", "not_installed")
    cleaner = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)  # its parts are not asked
    (cleaned,) = cleaner._text_preprocessing(caption, clean_caption=True)
    return str(cleaned)


def prompt(
    caption: str, aesthetic: float | None = AESTHETIC, motion: float | None = None, camera: str | None = None
) -> str:
    """What the published script makes of a prompt: scores appended, then cleaned."""
    return clean(with_scores(caption, aesthetic, motion, camera))


@torch.no_grad()
def encode(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(text_BLD, mask_BL int64) of captions as they are: the encoder's last layer, not zeroed behind the mask.

    Args:
        encoder: transformers' T5EncoderModel; the tokens go to its device.
        length: L; longer captions are cut, their last token stays the end mark.
    """
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        add_special_tokens=True,
        return_tensors="pt",
    ).to(encoder.device)
    states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask
