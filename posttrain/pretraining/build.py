"""Assemble the embedded base `posttrain/pocket/wan`, a diffusers folder for WanImageToVideoPipeline.

    python -m posttrain.pretraining.build [--vae FOLDER] [--transformer FOLDER] [--captions METADATA ...] [--out FOLDER]
    python -m posttrain.pretraining.build --sam2 FOLDER | --raft FOLDER | --depth FOLDER

Parts that are not given get random weights from a fixed seed. The text encoder always has random weights: an untrained
UMT5 of two layers distinguishes words and their order, and from that the transformer learns the meaning of captions.
"""

import argparse
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import Sam2VideoModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from posttrain.core.files import read_jsonl, replacing, sha256, write_json, write_text
from posttrain.models.base import ModelConfig
from posttrain.models.wan.loading import initialise
from posttrain.nets import depth, raft
from posttrain.pocket import folder

# The architecture of Wan2.2-TI2V-5B with 24 latent channels instead of 48: a residual VAE on 2 x 2 patches, a timestep
# per frame, text of 512 tokens.
VAE = {
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": 24,
    "dim_mult": [1, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 24,
    "latents_std": [1.0] * 24,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 24,
    "out_channels": 24,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

WORDS = """
a an the and or of on in at to from with into onto off over under above below behind before beside between next near
one two three four five six some other another small big large tiny little long short round flat old new wooden metal
plastic glass rubber paper stone steel iron golden soft hard shiny striped spotted white black grey gray red orange
yellow green blue purple pink brown beige cyan magenta turquoise dark light bright pale
object thing item toy ball box cube block brick crate cylinder cone sphere capsule disc ring torus pyramid prism rod
stick bar tube pipe plate bowl cup mug glass bottle jar can pot pan lid tray basket bucket bag sack duck teddy bear
lego soccer football basketball tennis egg apple banana pear lemon melon bread book phone camera lamp clock chair table
stool shelf bed sofa desk door wheel gear nut bolt screw hammer wrench key coin dice shoe boot hat glove car truck bus
train boat plane rocket robot doll horse dog cat bird fish rabbit cow pig sheep lion tiger tree plant flower leaf rock
chess piece pawn king queen knight rook bishop vase candle pencil pen brush comb spoon fork knife tower pile stack
fall falls falling fell drop drops dropped dropping hover hovers hovering drift drifts drifting slide slides sliding
spin spins spinning roll rolls rolling orbit orbits orbiting turn turns turning move moves moving rest rests resting
lie lies stand stands stay stays float floats floating bounce bounces bouncing hit hits land lands is are was rise
rises stop stops slow slows slowly fast quickly still left right up upward upwards down downward downwards forward
backward towards away toward through around across along along floor ground wall sky air room place spot picture video
that this it its which while then conforms laws physics realistic motion camera static blurry quality low
""".split()


def tokenizer(captions: Iterable[str] = ()) -> T5Tokenizer:
    """A T5 unigram tokenizer: each known word is one token, any other word is spelt letter by letter."""
    seen = {word.strip(string.punctuation) for caption in captions for word in caption.lower().split()}
    words = sorted(({*WORDS} | seen) - {""})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -5.0) for word in words]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def text_encoder(vocabulary: int, seed: int = 0) -> UMT5EncoderModel:
    """An untrained UMT5 encoder, 64 wide; its last norm gives every token unit scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(
            UMT5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        )


def autoencoder(seed: int = 0) -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan.from_config(VAE)


def build(out: Path, vae: Path | None = None, transformer: Path | None = None, captions: Sequence[Path] = ()) -> Path:
    """Write the whole folder to `out`, replacing what is there.

    Args:
        vae, transformer: folders of trained parts (config.json and safetensors), else random weights.
        captions: metadata.jsonl files whose words become tokens.
    """
    words = tokenizer(str(row["caption"]) for path in captions for row in read_jsonl(path))
    vae_net = AutoencoderKLWan.from_pretrained(vae) if vae else autoencoder()
    transformer_net = (
        WanTransformer3DModel.from_pretrained(transformer) if transformer else initialise(TRANSFORMER, seed=0)
    )
    parts = {
        "scheduler": UniPCMultistepScheduler(**SCHEDULER),
        "text_encoder": text_encoder(len(words)),
        "tokenizer": words,
        "transformer": transformer_net,
        "vae": vae_net,
    }
    with replacing(out) as temporary:
        index: dict[str, object] = {"_class_name": "WanImageToVideoPipeline", "_diffusers_version": "0.42.1"}
        for name, part in parts.items():
            half = part.half() if name in ("vae", "transformer") else part  # does not change the results
            if name in ("vae", "transformer"):
                half.register_to_config(_name_or_path="")  # else a path of this machine is saved
            half.save_pretrained(temporary / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        nothing = dict.fromkeys(("image_encoder", "image_processor", "transformer_2"), (None, None))
        write_json(temporary / "model_index.json", index | nothing | {"boundary_ratio": None, "expand_timesteps": True})
    return out


def embed_sam2(trained: Path) -> Path:
    """Write the SAM 2 of folder `trained` into the pocket, in half precision; nets/sam2.py reads it as float32."""
    sam = Sam2VideoModel.from_pretrained(trained, dtype=torch.float32)
    with replacing(folder("sam2")) as temporary:
        sam.half().save_pretrained(temporary)
    return folder("sam2")


def embed(part: str, trained: Path) -> Path:
    """Write the network `part` (raft, depth) of folder `trained` into the pocket, in half precision."""
    model: Any = {"raft": raft, "depth": depth}[part].load(ModelConfig(family=part, path=str(trained)))
    model.module.half()
    model.save(folder(part))
    return folder(part)


def write_checksums() -> None:
    """Write SHA256SUMS of the pocket's .safetensors and .json files, which are checked before they are used."""
    root = folder("")
    files = sorted(
        path.relative_to(root).as_posix() for part in root.iterdir() for path in part.rglob("*.*") if part.is_dir()
    )
    files = [name for name in files if name.endswith((".safetensors", ".json"))]
    write_text(root / "SHA256SUMS", "".join(f"{sha256(root / name)}  {name}\n" for name in files))


def main() -> None:
    parser = argparse.ArgumentParser(description="assemble the pocket base model")
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--transformer", type=Path)
    parser.add_argument("--captions", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=folder("wan"))
    parser.add_argument("--sam2", type=Path, help="a trained SAM 2 to embed; the base is left as it is")
    parser.add_argument("--raft", type=Path, help="a trained RAFT to embed; the base is left as it is")
    parser.add_argument("--depth", type=Path, help="a trained Depth Anything to embed; the base is left as it is")
    options = parser.parse_args()
    if options.sam2:
        print(embed_sam2(options.sam2))
    elif options.raft:
        print(embed("raft", options.raft))
    elif options.depth:
        print(embed("depth", options.depth))
    else:
        print(build(options.out, options.vae, options.transformer, options.captions))
    write_checksums()


if __name__ == "__main__":
    main()
