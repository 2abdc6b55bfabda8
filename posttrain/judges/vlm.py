"""The judge `vlm`: a vision-language model of the transformers library, such as Qwen-VL, LLaVA, SmolVLM or Gemma.

The model gets several frames as pictures, even if it also takes videos. Models that take only videos are refused; in
transformers that is InstructBlipVideo, which has no chat template.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from posttrain.core.errors import Code, UserError, printable
from posttrain.judges.questions import WORDS, Answer, Ask, weigh, word


def load(path: str, device: torch.device) -> Ask:
    """The model in a transformers folder or of a hub id; in bf16 on a GPU, in float32 on a CPU.

    All tokens for yes and no are counted (questions.py: `word`). Code in a model's folder is never run.

    Raises:
        UserError: about --model. missing, format: it is not such a model, or cannot be loaded; unsupported: it takes no
            pictures, or has no chat template or no such tokens; not_installed: it needs another library. When called:
            answer: it says neither yes nor no.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        if getattr(processor, "image_processor", None) is None:
            name = type(processor).__name__
            raise _refused(f"{path} takes no pictures ({name}); name a model that does", "unsupported")
        if getattr(processor, "chat_template", None) is None:
            raise _refused(f"{path} has no chat template; name a model that was tuned to answer", "unsupported")
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except ImportError as error:
        raise _refused(f"{path} cannot be loaded ({_line(error)}); install what it lacks", "not_installed") from error
    except (OSError, ValueError) as error:
        remedy = "name a model that takes pictures and text, such as Qwen/Qwen2.5-VL-3B-Instruct"
        code: Code = "format" if Path(path).is_dir() else "missing"
        raise _refused(f"{path} cannot be loaded ({_line(error)}); {remedy}", code) from error
    model = model.to(device).eval()
    said = processor.tokenizer.batch_decode([[token] for token in range(len(processor.tokenizer))])
    tokens = [[i for i, text in enumerate(said) if word(text) == answer] for answer in WORDS]
    if not all(tokens):
        raise _refused(f"{path} has no token for yes or none for no; name another model", "unsupported")

    @torch.inference_mode()
    def ask(pictures_FHWC: np.ndarray, question: str) -> Answer:
        seen = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures_FHWC]
        chat = [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device, dtype)
        answer = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        p_V = answer.logits[0][0].double().softmax(-1)
        yes, no = (float(p_V[of_word].sum()) for of_word in tokens)
        return weigh(yes, no, path, question)

    return ask


def _refused(reason: str, code: Code) -> UserError:
    return UserError(f"--model: {reason}", code, "--model")


def _line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0], 200)
