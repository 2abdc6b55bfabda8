"""Judges by what the simulator knows: how wrong a counterfactual was made, or how far a sample is from the true clip.

Both mean the same, a deviation as a share of that of the clip in which nothing moves:

    a counterfactual (sim/worlds/counterfactual.py)   pc = 1 - severity                          sa = 1
    a sample of a true clip's first frame    pc = 1 - min(1, L2 / L2_frozen)            sa = 1 - vanished

with PISA's L2 (metrics/pisa.py, equation 6; where the object vanished it is 1) of the sample's masks and of the true
clip's first mask held, and `vanished` the share of frames in which the object that the caption names is not found,
among them those that a sample lacks of the true clip. The truth has pc = 1, a frozen picture or worse pc = 0; where
nothing moves in the true clip, any deviation does. A counterfactual's caption names what falls, and that is there until
it is not: sa = 1.

Shape letters: F frames, H W pixels.
"""

from pathlib import Path

import numpy as np
import torch

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.data import views
from posttrain.data.dataset import Clips, to_float
from posttrain.data.groups import Scores, check_first_picture, names, sample_of
from posttrain.judges.questions import Judge
from posttrain.metrics import pisa
from posttrain.metrics.masks import Track, segment


def of_severity(severity: float) -> Scores:
    """The scores of a counterfactual; the truth has severity 0."""
    return Scores(sa=1.0, pc=1.0 - severity)


def of_metrics(l2: float, l2_frozen: float, vanished: float) -> Scores:
    """The scores of a sample; l2 and l2_frozen in one unit, vanished in [0, 1]."""
    wrong = min(1.0, l2 / l2_frozen) if l2_frozen else float(l2 > 0)
    return Scores(sa=1.0 - vanished, pc=1.0 - wrong)


def counterfactuals(clips: Clips) -> Judge:
    """Judges the clips of a dataset folder, true ones and counterfactuals, by the severity in their rows."""
    rows = {clips.video(index): clips.row(index) for index in range(len(clips))}

    def judge(path: Path, caption: str) -> Scores:
        violation = rows[path].violation
        return of_severity(violation.severity if violation else 0.0)

    return judge


def samples(clips: Clips, track: Track, device: torch.device) -> Judge:
    """Judges samples, named as data/groups.py says, by the true clips that they continue.

    Args:
        clips: the true ones, with masks.
        track: follows the object in the samples, from its true mask in frame 0; on `device`.

    Raises:
        UserError: the clips have no masks, or two have one name. When asked: a sample is damaged, continues none of them
            or another one's first frame, or its true clip shows no object at first.
    """
    if not clips.annotated:
        where = clips.splits[0].folder
        message = f"{where}: has no masks, which the simulator judges by; take clips that `sim make` filmed"
        raise UserError(message, "unsupported", "--clips")
    places = names(clips)

    def judge(path: Path, caption: str) -> Scores:
        sample = sample_of(path.stem, places)
        if sample is None:
            raise UserError(f"{path}: continues no true clip of {clips.splits[0].folder}; remove it", "mismatch")
        index = places[sample[0]]
        true_FHWC, instances_FHW = clips.read(index)
        assert instances_FHW is not None
        target = clips.row(index).target
        assert target is not None
        true_FHW = instances_FHW == target + 1
        if not true_FHW[0].any():
            message = f"{clips.video(index)}: shows no object to follow in its first frame; leave it out"
            raise UserError(message, "mismatch")
        facts, size = codec.inspect(path), true_FHW.shape[1:]
        frames = facts.marks or tuple(range(len(facts.times)))
        shape = (int(size[0]), int(size[1]))
        view = views.View(frames, facts.marks is not None, views.centred(facts.size, shape), shape)
        video_FHWC = views.read(path, view)
        check_first_picture(path, video_FHWC[0], true_FHWC[0], str(clips.video(index)), true_FHW[0])
        video_BCFHW = to_float(video_FHWC)[None].to(device)
        mask0_BHW = torch.from_numpy(true_FHW[:1]).to(device)
        masks_FHW = segment(track, video_BCFHW, mask0_BHW)[0].cpu().numpy()
        fps = clips.splits[0].fps
        found = pisa.score(masks_FHW, true_FHW, facts.times, fps)
        whole_F = np.append(facts.times, pisa.missing_times(facts.times, len(true_FHW), fps))
        frozen = pisa.score(np.repeat(true_FHW[:1], len(whole_F), 0), true_FHW, whole_F, fps)
        return of_metrics(found["l2"], frozen["l2"], found["vanished"])

    return judge
