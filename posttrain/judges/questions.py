"""The two questions for a vision-language model about a video, and the scores from its answers.

They are those of VideoCon-Physics (VideoPhy, arXiv 2406.03520). A score is

    P(Yes) / (P(Yes) + P(No))

where P(Yes) is the probability that the answer begins with a token for yes, in any spelling: "Yes", " yes", "YES",
"Yes,", or with the marks of a tokenizer, "\u0120Yes" and "\u2581Yes". P(No) is alike. Where their sum, the
score's `mass`, is below MASS, answers begin otherwise ("<think>", "The video"), and the ratio means nothing: no score.

Scores of different models are not comparable in absolute terms. The video is shown as pictures, evenly spread over it
from the first to the last.

Shape letters: F frames, H W pixels, C channels.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.core import codec
from posttrain.core.errors import UserError, printable
from posttrain.data import views
from posttrain.data.groups import Scores

WORDS = ("yes", "no")
MASS = 0.1  # of P(Yes) + P(No)


class Answer(NamedTuple):
    """The score of an answer, in [0, 1], and the probability `mass` that it begins with yes or no."""

    worth: float
    mass: float


class Judgement(NamedTuple):
    """A model's scores of a video; `mass` is the smaller one of its two answers."""

    sa: float
    pc: float
    mass: float


Ask = Callable[[np.ndarray, str], Answer]  # (pictures uint8 (F, H, W, 3), question) -> the answer
Judge = Callable[[Path, str], Scores | Judgement]  # (video, caption) -> its scores


def questions(caption: str) -> tuple[str, str]:
    """The questions for semantic adherence (sa) and for physical commonsense (pc)."""
    return f'Does this video entail the description: "{caption}"?', "Does this video follow the physical laws?"


def word(token: str) -> str:
    """The word of WORDS that a token stands for, ignoring case, spaces, punctuation and marks; "" for others."""
    letters = re.sub(r"^[\W_\u0120\u010a]+|[\W_]+$", "", token).casefold()
    return letters if letters in WORDS else ""


def weigh(yes: float, no: float, model: str, question: str) -> Answer:
    """The score (equation above) from P(Yes) and P(No).

    Raises:
        UserError: answer: their sum, the mass, is too small.
    """
    mass = yes + no
    if not mass >= MASS:  # nan as well
        begins = f'{model}: begins its answer to "{printable(question, 60)}" with yes or no in {mass:.1%} of cases'
        remedy = "choose a model that answers with one word, without reasoning text first"
        raise UserError(f"{begins}; {remedy}", "answer", "--model")
    return Answer(yes / mass, mass)


def spread(times_F: np.ndarray, wanted: int) -> np.ndarray:
    """Indices of `wanted` frames, evenly spaced in time from first to last; fewer for short videos."""
    moments = np.linspace(times_F[0], times_F[-1], min(len(times_F), wanted))
    return np.unique(views.nearest(times_F, moments))


def pictures(path: Path, wanted: int) -> np.ndarray:
    """`wanted` evenly spread pictures of a video, uint8 (F, H, W, 3).

    Raises:
        UserError: it is damaged or not a video.
    """
    facts = codec.inspect(path)
    places = spread(facts.times, wanted).tolist()
    frames = tuple(places if facts.marks is None else (facts.marks[place] for place in places))
    return views.read(path, views.View(frames, facts.marks is not None, (0, 0, *facts.size), facts.size))


def asking(ask: Ask, frames: int) -> Judge:
    """A judge that sends a number of frames of a video to a model and asks the two questions."""

    def judge(path: Path, caption: str) -> Judgement:
        shown = pictures(path, frames)
        sa, pc = (ask(shown, question) for question in questions(caption))
        return Judgement(sa.worth, pc.worth, min(sa.mass, pc.mass))

    return judge
