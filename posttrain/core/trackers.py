"""Show a run's curves and validation videos in TensorBoard, W&B or trackio, through accelerate.

tensorboard   runs/<run>/tensorboard/; `tensorboard --logdir runs`. Videos are GIFs under Images.
wandb         project "posttrain", a run of the same name; wandb's own settings hold (WANDB_MODE=offline, ...)
trackio       as wandb, but stored on this machine; `trackio show`
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from posttrain.core.codec import gif
from posttrain.core.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "posttrain"


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError if one of the trackers is not installed."""
    for name in names:
        if find_spec(name) is None:
            message = f"train.trackers: {name} is not installed; `pip install {name}`, or leave it out"
            raise UserError(message, "not_installed", "train.trackers")


@contextmanager
def tracking(accelerator: Any, folder: Path, steps: int, config: Mapping[str, Any]) -> Iterator[None]:
    """Context in which `accelerator.log` writes to the trackers. Only the first process does anything.

    Args:
        folder: of the run; its name is the run's name in the trackers.
        steps: steps done so far; TensorBoard drops values that a killed run logged for later steps.
        config: the run's settings, which the trackers show.

    Raises:
        UserError: a tracker did not start.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        yield
        return
    named = {"name": folder.name, "config": dict(config)}
    options = {
        "tensorboard": {"purge_step": steps + 1},
        "wandb": named | {"dir": str(folder), "resume": "auto"},  # auto: wandb finds the run's id in `dir`
        "trackio": named | {"resume": "allow"},
    }
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=options)
    except Exception as error:  # each tracker raises its own types
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        names = ", ".join(map(str, accelerator.log_with))
        message = f"train.trackers: {names} did not start ({why}); fix it or leave it out"
        raise UserError(message, "not_installed", "train.trackers") from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # accelerate's end_training would also disconnect the processes
            tracker.finish()


def log_videos(accelerator: Any, videos: Mapping[str, Path], step: int) -> None:
    """Show the video files, by name, in every tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for name, path in videos.items():
                tracker.writer._get_file_writer().add_summary(_summary(name, path), step)
            tracker.writer.flush()
        else:
            library = import_module(tracker.name)  # both have a class Video
            tracker.log({name: library.Video(str(path), format="mp4") for name, path in videos.items()}, step=step)


def _summary(name: str, path: Path) -> Any:
    """A video for TensorBoard: an image in GIF format. TensorBoard's own add_video does the same with MoviePy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    content, (height, width) = gif(path)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=name, image=image)])
