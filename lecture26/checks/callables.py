"""Arguments that can be called, for exercises that take a function: a kind and the tensors it is made of.

A recording keeps the name of the kind and the tensors, so that it needs no chapter to call the argument. For
another kind, add a function below, with `@_kind` above it: it takes the tensors first, then what the
argument is called with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lecture26.kit.validation import check_choice

_KINDS: dict[str, Callable] = {}


@dataclass(frozen=True, eq=False)
class CallableArgument:
    """An argument made of tensors that can be called, such as a small classifier with these weights.

    kind: the name of one of the functions below.
    tensors: what this function takes first.
    """

    kind: str
    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(_KINDS))

    def __call__(self, *arguments: Tensor, **named: Tensor) -> Tensor:
        return _KINDS[self.kind](*self.tensors, *arguments, **named)

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
        return f"a {self.kind.replace('_', ' ')}" + (f" with tensors {shapes}" if shapes else "")


def _kind(function: Callable) -> Callable:
    _KINDS[function.__name__] = function
    return function


@_kind
def noisy_classifier(inward: Tensor, speed: Tensor, outward: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """A smooth classifier (x_t, t) -> logits (B, K); samples are independent, and every step counts.

    inward: (D, H), for samples of D elements; speed: (H,), in radians per step; outward: (H, K).
    """
    phase = x_t.flatten(1) @ inward + t[:, None] * speed  # (B, H)
    return phase.sin() @ outward


@_kind
def image_tower(inward: Tensor, speed: Tensor, outward: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The image tower of a noise-aware CLIP, (x_t, t) -> features (B, K), made like noisy_classifier."""
    return noisy_classifier(inward, speed, outward, x_t, t)


@_kind
def clean_tower(inward: Tensor, outward: Tensor, x: Tensor) -> Tensor:
    """The image tower of a CLIP for clean images, x -> features (B, K); samples are independent.

    inward: (D, H), for samples of D elements; outward: (H, K).
    """
    return (x.flatten(1) @ inward).sin() @ outward


@_kind
def text_tower(table: Tensor, tokens: Tensor) -> Tensor:
    """The text tower of a CLIP, tokens (B, L) -> features (B, K); table: (number of tokens, K)."""
    return table[tokens].cumsum(dim=1).sin().mean(dim=1)  # the order counts


@_kind
def decoder(weight: Tensor, bias: Tensor, latents: Tensor) -> Tensor:
    """A smooth decoder of latents (B, c, h, w) to images (B, C, 2 h, 2 w); samples are independent.

    weight: (c, 4 C), from the latents of a place to its 2 x 2 pixels; bias: (4 C,).
    """
    patches = (latents.movedim(1, 3) @ weight).sin() + bias  # (B, h, w, 4 C)
    return F.pixel_shuffle(patches.movedim(3, 1), 2)


@_kind
def smooth_encoder(
    inward: Tensor, to_mean: Tensor, to_log_variance: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """An encoder of data (B, D), x -> mean, log_variance (B, k) each; samples are independent.

    inward: (D, H); to_mean, to_log_variance: (H, k).
    """
    hidden = (x @ inward).sin()
    return hidden @ to_mean, hidden @ to_log_variance


@_kind
def smooth_decoder(inward: Tensor, outward: Tensor, codes: Tensor) -> Tensor:
    """A decoder of codes (B, k) to data (B, D); inward: (k, H); outward: (H, D)."""
    return (codes @ inward).sin() @ outward


@_kind
def noisy_denoiser(inward: Tensor, speed: Tensor, outward: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """A denoiser (x_t, t) -> output like x_t, made like noisy_classifier, with K = D."""
    return noisy_classifier(inward, speed, outward, x_t, t).view_as(x_t)


@_kind
def learned_variance_denoiser(
    inward: Tensor, speed: Tensor, outward: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """A denoiser (B, C, ...), (B,) -> (B, 2C, ...), made like noisy_classifier, with K = 2 D."""
    batch, channels, *rest = x_t.shape
    return noisy_classifier(inward, speed, outward, x_t, t).view(batch, 2 * channels, *rest)


@_kind
def predicted_clean(alpha_bar: Tensor, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x_0-hat for a denoiser that predicts the noise, (output, x_t, t) -> like x_t; alpha_bar: (T,)."""
    # homework brings this file along: by the angle between data and noise, which is no answer there
    angle = alpha_bar[t].sqrt().acos().view(-1, *[1] * (x_t.ndim - 1))
    return x_t / angle.cos() - output * angle.tan()


@_kind
def conditional_denoiser(
    inward: Tensor, speed: Tensor, told: Tensor, outward: Tensor, x_t: Tensor, t: Tensor, cond: Tensor
) -> Tensor:
    """A denoiser (x_t, t, cond) -> output with K elements a sample, for integers cond (B,).

    inward: (D, H); speed: (H,); told: (classes, H); outward: (H, K), K = D, or 2 D with variances last.
    The length of the batch leaves its mark, so that two calls are not one.
    """
    if len(cond) != len(x_t) or len(t) != len(x_t):
        found = f"{len(x_t)} samples, {len(t)} steps, {len(cond)} conditions"
        raise ValueError(f"x_t, t and cond must be of one length; got {found}")
    phase = x_t.flatten(1) @ inward + t[:, None] * speed + told[cond] + 0.1 * len(x_t)  # (B, H)
    return (phase.sin() @ outward).view(len(x_t), -1, *x_t.shape[2:])


@_kind
def mixer(weights: Tensor, cond: Tensor, null: Tensor) -> Tensor:
    """A mixture of two predictions, element by element, that tells them apart; weights: (2,)."""
    return weights[0] * cond - weights[1] * null.tanh()


@_kind
def conditional_loss(
    inward: Tensor,
    speed: Tensor,
    told: Tensor,
    outward: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Tensor,
) -> Tensor:
    """A training loss (x_0, t, noise, cond) -> scalar: the squared error on noisy x_0 of a denoiser.

    inward: (D, H); speed: (H,); told: (classes, H); outward: (H, D). cond: integers (B,) or (B, L); the rows
    of a sample's L labels are added, those behind the first counted from the end of the table.
    """
    rows = told[cond] if cond.ndim == 1 else told[cond[:, 0]] + told.flip(0)[cond[:, 1:]].sum(dim=1)
    phase = (x_0 + 0.5 * noise).flatten(1) @ inward + t[:, None] * speed + rows
    return ((phase.sin() @ outward).view_as(x_0) - noise).square().mean()


@_kind
def denoising_loss(
    inward: Tensor, speed: Tensor, outward: Tensor, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """A training loss (x_0, t, noise) -> scalar: the squared error of noisy_denoiser on noisy x_0."""
    return (noisy_denoiser(inward, speed, outward, x_0 + 0.5 * noise, t) - noise).square().mean()


@_kind
def word_table(table: Tensor, tokens: Tensor) -> Tensor:
    """A text encoder, tokens (B, L) -> (B, L, E), in which a token's place counts; table: (words, E)."""
    place = torch.arange(1, 1 + tokens.shape[1], dtype=table.dtype)
    return table[tokens] * place.sin()[:, None]


@_kind
def text_denoiser(
    inward: Tensor, told: Tensor, speed: Tensor, outward: Tensor, z_t: Tensor, t: Tensor, cond: Tensor
) -> Tensor:
    """A denoiser (z_t, t, cond) -> output like z_t; samples are independent, and every step and token counts.

    inward: (D, H), for samples of D elements; told: (E, H), for cond (B, L, E); speed: (H,), in radians per
    step; outward: (H, D).
    """
    phase = z_t.flatten(1) @ inward + cond.sin().mean(dim=1) @ told + t[:, None] * speed  # (B, H)
    return (phase.sin() @ outward).view_as(z_t)


@_kind
def velocity_loss(alpha_bar: Tensor, denoiser: Callable, z_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A diffusion's loss (denoiser, z_0, t, noise) -> scalar, with v to be predicted; alpha_bar: (T,)."""
    angle = (
        alpha_bar[t].sqrt().acos().view(-1, *[1] * (z_0.ndim - 1))
    )  # homework: no answer to (1.6) or (1.44)
    z_t, v = z_0 * angle.cos() + noise * angle.sin(), noise * angle.cos() - z_0 * angle.sin()
    return (denoiser(z_t, t) - v).square().mean()


@_kind
def target(weights: Tensor, x_0: Tensor, alpha_bar: Tensor, eps: Tensor) -> Tensor:
    """What a denoiser should return, (x_0, alpha_bar, eps) -> like x_0: a mixture of x_0, eps and v.

    weights: (3,), of the three.
    """
    angle = alpha_bar.sqrt().acos()  # homework brings this file along: v in a form that is no answer there
    v = eps * angle.cos() - x_0 * angle.sin()
    return weights[0] * x_0 + weights[1] * eps + weights[2] * v


@_kind
def mixture_score(weights: Tensor, means: Tensor, stds: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The score of a Gaussian mixture's noisy marginal at points (B, D), as (B, D).

    weights, stds: (K,); means: (K, D); alpha_bar: (B, 1).
    """
    variances = alpha_bar * stds**2 + 1 - alpha_bar  # (B, K)
    pull = alpha_bar.sqrt()[..., None] * means - x_t[:, None]  # (B, K, D)
    log_joint = weights.log() - 0.5 * (
        means.shape[1] * variances.log() + pull.square().sum(dim=2) / variances
    )
    return ((log_joint.softmax(dim=1) / variances)[..., None] * pull).sum(dim=1)


@_kind
def sampler_step(mixing: Tensor, speed: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A step of a sampler, (x_t, t, noise) -> x_{t-1}, in which every step and its noise leave their mark.

    mixing: (D, D); speed: (D,), in radians per step.
    """
    if not isinstance(t, Tensor) or t.is_floating_point() or t.shape != x_t.shape[:1]:
        found = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a tensor of {len(x_t)} integers, one for each sample; got {found}")
    phase = x_t.flatten(1) @ mixing + t[:, None] * speed  # (B, D)
    return phase.sin().view_as(x_t) + 0.5 * noise


@_kind
def step_moments(mixing: Tensor, speed: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_{t-1} given x_t, each like x_t, in which every step leaves its mark.

    mixing: (D, D); speed: (D,), in radians per step.
    """
    if not isinstance(t, Tensor) or t.is_floating_point() or t.shape != x_t.shape[:1]:
        found = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t must be a tensor of {len(x_t)} integers, one for each sample; got {found}")
    phase = x_t.flatten(1) @ mixing + t[:, None] * speed  # (B, D)
    return phase.sin().view_as(x_t), (0.35 + 0.25 * phase.cos()).view_as(x_t)


@_kind
def noise_table(noise: Tensor, t: int) -> Tensor:
    """The noise of each step t, of noise (T, B, ...)."""
    if not 0 <= t < len(noise):
        raise IndexError(f"there is no step {t}: code counts from 0 to {len(noise) - 1}")
    return noise[t]


@_kind
def bypass(h: Tensor) -> Tensor:
    """Nothing is done."""
    return h


@_kind
def linear(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """A linear layer on the last axis."""
    return F.linear(features, weight, bias)


@_kind
def token_table(table: Tensor, tokens: Tensor) -> Tensor:
    """A vector for each token, of tokens (B, L): (B, L, D); table: (number of tokens, D)."""
    return table[tokens]


@_kind
def reading_block(weight: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """A block in which each token h_i of h (B, L, D) takes in the mean of those it may look at.

    weight: (D, D). mask: bool, (L, L) or (B, 1, 1 or L, L).
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of dtype bool; got {mask.dtype}")
    allowed = (mask[:, 0] if mask.ndim == 4 else mask).to(h.dtype).expand(len(h), h.shape[1], h.shape[1])
    return h + (allowed / allowed.sum(dim=2, keepdim=True) @ h @ weight).sin()


@_kind
def convolution(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    """A convolution that keeps height and width; its kernel is of odd size."""
    return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)


@_kind
def normalisation(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    """Group normalisation; weight and bias: (groups, channels per group)."""
    return F.group_norm(h, len(weight), weight.flatten(), bias.flatten())


def _stage(weight: Tensor, h: Tensor, embedding: Tensor, cond: Tensor) -> Tensor:
    """A smooth map of feature maps h (B, C, H, W) that minds embedding (B, D) and cond (B, E).

    weight: (C + D + E, channels of the result).
    """
    told = torch.cat([embedding, cond], dim=1)[:, :, None, None].expand(-1, -1, *h.shape[2:])
    return torch.einsum("bihw,io->bohw", torch.cat([h, told], dim=1), weight).sin()


@_kind
def way_down(weights: Tensor, h: Tensor, embedding: Tensor, cond: Tensor) -> list[Tensor]:
    """The way down of a U-Net: all maps, each of the one before, h the first; weights: one for each."""
    maps = [h]
    for weight in weights:
        maps.append(_stage(weight, maps[-1], embedding, cond))
    return maps


@_kind
def middle(weight: Tensor, h: Tensor, embedding: Tensor, cond: Tensor) -> Tensor:
    """The stage between the way down and the way up."""
    return _stage(weight, h, embedding, cond)


@_kind
def up_level(weights: Tensor, h: Tensor, skips: list[Tensor], embedding: Tensor, cond: Tensor) -> Tensor:
    """A level of the way up: a stage for each of the skips, in their order; weights: one for each stage."""
    for weight, skip in zip(weights, skips, strict=True):
        h = _stage(weight, torch.cat([h, skip], dim=1), embedding, cond)
    return h


@_kind
def token_block(weight: Tensor, tokens: Tensor) -> Tensor:
    """A block of a transformer on tokens (B, N, d), in which each token minds all of them; weight: (d, d)."""
    return tokens + ((tokens + tokens.mean(dim=1, keepdim=True)) @ weight).sin()


@_kind
def text_encoder(table: Tensor, tokens: Tensor) -> Tensor:
    """Features (B, E) of tokens (B, L), of which each counts, and where it stands; table: (words, E)."""
    places = torch.arange(1, tokens.shape[1] + 1, dtype=table.dtype, device=table.device)
    return torch.einsum("ble,l->be", table[tokens], places.sin())


@_kind
def told_denoiser(
    inward: Tensor, speed: Tensor, outward: Tensor, told: Tensor, x_t: Tensor, t: Tensor, cond: Tensor
) -> Tensor:
    """A denoiser (x_t, t, cond) -> like x_t, made like noisy_denoiser; told: (E, H), for cond (B, E)."""
    phase = x_t.flatten(1) @ inward + t[:, None] * speed + cond @ told  # (B, H)
    return (phase.sin() @ outward).view_as(x_t)


@_kind
def guidance(weights: Tensor, denoiser: Callable, said: Tensor, unsaid: Tensor) -> Callable:
    """A guidance (denoiser, said, unsaid) -> denoiser (x_t, t): a mixture of two answers, weights (2,)."""

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        return weights[0] * denoiser(x_t, t, said) + weights[1] * denoiser(x_t, t, unsaid)

    return guided


@_kind
def denoising_step(
    mixing: Tensor, speed: Tensor, denoiser: Callable, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """A step (denoiser, x_t, t, noise) -> x_{t-1}: sampler_step from where the denoiser leads."""
    return sampler_step(mixing, speed, x_t + denoiser(x_t, t), t, noise)
