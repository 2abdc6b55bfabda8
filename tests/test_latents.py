"""Latents are encoded once, equal what the model gives, and are never those of something else."""

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from helpers.falling import write_dataset
from helpers.tiny import wan_folder

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Latents
from posttrain.models.base import ModelConfig
from posttrain.models.wan import loading as wan
from posttrain.models.wan.model import Wan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    return wan.load(ModelConfig(path=str(wan_folder(tmp_path_factory.mktemp("model") / "wan"))))


@pytest.fixture
def drops(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "drops", ["train"], clips=3, frames=5)
    return tmp_path / "drops"


def clips(drops: Path) -> Clips:
    return Clips(DataConfig(clips=str(drops)), preload=False)


def entries(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*.safetensors")}


def recaption(drops: Path, text: str) -> None:
    path = drops / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["caption"] = text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_they_are_what_the_model_gives(model, drops, tmp_path):
    data = Latents(model, clips(drops), tmp_path / "cache")
    batch = data.load([2, 1])
    pixels = Clips(DataConfig(clips=str(drops))).load([2, 1])
    with torch.no_grad():
        expected = torch.cat([model.encode(pixels.video_BCFHW[i : i + 1]) for i in range(2)])
    assert torch.equal(batch.z0_BCFHW, expected)
    assert torch.equal(batch.text_BLD, model.encode_text(["square 02 falls.", "square 01 falls."]))
    assert batch.ids == ("00002", "00001")
    assert batch.target_B.tolist() == [1, 1]


def test_a_second_time_nothing_is_encoded(model, drops, tmp_path, capsys):
    first = Latents(model, clips(drops), tmp_path / "cache")
    made = entries(tmp_path / "cache")
    assert len(made) == 3
    second = Latents(model, clips(drops), tmp_path / "cache")
    assert entries(tmp_path / "cache") == made
    assert capsys.readouterr().out.splitlines() == [
        f"latents: 0 of 3 are in {tmp_path / 'cache'}",
        f"latents: 3 of 3 are in {tmp_path / 'cache'}",
    ]
    assert second.key == first.key
    assert torch.equal(first.load([0]).z0_BCFHW, second.load([0]).z0_BCFHW)


@pytest.mark.slow
def test_what_encodes_leaves_memory_once_the_cache_is_full(drops, tmp_path):
    """Nothing of it is read before latents are asked for, nor kept after they were made or found."""
    config = ModelConfig(path=str(wan_folder(tmp_path / "wan")))
    for _ in range(2):
        model = wan.load(config)
        assert not model._parts.held
        parts = [weakref.ref(model.vae), weakref.ref(model.text_encoder)]
        data = Latents(model, clips(drops), tmp_path / "cache")
        gc.collect()
        assert [part() for part in parts] == [None, None]
    again = model.decode(data.load([0]).z0_BCFHW)  # read again when it is used again
    assert torch.equal(again, wan.load(config).decode(data.load([0]).z0_BCFHW))


def test_a_lost_entry_alone_is_made_again_and_equal(model, drops, tmp_path):
    before = Latents(model, clips(drops), tmp_path / "cache").load([0, 1, 2])
    kept = entries(tmp_path / "cache")
    lost = sorted(kept)[0]
    os.unlink(lost)
    after = Latents(model, clips(drops), tmp_path / "cache").load([0, 1, 2])
    now = entries(tmp_path / "cache")
    assert now.keys() == kept.keys()
    assert [path for path in kept if now[path] != kept[path]] == [lost]
    assert torch.equal(before.z0_BCFHW, after.z0_BCFHW)
    assert torch.equal(before.text_BLD, after.text_BLD)


def test_every_process_has_its_own_share_whatever_the_others_did(model, drops, tmp_path, monkeypatch):
    """Two processes, of which the second comes after the first has written; then all clips are there."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    monkeypatch.setattr(state, "num_processes", 2)
    for process in range(2):
        monkeypatch.setattr(state, "process_index", process)
        Latents(model, clips(drops), tmp_path / "cache")
        assert len(entries(tmp_path / "cache")) == (2, 3)[process]


def test_captions_that_are_cut_are_told_each_time(model, drops, tmp_path, capsys):
    path = drops / "train" / "metadata.jsonl"
    rows = files.read_jsonl(path)
    rows[1]["caption"] = "it falls and " * 400
    files.write_jsonl(path, rows)
    for _ in range(2):
        Latents(model, Clips(DataConfig(clips=str(drops)), preload=False), tmp_path / "cache")
        said = capsys.readouterr().err
        told = "captions: 1 of {} fill the 512 tokens that the model reads; what is beyond is cut (00001)"
        assert told.format(len(rows)) in said


def test_another_caption_is_another_entry(model, drops, tmp_path):
    first = Latents(model, clips(drops), tmp_path / "cache")
    recaption(drops, "something else falls.")
    second = Latents(model, clips(drops), tmp_path / "cache")
    assert [a == b for a, b in zip(first.keys, second.keys, strict=True)] == [True, False, True]
    assert first.key != second.key
    assert torch.equal(second.load([1]).text_BLD, model.encode_text(["something else falls."]))


@pytest.mark.slow
def test_another_autoencoder_is_another_entry(drops, tmp_path):
    folder = wan_folder(tmp_path / "wan")
    first_model, other_model = (wan.load(ModelConfig(path=str(folder))) for _ in range(2))
    with torch.no_grad():
        other_model.vae.encoder.conv_in.bias[0] += 0.25
    first = Latents(first_model, clips(drops), tmp_path / "cache")
    other = Latents(other_model, clips(drops), tmp_path / "cache")
    assert not set(first.keys) & set(other.keys)
    assert not torch.equal(first.load([0]).z0_BCFHW, other.load([0]).z0_BCFHW)


def test_a_clip_changed_behind_its_metadata_is_refused(model, drops, tmp_path):
    Latents(model, clips(drops), tmp_path / "cache")
    (drops / "train" / "00001.mp4").write_bytes((drops / "train" / "00002.mp4").read_bytes())
    with pytest.raises(UserError, match=r"00001\.mp4: was changed since it was made"):
        Latents(model, clips(drops), tmp_path / "cache")


@pytest.mark.parametrize("how", ["damaged", "flipped", "exchanged"])
def test_a_damaged_entry_is_refused_and_made_again(model, drops, tmp_path, capsys, how):
    data = Latents(model, clips(drops), tmp_path / "cache")
    before = data.load([0]).z0_BCFHW
    path, other = (next((tmp_path / "cache").rglob(f"{key}.safetensors")) for key in data.keys[:2])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"damaged": content[:50], "flipped": content, "exchanged": other.read_bytes()}[how])
    with pytest.raises(UserError) as error:
        data.load([0])
    assert error.value.code == "damaged"
    assert torch.equal(Latents(model, clips(drops), tmp_path / "cache").load([0]).z0_BCFHW, before)
    assert capsys.readouterr().err.count(str(path)) == 1


def test_a_cache_that_cannot_be_written_is_named(model, drops, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(a folder on the way is a file\)"):
        Latents(model, clips(drops), tmp_path / "file" / "cache")
