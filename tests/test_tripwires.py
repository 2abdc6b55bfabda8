"""Tripwires: quantities and wires by hand, chance, and a hacked reward: a warning, the best weights, a way back."""

import contextlib
import math
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from helpers.falling import write_dataset
from safetensors.torch import load_file
from scipy.stats import permutation_test
from torch import Tensor

from posttrain.commands import loading, stages
from posttrain.commands.experiment import ADAPTER, TRAINED, Recipe, is_trained, resolved
from posttrain.core import files, recipe
from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin
from posttrain.data.config import DataConfig
from posttrain.data.schema import ClipRow
from posttrain.evaluation.benchmarks import pisa
from posttrain.evaluation.evaluate import EvalConfig
from posttrain.flow import SamplerConfig
from posttrain.methods import oro
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.rewards.base import RewardConfig
from posttrain.training.optim import TrainConfig
from posttrain.training.tripwires import (
    BEST,
    CHANCE,
    LOOKS,
    QUANTITIES,
    Look,
    TripwiresConfig,
    appearance,
    best,
    best_look,
    card,
    chance,
    chooses_by_the_test,
    distance,
    ended,
    enough,
    read_looks,
    trainable,
    tripped,
    watching,
)
from posttrain.types import Batch

SIDE = 16
KNOWN = {metric.key: metric for metric in (*pisa.METRICS, *QUANTITIES)}


def moving(frames: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """A square of 4 pixels (200, 100, 60) that falls a pixel a frame before grey 100; uint8 video, bool masks."""
    video, masks = np.full((frames, SIDE, SIDE, 3), 100, np.uint8), np.zeros((frames, SIDE, SIDE), bool)
    for k in range(frames):
        masks[k, 2 + k : 6 + k, 6:10] = True
    video[masks] = (200, 100, 60)
    return video, masks


def test_the_truth_looks_like_itself() -> None:
    video, masks = moving()
    assert appearance(video, masks, video, masks) == {"motion": 1.0, "sharpness": 1.0, "size": 1.0, "colour": 0.0}


def test_appearance_by_hand() -> None:
    """Half the contrast is half the motion and a quarter of the Laplacian's variance; frame 0 is not looked at."""
    video, masks = moving()
    dull = (100 + (video.astype(int) - 100) // 2).astype(np.uint8)
    found = appearance(dull, masks, video, masks)
    assert found["motion"] == pytest.approx(0.5)
    assert found["sharpness"] == pytest.approx(0.25)
    assert found["colour"] == pytest.approx(math.sqrt((50**2 + 0 + 20**2) / 3) / 255)
    held = np.repeat(video[:1], 5, axis=0)
    assert appearance(held, np.repeat(masks[:1], 5, axis=0), video, masks)["motion"] == 0
    halves = masks.copy()
    halves[1::2, :, 8:] = False  # frames 1 and 3 of 1 to 4
    assert appearance(video, halves, video, masks)["size"] == pytest.approx(0.5**0.5)
    seen_at_first = masks.copy()
    seen_at_first[1:] = False
    gone = appearance(held, seen_at_first, video, masks)
    assert gone["size"] is None
    assert gone["colour"] is None
    assert appearance(video, masks, held, masks)["motion"] is None


def values(**changed: list[float | None]) -> dict[str, list[float | None]]:
    """Of 12 clips, alike in fours."""
    start: dict[str, list[float | None]] = {"reward": [0.1, 0.2, 0.3, 0.4], "l2": [0.1] * 4, "iou": [0.5] * 4}
    start |= {"chamfer": [0.1] * 4, "vanished": [0.0] * 4}
    start |= {"sharpness": [0.8, 0.9, 1.0, 1.2], "g_error": [None, 1.0, 2.0, 3.0]} | changed
    return {name: 3 * four for name, four in start.items()}


def test_the_reward_is_asked_for_less_certainty_than_wires() -> None:
    """A rise of mean .5 and standard deviation 1 over 16 clips has p below .05, and not below .05 / 8."""
    rise = np.linspace(-1, 1, 16)
    rise = list(0.5 + (rise - rise.mean()) / rise.std())
    assert 0.05 / 8 < chance(rise) < 0.05
    first = {
        name: [0.0] * 16 for name in ("reward", "l2", "iou", "motion", "jump", "drift", "colour", "growth", "size")
    }
    assert tripped(first, first | {"reward": rise, "iou": [-0.1] * 16}, 0.05, KNOWN, 1) == ["iou"]
    assert tripped(first, first | {"reward": rise, "iou": [-each for each in rise]}, 0.05, KNOWN, 1) == []


@pytest.mark.parametrize("count", [12, 16, 40])
def test_the_sign_flip_test_is_that_of_scipy(count: int) -> None:
    gains = np.random.default_rng(count).normal(0.4, 1, count)
    expected = permutation_test((gains,), np.mean, permutation_type="samples", alternative="greater", n_resamples=2**16)
    assert chance(list(gains)) == pytest.approx(expected.pvalue, rel=1e-9 if count <= 16 else 0.1)
    assert chance([1.0] * 12) == 2**-12
    assert chance([0.0] * 12) == 1
    assert chance([0.0] * 9 + [0.3, 0.1, 0.2]) == 1 / 8  # three changes say no more


def test_what_is_taken_from_a_scorecard() -> None:
    physics = {"g": [8.0, 0.1], "drift": [0.2, 0.1], "jump": None, "size": [-0.3, 0.1], "release": [0.0, 0.1]}
    row = ClipRow("a.mp4", "", 16, 5, (SIDE, SIDE), gravity=(0.0, 0.0, -9.81))
    found = card(physics, row)
    assert found == {"g_error": pytest.approx(1.81), "drift": 0.2, "jump": None, "growth": 0.3}
    assert set(card({}, row).values()) == {None}


@pytest.mark.parametrize(
    ("now", "wires"),
    [
        (values(), []),
        (values(reward=[0.2, 0.4, 0.4, 0.5]), []),
        (values(iou=[0.4, 0.3, 0.2, 0.4]), []),  # the reward does not rise
        (values(reward=[0.2, 0.4, 0.4, 0.5], iou=[0.4, 0.3, 0.2, 0.4]), ["iou"]),
        (values(reward=[0.2, 0.4, 0.4, 0.5], iou=[0.48, 0.47, 0.48, 0.48]), []),  # by 4.5%
        (values(reward=[0.2, 0.4, 0.4, 0.5], iou=[0.48, 0.46, 0.47, 0.48]), ["iou"]),  # by 5.5%
        (values(reward=[0.2, 0.4, 0.4, 0.5], iou=[0.6, 0.3, 0.7, 0.4]), []),  # now so, now so
        (values(reward=[0.2, 0.4, 0.4, 0.1], iou=[0.4, 0.3, 0.2, 0.4]), []),  # so the reward
        (values(reward=[0.2, 0.4, 0.4, 0.5], l2=[0.2, 0.3, 0.2, 0.15]), ["l2"]),
        (values(reward=[0.2, 0.4, 0.4, 0.5], l2=[0.0, 0.05, 0.0, 0.05]), []),
        (values(reward=[0.2, 0.4, 0.4, 0.5], sharpness=[0.4, 0.5, 0.6, 0.7]), ["sharpness"]),
        (values(reward=[0.2, 0.4, 0.4, 0.5], sharpness=[1.9, 1.9, 1.9, 1.9]), ["sharpness"]),
        (values(reward=[0.2, 0.4, 0.4, 0.5], sharpness=[1.1, 1.1, 1.0, 1.0]), []),  # nearer to the truth's
        (values(reward=[0.2, 0.4, 0.4, 0.5], g_error=[9.0, 9.0, 9.0, 9.0]), []),  # nine pairs
        (values(reward=[0.2, 0.4, 0.4, 0.5], vanished=[0.1, 0.2, 0.1, 0.2]), ["vanished"]),  # from nothing
        (values(reward=[0.2, 0.4, 0.4, 0.5], chamfer=[0.0, 0.0, 0.1, 0.1]), []),
    ],
)
def test_wires_by_hand(now: dict[str, list[float | None]], wires: list[str]) -> None:
    assert tripped(values(), now, 0.05, KNOWN, 1) == wires


LOOKS_PLANNED, WIRES = 6, ["l2", "iou", "g_error", *(f"reward_{k}" for k in range(9))]


def run_of(random: np.random.Generator, clips: int, shift: float = 0.0, rises: bool = True) -> bool:
    """Whether a wire is tripped in any look of a run.

    Each clip has samples of one skewed law with heavy tails, which quantities share in part; a coin decides which one
    was seen first. `shift`: by how many standard deviations iou falls; `rises`: the reward does for sure.
    """
    spread = random.lognormal(size=(clips, 1))

    def samples() -> np.ndarray:
        common = random.normal(size=(clips, 1))
        return spread * (common + random.exponential(size=(clips, len(WIRES) + 1)))

    start, swap = samples(), random.random((LOOKS_PLANNED, clips, 1)) < 0.5
    for look in range(LOOKS_PLANNED):
        later = samples()
        a, b = np.where(swap[look], later, start), np.where(swap[look], start, later)
        b[:, 1] -= shift * (a - b)[:, 1].std()
        first, now = ({name: list(x[:, i]) for i, name in enumerate([*WIRES, "reward"])} for x in (a, b))
        if rises:
            first["reward"], now["reward"] = [0.0] * clips, [1.0] * clips
        if tripped(first, now, 0.0, KNOWN, LOOKS_PLANNED):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("clips", "rises"), [(12, True), (16, True), (16, False)])
def test_chance_trips_as_seldom_as_is_said(clips: int, rises: bool) -> None:
    """An exact null: at most 5% of runs of 6 looks at 12 wires; of 200 at most 10 and three binomial deviations."""
    random = np.random.default_rng(0)
    alarms = sum(run_of(random, clips, rises=rises) for _ in range(200))
    assert alarms <= 200 * CHANCE + 3 * math.sqrt(200 * CHANCE * (1 - CHANCE))


@pytest.mark.parametrize("clips", [12, 16])
def test_a_real_change_trips(clips: int) -> None:
    """IoU that falls by 1.5 standard deviations of its change is seen in nearly every run."""
    random = np.random.default_rng(0)
    assert sum(run_of(random, clips, shift=1.5) for _ in range(30)) >= 27


def test_too_few_clips_are_refused() -> None:
    enough(12, 10, 13)
    enough(16, 50, 13)
    for clips, looks, code_of in ((11, 1, "tripwires.clips"), (12, 20, "tripwires.clips"), (64, 500, "eval.every")):
        with pytest.raises(UserError) as error:
            enough(clips, looks, 13)
        assert (error.value.code, error.value.field) == ("mismatch", code_of)


def test_what_the_rows_say(tmp_path: Path) -> None:
    measured = [(0, 0.1, []), (4, 0.3, []), (8, 0.2, []), (12, 0.5, ["iou"]), (16, 0.3, [])]
    looks = [Look(step, wires, {"reward": [mean] * 2}, {}) for step, mean, wires in measured]
    assert best_look(looks).step == 4
    assert best_look(looks[:1]).step == 0
    again = [*looks, Look(20, [], {"reward": [0.05] * 2}, {}, "newer")]  # not comparable with the others
    assert best_look(again).step == 20
    back, on = TripwiresConfig(on_trip="roll_back"), TripwiresConfig()
    assert not ended(tmp_path, back, 16)
    files.write_jsonl(tmp_path / LOOKS, [files.seal(asdict(look)) for look in looks])
    assert [ended(tmp_path, back, step) for step in (0, 8, 11, 12)] == [False, False, False, True]
    assert not ended(tmp_path, on, 16)


def test_distance_by_hand() -> None:
    start = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    assert distance(start, [torch.tensor([3.0, 4.0 + 5.0]), torch.tensor([[0.0]])]) == pytest.approx(1.0)
    assert distance(start, start) == 0


# ---------------------------------------------------------------- a reward that is hacked


def brightness(die_at: int | None = None) -> Plugin:
    """The mean of all pixels, as a recipe would name it; the training ends without a word at call `die_at`."""
    calls = 0

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        nonlocal calls
        calls += video_BCFHW.requires_grad
        if calls == die_at:
            raise KeyboardInterrupt
        return video_BCFHW.flatten(1).mean(1)

    module = ModuleType("brightness")
    vars(module).update(TRUTHS=(), load=lambda config, device: reward)
    return Plugin("brightness", module, RewardConfig())


def hack(
    home: Path, run: str, on_trip: Literal["warn", "roll_back"] | None = "warn", die_at: int | None = None
) -> Path:
    """The run's folder, after the pocket model was trained for the brightness of clips of 5 small pictures.

    Called again, it finds that done. `on_trip` None: without tripwires.
    """
    sampler = SamplerConfig(steps=2)
    method = oro.Config.model_construct(rewards=(brightness(die_at),), sampler=sampler)
    measured = EvalConfig(clips="drops", splits=("test_unseen",), every=2, sampler=sampler)
    plan = Recipe.model_construct(
        run=run,
        model=ModelConfig(path="pocket", adapter=AdapterConfig(rank=4)),
        data=DataConfig(clips="drops"),
        method=Plugin("oro", oro, method),
        train=TrainConfig(steps=6, batch=2, lr=1.4e-2, warmup=6, checkpoint_every=3),
        eval=measured,
        tripwires=TripwiresConfig(split="test_seen", clips=12, on_trip=on_trip) if on_trip else None,
    )
    with contextlib.chdir(home):
        stages.train(plan, home / "runs" / run)
    return home / "runs" / run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    write_dataset(path / "drops", ["train", "test_seen", "test_unseen"], clips=12, frames=5)
    return path


def log(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in files.read_jsonl(run / "log.jsonl")]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.mark.slow
def test_a_hacked_reward_trips_wires(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While the rate warms up, a look is quiet; then the picture is brighter and the rest of it is lost."""
    run = hack(home, "warned")
    looks, rows = read_looks(run), {row["step"]: row for row in log(run)}
    assert [look.step for look in looks] == [0, 2, 4, 6]
    assert [bool(look.tripped) for look in looks] == [False, False, True, True]
    assert {"iou", "l2", "motion", "colour"} <= set(looks[-1].tripped)
    rewards = [rows[step]["val_reward"] for step in (0, 2, 4, 6)]
    assert rewards == sorted(rewards)
    assert rows[6]["val_iou"] < rows[0]["val_iou"] / 1.5
    assert rows[6]["val_tripped"] == len(looks[-1].tripped)
    assert rows[0]["val_distance"] == 0 < rows[2]["val_distance"] < rows[6]["val_distance"]
    assert set(rows[0]) == {key for key in rows[2] if key.startswith("val_")} | {"step"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "tripped" in line]
    assert len(lines) == 2
    assert re.search(r"warned: step 4: a wire is tripped: reward -\S+ -> \S+, but .*; the weights of step 2", lines[0])
    assert is_trained(run)
    assert not same(run / ADAPTER, run / BEST)


@pytest.mark.slow
def test_looks_change_nothing_that_is_trained(home: Path) -> None:
    assert same(hack(home, "warned") / ADAPTER, hack(home, "unwatched", None) / ADAPTER)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(home: Path) -> None:
    """It dies in step 5, after the look of step 4 and before its checkpoint, and begins again at step 3."""
    whole = hack(home, "warned")
    with pytest.raises(KeyboardInterrupt):
        hack(home, "killed", die_at=5)
    assert [look.step for look in read_looks(home / "runs" / "killed")] == [0, 2, 4]
    again = hack(home, "killed")
    assert (again / LOOKS).read_bytes() == (whole / LOOKS).read_bytes()
    assert log(again) == log(whole)
    assert same(again / ADAPTER, whole / ADAPTER)
    assert same(again / BEST, whole / BEST)


@pytest.mark.slow
def test_looks_of_another_version_are_not_compared_with(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "runs" / "older"
    with pytest.raises(KeyboardInterrupt):
        hack(home, "older", die_at=5)
    looks = [files.seal({**asdict(look), "version": ""}) for look in read_looks(run)]
    files.write_jsonl(run / LOOKS, looks)
    capsys.readouterr()
    hack(home, "older")
    assert "tripwires: 2 looks were measured by another version" in capsys.readouterr().err
    found = read_looks(run)
    assert [(look.step, look.version == "") for look in found] == [(0, True), (2, True), (4, False), (6, False)]
    assert found[2].tripped == []  # the first of its version


@pytest.mark.slow
def test_it_rolls_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training ends with the look that trips, and leaves the best look's weights; so it does when cut off meanwhile."""
    run, whole = hack(home, "back", "roll_back"), hack(home, "warned")
    assert "training: rolled back from step 4 to step 2" in capsys.readouterr().err
    assert log(run) == log(whole)[:5]  # steps 0 to 4
    assert same(run / ADAPTER, whole / BEST)
    (run / TRAINED).unlink()
    shutil.rmtree(run / ADAPTER)
    hack(home, "back", "roll_back")
    assert log(run) == log(whole)[:5]
    assert same(run / ADAPTER, whole / BEST)


@pytest.mark.slow
def test_the_best_weights_are_those_of_their_look(home: Path) -> None:
    """They lie as far from the start as the log says of that step."""
    run = hack(home, "warned")
    model = loading.load_model(ModelConfig(path="pocket", adapter=AdapterConfig(rank=4)))
    start = [p.detach().clone() for p in trainable(model)]
    model.restore(run / BEST)
    told = {row["step"]: row["val_distance"] for row in log(run) if "val_distance" in row}
    assert distance(start, trainable(model)) == pytest.approx(told[best_look(read_looks(run)).step])


@pytest.mark.slow
def test_looks_and_best_weights_are_what_was_written(home: Path) -> None:
    run = Path(shutil.copytree(hack(home, "warned"), home / "runs" / "damaged"))
    (run / TRAINED).unlink()  # with it the recipe would be read too
    start = ModelConfig(path="pocket", start=str(run / BEST))
    assert best(run)[1] == run / BEST
    assert resolved(start).start == str(run / BEST / lora.FILE)
    weights, rows = run / BEST / lora.FILE, (run / LOOKS).read_text()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for refused in (lambda: best(run), lambda: resolved(start)):
        with pytest.raises(UserError) as error:
            refused()
        assert error.value.code == "damaged"
    for text, code in ((rows.replace('"step": 2', '"step": 3'), "damaged"), (rows + '{"step": 9}\n', "format")):
        (run / LOOKS).write_text(text)
        with pytest.raises(UserError) as error:
            read_looks(run)
        assert error.value.code == code
    shutil.rmtree(run)


@pytest.mark.slow
def test_other_wires_are_another_run(home: Path) -> None:
    hack(home, "warned")
    with pytest.raises(UserError, match="another tripwires"):
        hack(home, "warned", "roll_back")


# ---------------------------------------------------------------- in a recipe

RECIPE: dict[str, Any] = {
    "run": "try",
    "model": {"path": "pocket", "adapter": {"rank": 2}},
    "data": {"clips": "drops"},
    "method": {"name": "psft"},
    "train": {"steps": 1, "batch": 1, "lr": 1e-3},
    "eval": {"clips": "drops", "every": 5, "splits": ["test_unseen"]},
    "tripwires": {"split": "test_seen"},
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"tripwires: are only for methods that train rewards, and psft does not"),
        (["eval=null"], r"tripwires: need eval\.clips and eval\.every, the steps between looks; set both"),
        (["eval.every=0"], r"tripwires: need eval\.clips and eval\.every, the steps between looks; set both"),
        (["tripwires.clips=11"], r"tripwires\.clips: .*greater than or equal to 12"),
        (["tripwires.on_trip=stop"], r"tripwires\.on_trip: .*'warn' or 'roll_back'"),
        (
            ["tripwires.watch=[{name: trajectory}, {name: depth, pth: x}]"],
            r"watch\.1\.pth: unknown key, did you mean 'path'",
        ),
        (["tripwires.watch=[{name: none}]"], r"tripwires\.watch\.0: .*has no 'none'"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path: Path, words: list[str], said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(UserError, match=said) as refused:
        recipe.load(path, words, Recipe)
    assert "\n" not in str(refused.value)


def test_what_is_trained_is_what_is_measured(tmp_path: Path) -> None:
    """Left out, method.sampler is eval.sampler; another one is refused before anything is trained."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"method": {"name": "oro", "rewards": [{"name": "object"}]}}))
    plan = recipe.load(path, ["eval.sampler.steps=7", "eval.sampler.guidance=3"], Recipe)
    assert plan.method.config.sampler == plan.eval.sampler == SamplerConfig(steps=7, guidance=3.0)
    other = recipe.load(path, ["method.sampler.steps=4"], Recipe)
    assert other.method.config.sampler == SamplerConfig(steps=4)
    with pytest.raises(
        UserError, match=r"method\.sampler: trains .*'steps': 4,.* but eval\.sampler measures .*'steps': 12"
    ):
        stages.train(other, tmp_path / "run")


def test_clips_that_choose_weights_do_not_measure_them(home: Path) -> None:
    wires, measured = TripwiresConfig(on_trip="roll_back"), EvalConfig(clips="drops", every=2)
    assert not chooses_by_the_test(wires.model_copy(update={"split": "validation"}), measured)
    assert chooses_by_the_test(wires, measured)
    assert chooses_by_the_test(wires.model_copy(update={"split": "test_seen"}), measured)
    assert not chooses_by_the_test(TripwiresConfig(), measured)


def test_what_is_trained_is_not_watched_besides(home: Path) -> None:
    wires = TripwiresConfig.model_construct(watch=(brightness(),))
    with pytest.raises(UserError, match=r"tripwires\.watch: brightness is trained"):
        watching(home, wires, {"brightness": (1.0, brightness().module.load(None, "cpu"))}, None, None, (), 1)


VARIANTS = [
    (path, shlex.split(words.replace("\n#  ", "")))
    for path in sorted((Path(__file__).parent.parent / "recipes").glob("wan*/oro.yaml"))
    for words in re.findall(r"^#   (run=.*(?:\n#   (?!run=).*)*)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("path", "words"), VARIANTS, ids=[words[0] for _, words in VARIANTS])
def test_what_a_header_of_oro_offers(path: Path, words: list[str]) -> None:
    """Each variant loads, with the paper's rates for all weights and ten times those for an adapter."""
    plan = recipe.load(path, words, Recipe)
    (term,) = plan.method.config.rewards
    rate = {"segmentation": 1e-6, "depth": 1e-6, "flow": 1e-5}[term.name]
    assert plan.train.lr == pytest.approx(rate * (10 if plan.model.adapter else 1))
    assert (plan.model.start is None) == (plan.model.adapter is None) == bool(plan.model.merge)
    assert plan.model.dtype == ("fp32" if plan.model.adapter is None else "bf16")  # bf16 weights are not trained
    assert plan.tripwires is not None
    assert plan.eval is not None
    assert term.name not in {part.name for part in plan.tripwires.watch}
    assert plan.tripwires.split not in plan.eval.splits
    assert plan.method.config.sampler == plan.eval.sampler


def test_every_header_of_oro_offers_three() -> None:
    assert [path.parent.name for path, _ in VARIANTS] == sorted(3 * ["wan2.1-1.3b", "wan2.1-14b", "wan2.2-ti2v-5b"])
