"""What trained models prefer, beside the model that each started from: groups that were held out, as a Markdown table.

    python -m posttrain.studies.preferences runs/pocket-gdpo runs/pocket-psft \
        --clips data/pocket-drop --samples runs/pocket-gdpo/samples/base/test_unseen

With err the velocity error of methods/gdpo.py, of a run's model and of its base, the same times and noise for all:

    accuracy   the share of (loser, time) with err_w - err_w_base < err_l - err_l_base
    margin     (err_l - err_l_base) - (err_w - err_w_base)
    winner     err_w - err_w_base; below 0 where the model knows true clips better than its base does
    losers     err_l - err_l_base

each a mean over a clip's losers and times, then over clips, with a 95% bootstrap interval. A run may be of any method:
one that learnt true clips alone has a preference too. Where a run's recipe says frames, fps and size, the clips are
retimed and cropped to them as its own were, and may be any videos.
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


def group_errors(model: VideoModel, groups: Groups, draws: int, what: str) -> Tensor:
    """Errors (groups, draws, 1 + m), winners first, at `draws` times of each group; float32."""
    found = []
    for index in track(range(len(groups)), what, len(groups)):
        batch = groups.load([index] * draws).to(model.device)
        assert batch.z0_BCFHW is not None
        assert batch.losers_BMCFHW is not None
        assert batch.text_BLD is not None
        times = Random(0, index, range(draws))
        placed = gdpo.place(model, batch.z0_BCFHW, batch.losers_BMCFHW, times, gdpo.Config())
        ones = torch.ones(batch.losers_BMCFHW.shape[:2])
        drawn = gdpo.Draw(*placed, batch.text_BLD, batch.condition, ones, ones, ())
        with torch.no_grad():
            found.append(gdpo.errors(model, drawn, gdpo.Config()).float().cpu())
    return torch.stack(found)


def measured(
    opened: AbstractContextManager[VideoModel],
    clips: Clips,
    config: GroupsConfig,
    pictured: bool,
    draws: int,
    what: str,
) -> tuple[list[str], Tensor]:
    """Of which clip each group is, and `group_errors` of a model that is opened for it."""
    with opened as model:
        groups = Groups(model, clips, config, CACHE / "latents", pictured)
        names = [name.rpartition("/")[0] for name in groups.ids]  # several groups may be of one clip
        return names, group_errors(model, groups, draws, what)


def row(name: str, clips: Sequence[str], tuned_GKN: Tensor, base_GKN: Tensor) -> list[str]:
    """One line of the table; `clips` says of which true clip each group is."""
    gain_GKN = tuned_GKN - base_GKN
    margin_GKM = gain_GKN[..., 1:] - gain_GKN[..., :1]
    cells = []
    for values in ((margin_GKM > 0).float(), margin_GKM, gain_GKN[..., :1], gain_GKN[..., 1:]):
        of_groups = values.mean((1, 2))
        places = [[i for i, other in enumerate(clips) if other == clip] for clip in dict.fromkeys(clips)]
        told = interval([of_groups[some].mean().item() for some in places])
        cells.append(f"{told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}]")
    return [name, str(len(set(clips))), *cells]


def held_out(data: DataConfig, clips: str, split: str) -> DataConfig:
    """Other clips, all of them, seen as a recipe has its own seen."""
    return data.model_copy(update={"clips": clips, "split": split, "limit": None, "make": None, "groups": None})


def compare(runs: Sequence[str], clips: str, split: str, config: GroupsConfig, draws: int) -> str:
    """The table.

    Args:
        clips, split: of clips that were held out.

    Raises:
        UserError: a run is not trained, or as Groups.
    """
    lines, bases = [], dict[str, Tensor]()  # runs mostly share a base
    for target in runs:
        plan, folder = open_run(target)
        need_training(folder)
        data = held_out(plan.data, clips, split)
        how = (
            Clips(data, preload=False, violated=config.counterfactuals),
            config,
            plan.model.conditioning == "image",
            draws,
        )
        base = resolved(plan.model).model_dump_json(exclude={"adapter", "seed", "init", "other_adapter"})
        base += data.model_dump_json()
        if base not in bases:
            _, bases[base] = measured(base_model(plan), *how, f"{target}, base")
        names, tuned_GKN = measured(tuned_model(plan, folder), *how, f"{target}, {plan.method.name}")
        lines.append(row(target, names, tuned_GKN, bases[base]))
    return markdown(HEADINGS, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    clips = "a dataset, or videos with captions, of which nothing was trained on"
    parser.add_argument("--clips", required=True, metavar="FOLDER", help=clips)
    parser.add_argument("--split", default="test_unseen", help="of it (test_unseen)")
    parser.add_argument("--samples", nargs="+", default=[], metavar="FOLDER", help="losers: samples of these clips")
    parser.add_argument("--counterfactuals", action="store_true", help="losers: what breaks a law in these scenes")
    parser.add_argument("--losers", type=int, default=1, help="of each group (1)")
    parser.add_argument("--draws", type=int, default=8, help="times and noises of each group (8)")
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
