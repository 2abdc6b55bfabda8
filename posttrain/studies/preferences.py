"""Which clips trained models prefer, compared with their base models, on held-out groups, as a Markdown table.

    python -m posttrain.studies.preferences runs/pocket-gdpo runs/pocket-psft \
        --clips data/pocket-drop --samples runs/pocket-gdpo/samples/base/test_unseen

err is the velocity error of methods/gdpo.py, computed for a run's model and its base model with the same times and
noise; _w is the true clip (preferred), _l a loser (rejected):

    accuracy   the share of (loser, time) with err_w - err_w_base < err_l - err_l_base
    margin     (err_l - err_l_base) - (err_w - err_w_base)
    winner     err_w - err_w_base; below 0 if the model fits true clips better than its base model
    losers     err_l - err_l_base

Each number is a mean over a clip's losers and times, then over clips, with a 95% bootstrap interval. Runs of all
methods can be compared, also those that trained on true clips only. If a run's recipe sets frames, fps and size, the
clips are retimed and cropped accordingly, and may be any videos.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from posttrain.commands.experiment import need_training, open_run, resolved
from posttrain.commands.loading import CACHE, base_model, tuned_model
from posttrain.core.errors import UserError
from posttrain.core.progress import markdown, track
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import Groups
from posttrain.evaluation.records import interval
from posttrain.methods import gdpo
from posttrain.models.base import VideoModel
from posttrain.types import Random

HEADINGS = ("run", "clips", "accuracy", "margin", "winner", "losers")


def group_errors(model: VideoModel, groups: Groups, draws: int, title: str) -> Tensor:
    """Velocity errors, float32 (groups, draws, 1 + m): of the true clip and its m losers, at `draws` times."""
    errors = []
    for index in track(range(len(groups)), title, len(groups)):
        batch = groups.load([index] * draws).to(model.device)
        assert batch.z0_BCFHW is not None
        assert batch.losers_BMCFHW is not None
        assert batch.text_BLD is not None
        times = Random(0, index, range(draws))
        noised = gdpo.place(model, batch.z0_BCFHW, batch.losers_BMCFHW, times, gdpo.Config())
        ones = torch.ones(batch.losers_BMCFHW.shape[:2])
        drawn = gdpo.Draw(*noised, batch.text_BLD, batch.condition, ones, ones, ())
        with torch.no_grad():
            errors.append(gdpo.errors(model, drawn, gdpo.Config()).float().cpu())
    return torch.stack(errors)


def measured(
    opened: AbstractContextManager[VideoModel],
    clips: Clips,
    config: GroupsConfig,
    pictured: bool,
    draws: int,
    title: str,
) -> tuple[list[str], Tensor]:
    """The name of each group's true clip, and `group_errors` of the model that the context `opened` gives."""
    with opened as model:
        groups = Groups(model, clips, config, CACHE / "latents", pictured)
        names = [name.rpartition("/")[0] for name in groups.ids]  # a clip may have several groups
        return names, group_errors(model, groups, draws, title)


def row(name: str, clips: Sequence[str], tuned_GKN: Tensor, base_GKN: Tensor) -> list[str]:
    """One line of the table; `clips` names the true clip of each group."""
    gain_GKN = tuned_GKN - base_GKN
    margin_GKM = gain_GKN[..., 1:] - gain_GKN[..., :1]
    cells = []
    for values in ((margin_GKM > 0).float(), margin_GKM, gain_GKN[..., :1], gain_GKN[..., 1:]):
        of_groups = values.mean((1, 2))
        indices_of_clips = [[i for i, other in enumerate(clips) if other == clip] for clip in dict.fromkeys(clips)]
        mean = interval([of_groups[indices].mean().item() for indices in indices_of_clips])
        cells.append(f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]")
    return [name, str(len(set(clips))), *cells]


def held_out(data: DataConfig, clips: str, split: str) -> DataConfig:
    """A recipe's data settings with all of another dataset's clips, retimed and cropped as in the recipe."""
    return data.model_copy(update={"clips": clips, "split": split, "limit": None, "make": None, "groups": None})


def compare(runs: Sequence[str], clips: str, split: str, config: GroupsConfig, draws: int) -> str:
    """The table in Markdown, a line per run.

    Args:
        clips, split: the held-out clips.

    Raises:
        UserError: a run is not trained, or an error of Groups.
    """
    lines, bases = [], dict[str, Tensor]()  # most runs share a base model
    for target in runs:
        plan, folder = open_run(target)
        need_training(folder)
        data = held_out(plan.data, clips, split)
        settings = (
            Clips(data, preload=False, violated=config.counterfactuals),
            config,
            plan.model.conditioning == "image",
            draws,
        )
        base_key = resolved(plan.model).model_dump_json(exclude={"adapter", "seed", "init", "other_adapter"})
        base_key += data.model_dump_json()
        if base_key not in bases:
            _, bases[base_key] = measured(base_model(plan), *settings, f"{target}, base")
        names, tuned_GKN = measured(tuned_model(plan, folder), *settings, f"{target}, {plan.method.name}")
        lines.append(row(target, names, tuned_GKN, bases[base_key]))
    return markdown(HEADINGS, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    clips = "a dataset, or videos with captions, that no run was trained on"
    parser.add_argument("--clips", required=True, metavar="FOLDER", help=clips)
    parser.add_argument("--split", default="test_unseen", help="split of the dataset (default: test_unseen)")
    parser.add_argument(
        "--samples", nargs="+", default=[], metavar="FOLDER", help="losers: folders of samples of these clips"
    )
    parser.add_argument(
        "--counterfactuals", action="store_true", help="losers: clips that break a law in the same scenes"
    )
    parser.add_argument("--losers", type=int, default=1, help="losers per group (default: 1)")
    parser.add_argument("--draws", type=int, default=8, help="pairs of time and noise per group (default: 8)")
    options = parser.parse_args(arguments)
    if options.losers < 1 or options.draws < 1:
        parser.error("--losers and --draws are at least 1")
    if not options.samples and not options.counterfactuals:
        parser.error("name --samples, or --counterfactuals, as losers")
    config = GroupsConfig(
        losers=options.losers, samples=tuple(options.samples), counterfactuals=options.counterfactuals
    )
    try:
        print(compare(options.runs, options.clips, options.split, config, options.draws))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
