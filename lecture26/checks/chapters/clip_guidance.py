"""Exercises of chapter 04: similarities, InfoNCE, a mask, sentence features, zero-shot classes, gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lecture26 import clip_guidance

from ..core import Case, Exercise, Misconception
from ..draws import Draws, cast
from ..mistakes import (
    gradient_in_the_mode_around,
    gradient_of,
    gradient_of_outputs,
    scores,
    with_arguments,
    with_result,
)


def _unit(draws: Draws, *shape: int, **kind) -> Tensor:
    """Features of length 1."""
    return cast(normalize(draws.normal(*shape), dim=-1), **kind)


def _cosine_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, m, d = draws.integer(5, 6), draws.integer(3, 4), draws.integer(7, 8)
    side = draws.integer(3, 5)

    def case(note, n, m, d, stretch=1.0, **kind):
        return Case(note, (draws.normal(n, d, **kind), stretch * draws.normal(m, d, **kind).detach()))

    return [
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side),
        case("more images than texts", n, m, d),
        case("more texts than images", m, n, d, stretch=3.0),
        case("a single image", 1, m, d),
        case("a single text", n, 1, d),
        case("long features", n, m, d, stretch=100.0),
        case("float32", n, m, d, dtype=torch.float32),
        case("image features with gradient", n, n, d, gradient=True),
    ]


COSINE_SIMILARITY_MATRIX = Exercise(
    "clip_guidance.cosine_similarity_matrix",
    '"What belongs together", equation (4.1)',
    clip_guidance.cosine_similarity_matrix,
    _cosine_cases,
    (
        Misconception(
            "not normalised",
            lambda u, v: u @ v.T,
            "These are inner products: long features go with everything. Divide by both lengths.",
        ),
        Misconception(
            "normalised along the batch",
            lambda u, v: normalize(u, dim=0) @ normalize(v, dim=0).T,
            "Each feature vector, a row, has to have length 1; here the columns have.",
        ),
        Misconception(
            "only the images normalised",
            lambda u, v: normalize(u, dim=1) @ v.T,
            "The texts' features have lengths too: divide by them as well.",
        ),
        Misconception(
            "only the texts normalised",
            lambda u, v: u @ normalize(v, dim=1).T,
            "The images' features have lengths too: divide by them as well.",
        ),
        Misconception(
            "normalised by the whole matrix",
            lambda u, v: (u / u.norm()) @ (v / v.norm()).T,
            "Every row has a length of its own; this divides by the norm of all rows together.",
        ),
        Misconception(
            "divided by squared lengths",
            lambda u, v: (u / u.square().sum(1, keepdim=True)) @ (v / v.square().sum(1, keepdim=True)).T,
            "The lengths are the roots of the sums of squares: a root is missing.",
        ),
        Misconception(
            "sums instead of lengths",
            lambda u, v: normalize(u, p=1, dim=1) @ normalize(v, p=1, dim=1).T,
            "The length of a vector is the root of the sum of squares, not the sum of absolute values.",
        ),
        Misconception(
            "divided by the dimension",
            lambda u, v: u @ v.T / u.shape[1],
            "A mean of products is no cosine: divide by the two lengths.",
        ),
        Misconception(
            "distances",
            lambda u, v: torch.cdist(normalize(u, dim=1), normalize(v, dim=1)),
            "Distances are small where the two go together: the sign is the wrong way round.",
        ),
        Misconception(
            "negative distances",
            lambda u, v: -torch.cdist(normalize(u, dim=1), normalize(v, dim=1)),
            "Distances with the sign turned order the pairs rightly, but a cosine is an inner product.",
        ),
        Misconception(
            "transposed",
            lambda u, v: normalize(v, dim=1) @ normalize(u, dim=1).T,
            "Rows are images, columns are texts.",
        ),
        Misconception(
            "image by image, text by text",
            lambda u, v: (normalize(u, dim=1) * normalize(v, dim=1)).sum(dim=1),
            "Only pairs of one number are compared here: each image is to be compared with each text.",
        ),
        Misconception(
            "angles",
            lambda u, v: clip_guidance.cosine_similarity_matrix(u, v).clamp(-1, 1).acos(),
            "This is the angle, not its cosine.",
        ),
        Misconception(
            "absolute values",
            lambda u, v: clip_guidance.cosine_similarity_matrix(u, v).abs(),
            "A negative similarity means something: opposite directions do not belong together.",
        ),
    ),
)


def _info_nce_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, d, side = draws.integer(6, 7), draws.integer(3, 4), draws.integer(4, 5)
    scale = draws.uniform(low=1.0, high=2.0).item()

    def case(note, n, d, logit_scale, **kind):
        return Case(note, (_unit(draws, n, d, **kind), _unit(draws, n, d, **kind), logit_scale))

    learned = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    same = _unit(draws, 1, d).expand(n, d).clone()
    return [
        case("a few pairs", n, d, scale),
        case("as many pairs as features", side, side, scale),
        case("kappa = 1", n, d, 0.0),
        case("kappa below 1", n, d, -0.5),
        case("kappa = 100, whose exponentials are large", n, d, math.log(100)),
        case("a single pair", 1, d, scale),
        case("float32", n, d, scale, dtype=torch.float32),
        case("features and logit_scale with gradient", n, d, learned, gradient=True),
        Case("all features the same", (same, same.clone(), scale)),
        Case("orthonormal pairs", (*torch.eye(side, dtype=torch.float64).expand(2, -1, -1).clone(), scale)),
    ]


def _tau(logit_scale: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(logit_scale, dtype=like.dtype)


def _symmetric(logits: Tensor, **options) -> Tensor:
    """The loss of any logits, right or wrong."""
    own = torch.arange(len(logits))
    return (cross_entropy(logits, own, **options) + cross_entropy(logits.T, own, **options)) / 2


def _logits(u: Tensor, v: Tensor, logit_scale: float | Tensor) -> Tensor:
    return _tau(logit_scale, u).exp() * u @ v.T


def _own_left_out(logits: Tensor) -> Tensor:
    if len(logits) == 1:
        return logits.sum() * 0
    others = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -math.inf)
    return (others.logsumexp(1) + others.logsumexp(0)).mean() / 2 - logits.diagonal().mean()


INFO_NCE = Exercise(
    "clip_guidance.info_nce",
    '"From similarities to a guess", equation (4.4)',
    clip_guidance.info_nce,
    _info_nce_cases,
    (
        Misconception(
            "captions for images only",
            lambda u, v, tau: cross_entropy(_logits(u, v, tau), torch.arange(len(u))),
            "This is one direction only, which caption belongs to the image; the other riddle is missing.",
        ),
        Misconception(
            "images for captions only",
            lambda u, v, tau: cross_entropy(_logits(u, v, tau).T, torch.arange(len(u))),
            "This is one direction only, which image belongs to the caption; the other riddle is missing.",
        ),
        Misconception(
            "sum of the two directions",
            lambda u, v, tau: 2 * clip_guidance.info_nce(u, v, tau),
            "The loss is the mean of the two directions, not their sum.",
        ),
        Misconception(
            "divided by kappa",
            lambda u, v, tau: _symmetric(u @ v.T / _tau(tau, u).exp()),
            "kappa multiplies the similarities; it is the temperature, 1 / kappa, that would divide them.",
        ),
        Misconception(
            "scale without exp",
            lambda u, v, tau: _symmetric(_tau(tau, u) * u @ v.T),
            "logit_scale is a logarithm: the factor at the similarities is its exponential.",
        ),
        Misconception(
            "no scale",
            lambda u, v, tau: _symmetric(u @ v.T),
            "The similarities lie within [-1, 1]; without the factor kappa no softmax can become sure.",
        ),
        Misconception(
            "exp taken twice",
            lambda u, v, tau: _symmetric(_tau(tau, u).exp().exp() * u @ v.T),
            "The exponential is taken twice: kappa = exp(logit_scale).",
        ),
        Misconception(
            "kappa squared",
            lambda u, v, tau: _symmetric((2 * _tau(tau, u)).exp() * u @ v.T),
            "The factor kappa is applied to images and to texts: once is enough.",
        ),
        Misconception(
            "labels all 0",
            lambda u, v, tau: (
                (
                    cross_entropy(_logits(u, v, tau), torch.zeros(len(u), dtype=torch.long))
                    + cross_entropy(_logits(u, v, tau).T, torch.zeros(len(u), dtype=torch.long))
                )
                / 2
            ),
            "The right answer to riddle i is i, on the diagonal, not the first one.",
        ),
        Misconception(
            "distances as logits",
            lambda u, v, tau: _symmetric(_tau(tau, u).exp() * (2 - 2 * u @ v.T)),
            "Distances are large where the two do not belong together: the sign is the wrong way round.",
        ),
        Misconception(
            "normalised along the batch",
            lambda u, v, tau: _symmetric(_logits(normalize(u, dim=0), normalize(v, dim=0), tau)),
            "The features come in with length 1; to normalise them along the batch spoils that.",
        ),
        Misconception(
            "summed over the batch",
            lambda u, v, tau: len(u) * clip_guidance.info_nce(u, v, tau),
            "The loss is the mean over the riddles, not their sum.",
        ),
        Misconception(
            "sign forgotten",
            lambda u, v, tau: -clip_guidance.info_nce(u, v, tau),
            "The loss is minus the log-probability, and at least 0.",
        ),
        Misconception(
            "probability for log-probability",
            lambda u, v, tau: (
                -(_logits(u, v, tau).softmax(1).diagonal() + _logits(u, v, tau).softmax(0).diagonal()).mean()
                / 2
            ),
            "The surprise is minus the logarithm of the probability.",
        ),
        Misconception(
            "softmax over the whole matrix",
            lambda u, v, tau: (
                _logits(u, v, tau).flatten().logsumexp(0) - _logits(u, v, tau).diagonal().mean()
            ),
            "Each riddle has N answers: a softmax for each row and one for each column, not over all pairs.",
        ),
        Misconception(
            "own pair left out of the sum",
            lambda u, v, tau: _own_left_out(_logits(u, v, tau)),
            "The sum below the fraction runs over all N answers, the right one included.",
        ),
        Misconception(
            "mean over all pairs",
            lambda u, v, tau: clip_guidance.info_nce(u, v, tau) / len(u),
            "There are N riddles in each direction: divide by N once, not by N squared.",
        ),
        Misconception(
            "scale detached",
            lambda u, v, tau: clip_guidance.info_nce(u, v, _tau(tau, u).detach()),
            "The temperature is learned: its gradient must not be cut.",
        ),
        Misconception(
            "bits",
            lambda u, v, tau: clip_guidance.info_nce(u, v, tau) / math.log(2),
            "The loss is in nats, with the natural logarithm.",
        ),
    ),
)


def _masked_attention_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, m, d, e = draws.integer(6, 7), draws.integer(4, 5), draws.integer(2, 3), draws.integer(8, 9)
    batch, heads, side = draws.integer(2, 3), 4, draws.integer(4, 5)

    def case(note, lead, n, m, d, e, mask, stretch=1, **kind):
        q, k, v = (draws.normal(*lead, *shape, **kind) for shape in ((n, d), (m, d), (m, e)))
        return Case(note, (q if stretch == 1 else stretch * q.detach(), k, v, mask))

    def causal(size):
        return torch.ones(size, size, dtype=torch.bool).tril()

    padding = torch.arange(m) < torch.tensor([[1], [m], [m - 1]])[:batch]  # (batch, m)
    scattered = draws.uniform(n, m) < 0.5
    scattered[:, 0] = True
    return [
        case("looking back only, all axes of one length", (side,), side, side, side, side, causal(side)),
        case("looking back only, several heads", (batch, heads), n, n, d, e, causal(n)),
        case("padded keys", (batch, heads), n, m, d, e, padding[:, None, None]),
        case("any mask", (batch,), n, m, d, e, scattered),
        case("nothing masked", (batch,), n, m, d, e, torch.ones(n, m, dtype=torch.bool)),
        case("no batch axis", (), n, n, d, e, causal(n)),
        case("each token looks at itself alone", (batch,), n, n, d, e, torch.eye(n, dtype=torch.bool)),
        case("large scores", (batch,), n, n, d, e, causal(n), stretch=2000),
        case("float32", (batch, heads), n, n, d, e, causal(n), dtype=torch.float32),
        case("with gradient", (batch,), n, n, d, e, causal(n), gradient=True),
    ]


def _masked(scores: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention with any scores, right or wrong."""
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


MASKED_ATTENTION = Exercise(
    "clip_guidance.masked_attention",
    '"A transformer that reads from left to right", equation (4.16)',
    clip_guidance.masked_attention,
    _masked_attention_cases,
    (
        Misconception(
            "mask inverted",
            lambda q, k, v, mask: _masked(scores(q, k), v, ~mask),
            "True means that the query may look at the key: the others are to be masked.",
        ),
        Misconception(
            "mask ignored",
            lambda q, k, v, mask: scores(q, k).softmax(-1) @ v,
            "Every query looks at every key here: the mask is not used.",
        ),
        Misconception(
            "masked scores set to 0",
            lambda q, k, v, mask: (scores(q, k) * mask).softmax(-1) @ v,
            "exp(0) is 1, not 0: a masked key keeps a weight. Its score has to be minus infinity.",
        ),
        Misconception(
            "masked after the softmax",
            lambda q, k, v, mask: (scores(q, k).softmax(-1) * mask) @ v,
            "The weights of the keys that are left must add up to 1: mask the scores before the softmax.",
        ),
        Misconception(
            "mask transposed",
            lambda q, k, v, mask: _masked(scores(q, k), v, mask.mT),
            "Rows of the mask are queries, columns are keys; here each token looks at those behind it.",
        ),
        Misconception(
            "mask added to the scores",
            lambda q, k, v, mask: (scores(q, k) + mask.to(q.dtype)).softmax(-1) @ v,
            "This gives allowed keys 1 more and forbids none: the score of a masked key is minus infinity.",
        ),
        Misconception(
            "plus infinity",
            lambda q, k, v, mask: scores(q, k).masked_fill(~mask, math.inf).softmax(-1) @ v,
            "exp(-infinity) is 0; plus infinity gives NaN.",
        ),
        Misconception(
            "scores not scaled",
            lambda q, k, v, mask: _masked(q @ k.mT, v, mask),
            "The scores are not divided by sqrt(d).",
        ),
        Misconception(
            "divided by d",
            lambda q, k, v, mask: _masked(q @ k.mT / q.shape[-1], v, mask),
            "The scores are divided by d: their standard deviation is sqrt(d).",
        ),
        Misconception(
            "multiplied by sqrt(d)",
            lambda q, k, v, mask: _masked(q @ k.mT * math.sqrt(q.shape[-1]), v, mask),
            "The scores are divided by sqrt(d), not multiplied.",
        ),
        Misconception(
            "softmax over the queries",
            lambda q, k, v, mask: scores(q, k).masked_fill(~mask, -math.inf).softmax(-2) @ v,
            "The weights of one query add up to 1 over the keys: the softmax runs over the last axis.",
        ),
        Misconception(
            "no softmax",
            lambda q, k, v, mask: (scores(q, k) * mask) @ v,
            "The scores are used as weights as they are; the softmax over the keys is missing.",
        ),
        Misconception(
            "queries and keys swapped",
            lambda q, k, v, mask: _masked(scores(k, q), v, mask),
            "Rows of the scores are queries, columns are keys: q times k transposed.",
        ),
    ),
)


def _sentence_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, length, width = draws.integer(3, 4), draws.integer(7, 8), draws.integer(5, 6)
    end = draws.integer(2, 5)

    def tokens(batch, length, places, last=0):
        rows = torch.tensor([[draws.integer(6, 30) for _ in range(length)] for _ in range(batch)])
        rows[:, 0] = 1
        for row, place in zip(rows, places, strict=True):
            row[place] = end
            row[place + 1 :] = last
        return rows

    def case(note, batch, length, width, places, last=0, **kind):
        return Case(
            note, (draws.normal(batch, length, width, **kind), tokens(batch, length, places, last), end)
        )

    places = [2, length - 1, 4, 3][:batch]
    return [
        case("texts of different lengths", batch, length, width, places),
        case("no padding", batch, length, width, [length - 1] * batch),
        case("all axes of one length", 4, 4, 4, [1, 3, 2, 2]),
        case("a single text", 1, length, width, [3]),
        case("padded with end tokens", batch, length, width, places, last=end),
        case("padded with large numbers", batch, length, width, places, last=99),
        case("an empty text", 2, length, width, [1, 4]),
        case("float32", batch, length, width, places, dtype=torch.float32),
        case("with gradient", batch, length, width, places, gradient=True),
    ]


def _place(tokens: Tensor, end: int) -> Tensor:
    return (tokens == end).int().argmax(dim=1)


def _at(features: Tensor, place: Tensor) -> Tensor:
    return features[torch.arange(len(features)), place.clamp(0, features.shape[1] - 1)]


def _mean_where(features: Tensor, chosen: Tensor) -> Tensor:
    weights = chosen.to(features.dtype)[:, :, None]
    return (features * weights).sum(dim=1) / weights.sum(dim=1)


SENTENCE_FEATURES = Exercise(
    "clip_guidance.sentence_features",
    '"A transformer that reads from left to right", equation (4.19)',
    clip_guidance.sentence_features,
    _sentence_cases,
    (
        Misconception(
            "last place",
            lambda features, tokens, end: features[:, -1],
            "The last place is padding in most texts; what stands for the sentence is at its end token.",
        ),
        Misconception(
            "first place",
            lambda features, tokens, end: features[:, 0],
            "The token that begins the text has seen no word, since nobody looks ahead: take the end token.",
        ),
        Misconception(
            "mean over all places",
            lambda features, tokens, end: features.mean(dim=1),
            "This averages over padding, too. Take the end token alone: it has seen all words.",
        ),
        Misconception(
            "mean without padding",
            lambda features, tokens, end: _mean_where(
                features, torch.arange(tokens.shape[1]) <= _place(tokens, end)[:, None]
            ),
            "A mean over the words is another way to read a text; CLIP takes the end token alone.",
        ),
        Misconception(
            "sum over all places",
            lambda features, tokens, end: features.sum(dim=1),
            "Take the features at one place, that of the end token.",
        ),
        Misconception(
            "largest value over the places",
            lambda features, tokens, end: features.amax(dim=1),
            "Take the features at one place, that of the end token, not the largest value of each.",
        ),
        Misconception(
            "last word",
            lambda features, tokens, end: _at(features, _place(tokens, end) - 1),
            "This is one place too early: the last word, not the end token.",
        ),
        Misconception(
            "behind the end",
            lambda features, tokens, end: _at(features, _place(tokens, end) + 1),
            "This is one place too late: the first padding, not the end token.",
        ),
        Misconception(
            "last end token",
            lambda features, tokens, end: _at(
                features, tokens.shape[1] - 1 - (tokens == end).flip(1).int().argmax(dim=1)
            ),
            "Where the padding is made of end tokens, the first one ends the text.",
        ),
        Misconception(
            "first text's place for all",
            lambda features, tokens, end: features[:, _place(tokens, end)[0]],
            "Each text has its end token at a place of its own.",
        ),
        Misconception(
            "place of the largest number",
            lambda features, tokens, end: _at(features, tokens.argmax(dim=1)),
            "In OpenAI's vocabulary the end token has the largest number; look for the given one.",
        ),
        Misconception(
            "end taken for a place",
            lambda features, tokens, end: features[:, min(end, features.shape[1] - 1)],
            "end is the number of the token, not the place where it stands.",
        ),
    ),
)


def _zero_shot_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, k, d, side = draws.integer(5, 6), draws.integer(3, 4), draws.integer(7, 8), draws.integer(3, 5)
    scale = draws.uniform(low=1.0, high=2.0).item()

    def case(note, n, k, d, logit_scale, stretch=1.0, **kind):
        return Case(
            note, (draws.normal(n, d, **kind), stretch * draws.normal(k, d, **kind).detach(), logit_scale)
        )

    return [
        case("more images than classes", n, k, d, scale),
        case("more classes than images", k, n, d, scale, stretch=3.0),
        case("all axes of one length", side, side, side, scale),
        case("a single image", 1, k, d, scale),
        case("a single class", n, 1, d, scale),
        case("kappa = 1", n, k, d, 0.0),
        case("kappa = 100", n, k, d, math.log(100)),
        case("a learned scale", n, k, d, torch.tensor(scale, dtype=torch.float64)),
        case("float32", n, k, d, scale, dtype=torch.float32),
        case("with gradient", n, k, d, scale, gradient=True),
    ]


def _similarity(u: Tensor, v: Tensor) -> Tensor:
    return clip_guidance.cosine_similarity_matrix(u, v)


ZERO_SHOT_PROBABILITIES = Exercise(
    "clip_guidance.zero_shot_probabilities",
    '"Classes that are words", equation (4.21)',
    clip_guidance.zero_shot_probabilities,
    _zero_shot_cases,
    (
        Misconception(
            "softmax over the images",
            lambda u, v, tau: (_tau(tau, u).exp() * _similarity(u, v)).softmax(dim=0),
            "The probabilities of one image add up to 1 over the classes, the columns.",
        ),
        Misconception(
            "scale without exp",
            lambda u, v, tau: (_tau(tau, u) * _similarity(u, v)).softmax(dim=1),
            "logit_scale is a logarithm: the factor at the similarities is its exponential.",
        ),
        Misconception(
            "divided by kappa",
            lambda u, v, tau: (_similarity(u, v) / _tau(tau, u).exp()).softmax(dim=1),
            "kappa multiplies the similarities; it is the temperature, 1 / kappa, that would divide them.",
        ),
        Misconception(
            "no scale",
            lambda u, v, tau: _similarity(u, v).softmax(dim=1),
            "Without the factor kappa the probabilities are nearly uniform: a cosine is at most 1.",
        ),
        Misconception(
            "not normalised",
            lambda u, v, tau: (_tau(tau, u).exp() * u @ v.T).softmax(dim=1),
            "The features come in with any length: normalise them first.",
        ),
        Misconception(
            "only the images normalised",
            lambda u, v, tau: (_tau(tau, u).exp() * normalize(u, dim=1) @ v.T).softmax(dim=1),
            "A class whose text has long features must not win by that: normalise the texts as well.",
        ),
        Misconception(
            "only the texts normalised",
            lambda u, v, tau: (_tau(tau, u).exp() * u @ normalize(v, dim=1).T).softmax(dim=1),
            "An image with long features must not seem surer than others: normalise the images as well.",
        ),
        Misconception(
            "normalised along the batch",
            lambda u, v, tau: (_tau(tau, u).exp() * normalize(u, dim=0) @ normalize(v, dim=0).T).softmax(
                dim=1
            ),
            "Each feature vector, a row, has to have length 1; here the columns have.",
        ),
        Misconception(
            "logits",
            lambda u, v, tau: _tau(tau, u).exp() * _similarity(u, v),
            "These are the logits: the softmax over the classes is missing.",
        ),
        Misconception(
            "log-probabilities",
            lambda u, v, tau: (_tau(tau, u).exp() * _similarity(u, v)).log_softmax(dim=1),
            "These are logarithms of the probabilities.",
        ),
        Misconception(
            "a sigmoid for each class",
            lambda u, v, tau: (_tau(tau, u).exp() * _similarity(u, v)).sigmoid(),
            "One of the classes is right, so the probabilities add up to 1: a softmax, not one sigmoid each.",
        ),
        Misconception(
            "similarities shared out",
            lambda u, v, tau: (1 + _similarity(u, v)) / (1 + _similarity(u, v)).sum(dim=1, keepdim=True),
            "Similarities become probabilities by a softmax, not by dividing them by their sum.",
        ),
        Misconception(
            "softmax over the whole matrix",
            lambda u, v, tau: (
                (_tau(tau, u).exp() * _similarity(u, v)).flatten().softmax(0).reshape(len(u), -1)
            ),
            "Each image has a distribution of its own: the softmax runs over one row.",
        ),
        Misconception(
            "transposed",
            lambda u, v, tau: clip_guidance.zero_shot_probabilities(u, v, tau).T,
            "Rows are images, columns are classes.",
        ),
    ),
)


def _paired_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d = draws.integer(3, 4), draws.integer(6, 7)
    side = draws.integer(3, 5)

    def case(note, batch, d, stretch=(1.0, 1.0), **kind):
        u, v = (factor * draws.normal(batch, d, **kind) for factor in stretch)
        return Case(note, (u, v))

    u = draws.normal(batch, d)
    return [
        case("a batch of pairs", batch, d),
        case("as many pairs as features", side, side),
        case("a single pair", 1, d),
        case("long image features", batch, d, (20.0, 1.0)),
        case("long text features", batch, d, (1.0, 20.0)),
        case("two features", batch, 2),
        case("float32", batch, d, dtype=torch.float32),
        Case("image and text in one direction, where nothing is left to gain", (u, 3 * u)),
    ]


def _parts(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The directions of u and v, their cosines (B, 1), and the lengths of u (B, 1)."""
    u_hat, v_hat = normalize(u, dim=1), normalize(v, dim=1)
    return u_hat, v_hat, (u_hat * v_hat).sum(dim=1, keepdim=True), u.norm(dim=1, keepdim=True)


def _only_towards(u: Tensor, v: Tensor) -> Tensor:
    _, v_hat, _, length = _parts(u, v)
    return v_hat / length


def _other(formula: Callable) -> Callable:
    """A formula of directions, cosines and lengths of u, right or wrong, as a function of u and v."""
    return lambda u, v: formula(*_parts(u, v))


def _of_all_pairs(u: Tensor, v: Tensor) -> Tensor:
    return torch.stack([clip_guidance.cosine_gradient(u, text.expand_as(u)) for text in v]).sum(dim=0)


COSINE_GRADIENT = Exercise(
    "clip_guidance.cosine_gradient",
    '"The gradient of a cosine", equation (4.24)',
    clip_guidance.cosine_gradient,
    _paired_cases,
    (
        Misconception(
            "text's direction alone",
            _only_towards,
            "This is the gradient of an inner product. What the image has already, S u, has to be taken off.",
        ),
        Misconception(
            "length forgotten",
            _other(lambda u, v, S, length: v - S * u),
            "Long features turn slowly: divide by the length of u.",
        ),
        Misconception(
            "divided by the squared length",
            _other(lambda u, v, S, length: (v - S * u) / length**2),
            "Divide by the length of u once.",
        ),
        Misconception(
            "multiplied by the length",
            _other(lambda u, v, S, length: (v - S * u) * length),
            "Long features turn slowly: divide by the length of u, do not multiply.",
        ),
        Misconception(
            "sign turned",
            _other(lambda u, v, S, length: (S * u - v) / length),
            "This leads away from the text: it is the gradient of the distance, not of the similarity.",
        ),
        Misconception(
            "similarity forgotten",
            _other(lambda u, v, S, length: (v - u) / length),
            "Only the part of the text's direction along u is taken off: S u, not u.",
        ),
        Misconception(
            "plus instead of minus",
            _other(lambda u, v, S, length: (v + S * u) / length),
            "What the image has already is taken off, not added.",
        ),
        Misconception(
            "text not normalised",
            lambda u, v: clip_guidance.cosine_gradient(u, v) * v.norm(dim=1, keepdim=True),
            "The text's length is left in: normalise both, or a text pulls harder for having long features.",
        ),
        Misconception(
            "mean over the batch",
            lambda u, v: clip_guidance.cosine_gradient(u, v) / len(u),
            "Each image has its own gradient: differentiate the sum over the batch, not the mean, or the "
            "strength depends on how many images are drawn at once.",
        ),
        Misconception(
            "every text for every image",
            _of_all_pairs,
            "Image i has its own text, in row i; here all texts pull at every image.",
        ),
        Misconception(
            "first text for all",
            lambda u, v: clip_guidance.cosine_gradient(u, v[:1].expand_as(u)),
            "The first text is used for all: row i has its own.",
        ),
        Misconception(
            "gradient with respect to the text",
            lambda u, v: clip_guidance.cosine_gradient(v, u),
            "This is the gradient with respect to the text's features. It is the image that shall change.",
        ),
        Misconception(
            "difference of the features",
            lambda u, v: v - u,
            "This is the gradient of -|u - v|^2 / 2, without any normalisation.",
        ),
        Misconception(
            "length 1",
            lambda u, v: normalize(clip_guidance.cosine_gradient(u, v), dim=1),
            "The gradient's length falls to 0 as the two come together: do not normalise it.",
        ),
        Misconception(
            "normalised along the batch",
            lambda u, v: (
                (
                    normalize(v, dim=0)
                    - (normalize(u, dim=0) * normalize(v, dim=0)).sum(0) * normalize(u, dim=0)
                )
                / u.norm(dim=0)
            ),
            "Each row is one feature vector: lengths and inner products run along the rows.",
        ),
        Misconception(
            "similarity of unnormalised features",
            lambda u, v: (
                (normalize(v, dim=1) - (u * v).sum(1, keepdim=True) * normalize(u, dim=1))
                / u.norm(dim=1, keepdim=True)
            ),
            "S is the inner product of the normalised features.",
        ),
    ),
)


def _similarity_gradient_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 7), draws.integer(4, 5)

    def case(note, *shape, dim=5, texts=None, mode="grad", weights=False, **kind):
        x_t = draws.normal(*shape, **kind)
        numbers = dict(dtype=kind.get("dtype", torch.float64), gradient=weights)
        tower = draws.network("image_tower", x_t[0].numel(), dim, **numbers)
        text_features = 3 * draws.normal(texts or len(x_t), dim, dtype=x_t.dtype)
        return Case(note, (tower, x_t, draws.steps(len(x_t), 1000), text_features), mode)

    return [
        case("points", many, 2),
        case("images", few, 3, 2, 4),
        case("as many samples as features and elements", side, side, dim=side),
        case("a batch of one", 1, 3, 4, 4),
        case("one text for all", few, 3, 2, 2, texts=1),
        case("float32 images", few, 3, 4, 2, dtype=torch.float32),
        case("points that carry gradient", few, 3, gradient=True),
        case("a tower whose weights carry gradient", few, 4, weights=True),
        case("under no_grad, as in a sampler", few, 3, 2, 2, mode="no_grad"),
        case("under inference_mode", few, 4, weights=True, mode="inference_mode"),
    ]


def _gradient_of(score: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The gradient of a score of the features and of a text for each of them, right or wrong."""
    return gradient_of(lambda features, texts: score(features, texts.expand_as(features)))


def _gradient_with(**changes: Callable) -> Callable:
    return with_arguments(clip_guidance.similarity_gradient, **changes)


def _changed_gradient(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_result(clip_guidance.similarity_gradient, change)


SIMILARITY_GRADIENT = Exercise(
    "clip_guidance.similarity_gradient",
    '"The gradient of a cosine", equation (4.24)',
    clip_guidance.similarity_gradient,
    _similarity_gradient_cases,
    (
        Misconception(
            "mean over the batch",
            _changed_gradient(lambda gradient: gradient / len(gradient)),
            "The mean makes each gradient B times too small, so that the guidance depends on the batch size: "
            "differentiate the sum.",
        ),
        Misconception(
            "features not normalised",
            _gradient_of(lambda u, v: (u * v).sum(1)),
            "The inner product's gradient grows with the features' lengths: take the cosine.",
        ),
        Misconception(
            "image features not normalised",
            _gradient_of(lambda u, v: (u * normalize(v, dim=1)).sum(1)),
            "The image's features have a length, too; longer features must not count as more similar.",
        ),
        Misconception(
            "text features not normalised",
            _gradient_of(lambda u, v: (normalize(u, dim=1) * v).sum(1)),
            "The text's features have a length, too: with it, some prompts would pull harder than others.",
        ),
        Misconception(
            "normalised along the batch",
            _gradient_of(lambda u, v: (normalize(u, dim=0) * normalize(v, dim=0)).sum(1)),
            "Each row is one feature vector; normalised along the batch, samples depend on each other.",
        ),
        Misconception(
            "distance without the sign turned",
            _changed_gradient(torch.neg),
            "This leads away from the text: a distance has to fall where a similarity shall rise.",
        ),
        Misconception(
            "squared distance of the normalised features",
            _changed_gradient(lambda gradient: -2 * gradient),
            "|u - v|^2 = 2 - 2 S: its gradient is -2 times that of the similarity.",
        ),
        Misconception(
            "distance of the features",
            _gradient_of(lambda u, v: -(u - v).square().sum(1)),
            "Features are compared by their direction: take the cosine, not a distance.",
        ),
        Misconception(
            "every text for every image",
            _gradient_of(lambda u, v: normalize(u, dim=1) @ normalize(v, dim=1).T),
            "Image i has its own text, in row i; here all texts pull at every image.",
        ),
        Misconception(
            "first text for all",
            _gradient_with(text_features=lambda text_features, **_: text_features[:1]),
            "The first text is used for all: each sample has its own.",
        ),
        Misconception(
            "clean CLIP on x_t",
            _gradient_with(t=lambda t, **_: torch.zeros_like(t)),
            "The CLIP is told step 0, whatever t is: it reads noise as if it were the picture's. Give it t.",
        ),
        Misconception(
            "papers' t for code's",
            _gradient_with(t=lambda t, **_: t + 1),
            "1 is added to t. Code counts steps from 0, and the CLIP was trained with that number.",
        ),
        Misconception(
            "t scaled to [0, 1]",
            _gradient_with(t=lambda t, **_: t / 1000),
            "t goes into the CLIP as it is, 0 to T - 1.",
        ),
        Misconception(
            "one step for the whole batch",
            _gradient_with(t=lambda t, **_: t[:1].expand_as(t)),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "x_t clamped",
            _gradient_with(x_t=lambda x_t, **_: x_t.clamp(-1, 1)),
            "The CLIP gets x_t as it is: noisy images leave [-1, 1], and it was trained on such.",
        ),
        Misconception(
            "softmax over the batch's texts",
            _gradient_of(
                lambda u, v: (normalize(u, dim=1) @ normalize(v, dim=1).T).log_softmax(1).diagonal()
            ),
            "This is normalised over the texts that happen to be in the batch: samples then depend on each "
            "other. Guidance differentiates the similarity itself.",
        ),
        Misconception(
            "exponential of the similarity",
            _gradient_of(lambda u, v: torch.cosine_similarity(u, v, dim=1).exp()),
            "The best critic is a logarithm already: no exponential.",
        ),
        Misconception(
            "gradient normalised",
            _changed_gradient(lambda g: g / g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))),
            "The gradient's length falls to 0 where nothing is left to gain: do not normalise it.",
        ),
        Misconception(
            "sign of the gradient",
            _changed_gradient(torch.sign),
            "The gradient's values are asked for, not their signs; those make adversarial examples.",
        ),
        Misconception(
            "gradient with respect to the features",
            gradient_of_outputs(clip_guidance.paired_similarity),
            "This stops at the image's features: go on to the pixels, through the tower.",
        ),
        Misconception(
            "gradients not switched on",
            gradient_in_the_mode_around(clip_guidance.paired_similarity),
            "Samplers run under no_grad or inference_mode: without enable_grad nothing is differentiated.",
        ),
        Misconception(
            "x_t moved along the gradient",
            lambda tower, x_t, t, texts: x_t + clip_guidance.similarity_gradient(tower, x_t, t, texts),
            "Only the gradient is asked for; where to add it is the wrapper's matter.",
        ),
    ),
)


def _through_x_0_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, d, side = draws.integer(3, 4), draws.integer(5, 6), draws.integer(4, 5)

    def case(note, batch, d, low=0.2, high=0.8, **kind):
        gradient, jacobian = (draws.normal(*shape, **kind) for shape in ((batch, d), (batch, d, d)))
        alpha_bar = draws.uniform(batch, 1, low=low, high=high, dtype=gradient.dtype)
        return Case(note, (gradient, jacobian, alpha_bar))

    single = draws.normal(batch, d), torch.zeros(batch, d, d, dtype=torch.float64)
    return [
        case("a batch", batch, d),
        case("as many samples as numbers in each", side, side),
        case("a single sample", 1, d),
        case("little noise", batch, d, low=0.97, high=0.99),
        case("much noise", batch, d, low=0.01, high=0.03),
        case("a single number", batch, 1),
        case("float32", batch, d, dtype=torch.float32),
        case("with gradient", batch, d, gradient=True),
        Case(
            "noise that does not depend on x_t",
            (*single, draws.uniform(batch, 1, low=0.2, high=0.8)),
        ),
    ]


def _back(g: Tensor, J: Tensor) -> Tensor:
    """J^T g for each sample."""
    return torch.einsum("bij,bi->bj", J, g)


GRADIENT_THROUGH_X_0 = Exercise(
    "clip_guidance.gradient_through_x_0",
    '"A clean CLIP and the predicted image", equation (4.26)',
    clip_guidance.gradient_through_x_0,
    _through_x_0_cases,
    (
        Misconception(
            "detached noise",
            lambda g, J, abar: g / abar.sqrt(),
            "The predicted noise depends on x_t, too: the denoiser's part of the chain rule is missing, "
            "as if the noise had been detached.",
        ),
        Misconception(
            "gradient at x_0-hat",
            lambda g, J, abar: g.clone(),
            "This is the gradient with respect to x_0-hat: the chain rule is missing altogether.",
        ),
        Misconception(
            "Jacobian not transposed",
            lambda g, J, abar: (g - (1 - abar).sqrt() * torch.einsum("bij,bj->bi", J, g)) / abar.sqrt(),
            "A gradient goes back through the transposed Jacobian: sum over its rows, the outputs.",
        ),
        Misconception(
            "Jacobian's diagonal alone",
            lambda g, J, abar: (g - (1 - abar).sqrt() * J.diagonal(dim1=1, dim2=2) * g) / abar.sqrt(),
            "Each predicted number depends on every number of x_t, not on its own alone.",
        ),
        Misconception(
            "plus instead of minus",
            lambda g, J, abar: (g + (1 - abar).sqrt() * _back(g, J)) / abar.sqrt(),
            "x_0-hat is x_t minus the noise: the sign of the noise's part is wrong.",
        ),
        Misconception(
            "division by sqrt(alpha_bar) forgotten",
            lambda g, J, abar: g - (1 - abar).sqrt() * _back(g, J),
            "x_0-hat is stretched by 1 / sqrt(alpha_bar_t), and so is the gradient.",
        ),
        Misconception(
            "multiplied by sqrt(alpha_bar)",
            lambda g, J, abar: (g - (1 - abar).sqrt() * _back(g, J)) * abar.sqrt(),
            "x_0-hat is divided by sqrt(alpha_bar_t), not multiplied.",
        ),
        Misconception(
            "divided by alpha_bar",
            lambda g, J, abar: (g - (1 - abar).sqrt() * _back(g, J)) / abar,
            "The root is missing: divide by sqrt(alpha_bar_t).",
        ),
        Misconception(
            "1 - alpha_bar without its root",
            lambda g, J, abar: (g - (1 - abar) * _back(g, J)) / abar.sqrt(),
            "The noise's factor is sqrt(1 - alpha_bar_t): the root is missing.",
        ),
        Misconception(
            "factor of the noise forgotten",
            lambda g, J, abar: (g - _back(g, J)) / abar.sqrt(),
            "The noise is subtracted with the factor sqrt(1 - alpha_bar_t).",
        ),
        Misconception(
            "factors swapped",
            lambda g, J, abar: (g - abar.sqrt() * _back(g, J)) / (1 - abar).sqrt(),
            "alpha_bar_t and 1 - alpha_bar_t have changed places.",
        ),
        Misconception(
            "denoiser's part alone",
            lambda g, J, abar: -(1 - abar).sqrt() * _back(g, J) / abar.sqrt(),
            "x_0-hat depends on x_t directly, too: the term g is missing.",
        ),
        Misconception(
            "Jacobian of the noise taken for that of x_0-hat",
            lambda g, J, abar: _back(g, J),
            "What is given is the Jacobian of the predicted noise; that of x_0-hat follows from it.",
        ),
        Misconception(
            "mean over the batch",
            lambda g, J, abar: clip_guidance.gradient_through_x_0(g, J, abar) / len(g),
            "Each sample has its own gradient: differentiate the sum over the batch, not the mean.",
        ),
        Misconception(
            "one Jacobian for all",
            lambda g, J, abar: clip_guidance.gradient_through_x_0(g, J[:1].expand_as(J), abar),
            "The first sample's Jacobian is used for all: each has its own.",
        ),
    ),
)


EXERCISES = [
    COSINE_SIMILARITY_MATRIX,
    INFO_NCE,
    MASKED_ATTENTION,
    SENTENCE_FEATURES,
    ZERO_SHOT_PROBABILITIES,
    COSINE_GRADIENT,
    SIMILARITY_GRADIENT,
    GRADIENT_THROUGH_X_0,
]
