"""PhyGDPO: groupwise preference optimisation of a true clip w (winner) over m rejected clips l_j (losers).

Paper: PhyGDPO (Cai et al. 2025). With err = mean |v(z_t, t, text) - (eps - z_0)|^2 of a clip of a group, err_ref that
of the reference, and x_j = beta T [(err_w - err_ref_w) - (err_l - err_ref_l)_j], one time t for the whole group:

    exact   log(1 + sum_j exp(x_j))                                           eq. 6
    sum     sum_j gamma_j log(1 + exp(alpha_j x_j))                           eq. 8, first line; at least eq. 6
    pair    -m gamma_j log sigma(-alpha_j x_j), j drawn from 1 ... m          eq. 13; its mean over j is `sum`

    v_j = 1 - (sa_j + pc_j) / 2                                               eq. 9, physics rewarding
    alpha_j = alpha_min + (1 - alpha_min) sigma(k_alpha (v_j - b_alpha))
    gamma_j = (1 + lambda sigma(k_gamma (v_j - b_gamma))) / alpha_min         gamma_j >= 1 / alpha_j, for the bound

Without physics rewarding alpha = gamma = 1. The reference is the model with its adapter switched off (LoRA-SR), which
costs no memory, or a frozen copy of it as it was at the start.

Departures from the paper: err is a mean over elements, while the paper has a sum; the number of elements is part of
beta T (not stated there; 1000 in the released code). That code leaves out the factor m, divides gamma by alpha_j, uses
other constants in eq. 9, weights err by time (`weighting: bell`) and draws noise for each clip (`noise: independent`).
The first latent frame is the condition and has no loss, as in psft.py; losers get the winner's first latent frame.
With `loser_weight` lambda_l < 1 losers count less, x_j = beta T [(err_w - err_ref_w) - lambda_l (err_l - err_ref_l)_j],
as in DPO-Shift (arXiv 2502.07599). Without it, the loss also falls if both errors grow and the loser's grows more,
which happens with large beta T (docs/log). The inequalities above hold for any x.
Flow-DPO (beta T 50, because its loss multiplies 100 by 1/2) and VideoDPO (2500, independent noise) are `pair` with one
loser and without physics rewarding.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.recipe import Strict
from posttrain.data.groups import Groups
from posttrain.flow import TimeDistribution, frame_times, interpolate, sample_time, shift_time, target
from posttrain.methods.base import Dry, Source
from posttrain.models import lora
from posttrain.models.base import VideoModel
from posttrain.training.run import Run
from posttrain.types import Batch, Random

GROUPS = True
Mode = Literal["pair", "sum", "exact"]


class Physics(Strict):
    """The constants of eq. 9; defaults as in the paper."""

    alpha_min: Annotated[float, Field(gt=0, le=1)] = 0.5
    k_alpha: float = 5.0
    b_alpha: float = 0.5
    k_gamma: float = 2.0
    b_gamma: float = 0.4
    strength: Annotated[float, Field(ge=0)] = 0.6  # lambda


class Config(Strict):
    mode: Mode = "pair"
    beta_T: PositiveFloat = 1000.0
    loser_weight: Annotated[float, Field(gt=0, le=1)] = 1.0  # lambda_l: of the losers' errors beside the winner's
    physics: Physics | None = Physics()  # None: alpha = gamma = 1
    noise: Literal["shared", "independent"] = "shared"  # between the members of a group
    timesteps: TimeDistribution = "logit_normal"
    shift: PositiveFloat = 3.0
    weighting: Literal["none", "bell"] = "none"  # of errors by their time
    reference: Literal["lora", "full_copy"] = "lora"
    cached_draws: NonNegativeInt = (
        0  # (t, eps) that each group has for good, so that its reference is asked once; 0: new
    )
    backward: Literal["together", "in_turn"] = "together"  # in_turn: memory of one member, one more forward


def data(source: Source, config: Config) -> Groups:
    """The latents of true clips and of losers, with scores if `physics` weights them (then all losers need scores)."""
    assert source.groups is not None
    scored = config.physics is not None
    return Groups(source.model, source.clips, source.groups, source.cache, source.image_conditioned, scored)


def physics_weights(sa: Tensor, pc: Tensor, constants: Physics | None = None) -> tuple[Tensor, Tensor]:
    """alpha and gamma of eq. 9, each of the shape of `sa`.

    Args:
        sa: how well a loser follows its caption, 0 to 1.
        pc: how well it obeys physics, 0 to 1.
    """
    c = constants or Physics()
    v = 1 - (sa + pc) / 2
    alpha = c.alpha_min + (1 - c.alpha_min) * torch.sigmoid(c.k_alpha * (v - c.b_alpha))
    gamma = (1 + c.strength * torch.sigmoid(c.k_gamma * (v - c.b_gamma))) / c.alpha_min
    assert (gamma * alpha >= 1 - 1e-6).all()  # else inequality 7 and with it the bound can fail
    return alpha, gamma


def gdpo_loss(
    err_w: Tensor,
    err_w_ref: Tensor,
    err_l: Tensor,
    err_l_ref: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    beta_T: float,
    mode: Mode,
    generator: torch.Generator | None = None,
    loser_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a mean over groups, and the metrics to log.

    At the start of training err = err_ref, and the loss is m gamma log 2 for `pair`, sum_j gamma_j log 2 for `sum`, and
    log(1 + m) for `exact`.

    Args:
        err_w, err_w_ref: mean squared velocity errors of the winners (B,), of the model and the reference.
        err_l, err_l_ref: those of the losers (B, m).
        alpha, gamma: (B, m); not used in mode "exact".
        generator: draws the loser of "pair".
        loser_weight: lambda_l.

    Metrics:
        accuracy: share of losers whose error grew more than the winner's, or shrank less; 0 at the start.
        margin: how much more, mean over the losers.
    """
    wide = torch.promote_types(err_w.dtype, torch.float32)  # half precision cannot tell the errors apart
    gain_B, gain_BM = err_w.to(wide) - err_w_ref.to(wide), err_l.to(wide) - err_l_ref.to(wide)
    margin_BM = gain_BM - gain_B[:, None]
    x_BM = beta_T * (gain_B[:, None] - loser_weight * gain_BM)
    if mode == "exact":
        loss_B = torch.logsumexp(F.pad(x_BM, (1, 0)), dim=1)  # the 1 is exp(0)
    else:
        terms_BM = -gamma * F.logsigmoid(-alpha * x_BM)
        loss_B = terms_BM.sum(1)
        if mode == "pair":
            batch, m = x_BM.shape
            j_B1 = torch.randint(m, (batch, 1), generator=generator).to(x_BM.device)
            loss_B = m * terms_BM.gather(1, j_B1)[:, 0]
    metrics = {"accuracy": (margin_BM > 0).to(wide).mean(), "margin": margin_BM.mean()}
    metrics |= {"err_w": err_w.mean(), "err_w_ref": err_w_ref.mean()}
    metrics |= {"err_l": err_l.mean(), "err_l_ref": err_l_ref.mean()}
    return loss_B.mean(), {name: value.detach() for name, value in metrics.items()}


Name = tuple[str | int, ...]  # of a group, of its draw of time and noise, of its losers


@dataclass(frozen=True)
class Draw:
    """The clips of a batch of groups that are compared, with times and noise. N = 1 + M members: winner, then losers.

    In mode "pair" M is 1 and gamma includes the factor m, so losers that were not drawn need no computation.
    """

    z0_BNCFHW: Tensor
    eps_BNCFHW: Tensor
    t_B: Tensor
    text_BLD: Tensor
    condition: dict[str, Tensor]
    alpha_BM: Tensor
    gamma_BM: Tensor
    names: tuple[Name, ...]  # of the groups, where their draws are their own


def draw(model: VideoModel, batch: Batch, config: Config, run: Run) -> Draw:
    """Draw losers, times and noise. With `cached_draws`, choose one of the group's fixed (time, noise) draws."""
    z0_BCFHW, losers_BMCFHW, text_BLD = batch.z0_BCFHW, batch.losers_BMCFHW, batch.text_BLD
    assert z0_BCFHW is not None
    assert losers_BMCFHW is not None
    assert text_BLD is not None
    count, m = losers_BMCFHW.shape[:2]
    j_BM = (run.random.uniform(1) * m).long() if config.mode == "pair" else torch.arange(m).expand(count, m)
    source, names = run.random, tuple[Name, ...]()
    if config.cached_draws:
        number = int(run.random.shared() * config.cached_draws)
        indices = [run.data.ids.index(name) for name in batch.ids]
        source = Random(run.train.seed + 1, number, indices)  # another seed than that of the steps' own
        names = tuple((name, number, *j) for name, j in zip(batch.ids, j_BM.tolist(), strict=True))
    j_BM = j_BM.to(z0_BCFHW.device)
    alpha_BM = gamma_BM = torch.ones_like(j_BM, dtype=torch.float32)
    if config.physics:
        if batch.semantic_adherence_BM is None or batch.physical_commonsense_BM is None:
            raise UserError(
                "method.physics: needs scores of all rejected clips; score the samples, or set method.physics=null",
                "required",
                "method.physics",
            )
        alpha_BM, gamma_BM = physics_weights(
            batch.semantic_adherence_BM.gather(1, j_BM), batch.physical_commonsense_BM.gather(1, j_BM), config.physics
        )

    losers_BMCFHW = losers_BMCFHW[torch.arange(count)[:, None], j_BM]
    gamma_BM = gamma_BM * (m if config.mode == "pair" else 1)
    placed = place(model, z0_BCFHW, losers_BMCFHW, source, config)
    return Draw(*placed, text_BLD, batch.condition, alpha_BM, gamma_BM, names)


def place(
    model: VideoModel, z0_BCFHW: Tensor, losers_BMCFHW: Tensor, source: Random, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """All members (B, N, C, F, H, W), with the winner's first latent frame, their noise (same shape), times (B,)."""
    z0_BNCFHW = torch.cat([z0_BCFHW[:, None], losers_BMCFHW], dim=1)
    z0_BNCFHW[:, :, :, : model.n_cond_frames] = z0_BCFHW[:, None, :, : model.n_cond_frames]
    t_B = sample_time(source, config.timesteps, config.shift, *model.times).to(z0_BCFHW.device)
    noises = 1 if config.noise == "shared" else z0_BNCFHW.shape[1]
    eps_BNCFHW = source.normal(noises, *z0_BNCFHW.shape[2:]).to(z0_BCFHW.device).expand_as(z0_BNCFHW)
    return z0_BNCFHW, eps_BNCFHW, t_B


def bell(t: Tensor) -> Tensor:
    """The weight by time of the released code, which is DiffSynth-Studio's: with y(t) = exp(-2 (t - 1/2)^2),

        w(t) = (y(t) - y(1)) / mean_k (y(t_k) - y(1)),   t_k = 5 u / (1 + 4 u),   u = k / 1000,   k = 1 ... 1000.

    The mean is over the times that are trained there (shift 5), so that w(1/2) = 2.076 and w(0) = w(1) = 0.
    """

    def raised(t: Tensor) -> Tensor:
        return (-2 * (t - 0.5) ** 2).exp() - math.exp(-0.5)

    return raised(t) / raised(shift_time(torch.arange(1, 1001, dtype=torch.float64) / 1000, 5.0)).mean().item()


ALL = slice(None)


def errors(model: VideoModel, drawn: Draw, config: Config, groups: slice = ALL, members: slice = ALL) -> Tensor:
    """err_BN: the mean squared velocity error of each clip, without the conditioning frames; float32."""
    z0_BNCFHW, eps_BNCFHW = drawn.z0_BNCFHW[groups, members], drawn.eps_BNCFHW[groups, members]
    count = z0_BNCFHW.shape[1]

    def each(shared_B: Tensor) -> Tensor:
        return shared_B[groups].repeat_interleave(count, dim=0)

    z0_BCFHW, eps_BCFHW, t_B = z0_BNCFHW.flatten(0, 1), eps_BNCFHW.flatten(0, 1), each(drawn.t_B)
    t_BF = frame_times(t_B, frames=z0_BCFHW.shape[2], n_cond_frames=model.n_cond_frames)
    condition = {name: each(value) for name, value in drawn.condition.items()}
    v_BCFHW = model.velocity(interpolate(z0_BCFHW, eps_BCFHW, t_BF), t_BF, each(drawn.text_BLD), condition)
    err_B = (v_BCFHW - target(z0_BCFHW, eps_BCFHW))[:, :, model.n_cond_frames :].square().flatten(1).mean(1)
    return (err_B * bell(t_B) if config.weighting == "bell" else err_B).unflatten(0, (-1, count))


def portions(drawn: Draw, config: Config) -> list[slice]:
    """Slices of members that share a forward pass; equal for policy and reference, so that both round alike."""
    count = drawn.z0_BNCFHW.shape[1]
    return [ALL] if config.backward == "together" else [slice(n, n + 1) for n in range(count)]


def all_errors(model: VideoModel, drawn: Draw, config: Config, groups: slice = ALL) -> Tensor:
    return torch.cat([errors(model, drawn, config, groups, part) for part in portions(drawn, config)], dim=1)


def cached_errors(model: VideoModel, drawn: Draw, config: Config, cache: dict[Name, Tensor]) -> Tensor:
    """As `all_errors`, from `cache`. Missing errors are computed group by group, so they do not depend on the batch."""
    for n, name in enumerate(drawn.names):
        if name not in cache:
            cache[name] = all_errors(model, drawn, config, groups=slice(n, n + 1))[0]
    return torch.stack([cache[name] for name in drawn.names])


def inputs(model: VideoModel, config: Config) -> dict[str, nn.Module | None]:
    """`base`: the frozen copy used as reference; None if the reference is the model without its adapter.

    Raises:
        UserError: the model without its adapter is not what training starts from.
    """
    if config.reference == "full_copy":
        return {"base": copy.deepcopy(model.transformer).requires_grad_(False)}
    if not lora.attached(model.transformer):
        raise UserError(
            "model.adapter: is missing, but the reference is the model without its adapter; set it, or "
            "method.reference=full_copy",
            "required",
            "model.adapter",
        )
    adapter = [p for name, p in model.transformer.named_parameters() if ".lora_B." in name and not p.is_meta]
    if any(p.any() for p in adapter):
        raise UserError(
            "model.start: the reference would be the model without this start; give the adapter as model.merge instead",
            "conflict",
            "model.start",
        )
    return {"base": None}


@contextmanager
def reference(model: VideoModel, base: nn.Module | None, precision: str) -> Iterator[None]:
    """Context in which `model` is the reference: `base`, or its own transformer with the adapter off.

    Calls bypass accelerate's wrapper, so that processes may make different numbers of calls; the precision is therefore
    set here again.
    """
    policy = model.transformer
    model.transformer = lora.unwrap(policy) if base is None else base
    off = lora.disabled(policy) if base is None else nullcontext()
    try:
        with off, torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        model.transformer = policy


def compare(err_BN: Tensor, ref_BN: Tensor, drawn: Draw, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    parts = (err_BN[:, 0], ref_BN[:, 0], err_BN[:, 1:], ref_BN[:, 1:])
    weights = (drawn.alpha_BM, drawn.gamma_BM)
    return gdpo_loss(*parts, *weights, config.beta_T, config.mode, loser_weight=config.loser_weight)


def in_turn(
    run: Run, model: VideoModel, drawn: Draw, ref_BN: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss, with one backward pass per clip: the losers' are done here, the winner's is left to the caller.

    d loss = sum_n (d loss / d err_n) d err_n. The first factors come from an extra forward pass of all clips without
    gradient; so the memory is that of a single clip.
    """
    with torch.no_grad():
        err_BN = all_errors(model, drawn, config)
    loss, metrics = compare(err_BN.requires_grad_(), ref_BN, drawn, config)
    (slope_BN,) = torch.autograd.grad(loss, err_BN)

    def part(members: slice) -> Tensor:
        return (slope_BN[:, members] * errors(model, drawn, config, members=members)).sum()

    winner, *losers = portions(drawn, config)
    for loser in losers:
        run.add(partial(part, loser))
    rest = part(winner)
    return loss.detach() + (rest - rest.detach()), metrics  # the bracket is 0 and has the gradient


def train(run: Run, model: VideoModel, config: Config, base: nn.Module | None) -> None:
    """The training loop; `base` is from `inputs`."""
    cache: dict[Name, Tensor] = {}
    for batch in run.batches():
        drawn = draw(model, batch, config, run)
        with torch.no_grad(), reference(model, base, run.train.precision):
            ref_BN = (
                cached_errors(model, drawn, config, cache) if config.cached_draws else all_errors(model, drawn, config)
            )
        if config.backward == "together":
            loss, metrics = compare(all_errors(model, drawn, config), ref_BN, drawn, config)
        else:
            loss, metrics = in_turn(run, model, drawn, ref_BN, config)
        run.step(loss, **metrics)


def without_values(config: Config) -> Config:
    """The Config for a dry run: it reads no scores, and computes the reference at every step instead of reading it."""
    return config.model_copy(update={"physics": None, "cached_draws": 0})


def dry_batch(batch: Batch, config: Config, losers: int, clip: tuple[int, int, int]) -> Batch:
    """`batch` with tensors for its losers: shapes and no values, for a dry run (commands/dry.py)."""
    assert batch.z0_BCFHW is not None
    count, *shape = batch.z0_BCFHW.shape
    return replace(batch, losers_BMCFHW=torch.empty(count, losers, *shape))


def members(config: Config, losers: int) -> int:
    return 2 if config.mode == "pair" else 1 + losers


def note(config: Config) -> str:
    return "where the reference is asked" if config.cached_draws else ""


DRY = Dry(config=without_values, batch=dry_batch, members=members, note=note)
