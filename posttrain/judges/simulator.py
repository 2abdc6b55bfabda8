"""The judge `simulator`: the known severity of a counterfactual, or the distance of a sample from the true clip.

Both are deviations, relative to that of the clip in which nothing moves:

    a counterfactual (sim/worlds/counterfactual.py)   pc = 1 - severity                          sa = 1
    a sample that continues a true clip               pc = 1 - min(1, L2 / L2_frozen)            sa = 1 - vanished

L2 is PISA's (metrics/pisa.py, equation 6; 1 in frames where the object has vanished) for the sample's masks, L2_frozen
the same for the true clip's first mask repeated. `vanished` is the share of frames in which the object of the caption
is missing, including frames by which a sample is too short. The truth has pc = 1 up to the tracker's error, a static
video or worse pc = 0; if nothing moves in the true clip, any deviation gives 0. A counterfactual always has sa = 1,
since its caption names the object that falls.

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
    """A judge of the clips of a dataset folder, true ones and counterfactuals, by the severity in their rows."""
    rows = {clips.video(index): clips.row(index) for index in range(len(clips))}

    def judge(path: Path, caption: str) -> Scores:
        violation = rows[path].violation
        return of_severity(violation.severity if violation else 0.0)

    return judge


def samples(clips: Clips, track: Track, device: torch.device) -> Judge:
    """A judge of samples (file names as in data/groups.py) by the true clips that they continue.

    Args:
        clips: the true ones, with masks.
        track: follows the object in the samples, from its true mask in frame 0; on `device`.

    Raises:
        UserError: the clips have no masks, or two have the same name. When called: a sample is damaged, continues none
            of the clips, has another first frame, or its true clip shows no object in frame 0.
    """
    if not clips.annotated:
        where = clips.splits[0].folder
        message = f"{where}: has no masks, which the judge `simulator` needs; use clips that `sim make` filmed"
        raise UserError(message, "unsupported", "--clips")
    places = names(clips)

    def judge(path: Path, caption: str) -> Scores:
        sample = sample_of(path.stem, places)
        if sample is None:
            raise UserError(f"{path}: is not named after a clip of {clips.splits[0].folder}; remove it", "mismatch")
        index = places[sample[0]]
        true_FHWC, instances_FHW = clips.read(index)
        assert instances_FHW is not None
        target = clips.row(index).target
        assert target is not None
        true_FHW = instances_FHW == target + 1
        if not true_FHW[0].any():
            message = f"{clips.video(index)}: does not show the object in its first frame; leave it out"
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
