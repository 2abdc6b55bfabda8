"""The two questions that a model which sees and reads is asked about a video, and what its answers are worth.

They are those of VideoCon-Physics (VideoPhy, arXiv 2406.03520): a score is

    P("Yes") / (P("Yes") + P("No"))

with the probabilities of the first word of the answer. Scores of different models are not comparable in absolute terms.
The video is shown as pictures, evenly spread over it from the first to the last.

Shape letters: F frames, H W pixels, C channels.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.data import views
from posttrain.data.groups import Scores

Ask = Callable[[np.ndarray, str], float]  # (pictures uint8 (F, H, W, 3), question) -> the answer's worth, in [0, 1]
Judge = Callable[[Path, str], Scores]  # (video, caption) -> its scores
ANSWERS = ("Yes", "No")


def questions(caption: str) -> tuple[str, str]:
    """What is asked for semantic adherence (sa) and for physical commonsense (pc)."""
    return f'Does this video entail the description: "{caption}"?', "Does this video follow the physical laws?"


def ratio(yes: float, no: float) -> float:
    """The worth of an answer, from what is proportional to the probabilities of "Yes" and "No"; not both may be 0."""
    return yes / (yes + no)


def spread(there: int, wanted: int) -> np.ndarray:
    """The places of `wanted` pictures, evenly spread over `there` from first to last; all if there are fewer."""
    return np.linspace(0, there - 1, min(there, wanted)).round().astype(int)


def pictures(path: Path, wanted: int) -> np.ndarray:
    """`wanted` evenly spread pictures of a video, uint8 (F, H, W, 3).

    Raises:
        UserError: it is torn or no video.
    """
    facts = codec.inspect(path)
    places = spread(len(facts.times), wanted).tolist()
    frames = tuple(places if facts.marks is None else (facts.marks[place] for place in places))
    return views.read(path, views.View(frames, facts.marks is not None, (0, 0, *facts.size), facts.size))


def asking(ask: Ask, frames: int) -> Judge:
    """A judge that shows so many pictures of a video and asks the two questions."""

    def judge(path: Path, caption: str) -> Scores:
        shown = pictures(path, frames)
        sa, pc = (ask(shown, question) for question in questions(caption))
        return Scores(sa, pc)

    return judge


def no_answer(model: str, question: str) -> UserError:
    """For a model whose answer begins with neither word."""
    return UserError(f'{model}: begins its answer to "{question}" with neither Yes nor No; choose a model that does')
