"""Rectified flow: hand values, laws, and that our sampler is the stock pipeline's."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from helpers.tiny import FAMILIES, wan_folder
from PIL import Image
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.core.meter import Meter
from posttrain.evaluation.sample import sample_clips
from posttrain.flow import (
    Active,
    Grad,
    Last,
    SamplerConfig,
    active_steps,
    frame_times,
    interpolate,
    sample,
    sample_time,
    shift_time,
    target,
)
from posttrain.models.base import ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.types import Random


@pytest.fixture(scope="module")
def pipe(folder: Path) -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def test_hand_values() -> None:
    z0, eps = torch.full((1, 1, 2, 1, 1), 2.0), torch.full((1, 1, 2, 1, 1), -6.0)
    assert interpolate(z0, eps, torch.tensor([[0.25, 0.75]])).flatten().tolist() == [0.0, -4.0]
    assert target(z0, eps).flatten().tolist() == [-8.0, -8.0]
    assert shift_time(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.5, 0.75, 1.0]
    assert frame_times(torch.tensor([0.5, 0.25]), 3, n_cond_frames=1).tolist() == [[0, 0.5, 0.5], [0, 0.25, 0.25]]


def test_the_path_ends_at_data_and_noise_and_its_slope_is_the_target() -> None:
    torch.manual_seed(0)
    z0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64), torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t_BF = torch.rand(2, 4, dtype=torch.float64)
    assert torch.equal(interpolate(z0, eps, torch.zeros(2, 4)), z0)
    assert torch.equal(interpolate(z0, eps, torch.ones(2, 4)), eps)
    slope = (interpolate(z0, eps, t_BF + 1e-6) - interpolate(z0, eps, t_BF - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, target(z0, eps), atol=1e-8, rtol=0)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
def test_shift_is_inverted_by_its_reciprocal_and_keeps_order(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, shift), 1 / shift), t, atol=1e-14, rtol=0)
    assert (shift_time(t, shift).diff() > 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_are_distributed_as_named(kind: str, shift: float) -> None:
    t = sample_time(Random(0, 0, range(8000)), kind, shift).double().numpy()
    u = t / (shift - (shift - 1) * t)  # the shift undone
    law = scipy.stats.uniform.cdf if kind == "uniform" else lambda x: scipy.stats.norm.cdf(scipy.special.logit(x))
    assert scipy.stats.kstest(u, law).pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.9, 1.0), (0.0, 0.9), (0.25, 0.5)])
def test_times_of_a_range_have_the_law_given_that_range(kind: str, shift: float, low: float, high: float) -> None:
    """As drawing again until the range is hit would give, which is done here; and never a time outside."""
    t = sample_time(Random(0, 0, range(3000)), kind, shift, low, high)
    assert t.dtype == torch.float32
    assert (t >= low).all()
    assert (t < high).all()
    generator = np.random.default_rng(2)
    u = generator.uniform(size=400_000) if kind == "uniform" else scipy.special.expit(generator.normal(size=400_000))
    drawn = shift * u / (1 + (shift - 1) * u)
    kept = drawn[(drawn >= low) & (drawn < high)][:20_000]
    assert len(kept) > 1000
    assert scipy.stats.ks_2samp(t.numpy(), kept).pvalue > 0.005


def test_times_of_a_range_keep_the_order_of_the_draws_and_depend_on_the_sample_alone() -> None:
    whole = sample_time(Random(7, 3, range(40)), "logit_normal", 5.0, 0.9, 1.0)
    free = sample_time(Random(7, 3, range(40)), "logit_normal", 5.0)
    assert torch.equal(whole.argsort(), free.argsort())
    assert torch.equal(whole[5:], sample_time(Random(7, 3, range(5, 40)), "logit_normal", 5.0, 0.9, 1.0))
    nearly = sample_time(Random(7, 3, range(40)), "logit_normal", 5.0, 0.0, 1.0 - 1e-12)
    torch.testing.assert_close(nearly, free, atol=1e-6, rtol=0)


def test_times_depend_on_the_sample_alone() -> None:
    whole = sample_time(Random(7, 3, [4, 5, 6]), "logit_normal", 3.0)
    assert torch.equal(whole[1:], sample_time(Random(7, 3, [5, 6]), "logit_normal", 3.0))


@pytest.mark.parametrize("step", [0, 1])
def test_what_a_step_shares_is_no_samples_own(step: int) -> None:
    """Neither the first one's, whose index 0 numpy would take for nothing, nor another step's."""
    random = Random(7, step, range(20))
    assert not (random.uniform(4) == random.shared(4)).all(1).any()
    assert not torch.equal(Random(7, step, []).shared(4), Random(7, step + 1, []).shared(4))
    assert torch.equal(Random(7, step, [3]).shared(4), Random(7, step, []).shared(4))


class Constant:
    """The same velocity everywhere: the ODE's solution is a straight line."""

    def __init__(self, v: Tensor) -> None:
        self.v = v

    def velocity(self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: object = None) -> Tensor:
        return self.v.expand_as(z_BCFHW)


class Linear:
    """v = a z + b t + c text, smooth enough for finite differences."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def velocity(self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: object = None) -> Tensor:
        text_B = text_BLD.mean(dim=(1, 2))[:, None, None, None, None]
        return self.a[0] * z_BCFHW + self.a[1] * t_BF[:, None, :, None, None] + self.a[2] * text_B


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_a_constant_velocity_is_integrated_exactly(kind: str, steps: int) -> None:
    torch.manual_seed(0)
    noise, v = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "euler" else unipc()
    z0 = sample(Constant(v), scheduler, noise, torch.zeros(2, 1, 1), None, steps)
    torch.testing.assert_close(z0, noise - v, atol=1e-5, rtol=0)


def test_the_given_frame_stays_as_it_is_and_counts_as_clean() -> None:
    torch.manual_seed(0)
    noise, first = torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 1, 2, 2)
    z0 = sample(Linear(torch.tensor([0.5, 0.2, 0.0])), unipc(), noise, torch.zeros(1, 1, 1), first, 4)
    assert torch.equal(z0[:, :, :1], first)
    assert not torch.equal(z0[:, :, 1:], noise[:, :, 1:])


def test_guidance_mixes_the_two_velocities() -> None:
    noise, yes, no = torch.ones(1, 1, 2, 1, 1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 1.0)
    model = Linear(torch.tensor([0.0, 0.0, 1.0]))  # v is the text itself
    z0 = sample(model, unipc(), noise, yes, None, 5, guidance=3.0, negative_text=no)
    torch.testing.assert_close(z0, noise - (1 + 3 * (2 - 1)), atol=1e-5, rtol=0)


def test_guidance_may_depend_on_the_time() -> None:
    """Euler steps from sigma 1 to 0.75, 0.5, 0.25, 0; v is 4 where w is 3 (t >= 0.5), else the text's own 2."""
    noise, yes, no = torch.ones(1, 1, 2, 1, 1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double()
    weights = [3.0 if t >= 0.5 else 1.0 for t in sigmas[:-1]]
    assert set(weights) == {1.0, 3.0}
    moved = sum((a - b) * (1 + w) for a, b, w in zip(sigmas, sigmas[1:], weights, strict=False))
    model = Linear(torch.tensor([0.0, 0.0, 1.0]))

    def w(t: float) -> float:
        return 3.0 if t >= 0.5 else 1.0

    with pytest.raises(ValueError, match="needs negative_text"):
        sample(model, FlowMatchEulerDiscreteScheduler(), noise, yes, None, 4, w)
    z0 = sample(model, FlowMatchEulerDiscreteScheduler(), noise, yes, None, 4, w, negative_text=no)
    torch.testing.assert_close(z0, noise.double() - float(moved), atol=1e-5, rtol=0)


def test_gradients_through_the_sampler_equal_finite_differences() -> None:
    torch.manual_seed(0)
    noise, first = torch.randn(1, 2, 3, 2, 2).double(), torch.randn(1, 2, 1, 2, 2).double()
    text = torch.ones(1, 1, 1).double()

    def outcome(a: Tensor) -> Tensor:
        return sample(Linear(a), unipc(), noise, text, first, 4).square().sum()

    a = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(outcome(a), a)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(3, dtype=torch.float64)
        numeric = torch.stack([(outcome(a + h) - outcome(a - h)) / 2e-6 for h in steps])
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (12, 1.0), (4, 3.0), (12, 3.0)])
def test_latents_equal_the_stock_pipeline(wan: Wan, pipe: WanImageToVideoPipeline, steps: int, guidance: float) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    noise = torch.randn(wan.latent_shape(9, 32, 48), generator=torch.Generator().manual_seed(5))[None]
    theirs = pipe(
        image=Image.fromarray(picture),
        prompt="a red ball falls.",
        negative_prompt="blurry",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    ).frames
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        text, negative = wan.encode_text(["a red ball falls."]), wan.encode_text(["blurry"])
        ours = sample(wan, wan.scheduler(), noise, text, wan.encode(pixels), steps, guidance, negative)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours[:, :, 1:] - noise[:, :, 1:]).abs().max() > 0.1


def test_pictures_equal_the_stock_pipeline_with_the_same_seed(wan: Wan, pipe: WanImageToVideoPipeline) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    captions = ["a red ball falls.", "a duck and a wooden box fall."]
    ours = sample_clips(wan, pictures, captions, [3, 4], frames=9, steps=4)
    assert ours.shape == (2, 9, 32, 32, 3)
    for clip, picture, caption, seed in zip(ours, pictures, captions, [3, 4], strict=True):
        theirs = pipe(
            image=Image.fromarray(picture),
            prompt=caption,
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
        ).frames[0]
        assert np.abs(clip / 255 - theirs).max() < 0.5 / 255 + 1e-4  # ours is rounded to whole grey levels


def test_gradients_reach_the_transformer_as_in_a_plain_loop(wan: Wan, pipe: WanImageToVideoPipeline) -> None:
    """Against autograd through the stock transformer and scheduler, written out."""
    torch.manual_seed(0)
    noise, first = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 1, 4, 4)
    text = wan.encode_text(["a red ball falls.", "a duck and a wooden box fall."])

    ours = sample(wan, wan.scheduler(), noise, text, first, 3)
    gradients = torch.autograd.grad(ours.square().mean(), list(wan.transformer.parameters()))

    scheduler, z = wan.scheduler(), noise
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        timestep = torch.cat([torch.zeros(2, 4), torch.full((2, 8), float(t))], dim=1)
        v = pipe.transformer(torch.cat([first, z[:, :, 1:]], 2), timestep, text, return_dict=False)[0]
        z = scheduler.step(v, t, z, return_dict=False)[0]
    plain = torch.cat([first, z[:, :, 1:]], 2)
    expected = torch.autograd.grad(plain.square().mean(), list(pipe.transformer.parameters()))

    assert (ours - plain).abs().max() < 1e-4
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(max(g.abs().max() for g in expected)))
    assert all(g.abs().max() > 0 for g in gradients)


def test_active_steps_by_hand() -> None:
    assert active_steps("all", 4) == {0, 1, 2, 3}
    assert active_steps(Last(last=2), 4) == {2, 3}
    assert active_steps(Active(active=(3, 0)), 4) == {0, 3}
    with pytest.raises(UserError, match=r"method\.grad: last: 5 "):
        active_steps(Last(last=5), 4)
    with pytest.raises(UserError, match=r"method\.grad: names step 4, but the steps are 0 to 3"):
        active_steps(Active(active=(1, 4)), 4)


class Weighing:
    """v = a_i z at the i-th of three times, to tell the steps apart."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.times = a, [1.0, 0.5005, 0.001]  # Euler's grid of three steps

    def velocity(self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: object = None) -> Tensor:
        (step,) = [i for i, t in enumerate(self.times) if abs(t - float(t_BF.max())) < 0.01]
        return self.a[step] * z_BCFHW


@pytest.mark.parametrize("grad", ["all", Last(last=2), Active(active=(0, 2)), Active(active=(1,))])
def test_the_gradient_of_chosen_steps_by_hand(grad: Grad) -> None:
    """z_3 = (1 - d_3 a_3)(1 - d_2 a_2)(1 - d_1 a_1) z; where v is a constant, neither a_i nor that factor counts."""
    a = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    noise = torch.full((1, 1, 2, 1, 1), 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    z0 = sample(Weighing(a), scheduler, noise, torch.zeros(1, 1, 1), None, 3, grad=grad)
    (found,) = torch.autograd.grad(z0.mean(), a)
    d = (scheduler.sigmas[:-1] - scheduler.sigmas[1:]).double()
    factors, active = 1 - d * a.detach(), active_steps(grad, 3)
    for step in range(3):
        before = 2.0 * factors[:step].prod()
        after = torch.stack([*[factors[i] for i in range(step + 1, 3) if i in active], torch.ones(()).double()]).prod()
        assert found[step].item() == pytest.approx(float(-d[step] * before * after) * (step in active), rel=1e-5)
    assert z0.mean().item() == pytest.approx(2 * float(factors.prod()), rel=1e-5)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: wan_folder(root / family, family) for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unipc", "euler"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_plain_autograd(families: dict[str, Path], family: str, kind: str) -> None:
    """In float64, against the loop written out with everything kept: through all steps, the last two, and some.

    The plain loop too asks once for both texts. Where it asks twice, gradients differ by up to 3e-7 of their norm, for
    diffusers' Wan rounds to float32 inside whatever its weights are, and one call rounds in another order than two.
    """
    experts = {"expert": "high"} if "a14b" in family else {}
    wan = load(ModelConfig(path=str(families[family]), **experts))
    text, negative = wan.encode_text(["a red ball falls."]).double(), wan.encode_text(["blurry"]).double()
    first = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clean = wan.encode(first).double() if wan.n_cond_frames else None
    condition = {name: value.double() for name, value in wan.condition(first, 5).items()}
    noise = torch.randn(1, *wan.latent_shape(5, 32, 32), generator=torch.Generator().manual_seed(1)).double()
    for module in wan.weights():
        module.double()
    wan.dtype = torch.float64
    parameters = [p for p in wan.transformer.parameters() if p.requires_grad]

    def scheduler() -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
        return wan.scheduler() if kind == "unipc" else FlowMatchEulerDiscreteScheduler(shift=3.0)

    def plain(active: set[int]) -> Tensor:
        solver, z = scheduler(), noise
        solver.set_timesteps(4)
        for number, t in enumerate(solver.timesteps):
            z_given = z if clean is None else torch.cat([clean, z[:, :, 1:]], 2)
            t_BF = frame_times(t.double().expand(2) / 1000, 2, wan.n_cond_frames)
            texts, twice = torch.cat([negative, text]), {name: torch.cat([v, v]) for name, v in condition.items()}
            unwanted, wanted = wan.velocity(torch.cat([z_given, z_given]), t_BF, texts, twice).chunk(2)
            v = unwanted + 3.0 * (wanted - unwanted)
            z = solver.step(v if number in active else v.detach(), t, z, return_dict=False)[0]
        return z if clean is None else torch.cat([clean, z[:, :, 1:]], 2)

    chosen: list[tuple[Grad, set[int]]] = [("all", {0, 1, 2, 3}), (Active(active=(0, 3)), {0, 3})]
    if not experts:
        chosen.append((Last(last=2), {2, 3}))
    for grad, active in chosen:
        ours = sample(wan, scheduler(), noise, text, clean, 4, 3.0, negative, condition, grad)
        theirs = plain(active)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
        got = torch.autograd.grad(ours.sin().sum(), parameters)
        expected = torch.autograd.grad(theirs.sin().sum(), parameters)
        assert all(float((a - b).norm()) <= 1e-9 * float(b.norm()) for a, b in zip(got, expected, strict=True))
        assert any(b.norm() > 0 for b in expected)


@pytest.mark.slow
def test_block_checkpointing_inside_a_step_changes_nothing_but_memory(folder: Path, wan: Wan) -> None:
    """The same gradient bit for bit, and at the worst moment less than 0.8 of the bytes."""
    inside = load(ModelConfig(path=str(folder)))
    inside.transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    noise, first = torch.randn(1, 8, 9, 16, 16), torch.randn(1, 8, 1, 16, 16)
    text = wan.encode_text(["a red ball falls."])
    gradients, peaks = [], []
    for model in (wan, inside):
        with Meter() as meter:
            z0 = sample(model, model.scheduler(), noise, text, first, 3)
            gradients.append(torch.autograd.grad(z0.square().mean(), list(model.transformer.parameters())))
        peaks.append(meter.peak)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize("recompute", [True, False])
def test_steps_without_gradient_do_not_take_it_from_others_under_autocast(wan: Wan, recompute: bool) -> None:
    """Autocast keeps the weights that it cast; those of steps that have no gradient must not serve the others."""
    torch.manual_seed(0)
    noise, first, text = torch.randn(1, 8, 3, 4, 4), torch.randn(1, 8, 1, 4, 4), wan.encode_text(["a red ball falls."])
    parameters = list(wan.transformer.parameters())
    gradients = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z0 = sample(wan, wan.scheduler(), noise, text, first, 4, grad=Last(last=1), recompute=recompute)
        gradients.append(torch.autograd.grad(z0.square().mean(), parameters, allow_unused=True))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded is not None
        assert (rounded - exact).norm() < 0.2 * exact.norm()


def test_the_guidance_of_two_experts() -> None:
    both, one = SamplerConfig(guidance=4.0, guidance_low=3.0), SamplerConfig(guidance=4.0)
    assert [both.weight(0.9)(t) for t in (0.95, 0.9, 0.89)] == [4.0, 4.0, 3.0]
    assert [one.weight(0.9)(t) for t in (0.95, 0.89)] == [4.0, 4.0]
    assert [SamplerConfig(guidance=w).guided for w in (1.0, 1.5)] == [False, True]
    assert SamplerConfig(guidance_low=2.0).guided
    with pytest.raises(UserError, match=r"sampler\.guidance_low: is only for a model with two experts"):
        both.weight(0.0)
