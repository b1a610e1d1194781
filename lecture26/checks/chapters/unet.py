"""Exercises of chapter 02: time embedding, scale and shift, attention, patches, averaged weights, bits."""

import math

import torch
from torch import Tensor

from lecture26 import unet

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


def _scale_shift_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, channels, height, width = (
        draws.integer(3, 4),
        draws.integer(5, 6),
        draws.integer(2, 3),
        draws.integer(7, 8),
    )
    # With all axes of one length, a (B, C) tensor along the wrong ones raises no error.
    side = draws.integer(3, 5)
    cube = (side, side, side, side)
    image = (batch, channels, height, width)
    return [
        _scale_shift_case(draws, "images", image),
        _scale_shift_case(draws, "all axes of one length", cube),
        _scale_shift_case(draws, "a batch of one", (1, channels, height, width)),
        _scale_shift_case(draws, "a single channel", (batch, 1, height, width)),
        _scale_shift_case(draws, "images in float32", image, dtype=torch.float32),
        _scale_shift_case(draws, "images with gradient", image, gradient=True),
        Case(
            "scale and shift 0", (draws.normal(*image), *torch.zeros(2, batch, channels, dtype=torch.float64))
        ),
    ]


def _scale_shift_case(draws, note, shape, dtype=torch.float64, gradient=False) -> Case:
    h, scale, shift = (
        draws.normal(*s, dtype=dtype, gradient=gradient) for s in (shape, shape[:2], shape[:2])
    )
    return Case(note, (h, scale, shift))


SCALE_SHIFT = Exercise(
    "unet.scale_shift",
    '"What the step changes", equation (2.6)',
    unet.scale_shift,
    _scale_shift_cases,
    (
        Misconception(
            "1 + forgotten",
            lambda h, scale, shift: h * scale[:, :, None, None] + shift[:, :, None, None],
            "The factor is 1 + scale, so that an embedding of 0 leaves h as it is; here it wipes h out.",
        ),
        Misconception(
            "scale and shift swapped",
            lambda h, scale, shift: unet.scale_shift(h, shift, scale),
            "scale belongs into the factor, shift is added.",
        ),
        Misconception(
            "shifted before scaled",
            lambda h, scale, shift: (h + shift[:, :, None, None]) * (1 + scale[:, :, None, None]),
            "The shift is added last, and is not scaled itself.",
        ),
        Misconception(
            "shift forgotten",
            lambda h, scale, shift: h * (1 + scale[:, :, None, None]),
            "The term shift is missing: an embedding must be able to move a channel's mean as well.",
        ),
        Misconception(
            "scale forgotten",
            lambda h, scale, shift: h + shift[:, :, None, None],
            "The factor 1 + scale is missing: an embedding must be able to change a channel's spread too.",
        ),
        Misconception(
            "1 + at the shift",
            lambda h, scale, shift: h * scale[:, :, None, None] + 1 + shift[:, :, None, None],
            "The 1 belongs to the factor: h (1 + scale) + shift.",
        ),
        Misconception(
            "1 - scale",
            lambda h, scale, shift: h * (1 - scale[:, :, None, None]) + shift[:, :, None, None],
            "The scale has the wrong sign: the factor is 1 + scale.",
        ),
        Misconception(
            "exponential of the scale",
            lambda h, scale, shift: h * scale[:, :, None, None].exp() + shift[:, :, None, None],
            "The factor is 1 + scale, not exp(scale); the two agree for small scales only.",
        ),
        Misconception(
            "shift subtracted",
            lambda h, scale, shift: unet.scale_shift(h, scale, -shift),
            "The shift has the wrong sign: it is added.",
        ),
        Misconception(
            "divided by the factor",
            lambda h, scale, shift: h / (1 + scale[:, :, None, None]) + shift[:, :, None, None],
            "h is multiplied by 1 + scale.",
        ),
        Misconception(
            "along the last axes",
            lambda h, scale, shift: h * (1 + scale) + shift,
            "A (B, C) tensor broadcasts against height and width. Give it the shape (B, C, 1, 1).",
        ),
        Misconception(
            "along channels and height",
            lambda h, scale, shift: h * (1 + scale[:, :, None]) + shift[:, :, None],
            "A (B, C, 1) tensor broadcasts against channels, height and width. Give it the shape (B, C, 1, "
            "1).",
        ),
        Misconception(
            "along batch and width",
            lambda h, scale, shift: h * (1 + scale[:, None, None, :]) + shift[:, None, None, :],
            "The numbers belong to the channels, the second axis: give them the shape (B, C, 1, 1).",
        ),
        Misconception(
            "along batch and height",
            lambda h, scale, shift: h * (1 + scale[:, None, :, None]) + shift[:, None, :, None],
            "The numbers belong to the channels, the second axis: give them the shape (B, C, 1, 1).",
        ),
        Misconception(
            "one sample for the whole batch",
            lambda h, scale, shift: unet.scale_shift(h, scale[:1], shift[:1]),
            "The first sample's numbers are used for all. Each sample has an embedding of its own.",
        ),
        Misconception(
            "mean over the batch",
            lambda h, scale, shift: unet.scale_shift(
                h, scale.mean(0, keepdim=True), shift.mean(0, keepdim=True)
            ),
            "The numbers are averaged over the batch. Each sample has an embedding of its own.",
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


def _bits_per_dim_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch = draws.integer(3, 6)
    return [
        Case(note, (1000 * draws.uniform(*shape).to(dtype), num_dimensions))
        for note, shape, dtype, num_dimensions in (
            ("a batch of images", (batch,), torch.float64, 3 * 32 * 32),
            ("the terms of each step", (batch, 7), torch.float64, 784),
            ("a single number", (), torch.float64, 64),
            ("one image", (1,), torch.float64, draws.integer(100, 999)),
            ("one dimension", (batch,), torch.float64, 1),
            ("float32", (batch,), torch.float32, 3072),
        )
    ]


BITS_PER_DIM = Exercise(
    "unet.bits_per_dim",
    '"Bits per dimension", equation (2.23)',
    unet.bits_per_dim,
    _bits_per_dim_cases,
    (
        Misconception(
            "still in nats",
            lambda nats, num_dimensions: nats / num_dimensions,
            "This is in nats per dimension: one bit is ln 2 nats.",
        ),
        Misconception(
            "multiplied by ln 2",
            lambda nats, num_dimensions: nats * math.log(2) / num_dimensions,
            "A bit is less than a nat, so the number of bits is the larger one: divide by ln 2.",
        ),
        Misconception(
            "divided by 2",
            lambda nats, num_dimensions: nats / (2 * num_dimensions),
            "The logarithm of 2 is missing: divide by ln 2, not by 2.",
        ),
        Misconception(
            "logarithm of base 10",
            lambda nats, num_dimensions: nats / (num_dimensions * math.log10(2)),
            "Nats come from the natural logarithm: use ln 2.",
        ),
        Misconception(
            "bits per image",
            lambda nats, num_dimensions: nats / math.log(2),
            "These are the bits of a whole image: divide by the number of dimensions.",
        ),
        Misconception(
            "wrong sign",
            lambda nats, num_dimensions: -nats / (num_dimensions * math.log(2)),
            "nats is -log P already; the sign is turned once too often.",
        ),
        Misconception(
            "divided by ln 256",
            lambda nats, num_dimensions: nats / (num_dimensions * math.log(256)),
            "This counts bytes: one bit is ln 2 nats, whatever the number of values of a pixel.",
        ),
        Misconception(
            "averaged over the batch",
            lambda nats, num_dimensions: torch.ones_like(nats) * nats.mean() / (num_dimensions * math.log(2)),
            "Every image keeps a number of its own: leave the shape of nats as it is.",
        ),
    ),
)


EXERCISES = [TIMESTEP_EMBEDDING, SCALE_SHIFT, ATTENTION, PATCHIFY, EMA_UPDATE, BITS_PER_DIM]
