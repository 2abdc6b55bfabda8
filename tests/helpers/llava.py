"""A tiny LLaVA for the tests of judges, and what is asked of the server behind which it stands."""

import http.client
import itertools
from pathlib import Path

import torch
from helpers.falling import FPS, film, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from posttrain.evaluation.sample import write_video
from posttrain.judges.questions import questions

TEMPLATE = (
    "{% for message in messages %}user: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} assistant:"
)


def llava_folder(out: Path) -> Path:
    """A LLaVA of random weights that likes to begin its answers with Yes or No."""
    text = " ".join(questions("square 0 1 falls.")) + " user : assistant"
    words = [*dict.fromkeys(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text))]
    vocabulary = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "Yes", " Yes", "No", *words, *map(str, range(2, 30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=["<image>"])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    sees = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, fast, **sees, chat_template=TEMPLATE).save_pretrained(out)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8, initializer_range=0.3)
    language = LlamaConfig(
        **size, vocab_size=len(vocabulary), initializer_range=0.3, bos_token_id=2, eos_token_id=3, pad_token_id=1
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=language,
                image_token_index=vocabulary.index("<image>"),
                vision_feature_layer=-1,
            )
        )
        last_D = model.get_input_embeddings().weight[vocabulary.index(":")]  # the prompt's last token
        last_D *= 8 / last_D.norm()  # so that it tells in the end
        model.lm_head.weight[5:8] += last_D / 4
    model.save_pretrained(out)
    return out


def count(port: int) -> int:
    """How many requests the server had."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/count")
    return int(connection.getresponse().read())


def url(port: int, kind: str = "good") -> str:
    return f"http://127.0.0.1:{port}/{kind}/v1"


def samples(out: Path, seeds: int = 2) -> Path:
    """What a model made of the first frames of `write_groups`."""
    for group, seed in itertools.product(range(2), range(seeds)):
        video, _ = film(rows_of(2, 5), 4 + 12 * group, 120 + 40 * seed)
        video[0] = film([2], 4 + 12 * group, 200)[0][0]
        write_video(out / f"{group:05d}-0-s{seed}.mp4", video, FPS)
    return out
