"""Chapter 01 against oracles: diffusers' schedulers, torch.distributions, quadrature, closed forms."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, seeded
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from lecture26 import ddpm
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    bound,
    cosine_betas,
    ddim_step,
    ddpm_step,
    discretized_log_likelihood,
    exact_denoiser,
    linear_betas,
    noise_like,
    normal_kl,
    normal_log_density,
    sample,
)

PREDICTIONS = ("eps", "x_0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
IN_DIFFUSERS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
ACCELERATORS = [
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    ),
    pytest.param(
        "mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="there is no Apple GPU")
    ),
]

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]], [0.3, 0.5, 0.2])
MIXTURE_1D = GaussianMixture([0.7, 0.3], [[-1.0], [1.5]], [0.2, 0.4])
GRID = torch.linspace(-12, 12, 24_001, dtype=torch.float64)  # the trapezoidal rule is exact here to 1e-12


def column(table, t, x):
    """A table's entries at t, shaped to multiply x."""
    return table[t].view(-1, *[1] * (x.ndim - 1))


def always(output):
    """A denoiser that returns the same whatever it gets."""
    return lambda x_t, t: output


# Schedules


@pytest.mark.parametrize("num_steps", [21, 100, 1000, 4000])
def test_linear_betas(num_steps):
    betas = linear_betas(num_steps)
    assert betas.shape == (num_steps,) and betas.dtype == torch.float64
    agree(betas[[0, -1]], torch.tensor([0.1, 20.0], dtype=torch.float64) / num_steps, 1e-14)
    agree(betas.diff(), betas.diff()[:1].expand(num_steps - 1), 1e-14)
    assert (1 - betas).prod() < 5e-5  # every number of steps ends in noise


def test_linear_betas_of_1000_steps_are_those_of_diffusers():
    agree(linear_betas(1000), DDPMScheduler().betas.double(), 1e-8)


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_cosine_betas(num_steps):
    betas = cosine_betas(num_steps)
    assert betas.shape == (num_steps,) and betas.dtype == torch.float64
    agree(betas, DDPMScheduler(num_steps, beta_schedule="squaredcos_cap_v2").betas.double(), 1e-7)
    assert betas[-1] == 0.999 and (betas[:-1] < 0.999).all()
    # below the cap, alpha_bar_t = cos^2(...) / cos^2(0.008 / 1.008 pi / 2)
    u = torch.arange(1, num_steps, dtype=torch.float64) / num_steps
    cosine = [torch.cos((v + 0.008) / 1.008 * math.pi / 2) for v in (u, torch.zeros_like(u))]
    agree((1 - betas[:-1]).cumprod(0), (cosine[0] / cosine[1]) ** 2, 1e-12)


# Tables


def test_tables_of_the_schedule():
    betas = linear_betas(30)
    diffusion = Diffusion(betas)
    products = torch.stack([(1 - betas[: t + 1]).prod() for t in range(30)])
    agree(diffusion.betas, betas, 0.0)
    agree(diffusion.alpha_bar, products, 1e-15)
    agree(diffusion.alpha_bar_prev, torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]]), 1e-15)
    assert diffusion.num_steps == 30
    assert diffusion.base is diffusion
    assert diffusion.steps.tolist() == list(range(30))


@pytest.mark.parametrize("betas", [[0.1, 0.2], (0.1, 0.2), torch.tensor([0.1, 0.2]).numpy()], ids=repr)
def test_betas_may_be_any_numbers_in_a_row(betas):
    agree(Diffusion(betas).betas, torch.tensor([0.1, 0.2], dtype=torch.float64), 1e-7)


def test_one_step_is_a_diffusion_too():
    diffusion = Diffusion([0.5], variance="learned_range")
    x_1 = normal(2, 3)
    _, variance, log_variance = diffusion.q_posterior(x_1, x_1, torch.tensor([0, 0]))
    agree(variance, torch.zeros_like(x_1), 0.0)
    agree(log_variance, torch.full_like(x_1, math.log(0.5)), 1e-14)  # no next step: beta stands in
    x_0 = ddpm_step(diffusion, always(torch.cat([0 * x_1, x_1], dim=1)), x_1, torch.tensor([0, 0]), x_1)
    agree(x_0, x_1 / math.sqrt(0.5), 1e-14)


# Conversions


def test_q_sample_and_velocity_are_those_of_diffusers():
    diffusion = Diffusion(linear_betas(50))
    scheduler = in_float64(DDPMScheduler(50), diffusion)
    x_0, noise, t = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 7, 30, 49])
    x_t = diffusion.q_sample(x_0, t, noise)
    agree(x_t, scheduler.add_noise(x_0, noise, t), 1e-14)
    agree(diffusion.v_from_eps(x_t, t, noise), scheduler.get_velocity(x_0, noise, t), 1e-10)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4, 4), (5, 3, 2, 4, 4)])
def test_x_0_eps_and_v_lead_to_each_other(shape):
    diffusion = Diffusion(linear_betas(50))
    x_0, eps, t = normal(*shape), normal(*shape, seed=1), torch.tensor([0, 1, 7, 30, 49])
    x_t = diffusion.q_sample(x_0, t, eps)
    v = diffusion.v_from_eps(x_t, t, eps)
    agree(diffusion.x_0_from_eps(x_t, t, eps), x_0, 1e-10)
    agree(diffusion.eps_from_x_0(x_t, t, x_0), eps, 1e-10)
    agree(diffusion.x_0_from_v(x_t, t, v), x_0, 1e-10)
    agree(diffusion.eps_from_v(x_t, t, v), eps, 1e-10)
    # (x_t, v) is (eps, x_0) turned by the angle whose cosine is sqrt(alpha_bar)
    agree(x_t**2 + v**2, x_0**2 + eps**2, 1e-10)


# The posterior


def test_posterior_is_bayes_rule():
    diffusion = Diffusion(linear_betas(50))
    x_0, x_t, t = normal(4, 3, 2), normal(4, 3, 2, seed=1), torch.tensor([1, 2, 25, 49])
    mean, variance, log_variance = diffusion.q_posterior(x_0, x_t, t)
    # q(x_{t-1} | x_t, x_0) is proportional to q(x_{t-1} | x_0) q(x_t | x_{t-1}): precisions add up
    beta = column(diffusion.betas, t, x_0)
    before = column(diffusion.alpha_bar, t - 1, x_0)
    precision = 1 / (1 - before) + (1 - beta) / beta
    expected = (before.sqrt() * x_0 / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    agree(mean, expected, 1e-12)
    agree(variance, (1 / precision).expand_as(x_0), 1e-12)
    agree(log_variance, variance.log(), 1e-12)


def test_posterior_at_the_first_step_is_the_clean_data():
    diffusion = Diffusion(linear_betas(50))
    x_0, x_t, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([0, 1])
    mean, variance, log_variance = diffusion.q_posterior(x_0, x_t, t)
    agree(mean[0], x_0[0], 1e-12)
    assert (variance[0] == 0).all()
    agree(log_variance[0], variance[1].log(), 1e-12)  # the next step's stands in for log 0


# The model's step


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_predicted_data_and_noise_make_up_x_t(prediction, clip):
    diffusion = Diffusion(linear_betas(50), prediction=prediction, clip=clip)
    x_t, t, output = normal(5, 3), torch.tensor([0, 1, 7, 30, 49]), normal(5, 3, seed=1)
    p = diffusion.p_mean_variance(always(output), x_t, t)
    agree(diffusion.q_sample(p.x_0, t, p.eps), x_t, 1e-12)
    unclipped = {
        "eps": diffusion.x_0_from_eps(x_t, t, output),
        "x_0": output,
        "v": diffusion.x_0_from_v(x_t, t, output),
    }[prediction]
    assert (unclipped.abs() > 1).any()
    agree(p.x_0, unclipped.clamp(-1, 1) if clip else unclipped, 1e-12)
    agree(p.mean, diffusion.q_posterior(p.x_0, x_t, t).mean, 0.0)


def test_variances():
    betas = linear_betas(50)
    x_t, t = normal(4, 3), torch.tensor([0, 1, 25, 49])
    posterior = Diffusion(betas).q_posterior(x_t, x_t, t)
    v = torch.tensor([-1.0, 1.0, 0.3], dtype=torch.float64).expand(4, 3)  # per channel; not clamped anywhere
    outputs = {"learned_range": torch.cat([x_t, v], dim=1)}
    p = {
        variance: Diffusion(betas, variance=variance).p_mean_variance(
            always(outputs.get(variance, x_t)), x_t, t
        )
        for variance in VARIANCES
    }
    agree(p["fixed_small"].variance, posterior.variance, 0.0)
    agree(p["fixed_small"].log_variance, posterior.log_variance, 0.0)
    # beta, but for the first step, where beta~ of the second one stands in
    large = torch.cat([posterior.variance[1:2], betas[t[1:], None].expand(3, 3)])
    agree(p["fixed_large"].variance, large, 1e-14)
    agree(p["fixed_large"].log_variance, large.log(), 1e-12)
    # geometric interpolation between beta~ (v = -1) and beta (v = 1)
    smallest, largest = posterior.variance[1:, 0], betas[t[1:]]
    expected = torch.stack([smallest, largest, smallest**0.35 * largest**0.65], dim=1)
    agree(p["learned_range"].variance[1:], expected, 1e-12)
    agree(p["learned_range"].log_variance, p["learned_range"].variance.log(), 1e-12)
    for variance in VARIANCES[1:]:
        agree(p[variance].mean, p["fixed_small"].mean, 0.0)


def test_gradients_pass_through_the_model_step():
    """Guidance through the predicted clean data needs them."""
    diffusion = Diffusion(linear_betas(50), variance="learned_range")
    t = torch.tensor([0, 30])

    def mean_and_variance(x_t):
        p = diffusion.p_mean_variance(lambda x, t: torch.cat([x.sin(), x.cos()], dim=1), x_t, t)
        return p.mean, p.log_variance, p.x_0

    assert torch.autograd.gradcheck(mean_and_variance, normal(2, 3).requires_grad_())


# Steps against diffusers


def in_float64(scheduler, diffusion):
    """A diffusers scheduler with the tables of a diffusion, in float64."""
    scheduler.betas, scheduler.alphas = diffusion.base.betas, 1 - diffusion.base.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


# step i of the second one is step 11 i of the first
DIFFUSIONS = {"all steps": lambda diffusion: diffusion, "respaced": lambda diffusion: diffusion.respace(10)}
every_kind = [
    pytest.mark.parametrize("spacing", DIFFUSIONS),
    pytest.mark.parametrize("prediction", PREDICTIONS),
    pytest.mark.parametrize("clip", [False, True]),
]


def with_marks(*marks):
    def marked(test):
        for mark in marks:
            test = mark(test)
        return test

    return marked


@with_marks(*every_kind)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_step_is_that_of_diffusers(monkeypatch, spacing, prediction, clip, variance):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction, variance, clip))
    last = diffusion.num_steps - 1
    t = torch.tensor([0, 1, 2, last // 2, last])
    x_t, noise = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1)
    output = normal(5, 6 if variance == "learned_range" else 3, 4, 4, seed=2)

    scheduler = DDPMScheduler(
        100, prediction_type=IN_DIFFUSERS[prediction], variance_type=variance, clip_sample=clip
    )
    in_float64(scheduler, diffusion)
    scheduler.set_timesteps(timesteps=diffusion.steps.flip(0).tolist())
    expected = []
    for i, step in enumerate(diffusion.steps[t].tolist()):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noise[i : i + 1])
        expected.append(scheduler.step(output[i : i + 1], step, x_t[i : i + 1]).prev_sample)

    agree(ddpm_step(diffusion, always(output), x_t, t, noise), torch.cat(expected), 1e-10)


def ddim_of_diffusers(diffusion):
    scheduler = DDIMScheduler(
        100, prediction_type=IN_DIFFUSERS[diffusion.prediction], clip_sample=diffusion.clip
    )
    spacing = diffusion.steps[1].item()
    scheduler.set_timesteps(100 // spacing)  # takes the step before t for t - spacing, which is right
    return in_float64(scheduler, diffusion)


@with_marks(*every_kind)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_that_of_diffusers(spacing, prediction, clip, eta):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction, clip=clip))
    last = diffusion.num_steps - 1
    t = torch.tensor([0, 1, 2, last // 2, last])
    x_t, noise, output = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    scheduler = ddim_of_diffusers(diffusion)
    expected = [
        scheduler.step(
            output[i : i + 1],
            step,
            x_t[i : i + 1],
            eta,
            use_clipped_model_output=clip,
            variance_noise=noise[i : i + 1],
        ).prev_sample
        for i, step in enumerate(diffusion.steps[t].tolist())
    ]
    agree(ddim_step(diffusion, always(output), x_t, t, noise, eta=eta), torch.cat(expected), 1e-10)


def test_ddim_step_is_deterministic_unless_told_otherwise():
    diffusion, x_t, t = Diffusion(linear_betas(50)), normal(2, 3), torch.tensor([1, 30])
    one, other = (ddim_step(diffusion, always(x_t), x_t, t, normal(2, 3, seed=seed)) for seed in (1, 2))
    agree(one, other, 0.0)


def test_ddim_step_pays_no_heed_to_a_learned_variance():
    x_t, t, noise = normal(2, 3), torch.tensor([1, 30]), normal(2, 3, seed=1)
    fixed, learned = (Diffusion(linear_betas(50), variance=v) for v in ("fixed_small", "learned_range"))
    output = torch.cat([x_t.sin(), x_t], dim=1)
    actual = ddim_step(learned, always(output), x_t, t, noise, eta=0.7)
    agree(actual, ddim_step(fixed, always(x_t.sin()), x_t, t, noise, eta=0.7), 0.0)


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_of_eta_1_is_ddpm_with_small_variance(spacing, prediction):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction))
    t = torch.arange(diffusion.num_steps)
    x_t, noise, output = (normal(diffusion.num_steps, 3, seed=seed) for seed in range(3))
    actual = ddim_step(diffusion, always(output), x_t, t, noise, eta=1.0)
    agree(actual, ddpm_step(diffusion, always(output), x_t, t, noise), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_agree_with_the_float32_tables_of_diffusers(dtype):
    diffusion = Diffusion(linear_betas(100))
    scheduler = DDIMScheduler(trained_betas=diffusion.betas.numpy(), clip_sample=False)
    scheduler.config.num_train_timesteps = 100
    scheduler.set_timesteps(100)
    x_t, output = normal(1, 3, dtype=dtype), normal(1, 3, seed=1, dtype=dtype)
    for step in (0, 1, 50):
        actual = ddim_step(diffusion, always(output), x_t, torch.tensor([step]), x_t)
        agree(actual, scheduler.step(output, step, x_t).prev_sample, 5e-4)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_step_in_float32_is_near_that_in_float64(betas, prediction):
    """1 - alpha_bar has few digits left at the first steps, and x_0 is large at the last ones."""
    base = Diffusion(betas, prediction, clip=True)
    for diffusion in (base, base.respace(5)):
        t = torch.arange(diffusion.num_steps)
        x_t, output, noise = (normal(diffusion.num_steps, 8, seed=seed) for seed in range(3))
        for step in (ddpm_step, partial(ddim_step, eta=1.0), partial(ddim_step, eta=0.5)):
            expected = step(diffusion, always(output), x_t, t, noise)
            actual = step(diffusion, always(output.float()), x_t.float(), t, noise.float())
            torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("clip", [False, True])
def test_mean_shift_comes_after_clipping_and_knows_the_original_step(clip):
    diffusion = Diffusion(linear_betas(100), variance="fixed_large", clip=clip).respace(10)
    t = torch.tensor([0, 4, 9])
    x_t, noise, output, shift = (normal(3, 2, seed=seed) for seed in range(4))
    p = diffusion.p_mean_variance(always(output), x_t, t)
    given = []

    def mean_shift(*arguments):
        given.extend(arguments)
        return shift

    shifted = ddpm_step(diffusion, always(output), x_t, t, noise, mean_shift=mean_shift)
    agree(shifted, ddpm_step(diffusion, always(output), x_t, t, noise) + shift, 1e-12)
    for argument, expected in zip(given, (p.mean, p.variance, x_t, torch.tensor([0, 44, 99])), strict=True):
        agree(argument, expected, 0.0)


# Respacing


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 7, 37, 250, 1000])
def test_respaced_schedule_goes_through_the_same_noise_levels(betas, num_steps):
    base = Diffusion(betas, "v", "fixed_large", clip=True)
    respaced = base.respace(num_steps)
    steps = [round(k * 999 / (num_steps - 1)) for k in range(num_steps)]
    assert respaced.steps.tolist() == steps
    assert respaced.base is base
    agree(respaced.alpha_bar, base.alpha_bar[steps], 1e-12)
    assert (respaced.num_steps, respaced.prediction, respaced.variance, respaced.clip) == (
        num_steps,
        "v",
        "fixed_large",
        True,
    )


def test_respacing_twice_is_still_about_the_original_steps():
    base = Diffusion(linear_betas(1000))
    twice = base.respace(100).respace(10)
    assert twice.base is base
    assert twice.steps.tolist() == [round(11 * k * 999 / 99) for k in range(10)]
    agree(twice.alpha_bar, base.alpha_bar[twice.steps], 1e-12)


def test_denoisers_get_the_original_steps():
    diffusion = Diffusion(linear_betas(1000), variance="learned_range").respace(10)
    x, t = normal(3, 2), torch.tensor([0, 4, 9])
    seen = []

    def denoiser(x_t, t):
        seen.append(t)
        return torch.cat([x_t, x_t], dim=1)

    ddpm_step(diffusion, denoiser, x, t, x)
    ddim_step(diffusion, denoiser, x, t, x)
    diffusion.loss(denoiser, x, t, x)
    assert len(seen) == 3
    for steps in seen:
        agree(steps, torch.tensor([0, 444, 999]), 0)
    seen.clear()
    bound(diffusion, denoiser, x, seeded())
    assert [steps.tolist() for steps in seen] == [[111 * k] * 3 for k in range(10)]


# Whole chains that can be solved by hand: data from N(0, 1), of which every x_t is N(0, 1) too

# E[eps | x_t] = sqrt(1 - alpha_bar) x_t and E[x_0 | x_t] = sqrt(alpha_bar) x_t
PERFECT_OUTPUTS = {
    "eps": lambda x_t, alpha_bar: (1 - alpha_bar).sqrt() * x_t,
    "x_0": lambda x_t, alpha_bar: alpha_bar.sqrt() * x_t,
    "v": lambda x_t, alpha_bar: torch.zeros_like(x_t),
}


def perfect(diffusion):
    alpha_bar = diffusion.base.alpha_bar
    return lambda x_t, t: PERFECT_OUTPUTS[diffusion.prediction](x_t, column(alpha_bar, t, x_t))


def output_variance(diffusion):
    """The variance of the samples, from the two coefficients of each (linear) step."""
    variance = torch.ones((), dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for step in reversed(range(diffusion.num_steps)):
        t = torch.tensor([step])
        slope = ddpm_step(diffusion, perfect(diffusion), one, t, zero).squeeze()
        std = ddpm_step(diffusion, perfect(diffusion), zero, t, one).squeeze()
        variance = slope**2 * variance + std**2
    return variance


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_output_variance_of_ancestral_sampling(spacing, prediction):
    betas = linear_betas(100)
    large = DIFFUSIONS[spacing](Diffusion(betas, prediction, "fixed_large"))
    agree(output_variance(large), 1 - betas[0], 1e-12)
    small = DIFFUSIONS[spacing](Diffusion(betas, prediction, "fixed_small"))
    variance = 1.0
    for t in reversed(range(small.num_steps)):
        alpha_bar = small.alpha_bar[t]
        before = small.alpha_bar[t - 1] if t else torch.ones(())
        variance = alpha_bar / before * variance + (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)
    agree(output_variance(small), variance, 1e-12)
    assert variance < 0.999 * (1 - betas[0])  # the two choices of the variance are told apart


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_turns_noise_into_data_by_a_product_of_cosines(spacing, prediction):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction))
    x_T = normal(4, 3)
    # x_0 = x_T prod_t cos(theta_t - theta_{t-1}),  cos(theta_t) = sqrt(alpha_bar_t)
    theta = Diffusion(linear_betas(100)).alpha_bar[diffusion.steps].sqrt().arccos()
    factor = theta.diff(prepend=torch.zeros(1, dtype=torch.float64)).cos().prod()
    x_0 = sample(diffusion, perfect(diffusion), (4, 3), step=ddim_step, x_T=x_T, progress=False)
    agree(x_0, factor * x_T, 1e-12)
    assert factor < 0.99


# The bound


def test_normal_kl_is_that_of_torch():
    means, log_variances = normal(2, 5, 3), normal(2, 5, 1, seed=1)
    one, other = (Normal(m, (0.5 * v).exp()) for m, v in zip(means, log_variances, strict=True))
    actual = normal_kl(means[0], log_variances[0], means[1], log_variances[1])
    agree(actual, kl_divergence(one, other), 1e-12)


def test_normal_log_density_is_that_of_torch():
    x, mean, log_variance = normal(5, 3), normal(5, 3, seed=1), normal(5, 1, seed=2)
    expected = Normal(mean, (0.5 * log_variance).exp()).log_prob(x)
    agree(normal_log_density(x, mean, log_variance), expected, 1e-12)


def eight_bit(values):
    """The integers 0 to 255 as data in [-1, 1]."""
    return torch.as_tensor(values, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999, 4.0])
@pytest.mark.parametrize("std", [1e-3, 0.03, 1.0, 20.0])
def test_probabilities_of_the_256_values_sum_to_1(mean, std):
    x = eight_bit(range(256))
    mean, log_variance = torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std))
    probabilities = discretized_log_likelihood(x, mean, log_variance).exp()
    agree(probabilities.sum(), torch.ones((), dtype=torch.float64), 1e-9)


def test_probability_of_an_8_bit_value():
    x, mean, std = eight_bit([0, 1, 100, 254, 255]), 0.1, 0.5
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1  # each value's bin lies around it
    edges[0], edges[-1] = -math.inf, math.inf
    cumulative = 0.5 * (1 + torch.erf((edges - mean) / (std * math.sqrt(2))))
    expected = cumulative.diff()[[0, 1, 100, 254, 255]].log()
    actual = discretized_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std)))
    agree(actual, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improbable_values_stay_finite(dtype):
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    mean = torch.full_like(x, 50.0).requires_grad_()
    log_likelihood = discretized_log_likelihood(x, mean, torch.full_like(x, -9.0))
    agree(log_likelihood[:2].detach(), torch.full((2,), math.log(1e-12), dtype=dtype), 1e-6)
    log_likelihood.sum().backward()
    assert mean.grad.isfinite().all()


SHIFT = 0.3  # how far the predicted noise of the next test is off


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_of_a_denoiser_that_is_off_by_a_known_noise(prediction, variance):
    """Data all at one point: the noise is known from x_t, and each term of the bound in closed form."""
    diffusion = Diffusion(linear_betas(40), prediction, variance, clip=True)  # clipping is for sampling only
    point = torch.tensor([[1.5, -0.7]], dtype=torch.float64)

    def denoiser(x_t, t):
        x_0 = point.expand_as(x_t)
        eps = diffusion.eps_from_x_0(x_t, t, x_0) + SHIFT
        x_0 = diffusion.x_0_from_eps(x_t, t, eps)
        return {"eps": eps, "x_0": x_0, "v": diffusion.v_from_eps(x_t, t, eps)}[prediction]

    terms = bound(diffusion, denoiser, point.expand(3, 2), seeded())
    assert terms.shape == (3, 41)
    alpha_bar, beta = diffusion.alpha_bar, diffusion.betas
    posterior_variance = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]
    model_variance = posterior_variance if variance == "fixed_small" else beta[1:]
    # mu~ - mu = beta / (sqrt(alpha) sqrt(1 - alpha_bar)) (eps - eps_theta): Ho et al. 2020, equation 12
    distance = beta**2 / ((1 - beta) * (1 - alpha_bar)) * SHIFT**2
    ratio = posterior_variance / model_variance
    kl = 0.5 * (ratio - 1 - ratio.log() + distance[1:] / model_variance)
    first = posterior_variance[:1]  # stands in where the posterior's own is 0
    decoder = 0.5 * (math.log(2 * math.pi) + first.log() + distance[:1] / first)
    expected = 2 * torch.cat([decoder, kl])  # two dimensions
    agree(terms[:, :-1], expected.expand(3, -1), 1e-9)
    last = Normal(alpha_bar[-1].sqrt() * point, (1 - alpha_bar[-1]).sqrt())
    prior = kl_divergence(last, Normal(torch.zeros_like(point), 1.0)).sum()
    agree(terms[:, -1], prior.expand(3), 1e-12)


def test_bound_of_the_exact_denoiser_lies_just_above_the_truth():
    x_0, _ = MIXTURE.sample(4000, seeded())
    diffusion = Diffusion(linear_betas(100), variance="fixed_large")
    nats = bound(diffusion, exact_denoiser(MIXTURE, diffusion), x_0, seeded(1)).sum(dim=1)
    gap = nats + MIXTURE.log_prob(x_0)
    standard_error = gap.std() / math.sqrt(4000)
    assert -3 * standard_error < gap.mean() < 0.2 + 3 * standard_error


def test_bound_counts_the_bits_of_8_bit_data():
    diffusion = Diffusion(linear_betas(25))
    x_0 = eight_bit([[[[0, 255], [7, 128]]]])
    terms = bound(diffusion, always(x_0), x_0, seeded(), log_likelihood=discretized_log_likelihood)
    x_t = diffusion.q_sample(x_0, torch.tensor([0]), normal(1, 1, 2, 2))
    p = diffusion.p_mean_variance(always(x_0), x_t, torch.tensor([0]))
    agree(terms[0, 0], -discretized_log_likelihood(x_0, p.mean, p.log_variance).sum(), 1e-12)


# The loss


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_simple_loss(spacing, prediction, variance):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction, variance, clip=True))
    x_0, noise, t = 2 * normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1), torch.tensor([0, 1, 5, 9])
    alpha_bar = column(diffusion.alpha_bar, t, x_0)
    target = {
        "eps": noise,
        "x_0": x_0,
        "v": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0,
    }[prediction]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    loss = diffusion.loss(lambda x_t, t: x_t.sin(), x_0, t, noise)
    agree(loss, ((x_t.sin() - target) ** 2).mean(), 1e-12)


def hybrid_loss_by_hand(diffusion, output, x_0, t, noise):
    """MSE + T / 1000 times the bound in bits per dimension, one sample at a time, from the formulas."""
    prediction, v = output.chunk(2, dim=1)
    squared_errors, bits = [], []
    for i, step in enumerate(t.tolist()):
        beta, alpha_bar = diffusion.betas[step], diffusion.alpha_bar[step]
        x_t = alpha_bar.sqrt() * x_0[i] + (1 - alpha_bar).sqrt() * noise[i]
        if diffusion.prediction == "eps":
            target, eps = noise[i], prediction[i]
        elif diffusion.prediction == "x_0":
            target, eps = x_0[i], (x_t - alpha_bar.sqrt() * prediction[i]) / (1 - alpha_bar).sqrt()
        else:
            target = alpha_bar.sqrt() * noise[i] - (1 - alpha_bar).sqrt() * x_0[i]
            eps = alpha_bar.sqrt() * prediction[i] + (1 - alpha_bar).sqrt() * x_t
        squared_errors.append((prediction[i] - target) ** 2)

        # mu = (x_t - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha): Ho et al. 2020, equation 11; no gradient
        mean = ((x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()).detach()
        kept = diffusion.alpha_bar[max(step, 1) - 1]  # log beta~ of the second step stands in for the first
        smallest = (1 - kept) / (1 - diffusion.alpha_bar[max(step, 1)]) * diffusion.betas[max(step, 1)]
        fraction = (v[i] + 1) / 2
        std = (beta**fraction * smallest ** (1 - fraction)).sqrt()
        model = Normal(mean, std)
        if step == 0:
            below = torch.where(x_0[i] == -1, torch.zeros_like(mean), model.cdf(x_0[i] - 1 / 255))
            above = torch.where(x_0[i] == 1, torch.ones_like(mean), model.cdf(x_0[i] + 1 / 255))
            nats = -(above - below).clamp(min=1e-12).log()
        else:
            precision = 1 / (1 - kept) + (1 - beta) / beta
            true_mean = (kept.sqrt() * x_0[i] / (1 - kept) + (1 - beta).sqrt() * x_t / beta) / precision
            nats = kl_divergence(Normal(true_mean, precision**-0.5), model)
        bits.append(nats / math.log(2))
    return torch.stack(squared_errors).mean() + diffusion.num_steps / 1000 * torch.stack(bits).mean()


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss(spacing, prediction):
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction, "learned_range", clip=True))
    last = diffusion.num_steps - 1
    t = torch.tensor([0, 0, 1, last // 2, last])
    x_0 = eight_bit(torch.randint(256, (5, 3, 2, 2), generator=seeded()))
    x_0[0, 0, 0] = torch.tensor([-1.0, 1.0])  # both outermost values at the step that has a decoder
    noise, output = normal(5, 3, 2, 2, seed=1), normal(5, 6, 2, 2, seed=2)
    x_t = diffusion.q_sample(x_0, t, noise)
    perfect_output = {"eps": noise, "x_0": x_0, "v": diffusion.v_from_eps(x_t, t, noise)}[prediction]
    output[:, :3] = perfect_output + 0.02 * output[:, :3]  # near the truth, so that no probability underflows
    output.requires_grad_()

    loss = diffusion.loss(always(output), x_0, t, noise)
    expected = hybrid_loss_by_hand(diffusion, output, x_0, t, noise)
    agree(loss, expected, 1e-10)
    gradient, expected_gradient = (torch.autograd.grad(value, output)[0] for value in (loss, expected))
    agree(gradient, expected_gradient, 1e-10)
    # The mean learns from the squared error alone, the variance from the bound.
    agree(gradient[:, :3], 2 * (output[:, :3] - perfect_output).detach() / x_0.numel(), 1e-12)
    assert (gradient[:, 3:] != 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_gives_the_mean_no_gradient(prediction):
    x_0, t = eight_bit(torch.randint(256, (4, 3), generator=seeded())), torch.tensor([0, 1, 20, 49])
    noise, output = normal(4, 3, seed=1), normal(4, 6, seed=2).requires_grad_()
    learned, fixed = (Diffusion(linear_betas(50), prediction, v) for v in ("learned_range", "fixed_small"))
    (hybrid,) = torch.autograd.grad(learned.loss(always(output), x_0, t, noise), output)
    (simple,) = torch.autograd.grad(fixed.loss(always(output[:, :3]), x_0, t, noise), output)
    assert torch.equal(hybrid[:, :3], simple[:, :3])


# Scores


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_adding_a_classifier_score_gives_the_conditional_denoiser(prediction):
    """Bayes' rule: grad log q(x_t | y) = grad log q(x_t) + grad log q(y | x_t), exact on the mixture."""
    diffusion = Diffusion(linear_betas(50), prediction)
    x_t, t = normal(4, 2), torch.tensor([0, 3, 20, 49])
    alpha_bar = diffusion.alpha_bar[t, None]
    moved = x_t.clone().requires_grad_()
    log_probability = MIXTURE.responsibilities(moved, alpha_bar).log()[:, 1].sum()
    (gradient,) = torch.autograd.grad(log_probability, moved)
    component = GaussianMixture([1.0], MIXTURE.means[1:2], MIXTURE.stds[1:2])
    guided = diffusion.add_score(exact_denoiser(MIXTURE, diffusion)(x_t, t), x_t, t, gradient)
    agree(guided, exact_denoiser(component, diffusion)(x_t, t), 1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_added_score_moves_x_0_by_tweedies_formula(prediction):
    diffusion = Diffusion(linear_betas(50), prediction)
    x_t, t, output, gradient = (
        normal(3, 2, 4, 4),
        torch.tensor([0, 20, 49]),
        normal(3, 2, 4, 4, seed=1),
        normal(3, 2, 4, 4, seed=2),
    )
    before = diffusion.p_mean_variance(always(output), x_t, t)
    after = diffusion.p_mean_variance(always(diffusion.add_score(output, x_t, t, gradient)), x_t, t)
    alpha_bar = column(diffusion.alpha_bar, t, x_t)
    agree(after.eps - before.eps, -(1 - alpha_bar).sqrt() * gradient, 1e-10)
    agree(after.x_0 - before.x_0, (1 - alpha_bar) / alpha_bar.sqrt() * gradient, 1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_added_score_leaves_the_variance_channels_alone(prediction):
    diffusion = Diffusion(linear_betas(50), prediction, "learned_range")
    x_t, t, output = normal(3, 2), torch.tensor([0, 20, 49]), normal(3, 4, seed=1)
    guided = diffusion.add_score(output, x_t, t, normal(3, 2, seed=2))
    assert torch.equal(guided[:, 2:], output[:, 2:])
    assert (guided[:, :2] != output[:, :2]).all()


def guided_towards(component, denoiser, diffusion):
    """Guidance as in the later chapters: a wrapper that adds a gradient, whatever mode it is called in."""

    def guided(x_t, t):
        with torch.inference_mode(False), torch.enable_grad():
            moved, steps = x_t.clone().requires_grad_(), t.clone()
            alpha_bar = diffusion.base.alpha_bar[steps, None]
            log_probability = MIXTURE.responsibilities(moved, alpha_bar).log()[:, component].sum()
            (gradient,) = torch.autograd.grad(log_probability, moved)
        return diffusion.add_score(denoiser(x_t, t), x_t, t, 3 * gradient)

    return guided


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_guidance_is_the_same_with_the_base_and_the_respaced_diffusion(prediction, step):
    base = Diffusion(linear_betas(100), prediction)
    respaced = base.respace(10)
    denoiser, x_T = exact_denoiser(MIXTURE, base), normal(5, 2)

    def run(diffusion):
        guided = guided_towards(1, denoiser, diffusion)
        return sample(respaced, guided, (5, 2), step=step, generator=seeded(), x_T=x_T, progress=False)

    samples = run(respaced)
    assert torch.equal(samples, run(base))
    # with that scale, all samples end near the component that they were guided to
    assert ((samples - MIXTURE.means[1]).norm(dim=1) < 2).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_guided_sampling_works_in_every_mode(mode):
    diffusion = Diffusion(linear_betas(100)).respace(10)
    guided = guided_towards(1, exact_denoiser(MIXTURE, diffusion), diffusion)

    def run():
        return sample(diffusion, guided, (5, 2), generator=seeded(), x_T=normal(5, 2), progress=False)

    expected = run()
    with mode():
        samples = run()
    assert torch.equal(samples, expected)
    assert not samples.requires_grad


# The mixture

alpha_bars = pytest.mark.parametrize("alpha_bar", [1.0, 0.9, 0.3, 0.01])


def on_the_grid(function):
    """Integrate a function of x_0 over the line: (N, ...) values at GRID to (...)."""
    return torch.trapezoid(function, GRID, dim=0)


def mixture_of_torch(mixture):
    components = Independent(Normal(mixture.means, mixture.stds[:, None]), 1)
    return MixtureSameFamily(Categorical(mixture.weights), components)


def test_mixture_density_is_that_of_torch():
    x = 2 * normal(50, 2)
    reference = mixture_of_torch(MIXTURE)
    agree(MIXTURE.log_prob(x), reference.log_prob(x), 1e-12)
    joint = reference.component_distribution.log_prob(x[:, None]) + MIXTURE.weights.log()
    agree(MIXTURE.joint_log_density(x), joint, 1e-12)
    agree(MIXTURE.responsibilities(x), joint.softmax(dim=1), 1e-12)


@pytest.mark.parametrize("alpha_bar", [0.999, 0.9, 0.3, 0.01])
def test_noisy_marginal_by_quadrature(alpha_bar):
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    prior = mixture_of_torch(MIXTURE_1D).log_prob(GRID[:, None]).exp()  # (N,)
    likelihood = Normal(math.sqrt(alpha_bar) * GRID, math.sqrt(1 - alpha_bar)).log_prob(x_t).exp()  # (7, N)
    expected = on_the_grid((prior * likelihood).T).log()
    agree(MIXTURE_1D.log_prob(x_t, alpha_bar), expected, 1e-10)


@alpha_bars
def test_mixture_score_is_the_gradient_of_its_log_density(alpha_bar):
    x = (2 * normal(50, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_prob(x, alpha_bar).sum(), x)
    agree(MIXTURE.score(x.detach(), alpha_bar), gradient, 1e-11)


def test_mixture_takes_a_noise_level_per_point():
    x, alpha_bar = normal(4, 2), torch.tensor([[1.0], [0.9], [0.3], [0.01]], dtype=torch.float64)
    for method in (MIXTURE.log_prob, MIXTURE.responsibilities, MIXTURE.score):
        one_by_one = [method(x[i : i + 1], alpha_bar[i].item()) for i in range(4)]
        agree(method(x, alpha_bar), torch.cat(one_by_one), 1e-14)


def test_mixture_far_away_is_still_finite():
    x = torch.full((1, 2), 1e3, dtype=torch.float64)
    assert MIXTURE.score(x).isfinite().all() and MIXTURE.log_prob(x).isfinite().all()


def test_mixture_samples():
    points, labels = MIXTURE.sample(20_000, seeded())
    again, _ = MIXTURE.sample(20_000, seeded())
    assert torch.equal(points, again)
    assert points.shape == (20_000, 2) and points.dtype == torch.float64
    assert (points.float().double() != points).any()  # not single precision in disguise
    for k in range(3):
        own = points[labels == k]
        weight, std, count = MIXTURE.weights[k].item(), MIXTURE.stds[k].item(), len(own)
        assert abs(count / 20_000 - weight) < 4 * math.sqrt(weight * (1 - weight) / 20_000)
        assert ((own.mean(dim=0) - MIXTURE.means[k]).abs() < 4.5 * std / math.sqrt(count)).all()
        assert ((own.std(dim=0) / std - 1).abs() < 4.5 / math.sqrt(2 * count)).all()


@pytest.mark.parametrize("spacing", DIFFUSIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_denoiser_by_quadrature(spacing, prediction):
    """It is the mean of the prediction's target over the x_0 that can have led to x_t."""
    diffusion = DIFFUSIONS[spacing](Diffusion(linear_betas(100), prediction))
    x_t, t = torch.tensor([[-1.2], [0.1], [0.7], [2.0]], dtype=torch.float64), torch.tensor([11, 33, 55, 99])
    alpha_bar = Diffusion(linear_betas(100)).alpha_bar[t]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    prior = mixture_of_torch(MIXTURE_1D).log_prob(GRID[:, None]).exp()
    posterior = prior[:, None] * Normal(signal * GRID[:, None], noise).log_prob(x_t[:, 0]).exp()  # (N, 4)
    eps = (x_t[:, 0] - signal * GRID[:, None]) / noise
    target = {"eps": eps, "x_0": GRID[:, None], "v": signal * eps - noise * GRID[:, None]}[prediction]
    expected = on_the_grid(posterior * target) / on_the_grid(posterior)
    agree(exact_denoiser(MIXTURE_1D, diffusion)(x_t, t), expected[:, None], 1e-9)


# Sampling


@pytest.mark.parametrize(
    ("variance", "step"),
    [("fixed_small", ddpm_step), ("fixed_large", ddpm_step), ("fixed_small", ddim_step)],
)
def test_samples_of_the_exact_denoiser_are_distributed_like_the_data(variance, step):
    count = 2000
    diffusion = Diffusion(linear_betas(250), variance=variance)
    samples = sample(
        diffusion,
        exact_denoiser(MIXTURE, diffusion),
        (count, 2),
        step=step,
        generator=seeded(1),
        x_T=normal(count, 2),
        progress=False,
    )
    weights, means, stds = MIXTURE.weights[:, None], MIXTURE.means, MIXTURE.stds[:, None]
    statistics = {
        "shares of the components": (MIXTURE.responsibilities(samples), MIXTURE.weights),
        "means": (samples, (weights * means).sum(dim=0)),
        "second moments": (samples**2, (weights * (means**2 + stds**2)).sum(dim=0)),
        "mixed moment": (samples.prod(dim=1, keepdim=True), (weights[:, 0] * means.prod(dim=1)).sum()[None]),
    }
    for name, (values, expected) in statistics.items():
        standard_error = values.std(dim=0) / math.sqrt(count)
        deviation = (values.mean(dim=0) - expected) / standard_error
        # 4 standard errors, and half of one for the 250 steps' own error (measured with 40,000 samples)
        assert (deviation.abs() < 4.5).all(), f"{name} are off by {deviation.tolist()} standard errors"


def test_sample_calls_the_step_from_the_last_one_to_the_first():
    diffusion = Diffusion(linear_betas(100)).respace(5)
    calls = []

    def step(*arguments):
        calls.append(arguments)
        return arguments[2] + 1

    denoiser, x_T = always(None), normal(3, 2)
    samples = sample(diffusion, denoiser, (3, 2), step=step, generator=seeded(), x_T=x_T, progress=False)
    assert torch.equal(x_T, normal(3, 2))
    agree(samples, x_T + 5, 1e-14)
    assert [call[3].tolist() for call in calls] == [[k] * 3 for k in (4, 3, 2, 1, 0)]
    for k, (given_diffusion, given_denoiser, x_t, _, noise) in enumerate(calls):
        assert given_diffusion is diffusion and given_denoiser is denoiser
        agree(x_t, x_T + k, 1e-14)
        assert noise.shape == (3, 2) and noise.dtype == torch.float64
    # every step has noise of its own
    noises = torch.stack([call[4] for call in calls]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(5)).abs().max() < 0.99


def test_sample_is_reproducible_by_its_generator():
    diffusion = Diffusion(linear_betas(30))
    denoiser = exact_denoiser(MIXTURE, diffusion)

    def run(seed, **options):
        return sample(diffusion, denoiser, (3, 2), generator=seeded(seed), progress=False, **options)

    first = run(0)
    assert first.shape == (3, 2) and first.dtype == torch.float32
    torch.randn(7)  # the global generator plays no part
    assert torch.equal(run(0), first)
    assert not torch.isclose(run(1), first).any()
    # the generator decides the noise of the steps, too
    one, other = (run(seed, x_T=normal(3, 2)) for seed in (0, 1))
    assert not torch.isclose(one, other).any()


def test_sample_draws_by_itself_without_a_generator():
    diffusion = Diffusion(linear_betas(30))
    denoiser = exact_denoiser(MIXTURE, diffusion)
    with torch.random.fork_rng():
        one, other = (sample(diffusion, denoiser, (3, 2), progress=False) for _ in range(2))
    assert one.shape == (3, 2) and one.isfinite().all()
    assert not torch.isclose(one, other).any()


def test_sampling_and_measuring_leave_no_graph():
    weight = torch.ones(2, requires_grad=True)
    diffusion, x = Diffusion(linear_betas(30)), normal(3, 2)

    def denoiser(x_t, t):
        return weight * x_t

    for result in (
        sample(diffusion, denoiser, (3, 2), x_T=x, progress=False),
        bound(diffusion, denoiser, x, seeded()),
    ):
        assert not result.requires_grad
    assert diffusion.loss(denoiser, x, torch.tensor([0, 1, 29]), x).requires_grad


def test_noise_is_like_the_data_and_comes_from_the_generator():
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(500, 2, dtype=dtype)
        agree(noise_like(x, seeded(3)), normal(500, 2, seed=3, dtype=dtype), 0.0)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            agree(noise_like(x, None), normal(500, 2, seed=3, dtype=dtype), 0.0)


def test_sample_starts_from_standard_normal_noise():
    def step(diffusion, denoiser, x_t, t, noise):
        return x_t

    x_T = sample(Diffusion([0.5]), always(None), (4000, 5), step=step, generator=seeded(), progress=False)
    assert abs(x_T.mean().item()) < 4 / math.sqrt(20_000)
    assert abs(x_T.var().item() - 1) < 4 * math.sqrt(2 / 20_000)


def test_sample_starts_midway():
    diffusion = Diffusion(linear_betas(100)).respace(20)
    denoiser, x_0, noise = exact_denoiser(MIXTURE, diffusion), normal(3, 2), normal(3, 2, seed=1)
    x_t = x_7 = diffusion.q_sample(x_0, torch.full((3,), 7), noise)
    for index in (7, 6, 5, 4, 3, 2, 1, 0):
        x_t = ddim_step(diffusion, denoiser, x_t, torch.full((3,), index), None)
    found = sample(diffusion, denoiser, (3, 2), ddim_step, x_T=x_7, start=7, progress=False)
    agree(found, x_t, 0.0)


def test_sample_goes_to_the_device_it_is_given():
    diffusion = Diffusion(linear_betas(30))
    shape, expected = (3, 2), []
    for step in (ddpm_step, ddim_step):
        denoiser = exact_denoiser(MIXTURE, diffusion)
        expected.append(sample(diffusion, denoiser, shape, step, seeded(), progress=False))
    with simulated_device():
        for step, wanted in zip((ddpm_step, ddim_step), expected, strict=True):
            found = sample(diffusion, denoiser, shape, step, seeded(), progress=False, device=SIMULATED)
            agree(values_of(found), wanted, 1e-5)  # one generator on the CPU serves all devices alike


def test_ddim_without_noise_is_ddim_without_eta():
    diffusion, x, t = Diffusion(linear_betas(30)), normal(3, 2), torch.tensor([0, 4, 29])

    def denoiser(x_t, t):
        return x_t.sin()

    with_noise = ddim_step(diffusion, denoiser, x, t, normal(3, 2, seed=1), eta=0.0)
    agree(ddim_step(diffusion, denoiser, x, t, None), with_noise, 0.0)


def test_sample_treats_the_samples_of_a_batch_alike():
    diffusion = Diffusion(linear_betas(100)).respace(20)
    denoiser, x_T = exact_denoiser(MIXTURE, diffusion), normal(4, 2)

    def run(x_T):
        return sample(diffusion, denoiser, x_T.shape, step=ddim_step, x_T=x_T, progress=False)

    agree(run(x_T), torch.cat([run(x_T[i : i + 1]) for i in range(4)]), 1e-12)


@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_sample_of_no_samples(step):
    samples = sample(Diffusion(linear_betas(30)), lambda x_t, t: x_t, (0, 3, 4, 4), step=step, progress=False)
    assert samples.shape == (0, 3, 4, 4)


def test_a_batch_may_be_empty(any_diffusion):
    x, t = torch.empty(0, 2), torch.empty(0, dtype=torch.int64)
    *results, _, _ = everything(any_diffusion, x, x, t, x_T=x)
    losses = [result for result in results if result.ndim == 0]
    assert len(losses) == 1 and losses[0].isnan()  # the mean of nothing
    assert all(result.shape[0] == 0 for result in results if result.ndim)
    assert exact_denoiser(MIXTURE, any_diffusion)(x, t).shape == (0, 2)


def test_sample_shows_its_progress_unless_told_otherwise(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, disable=False, **_):
            self.total, self.disable, self.seen = total, disable, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            self.seen += 1

    monkeypatch.setattr(ddpm, "tqdm", Bar)
    diffusion = Diffusion(linear_betas(30))
    sample(diffusion, lambda x_t, t: x_t, (1, 1), progress=False)
    assert all(bar.disable for bar in bars)
    sample(diffusion, lambda x_t, t: x_t, (1, 1))
    assert (bars[-1].seen, bars[-1].total, bars[-1].disable) == (30, 30, False)


# Dtypes and devices


def everything(diffusion, x, noise, t, x_T):
    """The results of all that a diffusion computes, for inputs of one dtype and device."""

    def denoiser(x_t, t):
        return torch.cat([x_t.sin(), x_t.cos()], dim=1)

    yield diffusion.q_sample(x, t, noise)
    yield from diffusion.q_posterior(x, noise, t)
    yield diffusion.v_from_eps(x, t, noise)
    yield diffusion.x_0_from_v(x, t, noise)
    yield diffusion.eps_from_v(x, t, noise)
    yield from diffusion.p_mean_variance(denoiser, x, t)
    yield diffusion.add_score(denoiser(x, t), x, t, noise)
    yield diffusion.loss(denoiser, x, t, noise)
    yield ddpm_step(diffusion, denoiser, x, t, noise, mean_shift=lambda mean, variance, x_t, t: variance)
    yield ddim_step(diffusion, denoiser, x, t, noise, eta=0.5)
    yield bound(diffusion, denoiser, x, seeded())
    for step in (ddpm_step, ddim_step):
        yield sample(diffusion, denoiser, x_T.shape, step, seeded(), x_T=x_T, progress=False)


@pytest.fixture(params=[*PREDICTIONS, "respaced"])
def any_diffusion(request):
    prediction = request.param if request.param in PREDICTIONS else "eps"
    diffusion = Diffusion(linear_betas(30), prediction, "learned_range", clip=True)
    return diffusion.respace(10) if request.param == "respaced" else diffusion


def inputs(dtype):
    return normal(3, 2, dtype=dtype), normal(3, 2, seed=1, dtype=dtype), torch.tensor([0, 4, 9])


def test_results_have_the_dtype_of_the_input(any_diffusion):
    results = {dtype: [] for dtype in (torch.float32, torch.float64)}
    for dtype, found in results.items():
        x, noise, t = inputs(dtype)
        found.extend(everything(any_diffusion, x, noise, t, x_T=x))
        assert {result.dtype for result in found} == {dtype}
    # The bound's terms in float32 lose some digits near t = 0; the chains amplify what the steps lose.
    for single, double in zip(*results.values(), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single_precision(any_diffusion, dtype):
    """Formed after rounding, 1 - alpha_bar is 0 at the first steps, and DDIM divides by its root."""
    x, noise, t = inputs(dtype)
    found = list(everything(any_diffusion, x, noise, t, x_T=x))
    *results, _, _, _ = found  # the bound has no need to be rounded, and chains amplify what a step rounds
    assert {result.dtype for result in results if result.ndim} == {dtype}  # nor has the loss
    assert all(result.isfinite().all() for result in found)
    exactly = everything(any_diffusion, x.double(), noise.double(), t, x_T=x.double())
    rounding = 8 * torch.finfo(dtype).eps
    for result, wanted in zip(results, exactly, strict=False):
        # at t = 0 a small number is divided by a small one, which amplifies what the input rounds
        torch.testing.assert_close(result.double(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_noise_at_the_first_steps(dtype):
    diffusion, t = Diffusion(cosine_betas(1000)), torch.zeros(4096, dtype=torch.int64)
    x_t = diffusion.q_sample(torch.zeros(4096, 1, dtype=dtype), t, normal(4096, 1, dtype=dtype))
    std = (1 - diffusion.alpha_bar[0]).sqrt().item()
    assert abs(x_t.double().std().item() / std - 1) < 4 / math.sqrt(2 * 4096)


def test_rounded_numbers_of_a_step_agree_with_each_other():
    """In float32, 1 - alpha_bar is off by a few parts in ten thousand; the formulas hold all the same."""
    for betas in (linear_betas(1000), cosine_betas(1000), linear_betas(100_000)):
        diffusion, t = Diffusion(betas), torch.arange(20)
        x_0, x_t = normal(20, 3, dtype=torch.float32), normal(20, 3, seed=1, dtype=torch.float32)
        now = diffusion.at(t, x_t)
        # the chain: alpha_bar = (1 - beta) alpha_bar_prev, and its complement exactly
        complement = now.beta + (1 - now.beta) * (1 - now.alpha_bar_prev)
        agree(complement, 1 - now.alpha_bar, 3e-7 * (1 - now.alpha_bar).max().item())
        # the last step of sampling returns the predicted x_0, whatever the betas
        agree(diffusion.q_posterior(x_0, x_t, t).mean[0], x_0[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_steps_of_any_integer_type_are_steps(dtype):
    """Bytes are a mask to torch where they are as many as what they choose from."""
    diffusion, t = Diffusion(linear_betas(21)), torch.tensor([1, 2, 3, 3, 0, 20])
    for chosen in (t, t[torch.arange(21) % 6]):
        x = normal(len(chosen), 2)
        for found, wanted in zip(diffusion.at(chosen.to(dtype), x), diffusion.at(chosen, x), strict=True):
            agree(found, wanted, 0.0)


def test_a_step_looks_its_numbers_up_once(monkeypatch):
    diffusion, x, t = Diffusion(linear_betas(30)), normal(3, 2), torch.tensor([0, 4, 29])
    found, at = [], Diffusion.at
    monkeypatch.setattr(Diffusion, "at", lambda *arguments: found.append(1) or at(*arguments))
    for step in (ddpm_step, ddim_step):
        step(diffusion, lambda x_t, t: x_t, x, t, x)
        assert found.pop() and not found
    diffusion.p_mean_variance(lambda x_t, t: x_t, x, t)
    diffusion.add_score(x, x, t, x)
    assert len(found) == 2


def test_tables_are_made_once_for_each_dtype_and_device():
    diffusion, t = Diffusion(linear_betas(30)), torch.tensor([0, 4])
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        diffusion.at(t, torch.zeros(2, 3, dtype=dtype))
    assert len(diffusion._tables) == 2


def test_another_default_device_changes_nothing():
    x, t = torch.ones(2, 2), torch.tensor([0, 9])

    def results():
        for betas in (linear_betas(30), cosine_betas(30)):
            short = Diffusion(betas).respace(10)
            denoiser = exact_denoiser(GaussianMixture([1.0], [[0.5, 0.5]], [0.2]), short)
            yield short.q_sample(x, t, x)
            yield ddpm_step(short, denoiser, x, t, x)

    expected = list(results())
    with torch.device("meta"):
        found = list(results())
    assert all(map(torch.equal, found, expected))


def test_mixture_has_the_dtype_of_the_input():
    x = normal(4, 2, dtype=torch.float32)
    for method in (MIXTURE.log_prob, MIXTURE.responsibilities, MIXTURE.score):
        single = method(x, 0.5)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), method(x.double(), 0.5), rtol=1e-4, atol=1e-4)
    diffusion = Diffusion(linear_betas(30))
    assert exact_denoiser(MIXTURE, diffusion)(x, torch.tensor([0, 1, 2, 3])).dtype == torch.float32


def test_tables_stay_on_the_cpu_wherever_the_betas_come_from():
    betas = linear_betas(30).float()
    with simulated_device():
        diffusion = Diffusion(betas.to(SIMULATED))
    agree(diffusion.betas, betas.double(), 0.0)


def test_tables_come_to_the_device_of_the_data(any_diffusion):
    """On a device without float64, as Apple's GPU is one."""
    x, noise, t = inputs(torch.float32)
    expected = list(everything(any_diffusion, x, noise, t, x_T=x))
    with simulated_device():
        there = [tensor.to(SIMULATED) for tensor in (x, noise, t, x)]
        results = [values_of(result) for result in everything(any_diffusion, *there)]
    for result, wanted in zip(results, expected, strict=True):
        agree(result, wanted, 1e-6)


def test_mixture_comes_to_the_device_of_the_data():
    x, _, t = inputs(torch.float32)
    denoiser = exact_denoiser(MIXTURE, Diffusion(linear_betas(30)))
    with simulated_device():
        result = values_of(denoiser(x.to(SIMULATED), t.to(SIMULATED)))
    agree(result, denoiser(x, t), 1e-6)


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_accelerators_agree_with_the_cpu(accelerator, any_diffusion):
    x, noise, t = inputs(torch.float32)
    expected = everything(any_diffusion, x, noise, t, x_T=x)
    there = [tensor.to(accelerator) for tensor in (x, noise, t, x)]
    for result, wanted in zip(everything(any_diffusion, *there), expected, strict=True):
        assert result.device.type == accelerator
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-3, atol=1e-3)


# Wrong arguments

X = normal(2, 3)
T = torch.tensor([0, 1])
DIFFUSION = Diffusion(linear_betas(30))
RESPACED = DIFFUSION.respace(10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # schedules
        (lambda: linear_betas(20), ValueError, r"num_steps must be at least 21.*got num_steps=20"),
        (lambda: linear_betas(0), ValueError, "num_steps must be at least 1; got 0"),
        (lambda: linear_betas(100.0), TypeError, "num_steps must be an int; got 100.0"),
        (lambda: cosine_betas(0), ValueError, "num_steps must be at least 1; got 0"),
        (lambda: cosine_betas("1000"), TypeError, "num_steps must be an int; got '1000'"),
        (lambda: Diffusion([0.1, 0.0]), ValueError, r"betas must .* 0 < beta < 1; got .*0\.1000, 0\.0000"),
        (lambda: Diffusion([0.1, 1.0]), ValueError, r"betas must .* 0 < beta < 1; got .*0\.1000, 1\.0000"),
        (lambda: Diffusion([0.1, -0.5]), ValueError, r"betas must .* 0 < beta < 1; got .*-0\.5000"),
        (lambda: Diffusion([0.1, math.nan]), ValueError, "betas must .* 0 < beta < 1; got .*nan"),
        (lambda: Diffusion([]), ValueError, r"betas must be a \(T,\) table .*; got tensor\(\[\]"),
        (lambda: Diffusion([[0.1, 0.2]]), ValueError, r"betas must be a \(T,\) table .*; got .*0\.2000"),
        (lambda: Diffusion(0.1), ValueError, r"betas must be a \(T,\) table .*; got 0\.1"),
        (lambda: Diffusion(None), TypeError, r"betas must be a \(T,\) table .*; got None"),
        (lambda: Diffusion("linear"), TypeError, r"betas must be a \(T,\) table .*; got 'linear'"),
        # what the network predicts
        (
            lambda: Diffusion([0.1], prediction="epsilon"),
            ValueError,
            "prediction must be one of 'eps', 'x_0', 'v'; got 'epsilon'",
        ),
        (
            lambda: Diffusion([0.1], variance="learned"),
            ValueError,
            "variance must be one of 'fixed_small', 'fixed_large', 'learned_range'; got 'learned'",
        ),
        # steps, whatever they are given to
        (lambda: DIFFUSION.q_sample(X, T + 29, X), ValueError, r"t must lie in \[0, 30\); got .* 29 to 30"),
        (lambda: DIFFUSION.q_sample(X, T - 1, X), ValueError, r"t must lie in \[0, 30\); got values -1 to 0"),
        (lambda: DIFFUSION.q_posterior(X, X, T + 29), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: DIFFUSION.loss(always(X), X, T + 29, X), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: DIFFUSION.add_score(X, X, T + 29, X), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: RESPACED.add_score(X, X, T + 29, X), ValueError, r"t must lie in \[0, 30\)"),
        (
            lambda: DIFFUSION.q_sample(X, T[:1], X),
            ValueError,
            r"t must hold one step per sample, shape \(2,\); got \(1,\)",
        ),
        (
            lambda: DIFFUSION.q_sample(X, T[:, None], X),
            ValueError,
            r"t must hold one step per sample, shape \(2,\); got \(2, 1\)",
        ),
        (lambda: DIFFUSION.p_mean_variance(always(X), X, T + 29), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: RESPACED.p_mean_variance(always(X), X, T + 9), ValueError, r"t must lie in \[0, 10\)"),
        (lambda: ddpm_step(DIFFUSION, always(X), X, T + 29, X), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: ddim_step(DIFFUSION, always(X), X, T - 1, X), ValueError, r"t must lie in \[0, 30\)"),
        (lambda: DIFFUSION.q_sample(X, T.float(), X), (TypeError, ValueError), "t must .*float32"),
        (
            lambda: DIFFUSION.q_sample(X, T > 0, X),
            TypeError,
            "t must be a tensor of integers; got torch.bool",
        ),
        (lambda: DIFFUSION.q_sample(X, 3, X), TypeError, "t must be a tensor of integers; got 3"),
        # the data and their noise
        (lambda: DIFFUSION.q_sample(X.byte(), T, X), (TypeError, ValueError), "must .*float.* got .*uint8"),
        (
            lambda: DIFFUSION.q_sample(X, T, X[0]),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got \(3,\)",
        ),
        (
            lambda: DIFFUSION.q_sample(X[:1].expand(2, 3), T, X[:1]),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got \(1, 3\)",
        ),
        (
            lambda: RESPACED.loss(always(X), X, T, X[:, :1]),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got \(2, 1\)",
        ),
        (
            lambda: ddpm_step(DIFFUSION, always(X), X, T, X[0]),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got \(3,\)",
        ),
        (
            lambda: ddim_step(DIFFUSION, always(X), X, T, X[:, :1]),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got \(2, 1\)",
        ),
        # the network's output
        (
            lambda: DIFFUSION.p_mean_variance(always(normal(2, 6)), X, T),
            ValueError,
            r"the denoiser must return shape \(2, 3\) with variance='fixed_small'; got \(2, 6\)",
        ),
        (
            lambda: Diffusion([0.1, 0.2], variance="learned_range").loss(always(X), X, T, X),
            ValueError,
            r"the denoiser must return shape \(2, 6\) with variance='learned_range'; got \(2, 3\)",
        ),
        (
            lambda: DIFFUSION.loss(always(X[:1]), X, T, X),
            ValueError,
            r"the denoiser must return shape \(2, 3\) .*; got \(1, 3\)",
        ),
        (
            lambda: DIFFUSION.p_mean_variance(always(None), X, T),
            (TypeError, ValueError),
            "the denoiser must return .* NoneType",
        ),
        # sampling
        (lambda: DIFFUSION.respace(1), ValueError, r"num_steps must lie in \[2, 30\]; got num_steps=1"),
        (lambda: DIFFUSION.respace(31), ValueError, r"num_steps must lie in \[2, 30\]; got num_steps=31"),
        (lambda: RESPACED.respace(11), ValueError, r"num_steps must lie in \[2, 10\]; got num_steps=11"),
        (lambda: DIFFUSION.respace(2.0), TypeError, "num_steps must be an int; got 2.0"),
        (
            lambda: ddim_step(DIFFUSION, always(X), X, T, X, eta=1.1),
            ValueError,
            r"eta must lie in \[0, 1\]; got eta=1.1",
        ),
        (
            lambda: ddim_step(DIFFUSION, always(X), X, T, X, eta=-0.1),
            ValueError,
            r"eta must lie in \[0, 1\]; got eta=-0.1",
        ),
        (
            lambda: ddim_step(DIFFUSION, always(X), X, T, X, eta=math.nan),
            ValueError,
            r"eta must lie in \[0, 1\]; got eta=nan",
        ),
        (
            lambda: sample(DIFFUSION, always(X), (4, 3), x_T=X),
            ValueError,
            r"x_T must have the shape \(4, 3\); got \(2, 3\)",
        ),
        (
            lambda: sample(DIFFUSION, always(X), (2, 3), x_T=X, start=30),
            ValueError,
            r"start must lie in \[0, 30\); got start=30",
        ),
        (
            lambda: sample(DIFFUSION, always(X), (2, 3), x_T=X, start=-1),
            ValueError,
            r"start must lie in \[0, 30\); got start=-1",
        ),
        (
            lambda: sample(DIFFUSION, always(X), (2, 3), start=3),
            ValueError,
            "start must come with an x_T.*; got start=3",
        ),
        (
            lambda: ddim_step(DIFFUSION, always(X), X, T, None, eta=0.5),
            ValueError,
            r"noise must have the shape of the data, \(2, 3\); got None",
        ),
        # the mixture
        (
            lambda: GaussianMixture([1.0], [0.0], [1.0]),
            ValueError,
            r"weights, means and stds must have shapes .*; got \(1,\), \(1,\) and \(1,\)",
        ),
        (
            lambda: GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [1.0]),
            ValueError,
            r"weights, means and stds must have shapes .*; got \(2,\), \(2, 1\) and \(1,\)",
        ),
        (
            lambda: GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [[1.0], [1.0]]),
            ValueError,
            r"weights, means and stds must have shapes .*; got \(2,\), \(2, 1\) and \(2, 1\)",
        ),
        (
            lambda: GaussianMixture([0.5, 0.4], [[0.0], [1.0]], [1.0, 1.0]),
            ValueError,
            r"weights must be positive with sum 1; got .*0\.4000",
        ),
        (
            lambda: GaussianMixture([1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0]),
            ValueError,
            r"weights must be positive with sum 1; got .*-0\.5000",
        ),
        (
            lambda: GaussianMixture([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0]),
            ValueError,
            r"weights must be positive with sum 1; got .*0\.\]",
        ),
        (
            lambda: GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [1.0, 0.0]),
            ValueError,
            r"stds must be positive; got .*1\., 0\.",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
