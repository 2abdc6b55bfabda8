"""Groups of a true clip and its losers: which there are, what a batch holds, and what is refused."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from helpers.falling import FPS, film, rows_of, write_clip, write_dataset, write_groups
from helpers.group_samples import samples
from helpers.tiny import wan_folder

from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import Groups, Members, gather, sample_of
from posttrain.data.latents import Latents
from posttrain.models.base import ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    return load(ModelConfig(path=str(wan_folder(tmp_path_factory.mktemp("tiny") / "wan"))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_groups(tmp_path / "drops")
    return tmp_path / "drops"


def gathered(folder: Path, pictured: bool = True, **groups: Any) -> tuple[Members, list[tuple[str, list[str]]]]:
    """The members, and the groups by the members' names."""
    config = DataConfig(clips=str(folder), groups=GroupsConfig(**groups))
    clips = Clips(config, preload=False, violated=config.groups.counterfactuals)
    members, found = gather(clips, config.groups, pictured)
    names = [Path(name).stem for name in members.ids]
    return members, [(names[group.winner], [names[i] for i in group.losers]) for group in found]


def test_counterfactuals_with_their_severity(folder: Path) -> None:
    members, groups = gathered(folder, losers=3, counterfactuals=True)
    assert [winner for winner, _ in groups] == ["00000-0", "00001-0"]
    for winner, losers in groups:
        assert sorted(losers) == [f"{winner[:-1]}{i}" for i in (1, 2, 3)]
    scores = {members.ids[i]: members.scores(i) for i in range(len(members)) if members.clips.row(i).violation}
    assert scores["00000-1"] == (1.0, 0.75)
    assert scores["00001-3"] == (1.0, 0.25)


def test_counterfactuals_that_came_out_alike_are_one(folder: Path) -> None:
    train = folder / "train"
    rows = read_jsonl(train / "metadata.jsonl")
    shutil.copy(train / "00000-1.mp4", train / "00000-2.mp4")
    rows[2]["sha256"] = rows[1]["sha256"]
    (train / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, groups = gathered(folder, losers=2, counterfactuals=True)
    assert sorted(groups[0][1]) == ["00000-1", "00000-3"]
    assert len(groups) == 3


def test_samples_with_their_scores(folder: Path, tmp_path: Path) -> None:
    place = str(samples(tmp_path / "made"))
    first = [(f"0000{g}-0", [f"0000{g}-0-s0-base"]) for g in (0, 1)]
    assert gathered(folder, losers=1, samples=(place,), samples_each=1)[1] == first
    members, groups = gathered(folder, losers=2, samples=(place,))
    assert [(winner, sorted(losers)) for winner, losers in groups] == [
        (f"0000{g}-0", [f"0000{g}-0-s0-base", f"0000{g}-0-s1-base"]) for g in (0, 1)
    ]
    assert [members.scores(i) for i in range(2, 6)] == [(0.0, 0.5), (0.25, 0.5)] * 2
    assert members.row(4).caption == "square 1 falls."
    assert len(members.read(3)[0]) == 5


def test_both_together_and_more_losers_than_a_group_takes(folder: Path, tmp_path: Path) -> None:
    """Five losers in groups of two: three groups, in which each is at least once and none twice."""
    place = str(samples(tmp_path / "made"))
    _, groups = gathered(folder, losers=2, counterfactuals=True, samples=(place,))
    assert [winner for winner, _ in groups] == ["00000-0"] * 3 + ["00001-0"] * 3
    used = [loser for winner, losers in groups for loser in losers if winner == "00000-0"]
    assert len(set(used)) == 5
    assert all(len(set(losers)) == 2 for _, losers in groups)
    assert groups == gathered(folder, losers=2, counterfactuals=True, samples=(place,))[1]
    assert [losers for _, losers in groups[:3]] != [[n.replace("00001", "00000") for n in g] for _, g in groups[3:]]


def test_the_best_sample_wins_where_samples_do(folder: Path, tmp_path: Path) -> None:
    place = samples(tmp_path / "made", seeds=3)
    _, groups = gathered(folder, losers=2, samples=(str(place),), winner="sample")
    assert [(winner, sorted(losers)) for winner, losers in groups] == [
        (f"0000{g}-0-s2-base", [f"0000{g}-0-s0-base", f"0000{g}-0-s1-base"]) for g in (0, 1)
    ]
    assert len(gathered(folder, losers=1, samples=(str(place),), winner="sample")[1]) == 4
    assert "no clip has 3 losers and a better one" in refusal(folder, losers=3, samples=(str(place),), winner="sample")
    rows = read_jsonl(place / "scores.jsonl")
    (place / "scores.jsonl").write_text("".join(json.dumps(row | {"sa": 0.5}) + "\n" for row in rows))
    assert "no clip has 1 losers" in refusal(folder, losers=1, samples=(str(place),), winner="sample")  # all alike
    (place / "scores.jsonl").unlink()
    assert "the best sample wins" in refusal(folder, losers=2, samples=(str(place),), winner="sample")
    with pytest.raises(ValueError, match="compares samples with samples"):
        GroupsConfig(losers=2, counterfactuals=True, samples=("made",), winner="sample")


@pytest.mark.parametrize(
    ("stem", "meant"),
    [
        ("scene-s0", ("scene", 0)),
        ("scene-s2", ("scene", 2)),
        ("scene-s12-base", ("scene", 12)),
        ("scene-s2-s0", ("scene-s2", 0)),
        ("scene-s2-s10-wan-s4", ("scene-s2", 10)),
        ("scene-s3-s0", ("scene", 3)),  # by a model called s0
        ("a-s1-b-s7", ("a-s1-b", 7)),
        ("scene", None),
        ("other-s0", None),
        ("scene-s", None),
        ("scene-s2-", None),
        ("scene-s2x", None),
        ("-s2", None),
    ],
)
def test_whose_a_sample_is(stem: str, meant: tuple[str, int] | None) -> None:
    """Also where a clip's own name ends as a sample's does."""
    assert sample_of(stem, {"scene", "scene-s2", "a-s1-b"}) == meant


def test_limit_counts_true_clips(folder: Path) -> None:
    config = DataConfig(clips=str(folder), limit=1)
    assert Clips(config, preload=False).ids == ["00000-0"]
    assert Clips(config, preload=False, violated=True).ids == [f"00000-{i}" for i in range(4)]


def test_a_clip_with_too_few_losers_is_left_out_and_it_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = samples(tmp_path / "made", scores=False)
    (place / "00001-0-s1-base.mp4").unlink()
    _, groups = gathered(folder, losers=2, samples=(str(place),))
    assert [winner for winner, _ in groups] == ["00000-0"]
    assert "1 of 2 clips are left out, with fewer than 2 losers" in capsys.readouterr().err


def refusal(folder: Path, **groups: Any) -> str:
    with pytest.raises(UserError) as caught:
        gathered(folder, **groups)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_comparable_is_refused(folder: Path, tmp_path: Path) -> None:
    def made(name: str, **change: Any) -> tuple[str, ...]:
        return (str(samples(tmp_path / name, scores=False, **change)),)

    assert "no clip has 4 losers" in refusal(folder, losers=4, counterfactuals=True)
    assert "missing does not exist" in refusal(folder, samples=(str(tmp_path / "missing"),))
    assert "frames is 7, but 5 in" in refusal(folder, losers=2, samples=made("long", frames=7))
    assert "fps is 8.0, but 16.0 in" in refusal(folder, losers=2, samples=made("slow", fps=8))
    [same] = made("same")
    shutil.copy(Path(same) / "00000-0-s0-base.mp4", Path(same) / "00000-0-s7-base.mp4")
    assert "is the same file as" in refusal(folder, losers=2, samples=(same,))


def test_every_frame_of_a_sample_has_its_time(folder: Path, tmp_path: Path) -> None:
    """The mean rate is right, but one frame comes later by 0.6 frames, or by 0.4, which is still the nearest."""
    made = samples(tmp_path / "made", seeds=1)
    path = made / "00000-0-s0-base.mp4"
    pictures = read_video(path)

    def late(frames: float) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264rgb", rate=100 * FPS, options={"qp": "0", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "rgb24"
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(100 * (number + frames * (number == 2))), Fraction(1, 100 * FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    late(0.4)
    assert len(gathered(folder, losers=1, samples=(str(made),))[1]) == 2
    late(0.6)
    with pytest.raises(UserError, match="frame 2 ") as error:
        gathered(folder, losers=1, samples=(str(made),))
    assert (error.value.code, error.value.field) == ("mismatch", "fps")


def test_samples_that_are_left_out_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = samples(tmp_path / "made")
    shutil.copy(made / "00000-0-s0-base.mp4", made / "other-s0.mp4")
    gathered(folder, losers=1, samples=(str(made),), samples_each=1)
    said = capsys.readouterr().err
    assert f"{made}: 1 videos continue no clip here, as other-s0.mp4; left out" in said
    assert f"{made}: 2 videos have seeds from 1 on (data.groups.samples_each), as 00000-0-s1-base.mp4" in said


def test_another_first_picture_is_refused_unless_words_alone_were_given(folder: Path, tmp_path: Path) -> None:
    """The squares of the two scenes stand in other columns."""
    [swapped] = (str(samples(tmp_path / "swapped", scores=False)),)
    for seed in range(2):
        a, b = (Path(swapped) / f"0000{group}-0-s{seed}-base.mp4" for group in (0, 1))
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    assert "its first frame is not that of" in refusal(folder, losers=2, samples=(swapped,))
    assert len(gathered(folder, pictured=False, losers=2, samples=(swapped,))[1]) == 2
    path = folder / "train" / "00000-2.mp4"
    rows = read_jsonl(folder / "train" / "metadata.jsonl")
    video, instances = film(rows_of(2, 5), 20, 200)
    rows[2] |= write_clip(path, video, instances)
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for pictured in (True, False):
        with pytest.raises(UserError, match=r"00000-2.mp4: its first frame is not that of"):
            gathered(folder, pictured, counterfactuals=True)


@pytest.mark.parametrize("value", [None, 1.5, -0.1, True, "good", float("nan")])
def test_scores_out_of_range_are_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    place = samples(tmp_path / "made")
    rows = read_jsonl(place / "scores.jsonl")
    rows[2]["pc"] = value
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refusal(folder, losers=2, samples=(str(place),))
    assert "00001-0-s0-base.mp4: pc is" in said or "scores.jsonl:3: " in said  # NaN is no JSON


@pytest.mark.parametrize("name", [None, ["00000-0-s0-base.mp4"], 3])
def test_a_score_of_no_video_is_refused(folder: Path, tmp_path: Path, name: Any) -> None:
    place = samples(tmp_path / "made")
    rows = read_jsonl(place / "scores.jsonl")
    rows[2]["file_name"] = name
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        gathered(folder, losers=2, samples=(str(place),))
    assert (error.value.code, error.value.field) == ("value", "file_name")


def test_a_sample_without_a_score_among_scored_ones_is_refused(folder: Path, tmp_path: Path) -> None:
    place = samples(tmp_path / "made")
    rows = read_jsonl(place / "scores.jsonl")[1:]
    (place / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "has no row for 00000-0-s0-base.mp4" in refusal(folder, losers=2, samples=(str(place),))


@pytest.mark.slow
def test_a_batch(wan: Wan, folder: Path, tmp_path: Path) -> None:
    """Latents are those that each clip has by itself, in the order of the scores; another batch of it is the same."""
    groups = GroupsConfig(losers=3, counterfactuals=True)
    config = DataConfig(clips=str(folder), groups=groups)
    data = Groups(wan, Clips(config, preload=False, violated=True), groups, tmp_path / "cache")
    batch = data.load([1, 0])
    assert batch.ids == ("00001-0/1", "00000-0/1")
    assert list(data.ids) == ["00000-0/1", "00001-0/1"]
    assert batch.losers_BMCFHW.shape == (2, 3, *batch.z0_BCFHW.shape[1:])
    assert batch.semantic_adherence_BM.shape == batch.physical_commonsense_BM.shape == (2, 3)
    every = Latents(wan, Clips(config, preload=False, violated=True), tmp_path / "cache")
    order = [round((1 - pc) * 4) for pc in batch.physical_commonsense_BM[1].tolist()]
    assert sorted(order) == [1, 2, 3]
    assert torch.equal(batch.losers_BMCFHW[1], every.load(order).z0_BCFHW)
    assert torch.equal(batch.z0_BCFHW[1], every.load([0]).z0_BCFHW[0])
    torch.testing.assert_close(  # the autoencoder is causal
        batch.losers_BMCFHW[:, :, :, 0], batch.z0_BCFHW[:, None, :, 0].expand(-1, 3, -1, -1, -1), rtol=0, atol=1e-5
    )
    again = Groups(wan, Clips(config, preload=False, violated=True), groups, tmp_path / "cache")
    assert again.key == data.key
    other = Groups(
        wan, Clips(config, preload=False, violated=True), GroupsConfig(losers=2, counterfactuals=True), tmp_path / "c"
    )
    assert other.key != data.key
    assert len(other) == 4


def test_without_scores_a_batch_has_none(wan: Wan, folder: Path, tmp_path: Path) -> None:
    groups = GroupsConfig(losers=2, samples=(str(samples(tmp_path / "made", scores=False)),))
    clips = Clips(DataConfig(clips=str(folder)), preload=False)
    batch = Groups(wan, clips, groups, tmp_path / "cache").load([0, 1])
    assert batch.semantic_adherence_BM is None
    assert batch.physical_commonsense_BM is None
    assert batch.losers_BMCFHW.shape[:2] == (2, 2)


def test_a_sample_that_wins_continues_the_true_picture(wan: Wan, folder: Path, tmp_path: Path) -> None:
    """Its own first frame went through the model; what is given, frames, text and condition, is the true clip's."""
    clips = Clips(DataConfig(clips=str(folder)), preload=False)
    config = GroupsConfig(losers=2, samples=(str(samples(tmp_path / "made", seeds=3)),), winner="sample")
    data = Groups(wan, clips, config, tmp_path / "cache")
    batch, true = data.load([0, 1]), Latents(wan, clips, tmp_path / "cache").load([0, 1])
    best = Latents(wan, data.members, tmp_path / "cache").load([group.winner for group in data.groups])
    assert batch.z0_BCFHW is not None
    assert true.z0_BCFHW is not None
    assert best.z0_BCFHW is not None
    assert torch.equal(batch.z0_BCFHW[:, :, : wan.n_cond_frames], true.z0_BCFHW[:, :, : wan.n_cond_frames])
    assert torch.equal(batch.z0_BCFHW[:, :, wan.n_cond_frames :], best.z0_BCFHW[:, :, wan.n_cond_frames :])
    assert not torch.equal(best.z0_BCFHW, batch.z0_BCFHW)
    assert all(torch.equal(batch.condition[name], value) for name, value in true.condition.items())


def test_folders_without_groups_have_no_counterfactuals(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain", ["train"], clips=3, frames=5)
    assert "no clip has 3 losers" in refusal(tmp_path / "plain", counterfactuals=True)
