"""core/parallel.py: two pieces of work at once give what one after the other gives."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from posttrain.core.errors import UserError
from posttrain.core.parallel import in_order
from posttrain.evaluation import sample
from posttrain.models.base import ModelConfig
from posttrain.models.wan.loading import load

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_two_at_once() -> None:
    both = threading.Barrier(2)  # passed only if two pieces are at work together
    seen: list[int] = []

    def work(item: int) -> int:
        both.wait(timeout=20)
        seen.append(torch.get_num_threads())
        return item * item

    assert list(in_order(work, range(4), CPU)) == [0, 1, 4, 9]
    assert seen == [1] * 4
    assert torch.get_num_threads() == 2


def test_an_error_ends_it_and_the_threads_are_given_back() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise UserError("clip 1: is damaged", "damaged")
        return item

    results = in_order(work, range(50), CPU)
    assert next(results) == 0
    with pytest.raises(UserError) as error:
        list(results)
    assert error.value.code == "damaged"
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_two_batches_at_once_give_the_same_videos_and_latents() -> None:
    """Samplers, attention and the VAE keep nothing that another thread could change."""
    model = load(ModelConfig(family="wan", path="pocket"))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    texts = sample.encode_texts(model, ["a red ball falls"])

    def work(first: int) -> tuple[np.ndarray, torch.Tensor]:
        some = pictures[first : first + 2]
        made = sample.sample_clips(model, some, ["a red ball falls"] * 2, [first, first + 1], 9, 2, texts=texts)
        with torch.no_grad():
            return made, model.encode(torch.from_numpy(made).permute(0, 4, 1, 2, 3) / 127.5 - 1)

    together = list(in_order(work, range(0, 8, 2), CPU))
    torch.set_num_threads(1)
    for (videos, latents), (videos_alone, latents_alone) in zip(together, map(work, range(0, 8, 2)), strict=True):
        assert np.array_equal(videos, videos_alone)
        assert torch.equal(latents, latents_alone)
