"""Exercises of chapter 05: the implicit classifier, both conventions, dropout, rescaling, interval."""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from lecture26 import classifier_free_guidance as guidance

from ..core import Case, Exercise, Misconception
from ..draws import Draws, batches, cast, transposed
from ..mistakes import per_sample, schedule_mistakes, unit, with_arguments, with_result


def _mixed(draws: Draws, *shape: int, **kind) -> tuple[Tensor, Tensor]:
    """Two predictions with different means and spreads in every sample, as large as they are in real life."""

    def one() -> Tensor:
        each = shape[:1] + (1,) * (len(shape) - 1)
        drawn = draws.uniform(*each, low=0.6, high=1.8) * draws.normal(*shape) + draws.normal(*each)
        return cast(drawn, **kind)

    return one(), one()


def _pair_cases(seed: int, settings: tuple[tuple, ...]) -> list[Case]:
    """Cases of two predictions and what follows them, one for each of at least nine settings."""
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 8), draws.integer(4, 5)
    kinds = [
        ("points", (many, 3), {}),
        ("images", (few, 3, 4, 6), {}),
        ("as many samples as elements", (side, side), {}),
        ("images as wide as the batch is long", (side, 3, side, side), {}),
        ("a batch of one", (1, 3, 2, 5), {}),
        ("float32 points", (few, many), {"dtype": torch.float32}),
        ("float32 images with gradient", (few, 2, 4, 3), {"dtype": torch.float32, "gradient": True}),
        ("points with gradient", (many, 2), {"gradient": True}),
        ("grey images", (many, 1, 4, 4), {}),
        ("large images", (few, 3, 8, 7), {}),
    ]
    cases = [
        Case(note, (*_mixed(draws, *shape, **kind), *rest))
        for (note, shape, kind), rest in zip(kinds, settings, strict=True)
    ]
    one, other, *rest = cases[1].arguments
    return [*cases, Case("images that are not contiguous", (transposed(one), transposed(other), *rest))]


# The implicit classifier


def _implicit_gradient_cases(seed: int) -> list[Case]:
    cases = [Case(b.note, (b.normal(), b.normal(), b.alpha_bar)) for b in batches(seed)]
    note, (eps_cond, eps_uncond, alpha_bar) = cases[2].note, cases[2].arguments
    apart = (transposed(eps_cond), transposed(eps_uncond), alpha_bar)
    return [*cases, Case(f"not contiguous, {note}", apart)]


def _difference_times(factor: Callable[[Tensor], Tensor]) -> Callable:
    """The difference of both predictions with any function of alpha_bar in front, right or wrong."""
    return lambda eps_cond, eps_uncond, alpha_bar: (eps_uncond - eps_cond) * factor(alpha_bar)


def _gradient_of(difference: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Any function of both predictions, divided by the right root."""
    return lambda eps_cond, eps_uncond, alpha_bar: difference(eps_cond, eps_uncond) / (1 - alpha_bar).sqrt()


IMPLICIT_GRADIENT = Exercise(
    "classifier_free_guidance.implicit_gradient",
    '"The classifier that was there already", equation (5.1)',
    guidance.implicit_gradient,
    _implicit_gradient_cases,
    (
        Misconception(
            "sign",
            _difference_times(lambda alpha_bar: -(1 - alpha_bar).rsqrt()),
            "The sign is the other way round: noise points away from the data, so that a score is minus the "
            "noise, divided by its standard deviation.",
        ),
        Misconception(
            "no root",
            _difference_times(lambda alpha_bar: 1 / (1 - alpha_bar)),
            "The noise is divided by its standard deviation, the root of 1 - alpha_bar, not by its variance.",
        ),
        Misconception(
            "sqrt(alpha_bar) for sqrt(1 - alpha_bar)",
            _difference_times(torch.rsqrt),
            "sqrt(alpha_bar) belongs to the signal. A score is the noise divided by sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "alpha_bar for sqrt(1 - alpha_bar)",
            _difference_times(torch.reciprocal),
            "alpha_bar is what is left of the signal's variance. The divisor is the noise's, and its root.",
        ),
        Misconception(
            "1 - sqrt(alpha_bar)",
            _difference_times(lambda alpha_bar: 1 / (1 - alpha_bar.sqrt())),
            "The root is taken of alpha_bar alone. It is the root of the difference 1 - alpha_bar.",
        ),
        Misconception(
            "difference of the noises",
            _difference_times(torch.ones_like),
            "This is a difference of noises. To be one of scores, it has to be divided by sqrt(1 - "
            "alpha_bar).",
        ),
        Misconception(
            "difference of the noises, and sign",
            _difference_times(lambda alpha_bar: -torch.ones_like(alpha_bar)),
            "eps_cond - eps_uncond is a difference of noises: as one of scores, it has the other sign and is "
            "divided by sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "multiplied by the noise level",
            _difference_times(lambda alpha_bar: (1 - alpha_bar).sqrt()),
            "A score becomes noise by multiplying with the root, and noise a score by dividing.",
        ),
        Misconception(
            "factor of an x_0-prediction",
            _difference_times(lambda alpha_bar: alpha_bar.sqrt() / (1 - alpha_bar)),
            "This is the factor for two predictions of x_0; these are predictions of the noise.",
        ),
        Misconception(
            "factor of a v-prediction",
            _difference_times(lambda alpha_bar: (alpha_bar / (1 - alpha_bar)).sqrt()),
            "This is the factor for two predictions of v; these are predictions of the noise.",
        ),
        Misconception(
            "conditional score",
            _gradient_of(lambda eps_cond, eps_uncond: -eps_cond),
            "This is the score of the class. The classifier's gradient is what it has more than the "
            "unconditional one.",
        ),
        Misconception(
            "unconditional score",
            _gradient_of(lambda eps_cond, eps_uncond: -eps_uncond),
            "This is the unconditional score. The classifier's gradient is what the class adds to it.",
        ),
        Misconception(
            "sum for difference",
            _gradient_of(lambda eps_cond, eps_uncond: -(eps_cond + eps_uncond)),
            "Both scores are added; Bayes' rule has their difference.",
        ),
        Misconception(
            "doubled",
            _gradient_of(lambda eps_cond, eps_uncond: 2 * (eps_uncond - eps_cond)),
            "It is twice too long: the difference of the two scores is all of it.",
        ),
        Misconception(
            "guided already",
            _gradient_of(lambda eps_cond, eps_uncond: eps_uncond - 2 * eps_cond),
            "This is the guided score at w = 1. Asked for is the classifier's gradient alone.",
        ),
        Misconception(
            "root taken of the difference",
            lambda eps_cond, eps_uncond, alpha_bar: (
                ((eps_uncond - eps_cond) / (1 - alpha_bar).sqrt()).sign()
                * (eps_uncond - eps_cond).abs().sqrt()
            ),
            "The root belongs to 1 - alpha_bar, not to the difference of the predictions.",
        ),
        Misconception(
            "gradient normalised",
            with_result(guidance.implicit_gradient, unit),
            "The gradient's length matters: it falls to 0 where the class is certain. Take it as it is.",
        ),
        Misconception(
            "averaged over the batch",
            lambda *arguments: (
                guidance.implicit_gradient(*arguments).mean(0, keepdim=True).expand_as(arguments[0])
            ),
            "Each sample has a gradient of its own.",
        ),
        Misconception(
            "divided by the batch size",
            lambda *arguments: guidance.implicit_gradient(*arguments) / len(arguments[0]),
            "The gradient must not depend on how many samples there are in the batch.",
        ),
        *schedule_mistakes(guidance.implicit_gradient, "alpha_bar"),
    ),
)


# Mixing, in both conventions

WEIGHTS = ((0.5,), (3.0,), (1.0,), (7,), (-1.0,), (0.0,), (2.5,), (0.3,), (-0.5,), (1.7,))


def _weighted(cond: Callable[[float], float], uncond: Callable[[float], float]) -> Callable:
    """Both predictions with any weights, functions of w, right or wrong."""
    return lambda eps_cond, eps_uncond, w: cond(w) * eps_cond + uncond(w) * eps_uncond


def _mixing_mistakes(reference: Callable) -> tuple[Misconception, ...]:
    """Mistakes that mixing two predictions invites in either convention."""
    names = tuple(signature(reference).parameters)

    def with_uncond(change: Callable[[Tensor], Tensor]) -> Callable:
        return lambda eps_cond, eps_uncond, strength: reference(eps_cond, change(eps_uncond), strength)

    return (
        Misconception(
            "plain mean",
            _weighted(lambda w: 0.5, lambda w: 0.5),
            f"{names[2]} does not appear in the result, which lies halfway between both predictions.",
        ),
        Misconception(
            "only the conditional prediction",
            _weighted(lambda w: 1, lambda w: 0),
            f"This is the conditional prediction, whatever {names[2]} is.",
        ),
        Misconception(
            "only the unconditional prediction",
            _weighted(lambda w: 0, lambda w: 1),
            f"This is the unconditional prediction, whatever {names[2]} is.",
        ),
        Misconception(
            "only the difference",
            _weighted(lambda w: w, lambda w: -w),
            "This is by how much the prediction moves; asked for is the moved prediction.",
        ),
        Misconception(
            "clipped before mixing",
            lambda eps_cond, eps_uncond, strength: reference(
                eps_cond.clamp(-1, 1), eps_uncond.clamp(-1, 1), strength
            ),
            "Both predictions are clipped before they are mixed. Mix first; clipping is the sampler's "
            "business, once the prediction has become an x_0.",
        ),
        Misconception(
            "clipped after mixing",
            lambda *arguments: reference(*arguments).clamp(-1, 1),
            "The mixture is clipped. Predictions of noise are not confined to [-1, 1], and clipping is the "
            "sampler's business.",
        ),
        Misconception(
            "first sample's unconditional prediction for all",
            with_uncond(lambda eps_uncond: eps_uncond[:1].expand_as(eps_uncond)),
            "The first sample's unconditional prediction is used for all. It depends on x_t, and each sample "
            "has its own.",
        ),
        Misconception(
            "unconditional prediction averaged over the batch",
            with_uncond(lambda eps_uncond: eps_uncond.mean(0, keepdim=True)),
            "The unconditional prediction is averaged over the batch. It depends on x_t, and each sample has "
            "its own.",
        ),
        Misconception(
            "samples of the second half in the wrong order",
            with_uncond(lambda eps_uncond: eps_uncond.flip(0)),
            "The two predictions of a sample do not meet: both halves have the samples in the same order.",
        ),
        Misconception(
            "both halves returned",
            lambda *arguments: torch.cat([arguments[0], reference(*arguments)]),
            "The result has the batch size of one half: the mixture alone.",
        ),
    )


CFG_COMBINE = Exercise(
    "classifier_free_guidance.cfg_combine",
    '"Longer than Bayes\' rule", equation (5.2)',
    guidance.cfg_combine,
    lambda seed: _pair_cases(seed, WEIGHTS),
    (
        Misconception(
            "swapped halves",
            _weighted(lambda w: -w, lambda w: 1 + w),
            "The two predictions are swapped: this steers away from the condition. The conditional one has "
            "the weight 1 + w.",
        ),
        Misconception(
            "guidance scale for w",
            _weighted(lambda w: w, lambda w: 1 - w),
            "This is the convention in which 0 is the unconditional prediction and 1 the conditional one, "
            "s = 1 + w. Here w = 0 is the conditional one.",
        ),
        Misconception(
            "plus for minus",
            _weighted(lambda w: 1 + w, lambda w: w),
            "The unconditional prediction is subtracted, so that the weights add up to 1.",
        ),
        Misconception(
            "towards the unconditional prediction",
            _weighted(lambda w: 1 - w, lambda w: w),
            "This moves from the conditional prediction towards the unconditional one. A positive w moves "
            "away from it.",
        ),
        Misconception(
            "minus once",
            _weighted(lambda w: 1 + w, lambda w: -1),
            "The unconditional prediction has the weight w, too: the weights 1 + w and -w add up to 1.",
        ),
        Misconception(
            "conditional prediction without its own 1",
            _weighted(lambda w: w, lambda w: -(1 + w)),
            "The 1 is with the wrong prediction: at w = 0 the conditional one must be left.",
        ),
        Misconception(
            "1 + w times the difference",
            _weighted(lambda w: 1 + w, lambda w: -(1 + w)),
            "This is (1 + w) times the difference of both. The weights must add up to 1: the unconditional "
            "one's is -w.",
        ),
        Misconception(
            "2 + w",
            _weighted(lambda w: 2 + w, lambda w: -(1 + w)),
            "1 is added to w twice: this is guided at w + 1.",
        ),
        Misconception(
            "w twice",
            _weighted(lambda w: 1 + 2 * w, lambda w: -2 * w),
            "This is guided at 2 w.",
        ),
        Misconception(
            "w squared",
            _weighted(lambda w: 1 + w**2, lambda w: -(w**2)),
            "w goes in as it is, not squared.",
        ),
        Misconception(
            "divided by 1 + 2 w",
            _weighted(lambda w: (1 + w) / (1 + 2 * abs(w)), lambda w: -w / (1 + 2 * abs(w))),
            "The weights add up to 1 already, 1 + w - w: nothing has to be normalised.",
        ),
        Misconception(
            "negative w taken for 0",
            _weighted(lambda w: 1 + max(w, 0), lambda w: -max(w, 0)),
            "A negative w is allowed: between -1 and 0 the mixture lies between both predictions.",
        ),
        Misconception(
            "added to the unconditional prediction",
            _weighted(lambda w: 1 + w, lambda w: 1 - w),
            "Both whole predictions are there. It is one of them, plus a multiple of the difference.",
        ),
        *_mixing_mistakes(guidance.cfg_combine),
    ),
)

SCALES = ((1.5,), (4.0,), (2.0,), (8,), (0.0,), (1.0,), (3.5,), (1.3,), (0.5,), (-1.0,))

COMBINE_BY_GUIDANCE_SCALE = Exercise(
    "classifier_free_guidance.combine_by_guidance_scale",
    '"Two ways to count", equation (5.5)',
    guidance.combine_by_guidance_scale,
    lambda seed: _pair_cases(seed, SCALES),
    (
        Misconception(
            "w for the guidance scale",
            _weighted(lambda s: 1 + s, lambda s: -s),
            "This counts as w does, with the conditional prediction at 0. In this convention it is at 1, and "
            "the unconditional one at 0.",
        ),
        Misconception(
            "s - 1 for s",
            _weighted(lambda s: s - 1, lambda s: 2 - s),
            "1 is subtracted once too often: the scale multiplies the difference, counted from the "
            "unconditional prediction.",
        ),
        Misconception(
            "swapped halves",
            _weighted(lambda s: 1 - s, lambda s: s),
            "The two predictions are swapped: a scale of 1 must give the conditional one.",
        ),
        Misconception(
            "sign of the difference",
            _weighted(lambda s: -s, lambda s: 1 + s),
            "The difference has the wrong sign: it leads from the unconditional prediction to the "
            "conditional one.",
        ),
        Misconception(
            "unconditional prediction taken away",
            _weighted(lambda s: s, lambda s: -(1 + s)),
            "The unconditional prediction is what one starts from: it is added, once.",
        ),
        Misconception(
            "scale times the conditional prediction",
            _weighted(lambda s: s, lambda s: 1),
            "The scale multiplies the difference of both, not the conditional prediction: the weights add up "
            "to 1.",
        ),
        Misconception(
            "minus for plus",
            _weighted(lambda s: s, lambda s: s - 1),
            "The unconditional prediction's weight is 1 - s, which is negative for s above 1.",
        ),
        Misconception(
            "scaled as a whole",
            _weighted(lambda s: s, lambda s: 0),
            "This makes the conditional prediction longer. Guidance makes its difference from the "
            "unconditional one longer.",
        ),
        Misconception(
            "conditional prediction for all scales up to 1",
            _weighted(lambda s: s if s > 1 else 1, lambda s: 1 - s if s > 1 else 0),
            "Some libraries do not guide at all for scales up to 1. By the formula 0 gives the unconditional "
            "prediction, and 0.5 one halfway.",
        ),
        Misconception(
            "scale squared",
            _weighted(lambda s: s**2, lambda s: 1 - s**2),
            "The scale goes in as it is, not squared.",
        ),
        Misconception(
            "scale under a root",
            _weighted(lambda s: math.sqrt(abs(s)), lambda s: 1 - math.sqrt(abs(s))),
            "The scale goes in as it is, not under a root.",
        ),
        *_mixing_mistakes(guidance.combine_by_guidance_scale),
    ),
)


# Label dropout


def _labels_after_dropout_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, side = draws.integer(9, 12), draws.integer(4, 5)

    def case(note, count, null_label, p, dtype=torch.float64, sure=None):
        """y below the null labels, all classes of which occur; as many draws below p as can be expected."""
        null_label = torch.tensor(null_label)
        classes = null_label.expand(count, *null_label.shape)
        y = (draws.uniform(*classes.shape) * classes).long()
        u = (torch.arange(count) + draws.uniform(count, low=0.2, high=0.8)) / count
        order = draws.permutation(count)
        if sure is not None:  # whether the first sample loses its labels
            order[[0, int(order.argmin() if sure else order.argmax())]] = order[
                [int(order.argmin() if sure else order.argmax()), 0]
            ]
        return Case(note, (y, null_label, u[order].to(dtype), p))

    return [
        case("one label", batch, 8, 0.3, sure=False),
        case("two labels", batch + 1, (5, 7), 0.4, sure=True),
        case("three labels", batch + 2, (6, 3, 9), 0.6, sure=False),
        case("as many labels as samples", side, tuple(range(3, 3 + side)), 0.5, sure=True),
        case("p = 0", batch, (4, 6), 0.0),
        case("p = 1", batch, (4, 6), 1.0),
        case("p = 0, one label", batch + 3, 10, 0),
        case("a small p, draws in float32", 40, (8, 8), 0.12, dtype=torch.float32),
        case("a large p, one label", 30, 9, 0.85, dtype=torch.float32, sure=True),
        case("many samples", 60, (8, 3), 0.2, sure=False),
    ]


def _dropped_where(choose: Callable[[Tensor, float], Tensor]) -> Callable:
    """Labels dropped where any function of the draws and p says so, right or wrong."""

    def wrong(y, null_label, u, p):
        return torch.where(per_sample(choose(u, p), y), null_label, y)

    return wrong


def _null_changed(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_arguments(
        guidance.labels_after_dropout, null_label=lambda null_label, **_: change(null_label)
    )


def _columns_kept(kept: Callable[[Tensor], Tensor]) -> Callable:
    """Dropped in some of the columns only: `kept` says which ones are not, given the columns' numbers."""

    def wrong(y, null_label, u, p):
        dropped = guidance.labels_after_dropout(y, null_label, u, p)
        return dropped if y.ndim == 1 else torch.where(kept(torch.arange(y.shape[1])), y, dropped)

    return wrong


LABELS_AFTER_DROPOUT = Exercise(
    "classifier_free_guidance.labels_after_dropout",
    '"Dropping labels"',
    guidance.labels_after_dropout,
    _labels_after_dropout_cases,
    (
        Misconception(
            "inverted probability",
            _dropped_where(lambda u, p: u >= p),
            "The labels are kept with probability p and dropped otherwise. p is the probability of dropping.",
        ),
        Misconception(
            "draws from the other end",
            _dropped_where(lambda u, p: u > 1 - p),
            "Labels are dropped as often as they should be, but where u is above 1 - p, not below p.",
        ),
        Misconception(
            "null is class 0",
            _null_changed(torch.zeros_like),
            "Dropped labels become 0, which is a class: the network would learn that class 0 means anything. "
            "Take the null label.",
        ),
        Misconception(
            "null is -1",
            _null_changed(lambda null_label: torch.full_like(null_label, -1)),
            "Dropped labels become -1, for which no table has a row. Take the null label.",
        ),
        Misconception(
            "null is the last class",
            _null_changed(lambda null_label: null_label - 1),
            "1 is subtracted from the null label, which makes it the last class. It is a row more.",
        ),
        Misconception(
            "one more than the null label",
            _null_changed(lambda null_label: null_label + 1),
            "The null label is given; it is one more than the last class already.",
        ),
        Misconception(
            "first null label for all",
            _null_changed(lambda null_label: null_label.flatten()[0].expand_as(null_label)),
            "Each label has a null label of its own, null_label[l].",
        ),
        Misconception(
            "one draw for the batch",
            _dropped_where(lambda u, p: (u[:1] < p).expand_as(u)),
            "The first draw decides for the whole batch. Each sample has a draw of its own.",
        ),
        Misconception(
            "mean draw for the batch",
            _dropped_where(lambda u, p: (u.mean() < p).expand(u.shape)),
            "The mean of the draws decides for the whole batch. Each sample has a draw of its own.",
        ),
        Misconception(
            "never dropped",
            _dropped_where(lambda u, p: torch.zeros_like(u, dtype=torch.bool)),
            "No label is ever dropped: the network would never learn to answer without one.",
        ),
        Misconception(
            "always dropped",
            _dropped_where(lambda u, p: torch.ones_like(u, dtype=torch.bool)),
            "Every label is dropped: the network would never learn to answer with one.",
        ),
        Misconception(
            "p ignored",
            _dropped_where(lambda u, p: u < 0.5),
            "Every second sample is dropped, whatever p is.",
        ),
        Misconception(
            "only the first label dropped",
            _columns_kept(lambda columns: columns > 0),
            "Only the first label is dropped; all labels of a sample go together.",
        ),
        Misconception(
            "only the last label dropped",
            _columns_kept(lambda columns: columns < len(columns) - 1),
            "Only the last label is dropped; all labels of a sample go together.",
        ),
        Misconception(
            "draws along the labels",
            lambda y, null_label, u, p: torch.where(u < p, null_label, y),
            "A tensor of shape (B,) broadcasts against the last axis, that of the labels: make it (B, 1).",
        ),
        Misconception(
            "samples left out",
            lambda y, null_label, u, p: y[u >= p],
            "The samples without labels are left out of the batch. They stay, with the null label.",
        ),
        Misconception(
            "which samples, not their labels",
            lambda y, null_label, u, p: u < p,
            "This says which samples lose their labels. Asked for are the labels.",
        ),
        Misconception(
            "null label added",
            lambda y, null_label, u, p: torch.where(per_sample(u < p, y), y + null_label, y),
            "The null label is added to the class. It takes its place.",
        ),
        Misconception(
            "floating-point labels",
            lambda *arguments: guidance.labels_after_dropout(*arguments).double(),
            "Labels are integers, as y is: multiplying by a mask of numbers turns them into something else.",
        ),
    ),
)


# Rescaling


def _rescaled_cases(seed: int) -> list[Case]:
    shares = ((0.7,), (1.0,), (0.3,), (0.5,), (1,), (0.7,), (0.6,), (0.9,), (0.0,), (0.2,))
    return _pair_cases(seed, shares)


def _all_but_first(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1, tensor.ndim))


def _std(tensor: Tensor) -> Tensor:
    """The standard deviation of each sample, (B, 1, ...)."""
    return tensor.std(_all_but_first(tensor), keepdim=True)


def _by_measure(measure: Callable[[Tensor], Tensor]) -> Callable:
    """Rescaled by any measure of size, right or wrong."""
    return lambda guided, cond, phi: (phi * measure(cond) / measure(guided) + 1 - phi) * guided


def _by_ratio(factor: Callable[[Tensor, float], Tensor]) -> Callable:
    """Guided predictions times any function of the ratio std_cond / std_guided and phi."""
    return lambda guided, cond, phi: factor(_std(cond) / _std(guided), phi) * guided


def _centred(guided, cond, phi):
    mean = guided.mean(_all_but_first(guided), keepdim=True)
    return guidance.rescaled(guided - mean, cond, phi) + mean


def _per_channel(tensor: Tensor) -> Tensor:
    """The standard deviation of each channel of each image; of points as it should be."""
    return tensor.std(tuple(range(2, tensor.ndim)) or (1,), keepdim=True)


RESCALED = Exercise(
    "classifier_free_guidance.rescaled",
    '"Too much contrast", equation (5.12)',
    guidance.rescaled,
    _rescaled_cases,
    (
        Misconception(
            "ratio upside down",
            _by_ratio(lambda ratio, phi: phi / ratio + 1 - phi),
            "The ratio is upside down: the result shall have the conditional prediction's spread.",
        ),
        Misconception(
            "phi and 1 - phi swapped",
            _by_ratio(lambda ratio, phi: (1 - phi) * ratio + phi),
            "phi = 1 must rescale fully and phi = 0 not at all; here it is the other way round.",
        ),
        Misconception(
            "phi ignored",
            _by_ratio(lambda ratio, phi: ratio),
            "It rescales fully, whatever phi is: mix with the guided prediction.",
        ),
        Misconception(
            "not rescaled",
            _by_ratio(lambda ratio, phi: torch.ones_like(ratio)),
            "The guided prediction comes back as it was.",
        ),
        Misconception(
            "variance for standard deviation",
            _by_measure(lambda tensor: _std(tensor).square()),
            "These are variances. The root is missing.",
        ),
        Misconception(
            "rescaled part alone",
            _by_ratio(lambda ratio, phi: phi * ratio),
            "The other part is missing: 1 - phi times the guided prediction.",
        ),
        Misconception(
            "guided prediction added in full",
            _by_ratio(lambda ratio, phi: phi * ratio + 1),
            "The two parts have the weights phi and 1 - phi.",
        ),
        Misconception(
            "phi as an exponent",
            _by_ratio(lambda ratio, phi: ratio**phi),
            "The two predictions are mixed, phi of the one and 1 - phi of the other; the ratio gets no "
            "exponent.",
        ),
        Misconception(
            "never made larger",
            _by_ratio(lambda ratio, phi: phi * ratio.clamp(max=1) + 1 - phi),
            "The ratio is used whatever it is, also where the guided prediction has the smaller spread.",
        ),
        Misconception(
            "one ratio for the batch",
            _by_measure(torch.std),
            "The standard deviation is taken over the whole batch. Each sample has its own, or samples would "
            "change each other.",
        ),
        Misconception(
            "mean ratio of the batch",
            _by_ratio(lambda ratio, phi: phi * ratio.mean() + 1 - phi),
            "The ratios are averaged over the batch. Each sample has its own.",
        ),
        Misconception(
            "first sample's ratio for all",
            _by_ratio(lambda ratio, phi: phi * ratio[:1] + 1 - phi),
            "The first sample's ratio is used for all. Each sample has its own.",
        ),
        Misconception(
            "over the batch",
            _by_measure(lambda tensor: tensor.std(0, correction=0, keepdim=True) + 0 * tensor[:1]),
            "The standard deviation is taken over the samples, for each element. It belongs over the "
            "elements, for each sample.",
        ),
        Misconception(
            "over the last axis",
            _by_measure(lambda tensor: tensor.std(-1, keepdim=True)),
            "Each row of pixels gets a ratio of its own. The standard deviation is taken over all "
            "elements of a sample.",
        ),
        Misconception(
            "channel by channel",
            _by_measure(_per_channel),
            "Each channel gets a ratio of its own, which shifts colours. The standard deviation is taken "
            "over all elements of a sample.",
        ),
        Misconception(
            "axes lost",
            lambda guided, cond, phi: (
                (phi * cond.flatten(1).std(1) / guided.flatten(1).std(1) + 1 - phi) * guided
            ),
            "A tensor of shape (B,) broadcasts against the last axis, not against the batch: keep "
            "(B, 1, ...).",
        ),
        Misconception(
            "length for standard deviation",
            _by_measure(lambda tensor: tensor.square().mean(_all_but_first(tensor), keepdim=True).sqrt()),
            "This is the root of the mean square. The standard deviation is taken around the mean.",
        ),
        Misconception(
            "mean absolute value",
            _by_measure(lambda tensor: tensor.abs().mean(_all_but_first(tensor), keepdim=True)),
            "This is the mean absolute value, not the standard deviation.",
        ),
        Misconception(
            "largest value",
            _by_measure(lambda tensor: tensor.abs().amax(_all_but_first(tensor), keepdim=True)),
            "This is the largest absolute value, which a single pixel decides; take the standard deviation.",
        ),
        Misconception(
            "mean kept",
            _centred,
            "Only what lies around the mean is rescaled. The whole prediction is multiplied by one number.",
        ),
        Misconception(
            "blended with the conditional prediction",
            lambda guided, cond, phi: phi * _std(cond) / _std(guided) * guided + (1 - phi) * cond,
            "The other part is the guided prediction as it was, not the conditional one.",
        ),
        Misconception(
            "conditional prediction rescaled",
            lambda guided, cond, phi: phi * _std(guided) / _std(cond) * cond + (1 - phi) * guided,
            "The roles are swapped: it is the guided prediction that gets the other one's spread.",
        ),
        Misconception(
            "spread of 1",
            lambda guided, cond, phi: (phi / _std(guided) + 1 - phi) * guided,
            "This gives every sample a standard deviation of 1. It shall be the conditional prediction's.",
        ),
        Misconception(
            "divisor forgotten",
            lambda guided, cond, phi: (phi * _std(cond) + 1 - phi) * guided,
            "The guided prediction's own standard deviation is not divided out.",
        ),
        Misconception(
            "ratio detached",
            lambda guided, cond, phi: (phi * (_std(cond) / _std(guided)).detach() + 1 - phi) * guided,
            "The ratio depends on both predictions: no detach() here.",
        ),
    ),
)


# The interval


def _within_interval_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(5, 6), draws.integer(8, 9), draws.integer(5, 6)

    def case(note, *shape, first, last, steps=None, **kind):
        """Both ends, their neighbours, and steps from anywhere; unless steps are given."""
        near = torch.tensor([first, last, first - 1, last + 1]).clamp(0, 999)
        t = torch.cat([near, draws.steps(many, 1000)])[: shape[0]] if steps is None else torch.tensor(steps)
        order = draws.permutation(len(t))
        return Case(note, (*_mixed(draws, *shape, **kind), t[order], first, last))

    start = draws.integer(150, 300)
    return [
        case("points", many, 3, first=start, last=700),
        case("images", few, 3, 4, 2, first=0, last=start),
        case("as many samples as elements", side, side, first=300, last=999),
        case("images as wide as the batch is long", side, 3, side, side, first=start, last=start + 40),
        case("an interval of one step", many, 2, first=500, last=500),
        case("all steps", few, 4, first=0, last=999),
        case("no step inside", 3, 4, first=400, last=600, steps=[100, 399, 601]),
        case("all samples inside", 3, 1, 4, 4, first=400, last=600, steps=[400, 500, 600]),
        case("a batch of one, inside", 1, 3, 2, 5, first=10, last=20, steps=[15]),
        case("float32 points", many, 5, first=start, last=800, dtype=torch.float32),
        case(
            "float32 images with gradient",
            few,
            2,
            3,
            4,
            first=200,
            last=650,
            dtype=torch.float32,
            gradient=True,
        ),
        case("points with gradient", few, 4, first=100, last=start, gradient=True),
    ]


def _guided_where(choose: Callable[[Tensor, int, int], Tensor]) -> Callable:
    """Guided where any function of the steps and the interval's ends says so, right or wrong."""

    def wrong(guided, cond, t, first, last):
        return torch.where(per_sample(choose(t, first, last), guided), guided, cond)

    return wrong


def _otherwise(other: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Something else than the conditional prediction outside of the interval."""
    return lambda guided, cond, t, first, last: guidance.within_interval(
        guided, other(guided, cond), t, first, last
    )


def _inside(t: Tensor, first: int, last: int) -> Tensor:
    return (t >= first) & (t <= last)


WITHIN_INTERVAL = Exercise(
    "classifier_free_guidance.within_interval",
    '"Only where it helps", equation (5.14)',
    guidance.within_interval,
    _within_interval_cases,
    (
        Misconception(
            "inside and outside swapped",
            _guided_where(lambda t, first, last: ~_inside(t, first, last)),
            "It guides outside of the interval and not inside.",
        ),
        Misconception(
            "last step left out",
            _guided_where(lambda t, first, last: (t >= first) & (t < last)),
            "The last step belongs to the interval: both ends are included, other than in Python's ranges.",
        ),
        Misconception(
            "first step left out",
            _guided_where(lambda t, first, last: (t > first) & (t <= last)),
            "The first step belongs to the interval: both ends are included.",
        ),
        Misconception(
            "both ends left out",
            _guided_where(lambda t, first, last: (t > first) & (t < last)),
            "Both ends belong to the interval.",
        ),
        Misconception(
            "only the lower end",
            _guided_where(lambda t, first, last: t >= first),
            "The upper end is missing: it guides at the noisiest steps, too.",
        ),
        Misconception(
            "only the upper end",
            _guided_where(lambda t, first, last: t <= last),
            "The lower end is missing: it guides at the cleanest steps, too.",
        ),
        Misconception(
            "or for and",
            _guided_where(lambda t, first, last: (t >= first) | (t <= last)),
            "Every step is after the first or before the last one: both must hold at once.",
        ),
        Misconception(
            "never guided",
            _guided_where(lambda t, first, last: _inside(t, last + 1, first - 1)),
            "No step is ever inside, as if the ends came in the wrong order.",
        ),
        Misconception(
            "first sample's step for all",
            _guided_where(lambda t, first, last: _inside(t[:1], first, last).expand_as(t)),
            "The first sample's step decides for all. Each sample has a step of its own.",
        ),
        Misconception(
            "all or none, by any",
            _guided_where(lambda t, first, last: _inside(t, first, last).any().expand(t.shape)),
            "If one sample is inside, all are guided. Each sample has a step of its own.",
        ),
        Misconception(
            "all or none, by all",
            _guided_where(lambda t, first, last: _inside(t, first, last).all().expand(t.shape)),
            "Unless all samples are inside, none is guided. Each sample has a step of its own.",
        ),
        Misconception(
            "papers' t for code's",
            _guided_where(lambda t, first, last: _inside(t + 1, first, last)),
            "1 is added to t. The interval counts as code does, from 0.",
        ),
        Misconception(
            "steps counted from the noise",
            _guided_where(lambda t, first, last: _inside(999 - t, first, last)),
            "The steps are counted from the beginning of sampling. t = 0 is the cleanest step, at its end.",
        ),
        Misconception(
            "zero outside",
            _otherwise(lambda guided, cond: torch.zeros_like(cond)),
            "Outside of the interval the prediction is the conditional one, not 0.",
        ),
        Misconception(
            "mean of both outside",
            _otherwise(lambda guided, cond: (guided + cond) / 2),
            "Outside of the interval the prediction is the conditional one alone.",
        ),
        Misconception(
            "difference outside",
            _otherwise(lambda guided, cond: guided - cond),
            "Outside of the interval the prediction is the conditional one, not the difference.",
        ),
        Misconception(
            "conditional prediction added inside",
            lambda guided, cond, t, first, last: guidance.within_interval(
                guided + cond, cond, t, first, last
            ),
            "Inside of the interval the prediction is the guided one alone.",
        ),
        Misconception(
            "steps along the last axis",
            lambda guided, cond, t, first, last: torch.where(_inside(t, first, last), guided, cond),
            "A tensor of shape (B,) broadcasts against the last axis, not against the batch: make it "
            "(B, 1, ...).",
        ),
        Misconception(
            "samples outside left out",
            lambda guided, cond, t, first, last: guided[_inside(t, first, last)],
            "The samples outside of the interval are left out. They stay, with the conditional prediction.",
        ),
    ),
)


EXERCISES = [
    IMPLICIT_GRADIENT,
    CFG_COMBINE,
    COMBINE_BY_GUIDANCE_SCALE,
    LABELS_AFTER_DROPOUT,
    RESCALED,
    WITHIN_INTERVAL,
]
