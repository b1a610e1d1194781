"""Exercises of chapter 07: out of the latents, cross-attention, training, maps, pictures from pictures."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lecture26 import latent_diffusion
from lecture26.ddpm import cosine_betas, q_sample

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws, cast, transposed
from ..mistakes import (
    schedule_mistakes,
    scores,
    step_mistakes,
    with_arguments,
    with_result,
)
from ..optimizers import OptimizerArgument

# Out of the latent space


def _from_latents_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(5, 6), draws.integer(4, 5)

    def case(note, *shape, scale, colours=3, mode="grad", **kind):
        latents = draws.normal(*shape, **kind)
        tensors = draws.normal(shape[1], 4 * colours), draws.normal(4 * colours)
        decode = CallableArgument("decoder", tuple(tensor.to(latents.dtype) for tensor in tensors))
        return Case(note, (decode, latents, scale), mode)

    return [
        case("latent images", few, 4, 3, 5, scale=0.7),
        case("all axes of one length", side, side, side, side, scale=1.6),
        case("the scale of Stable Diffusion's VAE", many, 4, 2, 2, scale=0.18215),
        case("a single sample", 1, 4, 4, 4, scale=2.5),
        case("a whole number as scale", few, 2, 3, 3, scale=3),
        case("grey images", many, 4, 2, 3, scale=0.4, colours=1),
        case("float32", few, 4, 5, 4, scale=0.8, dtype=torch.float32),
        case("latents with gradient", many, 2, 2, 3, scale=1.4, gradient=True),
        case("under no_grad, as in a sampler", few, 4, 3, 2, scale=0.5, mode="no_grad"),
    ]


def _decoded_at(change: Callable[[Tensor, float], Tensor]) -> Callable:
    """What is decoded from any function of the latents and the scale."""
    return lambda decode, latents, scale: decode(change(latents, scale))


def _images_changed(change: Callable[[Tensor, float], Tensor]) -> Callable:
    """Any function of the right images and the scale."""
    return lambda decode, latents, scale: change(latent_diffusion.from_latents(decode, latents, scale), scale)


FROM_LATENTS = Exercise(
    "latent_diffusion.from_latents",
    '"Into the latent space and out of it", equation (7.4)',
    latent_diffusion.from_latents,
    _from_latents_cases,
    (
        Misconception(
            "multiplied by the scale",
            _decoded_at(lambda z, scale: scale * z),
            "The latents were multiplied by the scale on the way in. On the way out this is undone.",
        ),
        Misconception(
            "scale forgotten",
            _decoded_at(lambda z, scale: z),
            "The decoder knows the latents as the encoder gave them: the scale has to be taken away first.",
        ),
        Misconception(
            "images divided by the scale",
            lambda decode, z, scale: decode(z) / scale,
            "It is the latents that have a scale, not the images; a decoder is not linear.",
        ),
        Misconception(
            "images multiplied by the scale",
            lambda decode, z, scale: decode(z / scale) * scale,
            "The images have their own range already: the scale belongs to the latents alone.",
        ),
        Misconception(
            "divided by the scale, latents and images",
            lambda decode, z, scale: decode(z / scale) / scale,
            "The scale is taken away twice: it belongs to the latents alone.",
        ),
        Misconception(
            "scale squared",
            _decoded_at(lambda z, scale: z / scale**2),
            "The scale was applied once on the way in, and is taken away twice here.",
        ),
        Misconception(
            "root of the scale",
            _decoded_at(lambda z, scale: z / math.sqrt(scale)),
            "The scale belongs to standard deviations, not to variances: it gets no root.",
        ),
        Misconception(
            "drawn once more",
            _decoded_at(lambda z, scale: z / scale + torch.randn_like(z)),
            "Noise is added before decoding. The draw was made on the way in; the decoder gets what the "
            "diffusion has denoised, as it is.",
        ),
        Misconception(
            "drawn once more, on the scale of the diffusion",
            _decoded_at(lambda z, scale: (z + torch.randn_like(z)) / scale),
            "Noise is added to the denoised latents. They are decoded as they are.",
        ),
        Misconception(
            "latents clamped before they are divided",
            _decoded_at(lambda z, scale: z.clamp(-1, 1) / scale),
            "Images lie in [-1, 1], latents do not: they have no bounds, and are not clamped.",
        ),
        Misconception(
            "latents clamped after they are divided",
            _decoded_at(lambda z, scale: (z / scale).clamp(-1, 1)),
            "Images lie in [-1, 1], latents do not, on neither scale: they are not clamped.",
        ),
        Misconception(
            "images clamped",
            _images_changed(lambda x, scale: x.clamp(-1, 1)),
            "The images are clipped. That is for whoever shows them; here they are what the decoder gives.",
        ),
        Misconception(
            "images in [0, 1]",
            _images_changed(lambda x, scale: (x + 1) / 2),
            "The images are moved to [0, 1]. That is for whoever shows them; here they are what the decoder "
            "gives.",
        ),
        Misconception(
            "not decoded",
            lambda decode, z, scale: z / scale,
            "These are the latents on the VAE's own scale: the decoder still has to make an image of them.",
        ),
        Misconception(
            "measured in each batch",
            _decoded_at(lambda z, scale: z / z.std()),
            "The latents are divided by their own standard deviation, which is near 1 whatever the scale is.",
        ),
        Misconception(
            "first sample for all",
            _decoded_at(lambda z, scale: (z[:1] / scale).expand_as(z)),
            "The first sample's latents are decoded for all.",
        ),
    ),
)


# Who looks at which word


def _padding(draws: Draws, batch: int, tokens: int) -> Tensor:
    """A mask (B, M) of texts of different lengths, at least one of them with padding; M >= 2."""
    lengths = [1 + (draws.integer(0, tokens - 2) + place) % tokens for place in range(batch)]
    lengths[0] = min(lengths[0], tokens - 1)
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def _holes(draws: Draws, batch: int, tokens: int) -> Tensor:
    """A mask (B, M) in no order, with one token at least in every row, and one less than all."""
    mask = draws.uniform(batch, tokens) < 0.5
    for row in mask:
        row[draws.integer(0, tokens - 1)] = True
        if row.all():
            row[draws.integer(0, tokens - 1)] = False
    return mask


def _word_weights_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, heads, d, side = draws.integer(2, 3), 4, draws.integer(5, 6), draws.integer(4, 5)
    places, tokens = draws.integer(10, 12), draws.integer(7, 8)

    def case(note, batch, heads, places, tokens, d, mask=None, stretch=1.0, **kind):
        q, k = draws.normal(batch, heads, places, d, **kind), draws.normal(batch, heads, tokens, d, **kind)
        q = q if stretch == 1 else stretch * q
        return Case(note, (q, k, _padding(draws, batch, tokens) if mask is None else mask))

    loud = case("padding with keys of its own, far out", batch, heads, places, tokens, d)
    q, k, mask = loud.arguments
    loud = Case(loud.note, (q, torch.where(mask[:, None, :, None], k, 30 * k), mask))
    return [
        # With axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side, side, side),
        case("texts of different lengths", batch, heads, places, tokens, d),
        case("as many heads as samples", heads, heads, places, tokens, d),
        case("as many places as tokens", batch, heads, tokens, tokens, d),
        case("words left out anywhere", 3, heads, places, tokens, d, mask=_holes(draws, 3, tokens)),
        case("nothing masked", 2, 2, places, tokens, d, mask=torch.ones(2, tokens, dtype=torch.bool)),
        case("one head", batch, 1, places, tokens, d),
        case("a single token", batch, 2, places, 1, d, mask=torch.ones(batch, 1, dtype=torch.bool)),
        case("large scores", batch, heads, places, tokens, d, stretch=300.0),
        loud,
        case("float32", batch, heads, places, tokens, d, dtype=torch.float32),
        case("with gradient", batch, heads, places, tokens, d, gradient=True),
    ]


def _softmax(scores: Tensor, mask: Tensor, axis: int = -1) -> Tensor:
    """The softmax of any scores (B, heads, N, M), right or wrong, over the tokens of the mask."""
    return scores.masked_fill(~mask[:, None, None], -math.inf).softmax(axis)


def _with_factor(factor: Callable[[Tensor, Tensor], float]) -> Callable:
    """Weights whose scores are multiplied by any function of q and k."""
    return lambda q, k, mask: _softmax(q @ k.mT * factor(q, k), mask)


def _changed_weights(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_result(latent_diffusion.word_weights, change)


WORD_WEIGHTS = Exercise(
    "latent_diffusion.word_weights",
    '"Who looks at which word", equation (7.5)',
    latent_diffusion.word_weights,
    _word_weights_cases,
    (
        Misconception(
            "softmax over the places",
            lambda q, k, mask: _softmax(scores(q, k), mask, axis=-2),
            "Here the places share out each word. It is the words that each place shares out its attention "
            "over: the weights of one place add up to 1.",
        ),
        Misconception(
            "softmax over the heads",
            lambda q, k, mask: _softmax(scores(q, k), mask, axis=1),
            "Each head has weights of its own, which add up to 1 over the tokens.",
        ),
        Misconception(
            "softmax over places and tokens",
            lambda q, k, mask: (
                scores(q, k)
                .masked_fill(~mask[:, None, None], -math.inf)
                .flatten(2)
                .softmax(-1)
                .unflatten(2, (q.shape[2], -1))
            ),
            "All places together have a weight of 1 here; each of them has it.",
        ),
        Misconception(
            "no softmax",
            lambda q, k, mask: scores(q, k) * mask[:, None, None],
            "These are scores, of either sign; weights are positive and add up to 1.",
        ),
        Misconception(
            "exponentials not normalised",
            lambda q, k, mask: scores(q, k).exp().masked_fill(~mask[:, None, None], 0.0),
            "The exponentials are not divided by their sum over the tokens.",
        ),
        Misconception(
            "sigmoid for softmax",
            lambda q, k, mask: scores(q, k).sigmoid() * mask[:, None, None],
            "A sigmoid asks for each word by itself; the weights of one place have to add up to 1.",
        ),
        Misconception(
            "logarithms",
            _changed_weights(torch.log),
            "These are the logarithms of the weights.",
        ),
        Misconception(
            "best word only",
            lambda q, k, mask: torch.zeros_like(q @ k.mT).scatter(
                -1, latent_diffusion.word_weights(q, k, mask).argmax(-1, keepdim=True), 1.0
            ),
            "Each place looks at its best word alone. A softmax gives every word its share, and has a "
            "gradient.",
        ),
        Misconception(
            "scores not scaled",
            _with_factor(lambda q, k: 1),
            "The scores are not divided by sqrt(d): the longer the vectors, the harder the softmax.",
        ),
        Misconception(
            "divided by d",
            _with_factor(lambda q, k: 1 / q.shape[-1]),
            "A sum of d products has the variance d: divide by its root, the standard deviation.",
        ),
        Misconception(
            "multiplied by sqrt(d)",
            _with_factor(lambda q, k: math.sqrt(q.shape[-1])),
            "The scores are to become smaller, not larger: divide by the root.",
        ),
        Misconception(
            "root of the width of all heads",
            _with_factor(lambda q, k: 1 / math.sqrt(q.shape[1] * q.shape[-1])),
            "A score is an inner product within one head: count the d features of a head, not those of all "
            "heads together.",
        ),
        Misconception(
            "root of the number of tokens",
            _with_factor(lambda q, k: 1 / math.sqrt(k.shape[-2])),
            "A score is a sum over the features of a head: their number counts, not that of the tokens.",
        ),
        Misconception(
            "cosines for scores",
            lambda q, k, mask: _softmax(normalize(q, dim=-1) @ normalize(k, dim=-1).mT, mask),
            "These are cosines. Queries and keys keep their lengths: a loud word may draw more attention.",
        ),
        Misconception(
            "mask ignored",
            lambda q, k, mask: scores(q, k).softmax(-1),
            "Places look at padding, too: the mask is not used.",
        ),
        Misconception(
            "mask inverted",
            lambda q, k, mask: _softmax(scores(q, k), ~mask),
            "True stands for the tokens that are there; these are the ones to look at.",
        ),
        Misconception(
            "masked scores set to 0",
            lambda q, k, mask: (scores(q, k) * mask[:, None, None]).softmax(-1),
            "exp(0) is 1, not 0: padding keeps a weight. Think of the score whose exponential is 0.",
        ),
        Misconception(
            "masked after the softmax",
            lambda q, k, mask: scores(q, k).softmax(-1) * mask[:, None, None],
            "What the padding had is missing from the sum: mask the scores, before the softmax.",
        ),
        Misconception(
            "mask added to the scores",
            lambda q, k, mask: (scores(q, k) + mask[:, None, None]).softmax(-1),
            "This gives the tokens that are there 1 more, and takes nothing from the others.",
        ),
        Misconception(
            "plus infinity",
            lambda q, k, mask: scores(q, k).masked_fill(~mask[:, None, None], math.inf).softmax(-1),
            "exp(-infinity) is 0; plus infinity gives NaN.",
        ),
        Misconception(
            "first text's mask for all",
            lambda q, k, mask: latent_diffusion.word_weights(q, k, mask[:1].expand_as(mask)),
            "The first text's mask is used for all. Each text has a length of its own.",
        ),
        Misconception(
            "words masked that one text lacks",
            lambda q, k, mask: _softmax(scores(q, k), mask.all(0, keepdim=True).expand_as(mask)),
            "A token is masked for all texts as soon as one of them lacks it. Each text has its own mask.",
        ),
        Misconception(
            "mask along the heads",
            lambda q, k, mask: scores(q, k).masked_fill(~mask[:, None], -math.inf).softmax(-1),
            "A mask of shape (B, 1, M) meets the heads, not the batch: it needs two axes of length 1, for "
            "heads and places.",
        ),
        Misconception(
            "mask along the places",
            lambda q, k, mask: scores(q, k).masked_fill(~mask[:, None, :, None], -math.inf).softmax(-1),
            "The mask is about tokens, the last axis of the scores, not about the places.",
        ),
        Misconception(
            "queries and keys swapped",
            lambda q, k, mask: _softmax(scores(k, q), mask),
            "Rows of the scores are places, columns are tokens: queries times keys transposed.",
        ),
        Misconception(
            "tokens before places",
            _changed_weights(lambda weights: weights.mT),
            "The weights are transposed: (B, heads, N, M), the tokens last.",
        ),
        Misconception(
            "averaged over the heads",
            _changed_weights(lambda weights: weights.mean(1, keepdim=True).expand_as(weights)),
            "The heads are averaged. Each of them looks by itself.",
        ),
        Misconception(
            "first head's weights for all",
            _changed_weights(lambda weights: weights[:, :1].expand_as(weights)),
            "The first head decides for all. Each of them looks by itself.",
        ),
    ),
)


# Cross-attention


def _cross_attention_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, places, tokens = draws.integer(2, 3), draws.integer(10, 12), draws.integer(6, 7)
    width, text_width = draws.integer(9, 10), draws.integer(13, 14)

    def case(note, batch, places, tokens, width, text_width, heads, d, mask=None, **kind):
        x, context = (
            draws.normal(batch, places, width, **kind),
            draws.normal(batch, tokens, text_width, **kind),
        )
        layers = [
            CallableArgument(
                "linear",
                (
                    (draws.normal(heads * d, columns) / math.sqrt(columns)).to(x.dtype),
                    draws.normal(heads * d, dtype=x.dtype),
                ),
            )
            for columns in (width, text_width, text_width)
        ]
        mask = _padding(draws, batch, tokens) if mask is None else mask
        return Case(note, (x, context, *layers, heads, mask))

    everything = torch.ones(few, tokens, dtype=torch.bool)
    return [
        # With axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", 4, 4, 4, 4, 4, 2, 2),
        case("features of places, tokens and heads of one length", few, 8, 8, 12, 12, 3, 4),
        case("texts of different lengths", few, places, tokens, width, text_width, 2, 5),
        case("as many heads as features in each", few, places, tokens, width, text_width, 4, 4),
        case("one head", few, places, tokens, width, text_width, 1, 6),
        case("one feature per head", few, places, tokens, width, text_width, 5, 1),
        case("words left out anywhere", 3, places, tokens, width, text_width, 2, 3, _holes(draws, 3, tokens)),
        case("nothing masked", few, places, tokens, width, text_width, 3, 4, everything),
        case("a single token", few, places, 1, width, text_width, 2, 4, everything[:, :1]),
        case("a batch of one", 1, places, tokens, text_width, width, 2, 3),
        case("float32", few, places, tokens, width, text_width, 2, 4, dtype=torch.float32),
        case("x and context with gradient", few, places, tokens, width, text_width, 3, 2, gradient=True),
    ]


def _attention_of(
    split: Callable[[Tensor, int], Tensor] | None = None,
    mix: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    merge: Callable[[Tensor], Tensor] | None = None,
) -> Callable:
    """Cross-attention with any way to split heads, to mix values (q, k, v, mask), and to merge heads."""
    split = split or latent_diffusion.split_heads
    mix = mix or (lambda q, k, v, mask: latent_diffusion.word_weights(q, k, mask) @ v)
    merge = merge or (lambda mixed: mixed.transpose(1, 2).flatten(2))

    def wrong(x, context, to_q, to_k, to_v, heads, mask):
        q, k, v = (split(given, heads) for given in (to_q(x), to_k(context), to_v(context)))
        return merge(mix(q, k, v, mask))

    return wrong


def _projected(
    queries: Callable[..., Tensor] | None = None,
    keys: Callable[..., Tensor] | None = None,
    values: Callable[..., Tensor] | None = None,
) -> Callable:
    """Cross-attention of any queries, keys and values: functions of (x, context, to_q, to_k, to_v)."""
    queries = queries or (lambda x, c, to_q, to_k, to_v: to_q(x))
    keys = keys or (lambda x, c, to_q, to_k, to_v: to_k(c))
    values = values or (lambda x, c, to_q, to_k, to_v: to_v(c))

    def wrong(x, context, to_q, to_k, to_v, heads, mask):
        given = x, context, to_q, to_k, to_v
        q, k, v = (latent_diffusion.split_heads(make(*given), heads) for make in (queries, keys, values))
        return (latent_diffusion.word_weights(q, k, mask) @ v).transpose(1, 2).flatten(2)

    return wrong


def _mixed(weights: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Cross-attention with any weights, a function of (q, k, mask)."""
    return _attention_of(mix=lambda q, k, v, mask: weights(q, k, mask) @ v)


def _stretched(factor: Callable[..., float]) -> Callable:
    """Cross-attention whose scores are multiplied by any function of the sizes, not by 1 / sqrt(d)."""

    def wrong(x, context, to_q, to_k, to_v, heads, mask):
        d = to_q(x).shape[2] // heads
        stretch = factor(d=d, heads=heads, width=x.shape[2], text_width=context.shape[2]) * math.sqrt(d)
        return latent_diffusion.cross_attention(
            x, context, lambda x: stretch * to_q(x), to_k, to_v, heads, mask
        )

    return wrong


CROSS_ATTENTION = Exercise(
    "latent_diffusion.cross_attention",
    '"Queries from the image, keys and values from the words", equation (7.6)',
    latent_diffusion.cross_attention,
    _cross_attention_cases,
    (
        Misconception(
            "queries from the words",
            lambda x, context, to_q, to_k, to_v, heads, mask: _attention_of(
                mix=lambda q, k, v, mask: scores(q, k).softmax(-1) @ v
            )(context, x, to_q, to_k, to_v, heads, mask),
            "Here the words ask and the image answers. It is each place of the image that asks: the queries "
            "come from x, the keys and values from the context.",
        ),
        Misconception(
            "queries and values from the words",
            _projected(queries=lambda x, c, to_q, to_k, to_v: to_q(c)),
            "The words look at the words: x is not used. The queries come from the image.",
        ),
        Misconception(
            "keys from the image",
            _projected(keys=lambda x, c, to_q, to_k, to_v: to_k(x)),
            "The keys come from the image here. It is the words that are looked at.",
        ),
        Misconception(
            "values from the image",
            _projected(values=lambda x, c, to_q, to_k, to_v: to_v(x)),
            "The values come from the image here. What is mixed is what the words have to say.",
        ),
        Misconception(
            "self-attention of the image",
            lambda x, context, to_q, to_k, to_v, heads, mask: _attention_of(
                mix=lambda q, k, v, mask: scores(q, k).softmax(-1) @ v
            )(x, x, to_q, to_k, to_v, heads, mask),
            "The image looks at itself: the context is not used. Keys and values come from the words.",
        ),
        Misconception(
            "keys and values swapped",
            with_arguments(
                latent_diffusion.cross_attention, to_k=lambda to_v, **_: to_v, to_v=lambda to_k, **_: to_k
            ),
            "to_k and to_v have changed places: keys are compared with the queries, values are mixed.",
        ),
        Misconception(
            "values are the keys",
            with_arguments(latent_diffusion.cross_attention, to_v=lambda to_k, **_: to_k),
            "The keys are mixed, and to_v is not used: what a word is found by is not what it says.",
        ),
        Misconception(
            "keys are the values",
            with_arguments(latent_diffusion.cross_attention, to_k=lambda to_v, **_: to_v),
            "The queries are compared with the values, and to_k is not used.",
        ),
        Misconception(
            "queries and keys with each other's layer",
            _projected(
                queries=lambda x, c, to_q, to_k, to_v: to_k(x), keys=lambda x, c, to_q, to_k, to_v: to_q(c)
            ),
            "to_q and to_k have changed places: to_q belongs to the image, to_k to the words.",
        ),
        Misconception(
            "words not projected to values",
            _projected(values=lambda x, c, to_q, to_k, to_v: c),
            "The words' features are mixed as they are: to_v is not used.",
        ),
        Misconception(
            "image not projected to queries",
            _projected(queries=lambda x, c, to_q, to_k, to_v: x),
            "The image's features ask as they are: to_q is not used.",
        ),
        Misconception(
            "scores not scaled",
            _stretched(lambda **_: 1),
            "The scores are not divided by the root of the features of a head.",
        ),
        Misconception(
            "divided by d",
            _stretched(lambda d, **_: 1 / d),
            "The scores are divided by d: their standard deviation is sqrt(d).",
        ),
        Misconception(
            "root of the width of all heads",
            _stretched(lambda d, heads, **_: 1 / math.sqrt(d * heads)),
            "The scores are divided by the root of the width of all heads together. A score is an inner "
            "product within one head.",
        ),
        Misconception(
            "root of the image's features",
            _stretched(lambda width, **_: 1 / math.sqrt(width)),
            "The scores are divided by the root of the features of a place. What counts are the features of "
            "a query, in one head.",
        ),
        Misconception(
            "root of the words' features",
            _stretched(lambda text_width, **_: 1 / math.sqrt(text_width)),
            "The scores are divided by the root of the features of a token. What counts are the features of "
            "a key, in one head.",
        ),
        Misconception(
            "one head",
            with_arguments(latent_diffusion.cross_attention, heads=lambda **_: 1),
            "All features are taken as one head. Each head asks with its own part of them.",
        ),
        Misconception(
            "heads interleaved",
            _attention_of(
                split=lambda h, heads: h.unflatten(2, (-1, heads)).permute(0, 3, 1, 2),
                merge=lambda mixed: mixed.permute(0, 2, 3, 1).flatten(2),
            ),
            "A head takes every h-th feature here. Head i has the i-th block of d features.",
        ),
        Misconception(
            "places cut into heads",
            _attention_of(split=lambda h, heads: h.reshape(len(h), heads, h.shape[1], -1)),
            "A reshape to (B, heads, N, d) puts places, not features, into the heads: cut the features into "
            "(heads, d) first, then exchange the axes.",
        ),
        Misconception(
            "heads not brought back",
            _attention_of(merge=lambda mixed: mixed.reshape(len(mixed), mixed.shape[2], -1)),
            "Before the heads are put side by side, their axis has to go behind that of the places: a "
            "reshape alone mixes places up.",
        ),
        Misconception(
            "features of the heads interleaved at the end",
            _attention_of(merge=lambda mixed: mixed.permute(0, 2, 3, 1).flatten(2)),
            "The heads are put side by side, each with all its d features, not one feature of each in turn.",
        ),
        Misconception(
            "heads averaged",
            _attention_of(merge=lambda mixed: mixed.mean(1)),
            "The heads are averaged. They stand side by side, heads * d features in all.",
        ),
        Misconception(
            "heads added up",
            _attention_of(merge=lambda mixed: mixed.sum(1)),
            "The heads are added up. They stand side by side, heads * d features in all.",
        ),
        Misconception(
            "softmax over the places",
            _mixed(lambda q, k, mask: _softmax(scores(q, k), mask, axis=-2)),
            "The places share out each word here. The weights of one place add up to 1 over the tokens.",
        ),
        Misconception(
            "softmax over the heads",
            _mixed(lambda q, k, mask: _softmax(scores(q, k), mask, axis=1)),
            "The heads share out each word here. The weights of one head add up to 1 over the tokens.",
        ),
        Misconception(
            "no softmax",
            _mixed(lambda q, k, mask: scores(q, k) * mask[:, None, None]),
            "The scores are used as weights as they are: the softmax is missing.",
        ),
        Misconception(
            "all words alike",
            _mixed(lambda q, k, mask: _softmax(torch.zeros_like(q @ k.mT), mask)),
            "Every place gets the mean of the words: queries and keys do not matter here.",
        ),
        Misconception(
            "mask ignored",
            _mixed(lambda q, k, mask: scores(q, k).softmax(-1)),
            "Padding is looked at, too: the mask is not used.",
        ),
        Misconception(
            "mask inverted",
            _mixed(lambda q, k, mask: _softmax(scores(q, k), ~mask)),
            "True stands for the tokens that are there; these are the ones to look at.",
        ),
        Misconception(
            "masked scores set to 0",
            _mixed(lambda q, k, mask: (scores(q, k) * mask[:, None, None]).softmax(-1)),
            "exp(0) is 1, not 0: padding keeps a weight.",
        ),
        Misconception(
            "masked after the softmax",
            _mixed(lambda q, k, mask: scores(q, k).softmax(-1) * mask[:, None, None]),
            "What the padding had is missing from the sum: mask the scores, before the softmax.",
        ),
        Misconception(
            "masked words set to 0",
            with_arguments(
                latent_diffusion.cross_attention,
                context=lambda context, mask, **_: context * mask[:, :, None],
                mask=lambda mask, **_: torch.ones_like(mask),
            ),
            "A word of zeros is still a word: its score is 0, and exp(0) is 1. Mask the scores.",
        ),
        Misconception(
            "first text's mask for all",
            with_arguments(latent_diffusion.cross_attention, mask=lambda mask, **_: mask[:1].expand_as(mask)),
            "The first text's mask is used for all. Each text has a length of its own.",
        ),
        Misconception(
            "first text for all",
            with_arguments(
                latent_diffusion.cross_attention,
                context=lambda context, **_: context[:1].expand_as(context),
                mask=lambda mask, **_: mask[:1].expand_as(mask),
            ),
            "All images look at the first text. Each has its own.",
        ),
        Misconception(
            "image added",
            lambda x, *others: x + latent_diffusion.cross_attention(x, *others),
            "What the words say is asked for; adding it to the image's features is the block's business.",
        ),
        Misconception(
            "words cut from the graph",
            with_arguments(latent_diffusion.cross_attention, context=lambda context, **_: context.detach()),
            "The text encoder learns through the context: its gradient must not be cut.",
        ),
    ),
)


# A training step with captions


def _captioned_step_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, length = draws.integer(3, 4), draws.integer(6, 8), draws.integer(5, 6)

    def case(note, batch, shape, length, drop, dtype=torch.float64):
        def weights(*size):
            return draws.normal(*size, dtype=dtype, gradient=True)

        elements, width, hidden, num_words = math.prod(shape), 4, 7, 11
        table, denoiser = (
            weights(num_words, width),
            (weights(elements, hidden), weights(width, hidden), weights(hidden), weights(hidden, elements)),
        )
        trained = (table, *denoiser)
        old = tuple(draws.normal(*weight.shape, dtype=dtype) for weight in trained)
        return Case(
            note,
            (
                OptimizerArgument(trained, old, draws.uniform(1, low=0.05, high=0.2).item()),
                CallableArgument("velocity_loss", ((1 - cosine_betas(100)).cumprod(0).to(dtype),)),
                CallableArgument("text_denoiser", denoiser),
                CallableArgument("word_table", (table,)),
                draws.normal(batch, *shape, dtype=dtype),
                1 + draws.permutation(batch * length).view(batch, length) % (num_words - 1),
                torch.arange(length) % 2,  # begin, end and padding
                (draws.permutation(batch).to(dtype) + 0.5) / batch,  # some below drop, some above
                drop,
                draws.steps(batch, 100),
                draws.normal(batch, *shape, dtype=dtype),
            ),
        )

    return [
        case("latents", few, (2, 3, 2), length, 0.4),
        case("as many captions as tokens in each", length, (2, 2, 2), length, 0.5),
        case("a larger batch", many, (4, 2, 2), length, 0.3),
        case("no caption replaced", few, (3, 2, 2), length, 0.0),
        case("every caption replaced", few, (3, 2, 2), length, 1.0),
        case("a single sample", 1, (2, 2, 3), length, 0.1),
        case("float32", few, (2, 3, 2), length, 0.5, dtype=torch.float32),
    ]


def _with_told(told: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable:
    """The step with other tokens for the text encoder, a function of tokens, empty, u and drop."""

    def wrong(optimizer, diffusion_loss, denoiser, text_encoder, z_0, tokens, empty, u, drop, t, noise):
        tokens = told(tokens, empty, u, drop)
        return latent_diffusion.captioned_training_step(
            optimizer, diffusion_loss, denoiser, text_encoder, z_0, tokens, empty, u, 0.0, t, noise
        )

    return wrong


def _with_condition(change: Callable[[Tensor], Tensor]) -> Callable:
    """The step with the condition changed."""
    return with_arguments(
        latent_diffusion.captioned_training_step,
        text_encoder=lambda text_encoder, **_: lambda tokens: change(text_encoder(tokens)),
    )


def _stepping(step: Callable) -> Callable:
    """The step with another use of the optimizer, a function of it and of a callable that gives the loss."""

    def wrong(optimizer, diffusion_loss, denoiser, text_encoder, z_0, tokens, empty, u, drop, t, noise):
        def loss():
            cond = text_encoder(torch.where((u < drop)[:, None], empty, tokens))
            return diffusion_loss(lambda z_t, t: denoiser(z_t, t, cond), z_0, t, noise)

        return step(optimizer, loss)

    return wrong


CAPTIONED_TRAINING_STEP = Exercise(
    "latent_diffusion.captioned_training_step",
    '"Learning it"',
    latent_diffusion.captioned_training_step,
    _captioned_step_cases,
    (
        Misconception(
            "captions never dropped",
            _with_told(lambda tokens, empty, u, drop: tokens),
            "No caption is replaced by the empty one: the model will have no second answer for guidance.",
        ),
        Misconception(
            "all captions dropped",
            _with_told(lambda tokens, empty, u, drop: empty.expand_as(tokens)),
            "Every caption is replaced: the model never hears a word.",
        ),
        Misconception(
            "kept where they are to be dropped",
            _with_told(lambda tokens, empty, u, drop: torch.where((u < drop)[:, None], tokens, empty)),
            "The captions with u below drop are those that are replaced, not those that are kept.",
        ),
        Misconception(
            "one draw for the whole batch",
            _with_told(lambda tokens, empty, u, drop: torch.where(u[0] < drop, empty, tokens)),
            "The first caption's draw decides for all. Each caption has its own.",
        ),
        Misconception(
            "zeros for the empty caption",
            _with_told(
                lambda tokens, empty, u, drop: torch.where(
                    (u < drop)[:, None], torch.zeros_like(tokens), tokens
                )
            ),
            "Dropped captions become rows of zeros. The empty caption is a row of tokens, and it is given.",
        ),
        Misconception(
            "first token dropped only",
            _with_told(
                lambda tokens, empty, u, drop: torch.where(
                    (u < drop)[:, None] & (torch.arange(tokens.shape[1]) == 0), empty, tokens
                )
            ),
            "Only the first token is replaced. A caption is dropped as a whole.",
        ),
        Misconception(
            "condition of zeros for the empty caption",
            lambda optimizer, diffusion_loss, denoiser, text_encoder, z_0, tokens, empty, u, drop, t, noise: (
                latent_diffusion.captioned_training_step(
                    optimizer,
                    diffusion_loss,
                    lambda z_t, t, cond: denoiser(z_t, t, cond * (u >= drop)[:, None, None]),
                    text_encoder,
                    z_0,
                    tokens,
                    empty,
                    u,
                    0.0,
                    t,
                    noise,
                )
            ),
            "Dropped captions become features of zeros. The empty caption goes through the text encoder, as "
            "it will in sampling.",
        ),
        Misconception(
            "text encoder not trained",
            _with_condition(lambda cond: cond.detach()),
            "The text encoder has not moved as it should: its features are cut from the graph. Denoiser and "
            "text encoder learn together.",
        ),
        Misconception(
            "first caption for all",
            _with_condition(lambda cond: cond[:1].expand_as(cond)),
            "All samples are told the first caption. Each has its own.",
        ),
        Misconception(
            "clean latents for the denoiser",
            lambda optimizer, diffusion_loss, denoiser, text_encoder, z_0, *others: (
                latent_diffusion.captioned_training_step(
                    optimizer,
                    diffusion_loss,
                    lambda z_t, t, cond: denoiser(z_0, t, cond),
                    text_encoder,
                    z_0,
                    *others,
                )
            ),
            "The denoiser is shown the clean latents. It learns from noisy ones, which the diffusion's loss "
            "makes and hands to it.",
        ),
        Misconception(
            "latents and noise swapped",
            with_arguments(
                latent_diffusion.captioned_training_step,
                z_0=lambda noise, **_: noise,
                noise=lambda z_0, **_: z_0,
            ),
            "The diffusion's loss takes the denoiser, the clean latents, the steps, then the noise.",
        ),
        Misconception(
            "noise of its own",
            with_arguments(
                latent_diffusion.captioned_training_step, noise=lambda noise, **_: torch.randn_like(noise)
            ),
            "The noise is drawn anew. The batch is given: latents, tokens, steps and noise.",
        ),
        Misconception(
            "one t for the whole batch",
            with_arguments(latent_diffusion.captioned_training_step, t=lambda t, **_: t[:1].expand_as(t)),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        *step_mistakes(_stepping),
    ),
)


# Where each word is looked at from


def _word_maps_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, heads, tokens = draws.integer(2, 3), draws.integer(4, 5), draws.integer(6, 7)
    height, width = draws.integer(2, 3), draws.integer(4, 5)

    def case(note, batch, heads, height, width, tokens, padding=0, **kind):
        scores = draws.normal(batch, heads, height * width, tokens)
        weights = torch.where(torch.arange(tokens) < tokens - padding, scores, -math.inf).softmax(-1)
        return Case(note, (cast(weights, **kind), height, width))

    return [
        case("as many samples, heads, places and tokens", 4, 4, 2, 2, 4),
        case("wide maps", few, heads, height, width, tokens),
        case("high maps", few, heads, width, height, tokens, padding=2),
        case("square maps", few, heads, 3, 3, tokens),
        case("as many places as tokens", few, heads, height, width, height * width),
        case("one head", few, 1, height, width, tokens),
        case("a single sample", 1, heads, height, width, tokens),
        case("a single token", few, heads, height, width, 1),
        case("a single row", few, heads, 1, width, tokens),
        case("float32", few, heads, height, width, tokens, dtype=torch.float32),
        case("weights with gradient", few, heads, height, width, tokens, gradient=True),
    ]


def _maps_of(heads: Callable[[Tensor], Tensor]) -> Callable:
    """Maps in which the heads (B, heads, N, M) become one (B, N, M) in any way."""
    return lambda weights, height, width: heads(weights).mT.unflatten(2, (height, width))


def _changed_maps(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_result(latent_diffusion.word_maps, change)


WORD_MAPS = Exercise(
    "latent_diffusion.word_maps",
    '"Where each word is looked at from", equation (7.12)',
    latent_diffusion.word_maps,
    _word_maps_cases,
    (
        Misconception(
            "sum over the heads",
            _maps_of(lambda weights: weights.sum(1)),
            "The heads are added up, so that the maps of all words add up to the number of heads, not to 1.",
        ),
        Misconception(
            "largest head",
            _maps_of(lambda weights: weights.amax(1)),
            "At each place the head that looks hardest decides. Asked for is the mean of all.",
        ),
        Misconception(
            "first head only",
            _maps_of(lambda weights: weights[:, 0]),
            "This is what the first head looks at. Asked for is the mean of all.",
        ),
        Misconception(
            "last head only",
            _maps_of(lambda weights: weights[:, -1]),
            "This is what the last head looks at. Asked for is the mean of all.",
        ),
        Misconception(
            "median over the heads",
            _maps_of(lambda weights: weights.quantile(0.5, dim=1)),
            "This is the heads' median. Asked for is their mean.",
        ),
        Misconception(
            "geometric mean of the heads",
            _maps_of(lambda weights: weights.log().mean(1).exp()),
            "The heads are multiplied and a root is taken. Asked for is the ordinary mean.",
        ),
        Misconception(
            "heads kept",
            lambda weights, height, width: weights.mT.unflatten(3, (height, width)),
            "The heads' axis is still there: take the mean over it.",
        ),
        Misconception(
            "mean over the samples",
            _changed_maps(lambda maps: maps.mean(0, keepdim=True).expand_as(maps)),
            "The samples are averaged. Each picture has maps of its own.",
        ),
        Misconception(
            "first sample's maps for all",
            _changed_maps(lambda maps: maps[:1].expand_as(maps)),
            "The first sample's maps are returned for all.",
        ),
        Misconception(
            "places and tokens not exchanged",
            lambda weights, height, width: weights.mean(1).reshape(len(weights), -1, height, width),
            "The numbers of different words are mixed up in one map: bring the token axis before that of the "
            "places, before the places become rows and columns.",
        ),
        Misconception(
            "tokens last",
            lambda weights, height, width: weights.mean(1).unflatten(1, (height, width)),
            "The tokens are the last axis here; a stack of maps has them before height and width.",
        ),
        Misconception(
            "column by column",
            lambda weights, height, width: weights.mean(1).mT.unflatten(2, (width, height)).mT,
            "The places are numbered row by row; here the columns are filled first.",
        ),
        Misconception(
            "height and width swapped",
            lambda weights, height, width: latent_diffusion.word_maps(weights, width, height),
            "Height and width have changed places.",
        ),
        Misconception(
            "upside down",
            _changed_maps(lambda maps: maps.flip(2)),
            "The first row is the top one: the maps are upside down.",
        ),
        Misconception(
            "mirrored",
            _changed_maps(lambda maps: maps.flip(3)),
            "Left and right have changed places.",
        ),
        Misconception(
            "each map divided by its sum",
            _changed_maps(lambda maps: maps / maps.sum((2, 3), keepdim=True)),
            "Each map is divided by its sum: a word that nobody looks at would seem as important as any "
            "other. Leave the weights as they are.",
        ),
        Misconception(
            "each map divided by its largest value",
            _changed_maps(lambda maps: maps / maps.amax((2, 3), keepdim=True)),
            "Each map is stretched to a largest value of 1: words can then not be compared. Leave the "
            "weights as they are.",
        ),
        Misconception(
            "softmax once more",
            _changed_maps(lambda maps: maps.softmax(1)),
            "The weights have been through a softmax already; a second one makes them all alike.",
        ),
        Misconception(
            "strongest word only",
            _changed_maps(lambda maps: maps * (maps == maps.amax(1, keepdim=True))),
            "Only the strongest word is kept at each place; every word has its share.",
        ),
        Misconception(
            "compared with equal shares",
            _changed_maps(lambda maps: maps * maps.shape[1]),
            "The weights are multiplied by the number of tokens. Asked for are the weights themselves.",
        ),
    ),
)


# Image to image


def _image_to_image_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, side = draws.integer(2, 3), draws.integer(4, 5)

    def case(note, batch, shape, num_steps, strength, **kind):
        z_0 = draws.normal(batch, *shape, **kind)
        step = draws.network("noisy_denoiser", math.prod(shape), math.prod(shape), dtype=z_0.dtype)
        alpha_bar = (1 - cosine_betas(1000)).cumprod(0)[:: 1000 // num_steps][:num_steps].to(z_0.dtype)
        return Case(note, (step, z_0, draws.normal(batch, *shape, dtype=z_0.dtype), alpha_bar, strength))

    return [
        case("half of the steps", few, (4, 2, 3), 8, 0.5),
        case("all axes of one length", side, (side, side, side), 5, 0.6),
        case("a share that is rounded up", few, (4, 3, 2), 7, 0.4),  # 2.8 steps
        case("a share that is rounded down", few, (4, 3, 2), 9, 0.25),  # 2.25 steps
        case("all steps", few, (3, 2, 2), 6, 1.0),
        case("a single step", few, (3, 2, 2), 10, 0.1),
        case("no step", few, (3, 2, 2), 5, 0.0),
        case("so little that it is no step", few, (3, 2, 2), 5, 0.08),  # 0.4 of one
        case("a batch of one", 1, (4, 2, 2), 6, 0.7),
        case("float32", few, (4, 2, 2), 5, 0.4, dtype=torch.float32),
        case("with gradient", few, (2, 2, 2), 4, 0.75, gradient=True),
    ]


def _from_noised(
    taken: Callable[[float, int], int] = lambda strength, count: round(strength * count),
    noised: Callable[[Tensor, Tensor, Tensor], Tensor] = q_sample,
    level: Callable[[int, int], int] = lambda taken, count: taken - 1,
    order: Callable[[int, int], list[int]] = lambda taken, count: list(reversed(range(taken))),
    told: Callable[[int], int] = lambda index: index,
    after: Callable[[Tensor, Tensor], Tensor] = lambda z_t, start: z_t,
    before: Callable[[Tensor, Tensor], Tensor] = lambda z_t, start: z_t,
) -> Callable:
    """image_to_image with something changed.

    taken: how many steps, of strength and S; noised: the start, of (z_0, alpha_bar, noise); level: whose
    noise it has; order: of the steps; told: the number that a step is told; after: what is done to its
    result; before: to what it is given.
    """

    def wrong(step, z_0, noise, alpha_bar, strength):
        count = taken(strength, len(alpha_bar))
        if count <= 0:
            return z_0
        kept = alpha_bar[min(level(count, len(alpha_bar)), len(alpha_bar) - 1)]
        z_t = start = noised(z_0, kept, noise)
        for index in order(count, len(alpha_bar)):
            z_t = after(step(before(z_t, start), torch.full((len(z_0),), told(index))), start)
        return z_t

    return wrong


IMAGE_TO_IMAGE = Exercise(
    "latent_diffusion.image_to_image",
    '"From a picture to a picture", equation (7.13)',
    latent_diffusion.image_to_image,
    _image_to_image_cases,
    (
        Misconception(
            "all steps taken",
            _from_noised(order=lambda taken, count: list(reversed(range(count)))),
            "All steps are taken, whatever the strength. They begin where the noise stands that was added.",
        ),
        Misconception(
            "strength the other way round",
            _from_noised(taken=lambda strength, count: round((1 - strength) * count)),
            "Strength 1 takes all steps, strength 0 none; here it is the other way round.",
        ),
        Misconception(
            "one step too noisy",
            _from_noised(level=lambda taken, count: taken),
            "The noise is that of the step behind the first one that is taken: code counts steps from 0.",
        ),
        Misconception(
            "noise of the last step of all",
            _from_noised(level=lambda taken, count: count - 1),
            "The picture is made as noisy as at the start of sampling. It is to be as noisy as the first "
            "step that is taken expects.",
        ),
        Misconception(
            "one step too many",
            _from_noised(order=lambda taken, count: list(reversed(range(min(taken + 1, count))))),
            "One step too many is taken: of n steps, the first has the number n - 1.",
        ),
        Misconception(
            "last step left out",
            _from_noised(order=lambda taken, count: list(range(taken - 1, 0, -1))),
            "The step of t = 0, the last one, is missing: a range does not contain its end.",
        ),
        Misconception(
            "forwards",
            _from_noised(order=lambda taken, count: list(range(taken))),
            "The steps are taken from 0 upwards. Denoising begins with the noisiest one.",
        ),
        Misconception(
            "t counted from 1",
            _from_noised(told=lambda index: index + 1),
            "The steps are told the papers' t. Code counts from 0.",
        ),
        Misconception(
            "cut off, not rounded",
            _from_noised(taken=lambda strength, count: int(strength * count)),
            "The number of steps is cut off behind the point: round it.",
        ),
        Misconception(
            "rounded up",
            _from_noised(taken=lambda strength, count: math.ceil(strength * count - 1e-9)),
            "The number of steps is rounded up, always: round to the nearest.",
        ),
        Misconception(
            "at least one step",
            _from_noised(taken=lambda strength, count: max(round(strength * count), 1)),
            "At strength 0 no step is taken, and the latents come back as they are.",
        ),
        Misconception(
            "no noise added",
            _from_noised(noised=lambda z_0, alpha_bar, noise: z_0),
            "The clean latents are denoised. The first step expects noisy ones.",
        ),
        Misconception(
            "fainter, but no noise",
            _from_noised(noised=lambda z_0, alpha_bar, noise: alpha_bar.sqrt() * z_0),
            "The latents are made fainter, but no noise is added to them.",
        ),
        Misconception(
            "pure noise",
            _from_noised(noised=lambda z_0, alpha_bar, noise: noise),
            "Sampling begins with pure noise here: nothing of the picture is left.",
        ),
        Misconception(
            "roots forgotten",
            _from_noised(noised=lambda z_0, alpha_bar, noise: alpha_bar * z_0 + (1 - alpha_bar) * noise),
            "alpha_bar and 1 - alpha_bar are variances; latents and noise are multiplied by their roots.",
        ),
        Misconception(
            "latents and noise swapped",
            _from_noised(noised=lambda z_0, alpha_bar, noise: q_sample(noise, alpha_bar, z_0)),
            "alpha_bar is what is left of the picture; here it is the noise that has it.",
        ),
        Misconception(
            "noise of its own",
            _from_noised(
                noised=lambda z_0, alpha_bar, noise: q_sample(z_0, alpha_bar, torch.randn_like(z_0))
            ),
            "The noise is drawn anew. Use the one that is given, so that a seed decides the picture.",
        ),
        Misconception(
            "every step from the start",
            _from_noised(before=lambda z_t, start: start),
            "Each step begins again with the noised picture. It goes on from where the step before has come "
            "to.",
        ),
        Misconception(
            "clamped on the way",
            _from_noised(after=lambda z_t, start: z_t.clamp(-1, 1)),
            "Latents have no bounds, and noisy ones least of all: do not clamp.",
        ),
    ),
)


# Inpainting


def _keep_known_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(2, 3), draws.integer(5, 6), draws.integer(4, 5)

    def case(note, batch, channels, height, width, low=0.2, high=0.8, is_known=None, **kind):
        shape = batch, channels, height, width
        z_t, known = draws.normal(*shape, **kind), 1.3 * draws.normal(*shape, **kind)
        noise = draws.normal(*shape, dtype=z_t.dtype)
        if is_known is None:
            is_known = _holes(draws, batch, height * width).view(batch, 1, height, width)
        else:
            is_known = torch.full((batch, 1, height, width), is_known)
        alpha_bar = draws.uniform(batch, 1, 1, 1, low=low, high=high, dtype=z_t.dtype)
        return Case(note, (z_t, known, is_known, alpha_bar, noise))

    middle = case("latents that are not contiguous", few, 4, 3, 5)
    z_t, known, *others = middle.arguments
    return [
        # With axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side, side),
        case("latents", few, 4, 4, 6),
        case("as many samples as channels", 4, 4, 3, 5),
        case("maps as wide as the batch is long", many, 4, 3, many),
        case("a batch of one", 1, 4, 5, 4),
        case("a single channel", many, 1, 4, 4),
        case("everything known", few, 4, 3, 3, is_known=True),
        case("nothing known", few, 4, 3, 3, is_known=False),
        case("nearly pure noise", few, 4, 4, 3, low=1e-4, high=1e-2),
        case("hardly any noise", few, 4, 3, 4, low=0.97, high=0.999),
        case("float32", few, 4, 4, 5, dtype=torch.float32),
        case("with gradient", few, 4, 3, 3, gradient=True),
        Case(middle.note, (transposed(z_t), transposed(known), *others)),
    ]


def _kept(noisy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """The known part made noisy by any function of (known, alpha_bar, noise)."""
    return lambda z_t, known, is_known, alpha_bar, noise: torch.where(
        is_known, noisy(known, alpha_bar, noise), z_t
    )


def _joined(join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """The known part made noisy as it should be, and joined by any function of (is_known, noisy, z_t)."""
    return lambda z_t, known, is_known, alpha_bar, noise: join(
        is_known, q_sample(known, alpha_bar, noise), z_t
    )


def _with_mask(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_arguments(latent_diffusion.keep_known, is_known=lambda is_known, **_: change(is_known))


KEEP_KNOWN = Exercise(
    "latent_diffusion.keep_known",
    '"Inpainting", equation (7.14)',
    latent_diffusion.keep_known,
    _keep_known_cases,
    (
        Misconception(
            "mask inverted",
            _with_mask(torch.logical_not),
            "True stands for what is known and shall be kept; here the rest is replaced.",
        ),
        Misconception(
            "known part left clean",
            _kept(lambda known, alpha_bar, noise: known),
            "The denoiser expects noise everywhere, as much as belongs to the step: the known part is put in "
            "clean here.",
        ),
        Misconception(
            "no roots",
            _kept(lambda known, alpha_bar, noise: alpha_bar * known + (1 - alpha_bar) * noise),
            "alpha_bar and 1 - alpha_bar are variances; the parts are multiplied by their roots.",
        ),
        Misconception(
            "root of alpha_bar forgotten",
            _kept(lambda known, alpha_bar, noise: alpha_bar * known + (1 - alpha_bar).sqrt() * noise),
            "The noise has its root; the picture's factor needs one, too.",
        ),
        Misconception(
            "root of 1 - alpha_bar forgotten",
            _kept(lambda known, alpha_bar, noise: alpha_bar.sqrt() * known + (1 - alpha_bar) * noise),
            "The picture has its root; the noise's factor needs one, too.",
        ),
        Misconception(
            "1 - sqrt(alpha_bar)",
            _kept(lambda known, alpha_bar, noise: alpha_bar.sqrt() * known + (1 - alpha_bar.sqrt()) * noise),
            "The two factors' squares add up to 1, not the factors themselves.",
        ),
        Misconception(
            "factors swapped",
            _kept(lambda known, alpha_bar, noise: q_sample(known, 1 - alpha_bar, noise)),
            "alpha_bar is what is left of the picture, 1 - alpha_bar what has become noise; here it is the "
            "other way round.",
        ),
        Misconception(
            "noise forgotten",
            _kept(lambda known, alpha_bar, noise: alpha_bar.sqrt() * known),
            "The known part is made fainter, but no noise is added to it.",
        ),
        Misconception(
            "picture not made fainter",
            _kept(lambda known, alpha_bar, noise: known + (1 - alpha_bar).sqrt() * noise),
            "Noise is added, but the picture keeps its full strength: it has a factor, too.",
        ),
        Misconception(
            "noise in full",
            _kept(lambda known, alpha_bar, noise: alpha_bar.sqrt() * known + noise),
            "The noise has its full standard deviation of 1 at every step; it is to have that of the step.",
        ),
        Misconception(
            "noise taken away",
            _kept(lambda known, alpha_bar, noise: q_sample(known, alpha_bar, -noise)),
            "The noise is added, with the sign it has.",
        ),
        Misconception(
            "pure noise in the known part",
            _kept(lambda known, alpha_bar, noise: noise),
            "The known part becomes pure noise: nothing of the picture is kept.",
        ),
        Misconception(
            "picture noised everywhere",
            _joined(lambda is_known, noisy, z_t: noisy),
            "The noisy picture is returned as a whole: what has been drawn in the unknown part is lost.",
        ),
        Misconception(
            "nothing kept",
            _joined(lambda is_known, noisy, z_t: z_t.clone()),
            "z_t comes back as it was.",
        ),
        Misconception(
            "added, not replaced",
            _joined(lambda is_known, noisy, z_t: z_t + is_known * noisy),
            "In the known part the sum of both stands now: replace, do not add.",
        ),
        Misconception(
            "averaged, not replaced",
            _joined(lambda is_known, noisy, z_t: torch.where(is_known, (noisy + z_t) / 2, z_t)),
            "The known part is mixed with what was drawn there: replace it.",
        ),
        Misconception(
            "unknown part set to 0",
            _joined(lambda is_known, noisy, z_t: is_known * noisy),
            "The unknown part is 0 now. It keeps what z_t has there.",
        ),
        Misconception(
            "unknown part drawn anew",
            lambda z_t, known, is_known, alpha_bar, noise: torch.where(
                is_known, q_sample(known, alpha_bar, noise), noise
            ),
            "The unknown part becomes noise again at every step. It keeps what z_t has there.",
        ),
        Misconception(
            "unknown part noised again",
            lambda z_t, known, is_known, alpha_bar, noise: q_sample(
                torch.where(is_known, known, z_t), alpha_bar, noise
            ),
            "z_t is noisy already: only the known part, which is clean, gets noise.",
        ),
        Misconception(
            "first picture's mask for all",
            _with_mask(lambda is_known: is_known[:1]),
            "The first picture's mask is used for all. Each has its own.",
        ),
        Misconception(
            "channel axis lost",
            _with_mask(lambda is_known: is_known[:, 0]),
            "A mask of shape (B, h, w) meets the channels, not the batch: keep the axis of length 1.",
        ),
        Misconception(
            "first channel only",
            _joined(
                lambda is_known, noisy, z_t: torch.where(
                    is_known & (torch.arange(z_t.shape[1]) == 0)[:, None, None], noisy, z_t
                )
            ),
            "Only the first channel is kept. A place that is known is known in all channels.",
        ),
        Misconception(
            "mask mirrored",
            _with_mask(lambda is_known: is_known.flip(3)),
            "The mask is mirrored: it has the same rows and columns as the latents.",
        ),
        Misconception(
            "same noise for all",
            with_arguments(latent_diffusion.keep_known, noise=lambda noise, **_: noise[:1].expand_as(noise)),
            "The first sample's noise is used for all. Each has its own.",
        ),
        Misconception(
            "fresh noise",
            with_arguments(latent_diffusion.keep_known, noise=lambda noise, **_: torch.randn_like(noise)),
            "The noise that is given is not used, but drawn anew. The known part is to follow one path from "
            "step to step.",
        ),
        Misconception(
            "clamped",
            lambda *arguments: latent_diffusion.keep_known(*arguments).clamp(-1, 1),
            "Latents have no bounds, and noisy ones least of all: do not clamp.",
        ),
        *schedule_mistakes(latent_diffusion.keep_known, "alpha_bar"),
    ),
)


EXERCISES = [
    FROM_LATENTS,
    WORD_WEIGHTS,
    CROSS_ATTENTION,
    CAPTIONED_TRAINING_STEP,
    WORD_MAPS,
    IMAGE_TO_IMAGE,
    KEEP_KNOWN,
]
