"""Exercises of chapter 05: mixing, the doubled pass, dropout and training, contrast, the interval."""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from lecture26 import classifier_free_guidance as guidance

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws, cast, transposed
from ..mistakes import (
    per_sample,
    step_mistakes,
    with_arguments,
)
from ..optimizers import OptimizerArgument


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


# Mixing

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

# The doubled pass


def _doubled_pass_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    side, wide, classes = draws.integer(3, 4), draws.integer(5, 6), draws.integer(4, 6)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, shape, variance, kind, mode in (
        ("points", (side, wide), 1, {}, "grad"),
        ("points with variance channels", (side, wide), 2, {}, "grad"),
        ("images", (side, 3, 2, wide), 1, {}, "grad"),
        ("images with variance channels", (side + 1, 3, 3, 2), 2, {}, "no_grad"),
        ("as many samples as elements", (side, side), 2, {}, "grad"),
        ("one sample", (1, 2, 2, 3), 2, {}, "grad"),
        ("one grey image", (1, 1, 3, 3), 1, {}, "grad"),
        ("float32 images with variance channels", (side, 2, 2, 2), 2, {"dtype": float32}, "no_grad"),
        ("float32 points with gradient", (wide, 4), 1, {"dtype": float32, "gradient": True}, "grad"),
        ("images with variance channels, with gradient", (side, 2, 2, 3), 2, {"gradient": True}, "grad"),
        ("inference mode", (side, 1, 2, 2), 2, {}, "inference_mode"),
    ):
        dtype = kind.get("dtype", float64)
        elements = math.prod(shape[1:])
        shapes = (elements, 7), (7,), (classes + 1, 7), (7, variance * elements)
        denoiser = CallableArgument(
            "conditional_denoiser", tuple(draws.normal(*each, dtype=dtype) for each in shapes)
        )
        wanted = torch.tensor([draws.integer(0, classes - 1) for _ in range(shape[0])])
        both_conds = torch.cat([wanted, torch.full_like(wanted, classes)])
        mix = CallableArgument("mixer", (draws.uniform(2, low=1.2, high=2.5, dtype=dtype),))
        given = denoiser, draws.normal(*shape, **kind), draws.steps(shape[0], 100), both_conds, mix
        cases.append(Case(note, given, mode))
    return cases


def _with_inputs(inputs: Callable) -> Callable:
    """doubled_pass with other inputs: (x_t, t, both_conds) -> those that the denoiser gets."""

    def wrong(denoiser, x_t, t, both_conds, mix):
        return _finish(denoiser(*inputs(x_t, t, both_conds)), x_t, mix)

    return wrong


def _finish(outputs: Tensor, x_t: Tensor, mix: Callable) -> Tensor:
    """From the doubled output to the result, as it should be."""
    cond, null = outputs.chunk(2)
    channels = x_t.shape[1]
    return torch.cat([mix(cond[:, :channels], null[:, :channels]), cond[:, channels:]], dim=1)


def _with_outputs(finish: Callable) -> Callable:
    """doubled_pass with another way from both halves to the result: finish(cond, null, C, mix)."""

    def wrong(denoiser, x_t, t, both_conds, mix):
        outputs = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both_conds)
        return finish(*outputs.chunk(2), x_t.shape[1], mix)

    return wrong


def _asked_twice(denoiser, x_t, t, both_conds, mix):
    outputs = torch.cat([denoiser(x_t, t, cond) for cond in both_conds.chunk(2)])
    return _finish(outputs, x_t, mix)


def _neighbours_halved(denoiser, x_t, t, both_conds, mix):
    outputs = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both_conds)
    return _finish(torch.cat([outputs[::2], outputs[1::2]]), x_t, mix)


DOUBLED_PASS = Exercise(
    "classifier_free_guidance.doubled_pass",
    '"A guided denoiser is a denoiser"',
    guidance.doubled_pass,
    _doubled_pass_cases,
    (
        Misconception(
            "halves swapped",
            _with_outputs(
                lambda cond, null, c, mix: torch.cat([mix(null[:, :c], cond[:, :c]), cond[:, c:]], dim=1)
            ),
            "The two predictions reach `mix` in the wrong order: the first half was told the condition.",
        ),
        Misconception(
            "asked twice",
            _asked_twice,
            "The denoiser is called twice. Both answers come from one call, of a batch twice as long.",
        ),
        Misconception(
            "fresh noise in the second half",
            _with_inputs(
                lambda x_t, t, conds: (torch.cat([x_t, torch.randn_like(x_t)]), torch.cat([t, t]), conds)
            ),
            "The second half is another x_t. Both answers are about the same noisy samples.",
        ),
        Misconception(
            "samples side by side",
            _with_inputs(
                lambda x_t, t, conds: (x_t.repeat_interleave(2, dim=0), t.repeat_interleave(2), conds)
            ),
            "Each sample stands beside its double, while the conditions come in two halves: one half of the "
            "samples gets conditions that are not its own.",
        ),
        Misconception(
            "one step for all",
            _with_inputs(lambda x_t, t, conds: (torch.cat([x_t, x_t]), t[:1].expand(2 * len(t)), conds)),
            "The first sample's step is used for all. Each sample has a step of its own, in both halves.",
        ),
        Misconception(
            "second half at step 0",
            _with_inputs(
                lambda x_t, t, conds: (torch.cat([x_t, x_t]), torch.cat([t, torch.zeros_like(t)]), conds)
            ),
            "The second half is told another step. Both halves are equally noisy.",
        ),
        Misconception(
            "every second output",
            _neighbours_halved,
            "The outputs are taken by turns. The conditional ones are all in the first half.",
        ),
        Misconception(
            "variance channels mixed",
            _with_outputs(lambda cond, null, c, mix: mix(cond, null)),
            "The variance channels are mixed as well. They are no predictions: only the first channels, as "
            "many as x_t has, are.",
        ),
        Misconception(
            "variance channels of the null half",
            _with_outputs(
                lambda cond, null, c, mix: torch.cat([mix(cond[:, :c], null[:, :c]), null[:, c:]], dim=1)
            ),
            "The variance channels kept are those of the answer to nothing. Keep the conditional ones.",
        ),
        Misconception(
            "variance channels dropped",
            _with_outputs(lambda cond, null, c, mix: mix(cond[:, :c], null[:, :c])),
            "The variance channels are lost. A sampler looks for them behind the prediction.",
        ),
        Misconception(
            "variance channels in front",
            _with_outputs(
                lambda cond, null, c, mix: torch.cat([cond[:, c:], mix(cond[:, :c], null[:, :c])], dim=1)
            ),
            "The variance channels stand in front. They are the last ones, as in the denoiser's output.",
        ),
        Misconception(
            "last channels for the prediction",
            _with_outputs(
                lambda cond, null, c, mix: torch.cat([cond[:, :-c], mix(cond[:, -c:], null[:, -c:])], dim=1)
            ),
            "The last channels are mixed. The prediction is in the first ones; the last ones are variances.",
        ),
        Misconception(
            "conditional answer alone",
            _with_outputs(lambda cond, null, c, mix: cond),
            "This is the conditional answer: nothing is mixed.",
        ),
        Misconception(
            "unconditional answer alone",
            _with_outputs(lambda cond, null, c, mix: null),
            "This is the answer to nothing: nothing is mixed.",
        ),
        Misconception(
            "both halves returned",
            lambda denoiser, x_t, t, both_conds, mix: torch.cat(
                [guidance.doubled_pass(denoiser, x_t, t, both_conds, mix)] * 2
            ),
            "The result is as long as both halves. It has one row for each sample.",
        ),
    ),
)


# Dynamic thresholding


def _dynamic_threshold_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 8), draws.integer(4, 5)

    def case(note, *shape, quantile, **kind):
        """Samples of different sizes: the first one within [-1, 1] already, unless it is alone."""
        spread = draws.uniform(*shape[:1], low=0.9, high=2.5)
        if shape[0] > 1:
            spread[0] = 0.2
        drawn = (draws.normal(*shape) + 0.2) * per_sample(spread, torch.empty(shape))
        return Case(note, (cast(drawn, **kind), quantile))

    return [
        case("points", many, 9, quantile=0.7),
        case("images", few, 3, 4, 6, quantile=0.95),
        case("as many samples as elements", side, side, quantile=0.5),
        case("images as wide as the batch is long", side, 3, side, side, quantile=0.8),
        case("a batch of one", 1, 3, 4, 5, quantile=0.9),
        case("the largest value", few, 2, 5, 3, quantile=1.0),
        case("float32 images", few, 3, 4, 4, quantile=0.75, dtype=torch.float32),
        case("float32 points with gradient", few, 8, quantile=0.6, dtype=torch.float32, gradient=True),
        case("images with gradient", few, 2, 3, 5, quantile=0.85, gradient=True),
        case("large images", few, 3, 8, 8, quantile=0.995),
    ]


def _bounded(bound: Callable[[Tensor, float], Tensor]) -> Callable:
    """Clipped at a bound, a function of the predictions and the quantile, and divided by it."""

    def wrong(x_0, quantile):
        bounds = bound(x_0, quantile)
        return x_0.clamp(-bounds, bounds) / bounds

    return wrong


def _quantiles(x_0: Tensor, quantile: float) -> Tensor:
    """The quantile of each sample's absolute values, (B, 1, ...)."""
    return per_sample(x_0.abs().flatten(1).quantile(quantile, dim=1), x_0)


def _clipped_alone(x_0, quantile):
    bounds = _quantiles(x_0, quantile).clamp(min=1)
    return x_0.clamp(-bounds, bounds)


def _per_channel_quantile(x_0: Tensor, quantile: float) -> Tensor:
    """The quantile of each channel of each image; of points as it should be."""
    if x_0.ndim == 2:
        return _quantiles(x_0, quantile)
    return x_0.abs().flatten(2).quantile(quantile, dim=2)[..., None, None]


DYNAMIC_THRESHOLD = Exercise(
    "classifier_free_guidance.dynamic_threshold",
    '"Too much contrast"',
    guidance.dynamic_threshold,
    _dynamic_threshold_cases,
    (
        Misconception(
            "clipped at 1",
            lambda x_0, quantile: x_0.clamp(-1, 1),
            "This is the clipping that is there already. The bound is to be the picture's own.",
        ),
        Misconception(
            "not divided",
            _clipped_alone,
            "Clipped at the bound, but not divided by it: the result still lies outside of [-1, 1].",
        ),
        Misconception(
            "not clipped",
            lambda x_0, quantile: x_0 / _quantiles(x_0, quantile).clamp(min=1),
            "Divided by the bound, but not clipped: what lies beyond the quantile stays outside of [-1, 1].",
        ),
        Misconception(
            "divided first, clipped at the bound",
            lambda x_0, quantile: (x_0 / _quantiles(x_0, quantile).clamp(min=1)).clamp(
                -_quantiles(x_0, quantile).clamp(min=1), _quantiles(x_0, quantile).clamp(min=1)
            ),
            "After the division the rim is 1, and no longer the bound.",
        ),
        Misconception(
            "no floor",
            _bounded(_quantiles),
            "A bound below 1 stretches pictures that need nothing: it must be at least 1.",
        ),
        Misconception(
            "floor for a ceiling",
            _bounded(lambda x_0, quantile: _quantiles(x_0, quantile).clamp(max=1)),
            "The bound is at most 1 here. It is to be at least 1.",
        ),
        Misconception(
            "largest value",
            _bounded(lambda x_0, quantile: _quantiles(x_0, 1.0).clamp(min=1)),
            "The bound is the largest absolute value, which a single pixel decides; take the quantile.",
        ),
        Misconception(
            "share beyond the bound",
            _bounded(lambda x_0, quantile: _quantiles(x_0, 1 - quantile).clamp(min=1)),
            "`quantile` is the share that lies below the bound, not beyond it.",
        ),
        Misconception(
            "quantile of the values themselves",
            _bounded(
                lambda x_0, quantile: per_sample(x_0.flatten(1).quantile(quantile, dim=1), x_0).clamp(min=1)
            ),
            "The quantile is that of the absolute values: negative numbers can be too large as well.",
        ),
        Misconception(
            "one bound for the batch",
            _bounded(lambda x_0, quantile: x_0.abs().flatten().quantile(quantile).clamp(min=1)),
            "The bound is that of the whole batch. Each picture has its own bound.",
        ),
        Misconception(
            "first sample's bound",
            _bounded(lambda x_0, quantile: _quantiles(x_0, quantile)[-1:].clamp(min=1)),
            "One sample's bound is used for all. Each picture has its own.",
        ),
        Misconception(
            "largest bound of the batch",
            _bounded(lambda x_0, quantile: _quantiles(x_0, quantile).max().clamp(min=1)),
            "The largest bound of the batch is used for all. Each picture has its own.",
        ),
        Misconception(
            "channel by channel",
            _bounded(lambda x_0, quantile: _per_channel_quantile(x_0, quantile).clamp(min=1)),
            "Each channel gets a bound of its own, which shifts colours. It is to be the whole picture's.",
        ),
        Misconception(
            "row by row",
            _bounded(lambda x_0, quantile: x_0.abs().quantile(quantile, dim=-1, keepdim=True).clamp(min=1)),
            "Each row of pixels gets a bound of its own. The quantile is over all of a picture.",
        ),
        Misconception(
            "standard deviation",
            _bounded(
                lambda x_0, quantile: per_sample(x_0.flatten(1).std(dim=1, correction=0), x_0).clamp(min=1)
            ),
            "The bound is a standard deviation. It is to be a quantile of the absolute values.",
        ),
        Misconception(
            "negative numbers left alone",
            lambda x_0, quantile: (
                x_0.minimum(_quantiles(x_0, quantile).clamp(min=1)) / _quantiles(x_0, quantile).clamp(min=1)
            ),
            "Only what is too large is clipped. What is too far below 0 is to be clipped at -s.",
        ),
        Misconception(
            "bound detached",
            _bounded(lambda x_0, quantile: _quantiles(x_0, quantile).clamp(min=1).detach()),
            "The bound depends on the prediction: no detach() here.",
        ),
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


# The training step


def _conditional_training_step_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    side, wide, classes = draws.integer(5, 6), draws.integer(7, 8), draws.integer(4, 6)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, shape, labels, p, dtype in (
        ("points", (side, wide), 0, 0.4, float64),
        ("images", (side, 3, 2, wide), 0, 0.5, float64),
        ("two labels", (side + 1, wide), 2, 0.4, float64),
        ("as many labels as samples", (3, 4), 3, 0.4, float64),
        ("a large batch", (40, 2), 0, 0.12, float64),
        ("none dropped", (side, wide), 0, 0.0, float64),
        ("all dropped", (side, wide), 2, 1.0, float64),
        ("points in float32", (side, wide), 0, 0.6, float32),
        ("images in float32", (side, 1, 3, 3), 2, 0.5, float32),
    ):
        elements, count = math.prod(shape[1:]), shape[0]
        shapes = (elements, 7), (7,), (classes + 1, 7), (7, elements)
        weights = tuple(draws.normal(*each, dtype=dtype, gradient=True) for each in shapes)
        old = tuple(draws.normal(*weight.shape, dtype=dtype) for weight in weights)
        optimizer = OptimizerArgument(weights, old, draws.uniform(1, low=0.05, high=0.2).item())
        null_label = torch.full((labels,) if labels else (), classes)
        y = (draws.uniform(count, *null_label.shape) * classes).long()
        u = (draws.permutation(count) + draws.uniform(count, low=0.2, high=0.8)) / count
        batch = (
            draws.normal(*shape, dtype=dtype),
            y,
            draws.steps(count, 100),
            draws.normal(*shape, dtype=dtype),
        )
        loss_of = CallableArgument("conditional_loss", weights)
        cases.append(Case(note, (optimizer, loss_of, *batch, null_label, u.to(dtype), p)))
    return cases


def _stepping(step: Callable) -> Callable:
    """conditional_training_step with another order of lines: step(optimizer, loss) -> what is returned.

    loss() is the loss with the labels dropped as they should be.
    """

    def wrong(optimizer, loss_of, x_0, y, t, noise, null_label, u, p):
        cond = guidance.labels_after_dropout(y, null_label, u, p)
        return step(optimizer, lambda: loss_of(x_0, t, noise, cond))

    return wrong


def _telling(told: Callable) -> Callable:
    """conditional_training_step with other conditions: told(y, null_label, u, p)."""

    def wrong(optimizer, loss_of, x_0, y, t, noise, null_label, u, p):
        optimizer.zero_grad()
        loss = loss_of(x_0, t, noise, told(y, null_label, u, p))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return wrong


def _both_parts(optimizer, loss_of, x_0, y, t, noise, null_label, u, p):
    optimizer.zero_grad()
    told, untold = loss_of(x_0, t, noise, y), loss_of(x_0, t, noise, null_label.expand_as(y))
    loss = (1 - p) * told + p * untold
    loss.backward()
    optimizer.step()
    return loss.detach()


def _null_everywhere(y: Tensor, null_label: Tensor) -> Tensor:
    return null_label.expand_as(y)


CONDITIONAL_TRAINING_STEP = Exercise(
    "classifier_free_guidance.conditional_training_step",
    '"Dropping labels"',
    guidance.conditional_training_step,
    _conditional_training_step_cases,
    (
        Misconception(
            "labels never dropped",
            _telling(lambda y, null_label, u, p: y),
            "The network is always told the labels, so its null row learns nothing. Drop them first.",
        ),
        Misconception(
            "labels always dropped",
            _telling(lambda y, null_label, u, p: _null_everywhere(y, null_label)),
            "The network is never told a label.",
        ),
        Misconception(
            "inverted probability",
            _telling(
                lambda y, null_label, u, p: torch.where(
                    per_sample(u < p, y), y, _null_everywhere(y, null_label)
                )
            ),
            "The labels are kept with probability p and dropped otherwise. p is the probability of dropping.",
        ),
        Misconception(
            "one draw for the batch",
            _telling(lambda y, null_label, u, p: y if u[0] >= p else _null_everywhere(y, null_label)),
            "The first draw decides for the whole batch. Each sample has a draw of its own.",
        ),
        Misconception(
            "null is class 0",
            _telling(
                lambda y, null_label, u, p: guidance.labels_after_dropout(
                    y, torch.zeros_like(null_label), u, p
                )
            ),
            "Dropped labels become 0, which is a class. Take the null label.",
        ),
        Misconception(
            "both parts of the expected loss",
            _both_parts,
            "The loss is taken with and without the labels, weighted by 1 - p and p. The mean is right, "
            "but it asks the network twice: let each sample's draw decide.",
        ),
        *step_mistakes(_stepping),
        Misconception(
            "data and noise swapped",
            with_arguments(
                guidance.conditional_training_step,
                x_0=lambda noise, **_: noise,
                noise=lambda x_0, **_: x_0,
            ),
            "The loss takes x_0 first, then t, the noise and the condition.",
        ),
        Misconception(
            "one t for the whole batch",
            with_arguments(guidance.conditional_training_step, t=lambda t, **_: t[:1].expand_as(t)),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "t + 1",
            with_arguments(guidance.conditional_training_step, t=lambda t, **_: t + 1),
            "The loss is told the next step. Code counts from 0: hand t on as it is given.",
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
    '"Too much contrast", equation (5.16)',
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
    '"Only where it helps", equation (5.18)',
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
    CFG_COMBINE,
    DOUBLED_PASS,
    LABELS_AFTER_DROPOUT,
    CONDITIONAL_TRAINING_STEP,
    DYNAMIC_THRESHOLD,
    RESCALED,
    WITHIN_INTERVAL,
]
