"""PhyGDPO's loss: by hand and by brute force, and the laws of its bound."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.methods import gdpo
from posttrain.methods.gdpo import Config, Physics, gdpo_loss, physics_weights

ONE = torch.ones(1, 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_errors(seed: int, batch: int = 5, m: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Errors of winners, their reference, of losers and theirs."""
    generator = seeded(seed)
    shapes = [(batch,), (batch,), (batch, m), (batch, m)]
    return [torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes]


def random_weights(seed: int, batch: int = 5, m: int = 3) -> tuple[Tensor, Tensor]:
    return physics_weights(*torch.rand(2, batch, m, generator=seeded(seed), dtype=torch.float64))


# ---------------------------------------------------------------- physics rewarding


def test_weights_by_hand() -> None:
    """v = 1/2: alpha = .5 + .5 / 2, and v = .4 with the gamma's sigmoid at its middle: 2 (1 + .6 / 2)."""
    alpha, _ = physics_weights(torch.tensor(0.3), torch.tensor(0.7))
    assert alpha.item() == pytest.approx(0.75)
    _, gamma = physics_weights(torch.tensor(1.0), torch.tensor(0.2))
    assert gamma.item() == pytest.approx(2.6)
    constants = Physics(alpha_min=0.25, k_alpha=math.log(3), b_alpha=0.0, k_gamma=-math.log(4), b_gamma=0.0, strength=1)
    alpha, gamma = physics_weights(torch.tensor(0.0), torch.tensor(0.0), constants)
    assert alpha.item() == pytest.approx(0.25 + 0.75 * 0.75)
    assert gamma.item() == pytest.approx((1 + 1 / 5) * 4)


def test_weights_have_the_shape_and_the_ranges_of_the_paper() -> None:
    sa, pc = torch.meshgrid(torch.linspace(0, 1, 11), torch.linspace(0, 1, 11), indexing="ij")
    alpha, gamma = physics_weights(sa, pc)
    assert alpha.shape == gamma.shape == (11, 11)
    assert (alpha.min().item(), alpha.max().item()) == pytest.approx((0.538, 0.962), abs=5e-4)
    assert (gamma.min().item(), gamma.max().item()) == pytest.approx((2.37, 2.92), abs=5e-3)
    assert (gamma * alpha >= 1).all()
    order = (sa + pc).flatten().argsort()
    assert (alpha.flatten()[order].diff() <= 1e-6).all()  # what is worse counts more
    assert (gamma.flatten()[order].diff() <= 1e-6).all()


# ---------------------------------------------------------------- the loss


def test_pair_by_hand() -> None:
    """x = 2 [(0.5 - 0.25) - (0.75 - 0.25)] = -1/2; the loss is 3 log(1 + exp(0.5 * -1/2))."""
    errors = (torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([[0.75]]), torch.tensor([[0.25]]))
    for mode in ("pair", "sum"):
        loss, metrics = gdpo_loss(*errors, 0.5 * ONE, 3 * ONE, 2.0, mode)
        assert loss.item() == pytest.approx(3 * math.log(1 + math.exp(-0.25)))
        assert metrics["margin"].item() == pytest.approx(0.25)
        assert metrics["accuracy"] == 1
    assert [metrics[f"err_{name}"].item() for name in ("w", "w_ref", "l", "l_ref")] == [0.5, 0.25, 0.75, 0.25]
    loss, _ = gdpo_loss(*errors, 0.5 * ONE, 3 * ONE, 2.0, "exact")
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_two_losers_and_two_groups_by_hand() -> None:
    """Group 0: x = 1 and -1. Group 1: x = 0 and 2, for all that counts is the change."""
    w, w_ref = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    l_ref = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    lose = l_ref + torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    alpha, gamma = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    expected = (softplus(1) + 2 * softplus(-0.5) + 3 * softplus(0) + 4 * softplus(2)) / 2
    loss, metrics = gdpo_loss(w, w_ref, lose, l_ref, alpha, gamma, 1.0, "sum")
    assert loss.item() == pytest.approx(expected)
    assert metrics["accuracy"].item() == 0.25
    assert metrics["margin"].item() == pytest.approx(-0.5)
    loss, _ = gdpo_loss(w, w_ref, lose, l_ref, alpha, gamma, 1.0, "exact")
    exact = (math.log(1 + math.e + math.exp(-1)) + math.log(2 + math.exp(2))) / 2
    assert loss.item() == pytest.approx(exact)


def test_losers_that_count_less_by_hand() -> None:
    """The winner's error grew by 1/4 and the loser's by 1/2: x = 2 (1/4 - 1/4 * 1/2) = 1/4."""
    errors = (torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([[0.75]]), torch.tensor([[0.25]]))
    loss, metrics = gdpo_loss(*errors, ONE, ONE, 2.0, "sum", loser_weight=0.25)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.25)))
    assert metrics["margin"].item() == pytest.approx(0.25)  # the margin does not depend on loser_weight


@pytest.mark.parametrize("loser_weight", [0.25, 0.75])
def test_whether_it_pays_that_both_errors_grow(loser_weight: float) -> None:
    """When they grow by 1 and by r > 1 the loss falls where loser_weight r > 1, and always without a weight."""
    zero, r = torch.zeros(1), 2.0
    grown = torch.ones(1), zero, torch.full((1, 1), r), zero[:, None]
    before = gdpo_loss(zero, zero, zero[:, None], zero[:, None], ONE, ONE, 1.0, "sum", loser_weight=loser_weight)[0]
    after = gdpo_loss(*grown, ONE, ONE, 1.0, "sum", loser_weight=loser_weight)[0]
    assert (after < before) == (loser_weight * r > 1)


def test_the_methods_own_losers_count_as_the_recipe_says() -> None:
    """As by hand above, from the errors of all members."""
    zero = torch.zeros(1)
    drawn = gdpo.Draw(zero, zero, zero, zero, {}, ONE, ONE, ())
    config = Config(mode="sum", beta_T=2.0, loser_weight=0.25)
    loss, _ = gdpo.compare(torch.tensor([[0.5, 0.75]]), torch.tensor([[0.25, 0.25]]), drawn, config)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.25)))


@pytest.mark.parametrize("m", [1, 3])
def test_at_the_start(m: int) -> None:
    w, _, lose, _ = random_errors(0, m=m)
    alpha, gamma = random_weights(1, m=m)
    assert gdpo_loss(w, w, lose, lose, alpha, gamma, 1e3, "exact")[0].item() == pytest.approx(math.log(1 + m))
    summed = gdpo_loss(w, w, lose, lose, alpha, gamma, 1e3, "sum")[0].item()
    assert summed == pytest.approx(gamma.sum(1).mean().item() * math.log(2))
    same = gamma[:, :1].expand_as(gamma)
    pair = gdpo_loss(w, w, lose, lose, alpha, same, 1e3, "pair", seeded(0))[0].item()
    assert pair == pytest.approx(m * gamma[:, 0].mean().item() * math.log(2))


@pytest.mark.slow
def test_the_sum_is_at_least_the_exact_loss() -> None:
    """Inequality 7, group by group, also with the smallest gamma that is allowed and with alpha = gamma = 1."""
    for seed in range(200):
        m = 1 + seed % 5
        errors, (alpha, gamma) = random_errors(seed, m=m), random_weights(seed, m=m)
        beta_T = 10.0 ** (seed % 4)
        for weights in ((alpha, gamma), (alpha, 1 / alpha), (torch.ones_like(alpha),) * 2):
            for b in range(5):
                one = [part[b : b + 1] for part in (*errors, *weights)]
                exact, upper = (gdpo_loss(*one, beta_T, mode)[0] for mode in ("exact", "sum"))
                assert exact <= upper * (1 + 1e-12) + 1e-15


def test_with_gamma_too_small_the_bound_fails() -> None:
    """x = 0, alpha = 1/2, gamma = 1, m = 1 is equal; at x = 1: log(1 + e) > log(1 + sqrt e)."""
    errors = (torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([[0.0]]), torch.tensor([[0.0]]))
    exact, summed = (gdpo_loss(*errors, 0.5 * ONE, ONE, 1.0, mode)[0] for mode in ("exact", "sum"))
    assert exact > summed


@pytest.mark.slow
def test_the_mean_of_pair_is_the_sum() -> None:
    """Over 4,000 draws, within four standard errors; and each draw is one of the terms."""
    errors, weights = random_errors(2, batch=1), random_weights(3, batch=1)
    summed = gdpo_loss(*errors, *weights, 3.0, "sum")[0].item()
    generator = seeded(4)
    draws = np.array([gdpo_loss(*errors, *weights, 3.0, "pair", generator)[0].item() for _ in range(4000)])
    assert abs(draws.mean() - summed) < 4 * draws.std() / len(draws) ** 0.5
    terms = [
        gdpo_loss(*errors[:2], *(t[:, j : j + 1] for t in (*errors[2:], *weights)), 3.0, "sum")[0] for j in range(3)
    ]
    assert sorted(set(draws.round(9))) == sorted((3 * np.array([t.item() for t in terms])).round(9))


@pytest.mark.parametrize("mode", ["sum", "exact", "pair"])
def test_gradients_in_float64(mode: gdpo.Mode) -> None:
    errors = [part.requires_grad_() for part in random_errors(5)]
    weights = random_weights(6)

    def loss(w: Tensor, lose: Tensor) -> Tensor:
        return gdpo_loss(w, errors[1].detach(), lose, errors[3].detach(), *weights, 4.0, mode, seeded(0))[0]

    assert torch.autograd.gradcheck(loss, (errors[0], errors[2]))


@pytest.mark.parametrize("mode", ["sum", "exact"])
def test_brute_force(mode: gdpo.Mode) -> None:
    """Loops of Python's own floats."""
    errors, (alpha, gamma) = random_errors(7), random_weights(8)
    w, w_ref, lose, l_ref = (part.tolist() for part in errors)
    total = 0.0
    for b in range(5):
        x = [6.0 * ((w[b] - w_ref[b]) - (lose[b][j] - l_ref[b][j])) for j in range(3)]
        if mode == "exact":
            total += math.log(1 + sum(map(math.exp, x)))
        else:
            total -= sum(gamma[b, j].item() * math.log(1 / (1 + math.exp(alpha[b, j].item() * x[j]))) for j in range(3))
    assert gdpo_loss(*errors, alpha, gamma, 6.0, mode)[0].item() == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize("mode", ["sum", "exact", "pair"])
def test_half_precision_and_large_margins(mode: gdpo.Mode) -> None:
    """The arithmetic is float32 whatever comes in, and no margin makes it infinite or without a gradient."""
    halves = [part.bfloat16() for part in random_errors(9)]
    alpha, gamma = (part.float() for part in random_weights(10))
    loss, metrics = gdpo_loss(*halves, alpha, gamma, 1000.0, mode, seeded(0))
    exact, _ = gdpo_loss(*(part.double() for part in halves), alpha.double(), gamma.double(), 1000.0, mode, seeded(0))
    assert loss.dtype == metrics["margin"].dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for sign in (1.0, -1.0):
        w, zero = torch.full((1,), 1e4 * sign, requires_grad=True), torch.zeros(1)
        loss, _ = gdpo_loss(w, zero, zero[None], zero[None], ONE, ONE, 1000.0, mode)
        (slope,) = torch.autograd.grad(loss, w)
        assert loss.isfinite()
        assert slope.item() == pytest.approx(1000.0 if sign > 0 else 0.0)


def test_the_bell_is_the_released_codes_weight() -> None:
    """Of the thousand times that are trained there, in its words; by hand 2.076 at 1/2."""
    t = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    t = 5 * t / (1 + 4 * t)
    y = torch.exp(-2 * ((1000 * t - 500) / 1000) ** 2)
    raised = y - y.min()
    assert (gdpo.bell(t) - raised * (1000 / raised.sum())).abs().max() < 1e-9
    assert gdpo.bell(t).mean().item() == pytest.approx(1, abs=1e-9)
    assert gdpo.bell(torch.tensor(0.5)).item() == pytest.approx(2.076, abs=1e-3)
    assert gdpo.bell(torch.tensor([0.0, 1.0])).abs().max() < 1e-6
