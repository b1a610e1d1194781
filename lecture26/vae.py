"""The variational autoencoder: a smaller space to diffuse in.

Generated from notebooks/06_vae.py, which derives and checks it: edit there, then run `make package`.
"""

import math

import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

from lecture26.kit.validation import check_positive_int, check_shape
from lecture26.unet import group_norm, levels_with_attention, patchify, unpatchify, zero_init

# --- The divergence ---


def kl_to_standard_normal(mean, log_variance):
    """The divergence KL(N(mean, variance) || N(0, I)) of each sample's code distribution from the prior.

    Args:
        mean: of each latent number, (B, ...).
        log_variance: the logarithm of each variance, like mean.

    Returns:
        (B,), in nats: one number for each sample, at least 0.

    Source: Kingma and Welling 2014, appendix B.
    """
    # KL = 1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2)
    per_number = (mean**2 + log_variance.exp() - 1 - log_variance) / 2
    return per_number.flatten(1).sum(dim=1)


# --- The reconstruction ---


def negative_log_likelihood(x, x_hat, decoder_std):
    """-log p(x | z) of a decoder that adds Gaussian noise: p(x | z) = N(x; x_hat, decoder_std^2 I).

    Args:
        x: data, (B, ...).
        x_hat: the decoder's outputs, like x.
        decoder_std: the standard deviation of each number of x around x_hat; a number above 0.

    Returns:
        (B,), in nats, one number for each sample.

    Raises:
        ValueError: if x and x_hat are of different shapes.

    Source: Kingma and Welling 2014, appendix C.2.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    # -log N(x; x_hat, sigma^2 I) = |x - x_hat|^2 / (2 sigma^2) + D/2 log(2 pi sigma^2)
    squares = ((x - x_hat) ** 2).flatten(1)  # (B, D)
    constant = squares.shape[1] / 2 * math.log(2 * math.pi * decoder_std**2)
    return squares.sum(dim=1) / (2 * decoder_std**2) + constant


# --- The bound on a grid ---


def bound_on_grid(x, decode, decoder_std, mean, log_variance, codes, volume):
    """The evidence and the bound of each sample, by sums over a grid of codes.

    Args:
        x: data, (B, D).
        decode: callable, codes (G, k) -> the decoder's outputs (G, D).
        decoder_std: the standard deviation of each number of x around an output; a number above 0.
        mean, log_variance: of each sample's guess q(z | x), (B, k).
        codes: a grid, (G, k), even, fine and wide enough for prior, posteriors and guesses.
        volume: of a cell of the grid: its spacing to the power of k.

    Returns:
        log_evidence, elbo: log p(x) and the bound, (B,) each, in nats. Both carry gradient.

    Source: equations 6.1 and 6.2 of the chapter.
    """
    x_hat = decode(codes)  # (G, D)
    # log p(x, z) = log p(z) + log p(x | z)
    log_prior = -negative_log_likelihood(codes, torch.zeros_like(codes), 1.0)  # (G,)
    log_likelihoods = [-negative_log_likelihood(one.expand_as(x_hat), x_hat, decoder_std) for one in x]
    log_joint = log_prior + torch.stack(log_likelihoods)  # (B, G)
    guess = Normal(mean[:, None], (log_variance[:, None] / 2).exp())
    log_q = guess.log_prob(codes).sum(dim=2)  # (B, G)
    # p(x) = integral of p(x, z) over z
    log_evidence = log_joint.logsumexp(dim=1) + math.log(volume)
    # L = E_q[log p(x, z) - log q(z | x)]
    elbo = (log_q.exp() * (log_joint - log_q)).sum(dim=1) * volume
    return log_evidence, elbo


# --- A gradient through a random draw ---


def reparameterize(mean, log_variance, noise):
    """Turn standard normal noise into a draw from N(mean, variance) that has a gradient.

    Args:
        mean: of each latent number, (B, ...).
        log_variance: the logarithm of each variance, like mean.
        noise: from N(0, 1), like mean.

    Returns:
        z, like mean.

    Source: Kingma and Welling 2014, section 2.4.
    """
    # z = mu + sigma eps, sigma = exp(log(sigma^2) / 2)
    return mean + (log_variance / 2).exp() * noise


# --- One number to trade by ---


def vae_loss(x, x_hat, mean, log_variance, kl_weight):
    """Half the squared error of the reconstruction plus the weighted divergence: what a VAE is trained by.

    Args:
        x: data, (B, ...).
        x_hat: the decoder's outputs for one draw of z each, like x.
        mean, log_variance: what the encoder says of each sample, (B, ...).
        kl_weight: a number, at least 0; the variance of the decoder's noise if the loss is to be its bound.

    Returns:
        A scalar: each term is summed over the numbers of a sample, and the total averaged over the batch.

    Raises:
        ValueError: if x and x_hat are of different shapes.

    Source: Kingma and Welling 2014, equation 10, times the variance of the decoder's noise; Higgins et al.
        2017, equation 4, whose beta is kl_weight over that variance.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    # L = mean over the batch of 1/2 |x - x_hat|^2 + beta KL
    squared_error = ((x - x_hat) ** 2).flatten(1).sum(dim=1)  # (B,)
    return (squared_error / 2 + kl_weight * kl_to_standard_normal(mean, log_variance)).mean()


class SmallVAE(nn.Module):
    """A variational autoencoder of flat data, with three linear layers each way.

    Args:
        numbers: D, the numbers of a sample.
        latents: k, the numbers of a code.
        hidden: width of the layers.
    """

    def __init__(self, numbers, latents, hidden=192):
        super().__init__()
        self.encoder, self.decoder = (
            nn.Sequential(
                nn.Linear(first, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, last),
            )
            for first, last in ((numbers, 2 * latents), (latents, numbers))
        )

    def encode(self, x):
        """Map data x (B, D) to the mean and the log-variance of their codes, (B, k) each."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """Map codes z (B, k) to data (B, D)."""
        return self.decoder(z)


def vae_training_step(optimizer, encode, decode, x, noise, kl_weight):
    """One step of an optimizer along the gradient of a VAE's loss on a batch.

    Args:
        optimizer: a torch.optim.Optimizer of the weights of encoder and decoder.
        encode: callable, data -> mean, log_variance of their codes.
        decode: callable, codes -> data.
        x: data, (B, ...).
        noise: standard normal, one number for each latent number of the batch.
        kl_weight: as vae_loss takes it.

    Returns:
        The loss before the step, a scalar that carries no gradient.

    Source: Kingma and Welling 2014, algorithm 1.
    """
    optimizer.zero_grad()
    mean, log_variance = encode(x)
    x_hat = decode(reparameterize(mean, log_variance, noise))
    loss = vae_loss(x, x_hat, mean, log_variance, kl_weight)
    loss.backward()
    optimizer.step()
    return loss.detach()


# --- On handwritten digits ---


def active_latents(mean, threshold=0.01):
    """Which latent numbers say anything about the data: those whose mean moves from sample to sample.

    mean: the encoder's means, (N, ...); threshold: their variance above which a number is active.
    Returns booleans (...); raises ValueError for N < 2. Source: Burda et al. 2016, section 5.
    """
    if len(mean) < 2:
        raise ValueError(f"mean must be of at least 2 samples; got {len(mean)}")
    # Var_x(E_q(z|x)[z_i]) > threshold
    return mean.var(dim=0) > threshold


# --- Decibels ---


def psnr(x, x_hat):
    """The peak signal-to-noise ratio of each image's reconstruction, in decibels.

    x, (B, C, H, W) in [-1, 1], and x_hat, like x (else ValueError) -> (B,); infinite where both are equal.
    Source: equation 6.16 of the chapter.
    """
    check_shape("x_hat", x_hat, x.shape, of="x")
    mean_squared_error = ((x - x_hat) ** 2).flatten(1).mean(dim=1)  # (B,)
    # 10 log10(range^2 / MSE); the range of [-1, 1] is 2
    return 10 * torch.log10(4 / mean_squared_error)


# --- The networks ---


class PlainBlock(nn.Module):
    """Chapter 02's residual block without an embedding: two convolutions around a skip.

    Args:
        channels: channels before and after.
    """

    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x):
        """Map x (B, C, H, W) to (B, C, H, W)."""
        return x + self.branch(x)


class Upsample(nn.Module):
    """Double the sides of a feature map: each pixel becomes four, then a convolution.

    Args:
        in_channels, out_channels: channels before and after.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, h):
        """Map h (B, in_channels, H, W) to (B, out_channels, 2 H, 2 W)."""
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


def encoder_layers(in_channels, widths, num_blocks, out_channels):
    """The layers of the way down: blocks at each width, and a convolution of stride 2 between widths.

    Args:
        in_channels: channels of what goes in.
        widths: channels at each resolution, which halves from one to the next.
        num_blocks: residual blocks at each width.
        out_channels: channels of what comes out.

    Returns:
        A list of modules, to be applied one after the other.
    """
    layers = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
        layers += [PlainBlock(width) for _ in range(num_blocks)]
    return [*layers, group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 3, padding=1)]


def decoder_layers(in_channels, widths, num_blocks, out_channels):
    """The layers of the way up, from the last of the encoder's widths to the first.

    Args:
        in_channels, widths, num_blocks, out_channels: as in encoder_layers; widths in the encoder's order.

    Returns:
        A list of modules, to be applied one after the other.
    """
    layers = [nn.Conv2d(in_channels, widths[-1], 3, padding=1)]
    for level in reversed(range(len(widths))):
        layers += [PlainBlock(widths[level]) for _ in range(num_blocks)]
        if level > 0:
            layers.append(Upsample(widths[level], widths[level - 1]))
    return [*layers, group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1)]


class KLVAE(nn.Module):
    """A variational autoencoder of images, whose latents are a smaller image.

    Args:
        in_channels: channels of the images.
        latent_channels: channels of the latents.
        base_channels: channels at the highest resolution.
        channel_multipliers: width of each level, in units of base_channels; the resolution halves in between.
        num_blocks: residual blocks per level, on the way down and on the way up.
        patch_size: fold this many pixels each way into channels first.

    Attributes:
        latent_channels: as given.
        factor: how many times smaller the latents' sides are than the images'.

    Raises:
        TypeError, ValueError: on sizes that make no network.

    Source: Rombach et al. 2022, section 3.1 and appendix G.
    """

    def __init__(
        self,
        in_channels=3,
        latent_channels=4,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_blocks=2,
        patch_size=2,
    ):
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "latent_channels": latent_channels,
            "base_channels": base_channels,
            "num_blocks": num_blocks,
            "patch_size": patch_size,
        }
        for name, value in sizes.items():
            check_positive_int(name, value)
        levels_with_attention(channel_multipliers, ())  # refuses what is no tuple, and an empty one
        for multiplier in channel_multipliers:
            check_positive_int("channel_multipliers", multiplier)
        self.in_channels, self.latent_channels, self.patch_size = in_channels, latent_channels, patch_size
        self.factor = patch_size * 2 ** (len(channel_multipliers) - 1)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        pixels = in_channels * patch_size**2
        self.encoder = nn.Sequential(*encoder_layers(pixels, widths, num_blocks, 2 * latent_channels))
        self.decoder = nn.Sequential(*decoder_layers(latent_channels, widths, num_blocks, pixels))

    def encode(self, x):
        """Map images x (B, C, H, W) to the mean and the log-variance of their latents.

        Returns:
            mean, log_variance: (B, latent_channels, H / factor, W / factor) each; log_variance in [-30, 20].

        Raises:
            ValueError: if x has another number of channels, or sides that are no multiples of the factor.
        """
        if (
            x.ndim != 4
            or x.shape[1] != self.in_channels
            or x.shape[2] % self.factor
            or x.shape[3] % self.factor
        ):
            raise ValueError(
                f"x must be of shape (B, {self.in_channels}, H, W) with sides that are multiples of "
                f"{self.factor}; got {tuple(x.shape)}"
            )
        mean, log_variance = self.encoder(patchify(x, self.patch_size)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z):
        """Map latents z (B, latent_channels, h, w) to images (B, C, factor h, factor w), not clipped.

        Raises:
            ValueError: if z is not of that shape.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(f"z must be of shape (B, {self.latent_channels}, h, w); got {tuple(z.shape)}")
        return unpatchify(self.decoder(z), self.patch_size)

    def forward(self, x, noise):
        """Encode x (B, C, H, W), draw latents with noise like their mean, and decode.

        Returns:
            x_hat, mean, log_variance: the reconstructions, like x, and what encode gives.

        Raises:
            ValueError: if x is no image that encode takes, or noise has another shape than the mean.
        """
        mean, log_variance = self.encode(x)
        check_shape("noise", noise, mean.shape, of="the latents")
        return self.decode(reparameterize(mean, log_variance, noise)), mean, log_variance


# --- The latents' scale ---


def latent_scale(latents):
    """The factor that gives latents the standard deviation 1: one number for all of them.

    Multiply by it before diffusion, divide by it before decoding.

    Args:
        latents: a batch of latents, (B, C, H, W).

    Returns:
        A scalar tensor, above 0, from the standard deviation with N - 1, as torch's std has it. Infinite for
        latents that are all the same.

    Source: Rombach et al. 2022, appendix G (there with N, from the first batch).
    """
    # s = 1 / sigma, over samples, channels and places alike
    return 1 / latents.std()
