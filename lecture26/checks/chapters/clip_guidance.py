"""Exercises of chapter 04: similarities, InfoNCE and its training, reading a text, gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lecture26 import clip_guidance
from lecture26.ddpm import linear_betas

from ..callables import CallableArgument
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
from ..optimizers import OptimizerArgument


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


def _reading_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, length, width = draws.integer(3, 4), draws.integer(6, 7), draws.integer(4, 5)
    side = draws.integer(3, 5)

    def case(note, batch, length, width, mask=None, longer=2, depth=3, **kind):
        tokens = torch.tensor([[draws.integer(0, 8) for _ in range(length)] for _ in range(batch)])
        table = draws.normal(9, width, **kind).detach()
        places = draws.normal(length + longer, width, **kind)
        square = [draws.normal(width, width, **kind).detach() for _ in range(depth + 1)]
        blocks = tuple(CallableArgument("reading_block", (weight,)) for weight in square[:-1])
        norm = CallableArgument("linear", (square[-1], draws.normal(width, **kind).detach()))
        return Case(note, (tokens, CallableArgument("token_table", (table,)), places, blocks, norm, mask))

    there = torch.arange(length) < torch.tensor([2, length, length - 1, 3])[:batch, None]  # (batch, length)
    scattered = (draws.uniform(length, length) < 0.5) | torch.eye(length, dtype=torch.bool)
    return [
        case("texts shorter than the table of places", batch, length, width),
        case("texts as long as the table of places", batch, length, width, longer=0),
        case("all axes of one length", side, side, side, longer=0, depth=2),
        case("a single text", 1, length, width),
        case("a single token", batch, 1, width),
        case("a single block", batch, length, width, depth=1),
        case("a mask for padding", batch, length, width, mask=there[:, None, None, :]),
        case("any mask", batch, length, width, mask=scattered),
        case("float32", batch, length, width, dtype=torch.float32),
        case("places with gradient", batch, length, width, gradient=True),
    ]


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _one_by_one(h: Tensor, blocks: tuple, mask: Tensor) -> Tensor:
    for block in blocks:
        h = block(h, mask)
    return h


def _reading(
    start: Callable = lambda vectors, places: vectors + places[: vectors.shape[1]],
    mask_of: Callable = lambda mask, length: _causal(length) if mask is None else mask,
    through: Callable = _one_by_one,
    end: Callable = lambda norm, h: norm(h),
) -> Callable:
    """read_tokens with one of its parts changed; through(h, blocks, mask) is the way through the blocks."""

    def wrong(tokens, embed, places, blocks, norm, mask=None):
        mask = mask_of(mask, tokens.shape[1])
        return end(norm, through(start(embed(tokens), places), blocks, mask))

    return wrong


def _always_from_the_start(h: Tensor, blocks: tuple, mask: Tensor) -> Tensor:
    for block in blocks:
        last = block(h, mask)
    return last


def _added_once_more(h: Tensor, blocks: tuple, mask: Tensor) -> Tensor:
    for block in blocks:
        h = h + block(h, mask)
    return h


def _normalised_after_each(tokens, embed, places, blocks, norm, mask=None):
    h = embed(tokens) + places[: tokens.shape[1]]
    for block in blocks:
        h = norm(block(h, _causal(tokens.shape[1]) if mask is None else mask))
    return h


def _normalised_first(tokens, embed, places, blocks, norm, mask=None):
    h = norm(embed(tokens) + places[: tokens.shape[1]])
    for block in blocks:
        h = block(h, _causal(tokens.shape[1]) if mask is None else mask)
    return h


READ_TOKENS = Exercise(
    "clip_guidance.read_tokens",
    '"A transformer that reads from left to right", equations (4.16) and (4.18)',
    clip_guidance.read_tokens,
    _reading_cases,
    (
        Misconception(
            "looks ahead",
            _reading(mask_of=lambda mask, length: _causal(length).T if mask is None else mask),
            "Rows of the mask are the tokens that look: here each looks at those behind it. Transpose it.",
        ),
        Misconception(
            "all look at all",
            _reading(
                mask_of=lambda mask, length: (
                    torch.ones(length, length, dtype=torch.bool) if mask is None else mask
                )
            ),
            "Without a mask each token looks at itself and those before it only: the causal mask is missing.",
        ),
        Misconception(
            "not at itself",
            _reading(mask_of=lambda mask, length: _causal(length).tril(-1) if mask is None else mask),
            "A token may look at itself as well; the first one has nobody else.",
        ),
        Misconception(
            "given mask ignored",
            _reading(mask_of=lambda mask, length: _causal(length)),
            "Where a mask is given, it decides, and not the causal one.",
        ),
        Misconception(
            "given mask made causal",
            _reading(
                mask_of=lambda mask, length: _causal(length) if mask is None else mask & _causal(length)
            ),
            "Where a mask is given, it alone decides; here later tokens are hidden besides.",
        ),
        Misconception(
            "places forgotten",
            _reading(start=lambda vectors, places: vectors + 0 * places[0]),
            "Attention does not know where a token is: the vectors of the places are missing.",
        ),
        Misconception(
            "places from the end of the table",
            _reading(start=lambda vectors, places: vectors + places[-vectors.shape[1] :]),
            "The first token stands at the first place, however long the table is.",
        ),
        Misconception(
            "places in the opposite order",
            _reading(start=lambda vectors, places: vectors + places[: vectors.shape[1]].flip(0)),
            "The first token stands at the first place: the order is turned.",
        ),
        Misconception(
            "first place for all",
            _reading(start=lambda vectors, places: vectors + places[:1]),
            "Each token has a place of its own; here all stand at the first.",
        ),
        Misconception(
            "multiplied by the places",
            _reading(start=lambda vectors, places: vectors * places[: vectors.shape[1]]),
            "Token and place are added.",
        ),
        Misconception(
            "vectors scaled by sqrt(D)",
            _reading(
                start=lambda vectors, places: vectors * vectors.shape[2] ** 0.5 + places[: vectors.shape[1]]
            ),
            "Vaswani et al. scale the tokens' vectors by sqrt(D); CLIP does not.",
        ),
        Misconception(
            "norm forgotten",
            _reading(end=lambda norm, h: h),
            "The last normalisation is missing.",
        ),
        Misconception(
            "norm before the blocks",
            _normalised_first,
            "The last normalisation comes after the blocks, which normalise their own inputs.",
        ),
        Misconception(
            "norm after each block",
            _normalised_after_each,
            "The last normalisation is done once, after the last block.",
        ),
        Misconception(
            "blocks in the opposite order",
            _reading(through=lambda h, blocks, mask: _one_by_one(h, blocks[::-1], mask)),
            "The blocks come in their order, the first one first.",
        ),
        Misconception(
            "first block alone",
            _reading(through=lambda h, blocks, mask: blocks[0](h, mask)),
            "All blocks are gone through, not the first one alone.",
        ),
        Misconception(
            "each block from the start",
            _reading(through=_always_from_the_start),
            "Each block takes what the one before has made; here each takes the first vectors.",
        ),
        Misconception(
            "added once more",
            _reading(through=_added_once_more),
            "A block adds to its input by itself: h is not added again.",
        ),
        Misconception(
            "no blocks",
            _reading(through=lambda h, blocks, mask: h),
            "The tokens have not looked at each other: go through the blocks.",
        ),
    ),
)


def _contrastive_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, elements, width = draws.integer(5, 6), draws.integer(7, 8), draws.integer(3, 4)

    def case(note, batch, elements, width, tau, rate=0.1, dtype=torch.float64):
        numbers = {"dtype": dtype, "gradient": True}
        inward, outward = draws.normal(elements, 7, **numbers), draws.normal(7, width, **numbers)
        table = draws.normal(9, width, **numbers)
        logit_scale = cast(torch.tensor(tau, dtype=torch.float64), **numbers)
        weights = (inward, outward, table, logit_scale)
        old = tuple(draws.normal(*weight.shape, dtype=dtype) for weight in weights)
        tokens = torch.tensor([[draws.integer(0, 8) for _ in range(4)] for _ in range(batch)])
        x = draws.normal(batch, elements, dtype=dtype)
        towers = (
            CallableArgument("clean_tower", (inward, outward)),
            CallableArgument("text_tower", (table,)),
        )
        return Case(note, (OptimizerArgument(weights, old, rate), *towers, x, tokens, logit_scale))

    return [
        case("a gradient longer than 1", batch, elements, width, 3.0),
        case("a gradient shorter than 1", batch, elements, width, 0.1),
        case("a larger rate", batch, elements, width, 2.0, rate=0.3),
        case("many pairs", 24, elements, width, 2.5),
        case("as many pairs as features", width, elements, width, 1.5),
        case("a single pair", 1, elements, width, 1.0),
        case("a factor above its range", batch, elements, width, math.log(100) + 0.8),
        case("a factor below its range", batch, elements, width, -0.8),
        case("float32", batch, elements, width, 2.0, dtype=torch.float32),
    ]


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _clip_loss(encode_image, encode_text, x, tokens, logit_scale):
    u, v = normalize(encode_image(x), dim=1), normalize(encode_text(tokens), dim=1)
    return clip_guidance.info_nce(u, v, logit_scale)


def _contrastive(
    loss_of: Callable = _clip_loss,
    shorten: Callable = lambda weights: nn.utils.clip_grad_norm_(weights, 1.0),
    put_back: Callable = lambda tau: tau.clamp_(0, clip_guidance.MAX_LOGIT_SCALE),
    clear: Callable = lambda optimizer: optimizer.zero_grad(),
) -> Callable:
    """contrastive_step with one of its parts changed."""

    def wrong(optimizer, encode_image, encode_text, x, tokens, logit_scale):
        loss = loss_of(encode_image, encode_text, x, tokens, logit_scale)
        clear(optimizer)
        loss.backward()
        shorten(_weights(optimizer))
        optimizer.step()
        with torch.no_grad():
            put_back(logit_scale)
        return loss.detach()

    return wrong


def _to_length_1(weights: list[Tensor]) -> None:
    length = torch.stack([weight.grad.norm() for weight in weights]).norm()
    for weight in weights:
        weight.grad /= length.clamp(min=1e-6)


def _cleared_before_the_step(optimizer, encode_image, encode_text, x, tokens, logit_scale):
    loss = _clip_loss(encode_image, encode_text, x, tokens, logit_scale)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    with torch.no_grad():
        logit_scale.clamp_(0, clip_guidance.MAX_LOGIT_SCALE)
    return loss.detach()


def _put_back_before(optimizer, encode_image, encode_text, x, tokens, logit_scale):
    with torch.no_grad():
        logit_scale.clamp_(0, clip_guidance.MAX_LOGIT_SCALE)
    return _contrastive(put_back=lambda tau: None)(
        optimizer, encode_image, encode_text, x, tokens, logit_scale
    )


def _loss_after(optimizer, encode_image, encode_text, x, tokens, logit_scale):
    clip_guidance.contrastive_step(optimizer, encode_image, encode_text, x, tokens, logit_scale)
    return _clip_loss(encode_image, encode_text, x, tokens, logit_scale).detach()


def _stepped_twice(optimizer, encode_image, encode_text, x, tokens, logit_scale):
    loss = clip_guidance.contrastive_step(optimizer, encode_image, encode_text, x, tokens, logit_scale)
    optimizer.step()
    with torch.no_grad():
        logit_scale.clamp_(0, clip_guidance.MAX_LOGIT_SCALE)
    return loss


def _one_direction(encode_image, encode_text, x, tokens, logit_scale):
    u, v = normalize(encode_image(x), dim=1), normalize(encode_text(tokens), dim=1)
    return cross_entropy(_logits(u, v, logit_scale), torch.arange(len(u)))


def _with_features(u_of: Callable, v_of: Callable) -> Callable:
    def loss_of(encode_image, encode_text, x, tokens, logit_scale):
        return clip_guidance.info_nce(u_of(encode_image(x)), v_of(encode_text(tokens)), logit_scale)

    return loss_of


def _rows(features: Tensor) -> Tensor:
    return normalize(features, dim=1)


CONTRASTIVE_STEP = Exercise(
    "clip_guidance.contrastive_step",
    '"Learning it"',
    clip_guidance.contrastive_step,
    _contrastive_cases,
    (
        Misconception(
            "features not normalised",
            _contrastive(_with_features(lambda u: u, lambda v: v)),
            "The towers' features have any length, and info_nce wants length 1: normalise both.",
        ),
        Misconception(
            "texts not normalised",
            _contrastive(_with_features(_rows, lambda v: v)),
            "The texts' features have lengths too: normalise them as well.",
        ),
        Misconception(
            "images not normalised",
            _contrastive(_with_features(lambda u: u, _rows)),
            "The images' features have lengths too: normalise them as well.",
        ),
        Misconception(
            "normalised along the batch",
            _contrastive(_with_features(lambda u: normalize(u, dim=0), lambda v: normalize(v, dim=0))),
            "Each row is one feature vector, and is to have length 1; here the columns have.",
        ),
        Misconception(
            "one direction",
            _contrastive(_one_direction),
            "This is one riddle only, which caption belongs to the image. info_nce poses both.",
        ),
        Misconception(
            "factor for its logarithm",
            _contrastive(lambda f, g, x, tokens, tau: _clip_loss(f, g, x, tokens, tau.exp())),
            "info_nce takes the logarithm, and makes the factor of it.",
        ),
        Misconception(
            "scale detached",
            _contrastive(lambda f, g, x, tokens, tau: _clip_loss(f, g, x, tokens, tau.detach())),
            "logit_scale is learned along with the towers: its gradient must not be cut.",
        ),
        Misconception(
            "captions one place further",
            _contrastive(lambda f, g, x, tokens, tau: _clip_loss(f, g, x, tokens.roll(1, 0), tau)),
            "Row i of the tokens belongs to image i; here each image gets another one's caption.",
        ),
        Misconception(
            "old gradients kept",
            _contrastive(clear=lambda optimizer: None),
            "backward adds to the gradients that are there: those of the step before must be cleared.",
        ),
        Misconception(
            "cleared before the step",
            _cleared_before_the_step,
            "When the optimizer steps, the gradients are empty. Ask of each line whether it fills or empties "
            "them.",
        ),
        Misconception(
            "gradient not shortened",
            _contrastive(shorten=lambda weights: None),
            "A gradient longer than 1 is to be shortened, between backward and the step.",
        ),
        Misconception(
            "each tensor shortened by itself",
            _contrastive(shorten=lambda ws: [nn.utils.clip_grad_norm_([weight], 1.0) for weight in ws]),
            "The length is that of all weights' gradients together: shorten them by one factor, so that the "
            "direction stays.",
        ),
        Misconception(
            "values cut off",
            _contrastive(shorten=lambda weights: nn.utils.clip_grad_value_(weights, 1.0)),
            "Single values are cut off here, which turns the gradient. Its length is to be limited.",
        ),
        Misconception(
            "always of length 1",
            _contrastive(shorten=_to_length_1),
            "A gradient shorter than 1 stays as it is; here it is stretched.",
        ),
        Misconception(
            "scale shortened apart",
            _contrastive(shorten=lambda ws: nn.utils.clip_grad_norm_(ws[:-1], 1.0)),
            "logit_scale is one of the weights: its gradient counts with the others', and is shortened with "
            "them.",
        ),
        Misconception(
            "scale not put back",
            _contrastive(put_back=lambda tau: None),
            "After the step tau may have left its range: put it back, (4.20).",
        ),
        Misconception(
            "scale put back before the step",
            _put_back_before,
            "tau is put back before the step, which may take it out of its range again.",
        ),
        Misconception(
            "range of the factor",
            _contrastive(put_back=lambda tau: tau.clamp_(1, 100)),
            "1 and 100 limit the factor; logit_scale is its logarithm.",
        ),
        Misconception(
            "no lower limit",
            _contrastive(put_back=lambda tau: tau.clamp_(max=clip_guidance.MAX_LOGIT_SCALE)),
            "The factor is not to fall below 1, so tau not below 0.",
        ),
        Misconception(
            "loss after the step",
            _loss_after,
            "The loss is computed anew after the weights have moved. Return the one that the step began "
            "with.",
        ),
        Misconception(
            "two steps",
            _stepped_twice,
            "The optimizer steps twice along one gradient. There is one step for each gradient.",
        ),
        Misconception(
            "uphill",
            _contrastive(lambda *arguments: -_clip_loss(*arguments)),
            "The weights move up the loss. The optimizer goes against the gradient by itself.",
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
        Case("one text for all", (draws.normal(batch, d), draws.normal(1, d))),
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


def _cosine(features: Tensor, texts: Tensor) -> Tensor:
    """The similarity of each image and its own text, (B,)."""
    return torch.cosine_similarity(features, texts.expand_as(features), dim=1)


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
            gradient_of_outputs(_cosine),
            "This stops at the image's features: go on to the pixels, through the tower.",
        ),
        Misconception(
            "gradients not switched on",
            gradient_in_the_mode_around(_cosine),
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
    few, many, side = draws.integer(3, 4), draws.integer(6, 7), draws.integer(4, 5)
    num_steps = 40
    kept = (1 - linear_betas(num_steps)).cumprod(0)

    def case(
        note, *shape, dim=5, texts=None, mode="grad", dtype=torch.float64, gradient=False, weights=False
    ):
        elements, numbers = math.prod(shape[1:]), {"dtype": dtype, "gradient": weights}
        denoiser = CallableArgument("noisy_denoiser", draws.denoiser_weights(elements, **numbers))
        x_0_of = CallableArgument("predicted_clean", (kept.to(dtype),))
        inward, outward = draws.normal(elements, 7, **numbers), draws.normal(7, dim, **numbers)
        tower = CallableArgument("clean_tower", (inward, outward))
        x_t = draws.normal(*shape, dtype=dtype, gradient=gradient)
        t = draws.permutation(num_steps // 2)[: shape[0]]  # in the cleaner half, where x_0-hat is of size 1
        text_features = 3 * draws.normal(texts or shape[0], dim, dtype=dtype)
        return Case(note, (denoiser, x_0_of, tower, x_t, t, text_features), mode)

    return [
        case("points", many, 2),
        case("images", few, 3, 2, 2),
        case("as many samples as features and elements", side, side, dim=side),
        case("a batch of one", 1, 3, 2, 2),
        case("one text for all", few, 3, 2, 2, texts=1),
        case("float32 images", few, 3, 2, 2, dtype=torch.float32),
        case("points that carry gradient", few, 3, gradient=True),
        case("networks whose weights carry gradient", few, 4, weights=True),
        case("under no_grad, as in a sampler", few, 3, 2, 2, mode="no_grad"),
        case("under inference_mode", few, 4, weights=True, mode="inference_mode"),
    ]


def _seen_as(shown: Callable, score: Callable = _cosine, at: str = "x_t") -> Callable:
    """similarity_gradient_through_x_0 that shows something else to the CLIP, or takes another score.

    shown(output, x_0_of, x_t, t): what the CLIP is shown; at: where the gradient is taken, or "shown".
    """

    def wrong(denoiser, x_0_of, encode_image, x_t, t, text_features):
        with torch.inference_mode(False), torch.enable_grad():
            x_t, t, texts = x_t.detach().clone().requires_grad_(), t.clone(), text_features.clone()
            output = denoiser(x_t, t)
            image = shown(output, x_0_of, x_t, t)
            features = encode_image(image)
            total = score(features, texts.expand_as(features)).sum()
            return output.detach(), torch.autograd.grad(total, x_t if at == "x_t" else image)[0]

    return wrong


def _as_it_is(output: Tensor, x_0_of: Callable, x_t: Tensor, t: Tensor) -> Tensor:
    return x_0_of(output, x_t, t)


def _through_with(**changes: Callable) -> Callable:
    return with_arguments(clip_guidance.similarity_gradient_through_x_0, **changes)


def _changed_pair(change: Callable[[Tensor, Tensor], tuple]) -> Callable:
    """similarity_gradient_through_x_0 with its pair of results changed."""
    return lambda *arguments: change(*clip_guidance.similarity_gradient_through_x_0(*arguments))


def _unit_gradient(gradient: Tensor) -> Tensor:
    return gradient / gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))


def _x_0_returned(denoiser, x_0_of, encode_image, x_t, t, text_features):
    arguments = denoiser, x_0_of, encode_image, x_t, t, text_features
    output, gradient = clip_guidance.similarity_gradient_through_x_0(*arguments)
    return x_0_of(output, x_t.detach(), t), gradient


def _in_the_mode_around(denoiser, x_0_of, encode_image, x_t, t, text_features):
    x_t = x_t.detach().clone().requires_grad_()
    output = denoiser(x_t, t)
    similarity = _cosine(encode_image(x_0_of(output, x_t, t)), text_features)
    return output.detach(), torch.autograd.grad(similarity.sum(), x_t)[0]


THROUGH_X_0 = Exercise(
    "clip_guidance.similarity_gradient_through_x_0",
    '"A clean CLIP and the predicted image", equation (4.26)',
    clip_guidance.similarity_gradient_through_x_0,
    _through_x_0_cases,
    (
        Misconception(
            "noise detached",
            _seen_as(lambda output, x_0_of, x_t, t: x_0_of(output.detach(), x_t, t)),
            "The predicted noise depends on x_t, too: detached, the gradient asks for changes that the data "
            "do not allow, (4.27).",
        ),
        Misconception(
            "x_t detached in x_0-hat",
            _seen_as(lambda output, x_0_of, x_t, t: x_0_of(output, x_t.detach(), t)),
            "x_0-hat depends on x_t directly, too, and not by way of the noise alone.",
        ),
        Misconception(
            "clamped before the gradient",
            _seen_as(lambda output, x_0_of, x_t, t: x_0_of(output, x_t, t).clamp(-1, 1)),
            "A clamp's derivative is 0 where a pixel lies outside [-1, 1]: just those are to be moved.",
        ),
        Misconception(
            "gradient at x_0-hat",
            _seen_as(_as_it_is, at="shown"),
            "This is the gradient with respect to x_0-hat: go back through the denoiser to x_t.",
        ),
        Misconception(
            "clean CLIP on x_t",
            _seen_as(lambda output, x_0_of, x_t, t: x_t),
            "A CLIP that knows no noise gets the noisy x_t here: show it the predicted image.",
        ),
        Misconception(
            "predicted noise shown",
            _seen_as(lambda output, x_0_of, x_t, t: output),
            "The CLIP is shown the denoiser's output, the noise: make x_0-hat of it.",
        ),
        Misconception(
            "one step for the whole batch",
            _through_with(t=lambda t, **_: t[:1].expand_as(t)),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "papers' t for code's",
            _through_with(t=lambda t, **_: t + 1),
            "1 is added to t. Code counts steps from 0.",
        ),
        Misconception(
            "mean over the batch",
            _changed_pair(lambda output, gradient: (output, gradient / len(gradient))),
            "The mean makes each gradient B times too small, so that the guidance depends on the batch size.",
        ),
        Misconception(
            "features not normalised",
            _seen_as(_as_it_is, lambda u, v: (u * v).sum(1)),
            "The inner product's gradient grows with the features' lengths: take that of the cosine.",
        ),
        Misconception(
            "text features not normalised",
            _seen_as(_as_it_is, lambda u, v: (normalize(u, dim=1) * v).sum(1)),
            "The text's features have a length, too: with it, some prompts would pull harder than others.",
        ),
        Misconception(
            "first text for all",
            _through_with(text_features=lambda text_features, **_: text_features[:1]),
            "The first text is used for all: each sample has its own.",
        ),
        Misconception(
            "every text for every image",
            _seen_as(_as_it_is, lambda u, v: normalize(u, dim=1) @ normalize(v, dim=1).T),
            "Image i has its own text, in row i; here all texts pull at every image.",
        ),
        Misconception(
            "sign turned",
            _changed_pair(lambda output, gradient: (output, -gradient)),
            "This leads away from the text.",
        ),
        Misconception(
            "gradient normalised",
            _changed_pair(lambda output, gradient: (output, _unit_gradient(gradient))),
            "The gradient's length says how much there is to gain: do not normalise it.",
        ),
        Misconception(
            "results in the other order",
            _changed_pair(lambda output, gradient: (gradient, output)),
            "The denoiser's output comes first, then the gradient.",
        ),
        Misconception(
            "x_0-hat for the output",
            _x_0_returned,
            "The denoiser's own output is asked for, as the sampler wants it, not the predicted image.",
        ),
        Misconception(
            "gradients not switched on",
            _in_the_mode_around,
            "Samplers run under no_grad or inference_mode: without enable_grad nothing is differentiated.",
        ),
    ),
)


EXERCISES = [
    COSINE_SIMILARITY_MATRIX,
    INFO_NCE,
    MASKED_ATTENTION,
    READ_TOKENS,
    SENTENCE_FEATURES,
    CONTRASTIVE_STEP,
    COSINE_GRADIENT,
    SIMILARITY_GRADIENT,
    THROUGH_X_0,
]
