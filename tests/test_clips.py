"""Datasets on disk: what is read is what was written, and what is wrong with a clip is said in one line."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.falling import SIZE, film, rows_of, write_dataset

from posttrain.core import files
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips, check_same_format, open_split, read_annotations

SPLIT = "train"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "drops", [SPLIT], clips=3, frames=9)
    return tmp_path / "drops"


def truth(index: int) -> tuple[np.ndarray, np.ndarray]:
    return film(rows_of(2 + 2 * index, 9), 4 + 5 * index, 200 + 10 * index)


def edit(folder: Path, line: int, **changes: Any) -> None:
    """Change a row of the metadata; None takes a key out."""
    path = folder / SPLIT / "metadata.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line] = {k: v for k, v in {**rows[line], **changes}.items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def clips(folder: Path, preload: bool = True, **changes: Any) -> Clips:
    return Clips(DataConfig(clips=str(folder), **changes), preload)


def test_pixels_and_masks_are_those_that_were_written(folder):
    found = clips(folder)
    assert found.ids == ["00000", "00001", "00002"]
    for index in range(3):
        video, instances = truth(index)
        np.testing.assert_array_equal(found.read(index)[0], video)
        np.testing.assert_array_equal(found.read(index)[1], instances)
    np.testing.assert_array_equal(read_video(found.video(1)), truth(1)[0])


def test_a_batch_has_the_shapes_and_ranges_of_the_contract(folder):
    edit(folder, 2, target=4)
    batch = clips(folder).load([2, 0])
    assert batch.ids == ("00002", "00000")
    assert batch.video_BCFHW.shape == (2, 3, 9, SIZE, SIZE)
    assert batch.video_BCFHW.dtype == torch.float32
    assert batch.video_BCFHW[0, :, 0, 0, 0].tolist() == pytest.approx([90 / 127.5 - 1] * 3)
    video, instances = truth(2)
    torch.testing.assert_close(batch.video_BCFHW[0, 0, 4], torch.from_numpy(video[4, :, :, 0] / 127.5 - 1).float())
    assert batch.instances_BFHW.dtype == torch.uint8
    np.testing.assert_array_equal(batch.instances_BFHW[0], instances)
    assert batch.target_B.tolist() == [5, 1]  # body i is instance i + 1
    assert batch.z0_BCFHW is None


def test_the_limit_takes_the_first_clips_of_each_folder(folder, tmp_path):
    write_dataset(tmp_path / "others", [SPLIT], clips=3, frames=9)
    assert clips(folder, limit=2).ids == ["00000", "00001"]
    both = Clips(DataConfig(clips=[str(folder), str(tmp_path / "others")], limit=2))
    assert both.ids == ["drops/00000", "drops/00001", "others/00000", "others/00001"]


def test_of_groups_the_true_clips_count(folder):
    edit(folder, 0, violation={"kind": "hover", "value": 1.0, "severity": 1.0}, group=0)
    edit(folder, 1, violation=None, group=0)
    assert clips(folder).ids == ["00001", "00002"]
    assert clips(folder, limit=1).ids == ["00001"]


def test_the_key_changes_with_the_content_alone(folder):
    before = clips(folder).key
    edit(folder, 1, background="another")
    assert clips(folder).key == before
    assert clips(folder, limit=2).key != before
    edit(folder, 1, annotations_sha256="0" * 64)
    assert clips(folder, preload=False).key != before


def test_a_damaged_clip_is_named(folder):
    path = folder / SPLIT / "00001.mp4"
    whole = path.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        os.truncate(path, size)
        with pytest.raises(UserError, match=r"00001\.mp4: (is damaged or not a video|was changed .*); delete it"):
            clips(folder)
        path.write_bytes(whole)
    assert len(clips(folder)) == 3


def test_a_clip_with_other_bytes_than_promised_is_named(folder):
    (folder / SPLIT / "00001.mp4").write_bytes((folder / SPLIT / "00002.mp4").read_bytes())
    with pytest.raises(UserError, match=r"00001\.mp4: was changed since it was made"):
        clips(folder)


def test_a_clip_of_another_length_than_promised_is_named(folder):
    for line in range(3):
        edit(folder, line, frames=13)
    with pytest.raises(UserError, match=r"00000\.mp4: has 9 frames of \(32, 32\), but its metadata say 13"):
        clips(folder)


@pytest.mark.parametrize(("field", "value"), [("fps", 24), ("size", [64, 64]), ("frames", 33)])
def test_clips_of_another_kind_are_refused(folder, tmp_path, field, value):
    write_dataset(tmp_path / "others", [SPLIT], clips=1, frames=9)
    edit(tmp_path / "others", 0, **{field: value})
    with pytest.raises(UserError, match=rf"others/train/metadata\.jsonl: {field} is .* in .*drops/train; ") as error:
        Clips(DataConfig(clips=[str(folder), str(tmp_path / "others")]))
    assert (error.value.code, error.value.field) == ("mismatch", field)
    with pytest.raises(UserError, match=rf"others/train/metadata\.jsonl: {field} is"):
        check_same_format([open_split(folder, SPLIT), open_split(tmp_path / "others", SPLIT)])
    edit(folder, 2, **{field: value})
    with pytest.raises(UserError, match=rf"metadata\.jsonl:3: 00002\.mp4: {field} is .* in 00000\.mp4; use clips"):
        open_split(folder, SPLIT)


def test_what_is_not_there_is_named(folder):
    with pytest.raises(UserError, match="has no split test, but train; film the clips") as error:
        clips(folder, split="test")
    assert error.value.code == "missing"
    edit(folder, 0, caption=None)
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: caption: is missing"):
        clips(folder)
    edit(folder, 0, caption="a")
    (folder / SPLIT / "00002.npz").unlink()
    with pytest.raises(UserError, match=r"metadata\.jsonl:3: 00002\.npz: does not exist; film the clips"):
        clips(folder)
    (folder / SPLIT / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="has no clips"):
        clips(folder)


def test_a_manifest_may_not_point_outside(folder):
    edit(folder, 1, file_name="../../secret.mp4")
    with pytest.raises(UserError, match="points outside the folder"):
        open_split(folder, SPLIT)


def test_damaged_annotations_are_named(folder):
    path = folder / SPLIT / "00000.npz"
    assert set(read_annotations(path)) == {"instances"}
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"00000\.npz: is missing or damaged"):
        clips(folder)


def test_other_annotations_than_those_that_were_made_are_refused(folder):
    digest = files.sha256(folder / SPLIT / "00000.npz")
    edit(folder, 0, annotations_sha256=digest)
    clips(folder)
    np.savez(folder / SPLIT / "00000.npz", instances=np.zeros((9, SIZE, SIZE), np.uint8))
    with pytest.raises(UserError, match=r"00000\.npz: was changed since it was made"):
        clips(folder)
    edit(folder, 0, annotations_sha256=None)
    np.savez(folder / SPLIT / "00000.npz", instances=np.zeros((5, SIZE, SIZE), np.uint8))
    with pytest.raises(UserError, match=r"00000\.npz: instances have shape \(5, 32, 32\), the video \(9, 32, 32\)"):
        clips(folder)


def test_folders_of_one_name_are_refused(tmp_path):
    for parent in ("a", "b"):
        write_dataset(tmp_path / parent / "drops", [SPLIT], clips=1, frames=5)
    with pytest.raises(UserError, match="clips with the same name"):
        Clips(DataConfig(clips=[str(tmp_path / parent / "drops") for parent in ("a", "b")]))


def test_pickles_in_annotations_are_refused(folder):
    np.savez(folder / SPLIT / "00000.npz", instances=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"00000\.npz: is missing or damaged"):
        clips(folder)
