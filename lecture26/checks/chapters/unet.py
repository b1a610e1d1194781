"""Exercises of chapter 02: time embedding, residual block, attention, patches, the whole, moving average."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lecture26 import unet

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws
from ..mistakes import patch_grid, scores


def _timestep_embedding_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch = draws.integer(4, 6)
    steps = [draws.steps(batch, 1000) for _ in range(4)]
    return [
        Case("fractional steps", (steps[0].double() + 0.25, 8, 10_000.0)),
        Case("whole steps", (steps[1], 32, 10_000.0)),
        Case("as long as the batch", (steps[2].double(), 2 * ((batch + 1) // 2), 10_000.0)),
        Case("another period", (steps[3].double(), 2 * draws.integer(3, 9), 100.0)),
        Case("a batch of one", (draws.steps(1, 1000).double(), 16, 10_000.0)),
        Case("a single frequency", (draws.steps(batch, 1000).double(), 2, 10_000.0)),
        Case("the first steps", (torch.arange(3, dtype=torch.float64), 6, 10_000.0)),
        Case("float32 steps", (draws.steps(batch, 1000).float(), 64, 10_000.0)),
    ]


def _sinusoids(t: Tensor, omega: Tensor) -> Tensor:
    """The embedding with any frequencies, right or wrong."""
    t = t if t.is_floating_point() else t.float()
    angles = t[:, None] * omega.to(t.dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _frequencies(exponents: Tensor, max_period: float) -> Tensor:
    return torch.exp(-math.log(max_period) * exponents)


def _indices(dim: int) -> Tensor:
    return torch.arange(dim // 2, dtype=torch.float64)


TIMESTEP_EMBEDDING = Exercise(
    "unet.timestep_embedding",
    '"Telling the network the step", equation (2.2)',
    unet.timestep_embedding,
    _timestep_embedding_cases,
    (
        Misconception(
            "sines first",
            lambda t, dim, max_period: unet.timestep_embedding(t, dim, max_period).roll(dim // 2, dims=1),
            "The first half of the embedding are the cosines, the second half the sines.",
        ),
        Misconception(
            "cosines and sines alternate",
            lambda t, dim, max_period: (
                unet.timestep_embedding(t, dim, max_period).unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
            ),
            "Cosine and sine of one frequency stand side by side here. All cosines come first, then all "
            "sines.",
        ),
        Misconception(
            "sines and cosines alternate",
            lambda t, dim, max_period: (
                unet.timestep_embedding(t, dim, max_period)
                .unflatten(1, (2, -1))
                .flip(1)
                .transpose(1, 2)
                .flatten(1)
            ),
            "Sine and cosine of one frequency stand side by side, as in the transformer's paper. Here all "
            "cosines come first, then all sines.",
        ),
        Misconception(
            "exponent divided by dim",
            lambda t, dim, max_period: _sinusoids(t, _frequencies(_indices(dim) / dim, max_period)),
            "There are dim / 2 frequencies: divide k by dim / 2, or they end at sqrt(max_period).",
        ),
        Misconception(
            "exponent divided by dim / 2 - 1",
            lambda t, dim, max_period: _sinusoids(
                t, _frequencies(_indices(dim) / (dim // 2 - 1), max_period)
            ),
            "k runs from 0 to dim / 2 - 1 and is divided by dim / 2: the slowest frequency stays above 1 / "
            "max_period, and dim = 2 divides nothing by 0.",
        ),
        Misconception(
            "exponent doubled",
            lambda t, dim, max_period: _sinusoids(t, _frequencies(4 * _indices(dim) / dim, max_period)),
            "With k from 0 to dim / 2 - 1 the exponent is k / (dim / 2) = 2 k / dim: it has been doubled "
            "once more.",
        ),
        Misconception(
            "frequencies counted from 1",
            lambda t, dim, max_period: _sinusoids(
                t, _frequencies((_indices(dim) + 1) / (dim // 2), max_period)
            ),
            "k starts at 0: the fastest wave has frequency 1, which tells neighbouring steps apart.",
        ),
        Misconception(
            "frequencies from slow to fast",
            lambda t, dim, max_period: _sinusoids(
                t, _frequencies(_indices(dim).flip(0) / (dim // 2), max_period)
            ),
            "The frequencies begin at 1 and fall with k.",
        ),
        Misconception(
            "growing frequencies",
            lambda t, dim, max_period: _sinusoids(t, _frequencies(-_indices(dim) / (dim // 2), max_period)),
            "The exponent's minus sign is missing: frequencies fall from 1 towards 1 / max_period.",
        ),
        Misconception(
            "linear frequencies",
            lambda t, dim, max_period: _sinusoids(t, 1 - _indices(dim) / (dim // 2)),
            "The frequencies are geometric, each a constant factor below the one before, not evenly spread.",
        ),
        Misconception(
            "logarithm of max_period forgotten",
            lambda t, dim, max_period: _sinusoids(t, torch.exp(-max_period * _indices(dim) / (dim // 2))),
            "max_period^(-x) is exp(-x log(max_period)): the logarithm is missing.",
        ),
        Misconception(
            "max_period ignored",
            lambda t, dim, max_period: unet.timestep_embedding(t, dim, 10_000.0),
            "10000 is only the default: use the argument max_period.",
        ),
        Misconception(
            "2 pi in the frequencies",
            lambda t, dim, max_period: _sinusoids(
                t, 2 * math.pi * _frequencies(_indices(dim) / (dim // 2), max_period)
            ),
            "The frequencies are angular ones already: no factor 2 pi.",
        ),
        Misconception(
            "t scaled to [0, 1]",
            lambda t, dim, max_period: unet.timestep_embedding(t / 1000, dim, max_period),
            "t goes in as it is, 0 to T - 1. Divided by T, all steps look nearly alike to the fast waves.",
        ),
        Misconception(
            "papers' t for code's",
            lambda t, dim, max_period: unet.timestep_embedding(t + 1, dim, max_period),
            "1 is added to t. Code counts steps from 0 and gives the network that number.",
        ),
        Misconception(
            "minus sine",
            lambda t, dim, max_period: unet.timestep_embedding(-t, dim, max_period),
            "The sines have the wrong sign: the angle is t times the frequency.",
        ),
        Misconception(
            "sines only",
            lambda t, dim, max_period: unet.timestep_embedding(t, dim, max_period)[:, dim // 2 :].repeat(
                1, 2
            ),
            "Both halves are sines: the first half must be the cosines of the same angles.",
        ),
        Misconception(
            "cosines only",
            lambda t, dim, max_period: unet.timestep_embedding(t, dim, max_period)[:, : dim // 2].repeat(
                1, 2
            ),
            "Both halves are cosines: the second half must be the sines of the same angles.",
        ),
        Misconception(
            "axes swapped",
            lambda t, dim, max_period: unet.timestep_embedding(t, dim, max_period).T,
            "The batch is the first axis: (B, dim), one row for each step.",
        ),
        Misconception(
            "dim frequencies",
            lambda t, dim, max_period: _sinusoids(
                t, _frequencies(torch.arange(dim, dtype=torch.float64) / dim, max_period)
            ),
            "dim frequencies make 2 dim numbers: take dim / 2 of them.",
        ),
        Misconception(
            "whole-number division in the exponent",
            lambda t, dim, max_period: _sinusoids(t, torch.ones(dim // 2)),
            "k // (dim / 2) is 0 for every k, so that all frequencies are 1: divide with /.",
        ),
        Misconception(
            "logarithm to base 10",
            lambda t, dim, max_period: _sinusoids(
                t, torch.exp(-math.log10(max_period) * _indices(dim) / (dim // 2))
            ),
            "max_period^(-x) is exp(-x ln(max_period)) with the natural logarithm, math.log.",
        ),
    ),
)


def _residual_block_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, height, width, dim = (
        draws.integer(2, 3),
        draws.integer(3, 4),
        draws.integer(5, 6),
        draws.integer(7, 8),
    )
    side = draws.choice((4, 6))

    def case(note, batch, channels, out_channels, height, width, dim, **kind):
        def normalisation(channels):
            groups = 2 if channels % 2 == 0 else 1
            return _layer("normalisation", draws, (groups, channels // groups), **numbers)

        numbers = {"dtype": kind.get("dtype", torch.float64)}
        same = channels == out_channels
        x, embedding = draws.normal(batch, channels, height, width, **kind), draws.normal(batch, dim, **kind)
        arguments = (
            normalisation(channels),
            _layer("convolution", draws, (out_channels, channels, 3, 3), **numbers),
            _layer("linear", draws, (2 * out_channels, dim), **numbers),
            normalisation(out_channels),
            _layer("convolution", draws, (out_channels, out_channels, 3, 3), **numbers),
            CallableArgument("bypass", ())
            if same
            else _layer("convolution", draws, (out_channels, channels, 1, 1), **numbers),
        )
        return Case(note, (x, embedding, *arguments))

    return [
        # With all axes of one length, a (B, C) tensor along the wrong ones raises no error.
        case("all axes of one length", side, side, side, side, side, side),
        case("more channels out than in", batch, 4, 6, height, width, dim),
        case("fewer channels out than in", batch, 6, 4, height, width, dim),
        case("as many channels out as in", batch, 4, 4, height, width, dim),
        case("a batch of one", 1, 3, 4, height, width, dim),
        case("float32", batch, 4, 6, height, width, dim, dtype=torch.float32),
        case("with gradient", batch, 4, 6, height, width, dim, gradient=True),
    ]


def _layer(kind: str, draws: Draws, shape: tuple[int, ...], **numbers) -> CallableArgument:
    """A layer with drawn weights of that shape, and biases as many as its outputs."""
    bias = shape if kind == "normalisation" else shape[:1]
    return CallableArgument(kind, (draws.normal(*shape, **numbers), draws.normal(*bias, **numbers)))


def _residual(
    modulated: Callable = lambda norm, h, scale, shift: unet.scale_shift(norm(h), scale, shift),
    inward: Callable = lambda x, norm, conv: conv(F.silu(norm(x))),
    outward: Callable = lambda h, conv: conv(F.silu(h)),
    told: Callable = lambda embedding, layer: layer(F.silu(embedding)).chunk(2, dim=1),
    joined: Callable = lambda x, h, skip, norm: skip(x) + h,
) -> Callable:
    """The block with one of its parts exchanged."""

    def block(x, embedding, norm_in, conv_in, to_scale_shift, norm_out, conv_out, skip):
        h = inward(x, norm_in, conv_in)
        h = modulated(norm_out, h, *told(embedding, to_scale_shift))
        return joined(x, outward(h, conv_out), skip, norm_in)

    return block


RESIDUAL_BLOCK = Exercise(
    "unet.residual_block",
    '"The path around", equation (2.7)',
    unet.residual_block,
    _residual_block_cases,
    (
        Misconception(
            "skip forgotten",
            _residual(joined=lambda x, h, skip, norm: h),
            "The branch comes back alone: skip(x) is added to it.",
        ),
        Misconception(
            "branch forgotten",
            _residual(joined=lambda x, h, skip, norm: skip(x) + 0 * h),
            "Only skip(x) comes back: the branch is added to it.",
        ),
        Misconception(
            "skip of the normalised map",
            _residual(joined=lambda x, h, skip, norm: skip(norm(x)) + h),
            "The path around starts at x itself, or a new block would not leave x as it is.",
        ),
        Misconception(
            "skip of the activated map",
            _residual(joined=lambda x, h, skip, norm: skip(F.silu(norm(x))) + h),
            "The path around starts at x itself, before the normalisation and the SiLU.",
        ),
        Misconception(
            "SiLU of the sum",
            _residual(joined=lambda x, h, skip, norm: F.silu(skip(x) + h)),
            "Nothing comes after the sum, or a new block would not leave x as it is.",
        ),
        Misconception(
            "no SiLU before the first convolution",
            _residual(inward=lambda x, norm, conv: conv(norm(x))),
            "Before the first convolution comes the normalisation, then the SiLU.",
        ),
        Misconception(
            "no normalisation before the first convolution",
            _residual(inward=lambda x, norm, conv: conv(F.silu(x))),
            "norm_in is not used: x is normalised before the first SiLU.",
        ),
        Misconception(
            "normalisation after the SiLU",
            _residual(inward=lambda x, norm, conv: conv(norm(F.silu(x)))),
            "The normalisation comes before the SiLU, so that the SiLU gets numbers of the order of 1.",
        ),
        Misconception(
            "convolution first",
            _residual(inward=lambda x, norm, conv: F.silu(conv(norm(x)))),
            "norm, SiLU, convolution is the order of both halves; here the SiLU follows its convolution.",
        ),
        Misconception(
            "no SiLU before the last convolution",
            _residual(outward=lambda h, conv: conv(h)),
            "A SiLU stands between the scale and shift and the last convolution.",
        ),
        Misconception(
            "SiLU after the last convolution",
            _residual(outward=lambda h, conv: F.silu(conv(h))),
            "The branch ends in the convolution, so that it can add negative numbers too.",
        ),
        Misconception(
            "embedding without SiLU",
            _residual(told=lambda embedding, layer: layer(embedding).chunk(2, dim=1)),
            "The linear layer gets silu(embedding).",
        ),
        Misconception(
            "SiLU of scale and shift",
            _residual(told=lambda embedding, layer: F.silu(layer(embedding)).chunk(2, dim=1)),
            "The SiLU stands before the linear layer: scale and shift themselves may be any numbers.",
        ),
        Misconception(
            "scale and shift swapped",
            _residual(told=lambda embedding, layer: layer(F.silu(embedding)).chunk(2, dim=1)[::-1]),
            "The first half of the linear layer's numbers is the scale, the second half the shift.",
        ),
        Misconception(
            "scale and shift in turn",
            _residual(told=lambda embedding, layer: layer(F.silu(embedding)).unflatten(1, (-1, 2)).unbind(2)),
            "Scale and shift do not alternate: the first half of the numbers is the scale, the second the "
            "shift.",
        ),
        Misconception(
            "1 + forgotten",
            _residual(lambda norm, h, scale, shift: unet.scale_shift(norm(h), scale - 1, shift)),
            "The factor is 1 + scale, so that an embedding of 0 leaves h as it is; here it wipes h out.",
        ),
        Misconception(
            "scale forgotten",
            _residual(lambda norm, h, scale, shift: unet.scale_shift(norm(h), 0 * scale, shift)),
            "The factor 1 + scale is missing: an embedding must be able to change a channel's spread too.",
        ),
        Misconception(
            "shift forgotten",
            _residual(lambda norm, h, scale, shift: unet.scale_shift(norm(h), scale, 0 * shift)),
            "The shift is missing: an embedding must be able to move a channel's mean as well.",
        ),
        Misconception(
            "shifted before scaled",
            _residual(
                lambda norm, h, scale, shift: unet.scale_shift(norm(h), scale, shift * (1 + scale)),
            ),
            "The shift is added last, and is not scaled itself.",
        ),
        Misconception(
            "scaled and shifted before the normalisation",
            _residual(lambda norm, h, scale, shift: norm(unet.scale_shift(h, scale, shift))),
            "The normalisation takes off again most of what it gets: scale and shift come after it.",
        ),
        Misconception(
            "no normalisation before scale and shift",
            _residual(lambda norm, h, scale, shift: unet.scale_shift(h, scale, shift)),
            "norm_out is not used: h is normalised before it is scaled and shifted.",
        ),
        Misconception(
            "scale and shift along the last axes",
            _residual(lambda norm, h, scale, shift: norm(h) * (1 + scale) + shift),
            "A (B, C) tensor broadcasts against height and width. Give it the shape (B, C, 1, 1), or use "
            "scale_shift.",
        ),
        Misconception(
            "scale and shift along channels and height",
            _residual(lambda norm, h, scale, shift: norm(h) * (1 + scale[:, :, None]) + shift[:, :, None]),
            "A (B, C, 1) tensor broadcasts against channels, height and width. Give it the shape (B, C, 1, "
            "1), or use scale_shift.",
        ),
        Misconception(
            "one embedding for the whole batch",
            _residual(told=lambda embedding, layer: layer(F.silu(embedding[:1])).chunk(2, dim=1)),
            "The first sample's embedding is used for all. Each sample is at a step of its own.",
        ),
        Misconception(
            "ReLU for SiLU",
            _residual(
                inward=lambda x, norm, conv: conv(F.relu(norm(x))),
                outward=lambda h, conv: conv(F.relu(h)),
                told=lambda embedding, layer: layer(F.relu(embedding)).chunk(2, dim=1),
            ),
            "The nonlinearity of this chapter is the SiLU.",
        ),
    ),
)


def _attention_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, m, d, e = draws.integer(6, 7), draws.integer(4, 5), draws.integer(2, 3), draws.integer(8, 9)
    batch, heads = draws.integer(2, 3), 5
    side = draws.integer(3, 5)

    def case(note, lead, n, m, d, e, stretch=1, **kind):
        q, k, v = (draws.normal(*lead, *shape, **kind) for shape in ((n, d), (m, d), (m, e)))
        return Case(note, (q if stretch == 1 else q * stretch, k, v))

    return [
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", (side,), side, side, side, side),
        case("more queries than keys", (batch,), n, m, d, e),
        case("several heads", (batch, heads), n, m, d, e),
        case("several heads, as many queries as keys", (batch, heads), n, n, d, d),
        case("no batch axis", (), n, m, d, e),
        case("a single key", (batch,), n, 1, d, e),
        case("large scores, whose exponentials overflow", (batch,), n, m, d, e, stretch=2000),
        case("float32", (batch, heads), n, m, d, e, dtype=torch.float32),
        case("with gradient", (batch,), n, m, d, e, gradient=True),
    ]


def _attention(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """Attention with any factor at the scores, right or wrong."""
    return (q @ k.mT * factor).softmax(-1) @ v


ATTENTION = Exercise(
    "unet.attention",
    '"Self-attention", equation (2.9)',
    unet.attention,
    _attention_cases,
    (
        Misconception(
            "scores not scaled",
            lambda q, k, v: _attention(q, k, v, 1),
            "The scores are not divided by sqrt(d): their variance grows with d, and the softmax saturates.",
        ),
        Misconception(
            "divided by d",
            lambda q, k, v: _attention(q, k, v, 1 / q.shape[-1]),
            "The scores are divided by d. Their standard deviation is sqrt(d): divide by the root.",
        ),
        Misconception(
            "multiplied by sqrt(d)",
            lambda q, k, v: _attention(q, k, v, math.sqrt(q.shape[-1])),
            "The scores are divided by sqrt(d), not multiplied.",
        ),
        Misconception(
            "scaled by the number of keys",
            lambda q, k, v: _attention(q, k, v, 1 / math.sqrt(k.shape[-2])),
            "The scale is the length d of queries and keys, the last axis, not the number of keys.",
        ),
        Misconception(
            "scaled by the number of queries",
            lambda q, k, v: _attention(q, k, v, 1 / math.sqrt(q.shape[-2])),
            "The scale is the length d of queries and keys, the last axis, not the number of queries.",
        ),
        Misconception(
            "scaled by the values' length",
            lambda q, k, v: _attention(q, k, v, 1 / math.sqrt(v.shape[-1])),
            "The scale is the length d of queries and keys, over which the scores are summed, not that of "
            "the values.",
        ),
        Misconception(
            "scaled by all heads' length",
            lambda q, k, v: _attention(
                q, k, v, 1 / math.sqrt(q.shape[-1] * (q.shape[-3] if q.ndim == 4 else 1))
            ),
            "d is the length within one head, the last axis of q, not the sum over the heads.",
        ),
        Misconception(
            "scaled after the softmax",
            lambda q, k, v: _attention(q, k, v, 1) / math.sqrt(q.shape[-1]),
            "The scores are scaled before the softmax; afterwards the weights no longer add up to 1.",
        ),
        Misconception(
            "softmax over the queries",
            lambda q, k, v: scores(q, k).softmax(-2) @ v,
            "The weights of one query add up to 1 over the keys: the softmax runs over the last axis of the "
            "scores.",
        ),
        Misconception(
            "softmax over the batch",
            lambda q, k, v: scores(q, k).softmax(0) @ v,
            "The softmax runs over the first axis and mixes samples; it belongs to the keys, the last axis.",
        ),
        Misconception(
            "softmax over the heads",
            lambda q, k, v: scores(q, k).softmax(1) @ v,
            "The softmax runs over axis 1; count axes from the end: the keys are the last one of the scores.",
        ),
        Misconception(
            "no softmax",
            lambda q, k, v: scores(q, k) @ v,
            "The scores are used as weights as they are; the softmax over the keys is missing.",
        ),
        Misconception(
            "softmax without its maximum taken off",
            lambda q, k, v: scores(q, k).exp() / scores(q, k).exp().sum(-1, keepdim=True) @ v,
            "exp overflows for large scores and the quotient is NaN: use softmax, or subtract the maximum "
            "first.",
        ),
        Misconception(
            "sigmoid for softmax",
            lambda q, k, v: scores(q, k).sigmoid() @ v,
            "A sigmoid gives each key a weight of its own; the softmax makes them add up to 1.",
        ),
        Misconception(
            "softmax of the result",
            lambda q, k, v: (scores(q, k) @ v).softmax(-1),
            "The softmax turns the scores into weights, before the values are mixed.",
        ),
        Misconception(
            "logarithm of the weights",
            lambda q, k, v: scores(q, k).log_softmax(-1) @ v,
            "The weights are the softmax itself, not its logarithm.",
        ),
        Misconception(
            "sign of the scores",
            lambda q, k, v: _attention(q, k, v, -1 / math.sqrt(q.shape[-1])),
            "The scores have the wrong sign: a key that matches better must weigh more.",
        ),
        Misconception(
            "queries and keys swapped",
            lambda q, k, v: unet.attention(k, q, v),
            "Each query asks all keys: q k^T has a row for each query.",
        ),
        Misconception(
            "keys and values swapped",
            lambda q, k, v: unet.attention(q, v, k),
            "Queries are compared with keys; the weights then mix the values.",
        ),
        Misconception(
            "keys mixed instead of values",
            lambda q, k, v: unet.attention(q, k, k),
            "The weights mix the values v, not the keys.",
        ),
        Misconception(
            "queries mixed instead of values",
            lambda q, k, v: unet.attention(q, k, q),
            "The weights mix the values v, not the queries.",
        ),
        Misconception(
            "keys not transposed",
            lambda q, k, v: (q @ k / math.sqrt(q.shape[-1])).softmax(-1) @ v,
            "A score is the inner product of a query and a key, both along the last axis: q k^T.",
        ),
        Misconception(
            "weights transposed",
            lambda q, k, v: scores(q, k).softmax(-1).mT @ v,
            "The weights have a row for each query already: multiply them by v as they are.",
        ),
        Misconception(
            "weights detached",
            lambda q, k, v: unet.attention(q.detach(), k.detach(), v),
            "No gradient reaches q and k: the attention weights are learned too.",
        ),
        Misconception(
            "causal mask",
            lambda q, k, v: (
                (scores(q, k))
                .masked_fill(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1), -math.inf)
                .softmax(-1)
                @ v
            ),
            "Later keys are masked, as in language models. Pixels have no order: every query sees every key.",
        ),
    ),
)


def _self_attention_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, height, width = draws.integer(2, 3), draws.integer(2, 3), draws.integer(4, 5)

    def case(note, batch, heads, head_dim, height, width, **kind):
        numbers, channels = {"dtype": kind.get("dtype", torch.float64)}, heads * head_dim
        return Case(
            note,
            (
                draws.normal(batch, channels, height, width, **kind),
                _layer("normalisation", draws, (heads, head_dim), **numbers),
                _layer("linear", draws, (3 * channels, channels), **numbers),
                _layer("linear", draws, (channels, channels), **numbers),
                heads,
            ),
        )

    return [
        # With axes of one length, a mistake about the axes raises no error.
        case("as many pixels as channels, images as heads", 3, 3, 3, 3, 3),
        case("two heads", batch, 2, draws.integer(3, 5), height, width),
        case("three heads", batch, 3, 2, height, width),
        case("a single head", batch, 1, draws.integer(4, 6), height, width),
        case("heads of one channel", batch, 4, 1, height, width),
        case("a single pixel", batch, 2, 3, 1, 1),
        case("a batch of one", 1, 2, 4, height, width),
        case("float32", batch, 2, 4, height, width, dtype=torch.float32),
        case("with gradient", batch, 2, 3, height, width, gradient=True),
    ]


def _attending(
    tokens: Callable = lambda x, norm: norm(x).flatten(2).transpose(1, 2),
    split: Callable = lambda qkv, heads: qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4),
    attend: Callable = unet.attention,
    merge: Callable = lambda mixed: mixed.transpose(1, 2).flatten(2),
    project: Callable = lambda merged, layer: layer(merged),
    back: Callable = lambda h, like: h.transpose(1, 2).reshape(like.shape),
    joined: Callable = lambda x, h, norm: x + h,
) -> Callable:
    """The layer with one of its parts exchanged."""

    def layer(x, norm, qkv, to_out, heads):
        q, k, v = split(qkv(tokens(x, norm)), heads)
        h = project(merge(attend(q, k, v)), to_out)
        return joined(x, back(h, x), norm)

    return layer


def _scaled_by(size: Callable) -> Callable:
    """Attention whose scores are divided by the root of size(q, k)."""
    return lambda q, k, v: _attention(q, k, v, 1 / math.sqrt(size(q)))


SELF_ATTENTION = Exercise(
    "unet.self_attention",
    '"The layer", equation (2.11)',
    unet.self_attention,
    _self_attention_cases,
    (
        Misconception(
            "not added to the input",
            _attending(joined=lambda x, h, norm: h),
            "What attention finds is added to x: at the start of training the layer must do nothing.",
        ),
        Misconception(
            "added to the normalised map",
            _attending(joined=lambda x, h, norm: norm(x) + h),
            "The result is added to x itself, not to its normalised version.",
        ),
        Misconception(
            "normalisation forgotten",
            _attending(tokens=lambda x, norm: x.flatten(2).transpose(1, 2)),
            "norm is not used: queries, keys and values are made from the normalised map.",
        ),
        Misconception(
            "pixels not transposed",
            _attending(tokens=lambda x, norm: norm(x).reshape(x.shape[0], -1, x.shape[1])),
            "Reshaping (B, C, H, W) to (B, H W, C) mixes channels and pixels: flatten the pixels, then "
            "transpose.",
        ),
        Misconception(
            "columns before rows",
            _attending(tokens=lambda x, norm: norm(x).mT.flatten(2).transpose(1, 2)),
            "The pixels become tokens column by column, but come back row by row: the picture is jumbled.",
        ),
        Misconception(
            "a single head",
            lambda x, norm, qkv, project, heads: unet.self_attention(x, norm, qkv, project, 1),
            "The heads are not split: each has its own scores, over its own channels.",
        ),
        Misconception(
            "channels dealt out in turn",
            _attending(
                split=lambda qkv, heads: qkv.unflatten(2, (3, -1, heads)).permute(2, 0, 4, 1, 3),
                merge=lambda mixed: mixed.permute(0, 2, 3, 1).flatten(2),
            ),
            "A head's channels lie side by side: C splits into (heads, C / heads), not into (C / heads, "
            "heads).",
        ),
        Misconception(
            "heads before q, k, v",
            _attending(split=lambda qkv, heads: qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)),
            "The 3 C channels hold all queries, then all keys, then all values: they split into (3, heads, C "
            "/ heads).",
        ),
        Misconception(
            "heads look at each other",
            _attending(
                split=lambda qkv, heads: qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 1, 3, 4),
                merge=lambda mixed: mixed.flatten(2),
            ),
            "attention mixes along the last axis but one. That must be the pixels: bring the heads in front "
            "of them.",
        ),
        Misconception(
            "images look at each other",
            _attending(
                split=lambda qkv, heads: qkv.unflatten(2, (3, heads, -1)).permute(2, 1, 3, 0, 4),
                merge=lambda mixed: mixed.permute(2, 0, 1, 3).flatten(2),
            ),
            "attention mixes along the last axis but one, here the batch. Each image is on its own: that "
            "axis must be the pixels.",
        ),
        Misconception(
            "channels look at each other",
            _attending(
                attend=lambda q, k, v: _attention(q.mT, k.mT, v.mT, 1 / math.sqrt(q.shape[-2])).mT,
            ),
            "The pixels are the tokens, and the channels their features; here it is the other way round.",
        ),
        Misconception(
            "heads merged without coming back behind the pixels",
            _attending(merge=lambda mixed: mixed.reshape(mixed.shape[0], mixed.shape[2], -1)),
            "(B, heads, N, d) becomes (B, N, heads, d) first; reshaped as it is, pixels and heads are mixed "
            "up.",
        ),
        Misconception(
            "heads merged the other way round",
            _attending(merge=lambda mixed: mixed.permute(0, 2, 3, 1).flatten(2)),
            "The channels of one head stay side by side: flatten (B, N, heads, d), not (B, N, d, heads).",
        ),
        Misconception(
            "heads added up",
            _attending(merge=lambda mixed: mixed.sum(1).repeat(1, 1, mixed.shape[1])),
            "The heads are set side by side, C / heads channels each, not added: the last layer mixes them.",
        ),
        Misconception(
            "last layer forgotten",
            _attending(project=lambda merged, layer: merged),
            "project is not used: it mixes what the heads have found.",
        ),
        Misconception(
            "pixels not transposed back",
            _attending(back=lambda h, like: h.reshape(like.shape)),
            "Reshaping (B, H W, C) to (B, C, H, W) mixes pixels and channels: transpose first.",
        ),
        Misconception(
            "keys asked by queries swapped",
            _attending(attend=lambda q, k, v: unet.attention(k, q, v)),
            "The first C channels of qkv are the queries, the next the keys.",
        ),
        Misconception(
            "values first",
            _attending(attend=lambda q, k, v: unet.attention(k, v, q)),
            "The 3 C channels of qkv are queries, keys, values, in this order.",
        ),
        Misconception(
            "keys mixed",
            _attending(attend=lambda q, k, v: unet.attention(q, k, k)),
            "The weights mix the values, not the keys.",
        ),
        Misconception(
            "scores not scaled",
            _attending(attend=_scaled_by(lambda q: 1)),
            "The scores are not divided by sqrt(d): call attention, which does.",
        ),
        Misconception(
            "scaled by all channels",
            _attending(attend=_scaled_by(lambda q: q.shape[-1] * q.shape[1])),
            "The scores are divided by the root of all channels; d is the number of one head's.",
        ),
        Misconception(
            "scaled twice",
            _attending(attend=_scaled_by(lambda q: q.shape[-1] ** 2)),
            "attention divides the scores already: do not scale the queries as well.",
        ),
    ),
)


def _patchify_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, channels = draws.integer(2, 3), draws.integer(4, 5)
    float64, float32 = torch.float64, torch.float32
    return [
        Case(note, (draws.normal(b, c, p * rows, p * columns, dtype=dtype, gradient=gradient), p))
        for note, b, c, rows, columns, p, dtype, gradient in (
            ("square images", batch, 3, 4, 4, 2, float64, False),
            ("wide images", batch, channels, 2, draws.integer(5, 7), 2, float64, False),
            ("tall images, patches of 3", batch, 1, draws.integer(4, 5), 2, 3, float64, False),
            ("patches of 4", 1, 3, 4, 4, 4, float64, False),
            ("patches of a single pixel", batch, 3, 4, 5, 1, float64, False),
            ("a single patch", batch, 3, 1, 1, 4, float64, False),
            ("float32", batch, 3, 4, 3, 2, float32, False),
            ("with gradient", batch, 3, 3, 4, 2, float64, True),
        )
    ]


PATCHIFY = Exercise(
    "unet.patchify",
    '"Patches", equation (2.15)',
    unet.patchify,
    _patchify_cases,
    (
        Misconception(
            "channels last in the new channels",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 3, 5, 1, 2, 4).flatten(1, 3),
            "Here pixel (i, j) of channel c lands in channel (i p + j) C + c. The old channel comes first: c "
            "p^2 + i p + j.",
        ),
        Misconception(
            "channels in the middle of the new channels",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 3, 1, 5, 2, 4).flatten(1, 3),
            "The old channel stands between i and j in the new one. It comes first: c p^2 + i p + j.",
        ),
        Misconception(
            "rows and columns within a patch swapped",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 1, 5, 3, 2, 4).flatten(1, 3),
            "Pixel (i, j) lands in channel j p + i: the row i counts p, the column j counts 1.",
        ),
        Misconception(
            "rows and columns of patches swapped",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 1, 3, 5, 4, 2).flatten(1, 3),
            "The image comes out transposed: patches keep their rows and columns, H / p before W / p.",
        ),
        Misconception(
            "everything transposed",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 1, 5, 3, 4, 2).flatten(1, 3),
            "The image comes out transposed, between patches and within them: rows stay before columns.",
        ),
        Misconception(
            "reshaped without moving pixels",
            lambda x, patch_size: x.reshape(
                x.shape[0], -1, x.shape[2] // patch_size, x.shape[3] // patch_size
            ),
            "reshape keeps the pixels in the order of memory, row by row, so that a 'patch' is a run of a "
            "row. Split both axes, then permute.",
        ),
        Misconception(
            "split without permuting",
            lambda x, patch_size: patch_grid(x, patch_size).flatten(1, 3).flatten(2, 3),
            "The axes are split but not permuted, so that rows of patches end up in the channels.",
        ),
        Misconception(
            "image cut into p x p tiles",
            lambda x, patch_size: (
                x.unflatten(3, (patch_size, -1))
                .unflatten(2, (patch_size, -1))
                .permute(0, 1, 2, 4, 3, 5)
                .flatten(1, 3)
            ),
            "An axis of length H splits into (H / p, p), number of the patch first. Split into (p, H / p), "
            "neighbouring pixels stay apart and the image becomes p x p large tiles.",
        ),
        Misconception(
            "patches and pixels swapped",
            lambda x, patch_size: patch_grid(x, patch_size).permute(0, 1, 2, 4, 3, 5).flatten(1, 3),
            "The patches have gone into the channels and the pixels within them stayed outside; it is the "
            "other way round.",
        ),
        Misconception(
            "mean of each patch",
            lambda x, patch_size: torch.nn.functional.avg_pool2d(x, patch_size),
            "This averages each patch. Patchify keeps every pixel: C p^2 channels.",
        ),
        Misconception(
            "one pixel of each patch",
            lambda x, patch_size: x[:, :, ::patch_size, ::patch_size],
            "This keeps the first pixel of each patch only. Patchify keeps every pixel: C p^2 channels.",
        ),
        Misconception(
            "patches as tokens",
            lambda x, patch_size: unet.patchify(x, patch_size).flatten(2),
            "The patches are flattened to one axis, as for a transformer; here they stay an image, (H / p, W "
            "/ p).",
        ),
        Misconception(
            "tokens before channels",
            lambda x, patch_size: unet.patchify(x, patch_size).flatten(2).transpose(1, 2),
            "The patches are a sequence, as for a transformer; here they stay an image, (B, C p^2, H / p, W "
            "/ p).",
        ),
    ),
)


def _unet_forward_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, height, width = draws.integer(2, 3), draws.integer(2, 3), draws.integer(4, 5)

    def case(note, batch, channels, height, width, levels, skips, **kind):
        dim, told = 3, 2

        def layer(name, inputs, *number):
            numbers = {"dtype": kind.get("dtype", torch.float64)}
            return CallableArgument(name, (draws.normal(*number, inputs + dim + told, channels, **numbers),))

        return Case(
            note,
            (
                draws.normal(batch, channels, height, width, **kind),
                draws.normal(batch, dim, **kind),
                draws.normal(batch, told, **kind),
                layer("way_down", channels, levels * skips - 1),  # h is the first map
                layer("middle", channels),
                tuple(layer("up_level", 2 * channels, skips) for _ in range(levels)),
            ),
        )

    return [
        case("two levels", batch, 3, height, width, 2, 2),
        case("three levels", batch, 4, height, width, 3, 2),
        case("three skips for each level", batch, 3, height, width, 2, 3),
        case("a single level", batch, 3, height, width, 1, 2),
        case("a batch of one", 1, 3, height, width, 3, 3),
        case("float32", batch, 4, height, width, 2, 2, dtype=torch.float32),
        case("with gradient", batch, 3, height, width, 2, 2, gradient=True),
    ]


def _way_up(
    choose: Callable = lambda maps, level, levels: _last_first(maps, level, levels),
    enter: Callable = lambda h, maps, middle, told: middle(maps[-1], *told),
    order: Callable = list,
    told_above: Callable = lambda embedding, cond: (embedding, cond),
    climb: Callable = lambda h, at_bottom, level, skips, told: level(h, skips, *told),
) -> Callable:
    """The U-Net's forward with one of its parts exchanged."""

    def forward(h, embedding, cond, down, middle, up):
        maps = down(h, embedding, cond)
        at_bottom = result = enter(h, maps, middle, (embedding, cond))
        for number, level in enumerate(order(up)):
            skips = choose(maps, number, len(up))
            result = climb(result, at_bottom, level, skips, told_above(embedding, cond))
        return result

    return forward


def _last_first(maps: list[Tensor], level: int, levels: int) -> list[Tensor]:
    """The maps that a level gets, which is right."""
    own = len(maps) // levels
    return maps[::-1][level * own : (level + 1) * own]


UNET_FORWARD = Exercise(
    "unet.unet_forward",
    '"The whole"',
    unet.unet_forward,
    _unet_forward_cases,
    (
        Misconception(
            "first maps first",
            _way_up(lambda maps, level, levels: maps[level * len(maps) // levels :][: len(maps) // levels]),
            "The way up begins where the way down ended: it takes the last maps first.",
        ),
        Misconception(
            "order within a level",
            _way_up(lambda maps, level, levels: _last_first(maps, level, levels)[::-1]),
            "Each level has its own maps, but in the wrong order: the last map is taken first.",
        ),
        Misconception(
            "levels mixed up",
            _way_up(lambda maps, level, levels: maps[::-1][level::levels]),
            "A level takes maps that follow each other: it works at one resolution.",
        ),
        Misconception(
            "the same maps for every level",
            _way_up(lambda maps, level, levels: _last_first(maps, 0, levels)),
            "Each map is used once: what a level has taken is gone for the next.",
        ),
        Misconception(
            "the last map for all",
            _way_up(lambda maps, level, levels: [maps[-1]] * (len(maps) // levels)),
            "Each stage gets a map of its own: a map that is taken leaves the list.",
        ),
        Misconception(
            "last map left out",
            lambda h, embedding, cond, down, middle, up: _run_out(maps=down(h, embedding, cond)),
            "The maps do not last: the lowest one goes into the middle and is the first skip as well, and h "
            "itself is a map, too.",
        ),
        Misconception(
            "skips of zeros",
            _way_up(
                lambda maps, level, levels: [torch.zeros_like(m) for m in _last_first(maps, level, levels)]
            ),
            "The maps of the way down are missing on the way up, and with them all detail.",
        ),
        Misconception(
            "middle forgotten",
            _way_up(enter=lambda h, maps, middle, told: maps[-1]),
            "Between the way down and the way up the last map goes through the middle.",
        ),
        Misconception(
            "middle of the first map",
            _way_up(enter=lambda h, maps, middle, told: middle(h, *told)),
            "The middle gets the last map of the way down, not the first.",
        ),
        Misconception(
            "middle twice",
            _way_up(enter=lambda h, maps, middle, told: middle(middle(maps[-1], *told), *told)),
            "The middle is passed once.",
        ),
        Misconception(
            "middle added to its input",
            _way_up(enter=lambda h, maps, middle, told: maps[-1] + middle(maps[-1], *told)),
            "The middle's blocks have their own paths around them: nothing is added here.",
        ),
        Misconception(
            "levels in reverse",
            _way_up(order=lambda up: list(reversed(up))),
            "up begins with the lowest level already: take its levels in their order.",
        ),
        Misconception(
            "every level from the bottom",
            _way_up(climb=lambda h, at_bottom, level, skips, told: level(at_bottom, skips, *told)),
            "A level gets what the level before returned, not the middle's result again.",
        ),
        Misconception(
            "embedding not told above",
            _way_up(told_above=lambda embedding, cond: (torch.zeros_like(embedding), cond)),
            "The way up must know the step as well: each level gets the embedding.",
        ),
        Misconception(
            "condition not told above",
            _way_up(told_above=lambda embedding, cond: (embedding, torch.zeros_like(cond))),
            "The way up gets the condition as well: attention there may look at it.",
        ),
    ),
)


def _run_out(maps: list[Tensor]) -> Tensor:
    """What happens to who takes one map more than there are."""
    while True:
        maps.pop()


def _ema_update_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    rows, columns = draws.integer(3, 5), draws.integer(2, 6)
    decay = 0.9 + draws.integer(1, 99) / 1000
    return [
        Case(note, (draws.normal(*shape, dtype=dtype), draws.normal(*shape, dtype=dtype), decay))
        for note, shape, dtype, decay in (
            ("a matrix", (rows, columns), torch.float64, 0.9),
            ("a convolution", (rows, 2, 3, 3), torch.float64, decay),
            ("a vector", (columns,), torch.float64, 0.999),
            ("a single number", (), torch.float64, 0.25),
            ("everything kept", (rows, columns), torch.float64, 1.0),
            ("nothing kept", (rows, columns), torch.float64, 0.0),
            ("float32", (rows, columns), torch.float32, 0.7),
        )
    ]


EMA_UPDATE = Exercise(
    "unet.ema_update",
    '"Averaging the weights", equation (2.17)',
    unet.ema_update,
    _ema_update_cases,
    (
        Misconception(
            "roles swapped",
            lambda average, parameter, decay: (1 - decay) * average + decay * parameter,
            "decay is what is kept of the average. Here the average is nearly replaced at each update.",
        ),
        Misconception(
            "parameter not weighted",
            lambda average, parameter, decay: decay * average + parameter,
            "The weights must add up to 1: the parameter's is 1 - decay. Here the average grows without end.",
        ),
        Misconception(
            "average not weighted",
            lambda average, parameter, decay: average + (1 - decay) * parameter,
            "The weights must add up to 1: the average's is decay. Here the average grows without end.",
        ),
        Misconception(
            "both weighted by decay",
            lambda average, parameter, decay: decay * average + decay * parameter,
            "The weights must add up to 1: decay for the average, 1 - decay for the parameter.",
        ),
        Misconception(
            "both weighted by 1 - decay",
            lambda average, parameter, decay: (1 - decay) * average + (1 - decay) * parameter,
            "The weights must add up to 1: decay for the average, 1 - decay for the parameter.",
        ),
        Misconception(
            "moved away from the parameter",
            lambda average, parameter, decay: average + (1 - decay) * (average - parameter),
            "The difference has the wrong sign: the average moves towards the parameter.",
        ),
        Misconception(
            "difference instead of sum",
            lambda average, parameter, decay: decay * average - (1 - decay) * parameter,
            "The parameter's share is added.",
        ),
        Misconception(
            "plain mean",
            lambda average, parameter, decay: (average + parameter) / 2,
            "This is the mean of the two, whatever decay says.",
        ),
        Misconception(
            "bias correction",
            lambda average, parameter, decay: (
                unet.ema_update(average, parameter, decay) / (1 - decay if decay < 1 else 1)
            ),
            "The result is divided by 1 - decay, as Adam corrects an average that started at 0. This one "
            "started at the weights.",
        ),
        Misconception(
            "decay squared",
            lambda average, parameter, decay: unet.ema_update(average, parameter, decay**2),
            "decay is used twice: weigh the average with it once.",
        ),
        Misconception(
            "average returned",
            lambda average, parameter, decay: average.clone(),
            "The average comes back as it was; the parameter's share is missing.",
        ),
        Misconception(
            "parameter returned",
            lambda average, parameter, decay: parameter.clone(),
            "The parameter comes back; nothing of the average is kept.",
        ),
    ),
)


EXERCISES = [
    TIMESTEP_EMBEDDING,
    RESIDUAL_BLOCK,
    ATTENTION,
    SELF_ATTENTION,
    PATCHIFY,
    UNET_FORWARD,
    EMA_UPDATE,
]
