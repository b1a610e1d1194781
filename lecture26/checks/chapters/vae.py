"""Exercises of chapter 06: the bound's terms, the bound on a grid, the draw, the loss, a step, the scale."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import mse_loss

from lecture26 import vae

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws
from ..mistakes import step_mistakes
from ..optimizers import OptimizerArgument


def _per_sample(values: Tensor) -> Tensor:
    """The sums over each sample, (B,)."""
    return values.flatten(1).sum(dim=1)


def _kl_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, side = draws.integer(5, 6), draws.integer(7, 8), draws.integer(3, 4)
    height, width = draws.integer(2, 3), draws.integer(4, 5)

    def case(note, *shape, far=1.0, log_shift=0.0, **kind):
        mean, log_variance = draws.normal(*shape, **kind), draws.normal(*shape, **kind)
        if (far, log_shift) != (1.0, 0.0):
            mean, log_variance = far * mean, log_variance + log_shift
        return Case(note, (mean, log_variance))

    zeros = torch.zeros(batch, d, dtype=torch.float64)
    return [
        case("latent images", batch, 4, height, width),
        case("latent vectors", batch, d),
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side, side),
        case("a single sample", 1, d),
        case("a single latent number", batch, 1),
        case("narrow distributions far out", batch, d, far=5.0, log_shift=-6.0),
        case("wide distributions", batch, d, log_shift=3.0),
        case("float32", batch, 4, height, width, dtype=torch.float32),
        case("with gradient", batch, 4, height, width, gradient=True),
        Case("the standard normal itself", (zeros, zeros.clone())),
    ]


def _kl_of(term: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The sum over a sample of a term for each latent number, right or wrong."""
    return lambda mean, log_variance: _per_sample(term(mean, log_variance))


KL_TO_STANDARD_NORMAL = Exercise(
    "vae.kl_to_standard_normal",
    '"The divergence", equation (6.5)',
    vae.kl_to_standard_normal,
    _kl_cases,
    (
        Misconception(
            "averaged over the latent numbers",
            lambda m, v: vae.kl_to_standard_normal(m, v) / m[0].numel(),
            "The latent numbers are independent, so that their divergences add up: a sum, not a mean.",
        ),
        Misconception(
            "averaged over the batch",
            lambda m, v: vae.kl_to_standard_normal(m, v).mean(),
            "Each sample has a divergence of its own; the loss takes the mean over the batch later.",
        ),
        Misconception(
            "summed over the batch",
            lambda m, v: vae.kl_to_standard_normal(m, v).sum(),
            "The batch axis stays: one number for each sample.",
        ),
        Misconception(
            "averaged over everything",
            lambda m, v: vae.kl_to_standard_normal(m, v).sum() / m.numel(),
            "Sum over the latent numbers of a sample, and leave the batch axis alone.",
        ),
        Misconception(
            "not summed",
            lambda m, v: (m**2 + v.exp() - 1 - v) / 2,
            "This is the divergence of each latent number; that of a sample is their sum.",
        ),
        Misconception(
            "summed over the last axis alone",
            lambda m, v: ((m**2 + v.exp() - 1 - v) / 2).sum(dim=-1),
            "A latent image has channels, rows and columns: sum over every axis but the batch's.",
        ),
        Misconception(
            "summed over the channels alone",
            lambda m, v: ((m**2 + v.exp() - 1 - v) / 2).sum(dim=1),
            "A latent image has rows and columns, too: sum over every axis but the batch's.",
        ),
        Misconception(
            "factor 1/2 forgotten",
            lambda m, v: 2 * vae.kl_to_standard_normal(m, v),
            "Twice the right value: the 1/2 of the normal's exponent is missing.",
        ),
        Misconception(
            "1/2 for the last term alone",
            _kl_of(lambda m, v: m**2 + v.exp() - 1 - v / 2),
            "The factor 1/2 stands before all four terms: mind the brackets.",
        ),
        Misconception(
            "sign turned",
            lambda m, v: -vae.kl_to_standard_normal(m, v),
            "A divergence is never negative. In the bound it stands with a minus, which is no part of it.",
        ),
        Misconception(
            "sign of the log-variance",
            _kl_of(lambda m, v: (m**2 + v.exp() - 1 + v) / 2),
            "A wide code has much entropy, which makes the divergence smaller: look at the logarithm's sign.",
        ),
        Misconception(
            "sign of the squared mean",
            _kl_of(lambda m, v: (v.exp() - m**2 - 1 - v) / 2),
            "The farther out the mean, the larger the divergence: look at the sign of its square.",
        ),
        Misconception(
            "log standard deviation for log-variance",
            _kl_of(lambda m, v: (m**2 + (2 * v).exp() - 1 - 2 * v) / 2),
            "The encoder says the logarithm of the variance: its exponential needs no further square.",
        ),
        Misconception(
            "standard deviation for variance",
            _kl_of(lambda m, v: (m**2 + (v / 2).exp() - 1 - v) / 2),
            "exp(log_variance / 2) is the standard deviation; the draw's second moment has the variance.",
        ),
        Misconception(
            "variance squared",
            _kl_of(lambda m, v: (m**2 + (2 * v).exp() - 1 - v) / 2),
            "exp(log_variance) is the variance as it is: it is not squared once more.",
        ),
        Misconception(
            "log-variance for log standard deviation",
            _kl_of(lambda m, v: (m**2 + v.exp() - 1) / 2 - v),
            "Outside the bracket stands the logarithm of the standard deviation, half of log_variance.",
        ),
        Misconception(
            "log-variance read as standard deviation",
            _kl_of(lambda m, v: (m**2 + v**2 - 1 - (v**2).log()) / 2),
            "log_variance is a logarithm, and may be negative: take its exponential first.",
        ),
        Misconception(
            "log-variance read as variance",
            _kl_of(lambda m, v: (m**2 + v - 1 - v.log()) / 2),
            "log_variance is a logarithm already: the variance is its exponential, and needs no further log.",
        ),
        Misconception(
            "mean not squared",
            _kl_of(lambda m, v: (m + v.exp() - 1 - v) / 2),
            "The mean enters squared: far out to either side costs the same.",
        ),
        Misconception(
            "length of the mean",
            _kl_of(lambda m, v: (m.abs() + v.exp() - 1 - v) / 2),
            "The mean enters squared, not with its absolute value.",
        ),
        Misconception(
            "mean forgotten",
            _kl_of(lambda m, v: (v.exp() - 1 - v) / 2 + 0 * m),
            "The second moment of the draw is the variance plus the squared mean: the latter is missing.",
        ),
        Misconception(
            "variance forgotten",
            _kl_of(lambda m, v: (m**2 - 1 - v) / 2),
            "The second moment of the draw is the squared mean plus the variance: the latter is missing.",
        ),
        Misconception(
            "logarithm forgotten",
            _kl_of(lambda m, v: (m**2 + v.exp() - 1) / 2),
            "Without the entropy of the draw, a point at 0 would be nearest to the prior: a term is missing.",
        ),
        Misconception(
            "- 1 forgotten",
            _kl_of(lambda m, v: (m**2 + v.exp() - v) / 2),
            "From the standard normal itself the divergence is 0: a constant is missing.",
        ),
        Misconception(
            "- 1 once for each sample",
            lambda m, v: (_per_sample(m**2) + _per_sample(v.exp()) - _per_sample(v) - 1) / 2,
            "The constant belongs to each latent number: it is summed over them like the other terms.",
        ),
        Misconception(
            "- 1 not halved",
            _kl_of(lambda m, v: (m**2 + v.exp() - v) / 2 - 1),
            "The factor 1/2 stands before the constant, too: mind the brackets.",
        ),
        Misconception(
            "arguments reversed",
            _kl_of(lambda m, v: ((1 + m**2) * (-v).exp() - 1 + v) / 2),
            "This is KL(prior || code). The first distribution is the one averaged over: the encoder's.",
        ),
        Misconception(
            "bits",
            lambda m, v: vae.kl_to_standard_normal(m, v) / math.log(2),
            "Asked for is the divergence in nats, with the natural logarithm.",
        ),
        Misconception(
            "mean detached",
            lambda m, v: vae.kl_to_standard_normal(m.detach(), v),
            "The values are right, but the prior has to pull at the means, too: keep their gradient.",
        ),
    ),
)


def _likelihood_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, side = draws.integer(5, 6), draws.integer(7, 8), draws.integer(3, 4)
    height, width = draws.integer(2, 3), draws.integer(4, 5)
    std = draws.uniform(low=0.3, high=0.7).item()

    def case(note, *shape, std=std, gradient=False, **kind):
        return Case(
            note, (draws.normal(*shape, **kind), draws.normal(*shape, gradient=gradient, **kind), std)
        )

    x = draws.normal(batch, d)
    return [
        case("images", batch, 3, height, width),
        case("vectors", batch, d),
        case("all axes of one length", side, side, side, side),
        case("a single sample", 1, d),
        case("a single number", batch, 1),
        case("a standard deviation of 1", batch, d, std=1.0),
        case("a standard deviation above 1", batch, d, std=2.5),
        case("a small standard deviation", batch, d, std=0.05),
        case("a constant of 0", batch, d, std=1 / math.sqrt(2 * math.pi)),
        Case("a perfect reconstruction", (x, x.clone(), std)),
        case("float32", batch, 3, height, width, dtype=torch.float32),
        case("outputs with gradient", batch, 3, height, width, gradient=True),
    ]


def _likelihood_of(term: Callable[[Tensor, float], Tensor]) -> Callable:
    """The sum over a sample of a term for each difference, right or wrong."""
    return lambda x, x_hat, std: _per_sample(term(x - x_hat, std))


def _log_constant(std: float) -> float:
    """What each number adds, whatever the difference."""
    return math.log(2 * math.pi * std**2) / 2


NEGATIVE_LOG_LIKELIHOOD = Exercise(
    "vae.negative_log_likelihood",
    '"The reconstruction", equation (6.6)',
    vae.negative_log_likelihood,
    _likelihood_cases,
    (
        Misconception(
            "constant forgotten",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2)),
            "A density integrates to 1: what stands in front of its exponential adds to the logarithm.",
        ),
        Misconception(
            "constant once for each sample",
            lambda x, x_hat, std: _per_sample((x - x_hat) ** 2) / (2 * std**2) + _log_constant(std),
            "The density is a product over all D numbers of a sample: the constant is there D times.",
        ),
        Misconception(
            "constant of the whole batch",
            lambda x, x_hat, std: (
                _per_sample((x - x_hat) ** 2) / (2 * std**2) + x.numel() * _log_constant(std)
            ),
            "D counts the numbers of one sample, not those of the whole batch.",
        ),
        Misconception(
            "constant of a standard normal",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2) + _log_constant(1.0)),
            "The narrower the density, the higher: below the root of the constant stands the variance, too.",
        ),
        Misconception(
            "standard deviation for variance",
            _likelihood_of(lambda d, std: d**2 / (2 * std) + math.log(2 * math.pi * std) / 2),
            "decoder_std is a standard deviation: the density of a normal has its square, in both places.",
        ),
        Misconception(
            "squares divided by the standard deviation",
            _likelihood_of(lambda d, std: d**2 / (2 * std) + _log_constant(std)),
            "The squared difference is divided by twice the variance, the square of decoder_std.",
        ),
        Misconception(
            "standard deviation in the logarithm",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2) + math.log(2 * math.pi * std) / 2),
            "Below the root of the constant stands the variance, the square of decoder_std.",
        ),
        Misconception(
            "variance forgotten",
            _likelihood_of(lambda d, std: d**2 / 2 + _log_constant(std)),
            "A difference counts in units of the decoder's noise: divide by the variance.",
        ),
        Misconception(
            "multiplied by the variance",
            _likelihood_of(lambda d, std: d**2 * std**2 / 2 + _log_constant(std)),
            "The less noise, the more a difference counts: divide by the variance.",
        ),
        Misconception(
            "1/2 of the squares forgotten",
            _likelihood_of(lambda d, std: d**2 / std**2 + _log_constant(std)),
            "A factor 1/2 is missing at the squares: it stands in the normal's exponent.",
        ),
        Misconception(
            "1/2 of the constant forgotten",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2) + 2 * _log_constant(std)),
            "The constant is the logarithm of a root: half the logarithm of what stands below it.",
        ),
        Misconception(
            "2 pi forgotten",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2) + math.log(std)),
            "Below the root of the constant stands 2 pi times the variance.",
        ),
        Misconception(
            "sign of the constant",
            _likelihood_of(lambda d, std: d**2 / (2 * std**2) - _log_constant(std)),
            "Both parts of the logarithm of the density turn their sign: look at that of the constant.",
        ),
        Misconception(
            "sign turned",
            lambda *arguments: -vae.negative_log_likelihood(*arguments),
            "This is the log-likelihood; asked for is its negative, which grows with the differences.",
        ),
        Misconception(
            "averaged over the numbers",
            lambda x, *others: vae.negative_log_likelihood(x, *others) / x[0].numel(),
            "The density of a sample is the product over its numbers: their logarithms add up, with no mean.",
        ),
        Misconception(
            "squares averaged over the numbers",
            lambda x, x_hat, std: (
                ((x - x_hat) ** 2).flatten(1).mean(dim=1) / (2 * std**2) + x[0].numel() * _log_constant(std)
            ),
            "The squares are summed over the numbers of a sample, not averaged.",
        ),
        Misconception(
            "averaged over the batch",
            lambda *arguments: vae.negative_log_likelihood(*arguments).mean(),
            "Each sample has a likelihood of its own; the loss takes the mean over the batch later.",
        ),
        Misconception(
            "summed over the batch",
            lambda *arguments: vae.negative_log_likelihood(*arguments).sum(),
            "The batch axis stays: one number for each sample.",
        ),
        Misconception(
            "not summed",
            lambda x, x_hat, std: (x - x_hat) ** 2 / (2 * std**2) + _log_constant(std),
            "This is the term of each number of a sample; asked for is their sum.",
        ),
        Misconception(
            "summed over the last axis alone",
            lambda x, x_hat, std: ((x - x_hat) ** 2 / (2 * std**2) + _log_constant(std)).sum(dim=-1),
            "An image has channels, rows and columns: sum over every axis but the batch's.",
        ),
        Misconception(
            "differences not squared",
            _likelihood_of(lambda d, std: d.abs() / (2 * std**2) + _log_constant(std)),
            "The normal has the squared difference in its exponent, not the absolute one.",
        ),
        Misconception(
            "Laplace noise",
            _likelihood_of(lambda d, std: d.abs() / std + math.log(2 * std)),
            "Absolute differences belong to noise from a Laplace distribution; this decoder's is normal.",
        ),
        Misconception(
            "length of the difference",
            lambda x, x_hat, std: (
                (x - x_hat).flatten(1).norm(dim=1) / (2 * std**2) + x[0].numel() * _log_constant(std)
            ),
            "The squared length enters the exponent; the length has a root too many.",
        ),
        Misconception(
            "square of the sum",
            lambda x, x_hat, std: (
                _per_sample(x - x_hat) ** 2 / (2 * std**2) + x[0].numel() * _log_constant(std)
            ),
            "Differences of opposite sign must not cancel: square first, then sum.",
        ),
    ),
)


def _grid_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d = draws.integer(4, 5), draws.integer(6, 7)
    std = draws.uniform(low=0.5, high=0.8).item()

    def case(note, batch, k, d, std=std, far=0.0, gradient=False, dtype=torch.float64):
        spacing = 0.25 if k == 1 else 0.5
        side = torch.arange(-10.0, 10.01, spacing, dtype=torch.float64)
        codes = side[:, None] if k == 1 else torch.cartesian_prod(*[side] * k)
        kind = {"dtype": dtype, "gradient": gradient}
        # a decoder so smooth that every posterior is wide for the grid, and any way to integrate is exact
        decode = CallableArgument("smooth_decoder", (0.3 * draws.normal(k, 4), draws.normal(4, d, **kind)))
        mean = draws.uniform(batch, k, low=-1.0, high=1.0, **kind)
        log_variance = draws.uniform(batch, k, low=-0.6, high=0.0, **kind)
        x = draws.normal(batch, d, dtype=dtype) + far
        decode = CallableArgument(decode.kind, tuple(weight.to(dtype) for weight in decode.tensors))
        return Case(note, (x, decode, std, mean, log_variance, codes.to(dtype), spacing**k))

    return [
        case("one latent number", batch, 1, d),
        case("two latent numbers", batch, 2, d),
        case("as many samples as numbers", d, 2, d),
        case("a single sample", 1, 1, d),
        case("data of one number", batch, 2, 1),
        case("data far from all that the decoder makes", batch, 1, d, far=60.0),
        case("a decoder with much noise", batch, 2, d, std=2.0),
        case("float32", batch, 1, d, dtype=torch.float32),
        case("with gradient", batch, 1, d, gradient=True),
    ]


def _grid_parts(x, decode, decoder_std, mean, log_variance, codes):
    """log p(z) (G,), log p(x | z) (B, G) and log q(z | x) (B, G) on a grid."""
    x_hat = decode(codes)
    likelihoods = [-vae.negative_log_likelihood(one.expand_as(x_hat), x_hat, decoder_std) for one in x]
    log_prior = Normal(0.0, 1.0).log_prob(codes).sum(dim=1)
    log_q = Normal(mean[:, None], (log_variance[:, None] / 2).exp()).log_prob(codes).sum(dim=2)
    return log_prior, torch.stack(likelihoods), log_q


def _grid_of(combine: Callable) -> Callable:
    """Evidence and bound made of log p(z), log p(x | z), log q and the volume, right or wrong."""

    def wrong(x, decode, decoder_std, mean, log_variance, codes, volume):
        return combine(*_grid_parts(x, decode, decoder_std, mean, log_variance, codes), volume)

    return wrong


def _evidence(log_joint: Tensor, volume: float) -> Tensor:
    return log_joint.logsumexp(dim=1) + math.log(volume)


def _mean_under(log_weights: Tensor, values: Tensor, volume: float) -> Tensor:
    return (log_weights.exp() * values).sum(dim=1) * volume


def _with_guess(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable:
    """bound_on_grid for another guess, a function of mean and log-variance."""
    return lambda x, decode, std, mean, log_variance, codes, volume: vae.bound_on_grid(
        x, decode, std, *change(mean, log_variance), codes, volume
    )


BOUND_ON_GRID = Exercise(
    "vae.bound_on_grid",
    '"The bound on a grid"',
    vae.bound_on_grid,
    _grid_cases,
    (
        Misconception(
            "volume forgotten in the evidence",
            _grid_of(
                lambda prior, fit, q, dv: (
                    (prior + fit).logsumexp(dim=1),
                    _mean_under(q, prior + fit - q, dv),
                )
            ),
            "An integral is the sum of its values times the volume of a cell: so is p(x).",
        ),
        Misconception(
            "volume forgotten in the bound",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior + fit, dv),
                    _mean_under(q, prior + fit - q, 1.0),
                )
            ),
            "The expectation over q is an integral, too: the sum of its values times the volume of a cell.",
        ),
        Misconception(
            "volume forgotten",
            _grid_of(
                lambda prior, fit, q, dv: (
                    (prior + fit).logsumexp(dim=1),
                    _mean_under(q, prior + fit - q, 1.0),
                )
            ),
            "Both are integrals: sums of values times the volume of a cell.",
        ),
        Misconception(
            "volume not in the logarithm",
            _grid_of(
                lambda prior, fit, q, dv: (
                    (prior + fit).logsumexp(dim=1) * dv,
                    _mean_under(q, prior + fit - q, dv),
                )
            ),
            "The volume multiplies the sum of the densities, below the logarithm: outside it is added.",
        ),
        Misconception(
            "mean for the integral",
            _grid_of(
                lambda prior, fit, q, dv: (
                    (prior + fit).logsumexp(dim=1) - math.log(len(prior)),
                    (q.exp() * (prior + fit - q)).mean(dim=1),
                )
            ),
            "A mean over the grid divides by the number of codes; an integral multiplies by their spacing.",
        ),
        Misconception(
            "exponential before the logarithm",
            _grid_of(
                lambda prior, fit, q, dv: (
                    ((prior + fit).exp().sum(dim=1) * dv).log(),
                    _mean_under(q, prior + fit - q, dv),
                )
            ),
            "Where no code explains the data well, every density is 0 in floating point, and so is the sum: "
            "take the logarithm of a sum of exponentials in one go.",
        ),
        Misconception(
            "prior forgotten",
            _grid_of(lambda prior, fit, q, dv: (_evidence(fit, dv), _mean_under(q, fit - q, dv))),
            "The joint density is that of the code times that of the data given it: the prior is missing.",
        ),
        Misconception(
            "prior forgotten in the evidence",
            _grid_of(lambda prior, fit, q, dv: (_evidence(fit, dv), _mean_under(q, prior + fit - q, dv))),
            "p(x) weighs each code by its prior density, which is missing.",
        ),
        Misconception(
            "prior forgotten in the bound",
            _grid_of(lambda prior, fit, q, dv: (_evidence(prior + fit, dv), _mean_under(q, fit - q, dv))),
            "The bound has the joint density of data and code: the prior is missing in it.",
        ),
        Misconception(
            "prior without its constant",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior - prior.max() + fit, dv),
                    _mean_under(q, prior - prior.max() + fit - q, dv),
                )
            ),
            "The prior is a density, and integrates to 1: its constant is missing.",
        ),
        Misconception(
            "guess not in the logarithm",
            _grid_of(lambda prior, fit, q, dv: (_evidence(prior + fit, dv), _mean_under(q, prior + fit, dv))),
            "The bound also has -log q in its expectation: without it, the narrower the guess the better.",
        ),
        Misconception(
            "sign of the guess's logarithm",
            _grid_of(
                lambda prior, fit, q, dv: (_evidence(prior + fit, dv), _mean_under(q, prior + fit + q, dv))
            ),
            "log q is subtracted: a wide guess has more entropy, which raises the bound.",
        ),
        Misconception(
            "reconstruction alone",
            _grid_of(lambda prior, fit, q, dv: (_evidence(prior + fit, dv), _mean_under(q, fit, dv))),
            "This is the first of the two terms of (6.4): the divergence from the prior is missing.",
        ),
        Misconception(
            "divergence added",
            _grid_of(
                lambda prior, fit, q, dv: (_evidence(prior + fit, dv), _mean_under(q, fit + q - prior, dv))
            ),
            "The divergence from the prior is subtracted: it is what the guess has to pay.",
        ),
        Misconception(
            "averaged over the prior",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior + fit, dv),
                    _mean_under(prior.expand_as(q), prior + fit - q, dv),
                )
            ),
            "The bound's expectation is over the guess, which knows x, not over the prior.",
        ),
        Misconception(
            "averaged over the posterior",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior + fit, dv),
                    ((prior + fit).softmax(dim=1) * (prior + fit - q)).sum(dim=1),
                )
            ),
            "The bound's expectation is over the guess: the posterior is what one does not have in general.",
        ),
        Misconception(
            "evidence twice",
            _grid_of(lambda prior, fit, q, dv: (_evidence(prior + fit, dv),) * 2),
            "The bound is the evidence only where the guess is the posterior.",
        ),
        Misconception(
            "evidence without its logarithm",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior + fit, dv).exp(),
                    _mean_under(q, prior + fit - q, dv),
                )
            ),
            "Asked for is log p(x), in nats.",
        ),
        Misconception(
            "gap for the bound",
            _grid_of(
                lambda prior, fit, q, dv: (
                    _evidence(prior + fit, dv),
                    _evidence(prior + fit, dv) - _mean_under(q, prior + fit - q, dv),
                )
            ),
            "This is what the bound falls short by; asked for is the bound itself.",
        ),
        Misconception(
            "in the other order",
            lambda *arguments: vae.bound_on_grid(*arguments)[::-1],
            "The evidence comes first, then the bound.",
        ),
        Misconception(
            "signs turned",
            lambda *arguments: tuple(-values for values in vae.bound_on_grid(*arguments)),
            "These are the negatives, which are to fall; asked for are the logarithm and the bound.",
        ),
        Misconception(
            "bits",
            lambda *arguments: tuple(values / math.log(2) for values in vae.bound_on_grid(*arguments)),
            "Asked for are nats, with the natural logarithm.",
        ),
        Misconception(
            "averaged over the batch",
            lambda *arguments: tuple(values.mean() for values in vae.bound_on_grid(*arguments)),
            "Each sample has an evidence and a bound of its own.",
        ),
        Misconception(
            "variance for the guess's standard deviation",
            _with_guess(lambda mean, log_variance: (mean, 2 * log_variance)),
            "exp(log_variance) is the variance; the guess's width is its root.",
        ),
        Misconception(
            "log-variance read as log standard deviation, halved once more",
            _with_guess(lambda mean, log_variance: (mean, log_variance / 2)),
            "The logarithm of the variance is halved once to give that of the standard deviation.",
        ),
        Misconception(
            "one guess for all samples",
            _with_guess(lambda mean, log_variance: (mean[:1].expand_as(mean), log_variance)),
            "The first sample's guess is used for all: each sample has its own.",
        ),
        Misconception(
            "guess of width 1",
            _with_guess(lambda mean, log_variance: (mean, 0 * log_variance)),
            "The guess has the width that the encoder says.",
        ),
        Misconception(
            "noise of width 1",
            lambda x, decode, std, *others: vae.bound_on_grid(x, decode, 1.0, *others),
            "The decoder's noise has the standard deviation decoder_std.",
        ),
        Misconception(
            "noise of the variance's width",
            lambda x, decode, std, *others: vae.bound_on_grid(x, decode, std**2, *others),
            "decoder_std is the standard deviation already: negative_log_likelihood squares it itself.",
        ),
        Misconception(
            "guess detached",
            _with_guess(lambda mean, log_variance: (mean.detach(), log_variance.detach())),
            "The values are right, but the guess is to be improved by its gradient: keep it.",
        ),
    ),
)


def _draw_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, side = draws.integer(5, 6), draws.integer(7, 8), draws.integer(3, 4)
    height, width = draws.integer(2, 3), draws.integer(4, 5)

    def case(note, *shape, log_shift=0.0, gradient=False, **kind):
        mean, log_variance = (draws.normal(*shape, gradient=gradient, **kind) for _ in range(2))
        return Case(
            note,
            (mean, log_variance + log_shift if log_shift else log_variance, draws.normal(*shape, **kind)),
        )

    return [
        case("latent images", batch, 4, height, width),
        case("latent vectors", batch, d),
        case("all axes of one length", side, side, side, side),
        case("a single sample", 1, d),
        case("a single latent number", batch, 1),
        case("narrow distributions", batch, d, log_shift=-8.0),
        case("wide distributions", batch, d, log_shift=3.0),
        case("float32", batch, 4, height, width, dtype=torch.float32),
        case("with gradient", batch, 4, height, width, gradient=True),
    ]


REPARAMETERIZE = Exercise(
    "vae.reparameterize",
    '"A gradient through a random draw", equation (6.8)',
    vae.reparameterize,
    _draw_cases,
    (
        Misconception(
            "variance for standard deviation",
            lambda m, v, eps: m + v.exp() * eps,
            "exp(log_variance) is the variance; noise is stretched by the standard deviation, its root.",
        ),
        Misconception(
            "log-variance taken as it is",
            lambda m, v, eps: m + v * eps,
            "log_variance is a logarithm, and may be negative: a standard deviation takes an exponential.",
        ),
        Misconception(
            "log-variance read as variance",
            lambda m, v, eps: m + v.sqrt() * eps,
            "log_variance is a logarithm, and may be negative: no root can be taken of it.",
        ),
        Misconception(
            "half the variance",
            lambda m, v, eps: m + v.exp() / 2 * eps,
            "The logarithm is halved, not its exponential: that is what makes it a root.",
        ),
        Misconception(
            "logarithm doubled",
            lambda m, v, eps: m + (2 * v).exp() * eps,
            "This is the variance squared; the standard deviation is its root: halve the logarithm.",
        ),
        Misconception(
            "sign of the log-variance",
            lambda m, v, eps: m + (-v / 2).exp() * eps,
            "The larger the variance, the farther the draw from the mean: the sign in the exponent is wrong.",
        ),
        Misconception(
            "noise not stretched",
            lambda m, v, eps: m + eps + 0 * v,
            "The noise has variance 1 as it comes: stretch it to that of the code.",
        ),
        Misconception(
            "mean alone",
            lambda m, v, eps: m + 0 * v,
            "This is the middle of the distribution, not a draw from it: the noise is missing.",
        ),
        Misconception(
            "mean forgotten",
            lambda m, v, eps: (v / 2).exp() * eps + 0 * m,
            "The draws are centred on the mean: it has to be added.",
        ),
        Misconception(
            "mean stretched, too",
            lambda m, v, eps: (v / 2).exp() * (m + eps),
            "Only the noise is stretched: stretch first, then move to the mean.",
        ),
        Misconception(
            "standardised",
            lambda m, v, eps: (eps - m) / (v / 2).exp(),
            "This is the way back, from a draw to its noise; here the noise is stretched, then moved.",
        ),
        Misconception(
            "sign of the noise",
            lambda m, v, eps: m - (v / 2).exp() * eps,
            "The distribution is the same, but the equation adds the noise: same noise, same draw.",
        ),
        Misconception(
            "noise drawn anew",
            lambda m, v, eps: m + (v / 2).exp() * torch.randn_like(m),
            "Use the noise that is given: then the draw is a function of its arguments, and can be repeated.",
        ),
        Misconception(
            "one noise for the whole batch",
            lambda m, v, eps: m + (v / 2).exp() * eps[:1].expand_as(eps),
            "The first sample's noise is used for all: each sample has noise of its own.",
        ),
        Misconception(
            "one spread for the whole batch",
            lambda m, v, eps: m + (v[:1] / 2).exp() * eps,
            "The first sample's variance is used for all: each sample has its own.",
        ),
        Misconception(
            "spread detached",
            lambda m, v, eps: vae.reparameterize(m, v.detach(), eps),
            "The values are right, but the encoder learns its spread through this draw: keep that gradient.",
        ),
        Misconception(
            "mean detached",
            lambda m, v, eps: vae.reparameterize(m.detach(), v, eps),
            "The values are right, but the encoder learns its mean through this draw: keep that gradient.",
        ),
    ),
)


def _loss_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, k, side = draws.integer(5, 6), draws.integer(7, 8), draws.integer(2, 3), draws.integer(3, 4)
    height, width = draws.integer(2, 3), draws.integer(3, 4)
    weight = draws.uniform(low=0.2, high=0.8).item()
    image, latents = (3, 2 * height, 2 * width), (4, height, width)

    def case(note, batch, of_x, of_z, kl_weight, gradient=False, **kind):
        x = draws.normal(batch, *of_x, **kind)
        x_hat = draws.normal(batch, *of_x, gradient=gradient, **kind)
        code = [draws.normal(batch, *of_z, gradient=gradient, **kind) for _ in range(2)]
        return Case(note, (x, x_hat, *code, kl_weight))

    return [
        case("images", batch, image, latents, weight),
        case("vectors", batch, (d,), (k,), weight),
        case("all axes of one length", side, (side, side, side), (side, side, side), weight),
        case("a single sample", 1, (d,), (k,), weight),
        case("more latent numbers than pixels", batch, (k,), (d,), weight),
        case("weight 0: no prior", batch, (d,), (k,), 0.0),
        case("weight 1", batch, (d,), (k,), 1.0),
        case("a large weight", batch, (d,), (k,), 20.0),
        case("a small weight", batch, image, latents, 1e-3),
        case("float32", batch, image, latents, weight, dtype=torch.float32),
        case("with gradient", batch, image, latents, weight, gradient=True),
    ]


def _loss_of(combine: Callable) -> Callable:
    """A loss made of each sample's squared error and divergence, and the weight; right or wrong."""

    def loss(x, x_hat, mean, log_variance, kl_weight):
        divergence = vae.kl_to_standard_normal(mean, log_variance)
        return combine(_per_sample((x - x_hat) ** 2), divergence, kl_weight)

    return loss


def _pixels_averaged(factor: float) -> Callable:
    """A loss whose error is the mean over the numbers of x, times a factor."""
    return lambda x, x_hat, mean, log_variance, kl_weight: (
        factor * mse_loss(x_hat, x) + kl_weight * vae.kl_to_standard_normal(mean, log_variance).mean()
    )


def _latents_averaged(
    x: Tensor, x_hat: Tensor, mean: Tensor, log_variance: Tensor, kl_weight: float
) -> Tensor:
    return vae.vae_loss(x, x_hat, mean, log_variance, kl_weight / mean[0].numel())


VAE_LOSS = Exercise(
    "vae.vae_loss",
    '"One number to trade by", equation (6.10)',
    vae.vae_loss,
    _loss_cases,
    (
        Misconception(
            "mean squared error",
            _pixels_averaged(1.0),
            "The error is summed over the numbers of a sample; as a mean it weighs D times less against the "
            "divergence, so that another kl_weight would be meant.",
        ),
        Misconception(
            "half the mean squared error",
            _pixels_averaged(0.5),
            "The error is summed over the numbers of a sample, as the divergence is over the latent ones: a "
            "mean is taken over the batch alone.",
        ),
        Misconception(
            "divergence averaged over the latent numbers",
            _latents_averaged,
            "The divergence is summed over the latent numbers: only over the batch a mean is taken.",
        ),
        Misconception(
            "both averaged over their numbers",
            lambda x, x_hat, mean, log_variance, kl_weight: _pixels_averaged(0.5)(
                x, x_hat, mean, log_variance, kl_weight / mean[0].numel()
            ),
            "Both terms are summed over the numbers of a sample: only over the batch a mean is taken.",
        ),
        Misconception(
            "1/2 of the squares forgotten",
            _loss_of(lambda error, kl, w: (error + w * kl).mean()),
            "The squared error comes from the normal's exponent, with its 1/2.",
        ),
        Misconception(
            "half of everything",
            _loss_of(lambda error, kl, w: (error + w * kl).mean() / 2),
            "The factor 1/2 belongs to the squared error alone: the divergence has its own inside.",
        ),
        Misconception(
            "divergence without its 1/2",
            _loss_of(lambda error, kl, w: (error / 2 + 2 * w * kl).mean()),
            "The divergence enters as (6.5) has it, with the factor 1/2.",
        ),
        Misconception(
            "summed over the batch",
            _loss_of(lambda error, kl, w: (error / 2 + w * kl).sum()),
            "Over the batch a mean is taken, or the steps would grow with the batch.",
        ),
        Misconception(
            "error summed over the batch",
            _loss_of(lambda error, kl, w: error.sum() / 2 + w * kl.mean()),
            "Both terms are averaged over the batch; here the error is summed, and outweighs the divergence.",
        ),
        Misconception(
            "divergence summed over the batch",
            _loss_of(lambda error, kl, w: error.mean() / 2 + w * kl.sum()),
            "Both terms are averaged over the batch; here the divergence is summed, and outweighs the error.",
        ),
        Misconception(
            "not averaged",
            _loss_of(lambda error, kl, w: error / 2 + w * kl),
            "This is the loss of each sample; asked for is one number, their mean.",
        ),
        Misconception(
            "weight at the error",
            _loss_of(lambda error, kl, w: (w * error / 2 + kl).mean()),
            "kl_weight multiplies the divergence; here it multiplies the error.",
        ),
        Misconception(
            "weight ignored",
            _loss_of(lambda error, kl, w: (error / 2 + kl).mean()),
            "kl_weight is not used: it multiplies the divergence.",
        ),
        Misconception(
            "weights that add up to 1",
            _loss_of(lambda error, kl, w: ((1 - w) * error / 2 + w * kl).mean()),
            "The error keeps its full weight, whatever the divergence's is.",
        ),
        Misconception(
            "weight at both",
            _loss_of(lambda error, kl, w: w * (error / 2 + kl).mean()),
            "kl_weight multiplies the divergence alone: on both terms it leaves their balance as it is.",
        ),
        Misconception(
            "divided by the weight",
            _loss_of(lambda error, kl, w: (error / (2 * w) + kl).mean()),
            "This is the bound with the decoder's variance in it; the loss is that times kl_weight, so that "
            "the error keeps its size.",
        ),
        Misconception(
            "divergence subtracted",
            _loss_of(lambda error, kl, w: (error / 2 - w * kl).mean()),
            "Less is better for both terms; subtracted, the divergence would be driven up without end.",
        ),
        Misconception(
            "divergence forgotten",
            _loss_of(lambda error, kl, w: error.mean() / 2 + 0 * kl.sum()),
            "This trains an autoencoder without a prior: the divergence is missing.",
        ),
        Misconception(
            "error forgotten",
            _loss_of(lambda error, kl, w: 0 * error.sum() + w * kl.mean()),
            "Without the error nothing asks for a reconstruction.",
        ),
        Misconception(
            "sign turned",
            lambda *arguments: -vae.vae_loss(*arguments),
            "The bound is to rise, so the loss is its negative.",
        ),
        Misconception(
            "length of the difference",
            _loss_of(lambda error, kl, w: (error.sqrt() / 2 + w * kl).mean()),
            "The squared length of the difference enters, not the length.",
        ),
        Misconception(
            "absolute differences",
            lambda x, x_hat, mean, log_variance, kl_weight: (
                _per_sample((x - x_hat).abs()) / 2 + kl_weight * vae.kl_to_standard_normal(mean, log_variance)
            ).mean(),
            "Differences enter squared: the decoder's noise is normal.",
        ),
        Misconception(
            "error detached",
            lambda x, x_hat, *others: vae.vae_loss(x, x_hat.detach(), *others),
            "The value is right, but the decoder learns through x_hat: keep its gradient.",
        ),
        Misconception(
            "divergence detached",
            lambda x, x_hat, mean, log_variance, kl_weight: vae.vae_loss(
                x, x_hat, mean.detach(), log_variance.detach(), kl_weight
            ),
            "The value is right, but the encoder learns through the divergence: keep its gradient.",
        ),
    ),
)


def _step_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, k = draws.integer(4, 5), draws.integer(6, 7), draws.integer(2, 3)
    weight = draws.uniform(low=0.3, high=0.8).item()

    def case(note, batch, d, k, kl_weight=weight, dtype=torch.float64):
        def learned(*shape):
            return (0.5 * draws.normal(*shape)).to(dtype).requires_grad_()

        encoder, decoder = (learned(d, 4), learned(4, k), learned(4, k)), (learned(k, 4), learned(4, d))
        weights = encoder + decoder
        old = tuple(draws.normal(*weight.shape, dtype=dtype) for weight in weights)
        optimizer = OptimizerArgument(weights, old, draws.uniform(1, low=0.02, high=0.05).item())
        encode = CallableArgument("smooth_encoder", encoder)
        decode = CallableArgument("smooth_decoder", decoder)
        x, noise = draws.normal(batch, d, dtype=dtype), draws.normal(batch, k, dtype=dtype)
        return Case(note, (optimizer, encode, decode, x, noise, kl_weight))

    return [
        case("vectors", batch, d, k),
        case("as many samples as numbers", d, d, k),
        case("as many latent numbers as data", batch, k, k),
        case("a single sample", 1, d, k),
        case("a single latent number", batch, d, 1),
        case("a large batch", 30, d, k),
        case("a small weight", batch, d, k, kl_weight=1e-3),
        case("weight 0: no prior", batch, d, k, kl_weight=0.0),
        case("a large weight", batch, d, k, kl_weight=5.0),
        case("float32", batch, d, k, dtype=torch.float32),
    ]


def _step_along(loss_of: Callable) -> Callable:
    """A training step of another loss, of (encode, decode, x, noise, kl_weight)."""

    def wrong(optimizer, *others):
        optimizer.zero_grad()
        loss = loss_of(*others)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return wrong


def _step_with_draw(draw: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """A training step that decodes another function of mean, log-variance and noise."""

    def loss_of(encode, decode, x, noise, kl_weight):
        mean, log_variance = encode(x)
        return vae.vae_loss(x, decode(draw(mean, log_variance, noise)), mean, log_variance, kl_weight)

    return _step_along(loss_of)


def _step_with_loss(combine: Callable) -> Callable:
    """A training step of another function of x, x_hat, mean, log_variance and kl_weight."""

    def loss_of(encode, decode, x, noise, kl_weight):
        mean, log_variance = encode(x)
        x_hat = decode(vae.reparameterize(mean, log_variance, noise))
        return combine(x, x_hat, mean, log_variance, kl_weight)

    return _step_along(loss_of)


def _loss_of_step(encode, decode, x, noise, kl_weight):
    mean, log_variance = encode(x)
    x_hat = decode(vae.reparameterize(mean, log_variance, noise))
    return vae.vae_loss(x, x_hat, mean, log_variance, kl_weight)


def _stepping(step: Callable) -> Callable:
    """The step with another use of the optimizer, a function of it and of a callable that gives the loss."""
    return lambda optimizer, *others: step(optimizer, lambda: _loss_of_step(*others))


VAE_TRAINING_STEP = Exercise(
    "vae.vae_training_step",
    '"One number to trade by", equation (6.10)',
    vae.vae_training_step,
    _step_cases,
    (
        *step_mistakes(_stepping),
        Misconception(
            "mean decoded",
            _step_with_draw(lambda mean, log_variance, noise: mean),
            "The decoder must see draws: from the mean alone nothing asks the encoder for narrow codes.",
        ),
        Misconception(
            "noise decoded",
            _step_with_draw(lambda mean, log_variance, noise: noise),
            "The decoder sees noise that knows nothing of x: stretch it, and move it to the mean.",
        ),
        Misconception(
            "draw cut from the encoder",
            _step_with_draw(lambda *code: vae.reparameterize(*code).detach()),
            "The reconstruction's gradient must reach the encoder: the draw is detached.",
        ),
        Misconception(
            "mean cut in the draw",
            _step_with_draw(lambda mean, *others: vae.reparameterize(mean.detach(), *others)),
            "The reconstruction's gradient must reach the encoder's mean.",
        ),
        Misconception(
            "spread cut in the draw",
            _step_with_draw(
                lambda mean, log_variance, noise: vae.reparameterize(mean, log_variance.detach(), noise)
            ),
            "The reconstruction's gradient must reach the encoder's log-variance: it asks for narrow codes.",
        ),
        Misconception(
            "variance for standard deviation",
            _step_with_draw(lambda mean, log_variance, noise: mean + log_variance.exp() * noise),
            "exp(log_variance) is the variance; noise is stretched by the standard deviation, its root.",
        ),
        Misconception(
            "log-variance for standard deviation",
            _step_with_draw(lambda mean, log_variance, noise: mean + log_variance * noise),
            "log_variance is a logarithm: a standard deviation takes an exponential.",
        ),
        Misconception(
            "sign of the noise",
            _step_with_draw(lambda mean, log_variance, noise: vae.reparameterize(mean, log_variance, -noise)),
            "The distribution is the same, but (6.8) adds the noise: same noise, same draw.",
        ),
        Misconception(
            "noise drawn anew",
            _step_with_draw(
                lambda mean, log_variance, noise: vae.reparameterize(
                    mean, log_variance, torch.randn_like(mean)
                )
            ),
            "Use the noise that is given: then the step can be repeated.",
        ),
        Misconception(
            "prior forgotten",
            _step_with_loss(lambda x, x_hat, *others: vae.vae_loss(x, x_hat, *others[:2], 0.0)),
            "This trains an autoencoder without a prior: the divergence is missing.",
        ),
        Misconception(
            "weight ignored",
            _step_with_loss(lambda x, x_hat, *others: vae.vae_loss(x, x_hat, *others[:2], 1.0)),
            "kl_weight is not used: it multiplies the divergence.",
        ),
        Misconception(
            "mean squared error",
            _step_with_loss(
                lambda x, x_hat, mean, log_variance, kl_weight: (
                    mse_loss(x_hat, x) + kl_weight * vae.kl_to_standard_normal(mean, log_variance).mean()
                )
            ),
            "The error is summed over the numbers of a sample; as a mean, another kl_weight is meant.",
        ),
        Misconception(
            "loss divided by the numbers of a sample",
            _step_with_loss(lambda x, *others: vae.vae_loss(x, *others) / x[0].numel()),
            "The step is along the loss as it is, not along its mean over the numbers of a sample.",
        ),
        Misconception(
            "sign turned",
            _step_with_loss(lambda *arguments: -vae.vae_loss(*arguments)),
            "The loss is to fall: an optimizer steps against the gradient by itself.",
        ),
    ),
)


def _scale_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, side = draws.integer(5, 6), draws.integer(3, 4)
    height, width = draws.integer(2, 3), draws.integer(4, 5)

    def case(note, *shape, spread=1.0, middle=0.0, dtype=torch.float64):
        # Channels and samples differ in mean and spread, as a VAE's do.
        channels = draws.uniform(1, shape[1], 1, 1, low=0.5, high=2.0)
        samples = draws.uniform(shape[0], 1, 1, 1, low=0.5, high=2.0)
        offsets = draws.normal(1, shape[1], 1, 1)
        latents = spread * (channels * samples * draws.normal(*shape) + offsets) + middle
        return Case(note, (latents.to(dtype),))

    return [
        case("latents", batch, 4, height, width),
        case("latents far from mean 0", batch, 4, height, width, middle=3.0),
        case("large latents", batch, 4, height, width, spread=8.0),
        case("small latents", batch, 4, height, width, spread=0.05),
        case("all axes of one length", side, side, side, side),
        case("a single sample", 1, 4, height, width),
        case("a single channel", batch, 1, height, width),
        case("float32", batch, 4, height, width, dtype=torch.float32),
    ]


LATENT_SCALE = Exercise(
    "vae.latent_scale",
    '"The latents\' scale", equation (6.19)',
    vae.latent_scale,
    _scale_cases,
    (
        Misconception(
            "multiply and divide swapped",
            lambda z: z.std(),
            "This is what latents are to be divided by; asked for is what they are to be multiplied by.",
        ),
        Misconception(
            "variance for standard deviation",
            lambda z: 1 / z.var(),
            "The factor s makes the variance s^2 times as large: divide by the root of the variance.",
        ),
        Misconception(
            "root of the standard deviation",
            lambda z: z.std().rsqrt(),
            "The standard deviation is a root already: none is taken of it.",
        ),
        Misconception(
            "root mean square",
            lambda z: (z**2).mean().rsqrt(),
            "The standard deviation is measured about the mean, which need not be 0.",
        ),
        Misconception(
            "divided by N",
            lambda z: 1 / z.std(correction=0),
            "Nearly right: this divides the squares by N; torch's std, which is asked for, by N - 1.",
        ),
        Misconception(
            "a factor for each channel",
            lambda z: 1 / z.transpose(0, 1).flatten(1).std(dim=1),
            "One number serves all channels: factors of their own would change how they compare.",
        ),
        Misconception(
            "a factor for each sample",
            lambda z: 1 / z.flatten(1).std(dim=1),
            "One number serves all samples: decoding could not know a factor of each.",
        ),
        Misconception(
            "a factor for each number",
            lambda z: 1 / z.std(dim=0),
            "One number serves all places and channels: take the standard deviation of everything together.",
        ),
        Misconception(
            "mean of the channels' deviations",
            lambda z: 1 / z.transpose(0, 1).flatten(1).std(dim=1).mean(),
            "Channels also differ in their means: take the standard deviation of all numbers together.",
        ),
        Misconception(
            "mean of the channels' factors",
            lambda z: (1 / z.transpose(0, 1).flatten(1).std(dim=1)).mean(),
            "A mean of factors is dominated by the quietest channel: take all numbers together.",
        ),
        Misconception(
            "mean of each number's deviation",
            lambda z: 1 / z.std(dim=0).mean(),
            "Places and channels also differ in their means: take the standard deviation of everything.",
        ),
        Misconception(
            "mean of the samples' deviations",
            lambda z: 1 / z.flatten(1).std(dim=1).mean(),
            "Samples also differ in their means: take the standard deviation of all numbers together.",
        ),
        Misconception(
            "first sample alone",
            lambda z: 1 / z[0].std(),
            "One sample's latents may be quiet or loud: take the whole batch.",
        ),
        Misconception(
            "largest value",
            lambda z: 1 / z.abs().max(),
            "The largest value depends on how many numbers there are: the standard deviation is to be 1.",
        ),
        Misconception(
            "average size",
            lambda z: 1 / z.abs().mean(),
            "This makes the mean of the absolute values 1; asked for is the standard deviation.",
        ),
        Misconception(
            "Stable Diffusion's number",
            lambda z: torch.full((), 0.18215, dtype=z.dtype),
            "0.18215 belongs to the latents of one VAE: each has a scale of its own, to be measured.",
        ),
        Misconception(
            "scaled latents",
            lambda z: z / z.std(),
            "Only the factor is asked for: it is stored, and used again for decoding.",
        ),
    ),
)


EXERCISES = [
    KL_TO_STANDARD_NORMAL,
    NEGATIVE_LOG_LIKELIHOOD,
    BOUND_ON_GRID,
    REPARAMETERIZE,
    VAE_LOSS,
    VAE_TRAINING_STEP,
    LATENT_SCALE,
]
