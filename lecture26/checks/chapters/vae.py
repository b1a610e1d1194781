"""Exercises of chapter 06: the bound's two terms, the draw, the loss, active latents, PSNR, the scale."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lecture26 import vae

from ..core import Case, Exercise, Misconception
from ..draws import Draws


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


# How far each latent number moves (the standard deviation of its mean over the samples, for the threshold
# 0.01), and around what. Between them, the numbers tell the mistakes apart, and no variance is near the
# threshold, whether divided by N or by N - 1.
MOVES = (
    (0.006, 0.0),
    (0.03, 0.0),
    (0.03, 2.0),
    (0.2, 0.0),
    (0.5, -1.0),
    (1.5, 0.0),
    (0.0, 2.0),
    (0.4, 0.5),
)


def _active_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, more = draws.integer(4, 5), draws.integer(20, 24), draws.integer(10, 12)

    def case(note, count, *shape, threshold=0.01, moves=MOVES, dtype=torch.float64):
        size = math.prod(shape)
        order = draws.permutation(size) % len(moves)
        spread, middle = torch.tensor(moves, dtype=torch.float64)[order].T  # (size,) each
        shape_of_moves = draws.normal(count, size)
        shape_of_moves = (shape_of_moves - shape_of_moves.mean(dim=0)) / shape_of_moves.std(dim=0)
        mean = middle + spread * math.sqrt(threshold / 0.01) * shape_of_moves
        return Case(note, (mean.reshape(count, *shape).to(dtype), threshold))

    return [
        case("latent vectors", many, more),
        case("as many samples as latent numbers", more, more),
        case("latent images", many, 4, 2, 3),
        case("few samples", few, 9),
        case("another threshold", many, more, threshold=0.09),
        case("a lower threshold", many, more, threshold=0.0004),
        case("a collapsed encoder", many, 8, moves=MOVES[:2]),
        case("every number active", many, 8, moves=MOVES[3:6]),
        case("float32", many, 4, 2, 2, dtype=torch.float32),
    ]


def _spread_above(spread: Callable[[Tensor], Tensor]) -> Callable:
    """Whether some measure of each latent number, right or wrong, lies above the threshold."""
    return lambda mean, threshold: spread(mean) > threshold


ACTIVE_LATENTS = Exercise(
    "vae.active_latents",
    '"On handwritten digits", equation (6.13)',
    vae.active_latents,
    _active_cases,
    (
        Misconception(
            "standard deviation for variance",
            _spread_above(lambda mean: mean.std(dim=0)),
            "The threshold is one for variances, squares: a standard deviation passes it far too soon.",
        ),
        Misconception(
            "mean of the squares",
            _spread_above(lambda mean: (mean**2).mean(dim=0)),
            "A number that is 2 for every image says nothing: take the spread about the mean.",
        ),
        Misconception(
            "size of the average",
            _spread_above(lambda mean: mean.mean(dim=0).abs()),
            "How far from 0 a number is on average says nothing; ask how far it moves from sample to sample.",
        ),
        Misconception(
            "average size",
            _spread_above(lambda mean: mean.abs().mean(dim=0)),
            "A number can be large for every image and yet say nothing: take the variance over the samples.",
        ),
        Misconception(
            "range over the samples",
            _spread_above(lambda mean: mean.amax(dim=0) - mean.amin(dim=0)),
            "The distance from smallest to largest grows with the number of samples: take the variance.",
        ),
        Misconception(
            "variance over the latent numbers",
            _spread_above(lambda mean: mean.flatten(1).var(dim=1)),
            "This is taken along each sample; a number is active where it moves from sample to sample.",
        ),
        Misconception(
            "one variance for all",
            _spread_above(lambda mean: mean.var()),
            "Each latent number has a variance of its own: all axes but the samples' stay.",
        ),
        Misconception(
            "channel by channel",
            _spread_above(lambda mean: mean.transpose(0, 1).flatten(1).var(dim=1)),
            "Every place of a latent image is a number of its own: take the variance over the samples alone.",
        ),
        Misconception(
            "collapsed ones",
            lambda mean, threshold: ~vae.active_latents(mean, threshold),
            "These are the numbers that do not move: active means above the threshold.",
        ),
        Misconception(
            "whatever moves",
            lambda mean, threshold: mean.var(dim=0) > 0,
            "Numbers that tremble a little say nothing: compare with the threshold.",
        ),
        Misconception(
            "threshold ignored",
            lambda mean, threshold: vae.active_latents(mean, 0.01),
            "0.01 is the default only: use the threshold that is given.",
        ),
        Misconception(
            "root of the threshold",
            lambda mean, threshold: mean.var(dim=0) > math.sqrt(threshold),
            "The threshold is one for variances as it is: no root.",
        ),
        Misconception(
            "numbers for truth values",
            lambda mean, threshold: vae.active_latents(mean, threshold).to(mean.dtype),
            "Asked for are truth values, with which one can choose latent numbers.",
        ),
        Misconception(
            "variances",
            lambda mean, threshold: mean.var(dim=0),
            "These are the variances; asked for is which of them lie above the threshold.",
        ),
        Misconception(
            "how many",
            lambda mean, threshold: vae.active_latents(mean, threshold).sum(),
            "Asked for is which numbers are active, not how many.",
        ),
        Misconception(
            "share",
            lambda mean, threshold: vae.active_latents(mean, threshold).to(mean.dtype).mean(),
            "Asked for is which numbers are active, not what share of them.",
        ),
        Misconception(
            "each sample by itself",
            lambda mean, threshold: (mean - mean.mean(dim=0)) ** 2 > threshold,
            "This looks at each sample alone; a variance is a mean over the samples.",
        ),
    ),
)


def _psnr_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, side = draws.integer(4, 5), draws.integer(3, 4)
    height, width = draws.integer(5, 6), draws.integer(7, 8)

    def case(note, *shape, error=0.3, gradient=False, **kind):
        x = draws.uniform(*shape, low=-1.0, high=1.0, **kind)
        # Each image has an error of its own size, so that a mean over the batch is none of theirs.
        sizes = error * draws.uniform(shape[0], *[1] * (len(shape) - 1), low=0.2, high=2.0, **kind)
        x_hat = (x + sizes * draws.normal(*shape, **kind)).requires_grad_(gradient)
        return Case(note, (x, x_hat))

    return [
        case("images", batch, 3, height, width),
        case("grey images", batch, 1, height, width),
        case("all axes of one length", side, side, side, side),
        case("a single image", 1, 3, height, width),
        case("a single pixel", batch, 3, 1, 1),
        case("nearly the same", batch, 3, height, width, error=1e-4),
        case("far beyond [-1, 1], an error above the range", batch, 3, height, width, error=4.0),
        case("float32", batch, 3, height, width, dtype=torch.float32),
        case("reconstructions with gradient", batch, 3, height, width, gradient=True),
    ]


def _decibels_of(
    peak_squared: Callable[[Tensor], Tensor | float], error: Callable[[Tensor], Tensor]
) -> Callable:
    """10 log10 of a squared peak of x over an error, right or wrong."""
    return lambda x, x_hat: 10 * torch.log10(peak_squared(x) / error(x - x_hat))


def _mean_square(difference: Tensor) -> Tensor:
    return (difference**2).flatten(1).mean(dim=1)


PSNR = Exercise(
    "vae.psnr",
    '"Decibels", equation (6.16)',
    vae.psnr,
    _psnr_cases,
    (
        Misconception(
            "range 1",
            _decibels_of(lambda x: 1.0, _mean_square),
            "This is for images in [0, 1]; ours lie in [-1, 1], a wider range: 6 decibels are missing.",
        ),
        Misconception(
            "range 255",
            _decibels_of(lambda x: 255.0**2, _mean_square),
            "This is for images of bytes; ours lie in [-1, 1].",
        ),
        Misconception(
            "range not squared",
            _decibels_of(lambda x: 2.0, _mean_square),
            "The error is one of squares, so the range is squared, too: 3 decibels are missing.",
        ),
        Misconception(
            "range squared twice",
            _decibels_of(lambda x: 16.0, _mean_square),
            "The range from -1 to 1 is squared once.",
        ),
        Misconception(
            "largest value of the batch",
            _decibels_of(lambda x: x.max() ** 2, _mean_square),
            "The peak is the range that images can have; what the batch holds does not matter.",
        ),
        Misconception(
            "largest value of each image",
            _decibels_of(lambda x: x.flatten(1).amax(dim=1) ** 2, _mean_square),
            "The peak is the range that images can have, the same for dark ones and bright ones.",
        ),
        Misconception(
            "range of each image",
            _decibels_of(lambda x: (x.flatten(1).amax(1) - x.flatten(1).amin(1)) ** 2, _mean_square),
            "The range is the one that images can have, the same for all, not that found in each.",
        ),
        Misconception(
            "signal's own power",
            _decibels_of(_mean_square, _mean_square),
            "This is the signal-to-noise ratio; the peak one has the squared range in place of the power.",
        ),
        Misconception(
            "20 for 10",
            lambda x, x_hat: 2 * vae.psnr(x, x_hat),
            "20 stands before the logarithm of a ratio of amplitudes; this one is a ratio of squares.",
        ),
        Misconception(
            "10 for 20",
            lambda x, x_hat: vae.psnr(x, x_hat) / 2,
            "With the root of the error, the ratio is one of amplitudes: 20 stands before its logarithm.",
        ),
        Misconception(
            "root of the error",
            _decibels_of(lambda x: 4.0, lambda d: _mean_square(d).sqrt()),
            "Only one of the two is squared here: the squared range belongs to the mean of the squares.",
        ),
        Misconception(
            "natural logarithm",
            lambda x, x_hat: vae.psnr(x, x_hat) * math.log(10),
            "Decibels are ten times the logarithm to base 10.",
        ),
        Misconception(
            "bels",
            lambda x, x_hat: vae.psnr(x, x_hat) / 10,
            "A factor 10 is missing: these are bels, ten decibels each.",
        ),
        Misconception(
            "upside down",
            lambda x, x_hat: -vae.psnr(x, x_hat),
            "The better the reconstruction, the more decibels: the error stands below.",
        ),
        Misconception(
            "error summed over the image",
            _decibels_of(lambda x: 4.0, lambda d: _per_sample(d**2)),
            "The error is the mean over all numbers of an image; as a sum it grows with the image.",
        ),
        Misconception(
            "error of the whole batch",
            _decibels_of(lambda x: 4.0, lambda d: (d**2).mean()),
            "Each image has an error of its own; one bad image must not stand for all.",
        ),
        Misconception(
            "averaged over the batch",
            lambda x, x_hat: vae.psnr(x, x_hat).mean(),
            "Asked for is one number for each image; the caller averages.",
        ),
        Misconception(
            "channel by channel",
            _decibels_of(lambda x: 4.0, lambda d: (d**2).mean(dim=(2, 3))),
            "The error of an image is the mean over its channels as well.",
        ),
        Misconception(
            "absolute error",
            _decibels_of(lambda x: 4.0, lambda d: d.abs().flatten(1).mean(dim=1)),
            "The differences are squared before the mean.",
        ),
        Misconception(
            "square of the mean difference",
            _decibels_of(lambda x: 4.0, lambda d: d.flatten(1).mean(dim=1) ** 2),
            "Differences of opposite sign must not cancel: square first, then average.",
        ),
        Misconception(
            "clamped",
            lambda x, x_hat: vae.psnr(x, x_hat.clamp(-1, 1)),
            "The reconstruction is compared as it comes; who wants it clamped, clamps it before.",
        ),
        Misconception(
            "guarded against 0",
            _decibels_of(lambda x: 4.0, lambda d: _mean_square(d) + 1e-8),
            "What is added to the error caps every value. Where both images are equal, infinity is right.",
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
    REPARAMETERIZE,
    VAE_LOSS,
    ACTIVE_LATENTS,
    PSNR,
    LATENT_SCALE,
]
