"""Chapter 06 against oracles: torch's distributions, models whose evidence is known, diffusers' blocks."""

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed, seeded
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torchmetrics.functional.image import peak_signal_noise_ratio
from typer.testing import CliRunner

from lecture26 import recipes
from lecture26.__main__ import EXIT_INTERRUPTED, EXIT_USER_ERROR, app
from lecture26.ddpm import normal_kl
from lecture26.kit.checkpoints import checkpoint_files, load_card, save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.evaluation import read
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import Scenes, Shapes, ShapesAndScenes
from lecture26.recipes import vae as vae_recipes
from lecture26.vae import (
    KLVAE,
    PlainBlock,
    SmallVAE,
    Upsample,
    active_latents,
    bound_on_grid,
    kl_to_standard_normal,
    latent_scale,
    negative_log_likelihood,
    psnr,
    reparameterize,
    vae_loss,
    vae_training_step,
)

SHAPES = [(5, 3), (4, 4, 2, 3), (1, 7), (3, 1)]
SMALL = {"latent_channels": 2, "base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1}
GRID = torch.linspace(-16, 16, 6001, dtype=torch.float64)  # for integrals over one latent number


def small_vae(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return perturbed(KLVAE(**SMALL | changes), dtype).eval()


def code(*shape, seed=0):
    """A mean and a log-variance."""
    return 2 * normal(*shape, seed=seed), 1.5 * normal(*shape, seed=seed + 1)


def prior_like(mean):
    return Normal(torch.zeros_like(mean), torch.ones_like(mean))


def encoded(mean, log_variance):
    """The distribution of a sample's latents, as torch has it."""
    return Normal(mean, (log_variance / 2).exp())


def hermite(count=24):
    """Nodes and weights with which the mean over N(0, 1) of any polynomial below 2 count is exact."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def integral(values):
    """Over GRID, by the trapezoidal rule, which is exact to rounding for smooth bumps inside."""
    return torch.trapezoid(values, GRID)


# The divergence from the prior


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch_with_its_gradients(shape):
    mean, log_variance = (leaf.requires_grad_() for leaf in code(*shape))
    ours = kl_to_standard_normal(mean, log_variance)
    theirs = kl_divergence(encoded(mean, log_variance), prior_like(mean)).flatten(1).sum(dim=1)
    agree(ours, theirs, 1e-12)
    weights = normal(len(ours), seed=9)
    for own, expected in zip(
        *(torch.autograd.grad(kl, (mean, log_variance), weights) for kl in (ours, theirs)), strict=True
    ):
        agree(own, expected, 1e-12)


def test_kl_is_that_of_chapter_01_summed():
    mean, log_variance = code(3, 2, 4, 4)
    zero = torch.zeros(())
    agree(
        kl_to_standard_normal(mean, log_variance),
        normal_kl(mean, log_variance, zero, zero).sum(dim=(1, 2, 3)),
        1e-12,
    )


@pytest.mark.parametrize(("mean", "log_variance"), [(0.0, 0.0), (1.5, -2.0), (-0.7, 1.0), (3.0, -5.0)])
def test_kl_is_the_integral_that_defines_it(mean, log_variance):
    mean, log_variance = torch.tensor([[mean]]).double(), torch.tensor([[log_variance]]).double()
    q, p = encoded(mean, log_variance).log_prob(GRID)[0], prior_like(mean).log_prob(GRID)[0]
    agree(kl_to_standard_normal(mean, log_variance)[0], integral(q.exp() * (q - p)), 1e-10)


def test_kl_is_zero_at_the_prior_only():
    zeros = torch.zeros(1, 6, dtype=torch.float64)
    assert kl_to_standard_normal(zeros, zeros) == 0
    assert (kl_to_standard_normal(*code(200, 1)) > 0).all()
    for mean, log_variance in ((zeros, zeros + 1e-3), (zeros + 1e-3, zeros), (zeros, zeros - 1e-3)):
        assert kl_to_standard_normal(mean, log_variance) > 0


def test_kl_over_the_whole_range_of_log_variances():
    log_variance = torch.tensor([[-30.0], [20.0]], dtype=torch.float64)
    mean = torch.zeros_like(log_variance)
    expected = torch.tensor([(math.exp(-30) + 29) / 2, (math.exp(20) - 21) / 2], dtype=torch.float64)
    agree(kl_to_standard_normal(mean, log_variance), expected, 1e-12)


# The likelihood


@pytest.mark.parametrize("std", [0.05, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_likelihood_is_that_of_torch(shape, std):
    x, x_hat = normal(*shape), normal(*shape, seed=1)
    expected = -Independent(Normal(x_hat, std), len(shape) - 1).log_prob(x)
    agree(negative_log_likelihood(x, x_hat, std), expected, 1e-12)


@pytest.mark.parametrize("std", [0.1, 1.0, 2.0])
def test_likelihood_is_a_density(std):
    x = GRID[:, None]
    agree(integral((-negative_log_likelihood(x, torch.full_like(x, 0.7), std)).exp()).item(), 1.0, 1e-6)


# The draw


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_draw(shape):
    mean, log_variance = (leaf.requires_grad_() for leaf in code(*shape))
    noise, upstream = normal(*shape, seed=5), normal(*shape, seed=6)
    z = reparameterize(mean, log_variance, noise)
    of_mean, of_log_variance = torch.autograd.grad(z, (mean, log_variance), upstream)
    agree(of_mean, upstream, 1e-12)  # dz / d mu = 1
    sigma = encoded(mean, log_variance).stddev.detach()
    agree(of_log_variance, upstream * noise * sigma / 2, 1e-12)  # dz / d log(sigma^2) = sigma eps / 2


def test_draws_are_those_of_torch_for_the_same_noise():
    mean, log_variance = code(4, 5)
    torch.manual_seed(3)
    theirs = encoded(mean, log_variance).rsample()
    torch.manual_seed(3)
    noise = torch.normal(torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64))
    agree(reparameterize(mean, log_variance, noise), theirs, 1e-12)


def test_mean_and_variance_of_draws():
    nodes, weights = hermite()
    mean, log_variance = code(6, 1)
    z = reparameterize(mean, log_variance, nodes.expand(6, -1))
    agree(z @ weights, mean[:, 0], 1e-12)
    agree((z - mean) ** 2 @ weights, log_variance[:, 0].exp(), 1e-12)


def test_the_mean_gradient_of_draws_is_the_gradient_of_the_mean():
    """For f(z) = z^3 the mean over z is mu^3 + 3 mu sigma^2, whose derivatives are known."""
    nodes, weights = hermite()
    mean, log_variance = (leaf.requires_grad_() for leaf in code(5, 1))
    z = reparameterize(mean, log_variance, nodes.expand(5, -1))
    of_mean, of_log_variance = torch.autograd.grad((z**3 @ weights).sum(), (mean, log_variance))
    mu, variance = mean.detach(), log_variance.detach().exp()
    agree(of_mean, 3 * mu**2 + 3 * variance, 1e-10)
    agree(of_log_variance, 3 * mu * variance, 1e-10)


# The bound, where the evidence is known


def linear_gaussian(num_latents, num_numbers, std):
    """p(z) = N(0, I), p(x | z) = N(W z + b, std^2 I): the weights, the evidence, and the posterior of x."""
    weight, offset = normal(num_numbers, num_latents, seed=3), normal(num_numbers, seed=4)
    identity = torch.eye(num_numbers, dtype=torch.float64)
    evidence = MultivariateNormal(offset, weight @ weight.T + std**2 * identity)

    def posterior(x):
        precision = torch.eye(num_latents, dtype=torch.float64) + weight.T @ weight / std**2
        mean = (x - offset) @ weight @ torch.linalg.inv(precision) / std**2
        return MultivariateNormal(mean, precision_matrix=precision.expand(len(x), -1, -1))

    return weight, offset, evidence, posterior


def bound(x, mean, log_variance, decode, std):
    """The ELBO of each sample, made of the chapter's parts; the mean over the draws by Hermite rules."""
    nodes, weights = hermite(12)
    num_latents = mean.shape[1]
    noise = torch.cartesian_prod(*[nodes] * num_latents).reshape(-1, num_latents)  # (N, k)
    chances = torch.cartesian_prod(*[weights] * num_latents).reshape(-1, num_latents).prod(dim=1)
    total = -kl_to_standard_normal(mean, log_variance)
    for eps, chance in zip(noise, chances, strict=True):
        z = reparameterize(mean, log_variance, eps.expand_as(mean))
        total = total - chance * negative_log_likelihood(x, decode(z), std)
    return total


@pytest.mark.parametrize(("num_latents", "num_numbers"), [(1, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_bound_of_a_linear_model_lies_below_the_evidence_by_the_divergence_from_the_posterior(
    num_latents, num_numbers, std
):
    weight, offset, evidence, posterior = linear_gaussian(num_latents, num_numbers, std)
    x = normal(7, num_numbers, seed=5)
    mean, log_variance = code(7, num_latents, seed=6)
    elbo = bound(x, mean, log_variance, lambda z: z @ weight.T + offset, std)
    q = MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    gap = kl_divergence(q, posterior(x))
    assert (gap > 1e-3).all()
    agree(elbo + gap, evidence.log_prob(x), 1e-9)


def test_bound_is_the_evidence_where_the_encoder_knows_the_posterior():
    weight, offset, evidence, posterior = linear_gaussian(1, 4, 0.5)
    x = normal(6, 4, seed=5)
    exact = posterior(x)
    mean, log_variance = exact.mean, exact.variance.log()
    decode = lambda z: z @ weight.T + offset  # noqa: E731
    agree(bound(x, mean, log_variance, decode, 0.5), evidence.log_prob(x), 1e-10)
    mean, log_variance = mean.clone().requires_grad_(), log_variance.clone().requires_grad_()
    gradients = torch.autograd.grad(bound(x, mean, log_variance, decode, 0.5).sum(), (mean, log_variance))
    for gradient in gradients:  # it cannot be raised any more
        agree(gradient, torch.zeros_like(gradient), 1e-9)


def test_bound_of_a_curved_model_against_quadrature():
    """One latent number, a decoder that bends: evidence and posterior by integrals over z."""
    std, x = 0.4, torch.tensor([[0.3, -0.2], [1.2, 0.9]], dtype=torch.float64)

    def decode(z):
        return torch.cat([z.sin(), z**2 / 4], dim=1)

    log_joint = torch.stack(
        [
            prior_like(GRID).log_prob(GRID)
            - negative_log_likelihood(one.expand(len(GRID), 2), decode(GRID[:, None]), std)
            for one in x
        ]
    )  # (2, grid)
    evidence = integral(log_joint.exp()).log()
    log_posterior = log_joint - evidence[:, None]
    mean, log_variance = torch.tensor([[0.4], [1.3]]).double(), torch.tensor([[-1.5], [-2.5]]).double()
    log_q = encoded(mean, log_variance).log_prob(GRID)
    gap = integral(log_q.exp() * (log_q - log_posterior))
    elbo = bound(x, mean, log_variance, decode, std)
    assert (gap > 0).all()
    agree(elbo, evidence - gap, 1e-6)


def even_grid(num_latents, reach=9.0, spacing=0.2):
    """Codes (G, k) and the volume of a cell."""
    side = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
    return torch.cartesian_prod(*[side] * num_latents).reshape(-1, num_latents), spacing**num_latents


@pytest.mark.parametrize(("num_latents", "num_numbers"), [(1, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("std", [0.5, 1.0])
def test_grid_knows_evidence_and_bound_of_a_linear_model(num_latents, num_numbers, std):
    weight, offset, evidence, posterior = linear_gaussian(num_latents, num_numbers, std)
    x = normal(5, num_numbers, seed=5)
    mean, log_variance = normal(5, num_latents, seed=6), -0.5 * normal(5, num_latents, seed=7).abs()
    decode = lambda z: z @ weight.T + offset  # noqa: E731
    log_evidence, elbo = bound_on_grid(x, decode, std, mean, log_variance, *even_grid(num_latents))
    agree(log_evidence, evidence.log_prob(x), 1e-9)
    agree(elbo, bound(x, mean, log_variance, decode, std), 1e-9)
    q = MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    agree(log_evidence - elbo, kl_divergence(q, posterior(x)), 1e-8)


def test_grid_finds_the_evidence_where_every_density_underflows():
    weight, offset, evidence, _ = linear_gaussian(1, 4, 0.5)
    x = 300 + normal(2, 4, seed=5)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    # the posterior lies far out, and has a width of its own there
    codes, volume = even_grid(1, reach=400.0, spacing=0.02)
    log_evidence, _ = bound_on_grid(x, lambda z: z @ weight.T + offset, 0.5, zero, zero, codes, volume)
    assert (log_evidence < -1000).all()
    agree(log_evidence, evidence.log_prob(x), 1e-6 * log_evidence.abs().max().item())


# The loss


@pytest.mark.parametrize("std", [0.1, 1.0, 2.0])
def test_loss_is_the_bound_times_the_decoders_variance(std):
    x, x_hat = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1)
    mean, log_variance = code(5, 2, 2, 2)
    bound = negative_log_likelihood(x, x_hat, std) + kl_to_standard_normal(mean, log_variance)
    constant = 48 / 2 * math.log(2 * math.pi * std**2)
    agree(vae_loss(x, x_hat, mean, log_variance, std**2), std**2 * (bound - constant).mean(), 1e-10)


@pytest.mark.parametrize("kl_weight", [0.0, 1e-6, 0.3, 4.0])
def test_gradients_of_the_loss(kl_weight):
    x, x_hat = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1).requires_grad_()
    mean, log_variance = (leaf.requires_grad_() for leaf in code(5, 2, 2, 2))
    loss = vae_loss(x, x_hat, mean, log_variance, kl_weight)
    assert loss.shape == ()
    gradients = torch.autograd.grad(loss, (x_hat, mean, log_variance))
    expected = (x_hat - x) / 5, kl_weight * mean / 5, kl_weight * (log_variance.exp() - 1) / 10
    for gradient, wanted in zip(gradients, expected, strict=True):
        agree(gradient, wanted.detach(), 1e-12)


def test_training_step_follows_the_loss_downhill_by_the_learning_rate():
    torch.manual_seed(0)
    network = SmallVAE(5, 2, hidden=8).double()
    x, noise = normal(6, 5), normal(6, 2, seed=1)
    before = [weight.detach().clone() for weight in network.parameters()]
    mean, log_variance = network.encode(x)
    loss = vae_loss(x, network.decode(reparameterize(mean, log_variance, noise)), mean, log_variance, 0.3)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)  # left by a step before
    returned = vae_training_step(optimizer, network.encode, network.decode, x, noise, 0.3)
    agree(returned, loss.detach(), 1e-12)
    assert not returned.requires_grad
    for weight, old, gradient in zip(network.parameters(), before, gradients, strict=True):
        agree(weight.detach(), old - 0.01 * gradient, 1e-12)


def test_training_steps_find_the_best_linear_autoencoder():
    """Data of one number: the squared error and the divergence of the optimum are known, equation 6.12."""
    variance, weight = 2.0, 0.5
    x = normal(500, 1)
    x = math.sqrt(variance) * (x - x.mean()) / x.std(correction=0)
    slope, log_s2, out = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, -0.5, 0.5))
    optimizer = torch.optim.Adam([slope, log_s2, out], lr=0.03)
    noise = torch.cat([torch.ones(500, 1), -torch.ones(500, 1)]).double()  # mean 0, variance 1

    def encode(x):
        return slope * x, log_s2.expand_as(x)

    for _ in range(400):
        vae_training_step(optimizer, encode, lambda z: out * z, x.repeat(2, 1), noise, weight)
    mean, log_variance = (value.detach() for value in encode(x))
    agree(kl_to_standard_normal(mean, log_variance).mean(), torch.tensor(math.log(4.0)).double() / 2, 1e-3)
    agree(out.detach() ** 2, torch.tensor(variance - weight, dtype=torch.float64), 1e-2)


def test_small_vae_has_codes_of_the_size_asked_for_and_treats_samples_apart():
    network = SmallVAE(7, 3, hidden=8).double()
    x = normal(4, 7)
    mean, log_variance = network.encode(x)
    assert mean.shape == log_variance.shape == (4, 3) and network.decode(mean).shape == (4, 7)
    agree(network.decode(network.encode(x[1:2])[0]), network.decode(mean)[1:2], 1e-12)


# What collapses


def test_active_latents_are_those_whose_variance_numpy_finds():
    mean = normal(50, 3, 4, 4) * torch.logspace(-3, 1, 48, dtype=torch.float64).reshape(3, 4, 4) + 1.0
    active = active_latents(mean)
    assert active.dtype == torch.bool and 0 < active.sum() < 48
    assert np.array_equal(active.numpy(), mean.numpy().var(axis=0, ddof=1) > 0.01)
    assert np.array_equal(active_latents(mean, 1.0).numpy(), mean.numpy().var(axis=0, ddof=1) > 1.0)


@pytest.mark.parametrize(("weight", "active"), [(0.05, True), (20.0, False)])
def test_a_linear_latent_collapses_where_its_price_is_above_what_it_explains(weight, active):
    """Data along one direction with variance 1: with kl_weight (the decoder's variance) above that, the best
    encoder is the prior; below, its mean moves. The optimum of the bound is that of probabilistic PCA."""
    x = normal(400, 1)
    x = (x - x.mean()) / x.std(correction=0)
    slope, spread, out = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -1.0, 0.7))
    optimizer = torch.optim.LBFGS([slope, spread, out], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        mean, log_variance = slope * x, spread.expand_as(x)
        # the mean over the draws, in closed form: out^2 sigma^2 for each number more
        loss = vae_loss(x, out * mean, mean, log_variance, weight) + out**2 * spread.exp() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert active_latents(slope.detach() * x).tolist() == [active]
    agree(out.detach() ** 2, torch.tensor(max(1 - weight, 0.0), dtype=torch.float64), 1e-4)


# Decibels


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 1, 8, 8), (3, 3, 3, 3)])
def test_psnr_is_that_of_torchmetrics(shape):
    x = torch.rand(*shape, generator=seeded(), dtype=torch.float64) * 2 - 1
    x_hat = x + 0.3 * normal(*shape, seed=1) * torch.rand(shape[0], 1, 1, 1, generator=seeded(2))
    expected = [peak_signal_noise_ratio(b, a, data_range=2.0) for a, b in zip(x, x_hat, strict=True)]
    agree(psnr(x, x_hat), torch.stack(expected).double(), 1e-6)


def test_psnr_by_hand():
    x = torch.zeros(3, 3, 8, 8, dtype=torch.float64)
    x_hat = x.clone()
    x_hat[1], x_hat[2] = 0.02, 2.0
    agree(psnr(x, x_hat), torch.tensor([math.inf, 40.0, 0.0], dtype=torch.float64), 1e-12)


# The scale


def test_scaled_latents_have_standard_deviation_1_and_come_back():
    z = 3.7 * normal(6, 4, 5, 5) * torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None] + 2.0
    scale = latent_scale(z)
    assert scale.shape == () and scale.dtype == torch.float64
    agree((scale * z).std().item(), 1.0, 1e-12)
    agree((scale * z) / scale, z, 1e-12)
    agree(scale.item(), 1 / np.std(z.numpy(), ddof=1), 1e-12)


@pytest.mark.parametrize("factor", [1e-3, 0.2, 50.0])
def test_scale_of_stretched_and_shifted_latents(factor):
    z = normal(6, 4, 5, 5)
    agree(latent_scale(factor * z + 7), latent_scale(z) / factor, 1e-9)


# The network


@pytest.mark.parametrize("channels", [8, 16, 64])
def test_plain_block_is_that_of_diffusers(channels):
    ours = perturbed(PlainBlock(channels))
    groups = ours.branch[0].num_groups
    theirs = ResnetBlock2D(
        in_channels=channels, temb_channels=None, groups=groups, eps=1e-5, non_linearity="silu"
    ).double()
    pairs = zip((0, 2, 3, 5), (theirs.norm1, theirs.conv1, theirs.norm2, theirs.conv2), strict=True)
    for number, layer in pairs:
        layer.load_state_dict(ours.branch[number].state_dict())
    h = normal(2, channels, 6, 4)
    agree(ours(h), theirs(h, None), 1e-12)


def test_plain_block_begins_as_the_identity():
    h = normal(2, 16, 4, 4, dtype=torch.float32)
    agree(PlainBlock(16)(h), h, 0.0)


def test_upsample_is_that_of_diffusers():
    ours = perturbed(Upsample(8, 6))
    theirs = Upsample2D(8, use_conv=True, out_channels=6).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    h = normal(2, 8, 3, 5)
    agree(ours(h), theirs(h), 1e-12)


def layers_by_hand(module):
    """A convolution, a norm with its activation, and a block of these, with a module's weights in turn."""
    weights = iter(module.parameters())

    def conv(h, stride=1):
        return F.conv2d(h, next(weights), next(weights), stride, padding=1)

    def activated(h):
        return F.silu(F.group_norm(h, h.shape[1] // 8, next(weights), next(weights)))

    def block(h):
        return h + conv(activated(conv(activated(h))))

    return conv, activated, block


def test_encoder_and_decoder_by_hand():
    vae, x, z = small_vae(), normal(2, 3, 16, 8), normal(2, 2, 4, 2)
    conv, activated, block = layers_by_hand(vae.encoder)
    h = block(conv(F.pixel_unshuffle(x, 2)))
    h = block(conv(h, stride=2))
    agree(torch.cat(vae.encode(x), dim=1), conv(activated(h)), 1e-12)

    conv, activated, block = layers_by_hand(vae.decoder)
    h = block(conv(z))
    h = block(conv(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))
    agree(vae.decode(z), F.pixel_shuffle(conv(activated(h)), 2), 1e-12)


@pytest.mark.parametrize(
    ("changes", "channels", "size", "latents"),
    [
        ({}, 3, (64, 64), (4, 16, 16)),
        ({"latent_channels": 3, "base_channels": 8}, 3, (32, 64), (3, 8, 16)),
        ({"in_channels": 1, "base_channels": 8, "patch_size": 1}, 1, (12, 10), (4, 6, 5)),
        ({"base_channels": 8, "channel_multipliers": (1,), "patch_size": 1}, 3, (5, 7), (4, 5, 7)),
        ({"base_channels": 8, "channel_multipliers": (1, 2, 3)}, 3, (16, 8), (4, 2, 1)),
        ({"base_channels": 12, "num_blocks": 1, "patch_size": 4}, 3, (16, 16), (4, 2, 2)),
    ],
)
@torch.no_grad()
def test_sizes_of_latents_and_images(changes, channels, size, latents):
    vae = KLVAE(**changes)
    assert (vae.factor, vae.latent_channels) == (size[0] // latents[1], latents[0])
    mean, log_variance = vae.encode(normal(2, channels, *size, dtype=torch.float32))
    assert mean.shape == log_variance.shape == (2, *latents)
    assert vae.decode(mean).shape == (2, channels, *size)
    assert vae.decode(normal(1, latents[0], 3, 2, dtype=torch.float32)).shape == (
        1,
        channels,
        3 * vae.factor,
        2 * vae.factor,
    )


def test_forward_is_encode_draw_decode():
    vae, x, noise = small_vae(), normal(3, 3, 8, 16), normal(3, 2, 2, 4, seed=1)
    x_hat, mean, log_variance = vae(x, noise)
    expected = vae.encode(x)
    agree(mean, expected[0], 0.0)
    agree(log_variance, expected[1], 0.0)
    agree(x_hat, vae.decode(mean + (0.5 * log_variance).exp() * noise), 1e-12)
    assert not torch.isclose(x_hat, vae.decode(mean)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_network_keeps_the_dtype(dtype):
    vae = small_vae(dtype)
    outputs = vae(normal(2, 3, 8, 8, dtype=dtype), normal(2, 2, 2, 2, dtype=dtype))
    assert [output.dtype for output in outputs] == [dtype] * 3


def test_images_of_a_batch_do_not_depend_on_each_other():
    vae, x, noise = small_vae(), normal(4, 3, 8, 8), normal(4, 2, 2, 2, seed=1)
    for whole, part in zip(vae(x, noise), vae(x[1:3], noise[1:3]), strict=True):
        agree(whole[1:3], part, 1e-12)
    assert all(output.shape[0] == 0 for output in vae(x[:0], noise[:0]))


def test_network_is_the_same_in_training_and_draws_nothing_itself():
    vae, x, noise = small_vae(), normal(2, 3, 8, 8), normal(2, 2, 2, 2, seed=1)
    state = torch.get_rng_state()
    for before, after in zip(vae.eval()(x, noise), vae.train()(x, noise), strict=True):
        agree(before, after, 0.0)
    assert torch.equal(state, torch.get_rng_state())


@torch.no_grad()
def test_log_variance_is_clamped_and_mean_and_images_are_not():
    vae, x = small_vae(), normal(2, 3, 8, 8)
    vae.encoder[-1].bias[:2], vae.encoder[-1].bias[2:] = 100.0, torch.tensor([1e3, -1e3])
    mean, log_variance = vae.encode(x)
    assert mean.mean() > 90
    assert (log_variance[:, 0] == 20).all() and (log_variance[:, 1] == -30).all()
    vae.decoder[-1].bias += 50
    assert vae.decode(mean).mean() > 40


@torch.no_grad()
def test_a_draw_at_the_lower_end_is_the_mean():
    mean, log_variance = normal(2, 2, 2, 2), torch.full((2, 2, 2, 2), -30.0, dtype=torch.float64)
    agree(reparameterize(mean, log_variance, normal(2, 2, 2, 2, seed=1)), mean, 1e-5)
    assert kl_to_standard_normal(mean, log_variance).isfinite().all()


def test_every_parameter_learns():
    vae = small_vae()
    x = normal(3, 3, 8, 8)
    vae_loss(x, *vae(x, normal(3, 2, 2, 2, seed=1)), 0.1).backward()
    assert [name for name, parameter in vae.named_parameters() if not parameter.grad.any()] == []


def test_every_pixel_and_every_latent_counts():
    vae, x = small_vae(), normal(1, 3, 8, 8).requires_grad_()
    mean, log_variance = vae.encode(x)
    assert torch.autograd.grad(mean.sum() + log_variance.sum(), x)[0].all()
    z = normal(1, 2, 2, 2).requires_grad_()
    assert torch.autograd.grad(vae.decode(z).square().sum(), z)[0].all()


def test_network_runs_on_the_device_of_its_input():
    vae = small_vae(torch.float32)
    x, noise = normal(2, 3, 8, 8, dtype=torch.float32), normal(2, 2, 2, 2, dtype=torch.float32)
    expected = vae(x, noise)
    loss = vae_loss(x, *expected, 0.1)
    decibels, scale = psnr(x, expected[0]), latent_scale(expected[1])
    with simulated_device():
        there = vae.to(SIMULATED)(x.to(SIMULATED), noise.to(SIMULATED))
        x = x.to(SIMULATED)
        there = [*there, vae_loss(x, *there, 0.1), psnr(x, there[0]), latent_scale(there[1])]
        there = [values_of(output) for output in there]
    for output, value in zip(there, [*expected, loss, decibels, scale], strict=True):
        agree(output.detach(), value.detach(), 1e-5)


@pytest.mark.slow
def test_a_small_vae_learns():
    torch.manual_seed(0)
    vae = KLVAE(**SMALL)
    x = F.interpolate(normal(4, 3, 2, 2, dtype=torch.float32), (16, 16))
    optimizer, generator = torch.optim.Adam(vae.parameters(), 3e-3), seeded()
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        noise = torch.randn(4, 2, 4, 4, generator=generator)
        loss = vae_loss(x, *vae(x, noise), 1e-2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KLVAE(in_channels=0), ValueError, "in_channels must be at least 1; got 0"),
        (lambda: KLVAE(latent_channels=-1), ValueError, "latent_channels must be at least 1; got -1"),
        (lambda: KLVAE(base_channels=8.0), TypeError, "base_channels must be an int; got 8.0"),
        (lambda: KLVAE(num_blocks=0), ValueError, "num_blocks must be at least 1; got 0"),
        (lambda: KLVAE(patch_size=True), TypeError, "patch_size must be an int; got True"),
        (lambda: KLVAE(channel_multipliers=()), ValueError, r"channel_multipliers must hold .*got \(\)"),
        (lambda: KLVAE(channel_multipliers=2), TypeError, "channel_multipliers must be a tuple.*got 2"),
        (
            lambda: KLVAE(channel_multipliers=(1, 0)),
            ValueError,
            "channel_multipliers must be at least 1; got 0",
        ),
        (
            lambda: KLVAE(channel_multipliers=(1, 1.5)),
            TypeError,
            "channel_multipliers must be an int; got 1.5",
        ),
        (
            lambda: negative_log_likelihood(normal(2, 3, 4, 4), normal(2, 1, 4, 4), 1.0),
            ValueError,
            r"x_hat must have the shape of x, \(2, 3, 4, 4\); got \(2, 1, 4, 4\)",
        ),
        (
            lambda: psnr(normal(2, 3, 4, 4), normal(2, 1, 4, 4)),
            ValueError,
            r"x_hat must have the shape of x, \(2, 3, 4, 4\); got \(2, 1, 4, 4\)",
        ),
        (
            lambda: vae_loss(normal(2, 3), normal(1, 3), *code(2, 1), 1.0),
            ValueError,
            r"x_hat must have the shape of x, \(2, 3\); got \(1, 3\)",
        ),
        (
            lambda: active_latents(normal(1, 3)),
            ValueError,
            "mean must be of at least 2 samples; got 1",
        ),
        (
            lambda: small_vae()(normal(2, 3, 8, 8), normal(1, 2, 2, 2)),
            ValueError,
            r"noise must have the shape of the latents, \(2, 2, 2, 2\); got \(1, 2, 2, 2\)",
        ),
        (
            lambda: small_vae().encode(normal(2, 1, 8, 8)),
            ValueError,
            r"x must be of shape \(B, 3, H, W\) with sides that are multiples of 4; got \(2, 1, 8, 8\)",
        ),
        (lambda: small_vae().encode(normal(2, 3, 8, 6)), ValueError, r"multiples of 4; got \(2, 3, 8, 6\)"),
        (lambda: small_vae().encode(normal(2, 3, 6, 8)), ValueError, r"multiples of 4; got \(2, 3, 6, 8\)"),
        (lambda: small_vae().encode(normal(3, 8, 8)), ValueError, r"x must be .*got \(3, 8, 8\)"),
        (
            lambda: small_vae().decode(normal(2, 3, 2, 2)),
            ValueError,
            r"z must be of shape \(B, 2, h, w\); got \(2, 3, 2, 2\)",
        ),
        (lambda: small_vae().decode(normal(2, 2, 2)), ValueError, r"z must be .*got \(2, 2, 2\)"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The mixture of both kinds of images


@pytest.mark.parametrize("split", ["train", "validation", "test", "held_out"])
def test_mixture_holds_both_sets_in_turn(split):
    both, shapes, scenes = load("shapes_and_scenes", split), Shapes(split, 64), Scenes(split, 64)
    assert isinstance(both, ShapesAndScenes)
    assert len(both) == len(shapes) + len(scenes)
    indices = torch.tensor([7, 0, 4, 1, 4, len(both) - 1])
    batch = both.batch(indices)
    assert batch.keys() == {"image"} and both.labels == {}
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 3, 64, 64), torch.float32)
    captions = both.captions(indices)
    for place, index in enumerate(indices.tolist()):
        part = (shapes, scenes)[index % 2]
        agree(batch["image"][place], part[index // 2]["image"], 0.0)
        assert captions[place] == part.captions([index // 2])[0]


def test_mixture_is_decided_by_its_seed():
    indices = range(6)
    images = [ShapesAndScenes("train", seed=seed).batch(indices)["image"] for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not any(torch.equal(*pair) for pair in zip(images[0], images[2], strict=True))
    unseen = ShapesAndScenes("test").batch(indices)["image"]
    assert not any(torch.equal(*pair) for pair in zip(images[0], unseen, strict=True))


def test_mixture_of_nothing_and_of_one_kind_alone():
    both = load("shapes_and_scenes", "test")
    assert both.batch([])["image"].shape == (0, 3, 64, 64) and both.captions([]) == []
    agree(both.batch([1, 3])["image"], Scenes("test").batch([0, 1])["image"], 0.0)
    assert both[2]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load("shapes_and_scenes", "train", 32), ValueError, "image_size must be .*64.*got 32"),
        (lambda: load("shapes_and_scenes", "dev"), ValueError, "split must be one of .*got 'dev'"),
        (lambda: load("shapes_and_scenes", "test").batch([20000]), IndexError, "19999; got 20000"),
        (lambda: load("shapes_and_scenes", "test").batch([-1]), IndexError, "19999; got -1"),
        (lambda: load("shapes_and_scenes", "test").captions([0.5]), TypeError, "indices must be"),
    ],
)
def test_wrong_arguments_of_the_mixture(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The recipe


@pytest.fixture(scope="module")
def images():
    return load("shapes_and_scenes", "train", 64)


@pytest.fixture(scope="module")
def recipe(images):
    return replace(
        recipes.find_recipe("vae_shapes64"), name="tiny_vae", model=SMALL, batch_size=3, precision="fp32"
    ).fitted_to(images)


def trained_for_nothing(recipe):
    torch.manual_seed(0)
    return perturbed(recipe.build(), torch.float32).eval()


def test_recipe_keeps_its_promises_of_size():
    recipe = recipes.find_recipe("vae_shapes64")
    model = recipe.build()
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.7e6
    assert (model.factor, model.latent_channels, recipe.latent_shape) == (4, 4, (4, 16, 16))
    deeper = replace(recipe, image_size=32, model=recipe.model | {"channel_multipliers": (1, 2, 2)})
    assert deeper.latent_shape == (4, 4, 4)


def test_recipe_draws_by_the_numbers_of_the_samples(recipe, images):
    batch = recipe.draw(images, SampleDraws(3, torch.arange(8)))
    assert batch.keys() == {"x", "noise"}
    assert batch["x"].shape == (8, 3, 64, 64) and batch["noise"].shape == (8, 2, 16, 16)
    again = recipe.draw(images, SampleDraws(3, torch.tensor([6, 2])))
    other = recipe.draw(images, SampleDraws(4, torch.tensor([6, 2])))
    for name, value in batch.items():
        agree(again[name], value[[6, 2]], 0.0)
        assert not torch.equal(other[name], again[name])
    random = SampleDraws(3, torch.arange(8))
    agree(batch["x"], images.batch(random.integers(len(images)))["image"], 0.0)
    agree(batch["noise"], random.normal(2, 16, 16), 0.0)


def test_recipe_draws_both_kinds_alike(images):
    indices = SampleDraws(0, torch.arange(400)).integers(len(images))
    assert abs((indices % 2).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(400)
    assert indices.max() > 0.98 * len(images)


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_loss_of_the_recipe_by_hand(recipe, images, kl_weight):
    recipe, model = replace(recipe, kl_weight=kl_weight), trained_for_nothing(recipe)
    batch = recipe.draw(images, SampleDraws(3, torch.arange(3)))
    mean, log_variance = model.encode(batch["x"])
    x_hat = model.decode(encoded(mean, log_variance).stddev * batch["noise"] + mean)
    error = F.mse_loss(x_hat, batch["x"], reduction="sum") / 2
    divergence = kl_divergence(encoded(mean, log_variance), prior_like(mean)).sum()
    agree(recipe.loss(model, batch), (error + kl_weight * divergence) / batch["x"].numel(), 1e-5)


def test_loss_is_summed_in_full_precision_under_autocast(recipe, images):
    model, batch = trained_for_nothing(recipe), recipe.draw(images, SampleDraws(3, torch.arange(3)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = recipe.loss(model, batch)
        x_hat, mean, log_variance = (output.float() for output in model(batch["x"], batch["noise"]))
    assert loss.dtype == torch.float32
    expected = vae_loss(batch["x"], x_hat, mean, log_variance, recipe.kl_weight) / 64**2 / 3
    agree(loss, expected, 1e-6)


def test_recipe_is_fitted_to_other_images(recipe):
    digits = load("digits", "train", 32)
    other = replace(recipe, data="digits").fitted_to(digits)
    assert (other.channels, other.image_size, other.latent_shape) == (1, 32, (2, 8, 8))
    assert other.build().in_channels == 1
    assert other.draw(digits, SampleDraws(0, torch.arange(2)))["x"].shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match="image_size must be a multiple of 4 .*'tiny_vae'; got 30"):
        replace(recipe, data="digits").fitted_to(load("digits", "train", 30))


def by_hand(model, images, count):
    """What evaluate() says of the images themselves, computed another way: all at once, in float64."""
    model = model.double()
    x = torch.stack([images[i]["image"] for i in range(count)]).double()
    mean, log_variance = model.encode(x)
    draws = [SampleDraws(vae_recipes.EVALUATION_SEED, torch.tensor([i])) for i in range(count)]
    noise = torch.cat([random.normal(*mean.shape[1:]) for random in draws]).double()
    z = mean + encoded(mean, log_variance).stddev * noise
    x_hat = model.decode(z)
    mse = np.array([np.mean((a - b) ** 2) for a, b in zip(x.numpy(), x_hat.numpy(), strict=True)])
    decibels = 20 * np.log10(2) - 10 * np.log10(mse)
    numbers = z.numpy().ravel()
    return x_hat.float(), {
        "psnr": decibels.mean(),
        "psnr_lowest": decibels.min(),
        "kl": kl_divergence(encoded(mean, log_variance), prior_like(mean)).sum().item() / count,
        "latent_mean": numbers.mean(),
        "latent_std": numbers.std(ddof=1),
        "latent_scale": 1 / numbers.std(ddof=1),
        "active_latents": (mean.numpy().var(axis=0, ddof=1) > 0.01).mean(),
    }


@pytest.fixture
def few_images(monkeypatch):
    """Evaluation with six images, in two batches of different size."""
    monkeypatch.setattr(vae_recipes, "EVALUATION_IMAGES", 6)
    monkeypatch.setattr(vae_recipes, "EVALUATION_BATCH", 4)


@torch.no_grad()
def test_evaluation_by_hand(recipe, few_images, monkeypatch):
    images = load("shapes_and_scenes", "test")
    parts = dict(zip(("shapes", "scenes"), images.parts, strict=True))
    torch.manual_seed(1)
    readers = {
        name: Reader(part.labels, 3, 64, widths=(8, 8), patch_size=4).eval() for name, part in parts.items()
    }
    monkeypatch.setattr(vae_recipes, "find_reader", lambda data, size: readers[data] if size == 64 else None)
    model = trained_for_nothing(recipe)
    found = recipe.evaluate(model, images)

    _, expected = by_hand(model, images, 6)
    for name, part in parts.items():
        x_hat, _ = by_hand(model, part, 6)
        originals = torch.stack([part[i]["image"] for i in range(6)])
        for suffix, shown in (("", x_hat), ("original", originals)):
            predicted = read(readers[name], shown).predicted
            wanted = canonical(part.attributes(range(6)))
            right = {label: predicted[label] == wanted[label] for label in part.labels}
            everything = torch.stack(list(right.values())).all(dim=0).double().mean().item()
            if suffix:
                expected[f"accuracy_{name}_{suffix}"] = everything
                continue
            expected[f"accuracy_{name}_all"] = everything
            expected |= {f"accuracy_{name}_{k}": v.double().mean().item() for k, v in right.items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_evaluation_without_a_reader_and_of_few_images(recipe, few_images, monkeypatch):
    monkeypatch.setattr(vae_recipes, "EVALUATION_IMAGES", 10**6)
    digits = load("digits", "test", 32)
    recipe = replace(recipe, data="digits").fitted_to(digits)
    monkeypatch.setattr(vae_recipes, "find_reader", lambda data, size: None)
    model = trained_for_nothing(recipe)
    found = recipe.evaluate(model, digits)
    assert found.keys() == by_hand(model, digits, 4)[1].keys()
    assert found == pytest.approx(by_hand(model, digits, len(digits))[1], rel=1e-3, abs=1e-5)


def test_evaluation_takes_the_same_noise_each_time_and_leaves_the_model_alone(recipe, few_images):
    model, images = trained_for_nothing(recipe), load("shapes", "test", 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = replace(recipe, data="shapes")
    assert recipe.evaluate(model, images) == recipe.evaluate(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# The command line


def call(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data_folder(tmp_path, monkeypatch, recipe):
    """An empty data folder, and the recipe 'tiny_vae' beside the others."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(recipes.recipe.RECIPES, "tiny_vae", replace(recipe, steps=4, learning_rate=1e-3))


def test_recipe_of_the_checkpoint_trains_from_the_command_line(data_folder, few_images):
    result = call("train", "vae_shapes64", "--name", "short", "--steps", 2, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    card = load_card("short")
    assert (card["recipe"], card["settings"]["data"]) == ("vae", "shapes_and_scenes")
    assert card["command"].endswith("train vae_shapes64 --name short --steps 2 --batch-size 2")
    assert all(math.isfinite(value) for value in card["metrics"].values())
    assert card["metrics"]["latent_scale"] * card["metrics"]["latent_std"] == pytest.approx(1, rel=1e-6)

    again = call("evaluate", "short")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == pytest.approx(card["metrics"], rel=2e-2, abs=2e-3)  # now in fp16
    model = recipes.load_model("short")
    assert isinstance(model, KLVAE) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_interrupted_training_ends_with_the_same_weights(data_folder, few_images, monkeypatch):
    draw, steps_begun = vae_recipes.VAERecipe.draw, []

    def interrupted_draw(*arguments):
        steps_begun.append(1)
        if len(steps_begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(vae_recipes.VAERecipe, "draw", interrupted_draw)
        assert call("train", "tiny_vae", "--name", "stopped").exit_code == EXIT_INTERRUPTED
    assert len(steps_begun) == 2
    for name in ("stopped", "uninterrupted"):
        result = call("train", "tiny_vae", "--name", name)
        assert result.exit_code == 0, result.output
    stopped, whole = (load_file(checkpoint_files(name)[0]) for name in ("stopped", "uninterrupted"))
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    assert load_card("stopped")["loss_curve"] == load_card("uninterrupted")["loss_curve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "tiny_vae", "--data", "digits", "--image-size", 30],
            "image_size must be a multiple of 4 for the network of 'tiny_vae'; got 30",
        ),
        (["train", "tiny_vae", "--image-size", 32], "image_size must be"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(data_folder, arguments, message):
    result = call(*arguments)
    assert result.exit_code == EXIT_USER_ERROR
    assert message in result.stderr.splitlines()[-1]


def test_an_autoencoder_is_no_denoiser(data_folder, recipe, tmp_path):
    card = {"recipe": recipe.family, "settings": recipe.settings(), "command": "", "data": "", "steps": 0}
    save_checkpoint("untrained", recipe.build().state_dict(), card | {"seconds": 0, "metrics": {}})
    result = call("sample", "--model", "untrained", "--out", tmp_path / "grid.png")
    assert result.exit_code == EXIT_USER_ERROR
    assert "model must be a denoiser; got 'untrained', a vae" in result.stderr


# The checkpoint


@pytest.fixture(scope="module")
def shipped():
    return recipes.load_recipe("vae_shapes64"), recipes.load_model("vae_shapes64")


def test_shipped_vae_is_small_and_its_card_says_what_the_chapter_promises(shipped):
    card = load_card("vae_shapes64")
    assert card["parameters"] <= 0.7e6 and card["bytes"] <= 1.4e6
    metrics = card["metrics"]
    assert metrics["psnr"] >= 30
    accuracies = {name: value for name, value in metrics.items() if name.startswith("accuracy_")}
    assert len(accuracies) >= 12
    assert {name: value for name, value in accuracies.items() if value < 0.98} == {}
    assert metrics["latent_scale"] == pytest.approx(1 / metrics["latent_std"], rel=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_shipped_vae_keeps_unseen_images_readable(shipped, monkeypatch):
    recipe, model = shipped
    monkeypatch.setattr(vae_recipes, "EVALUATION_IMAGES", 128)
    found, card = recipe.evaluate(model, load("shapes_and_scenes", "test")), load_card("vae_shapes64")
    assert found["psnr"] >= 30
    assert min(value for name, value in found.items() if name.startswith("accuracy_")) >= 0.95  # of 128
    for name in ("psnr", "kl", "latent_scale"):
        assert found[name] == pytest.approx(card["metrics"][name], rel=0.05)


@torch.no_grad()
def test_shipped_vae_keeps_what_training_never_showed(shipped):
    """Held-out pairs of shape and colour, for chapter 07's test of composition."""
    _, model = shipped
    images = load("shapes_and_scenes", "held_out")
    x = images.batch(range(64))["image"]
    assert psnr(x, model.decode(model.encode(x)[0])).mean() >= 30


@torch.no_grad()
def test_latents_of_the_shipped_vae_have_standard_deviation_1_once_scaled(shipped):
    _, model = shipped
    x = load("shapes_and_scenes", "test").batch(range(2000, 2064))["image"]
    mean, log_variance = model.encode(x)
    z = reparameterize(mean, log_variance, normal(*mean.shape, dtype=torch.float32))
    scaled = load_card("vae_shapes64")["metrics"]["latent_scale"] * z
    assert abs(scaled.std() - 1) < 0.05
