"""Exercises of chapter 01: forward process, posterior, predictions, training, sampling, fewer steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lecture26 import ddpm

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws, batches
from ..mistakes import (
    per_sample,
    schedule_mistakes,
    step_mistakes,
    with_arguments,
)
from ..optimizers import OptimizerArgument


def _q_sample_cases(seed: int) -> list[Case]:
    return [Case(b.note, (b.normal(), b.alpha_bar, b.normal())) for b in batches(seed)]


Q_SAMPLE = Exercise(
    "ddpm.q_sample",
    '"Any step at once", equation (1.6)',
    ddpm.q_sample,
    _q_sample_cases,
    (
        Misconception(
            "alpha_bar for its root",
            lambda x_0, alpha_bar, noise: alpha_bar * x_0 + (1 - alpha_bar).sqrt() * noise,
            "x_0 is multiplied by alpha_bar; its factor is sqrt(alpha_bar), so that variances, the squares "
            "of the factors, add up to 1.",
        ),
        Misconception(
            "variance for standard deviation",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + (1 - alpha_bar) * noise,
            "The noise is multiplied by its variance 1 - alpha_bar. Noise of that variance is sqrt(1 - "
            "alpha_bar) eps.",
        ),
        Misconception(
            "both roots forgotten",
            lambda x_0, alpha_bar, noise: alpha_bar * x_0 + (1 - alpha_bar) * noise,
            "alpha_bar and 1 - alpha_bar are variances; signal and noise are multiplied by their square "
            "roots.",
        ),
        Misconception(
            "1 - sqrt(alpha_bar) for the noise",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + (1 - alpha_bar.sqrt()) * noise,
            "The noise's factor is sqrt(1 - alpha_bar), not 1 - sqrt(alpha_bar): the squares of the two "
            "factors add up to 1, not the factors.",
        ),
        Misconception(
            "alpha_bar taken for a root already",
            lambda x_0, alpha_bar, noise: alpha_bar * x_0 + (1 - alpha_bar**2).sqrt() * noise,
            "alpha_bar is squared on the way to the noise's factor. It is a variance as it stands: the "
            "factors are sqrt(alpha_bar) and sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "signal and noise swapped",
            lambda x_0, alpha_bar, noise: (1 - alpha_bar).sqrt() * x_0 + alpha_bar.sqrt() * noise,
            "alpha_bar is what is left of the signal: sqrt(alpha_bar) belongs to x_0, sqrt(1 - alpha_bar) to "
            "the noise.",
        ),
        Misconception(
            "noise subtracted",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 - (1 - alpha_bar).sqrt() * noise,
            "The noise is added. Subtracted noise has the same distribution, but then the network "
            "learns -eps.",
        ),
        Misconception(
            "x_0 not scaled",
            lambda x_0, alpha_bar, noise: x_0 + (1 - alpha_bar).sqrt() * noise,
            "x_0 fades while noise comes in: multiply it by sqrt(alpha_bar), or the variance grows beyond 1.",
        ),
        Misconception(
            "noise not scaled",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + noise,
            "The noise comes in gradually: multiply it by sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "variance exploding",
            lambda x_0, alpha_bar, noise: x_0 + ((1 - alpha_bar) / alpha_bar).sqrt() * noise,
            "This is x_t / sqrt(alpha_bar): the whole right-hand side has been divided by x_0's factor.",
        ),
        Misconception(
            "fresh noise for the argument",
            lambda x_0, alpha_bar, noise: (
                alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * torch.randn_like(x_0)
            ),
            "It draws noise of its own. The loss needs the very noise that went into x_t: use the argument.",
        ),
        Misconception(
            "noise scaled by sqrt(alpha_bar)",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * (x_0 + noise),
            "Signal and noise have the same factor. The noise has sqrt(1 - alpha_bar): it grows as x_0 "
            "fades.",
        ),
        Misconception(
            "sqrt(alpha_bar) before the bracket",
            lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * (x_0 + (1 - alpha_bar).sqrt() * noise),
            "sqrt(alpha_bar) belongs to x_0 alone, not to the noise.",
        ),
        *schedule_mistakes(ddpm.q_sample, "alpha_bar"),
    ),
)


def _posterior_mean_cases(seed: int) -> list[Case]:
    return [
        Case(b.note, (b.normal(), b.normal(), b.beta, b.alpha_bar, b.alpha_bar_prev)) for b in batches(seed)
    ]


POSTERIOR_MEAN = Exercise(
    "ddpm.posterior_mean",
    '"Going back, when the clean data are known", equation (1.15)',
    ddpm.posterior_mean,
    _posterior_mean_cases,
    (
        Misconception(
            "weights of x_0 and x_t swapped",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: ddpm.posterior_mean(
                x_t, x_0, beta, alpha_bar, alpha_bar_prev
            ),
            "The weights stand at the wrong tensors. At the first step, where alpha_bar_prev = 1, the mean "
            "must be x_0.",
        ),
        Misconception(
            "alpha_bar_prev for its root",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_0 has sqrt(alpha_bar_prev), the root that x_{t-1} is made with, not "
            "alpha_bar_prev.",
        ),
        Misconception(
            "alpha for its root",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 + (1 - beta) * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_t has sqrt(alpha_t) = sqrt(1 - beta_t), not alpha_t.",
        ),
        Misconception(
            "both roots forgotten",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev * beta * x_0 + (1 - beta) * (1 - alpha_bar_prev) * x_t) / (1 - alpha_bar)
            ),
            "alpha_bar_prev and alpha_t = 1 - beta_t both stand under a square root.",
        ),
        Misconception(
            "alpha_bar for alpha",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 + alpha_bar.sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_t has the root of alpha_t = 1 - beta_t, of this step alone, not of the product "
            "alpha_bar.",
        ),
        Misconception(
            "alpha for alpha_bar_prev",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                ((1 - beta).sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_0 has sqrt(alpha_bar_prev), the product of all steps before, not sqrt(alpha_t).",
        ),
        Misconception(
            "beta for alpha",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 + beta.sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_t has sqrt(alpha_t), and alpha_t is 1 - beta_t.",
        ),
        Misconception(
            "root of beta",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta.sqrt() * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_0 has beta_t itself: it is a variance here, as in every precision-weighted "
            "mean.",
        ),
        Misconception(
            "alpha_bar for alpha_bar_prev in x_0's weight",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The weight of x_0 has the root of alpha_bar at t - 1: it comes from x_{t-1} given x_0.",
        ),
        Misconception(
            "alpha_bar for alpha_bar_prev in x_t's weight",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_0 + (1 - beta).sqrt() * x_t
            ),
            "The weight of x_t has 1 - alpha_bar at t - 1, the variance of x_{t-1} given x_0, above 1 - "
            "alpha_bar at t.",
        ),
        Misconception(
            "t and t - 1 swapped",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: ddpm.posterior_mean(
                x_0, x_t, beta, alpha_bar_prev, alpha_bar
            ),
            "alpha_bar and alpha_bar_prev have changed places. Only the denominators have alpha_bar at t.",
        ),
        Misconception(
            "denominator at t - 1",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar_prev)
            ),
            "Both weights are divided by 1 - alpha_bar at t; 1 - alpha_bar_prev is 0 at the first step.",
        ),
        Misconception(
            "root of the denominator",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar).sqrt()
            ),
            "Both weights are divided by the variance 1 - alpha_bar, not by its root.",
        ),
        Misconception(
            "denominator forgotten",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                alpha_bar_prev.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t
            ),
            "Both weights are divided by 1 - alpha_bar.",
        ),
        Misconception(
            "x_t's weight not divided",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_0
                + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t
            ),
            "Both weights are divided by 1 - alpha_bar, that of x_t too.",
        ),
        Misconception(
            "x_0's weight not divided",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                alpha_bar_prev.sqrt() * beta * x_0
                + (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t
            ),
            "Both weights are divided by 1 - alpha_bar, that of x_0 too.",
        ),
        Misconception(
            "difference instead of sum",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (alpha_bar_prev.sqrt() * beta * x_0 - (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t)
                / (1 - alpha_bar)
            ),
            "The mean is a weighted sum of x_0 and x_t; both weights are positive.",
        ),
        Misconception(
            "x_0 taken for eps",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: (
                (x_t - beta / (1 - alpha_bar).sqrt() * x_0) / (1 - beta).sqrt()
            ),
            "This is the form of the mean for a network that predicts eps. Here x_0 is given.",
        ),
        Misconception(
            "mean of the forward step",
            lambda x_0, x_t, beta, alpha_bar, alpha_bar_prev: alpha_bar_prev.sqrt() * x_0,
            "This is the mean of x_{t-1} given x_0 alone; x_t is known as well and pulls the mean towards "
            "it.",
        ),
        *schedule_mistakes(ddpm.posterior_mean, "beta", "alpha_bar", "alpha_bar_prev"),
    ),
)


def _velocity_cases(seed: int) -> list[Case]:
    return [Case(b.note, (b.normal(), b.alpha_bar, b.normal())) for b in batches(seed)]


V_FROM_X_0_AND_EPS = Exercise(
    "ddpm.v_from_x_0_and_eps",
    '"The velocity", equation (1.44)',
    ddpm.v_from_x_0_and_eps,
    _velocity_cases,
    (
        Misconception(
            "plus for minus",
            lambda x_0, alpha_bar, eps: alpha_bar.sqrt() * eps + (1 - alpha_bar).sqrt() * x_0,
            "v is the derivative of x_t with respect to the angle, and the cosine's derivative is minus the "
            "sine: the term with x_0 is subtracted.",
        ),
        Misconception(
            "wrong sign",
            lambda x_0, alpha_bar, eps: (1 - alpha_bar).sqrt() * x_0 - alpha_bar.sqrt() * eps,
            "This is -v: eps has the plus sign, x_0 the minus sign.",
        ),
        Misconception(
            "x_0 and eps swapped",
            lambda x_0, alpha_bar, eps: alpha_bar.sqrt() * x_0 - (1 - alpha_bar).sqrt() * eps,
            "In v the factors have changed places against x_t: sqrt(alpha_bar) stands at eps, sqrt(1 - "
            "alpha_bar) at x_0.",
        ),
        Misconception(
            "factors swapped",
            lambda x_0, alpha_bar, eps: (1 - alpha_bar).sqrt() * eps - alpha_bar.sqrt() * x_0,
            "In v the factors have changed places against x_t: sqrt(alpha_bar) stands at eps, sqrt(1 - "
            "alpha_bar) at x_0.",
        ),
        Misconception(
            "x_t for v",
            lambda x_0, alpha_bar, eps: alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps,
            "This is x_t. v is its derivative with respect to the angle, at a right angle to it.",
        ),
        Misconception(
            "roots forgotten",
            lambda x_0, alpha_bar, eps: alpha_bar * eps - (1 - alpha_bar) * x_0,
            "The factors are cosine and sine of an angle, sqrt(alpha_bar) and sqrt(1 - alpha_bar); alpha_bar "
            "and 1 - alpha_bar are their squares.",
        ),
        Misconception(
            "alpha_bar for its root",
            lambda x_0, alpha_bar, eps: alpha_bar * eps - (1 - alpha_bar).sqrt() * x_0,
            "The factor of eps is sqrt(alpha_bar).",
        ),
        Misconception(
            "1 - alpha_bar for its root",
            lambda x_0, alpha_bar, eps: alpha_bar.sqrt() * eps - (1 - alpha_bar) * x_0,
            "The factor of x_0 is sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "difference without factors",
            lambda x_0, alpha_bar, eps: eps - x_0,
            "This is the velocity of a straight path from x_0 to eps. The diffusion's path is an arc, with "
            "the factors sqrt(alpha_bar) and sqrt(1 - alpha_bar).",
        ),
        *schedule_mistakes(ddpm.v_from_x_0_and_eps, "alpha_bar"),
    ),
)


def _ancestral_update_cases(seed: int) -> list[Case]:
    cases = []
    for number, b in enumerate(batches(seed)):
        t = b.t.clone()
        if len(t) > 1 and number < 8:
            # one sample at the last step of sampling, one just before it; the others are drawn
            t[number % 2], t[-1] = 0, 1
        cases.append(Case(f"{b.note}, t = {t.tolist()}", (b.normal(), b.normal(), b.normal(), t)))
    return cases


ANCESTRAL_UPDATE = Exercise(
    "ddpm.ancestral_update",
    '"Ancestral sampling", equation (1.37)',
    ddpm.ancestral_update,
    _ancestral_update_cases,
    (
        Misconception(
            "noise at the last step",
            lambda mean, log_variance, noise, t: mean + (0.5 * log_variance).exp() * noise,
            "At t = 0 the mean itself is the sample: noise added there is never taken out again.",
        ),
        Misconception(
            "noise at the last step only",
            lambda mean, log_variance, noise, t: (
                mean + per_sample(t == 0, mean) * (0.5 * log_variance).exp() * noise
            ),
            "The mask is inverted: noise is added at every step but t = 0.",
        ),
        Misconception(
            "no noise at t = 1",
            lambda mean, log_variance, noise, t: (
                mean + per_sample(t > 1, mean) * (0.5 * log_variance).exp() * noise
            ),
            "The papers' last step t = 1 is t = 0 in code: noise is left out there only.",
        ),
        Misconception(
            "first sample's t for the whole batch",
            lambda mean, log_variance, noise, t: (
                mean + (0.5 * log_variance).exp() * noise if t[0] > 0 else mean
            ),
            "Each sample has a step of its own: noise is left out for those at t = 0, whatever the first one "
            "does.",
        ),
        Misconception(
            "noise for all unless all are at the last step",
            lambda mean, log_variance, noise, t: (
                mean + (0.5 * log_variance).exp() * noise if (t > 0).any() else mean
            ),
            "Each sample has a step of its own: make a mask of shape (B, 1, ...) from t > 0.",
        ),
        Misconception(
            "no noise as soon as one is at the last step",
            lambda mean, log_variance, noise, t: (
                mean + (0.5 * log_variance).exp() * noise if (t > 0).all() else mean
            ),
            "Each sample has a step of its own: make a mask of shape (B, 1, ...) from t > 0.",
        ),
        Misconception(
            "mask along the last axis",
            lambda mean, log_variance, noise, t: mean + (t > 0) * (0.5 * log_variance).exp() * noise,
            "A mask of shape (B,) broadcasts against the last axis, not against the batch: give it "
            "(B, 1, ...).",
        ),
        Misconception(
            "mean masked too",
            lambda mean, log_variance, noise, t: (
                per_sample(t > 0, mean) * (mean + (0.5 * log_variance).exp() * noise)
            ),
            "Only the noise is left out at t = 0; the mean stays.",
        ),
        Misconception(
            "variance for standard deviation",
            lambda mean, log_variance, noise, t: mean + per_sample(t > 0, mean) * log_variance.exp() * noise,
            "The noise is multiplied by the variance. The standard deviation is exp(log_variance / 2).",
        ),
        Misconception(
            "half of the variance for its root",
            lambda mean, log_variance, noise, t: (
                mean + per_sample(t > 0, mean) * 0.5 * log_variance.exp() * noise
            ),
            "The 1/2 belongs inside the exponential, exp(log_variance / 2): there it makes the root.",
        ),
        Misconception(
            "log-variance for standard deviation",
            lambda mean, log_variance, noise, t: mean + per_sample(t > 0, mean) * log_variance * noise,
            "The third argument's factor is exp(log_variance / 2), not the logarithm itself.",
        ),
        Misconception(
            "root of the log-variance",
            lambda mean, log_variance, noise, t: mean + per_sample(t > 0, mean) * log_variance.sqrt() * noise,
            "The standard deviation is exp(log_variance / 2). A logarithm may be negative and has no root "
            "then.",
        ),
        Misconception(
            "reciprocal of the standard deviation",
            lambda mean, log_variance, noise, t: (
                mean + per_sample(t > 0, mean) * (-0.5 * log_variance).exp() * noise
            ),
            "The exponent's sign is wrong: sigma is exp(log_variance / 2).",
        ),
        Misconception(
            "noise subtracted",
            lambda mean, log_variance, noise, t: (
                mean - per_sample(t > 0, mean) * (0.5 * log_variance).exp() * noise
            ),
            "The noise is added. Subtracted, it has the same distribution, but the same seed gives another "
            "sample.",
        ),
        Misconception(
            "noise not scaled",
            lambda mean, log_variance, noise, t: mean + per_sample(t > 0, mean) * noise,
            "The noise is multiplied by the standard deviation, exp(log_variance / 2).",
        ),
        Misconception(
            "no noise at all",
            lambda mean, log_variance, noise, t: mean.clone(),
            "This is the mean alone. Sampling adds noise of the step's variance at every step but t = 0.",
        ),
        Misconception(
            "fresh noise for the argument",
            lambda mean, log_variance, noise, t: (
                mean + per_sample(t > 0, mean) * (0.5 * log_variance).exp() * torch.randn_like(mean)
            ),
            "It draws noise of its own: use the argument, so that a seed decides the sample.",
        ),
    ),
)


def _ddim_update_cases(seed: int) -> list[Case]:
    cases = []
    for number, b in enumerate(batches(seed)):
        # With fewer steps the one before lies further back, where alpha_bar is larger; 1 stays 1.
        alpha_bar_prev = b.alpha_bar_prev.sqrt() if number % 2 else b.alpha_bar_prev
        eta = (0.5, 0.0, 0.3, 1.0, 0.7)[number % 5]
        cases.append(Case(b.note, (b.normal(), b.normal(), b.alpha_bar, alpha_bar_prev, eta, b.normal())))
    return cases


def _ddim_sigma(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()


def _ddim_with_sigma(
    x_0: Tensor, eps: Tensor, alpha_bar_prev: Tensor, sigma: Tensor, noise: Tensor
) -> Tensor:
    """DDIM's update with any sigma, right or wrong."""
    return alpha_bar_prev.sqrt() * x_0 + (1 - alpha_bar_prev - sigma**2).sqrt() * eps + sigma * noise


DDIM_UPDATE = Exercise(
    "ddpm.ddim_update",
    '"DDIM", equation (1.38)',
    ddpm.ddim_update,
    _ddim_update_cases,
    (
        Misconception(
            "variance for standard deviation",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                ddpm.ddim_update(x_0, eps, alpha_bar, alpha_bar_prev, eta, torch.zeros_like(noise))
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) ** 2 * noise
            ),
            "The fresh noise is multiplied by sigma^2; its factor is sigma.",
        ),
        Misconception(
            "sigma for its square under the root",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar_prev.sqrt() * x_0
                + (1 - alpha_bar_prev - _ddim_sigma(alpha_bar, alpha_bar_prev, eta)).sqrt() * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "Variances add up: under the root stands 1 - alpha_bar_prev - sigma^2, with the square.",
        ),
        Misconception(
            "noise's variance not taken from the direction",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar_prev.sqrt() * x_0
                + (1 - alpha_bar_prev).sqrt() * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "Fresh noise replaces some of the predicted one: the factor of eps is sqrt(1 - alpha_bar_prev - "
            "sigma^2).",
        ),
        Misconception(
            "fresh noise forgotten",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, eta, torch.zeros_like(noise)
            ),
            "The term sigma * noise is missing, while its variance is taken from the direction.",
        ),
        Misconception(
            "eta ignored",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, 0.0, noise
            ),
            "This is the deterministic step, eta = 0. For other values, sigma is proportional to eta.",
        ),
        Misconception(
            "eta taken as 1",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, 1.0, noise
            ),
            "The factor eta of sigma is missing.",
        ),
        Misconception(
            "eta times the variance",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, math.sqrt(eta), noise
            ),
            "eta multiplies sigma, the standard deviation; the variance has eta^2.",
        ),
        Misconception(
            "eta squared in sigma",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, eta**2, noise
            ),
            "sigma has eta, its square eta^2: here it is squared twice.",
        ),
        Misconception(
            "beta for beta~",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: _ddim_with_sigma(
                x_0, eps, alpha_bar_prev, eta * (1 - alpha_bar / alpha_bar_prev).sqrt(), noise
            ),
            "sigma^2 is eta^2 times the posterior's variance: the factor (1 - alpha_bar_prev) / (1 - "
            "alpha_bar) is missing.",
        ),
        Misconception(
            "fraction upside down in sigma",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: _ddim_with_sigma(
                x_0,
                eps,
                alpha_bar_prev,
                eta * ((1 - alpha_bar) / (1 - alpha_bar_prev) * (1 - alpha_bar / alpha_bar_prev)).sqrt(),
                noise,
            ),
            "The fraction in sigma is (1 - alpha_bar_prev) / (1 - alpha_bar): no noise at the last step.",
        ),
        Misconception(
            "beta forgotten in sigma",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: _ddim_with_sigma(
                x_0, eps, alpha_bar_prev, eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt(), noise
            ),
            "sigma has a second factor, sqrt(1 - alpha_bar / alpha_bar_prev), the root of the step's beta.",
        ),
        Misconception(
            "1 - alpha_bar for beta in sigma",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: _ddim_with_sigma(
                x_0, eps, alpha_bar_prev, eta * (1 - alpha_bar_prev).sqrt(), noise
            ),
            "The step's beta is 1 - alpha_bar / alpha_bar_prev; 1 - alpha_bar is that of all steps together.",
        ),
        Misconception(
            "alpha_bar_prev for its root",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                ddpm.ddim_update(x_0, eps, alpha_bar, alpha_bar_prev, eta, noise)
                + (alpha_bar_prev - alpha_bar_prev.sqrt()) * x_0
            ),
            "The factor of x_0 is sqrt(alpha_bar_prev).",
        ),
        Misconception(
            "root of the direction forgotten",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar_prev.sqrt() * x_0
                + (1 - alpha_bar_prev - _ddim_sigma(alpha_bar, alpha_bar_prev, eta) ** 2) * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "The factor of eps is a root, sqrt(1 - alpha_bar_prev - sigma^2).",
        ),
        Misconception(
            "alpha_bar for alpha_bar_prev at x_0",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                ddpm.ddim_update(x_0, eps, alpha_bar, alpha_bar_prev, eta, noise)
                + (alpha_bar.sqrt() - alpha_bar_prev.sqrt()) * x_0
            ),
            "x_0 is taken to the noise level of the step before: its factor is sqrt(alpha_bar_prev).",
        ),
        Misconception(
            "alpha_bar for alpha_bar_prev in the direction",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar_prev.sqrt() * x_0
                + (1 - alpha_bar - _ddim_sigma(alpha_bar, alpha_bar_prev, eta) ** 2).sqrt() * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "The noise is taken to the level of the step before: the factor of eps has 1 - alpha_bar_prev.",
        ),
        Misconception(
            "back to the same step",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar.sqrt() * x_0
                + (1 - alpha_bar - _ddim_sigma(alpha_bar, alpha_bar_prev, eta) ** 2).sqrt() * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "With alpha_bar at t this makes x_t again: x_0 and eps are put together at the step before, with "
            "alpha_bar_prev.",
        ),
        Misconception(
            "t and t - 1 swapped",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar_prev, alpha_bar, eta, noise
            ),
            "alpha_bar and alpha_bar_prev have changed places: this steps towards noise.",
        ),
        Misconception(
            "x_0 and eps swapped",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                eps, x_0, alpha_bar, alpha_bar_prev, eta, noise
            ),
            "sqrt(alpha_bar_prev) belongs to x_0, and the direction's factor to eps.",
        ),
        Misconception(
            "eps and noise swapped",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, noise, alpha_bar, alpha_bar_prev, eta, eps
            ),
            "eps is the predicted noise, which gives the direction; sigma belongs to the fresh noise.",
        ),
        Misconception(
            "direction subtracted",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, -eps, alpha_bar, alpha_bar_prev, eta, noise
            ),
            "The direction points back to x_t: it is added.",
        ),
        Misconception(
            "fresh noise subtracted",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, eta, -noise
            ),
            "The noise is added. Subtracted, it has the same distribution, but the same seed gives another "
            "sample.",
        ),
        Misconception(
            "fresh noise for the argument",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0, eps, alpha_bar, alpha_bar_prev, eta, torch.randn_like(x_0)
            ),
            "It draws noise of its own: use the argument, so that a seed decides the sample.",
        ),
        Misconception(
            "sigma taken from the root",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: (
                alpha_bar_prev.sqrt() * x_0
                + ((1 - alpha_bar_prev).sqrt() - _ddim_sigma(alpha_bar, alpha_bar_prev, eta)) * eps
                + _ddim_sigma(alpha_bar, alpha_bar_prev, eta) * noise
            ),
            "Variances add up, not standard deviations: sigma^2 is taken off under the root.",
        ),
        Misconception(
            "x_0 clipped",
            lambda x_0, eps, alpha_bar, alpha_bar_prev, eta, noise: ddpm.ddim_update(
                x_0.clamp(-1, 1), eps, alpha_bar, alpha_bar_prev, eta, noise
            ),
            "Clipping happens before, where x_0 is predicted, and is switched off for latents and mixtures.",
        ),
        *schedule_mistakes(ddpm.ddim_update, "alpha_bar", "alpha_bar_prev"),
    ),
)


# What a denoiser is to return: x_0, eps, v, or a mixture of them, by the weights of the kind `target`
NOISE = (0.0, 1.0, 0.0)
TARGETS = (NOISE, (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.7, -1.1, 0.4))


def _target(weights: tuple[float, ...], dtype: torch.dtype) -> CallableArgument:
    return CallableArgument("target", (torch.tensor(weights, dtype=dtype),))


def _exact_prediction_cases(seed: int) -> list[Case]:
    points = [batch for batch in batches(seed) if len(batch.shape) == 2]
    cases = []
    for number, batch in enumerate(points):
        draws, dim = batch.draws, batch.shape[1]
        weights = draws.uniform(3, low=0.2, dtype=batch.dtype)
        means, stds = draws.normal(3, dim, dtype=batch.dtype), draws.uniform(3, low=0.3, dtype=batch.dtype)
        score = CallableArgument("mixture_score", (weights / weights.sum(), means, stds))
        target = _target(TARGETS[number % 4], batch.dtype)
        cases.append(Case(batch.note, (score, batch.normal(), batch.alpha_bar, target)))
    return cases


def _with_noise(noise: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """exact_prediction with another E[eps | x_t], a function of the score and alpha_bar."""

    def wrong(score, x_t, alpha_bar, target):
        eps = noise(score(x_t, alpha_bar), alpha_bar)
        return target(ddpm.x_0_from_eps(x_t, alpha_bar, eps), alpha_bar, eps)

    return wrong


def _with_expectations(given: Callable) -> Callable:
    """exact_prediction that gives the target other things than E[x_0 | x_t] and E[eps | x_t].

    given: a function of both, x_t, alpha_bar and the score that returns both.
    """

    def wrong(score, x_t, alpha_bar, target):
        gradient = score(x_t, alpha_bar)
        eps = -(1 - alpha_bar).sqrt() * gradient
        x_0 = ddpm.x_0_from_eps(x_t, alpha_bar, eps)
        x_0, eps = given(x_0, eps, x_t, alpha_bar, gradient)
        return target(x_0, alpha_bar, eps)

    return wrong


EXACT_PREDICTION = Exercise(
    "ddpm.exact_prediction",
    '"Noise and clean data", equation (1.22)',
    ddpm.exact_prediction,
    _exact_prediction_cases,
    (
        Misconception(
            "score for noise",
            _with_noise(lambda score, alpha_bar: score),
            "The score and the expected noise are proportional, not equal: (1.18) has a factor.",
        ),
        Misconception(
            "sign of the noise",
            _with_noise(lambda score, alpha_bar: (1 - alpha_bar).sqrt() * score),
            "The score points to where data are, and the noise away from there.",
        ),
        Misconception(
            "variance for standard deviation",
            _with_noise(lambda score, alpha_bar: -(1 - alpha_bar) * score),
            "The score is multiplied by the noise's variance; that is right for x_0, by (1.17). For the "
            "noise it is the standard deviation.",
        ),
        Misconception(
            "divided for multiplied",
            _with_noise(lambda score, alpha_bar: -score / (1 - alpha_bar).sqrt()),
            "The score is the noise divided by its standard deviation: the way back multiplies.",
        ),
        Misconception(
            "the signal's factor",
            _with_noise(lambda score, alpha_bar: -alpha_bar.sqrt() * score),
            "sqrt(alpha_bar) is what is left of the data. The score is measured in units of the noise.",
        ),
        Misconception(
            "noise whatever the target",
            lambda score, x_t, alpha_bar, target: -(1 - alpha_bar).sqrt() * score(x_t, alpha_bar),
            "This is the expected noise. What the network should return, `target` says.",
        ),
        Misconception(
            "clean data whatever the target",
            lambda score, x_t, alpha_bar, target: (
                (x_t + (1 - alpha_bar) * score(x_t, alpha_bar)) / alpha_bar.sqrt()
            ),
            "These are the expected clean data. What the network should return, `target` says.",
        ),
        Misconception(
            "x_t for x_0 in the target",
            _with_expectations(lambda x_0, eps, x_t, alpha_bar, score: (x_t, eps)),
            "The target's first argument is the clean data; x_t is noisy. (1.22) has the way from one to "
            "the other.",
        ),
        Misconception(
            "x_0 and eps swapped",
            _with_expectations(lambda x_0, eps, x_t, alpha_bar, score: (eps, x_0)),
            "The target takes the clean data first and the noise last.",
        ),
        Misconception(
            "root forgotten in x_0",
            _with_expectations(
                lambda x_0, eps, x_t, alpha_bar, score: ((x_t + (1 - alpha_bar) * score) / alpha_bar, eps)
            ),
            "x_0 is divided by its factor in x_t, which is a root.",
        ),
        Misconception(
            "x_0 not divided",
            _with_expectations(lambda x_0, eps, x_t, alpha_bar, score: (x_t + (1 - alpha_bar) * score, eps)),
            "x_t without its noise is the clean data times their factor: divide by it.",
        ),
        Misconception(
            "noise added to x_t",
            _with_expectations(
                lambda x_0, eps, x_t, alpha_bar, score: (
                    (x_t + (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(),
                    eps,
                )
            ),
            "To get from x_t to clean data, the noise is taken away.",
        ),
        Misconception(
            "noise not scaled in x_0",
            _with_expectations(lambda x_0, eps, x_t, alpha_bar, score: ((x_t - eps) / alpha_bar.sqrt(), eps)),
            "In x_t the noise has a factor of its own, its standard deviation: take away as much.",
        ),
        Misconception(
            "score of the clean data",
            lambda score, x_t, alpha_bar, target: ddpm.exact_prediction(
                lambda x_t, alpha_bar: score(x_t, torch.ones_like(alpha_bar)), x_t, alpha_bar, target
            ),
            "This is the score of q(x_0). At step t the score of q(x_t) is needed, at that step's alpha_bar.",
        ),
        Misconception(
            "score at x_t / sqrt(alpha_bar)",
            lambda score, x_t, alpha_bar, target: ddpm.exact_prediction(
                lambda x_t, alpha_bar: score(x_t / alpha_bar.sqrt(), alpha_bar), x_t, alpha_bar, target
            ),
            "q(x_t) is a density of x_t as it stands: its score is asked for there, not at the rescaled "
            "point.",
        ),
        Misconception(
            "one step for the whole batch",
            with_arguments(
                ddpm.exact_prediction, alpha_bar=lambda alpha_bar, **_: alpha_bar[:1].expand_as(alpha_bar)
            ),
            "The schedule at the first sample's step is used for all. Each sample has a step of its own.",
        ),
    ),
)


def _simple_loss_cases(seed: int) -> list[Case]:
    cases = []
    for number, batch in enumerate(batches(seed)):
        elements = math.prod(batch.shape[1:])
        denoiser = CallableArgument(
            "noisy_denoiser", batch.draws.denoiser_weights(elements, dtype=batch.dtype)
        )
        target = _target(TARGETS[number % 4], batch.dtype)
        given = denoiser, batch.normal(), batch.t, batch.normal(), batch.alpha_bar, target
        cases.append(Case(batch.note, given))
    return cases


def _with_error(of: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """simple_loss with another function of prediction and target."""

    def wrong(denoiser, x_0, t, noise, alpha_bar, target):
        prediction = denoiser(ddpm.q_sample(x_0, alpha_bar, noise), t)
        return of(prediction, target(x_0, alpha_bar, noise))

    return wrong


def _with_target(of: Callable) -> Callable:
    """simple_loss compared with another target, a function of the given one, x_0, alpha_bar, noise and "
    "x_t."""

    def wrong(denoiser, x_0, t, noise, alpha_bar, target):
        x_t = ddpm.q_sample(x_0, alpha_bar, noise)
        return (denoiser(x_t, t) - of(target, x_0, alpha_bar, noise, x_t)).square().mean()

    return wrong


def _with_noisy(x_t: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """simple_loss in which the denoiser is shown another x_t, a function of x_0, alpha_bar and the noise."""

    def wrong(denoiser, x_0, t, noise, alpha_bar, target):
        prediction = denoiser(x_t(x_0, alpha_bar, noise), t)
        return (prediction - target(x_0, alpha_bar, noise)).square().mean()

    return wrong


SIMPLE_LOSS = Exercise(
    "ddpm.simple_loss",
    '"From the bound to the simple loss", equation (1.34)',
    ddpm.simple_loss,
    _simple_loss_cases,
    (
        Misconception(
            "noise for the target",
            _with_target(lambda target, x_0, alpha_bar, noise, x_t: noise),
            "The prediction is compared with the noise, whatever the denoiser is to return: `target` says "
            "what.",
        ),
        Misconception(
            "clean data for the target",
            _with_target(lambda target, x_0, alpha_bar, noise, x_t: x_0),
            "The prediction is compared with x_0, whatever the denoiser is to return: `target` says what.",
        ),
        Misconception(
            "target of noisy data",
            _with_target(lambda target, x_0, alpha_bar, noise, x_t: target(x_t, alpha_bar, noise)),
            "The target is a function of the clean data and their noise; here it is given x_t.",
        ),
        Misconception(
            "x_0 and noise swapped in the target",
            _with_target(lambda target, x_0, alpha_bar, noise, x_t: target(noise, alpha_bar, x_0)),
            "The target takes the clean data first and the noise last.",
        ),
        Misconception(
            "denoiser sees clean data",
            _with_noisy(lambda x_0, alpha_bar, noise: x_0),
            "The denoiser is shown x_0. In sampling it will meet noisy data, so it is trained on x_t.",
        ),
        Misconception(
            "noise added without factors",
            _with_noisy(lambda x_0, alpha_bar, noise: x_0 + noise),
            "Signal and noise both have a factor in x_t, by (1.6).",
        ),
        Misconception(
            "signal and noise swapped",
            _with_noisy(lambda x_0, alpha_bar, noise: ddpm.q_sample(noise, alpha_bar, x_0)),
            "x_t is made with x_0 and the noise in each other's place.",
        ),
        Misconception(
            "roots forgotten",
            _with_noisy(lambda x_0, alpha_bar, noise: alpha_bar * x_0 + (1 - alpha_bar) * noise),
            "x_t is made with variances in the place of standard deviations.",
        ),
        Misconception(
            "noise of its own",
            _with_noisy(lambda x_0, alpha_bar, noise: ddpm.q_sample(x_0, alpha_bar, torch.randn_like(x_0))),
            "x_t is made with fresh noise. The denoiser can only learn the noise that it is shown.",
        ),
        Misconception(
            "t + 1 for the denoiser",
            with_arguments(ddpm.simple_loss, t=lambda t, **_: t + 1),
            "The denoiser is told the next step. Code counts from 0: hand t on as it is given.",
        ),
        Misconception(
            "one t for the whole batch",
            with_arguments(ddpm.simple_loss, t=lambda t, **_: t[:1].expand_as(t)),
            "The denoiser is told the first sample's step for all. Each sample has a step of its own.",
        ),
        Misconception(
            "prediction cut off",
            _with_error(lambda prediction, target: (prediction.detach() - target).square().mean()),
            "The value is right, but no gradient reaches the denoiser, so it cannot learn: no no_grad() and "
            "no detach() around the prediction.",
        ),
        Misconception(
            "sum for mean",
            _with_error(lambda prediction, target: (prediction - target).square().sum()),
            "The squares are added up. A mean does not depend on the size of batch and images.",
        ),
        Misconception(
            "elements added up",
            _with_error(lambda prediction, target: (prediction - target).square().sum() / len(target)),
            "The mean is over the samples only, and the elements are added up: average over both.",
        ),
        Misconception(
            "root of the mean",
            _with_error(lambda prediction, target: (prediction - target).square().mean().sqrt()),
            "This is the root of the loss. Its minimum is the same, but the gradient is another one.",
        ),
        Misconception(
            "absolute error",
            _with_error(lambda prediction, target: (prediction - target).abs().mean()),
            "An absolute error teaches the median; the score is in the mean, which a squared error teaches.",
        ),
        Misconception(
            "half of the square",
            _with_error(lambda prediction, target: 0.5 * (prediction - target).square().mean()),
            "(1.34) has no factor of one half.",
        ),
        Misconception(
            "square of the mean",
            _with_error(lambda prediction, target: (prediction - target).mean().square()),
            "Here errors of opposite sign cancel: square first, then average.",
        ),
        *schedule_mistakes(ddpm.simple_loss, "alpha_bar"),
    ),
)


def _training_step_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    side, wide = draws.integer(4, 5), draws.integer(6, 8)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, shape, dtype in (
        ("points", (side, wide), float64),
        ("images", (side, 3, 2, wide), float64),
        ("one sample", (1, wide), float64),
        ("a large batch", (40, 2), float64),
        ("points in float32", (side, wide), float32),
        ("images in float32", (side, 1, 3, 3), float32),
        ("a square", (side, side), float64),
    ):
        weights = draws.denoiser_weights(math.prod(shape[1:]), dtype=dtype, gradient=True)
        old = tuple(draws.normal(*weight.shape, dtype=dtype) for weight in weights)
        optimizer = OptimizerArgument(weights, old, draws.uniform(1, low=0.05, high=0.2).item())
        loss_of = CallableArgument("denoising_loss", weights)
        x_0, noise = draws.normal(*shape, dtype=dtype), draws.normal(*shape, dtype=dtype)
        cases.append(Case(note, (optimizer, loss_of, x_0, draws.steps(shape[0], 100), noise)))
    return cases


def _stepping(step: Callable) -> Callable:
    """training_step with another use of the optimizer, a function of it and of one that gives the loss."""
    return lambda optimizer, loss_of, *batch: step(optimizer, lambda: loss_of(*batch))


def _gradient_taken_twice(optimizer, loss_of, x_0, t, noise):
    optimizer.zero_grad()
    loss_of(x_0, t, noise).backward()
    loss = loss_of(x_0, t, noise)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _with_factor(factor: Callable[[Tensor], float]) -> Callable:
    """training_step along the gradient of the loss times a factor, a function of x_0."""

    def wrong(optimizer, loss_of, x_0, t, noise):
        optimizer.zero_grad()
        loss = loss_of(x_0, t, noise)
        (factor(x_0) * loss).backward()
        optimizer.step()
        return loss.detach()

    return wrong


TRAINING_STEP = Exercise(
    "ddpm.training_step",
    '"A network learns the mixture"',
    ddpm.training_step,
    _training_step_cases,
    (
        *step_mistakes(_stepping),
        Misconception(
            "gradient taken twice",
            _gradient_taken_twice,
            "The loss is computed and differentiated twice, and the gradients add up.",
        ),
        Misconception(
            "uphill",
            _with_factor(lambda x_0: -1.0),
            "The weights move up the loss. The optimizer goes against the gradient by itself.",
        ),
        Misconception(
            "gradient summed over the batch",
            _with_factor(len),
            "The loss is a mean already; here its gradient grows with the batch.",
        ),
        Misconception(
            "divided by the batch again",
            _with_factor(lambda x_0: 1 / len(x_0)),
            "The loss is a mean already; here it is divided by the size of the batch once more.",
        ),
        Misconception(
            "data and noise swapped",
            lambda optimizer, loss_of, x_0, t, noise: ddpm.training_step(optimizer, loss_of, noise, t, x_0),
            "The loss takes x_0 first, then t, then the noise.",
        ),
        Misconception(
            "noise of its own",
            lambda optimizer, loss_of, x_0, t, noise: ddpm.training_step(
                optimizer, loss_of, x_0, t, torch.randn_like(noise)
            ),
            "The noise is drawn anew. The batch is given: x_0, t and noise.",
        ),
        Misconception(
            "one t for the whole batch",
            lambda optimizer, loss_of, x_0, t, noise: ddpm.training_step(
                optimizer, loss_of, x_0, t[:1].expand_as(t), noise
            ),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "t + 1",
            lambda optimizer, loss_of, x_0, t, noise: ddpm.training_step(
                optimizer, loss_of, x_0, t + 1, noise
            ),
            "The loss is told the next step. Code counts from 0: hand t on as it is given.",
        ),
    ),
)


def _reverse_chain_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    side, wide = draws.integer(3, 4), draws.integer(5, 6)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, shape, num_steps, dtype, mode in (
        ("points", (side, wide), 5, float64, "grad"),
        ("images", (side, 2, 3, wide), draws.integer(3, 6), float64, "grad"),
        ("a square", (side, side), draws.integer(7, 9), float64, "no_grad"),
        ("one sample", (1, wide), 4, float64, "grad"),
        ("a single step", (side, 2), 1, float64, "grad"),
        ("float32", (side, wide), 6, float32, "no_grad"),
        ("many steps", (2, 3), 20, float64, "grad"),
        ("inference mode", (side, 1, 2, 2), 4, float64, "inference_mode"),
    ):
        elements = math.prod(shape[1:])
        mixing = draws.normal(elements, elements, dtype=dtype) / math.sqrt(elements)
        step = CallableArgument("sampler_step", (mixing, draws.normal(elements, dtype=dtype)))
        noise_at = CallableArgument("noise_table", (draws.normal(num_steps, *shape, dtype=dtype),))
        gradient = note == "images"
        x_T = draws.normal(*shape, dtype=dtype, gradient=gradient)
        cases.append(Case(note, (step, x_T, num_steps, noise_at), mode))
    return cases


def _chain(
    order: Callable = lambda num_steps: reversed(range(num_steps)),
    told: Callable = lambda index: index,
    noise: Callable = lambda noise_at, index, num_steps, x_t: noise_at(index),
    after: Callable = lambda x_t: x_t,
    restart: bool = False,
) -> Callable:
    """reverse_chain with something changed.

    order: of the steps; told: the number that a step is told; noise: that it gets; after: what is done to its
    result; restart: whether each step begins with x_T.
    """

    def wrong(step, x_T, num_steps, noise_at):
        x_t = x_T
        for index in order(num_steps):
            t = torch.full((len(x_t),), told(index))
            x_t = after(step(x_T if restart else x_t, t, noise(noise_at, index, num_steps, x_t)))
        return x_t

    return wrong


REVERSE_CHAIN = Exercise(
    "ddpm.reverse_chain",
    '"From noise to data"',
    ddpm.reverse_chain,
    _reverse_chain_cases,
    (
        Misconception(
            "forwards",
            _chain(order=range),
            "The steps are taken from 0 upwards. Sampling begins with the noisiest one.",
        ),
        Misconception(
            "t counted from 1",
            _chain(told=lambda index: index + 1),
            "The steps are told the papers' t, from T to 1. Code counts from 0.",
        ),
        Misconception(
            "one t for the whole batch",
            lambda step, x_T, num_steps, noise_at: ddpm.reverse_chain(
                lambda x_t, t, noise: step(x_t, t[:1], noise), x_T, num_steps, noise_at
            ),
            "t has one element. Each sample of the batch has its own, even where all are at the same step.",
        ),
        Misconception(
            "last step left out",
            _chain(order=lambda num_steps: range(num_steps - 1, 0, -1)),
            "The step of t = 0, the last one, is missing: a range does not contain its end.",
        ),
        Misconception(
            "first step left out",
            _chain(order=lambda num_steps: range(num_steps - 2, -1, -1)),
            "The step of t = num_steps - 1, the first one taken, is missing.",
        ),
        Misconception(
            "last step taken twice",
            _chain(order=lambda num_steps: [*reversed(range(num_steps)), 0]),
            "There is one step too many: num_steps steps lead from x_T to x_0.",
        ),
        Misconception(
            "every step from x_T",
            _chain(restart=True),
            "Each step begins again with x_T. It goes on from where the step before has come to.",
        ),
        Misconception(
            "one noise for all steps",
            _chain(noise=lambda noise_at, index, num_steps, x_t: noise_at(num_steps - 1)),
            "Every step gets the noise of the first one. The steps' noises must be independent.",
        ),
        Misconception(
            "noises in the other order",
            _chain(noise=lambda noise_at, index, num_steps, x_t: noise_at(num_steps - 1 - index)),
            "The noises are numbered like the steps: that of step t is noise_at(t), not that of the t-th "
            "call.",
        ),
        Misconception(
            "no noise",
            _chain(noise=lambda noise_at, index, num_steps, x_t: torch.zeros_like(x_t)),
            "The steps get no noise. Each gets its own.",
        ),
        Misconception(
            "no noise in the last step",
            _chain(
                noise=lambda noise_at, index, num_steps, x_t: (
                    noise_at(index) if index > 0 else torch.zeros_like(x_t)
                )
            ),
            "The noise of the last step is left out here. Leaving it out is for the step itself to do: it "
            "knows t.",
        ),
        Misconception(
            "noise of its own",
            _chain(noise=lambda noise_at, index, num_steps, x_t: torch.randn_like(x_t)),
            "The noise is drawn anew. Use the one that is given, so that a seed decides the sample.",
        ),
        Misconception(
            "x_t for the noise",
            _chain(noise=lambda noise_at, index, num_steps, x_t: x_t),
            "The step is given x_t in the place of its noise.",
        ),
        Misconception(
            "clipped on the way",
            _chain(after=lambda x_t: x_t.clamp(-1, 1)),
            "x_t is clamped to [-1, 1]. It is noisy, and noise has no such bounds; only a predicted x_0 may "
            "be clipped, and the step does that.",
        ),
        Misconception(
            "noise for x_T",
            lambda step, x_T, num_steps, noise_at: ddpm.reverse_chain(
                step, noise_at(num_steps - 1), num_steps, noise_at
            ),
            "The chain begins with the noise of the first step. It begins with x_T.",
        ),
    ),
)


def _respacing_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    cases = []
    for schedule, num_steps, kept, original, dtype in (
        (ddpm.linear_betas, 1000, 20, 1000, torch.float64),
        (ddpm.cosine_betas, 400, 10, 1000, torch.float64),
        (ddpm.cosine_betas, draws.integer(50, 300), 8, 1000, torch.float64),
        (ddpm.linear_betas, draws.integer(60, 100), 6, 400, torch.float64),
        (ddpm.linear_betas, 31, 4, 90, torch.float64),
        (ddpm.linear_betas, draws.integer(100, 200), 2, 300, torch.float64),
        (ddpm.linear_betas, 700, 12, 1000, torch.float32),
    ):
        # an even number of kept steps never falls on the half between two
        alpha_bar = (1 - schedule(num_steps)).cumprod(0).to(dtype)  # (T,)
        original_steps = draws.steps(num_steps, original).sort().values
        note = f"{kept} of {num_steps} steps of {schedule.__name__}, once {original}"
        cases.append(Case(note, (alpha_bar, original_steps, kept)))
    return cases


def _kept_steps(alpha_bar: Tensor, num_steps: int) -> Tensor:
    return torch.linspace(0, len(alpha_bar) - 1, num_steps, dtype=torch.float64).round().long()


def _alpha_bar_before(alpha_bar: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def _with_kept(choose: Callable[[int, int], Tensor]) -> Callable:
    """respacing to other steps, a function of T and S."""

    def wrong(alpha_bar, original_steps, num_steps):
        kept = choose(len(alpha_bar), num_steps)
        return ddpm.respaced_betas(alpha_bar, kept), original_steps[kept]

    return wrong


def _with_betas(betas: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """respacing with other betas, a function of alpha_bar and the kept steps."""

    def wrong(alpha_bar, original_steps, num_steps):
        kept = _kept_steps(alpha_bar, num_steps)
        return betas(alpha_bar, kept), original_steps[kept]

    return wrong


def _with_told(told: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """respacing with other steps told to the denoiser, a function of original_steps and the kept ones."""

    def wrong(alpha_bar, original_steps, num_steps):
        kept = _kept_steps(alpha_bar, num_steps)
        return ddpm.respaced_betas(alpha_bar, kept), told(original_steps, kept)

    return wrong


def _evenly(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


RESPACING = Exercise(
    "ddpm.respacing",
    '"Fewer steps", equation (1.43)',
    ddpm.respacing,
    _respacing_cases,
    (
        Misconception(
            "every k-th step",
            _with_kept(lambda total, count: torch.arange(0, total, total // count)[:count]),
            "With every k-th step from 0 on, the last one is not kept, and the chain does not begin at "
            "noise.",
        ),
        Misconception(
            "last step not kept",
            _with_kept(lambda total, count: _evenly(0, total, count + 1)[:-1].round().long()),
            "The steps are even, but the last one is not among them, and the chain does not begin at noise.",
        ),
        Misconception(
            "first step not kept",
            _with_kept(lambda total, count: (_evenly(0, total, count + 1)[1:] - 1).round().long()),
            "The steps are even, but the first one is not among them: the last move to the data is a long "
            "one.",
        ),
        Misconception(
            "cut down for rounded",
            _with_kept(lambda total, count: _evenly(0, total - 1, count).long()),
            "Converting to whole numbers cuts off what is behind the point. Round to the nearest.",
        ),
        Misconception(
            "quadratic",
            _with_kept(lambda total, count: (_evenly(0, math.sqrt(total - 1), count) ** 2).round().long()),
            "The steps are denser near the data, as in one of DDIM's variants. Here they are even.",
        ),
        Misconception(
            "the last steps only",
            _with_kept(lambda total, count: torch.arange(total - count, total)),
            "These are neighbours at the noisy end. Spread the steps over the whole schedule.",
        ),
        Misconception(
            "from noise to data",
            _with_kept(lambda total, count: _evenly(0, total - 1, count).round().long().flip(0)),
            "The steps run backwards. A schedule is written from data to noise; the sampler turns it round.",
        ),
        Misconception(
            "own steps told",
            _with_told(lambda original_steps, kept: kept),
            "These are the steps of the schedule that is shortened, and it may be a short one itself: look "
            "up which original ones they stand for.",
        ),
        Misconception(
            "steps counted anew",
            _with_told(lambda original_steps, kept: torch.arange(len(kept))),
            "The network is told 0, 1, 2, ... It has learned the original steps, and would take the data "
            "for far less noisy than they are.",
        ),
        Misconception(
            "original steps counted from 1",
            _with_told(lambda original_steps, kept: original_steps[kept] + 1),
            "The original steps are told by one too high: code counts from 0 everywhere.",
        ),
        Misconception(
            "first of the original steps",
            _with_told(lambda original_steps, kept: original_steps[: len(kept)]),
            "These are the first few original steps, not those of the steps that are kept.",
        ),
        Misconception(
            "old betas at the kept steps",
            _with_betas(lambda alpha_bar, kept: (1 - alpha_bar / _alpha_bar_before(alpha_bar))[kept]),
            "These are the betas of single steps. A step of the short schedule covers several.",
        ),
        Misconception(
            "old betas, scaled",
            _with_betas(
                lambda alpha_bar, kept: (
                    (1 - alpha_bar / _alpha_bar_before(alpha_bar))[kept] * (len(alpha_bar) / len(kept))
                )
            ),
            "Scaled betas only come near: their alpha_bar must equal the long schedule's at the kept steps "
            "exactly.",
        ),
        Misconception(
            "alpha_bar for betas",
            _with_betas(lambda alpha_bar, kept: alpha_bar[kept]),
            "This is alpha_bar at the kept steps; asked for are the betas that it comes from.",
        ),
        Misconception(
            "alphas for betas",
            _with_betas(lambda alpha_bar, kept: alpha_bar[kept] / _alpha_bar_before(alpha_bar[kept])),
            "This is alpha', what a step keeps; asked for is what it adds in noise.",
        ),
        Misconception(
            "1 - alpha_bar for betas",
            _with_betas(lambda alpha_bar, kept: 1 - alpha_bar[kept]),
            "1 - alpha_bar is the noise since the beginning; a beta is the noise since the kept step before.",
        ),
        Misconception(
            "results swapped",
            lambda alpha_bar, original_steps, num_steps: ddpm.respacing(alpha_bar, original_steps, num_steps)[
                ::-1
            ],
            "The betas come first, then the original steps.",
        ),
    ),
)


EXERCISES = [
    Q_SAMPLE,
    POSTERIOR_MEAN,
    EXACT_PREDICTION,
    SIMPLE_LOSS,
    ANCESTRAL_UPDATE,
    DDIM_UPDATE,
    REVERSE_CHAIN,
    RESPACING,
    TRAINING_STEP,
    V_FROM_X_0_AND_EPS,
]
