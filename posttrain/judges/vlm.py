"""Asks a model of transformers that sees pictures and reads text: Qwen-VL, LLaVA, SmolVLM, Gemma and their like.

A video is shown as several pictures, also to a model that takes videos besides. One that takes videos alone is refused:
of transformers' classes that is InstructBlipVideo, which has no chat template.
"""

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from posttrain.core.errors import UserError
from posttrain.judges.questions import ANSWERS, Ask, no_answer, ratio


def load(path: str, device: torch.device) -> Ask:
    """The model in a folder of transformers' layout, or of a hub id; in bf16 on a GPU, in float32 elsewhere.

    "Yes" and "No" are all tokens that say so, with or without a space around them.

    Raises:
        UserError: it is no such model, cannot be had, takes no pictures, has no chat template or no such tokens, or
            needs a library more.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(path)
        if getattr(processor, "image_processor", None) is None:
            raise UserError(f"--model: {path} takes no pictures ({type(processor).__name__}); name a model that does")
        if getattr(processor, "chat_template", None) is None:
            raise UserError(f"--model: {path} has no chat template; name a model that was tuned to answer")
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except ImportError as error:
        raise UserError(f"--model: {path} cannot be loaded ({_line(error)}); install what it lacks") from error
    except (OSError, ValueError) as error:
        remedy = "name a model that takes pictures and text, as Qwen/Qwen2.5-VL-3B-Instruct"
        raise UserError(f"--model: {path} cannot be loaded ({_line(error)}); {remedy}") from error
    model = model.to(device).eval()
    said = processor.tokenizer.batch_decode([[token] for token in range(len(processor.tokenizer))])
    tokens = [[i for i, text in enumerate(said) if text.strip() == answer] for answer in ANSWERS]
    if not all(tokens):
        raise UserError(f"--model: {path} has no token for Yes or none for No; name another model")

    @torch.inference_mode()
    def ask(pictures_FHWC: np.ndarray, question: str) -> float:
        seen = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures_FHWC]
        chat = [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device, dtype)
        answer = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        p_V = answer.logits[0][0].double().softmax(-1)
        yes, no = (float(p_V[some].sum()) for some in tokens)
        if yes + no == 0:
            raise no_answer(path, question)
        return ratio(yes, no)

    return ask


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
