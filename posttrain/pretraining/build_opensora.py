"""Assemble the embedded Open-Sora `posttrain/pocket/opensora`, a folder as the family reads it.

    python -m posttrain.pretraining.build_opensora [--vae FOLDER] [--transformer FOLDER] [--captions METADATA ...]
        [--out FOLDER]

Parts that are not given get random weights from a fixed seed; recipes with `init: random` use only their shapes. The
text encoder is always untrained, as in build.py, whose words it has.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from posttrain.core.files import read_jsonl, replacing, write_json
from posttrain.models.opensora.loading import EMBEDDED
from posttrain.models.opensora.stdit import STDiT3, initialise
from posttrain.models.opensora.vae import SPATIAL, OpenSoraVAE
from posttrain.models.opensora.weights import FILE, Published
from posttrain.pocket import folder
from posttrain.pretraining.build import tokenizer, write_checksums

# The published shape, smaller; but 24 latent channels, as the other pocket has, for 4 are too few for small pictures.
CHANNELS = 24
# At least four channels share a norm, as in the published one: a channel normalised alone has no brightness of its own.
VAE: dict[str, Any] = {
    "temporal": {
        "in_out_channels": CHANNELS,
        "latent_embed_dim": CHANNELS,
        "embed_dim": CHANNELS,
        "filters": 24,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 1, 2, 2],
        "num_groups": 4,
    },
    "spatial": SPATIAL
    | {
        "block_out_channels": [8, 16, 32, 64],
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "norm_num_groups": 2,
        "sample_size": 64,
    },
    "spatial_scaling_factor": 1.0,
    "micro_batch_size": None,
}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "caption_channels": 64,
    "model_max_length": 64,
    "in_channels": CHANNELS,
}
# r of `rflow.time_ratio` is 0.2795 for 33 pictures of 64 x 64. With this it is 3, the shift of the other pocket.
SCHEDULER = {"scale": 10.733}
WHOLE = ("scale", "shift", "rope.freqs")  # not saved in half precision


def text_encoder(vocabulary: int, seed: int = 0) -> T5EncoderModel:
    """An untrained T5 encoder, 64 wide; its last norm gives every token unit scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))


def autoencoder(seed: int = 0) -> OpenSoraVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OpenSoraVAE(**VAE)


def save_half(model: Published, out: Path) -> None:
    """As `Published.save_published`, in half precision: a recipe reads it as float32, and the results are the same."""
    model.save_published(out)
    tensors = {name: t if name in WHOLE else t.half() for name, t in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / FILE, {"format": "pt"})


def build(out: Path, vae: Path | None = None, transformer: Path | None = None, captions: Sequence[Path] = ()) -> Path:
    """Write the whole folder to `out`, replacing what is there.

    Args:
        vae, transformer: folders of trained parts (config.json and safetensors), else random weights.
        captions: metadata.jsonl files whose words become tokens.
    """
    words = tokenizer(str(row["caption"]) for path in captions for row in read_jsonl(path))
    vae_net = OpenSoraVAE.from_pretrained(vae) if vae else autoencoder()
    transformer_net = STDiT3.from_pretrained(transformer) if transformer else initialise(TRANSFORMER, seed=0)
    with replacing(out) as temporary:
        save_half(vae_net, temporary / "vae")
        save_half(transformer_net, temporary / "transformer")
        text_encoder(len(words)).save_pretrained(temporary / "text_encoder")
        words.save_pretrained(temporary / "tokenizer")
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", {"_class_name": "RFlowScheduler"} | SCHEDULER)
        write_json(temporary / "model_index.json", {"fps": 16})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="assemble the pocket Open-Sora")
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--transformer", type=Path)
    parser.add_argument("--captions", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=folder(EMBEDDED))
    options = parser.parse_args()
    print(build(options.out, options.vae, options.transformer, options.captions))
    if options.out == folder(EMBEDDED):
        write_checksums()


if __name__ == "__main__":
    main()
