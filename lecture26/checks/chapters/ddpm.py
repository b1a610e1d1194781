"""Exercises of chapter 01: schedules, forward process, posterior, predictions, the bound, steps."""

import math

import torch
from torch import Tensor

from lecture26 import ddpm

from ..core import Case, Exercise, Misconception
from ..draws import Draws, batches, schedule_tables
from ..mistakes import per_sample, schedule_mistakes


def _linear_betas_cases(seed: int) -> list[Case]:
    drawn = Draws(seed).integer(31, 900)
    return [Case("a schedule", (num_steps,)) for num_steps in (1000, 21, 30, 100, drawn, 250)]


LINEAR_BETAS = Exercise(
    "ddpm.linear_betas",
    '"A schedule", equation (1.3)',
    ddpm.linear_betas,
    _linear_betas_cases,
    (
        Misconception(
            "betas not scaled at other T",
            lambda num_steps: torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64),
            "1e-4 and 0.02 belong to T = 1000. With fewer steps each must add more noise, by the factor 1000 "
            "/ T, or the chain never reaches noise.",
        ),
        Misconception(
            "scaled by T / 1000",
            lambda num_steps: torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64) * num_steps / 1000,
            "The factor is upside down: fewer steps need larger betas, so it is 1000 / T.",
        ),
        Misconception(
            "only the last beta scaled",
            lambda num_steps: torch.linspace(1e-4, 20 / num_steps, num_steps, dtype=torch.float64),
            "Both ends of the schedule are multiplied by 1000 / T, the first one too.",
        ),
        Misconception(
            "only the first beta scaled",
            lambda num_steps: torch.linspace(0.1 / num_steps, 0.02, num_steps, dtype=torch.float64),
            "Both ends of the schedule are multiplied by 1000 / T, the last one too.",
        ),
        Misconception(
            "computed in float32",
            lambda num_steps: torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps).double(),
            "The values are rounded to float32. alpha_bar is a product of up to thousands of them, so the "
            "tables are float64 from the start: give linspace dtype=torch.float64.",
        ),
        Misconception(
            "float32 result",
            lambda num_steps: torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps),
            "linspace gives float32 unless told otherwise: give it dtype=torch.float64.",
        ),
        Misconception(
            "last value left out",
            lambda num_steps: (
                (0.1 + 19.9 * torch.arange(num_steps, dtype=torch.float64) / num_steps) / num_steps
            ),
            "The first beta is 0.1 / T and the last one exactly 20 / T: T values have T - 1 gaps between "
            "them.",
        ),
        Misconception(
            "first value left out",
            lambda num_steps: torch.linspace(
                0.1 / num_steps, 20 / num_steps, num_steps + 1, dtype=torch.float64
            )[1:],
            "The first beta is exactly 0.1 / T. The schedule has T values, and none is kept for 'step 0'.",
        ),
        Misconception(
            "one value too many",
            lambda num_steps: torch.linspace(
                0.1 / num_steps, 20 / num_steps, num_steps + 1, dtype=torch.float64
            ),
            "The schedule has T values, for the steps 1..T of the papers: there is no beta for clean data.",
        ),
        Misconception(
            "falling instead of rising",
            lambda num_steps: torch.linspace(20 / num_steps, 0.1 / num_steps, num_steps, dtype=torch.float64),
            "The first steps add the least noise: the schedule rises from 0.1 / T to 20 / T.",
        ),
        Misconception(
            "alphas instead of betas",
            lambda num_steps: 1 - ddpm.linear_betas(num_steps),
            "These are alpha = 1 - beta, the signal that each step keeps; asked for is beta, the noise it "
            "adds.",
        ),
        Misconception(
            "alpha_bar instead of betas",
            lambda num_steps: (1 - ddpm.linear_betas(num_steps)).cumprod(0),
            "This is alpha_bar, the product of all 1 - beta so far; asked for are the betas themselves.",
        ),
        Misconception(
            "linear in the square root",
            lambda num_steps: (
                torch.linspace(
                    (0.1 / num_steps) ** 0.5, (20 / num_steps) ** 0.5, num_steps, dtype=torch.float64
                )
                ** 2
            ),
            "Here sqrt(beta) grows linearly, as in Stable Diffusion's 'scaled linear' schedule. In this one "
            "beta does.",
        ),
        Misconception(
            "geometric instead of linear",
            lambda num_steps: torch.logspace(
                math.log10(0.1 / num_steps), math.log10(20 / num_steps), num_steps, dtype=torch.float64
            ),
            "Neighbouring betas have a constant ratio here; in a linear schedule they have a constant "
            "difference.",
        ),
    ),
)


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


def _posterior_variance_cases(seed: int) -> list[Case]:
    gathered = [Case(b.note, (b.beta, b.alpha_bar, b.alpha_bar_prev)) for b in batches(seed)]
    tables = schedule_tables(ddpm.cosine_betas(Draws(seed).integer(30, 60)))
    return [*gathered, Case("whole tables of cosine_betas", tables)]


POSTERIOR_VARIANCE = Exercise(
    "ddpm.posterior_variance",
    '"Going back, when the clean data are known", equation (1.14)',
    ddpm.posterior_variance,
    _posterior_variance_cases,
    (
        Misconception(
            "beta for beta~",
            lambda beta, alpha_bar, alpha_bar_prev: beta.clone(),
            "beta is the variance of x_t given x_{t-1}. Knowing x_0 as well makes it smaller, by the factor "
            "(1 - alpha_bar_prev) / (1 - alpha_bar).",
        ),
        Misconception(
            "fraction upside down",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar) / (1 - alpha_bar_prev) * beta,
            "t and t - 1 have changed places in the fraction: beta~ is smaller than beta, and 0 at the first "
            "step.",
        ),
        Misconception(
            "standard deviation for variance",
            lambda beta, alpha_bar, alpha_bar_prev: ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).sqrt(),
            "This is the standard deviation; asked for is the variance, without the root.",
        ),
        Misconception(
            "logarithm of the variance",
            lambda beta, alpha_bar, alpha_bar_prev: ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).log(),
            "This is the log-variance, which is -inf at the first step; asked for is the variance.",
        ),
        Misconception(
            "1 - beta for beta",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - beta),
            "The fraction multiplies beta, the noise of this step, not alpha = 1 - beta.",
        ),
        Misconception(
            "root of beta",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) / (1 - alpha_bar) * beta.sqrt(),
            "The fraction multiplies beta, which is a variance already.",
        ),
        Misconception(
            "roots in the fraction",
            lambda beta, alpha_bar, alpha_bar_prev: (
                (1 - alpha_bar_prev).sqrt() / (1 - alpha_bar).sqrt() * beta
            ),
            "1 - alpha_bar_prev and 1 - alpha_bar are variances: a variance has no roots in it.",
        ),
        Misconception(
            "roots of alpha_bar",
            lambda beta, alpha_bar, alpha_bar_prev: (
                (1 - alpha_bar_prev.sqrt()) / (1 - alpha_bar.sqrt()) * beta
            ),
            "The variances are 1 - alpha_bar, without a root of alpha_bar.",
        ),
        Misconception(
            "alpha_bar for 1 - alpha_bar",
            lambda beta, alpha_bar, alpha_bar_prev: alpha_bar_prev / alpha_bar * beta,
            "The fraction is one of noise variances, 1 - alpha_bar; alpha_bar is the variance of the signal.",
        ),
        Misconception(
            "alpha_bar for 1 - alpha_bar, upside down",
            lambda beta, alpha_bar, alpha_bar_prev: alpha_bar / alpha_bar_prev * beta,
            "The fraction is one of noise variances, 1 - alpha_bar_prev above 1 - alpha_bar. alpha_bar / "
            "alpha_bar_prev is alpha_t.",
        ),
        Misconception(
            "denominator forgotten",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) * beta,
            "The product is divided by 1 - alpha_bar.",
        ),
        Misconception(
            "numerator forgotten",
            lambda beta, alpha_bar, alpha_bar_prev: beta / (1 - alpha_bar),
            "The factor 1 - alpha_bar_prev is missing; it makes the variance 0 at the first step.",
        ),
        Misconception(
            "beta not multiplied",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) / (1 - alpha_bar),
            "This is the factor that belongs to beta, alone. Without the brackets of its numerator, "
            "1 - alpha_bar_prev / (1 - alpha_bar) * beta comes to the same.",
        ),
        Misconception(
            "brackets of the denominator forgotten",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) / 1 - alpha_bar * beta,
            "Without brackets a / 1 - b is (a / 1) - b: the denominator is (1 - alpha_bar).",
        ),
        Misconception(
            "beta squared",
            lambda beta, alpha_bar, alpha_bar_prev: (1 - alpha_bar_prev) / (1 - alpha_bar) * beta**2,
            "beta is a variance already: it is not squared.",
        ),
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


X_0_FROM_V = Exercise(
    "ddpm.x_0_from_v",
    '"The velocity", equation (1.45)',
    ddpm.x_0_from_v,
    _velocity_cases,
    (
        Misconception(
            "plus for minus",
            lambda x_t, alpha_bar, v: alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * v,
            "Turning back from x_t to x_0 subtracts v: put x_t and v in terms of x_0 and eps, and eps must "
            "cancel.",
        ),
        Misconception(
            "wrong sign",
            lambda x_t, alpha_bar, v: (1 - alpha_bar).sqrt() * v - alpha_bar.sqrt() * x_t,
            "This is -x_0: x_t has the plus sign, v the minus sign.",
        ),
        Misconception(
            "eps for x_0",
            lambda x_t, alpha_bar, v: ddpm.eps_from_v(x_t, alpha_bar, v),
            "This is eps, sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t; asked for is x_0.",
        ),
        Misconception(
            "factors swapped",
            lambda x_t, alpha_bar, v: (1 - alpha_bar).sqrt() * x_t - alpha_bar.sqrt() * v,
            "sqrt(alpha_bar) belongs to x_t and sqrt(1 - alpha_bar) to v: with no noise at all, x_0 is x_t.",
        ),
        Misconception(
            "x_t and v swapped",
            lambda x_t, alpha_bar, v: alpha_bar.sqrt() * v - (1 - alpha_bar).sqrt() * x_t,
            "x_t and v have changed places: with no noise at all, x_0 is x_t.",
        ),
        Misconception(
            "v taken for eps",
            lambda x_t, alpha_bar, v: ddpm.x_0_from_eps(x_t, alpha_bar, v),
            "This solves for x_0 with eps given. With v nothing is divided: the two are a rotation of x_0 "
            "and eps.",
        ),
        Misconception(
            "divided by the root",
            lambda x_t, alpha_bar, v: x_t / alpha_bar.sqrt() - (1 - alpha_bar).sqrt() * v,
            "x_t is multiplied by sqrt(alpha_bar): the inverse of a rotation is the rotation back, without a "
            "division.",
        ),
        Misconception(
            "roots forgotten",
            lambda x_t, alpha_bar, v: alpha_bar * x_t - (1 - alpha_bar) * v,
            "The factors are cosine and sine of an angle, sqrt(alpha_bar) and sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "alpha_bar for its root",
            lambda x_t, alpha_bar, v: alpha_bar * x_t - (1 - alpha_bar).sqrt() * v,
            "The factor of x_t is sqrt(alpha_bar).",
        ),
        Misconception(
            "1 - alpha_bar for its root",
            lambda x_t, alpha_bar, v: alpha_bar.sqrt() * x_t - (1 - alpha_bar) * v,
            "The factor of v is sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "clipped to [-1, 1]",
            lambda x_t, alpha_bar, v: ddpm.x_0_from_v(x_t, alpha_bar, v).clamp(-1, 1),
            "Clipping is the sampler's affair, and switched off for latents and mixtures: return x_0 as it "
            "comes.",
        ),
        *schedule_mistakes(ddpm.x_0_from_v, "alpha_bar"),
    ),
)


def _learned_range_cases(seed: int) -> list[Case]:
    cases = []
    for b in batches(seed):
        # beta~ is 0 at the first step, where any floor will do for its logarithm
        variance = ddpm.posterior_variance(b.beta, b.alpha_bar, b.alpha_bar_prev).clamp(min=1e-6)
        cases.append(Case(b.note, (b.normal(), b.beta, variance.log())))
    return cases


LEARNED_RANGE_LOG_VARIANCE = Exercise(
    "ddpm.learned_range_log_variance",
    '"The model\'s step", equation (1.30)',
    ddpm.learned_range_log_variance,
    _learned_range_cases,
    (
        Misconception(
            "v itself as the fraction",
            lambda v, beta, log_posterior_variance: v * beta.log() + (1 - v) * log_posterior_variance,
            "v runs from -1 to 1, a fraction from 0 to 1: use (v + 1) / 2.",
        ),
        Misconception(
            "v / 2 as the fraction",
            lambda v, beta, log_posterior_variance: v / 2 * beta.log() + (1 - v / 2) * log_posterior_variance,
            "At v = -1 the fraction must be 0, at v = 1 it must be 1: use (v + 1) / 2.",
        ),
        Misconception(
            "v + 1 not halved",
            lambda v, beta, log_posterior_variance: (v + 1) * beta.log() - v * log_posterior_variance,
            "v + 1 runs from 0 to 2, a fraction from 0 to 1: halve it.",
        ),
        Misconception(
            "(v - 1) / 2 as the fraction",
            lambda v, beta, log_posterior_variance: (
                (v - 1) / 2 * beta.log() + (3 - v) / 2 * log_posterior_variance
            ),
            "At v = -1 the fraction must be 0, at v = 1 it must be 1: use (v + 1) / 2.",
        ),
        Misconception(
            "bounds swapped",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                -v, beta, log_posterior_variance
            ),
            "The fraction belongs to log beta, the upper bound, which v = 1 must give.",
        ),
        Misconception(
            "sigmoid as the fraction",
            lambda v, beta, log_posterior_variance: (
                v.sigmoid() * beta.log() + (1 - v.sigmoid()) * log_posterior_variance
            ),
            "The fraction is linear in v, (v + 1) / 2, not a sigmoid of it.",
        ),
        Misconception(
            "v clamped",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                v.clamp(-1, 1), beta, log_posterior_variance
            ),
            "v is not clamped: outside [-1, 1] the log-variance goes on in a straight line, and its gradient "
            "with it.",
        ),
        Misconception(
            "variances mixed instead of their logarithms",
            lambda v, beta, log_posterior_variance: (
                (v + 1) / 2 * beta + (1 - v) / 2 * log_posterior_variance.exp()
            ).log(),
            "The two log-variances are mixed, not the variances: this gives NaN where v leaves [-1, 1].",
        ),
        Misconception(
            "logarithm of beta forgotten",
            lambda v, beta, log_posterior_variance: (v + 1) / 2 * beta + (1 - v) / 2 * log_posterior_variance,
            "beta comes as a variance and must be turned into its logarithm; the lower bound comes as one "
            "already.",
        ),
        Misconception(
            "variance instead of its logarithm",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                v, beta, log_posterior_variance
            ).exp(),
            "This is the variance; asked for is its logarithm.",
        ),
        Misconception(
            "half of the log-variance",
            lambda v, beta, log_posterior_variance: (
                0.5 * ddpm.learned_range_log_variance(v, beta, log_posterior_variance)
            ),
            "This is the logarithm of the standard deviation; asked for is that of the variance, twice as "
            "large.",
        ),
        Misconception(
            "brackets of the fraction forgotten",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                2 * v, beta, log_posterior_variance
            ),
            "v + 1 / 2 is v + 0.5: write (v + 1) / 2.",
        ),
        Misconception(
            "tanh of v",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                v.tanh(), beta, log_posterior_variance
            ),
            "v goes in as it is, without a tanh; nothing keeps it within [-1, 1].",
        ),
        Misconception(
            "logarithm of the lower bound taken twice",
            lambda v, beta, log_posterior_variance: ddpm.learned_range_log_variance(
                v, beta, log_posterior_variance.log()
            ),
            "The lower bound comes as a logarithm already; beta does not.",
        ),
        *schedule_mistakes(ddpm.learned_range_log_variance, "beta", "log_posterior_variance"),
    ),
)


def _normal_kl_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, wide, side = draws.integer(3, 5), draws.integer(6, 8), draws.integer(3, 5)
    points, images = (batch, wide), (batch, 3, side, side)

    def four(*shapes, dtype=torch.float64, gradient=False):
        return tuple(draws.normal(*shape, dtype=dtype, gradient=gradient) for shape in shapes)

    mean, log_variance = four(points, points)
    zero = torch.zeros((), dtype=torch.float64)
    return [
        Case("points", four(*[points] * 4)),
        Case("images", four(*[images] * 4)),
        Case("a single point", four(*[(1, wide)] * 4)),
        Case("one log-variance per sample", four(points, (batch, 1), points, (batch, 1))),
        Case("images in float32", four(*[images] * 4, dtype=torch.float32)),
        Case("points with gradient", four(*[points] * 4, gradient=True)),
        Case("twice the same normal", (mean, log_variance, mean.clone(), log_variance.clone())),
        Case("against the standard normal", (mean, log_variance, zero, zero.clone())),
    ]


def _kl_of_terms(
    log_ratio: Tensor, variance_ratio: Tensor | float, scaled_distance: Tensor | float
) -> Tensor:
    """The divergence from its terms, right or wrong ones."""
    return 0.5 * (log_ratio + variance_ratio + scaled_distance - 1)


NORMAL_KL = Exercise(
    "ddpm.normal_kl",
    '"The bound", equation (1.29)',
    ddpm.normal_kl,
    _normal_kl_cases,
    (
        Misconception(
            "arguments reversed",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: ddpm.normal_kl(
                mean_2, log_variance_2, mean_1, log_variance_1
            ),
            "This is KL(N_2 || N_1). The divergence is not symmetric: the first normal is the one averaged "
            "over.",
        ),
        Misconception(
            "factor 1/2 forgotten",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                2 * ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)
            ),
            "Twice the right value: the factor 1/2 of the normal's exponent is missing.",
        ),
        Misconception(
            "1/2 for the last terms only",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)
                + 0.5 * (log_variance_2 - log_variance_1)
            ),
            "log(sigma_2 / sigma_1) is half of log_variance_2 - log_variance_1: the factor 1/2 stands before "
            "all terms.",
        ),
        Misconception(
            "- 1 forgotten",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2) + 0.5
            ),
            "The term - 1 is missing: for two equal normals the divergence must be 0.",
        ),
        Misconception(
            "- 1 not halved",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2) - 0.5
            ),
            "The factor 1/2 stands before - 1 too: for two equal normals the divergence must be 0.",
        ),
        Misconception(
            "sign of the log ratio",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)
                + log_variance_1
                - log_variance_2
            ),
            "The log ratio has the second variance above the first: a wide second normal costs log sigma_2.",
        ),
        Misconception(
            "log ratio forgotten",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)
                - 0.5 * (log_variance_2 - log_variance_1)
            ),
            "The term log(sigma_2^2 / sigma_1^2) is missing.",
        ),
        Misconception(
            "variance ratio upside down",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (log_variance_2 - log_variance_1).exp(),
                (mean_1 - mean_2) ** 2 * (-log_variance_2).exp(),
            ),
            "The ratio is sigma_1^2 / sigma_2^2: the spread of the first normal, measured in units of the "
            "second.",
        ),
        Misconception(
            "distance over the first variance",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (log_variance_1 - log_variance_2).exp(),
                (mean_1 - mean_2) ** 2 * (-log_variance_1).exp(),
            ),
            "The squared distance of the means is divided by the second variance, as every term of the "
            "second density.",
        ),
        Misconception(
            "distance not squared",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (log_variance_1 - log_variance_2).exp(),
                (mean_1 - mean_2).abs() * (-log_variance_2).exp(),
            ),
            "The distance of the means enters squared.",
        ),
        Misconception(
            "distance not divided",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (log_variance_1 - log_variance_2).exp(),
                (mean_1 - mean_2) ** 2,
            ),
            "The squared distance of the means is divided by the second variance.",
        ),
        Misconception(
            "distance forgotten",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                (0.5 * (log_variance_2 - log_variance_1 + (log_variance_1 - log_variance_2).exp() - 1))
                + 0 * (mean_1 - mean_2)
            ),
            "The term with the distance of the means is missing.",
        ),
        Misconception(
            "log-variance read as log standard deviation",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: ddpm.normal_kl(
                mean_1, 2 * log_variance_1, mean_2, 2 * log_variance_2
            ),
            "exp(log_variance) is the variance already: it is not squared once more.",
        ),
        Misconception(
            "standard deviation for variance",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (0.5 * (log_variance_1 - log_variance_2)).exp(),
                (mean_1 - mean_2) ** 2 * (-0.5 * log_variance_2).exp(),
            ),
            "The ratios are those of variances, exp(log_variance), not of standard deviations, "
            "exp(log_variance / 2).",
        ),
        Misconception(
            "log-variance read as variance",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: ddpm.normal_kl(
                mean_1, log_variance_1.log(), mean_2, log_variance_2.log()
            ),
            "The arguments are logarithms of variances, negative ones too: take exp where the variance is "
            "needed.",
        ),
        Misconception(
            "mean over all elements",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: ddpm.normal_kl(
                mean_1, log_variance_1, mean_2, log_variance_2
            ).mean(),
            "Asked for is the divergence of each element; the caller averages.",
        ),
        Misconception(
            "sum over all elements",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: ddpm.normal_kl(
                mean_1, log_variance_1, mean_2, log_variance_2
            ).sum(),
            "Asked for is the divergence of each element; the caller sums or averages.",
        ),
        Misconception(
            "sum over each sample",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2).flatten(1).sum(1)
            ),
            "Asked for is the divergence of each element; the caller sums or averages.",
        ),
        Misconception(
            "mean over each sample",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: (
                ddpm.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2).flatten(1).mean(1)
            ),
            "Asked for is the divergence of each element; the caller averages.",
        ),
        Misconception(
            "distance times the second variance",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1,
                (log_variance_1 - log_variance_2).exp(),
                (mean_1 - mean_2) ** 2 * log_variance_2.exp(),
            ),
            "The squared distance is divided by the second variance: exp(-log_variance_2).",
        ),
        Misconception(
            "variance ratio forgotten",
            lambda mean_1, log_variance_1, mean_2, log_variance_2: _kl_of_terms(
                log_variance_2 - log_variance_1, 0, (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
            ),
            "The term sigma_1^2 / sigma_2^2 is missing: for two equal normals the divergence must be 0.",
        ),
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


def _respaced_betas_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    cases = []
    for schedule, num_steps, kept, first, dtype in (
        (ddpm.linear_betas, 1000, 20, 0, torch.float64),
        (ddpm.cosine_betas, 400, 10, 0, torch.float64),
        (ddpm.cosine_betas, draws.integer(50, 300), draws.integer(5, 9), 3, torch.float64),
        (ddpm.linear_betas, 100, draws.integer(5, 9), 1, torch.float64),
        (ddpm.linear_betas, 30, 30, 0, torch.float64),
        (ddpm.linear_betas, 100, 1, 50, torch.float64),
        (ddpm.linear_betas, 1000, 7, 0, torch.float32),
    ):
        alpha_bar = (1 - schedule(num_steps)).cumprod(0).to(dtype)  # (T,)
        # the first, the last, and some in between, unevenly spread
        between = first + 1 + draws.steps(max(kept - 2, 0), num_steps - first - 2)
        steps = torch.tensor(sorted({first, *between.tolist(), num_steps - 1} if kept > 1 else {first}))
        note = f"{len(steps)} of {num_steps} steps of {schedule.__name__}, the first one {first}"
        cases.append(Case(note, (alpha_bar, steps)))
    return cases


def _alpha_bar_before(alpha_bar: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


RESPACED_BETAS = Exercise(
    "ddpm.respaced_betas",
    '"Fewer steps", equation (1.43)',
    ddpm.respaced_betas,
    _respaced_betas_cases,
    (
        Misconception(
            "old betas at the kept steps",
            lambda alpha_bar, steps: (1 - alpha_bar / _alpha_bar_before(alpha_bar))[steps],
            "These are the betas of single steps. A step of the short schedule covers several, so it must "
            "take alpha_bar from one kept step to the next.",
        ),
        Misconception(
            "old betas, scaled",
            lambda alpha_bar, steps: (
                (1 - alpha_bar / _alpha_bar_before(alpha_bar))[steps] * (len(alpha_bar) / len(steps))
            ),
            "Scaled betas only come near: their alpha_bar must equal the long schedule's at the kept steps "
            "exactly.",
        ),
        Misconception(
            "betas added up",
            lambda alpha_bar, steps: (
                (1 - alpha_bar / _alpha_bar_before(alpha_bar))
                .cumsum(0)[steps]
                .diff(prepend=alpha_bar.new_zeros(1))
            ),
            "Noise of several steps does not just add up, for each step also shrinks what is there: the "
            "alphas multiply.",
        ),
        Misconception(
            "1 - alpha_bar",
            lambda alpha_bar, steps: 1 - alpha_bar[steps],
            "1 - alpha_bar is the noise since the beginning; a beta is the noise since the kept step before: "
            "divide by its alpha_bar.",
        ),
        Misconception(
            "fraction upside down",
            lambda alpha_bar, steps: 1 - _alpha_bar_before(alpha_bar[steps]) / alpha_bar[steps],
            "The later alpha_bar, the smaller one, stands above: a beta is positive.",
        ),
        Misconception(
            "alphas instead of betas",
            lambda alpha_bar, steps: alpha_bar[steps] / _alpha_bar_before(alpha_bar[steps]),
            "This is alpha', what a step keeps; asked for is beta' = 1 - alpha'.",
        ),
        Misconception(
            "alpha_bar instead of betas",
            lambda alpha_bar, steps: alpha_bar[steps],
            "This is alpha_bar at the kept steps; asked for are the betas that it comes from.",
        ),
        Misconception(
            "root of the fraction",
            lambda alpha_bar, steps: 1 - (alpha_bar[steps] / _alpha_bar_before(alpha_bar[steps])).sqrt(),
            "alpha' is the ratio of two alpha_bars, without a root.",
        ),
        Misconception(
            "difference instead of ratio",
            lambda alpha_bar, steps: _alpha_bar_before(alpha_bar[steps]) - alpha_bar[steps],
            "alpha_bar is a product: from one kept step to the next it changes by a factor, so divide.",
        ),
        Misconception(
            "first step left out",
            lambda alpha_bar, steps: 1 - alpha_bar[steps][1:] / alpha_bar[steps][:-1],
            "There is one beta for each kept step: before the first one alpha_bar is 1.",
        ),
        Misconception(
            "first beta 0",
            lambda alpha_bar, steps: (
                1 - alpha_bar[steps] / torch.cat([alpha_bar[steps][:1], alpha_bar[steps][:-1]])
            ),
            "Before the first kept step there are clean data, alpha_bar = 1: the first beta is 1 - alpha_bar "
            "there.",
        ),
        Misconception(
            "last step before the first",
            lambda alpha_bar, steps: 1 - alpha_bar[steps] / alpha_bar[steps].roll(1),
            "roll brings the last alpha_bar to the front. Before the first kept step there are clean data, "
            "alpha_bar = 1.",
        ),
        Misconception(
            "neighbour in the long schedule",
            lambda alpha_bar, steps: 1 - alpha_bar[steps] / alpha_bar[steps - 1],
            "alpha_bar is divided by that of the kept step before, not by that of the step before in the "
            "long schedule; before the first it is 1.",
        ),
        Misconception(
            "long schedule's alpha_bar before the first kept step",
            lambda alpha_bar, steps: (
                1
                - alpha_bar[steps]
                / torch.cat([_alpha_bar_before(alpha_bar)[steps[:1]], alpha_bar[steps][:-1]])
            ),
            "Before the first kept step there are clean data, alpha_bar = 1, even where the long schedule "
            "began earlier.",
        ),
        Misconception(
            "clamped at 0.999",
            lambda alpha_bar, steps: ddpm.respaced_betas(alpha_bar, steps).clamp(max=0.999),
            "The cosine schedule was clamped when it was made. Clamped again, alpha_bar no longer equals the "
            "long schedule's.",
        ),
    ),
)


EXERCISES = [
    LINEAR_BETAS,
    Q_SAMPLE,
    POSTERIOR_MEAN,
    POSTERIOR_VARIANCE,
    V_FROM_X_0_AND_EPS,
    X_0_FROM_V,
    LEARNED_RANGE_LOG_VARIANCE,
    NORMAL_KL,
    ANCESTRAL_UPDATE,
    DDIM_UPDATE,
    RESPACED_BETAS,
]
