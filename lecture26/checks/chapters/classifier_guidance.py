"""Exercises of chapter 03: guided noise and mean, a classifier's gradient, pooling, joint logits."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lecture26 import classifier_guidance as guidance

from ..core import Case, Exercise, Misconception
from ..draws import Draws, batches, transposed
from ..mistakes import (
    gradient_in_the_mode_around,
    gradient_of,
    gradient_of_outputs,
    schedule_mistakes,
    scores,
    unit,
    with_arguments,
    with_result,
)

SCALES = (1.0, 2.5, 0.0, 7, 0.4, 3.0, 10.0, 1.7, 4.0, 0.5)  # 1 hides how a scale goes in, 0 all the rest


def _guided_eps_cases(seed: int) -> list[Case]:
    cases = [
        Case(f"s = {scale:g}, {b.note}", (b.normal(), b.normal(), b.alpha_bar, scale))
        for b, scale in zip(batches(seed), SCALES, strict=True)
    ]
    note, (eps, gradient, alpha_bar, _) = cases[2].note, cases[2].arguments
    apart = Case(f"not contiguous, {note}", (transposed(eps), transposed(gradient), alpha_bar, 1.3))
    return [*cases, apart]


def _shifted_eps(factor: Callable[[Tensor], Tensor]) -> Callable:
    """Guided noise with any function of alpha_bar in front of the gradient, right or wrong."""
    return lambda eps, gradient, alpha_bar, scale: eps - scale * factor(alpha_bar) * gradient


def _eps_with(**changes: Callable) -> Callable:
    return with_arguments(guidance.guided_eps, **changes)


GUIDED_EPS = Exercise(
    "classifier_guidance.guided_eps",
    '"Bayes\' rule on scores", equation (3.4)',
    guidance.guided_eps,
    _guided_eps_cases,
    (
        Misconception(
            "plus for minus",
            _eps_with(scale=lambda scale, **_: -scale),
            "The shift has the wrong sign: this steers away from the class. The score gains +g, and eps = "
            "-sqrt(1 - alpha_bar) score turns the sign round.",
        ),
        Misconception(
            "no root",
            _shifted_eps(lambda alpha_bar: 1 - alpha_bar),
            "The factor is the noise's standard deviation, the root of 1 - alpha_bar, not its variance.",
        ),
        Misconception(
            "sqrt(alpha_bar) for sqrt(1 - alpha_bar)",
            _shifted_eps(torch.sqrt),
            "sqrt(alpha_bar) belongs to the signal. The factor is that of the noise, with 1 - alpha_bar.",
        ),
        Misconception(
            "alpha_bar for sqrt(1 - alpha_bar)",
            _shifted_eps(lambda alpha_bar: alpha_bar),
            "alpha_bar is what is left of the signal's variance. The factor is the noise's, and its root.",
        ),
        Misconception(
            "1 - sqrt(alpha_bar)",
            _shifted_eps(lambda alpha_bar: 1 - alpha_bar.sqrt()),
            "The root is taken of alpha_bar alone. It is the root of the difference 1 - alpha_bar.",
        ),
        Misconception(
            "alpha_bar squared",
            _shifted_eps(lambda alpha_bar: (1 - alpha_bar**2).sqrt()),
            "alpha_bar is the signal's variance already: it is not squared before it is taken from 1.",
        ),
        Misconception(
            "root of signal times noise",
            _shifted_eps(lambda alpha_bar: (alpha_bar * (1 - alpha_bar)).sqrt()),
            "The factor has no alpha_bar besides the one in 1 - alpha_bar.",
        ),
        Misconception(
            "factor of an x_0-prediction",
            _shifted_eps(lambda alpha_bar: (1 - alpha_bar) / alpha_bar.sqrt()),
            "(1 - alpha_bar) / sqrt(alpha_bar) is how far the predicted x_0 moves; eps moves by sqrt(1 - "
            "alpha_bar).",
        ),
        Misconception(
            "factor of a v-prediction",
            _shifted_eps(lambda alpha_bar: ((1 - alpha_bar) / alpha_bar).sqrt()),
            "sqrt((1 - alpha_bar) / alpha_bar) is how far a predicted v moves; eps moves by sqrt(1 - "
            "alpha_bar).",
        ),
        Misconception(
            "divided by the noise level",
            _shifted_eps(lambda alpha_bar: (1 - alpha_bar).rsqrt()),
            "Noise is score times -sqrt(1 - alpha_bar): the gradient is multiplied by the root, not divided.",
        ),
        Misconception(
            "factor forgotten",
            _shifted_eps(torch.ones_like),
            "The gradient belongs to the score. To be added to the noise, it needs the factor sqrt(1 - "
            "alpha_bar).",
        ),
        Misconception(
            "factor forgotten, and plus",
            _shifted_eps(lambda alpha_bar: -torch.ones_like(alpha_bar)),
            "The gradient can be added to a score, not to a noise: it needs the factor -sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "scale ignored",
            _eps_with(scale=lambda **_: 1),
            "The scale does not appear in the result. It multiplies the gradient.",
        ),
        Misconception(
            "scale applied twice",
            _eps_with(scale=lambda scale, **_: scale**2),
            "The gradient is multiplied by the scale twice.",
        ),
        Misconception(
            "scale under the root",
            _eps_with(scale=lambda scale, **_: math.sqrt(scale)),
            "The scale stands in front of the root, not under it.",
        ),
        Misconception(
            "1 + scale",
            _eps_with(scale=lambda scale, **_: 1 + scale),
            "A scale of 0 must leave eps as it is, and 1 is Bayes' rule. The 1 + belongs to the weight w of "
            "chapter 05.",
        ),
        Misconception(
            "divided by the scale",
            lambda eps, gradient, alpha_bar, scale: eps - (1 - alpha_bar).sqrt() * gradient / scale,
            "A larger scale means stronger guidance: multiply by it.",
        ),
        Misconception(
            "eps scaled too",
            lambda eps, gradient, alpha_bar, scale: scale * (eps - (1 - alpha_bar).sqrt() * gradient),
            "The scale belongs to the gradient alone; the unguided eps stays as it is.",
        ),
        Misconception(
            "eps and shift blended",
            lambda eps, gradient, alpha_bar, scale: (
                (1 - scale) * eps - scale * (1 - alpha_bar).sqrt() * gradient
            ),
            "Nothing is taken away from eps: the shift is added to all of it, whatever the scale.",
        ),
        Misconception(
            "the shift alone",
            lambda eps, gradient, alpha_bar, scale: -scale * (1 - alpha_bar).sqrt() * gradient,
            "This is by how much the noise moves; asked for is the moved noise, so eps itself is missing.",
        ),
        Misconception(
            "score for noise",
            lambda eps, gradient, alpha_bar, scale: scale * gradient - eps / (1 - alpha_bar).sqrt(),
            "This is the guided score. Turn it back into a noise: times -sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "minus lost on the way back",
            lambda eps, gradient, alpha_bar, scale: scale * (1 - alpha_bar).sqrt() * gradient - eps,
            "The way from the score back to the noise has a minus sign too: the whole result is upside down.",
        ),
        Misconception(
            "gradient averaged over the batch",
            _eps_with(gradient=lambda gradient, **_: gradient.mean(0, keepdim=True)),
            "Each sample is moved along its own gradient, not along the batch's mean.",
        ),
        Misconception(
            "divided by the batch size",
            _eps_with(gradient=lambda gradient, **_: gradient / len(gradient)),
            "The strength must not depend on how many samples there are in the batch.",
        ),
        Misconception(
            "gradient normalised",
            _eps_with(gradient=lambda gradient, **_: unit(gradient)),
            "The gradient's length matters: it falls to 0 where the class is certain. Take it as it is.",
        ),
        Misconception(
            "sign of the gradient",
            _eps_with(gradient=lambda gradient, **_: gradient.sign()),
            "The gradient itself is added, with all its values, not its sign.",
        ),
        Misconception(
            "eps and gradient swapped",
            _eps_with(eps=lambda gradient, **_: gradient, gradient=lambda eps, **_: eps),
            "eps stays as it is; the gradient is what gets the factors.",
        ),
        *schedule_mistakes(guidance.guided_eps, "alpha_bar"),
    ),
)


def _labels(draws: Draws, batch: int, classes: int) -> Tensor:
    """Labels (batch,) of more than one class, the first and the last one among them."""
    y = torch.arange(batch) * (classes - 1) // max(batch - 1, 1)
    return y[draws.permutation(batch)]


def _selected_log_probs_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 8), draws.integer(4, 5)

    def case(note, batch, classes, stretch=1.0, lift=0.0, **kind):
        logits = stretch * draws.normal(batch, classes, **kind) + lift
        logits = logits.detach().requires_grad_(kind.get("gradient", False))
        return Case(note, (logits, _labels(draws, batch, classes)))

    turned = case("not contiguous", few, many)
    return [
        case("more classes than samples", few, many, stretch=2),
        case("as many classes as samples", side, side, stretch=2),
        case("more samples than classes", many, few),
        case("a batch of one", 1, many),
        case("two classes", many, 2),
        case("logits raised by 50", few, many, lift=50.0),
        case("large logits, whose exponentials overflow", many, few, stretch=1000),
        case("a single class, always certain", few, 1),
        case("float32", few, side, dtype=torch.float32),
        case("with gradient", side, many, gradient=True),
        Case(turned.note, (transposed(turned.arguments[0]), turned.arguments[1])),
    ]


def _own(table: Tensor, y: Tensor) -> Tensor:
    """Each row's entry at its own class: (B, K), (B,) -> (B,)."""
    return table[torch.arange(len(y)), y]


def _other_classes(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with each row's own class taken out."""
    return logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf)


SELECTED_LOG_PROBS = Exercise(
    "classifier_guidance.selected_log_probs",
    '"From a classifier to its gradient", equation (3.5)',
    guidance.selected_log_probs,
    _selected_log_probs_cases,
    (
        Misconception(
            "probability for log-probability",
            lambda logits, y: _own(logits.softmax(1), y),
            "This is the probability itself; its logarithm is asked for.",
        ),
        Misconception(
            "raw logit",
            lambda logits, y: _own(logits, y),
            "The logit l_y is not yet a log-probability: the logarithm of the sum of all exponentials is "
            "missing.",
        ),
        Misconception(
            "every class of the batch",
            lambda logits, y: logits.log_softmax(1)[:, y],
            "[:, y] takes all the batch's classes from each row. Row i needs its own y[i] only: gather, or "
            "index with the rows' numbers too.",
        ),
        Misconception(
            "sum over the classes of the batch",
            lambda logits, y: logits.log_softmax(1)[:, y].sum(1),
            "[:, y] takes all the batch's classes from each row, and then they are summed. Row i needs its "
            "own y[i] only.",
        ),
        Misconception(
            "sum over the batch",
            lambda logits, y: _own(logits.log_softmax(1), y).sum(),
            "One number per sample is asked for: (B,), not their sum.",
        ),
        Misconception(
            "mean over the batch",
            lambda logits, y: _own(logits.log_softmax(1), y).mean(),
            "One number per sample is asked for: (B,), not their mean.",
        ),
        Misconception(
            "cross-entropy",
            lambda logits, y: F.cross_entropy(logits, y, reduction="none"),
            "The cross-entropy is minus the log-probability: turn its sign round.",
        ),
        Misconception(
            "mean cross-entropy",
            lambda logits, y: F.cross_entropy(logits, y),
            "cross_entropy gives the mean of minus the log-probabilities; here each sample has its own, and "
            "they are not negated.",
        ),
        Misconception(
            "softmax over the batch",
            lambda logits, y: _own(logits.log_softmax(0), y),
            "The probabilities of one sample's classes add up to 1: the softmax runs over axis 1.",
        ),
        Misconception(
            "softmax over everything",
            lambda logits, y: _own(logits, y) - logits.logsumexp((0, 1)),
            "The sum runs over the sample's own classes, not over the whole batch.",
        ),
        Misconception(
            "argmax for y",
            lambda logits, y: logits.log_softmax(1).amax(1),
            "This is the class that the classifier thinks most likely. y says which one is wanted.",
        ),
        Misconception(
            "first sample's class for all",
            lambda logits, y: logits.log_softmax(1)[:, y[0]],
            "Each sample has a class of its own, y[i].",
        ),
        Misconception(
            "first sample's logits for all",
            lambda logits, y: logits.log_softmax(1)[0, y],
            "[0, y] reads the first row only. Row i is sample i.",
        ),
        Misconception(
            "axes swapped",
            lambda logits, y: logits.log_softmax(1)[y, torch.arange(len(y))],
            "Rows are samples and columns are classes: the index is [i, y[i]].",
        ),
        Misconception(
            "logarithm of a softmax",
            lambda logits, y: _own(logits.softmax(1), y).log(),
            "A small probability is rounded to 0 before its logarithm is taken, which gives -inf: "
            "log_softmax does both at once.",
        ),
        Misconception(
            "constant inside the logarithm",
            lambda logits, y: (_own(logits.softmax(1), y) + 1e-8).log(),
            "A constant that keeps the logarithm finite changes it, and flattens its gradient where the "
            "class is improbable. log_softmax needs none.",
        ),
        Misconception(
            "exponentials summed as they are",
            lambda logits, y: _own(logits, y) - logits.exp().sum(1).log(),
            "exp overflows for large logits: use log_softmax or logsumexp, which take off the maximum first.",
        ),
        Misconception(
            "exponentials not summed in logs",
            lambda logits, y: _own(logits, y) - logits.exp().sum(1),
            "The logarithm of the sum is missing.",
        ),
        Misconception(
            "sum of the logits",
            lambda logits, y: _own(logits, y) - logits.sum(1),
            "The sum is over the exponentials of the logits, and its logarithm is subtracted.",
        ),
        Misconception(
            "mean of the exponentials",
            lambda logits, y: _own(logits.log_softmax(1), y) + math.log(logits.shape[1]),
            "The exponentials are summed, not averaged, or the probabilities would add up to K.",
        ),
        Misconception(
            "log-odds",
            lambda logits, y: _own(logits, y) - _other_classes(logits, y).logsumexp(1),
            "The sum runs over all classes, y included; without it this is log(p / (1 - p)).",
        ),
        Misconception(
            "distance from the best",
            lambda logits, y: _own(logits, y) - logits.amax(1),
            "The maximum stands in for the logarithm of the sum of exponentials. All classes count.",
        ),
        Misconception(
            "sigmoid for softmax",
            lambda logits, y: F.logsigmoid(_own(logits, y)),
            "A sigmoid looks at one logit alone. The classes exclude each other: the softmax compares them.",
        ),
        Misconception(
            "softmax before log_softmax",
            lambda logits, y: _own(logits.softmax(1).log_softmax(1), y),
            "The softmax is taken twice: log_softmax expects the logits themselves.",
        ),
        Misconception(
            "classes counted from 1",
            lambda logits, y: _own(logits.log_softmax(1), y - 1),
            "y counts from 0, as the columns do: no - 1.",
        ),
        Misconception(
            "logarithm to base 2",
            lambda logits, y: _own(logits.log_softmax(1), y) / math.log(2),
            "These are bits. Log-probabilities are in nats here, with the natural logarithm.",
        ),
        Misconception(
            "an axis too many",
            lambda logits, y: logits.log_softmax(1).gather(1, y[:, None]),
            "gather keeps the axis that it picks from: take it off, to give (B,).",
        ),
        Misconception(
            "one-hot table",
            lambda logits, y: logits.log_softmax(1) * F.one_hot(y, logits.shape[1]),
            "The other classes' columns are 0 but still there: sum over them, to give (B,).",
        ),
        Misconception(
            "mean over the classes",
            lambda logits, y: _own(logits.log_softmax(1), y) / logits.shape[1],
            "A mean over the one-hot columns divides by K: sum over them, or pick the column.",
        ),
    ),
)


def _log_prob_gradient_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 7), draws.integer(4, 5)

    def case(note, *shape, classes=5, steps=None, mode="grad", change=None, weights=False, **kind):
        x_t = draws.normal(*shape, **kind)
        numbers = dict(dtype=kind.get("dtype", torch.float64), gradient=weights)
        classifier = draws.network("noisy_classifier", x_t[0].numel(), classes, **numbers)
        t = draws.steps(len(x_t), 1000) if steps is None else torch.full((len(x_t),), steps)
        y = _labels(draws, len(x_t), classes)
        return Case(note, (classifier, x_t if change is None else change(x_t), t, y), mode)

    return [
        case("points", many, 2),
        case("images", few, 3, 2, 4),
        case("as many samples as classes and elements", side, side, classes=side),
        case("a batch of one", 1, 3, 4, 4),
        case("two classes, all at the first step", many, 3, classes=2, steps=0),
        case("more classes than samples, all at the last step", few, 6, classes=12, steps=999),
        case("float32 images", few, 3, 4, 2, dtype=torch.float32),
        case("images that are not contiguous", few, 1, 4, 5, change=transposed),
        case("points that carry gradient", few, 3, gradient=True),
        case("a classifier whose weights carry gradient", few, 4, weights=True),
        case("under no_grad, as in a sampler", few, 3, 2, 2, mode="no_grad"),
        case(
            "under inference_mode, with weights that carry gradient",
            few,
            4,
            weights=True,
            mode="inference_mode",
        ),
    ]


def _gradient_with(**changes: Callable) -> Callable:
    return with_arguments(guidance.log_prob_gradient, **changes)


def _changed_gradient(change: Callable[[Tensor], Tensor]) -> Callable:
    return with_result(guidance.log_prob_gradient, change)


def _with_backward(classifier, x_t, t, y):
    with torch.inference_mode(False), torch.enable_grad():
        x_t, t, y = x_t.detach().clone().requires_grad_(), t.clone(), y.clone()
        guidance.selected_log_probs(classifier(x_t, t), y).sum().backward()
        return x_t.grad


def _cut_from_x_t(classifier, x_t, t, y):
    with torch.inference_mode(False), torch.enable_grad():
        log_probs = guidance.selected_log_probs(
            classifier(x_t.detach().clone(), t.clone()).detach(), y.clone()
        )
        return torch.autograd.grad(log_probs.sum(), x_t.detach().clone().requires_grad_())[0]


def _of_whole_vector(classifier, x_t, t, y):
    with torch.inference_mode(False), torch.enable_grad():
        x_t = x_t.detach().clone().requires_grad_()
        log_probs = guidance.selected_log_probs(classifier(x_t, t.clone()), y.clone())
        return torch.autograd.grad(log_probs[0] if len(log_probs) == 1 else log_probs, x_t)[0]


_in_the_mode_around = gradient_in_the_mode_around(guidance.selected_log_probs)


def _inference_mode_not_left(classifier, x_t, t, y):
    with torch.enable_grad():
        return _in_the_mode_around(classifier, x_t, t, y)


LOG_PROB_GRADIENT = Exercise(
    "classifier_guidance.log_prob_gradient",
    '"From a classifier to its gradient", equation (3.6)',
    guidance.log_prob_gradient,
    _log_prob_gradient_cases,
    (
        Misconception(
            "mean over the batch",
            _changed_gradient(lambda gradient: gradient / len(gradient)),
            "The mean makes each gradient B times too small, so that the guidance depends on the batch size: "
            "differentiate the sum.",
        ),
        Misconception(
            "probability for log-probability",
            gradient_of(lambda logits, y: _own(logits.softmax(1), y)),
            "This is the gradient of the probability, which vanishes where the class is improbable. Bayes' "
            "rule has its logarithm.",
        ),
        Misconception(
            "raw logit",
            gradient_of(_own),
            "This is the gradient of the logit l_y. The log-probability also pushes the other classes' "
            "logits down.",
        ),
        Misconception(
            "every class of the batch",
            gradient_of(lambda logits, y: logits.log_softmax(1)[:, y]),
            "log_probs[:, y].sum() pulls each sample towards the classes of all samples. Each has its own y "
            "only.",
        ),
        Misconception(
            "all classes",
            gradient_of(lambda logits, y: logits.log_softmax(1)),
            "The log-probabilities of all classes are summed, and y plays no part. Select each sample's own "
            "class first.",
        ),
        Misconception(
            "argmax for y",
            gradient_of(lambda logits, y: logits.log_softmax(1).amax(1)),
            "This strengthens what the classifier sees already. y says what it shall see.",
        ),
        Misconception(
            "softmax over the batch",
            gradient_of(lambda logits, y: _own(logits.log_softmax(0), y)),
            "The softmax runs over the batch, so that samples compete with each other: it belongs to the "
            "classes, axis 1.",
        ),
        Misconception(
            "softmax before log_softmax",
            gradient_of(lambda logits, y: _own(logits.softmax(1).log_softmax(1), y)),
            "The softmax is taken twice: selected_log_probs expects the logits themselves.",
        ),
        Misconception(
            "sigmoid for softmax",
            gradient_of(lambda logits, y: F.logsigmoid(_own(logits, y))),
            "A sigmoid looks at one logit alone; the softmax compares all classes.",
        ),
        Misconception(
            "log-odds",
            gradient_of(lambda logits, y: _own(logits, y) - _other_classes(logits, y).logsumexp(1)),
            "This is the gradient of log(p / (1 - p)). The classes under the sum include y.",
        ),
        Misconception(
            "sign of the loss",
            _changed_gradient(torch.neg),
            "This is the gradient of the cross-entropy, which falls where the log-probability rises: the "
            "sign is the other one.",
        ),
        Misconception(
            "gradient of the mean loss",
            _changed_gradient(lambda gradient: -gradient / len(gradient)),
            "cross_entropy is the batch's mean of minus the log-probabilities: both the sign and the factor "
            "1 / B are wrong.",
        ),
        Misconception(
            "clean classifier on x_t",
            _gradient_with(t=lambda t, **_: torch.zeros_like(t)),
            "The classifier is told step 0, whatever t is: it reads noise as if it were the picture's. Give "
            "it t.",
        ),
        Misconception(
            "papers' t for code's",
            _gradient_with(t=lambda t, **_: t + 1),
            "1 is added to t. Code counts steps from 0, and the classifier was trained with that number.",
        ),
        Misconception(
            "the step before",
            _gradient_with(t=lambda t, **_: t - 1),
            "The classifier is told t - 1, but what it looks at is x_t, which has the noise of step t.",
        ),
        Misconception(
            "t scaled to [0, 1]",
            _gradient_with(t=lambda t, **_: t / 1000),
            "t goes into the classifier as it is, 0 to T - 1.",
        ),
        Misconception(
            "one step for the whole batch",
            _gradient_with(t=lambda t, **_: t[:1].expand_as(t)),
            "The first sample's step is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "first sample's class for all",
            _gradient_with(y=lambda y, **_: y[:1].expand_as(y)),
            "The first sample's class is used for all. Each sample has a class of its own.",
        ),
        Misconception(
            "classes counted from 1",
            gradient_of(lambda logits, y: _own(logits.log_softmax(1), y - 1)),
            "y counts from 0, as the logits' columns do: no - 1.",
        ),
        Misconception(
            "first sample only",
            gradient_of(lambda logits, y: _own(logits.log_softmax(1), y)[:1]),
            "Only the first log-probability is differentiated; the gradients of the others are 0. Sum over "
            "the batch.",
        ),
        Misconception(
            "averaged over the samples",
            _changed_gradient(lambda gradient: gradient.mean(0, keepdim=True).expand_as(gradient)),
            "All samples get the same gradient. Each needs its own.",
        ),
        Misconception(
            "summed over the samples",
            _changed_gradient(lambda gradient: gradient.sum(0)),
            "The samples' gradients are added up. It is the log-probabilities that are summed, before "
            "differentiating.",
        ),
        Misconception(
            "sign of the gradient",
            _changed_gradient(torch.sign),
            "The gradient's values are asked for, not their signs; those make adversarial examples.",
        ),
        Misconception(
            "gradient normalised",
            _changed_gradient(unit),
            "The gradient's length belongs to Bayes' rule: it falls to 0 where the class is certain.",
        ),
        Misconception(
            "gradient clamped",
            _changed_gradient(lambda gradient: gradient.clamp(-1, 1)),
            "The gradient is taken as it is; clamping is for predicted images.",
        ),
        Misconception(
            "x_t moved along the gradient",
            lambda classifier, x_t, t, y: x_t + guidance.log_prob_gradient(classifier, x_t, t, y),
            "Only the gradient is asked for; where to add it is the sampler's matter.",
        ),
        Misconception(
            "x_t clamped",
            _gradient_with(x_t=lambda x_t, **_: x_t.clamp(-1, 1)),
            "The classifier gets x_t as it is: noisy images leave [-1, 1], and it was trained on such.",
        ),
        Misconception(
            "gradient with respect to the logits",
            gradient_of_outputs(guidance.selected_log_probs),
            "The gradient is that with respect to the logits, (B, K). Asked for is the one with respect to "
            "x_t, through the classifier.",
        ),
        Misconception(
            "log-probability for its gradient",
            lambda classifier, x_t, t, y: guidance.selected_log_probs(classifier(x_t, t), y).detach(),
            "This is the log-probability. Differentiate its sum with respect to x_t: torch.autograd.grad.",
        ),
        Misconception(
            "tuple not unpacked",
            lambda classifier, x_t, t, y: (guidance.log_prob_gradient(classifier, x_t, t, y),),
            "torch.autograd.grad returns a tuple with a gradient per input: take the first one out of it.",
        ),
        Misconception(
            "vector instead of its sum",
            _of_whole_vector,
            "Automatic differentiation starts from a single number, and a batch has B of them: take their "
            "sum.",
        ),
        Misconception(
            "x_t outside the graph",
            _cut_from_x_t,
            "No path of the graph leads from the log-probabilities to x_t: call requires_grad_() on it "
            "first, give that very tensor to the classifier, and detach nothing on the way.",
        ),
        Misconception(
            "backward",
            _with_backward,
            "backward() also fills the .grad of the classifier's weights, where it adds up from step to "
            "step. Use torch.autograd.grad.",
        ),
        Misconception(
            "graph kept",
            gradient_of(guidance.selected_log_probs, create_graph=True),
            "The gradient carries a graph of its own, so that memory grows with every step: leave "
            "create_graph off.",
        ),
        Misconception(
            "gradients not switched on",
            _in_the_mode_around,
            "Samplers run under no_grad. Switch gradients on inside, as the lines above the solution do.",
        ),
        Misconception(
            "inference mode not left",
            _inference_mode_not_left,
            "enable_grad alone does not lift inference_mode: leave that too, and clone x_t, t and y, as the "
            "lines above the solution do.",
        ),
    ),
)


def _guided_mean_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    few, many, side = draws.integer(3, 4), draws.integer(6, 7), draws.integer(4, 5)

    def case(note, scale, shape, variance_shape=None, low=0.05, high=2.0, **kind):
        mean, gradient = draws.normal(*shape, **kind), draws.normal(*shape, **kind)
        variance = draws.uniform(*(variance_shape or shape), low=low, high=high, dtype=mean.dtype)
        variance.requires_grad_(mean.requires_grad)
        return Case(f"s = {scale:g}, {note}", (mean, variance, gradient, scale))

    image = (few, 3, 2, many)
    return [
        case("points", 2.5, (few, many)),
        case("as many samples as elements", 1.0, (side, side)),
        case("images", 3.0, image),
        case("images with one variance each", 7, image, (few, 1, 1, 1)),
        case("as long as wide, one variance each", 0.5, (side, 3, side, side), (side, 1, 1, 1)),
        case("a batch of one", 4.0, (1, many)),
        case("unguided", 0.0, image),
        case("variance 0, as at the last step", 2.0, image, high=0.0, low=0.0),
        case("small variances", 10.0, (few, many), low=1e-4, high=1e-3),
        case("float32", 1.5, image, dtype=torch.float32),
        case("with gradient", 2.0, (few, many), gradient=True),
    ]


def _mean_with(**changes: Callable) -> Callable:
    return with_arguments(guidance.guided_mean, **changes)


GUIDED_MEAN = Exercise(
    "classifier_guidance.guided_mean",
    '"Bayes\' rule on one step", equation (3.10)',
    guidance.guided_mean,
    _guided_mean_cases,
    (
        Misconception(
            "minus for plus",
            _mean_with(scale=lambda scale, **_: -scale),
            "The mean moves towards where the class is more probable: +. The minus belongs to the form for "
            "eps.",
        ),
        Misconception(
            "sigma for Sigma",
            _mean_with(variance=lambda variance, **_: variance.sqrt()),
            "Sigma is the variance; this is the standard deviation.",
        ),
        Misconception(
            "1 for Sigma",
            _mean_with(variance=lambda variance, **_: torch.ones_like(variance)),
            "Sigma is missing: the less freedom the step has, the less the gradient may move it.",
        ),
        Misconception(
            "Sigma squared",
            _mean_with(variance=lambda variance, **_: variance**2),
            "The variance is squared, as if it were a standard deviation: Sigma is the variance already.",
        ),
        Misconception(
            "divided by Sigma",
            lambda mean, variance, gradient, scale: mean + scale * gradient / variance,
            "The gradient is multiplied by Sigma. Its inverse stands in the density, and completing the "
            "square turns it round.",
        ),
        Misconception(
            "eps form: minus sigma",
            lambda mean, variance, gradient, scale: mean - scale * variance.sqrt() * gradient,
            "Minus and root belong to the form for eps. The mean moves by + s Sigma g.",
        ),
        Misconception(
            "variance read as its logarithm",
            _mean_with(variance=lambda variance, **_: variance.exp()),
            "The argument is the variance itself, not its logarithm: no exp.",
        ),
        Misconception(
            "logarithm of the variance",
            lambda mean, variance, gradient, scale: mean + scale * variance.log() * gradient,
            "The shift has the variance itself, not its logarithm.",
        ),
        Misconception(
            "half of the shift",
            _mean_with(scale=lambda scale, **_: scale / 2),
            "The shift is s Sigma g, without 1/2: the 1/2 stands before both squares and cancels.",
        ),
        Misconception(
            "scale ignored",
            _mean_with(scale=lambda **_: 1),
            "The scale does not appear in the result. It multiplies the gradient.",
        ),
        Misconception(
            "scale applied twice",
            _mean_with(scale=lambda scale, **_: scale**2),
            "The gradient is multiplied by the scale twice.",
        ),
        Misconception(
            "1 + scale",
            _mean_with(scale=lambda scale, **_: 1 + scale),
            "A scale of 0 must leave the mean as it is. The 1 + belongs to the weight w of chapter 05.",
        ),
        Misconception(
            "divided by the scale",
            lambda mean, variance, gradient, scale: mean + variance * gradient / scale,
            "A larger scale means stronger guidance: multiply by it.",
        ),
        Misconception(
            "mean scaled too",
            lambda mean, variance, gradient, scale: scale * (mean + variance * gradient),
            "The scale belongs to the gradient alone; the unguided mean stays as it is.",
        ),
        Misconception(
            "mean and shift blended",
            lambda mean, variance, gradient, scale: (1 - scale) * mean + scale * variance * gradient,
            "Nothing is taken away from the mean: the shift is added to all of it, whatever the scale.",
        ),
        Misconception(
            "Sigma times the mean too",
            lambda mean, variance, gradient, scale: variance * (mean + scale * gradient),
            "Sigma belongs to the gradient alone; mu stands by itself.",
        ),
        Misconception(
            "the shift alone",
            lambda mean, variance, gradient, scale: scale * variance * gradient,
            "This is by how much the mean moves; asked for is the moved mean, so mu itself is missing.",
        ),
        Misconception(
            "mean and gradient swapped",
            _mean_with(mean=lambda gradient, **_: gradient, gradient=lambda mean, **_: mean),
            "The mean stays as it is; the gradient is what gets the factors.",
        ),
        Misconception(
            "noise added",
            lambda mean, variance, gradient, scale: (
                mean + scale * variance * gradient + variance.sqrt() * torch.randn_like(mean)
            ),
            "Only the mean is asked for: the sampler draws from the guided step.",
        ),
        Misconception(
            "gradient averaged over the batch",
            _mean_with(gradient=lambda gradient, **_: gradient.mean(0, keepdim=True)),
            "Each sample is moved along its own gradient, not along the batch's mean.",
        ),
        Misconception(
            "divided by the batch size",
            _mean_with(gradient=lambda gradient, **_: gradient / len(gradient)),
            "The strength must not depend on how many samples there are in the batch.",
        ),
        Misconception(
            "gradient normalised",
            _mean_with(gradient=lambda gradient, **_: unit(gradient)),
            "The gradient's length matters: it falls to 0 where the class is certain. Take it as it is.",
        ),
        Misconception(
            "one variance for the whole batch",
            _mean_with(variance=lambda variance, **_: variance[:1]),
            "The first sample's variance is used for all. Each sample has a step of its own.",
        ),
        Misconception(
            "variance averaged",
            _mean_with(variance=lambda variance, **_: variance.mean()),
            "Sigma is a diagonal: each element has a variance of its own.",
        ),
        Misconception(
            "matrix product",
            lambda mean, variance, gradient, scale: mean + scale * variance @ gradient,
            "variance holds the diagonal of Sigma: multiply element by element.",
        ),
    ),
)


def _attention_pool_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, places, channels, labels = draws.integer(3, 4), draws.integer(8, 9), draws.integer(5, 6), 2
    side = draws.integer(4, 5)

    def case(note, batch, places, channels, labels, stretch=1.0, change=None, **kind):
        tokens = draws.normal(batch, places, channels, **kind)
        queries = draws.normal(labels, channels, **kind)
        queries = (stretch * queries).detach().requires_grad_(queries.requires_grad)
        return Case(note, (tokens if change is None else change(tokens), queries))

    return [
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side, side),
        case("two labels", batch, places, channels, labels),
        case("as many labels as samples", batch, places, channels, batch, stretch=2),
        case("a single label", batch, places, channels, 1),
        case("a batch of one", 1, places, channels, labels),
        case("a single place", batch, 1, channels, labels),
        case("queries of 0, as at the start of training", batch, places, channels, labels, stretch=0),
        case("large scores, whose exponentials overflow", batch, places, channels, 3, stretch=2000),
        case("places from a map's last axes", batch, places, channels, labels, change=transposed),
        case("float32", batch, places, channels, labels, dtype=torch.float32),
        case("with gradient", batch, places, channels, 3, gradient=True),
    ]


def _pooled(weights: Callable[[Tensor], Tensor]) -> Callable:
    """Pooling with any function from scores (B, L, N) to weights, right or wrong."""
    return lambda tokens, queries: weights(scores(queries, tokens)) @ tokens


def _with_factor(factor: Callable[[Tensor, Tensor], float]) -> Callable:
    """Pooling with any factor at the inner products, right or wrong."""
    return lambda tokens, queries: (queries @ tokens.mT * factor(tokens, queries)).softmax(-1) @ tokens


ATTENTION_POOL = Exercise(
    "classifier_guidance.attention_pool",
    '"One question for each label", equation (3.15)',
    guidance.attention_pool,
    _attention_pool_cases,
    (
        Misconception(
            "scores not scaled",
            _with_factor(lambda tokens, queries: 1),
            "The scores are not divided by sqrt(C).",
        ),
        Misconception(
            "divided by C",
            _with_factor(lambda tokens, queries: 1 / tokens.shape[-1]),
            "The scores are divided by C: divide by its root.",
        ),
        Misconception(
            "multiplied by sqrt(C)",
            _with_factor(lambda tokens, queries: math.sqrt(tokens.shape[-1])),
            "The scores are divided by sqrt(C), not multiplied.",
        ),
        Misconception(
            "scaled by the number of places",
            _with_factor(lambda tokens, queries: 1 / math.sqrt(tokens.shape[1])),
            "The scale is the length C of a query, over which the scores are summed, not the number of "
            "places.",
        ),
        Misconception(
            "scaled by the number of labels",
            _with_factor(lambda tokens, queries: 1 / math.sqrt(len(queries))),
            "The scale is the length C of a query, not how many queries there are.",
        ),
        Misconception(
            "sign of the scores",
            _with_factor(lambda tokens, queries: -1 / math.sqrt(tokens.shape[-1])),
            "The scores have the wrong sign: a place that matches better must weigh more.",
        ),
        Misconception(
            "scaled after the softmax",
            lambda tokens, queries: (queries @ tokens.mT).softmax(-1) / math.sqrt(tokens.shape[-1]) @ tokens,
            "The scores are scaled before the softmax; afterwards the weights no longer add up to 1.",
        ),
        Misconception(
            "softmax over the labels",
            _pooled(lambda scores: scores.softmax(-2)),
            "The weights of one query add up to 1 over the places, the last axis of the scores.",
        ),
        Misconception(
            "softmax over the batch",
            _pooled(lambda scores: scores.softmax(0)),
            "The softmax runs over the samples; it belongs to the places, the last axis.",
        ),
        Misconception(
            "softmax over labels and places",
            _pooled(lambda scores: scores.flatten(1).softmax(1).view_as(scores)),
            "Each query has weights of its own that add up to 1: the softmax runs over the places alone.",
        ),
        Misconception(
            "no softmax",
            _pooled(lambda scores: scores),
            "The scores are used as weights as they are; the softmax over the places is missing.",
        ),
        Misconception(
            "softmax without its maximum taken off",
            _pooled(lambda scores: scores.exp() / scores.exp().sum(-1, keepdim=True)),
            "exp overflows for large scores and the quotient is NaN: use softmax.",
        ),
        Misconception(
            "sigmoid for softmax",
            _pooled(torch.sigmoid),
            "A sigmoid gives each place a weight of its own; the softmax makes them add up to 1.",
        ),
        Misconception(
            "logarithm of the weights",
            _pooled(lambda scores: scores.log_softmax(-1)),
            "The weights are the softmax itself, not its logarithm.",
        ),
        Misconception(
            "best place only",
            _pooled(lambda scores: F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)),
            "Only the best-matching place is taken, which no query can learn from: weigh all of them by the "
            "softmax.",
        ),
        Misconception(
            "plain mean",
            _pooled(lambda scores: torch.full_like(scores, 1 / scores.shape[-1])),
            "All places weigh the same, whatever the queries are. The softmax of the scores weighs them.",
        ),
        Misconception(
            "maximum over the places",
            lambda tokens, queries: tokens.amax(1, keepdim=True).expand(-1, len(queries), -1),
            "This takes each channel's largest value. Asked for is a mean, weighted by how the places match.",
        ),
        Misconception(
            "sum for mean",
            lambda tokens, queries: guidance.attention_pool(tokens, queries) * tokens.shape[1],
            "The weights of a query add up to the number of places; they must add up to 1.",
        ),
        Misconception(
            "divided by the number of places",
            lambda tokens, queries: guidance.attention_pool(tokens, queries) / tokens.shape[1],
            "The weights add up to 1 already: sum over the places, do not average.",
        ),
        Misconception(
            "tokens ask, queries answer",
            lambda tokens, queries: (tokens @ queries.mT / math.sqrt(tokens.shape[-1])).softmax(-1) @ queries,
            "The roles are swapped: queries ask, and the places are both keys and values.",
        ),
        Misconception(
            "queries mixed instead of places",
            lambda tokens, queries: (
                scores(queries, tokens).softmax(-1) @ (tokens @ queries.mT / math.sqrt(tokens.shape[-1]))
            ),
            "The weights mix the places' features, not their scores.",
        ),
        Misconception(
            "query added",
            lambda tokens, queries: queries + guidance.attention_pool(tokens, queries),
            "The result is the weighted mean alone; there is no path around it for the query.",
        ),
        Misconception(
            "normalised query and place",
            lambda tokens, queries: (
                (F.normalize(queries, dim=-1) @ F.normalize(tokens, dim=-1).mT).softmax(-1) @ tokens
            ),
            "The score is the inner product, not the cosine: lengths count.",
        ),
        Misconception(
            "self-attention first",
            lambda tokens, queries: guidance.attention_pool(
                F.scaled_dot_product_attention(tokens, tokens, tokens), queries
            ),
            "The places do not look at each other here: the queries ask them directly.",
        ),
        Misconception(
            "first sample's weights for all",
            lambda tokens, queries: scores(queries, tokens[:1]).softmax(-1) @ tokens,
            "The weights are those of the first sample. Each sample has places of its own to be weighed.",
        ),
        Misconception(
            "first query for all labels",
            lambda tokens, queries: guidance.attention_pool(tokens, queries[:1].expand_as(queries)),
            "All labels ask the first query. Each has its own.",
        ),
        Misconception(
            "one answer for all labels",
            lambda tokens, queries: guidance.attention_pool(tokens, queries).mean(1),
            "Each query has an answer of its own: (B, L, C).",
        ),
        Misconception(
            "axes of the result swapped",
            lambda tokens, queries: guidance.attention_pool(tokens, queries).mT,
            "The result is (B, L, C), the channels last.",
        ),
        Misconception(
            "labels before samples",
            lambda tokens, queries: guidance.attention_pool(tokens, queries).transpose(0, 1),
            "The result is (B, L, C), the samples first.",
        ),
        Misconception(
            "weights instead of features",
            lambda tokens, queries: scores(queries, tokens).softmax(-1),
            "These are the weights, (B, L, N). Multiply them with the places' features.",
        ),
        Misconception(
            "weights detached",
            lambda tokens, queries: scores(queries, tokens).softmax(-1).detach() @ tokens,
            "No gradient reaches the queries, so that they never learn: no detach() at the weights.",
        ),
        Misconception(
            "queries detached",
            lambda tokens, queries: guidance.attention_pool(tokens, queries.detach()),
            "The queries are learned: no detach().",
        ),
    ),
)


def _joint_logits_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, many, few, side = (
        draws.integer(3, 4),
        draws.integer(6, 8),
        draws.integer(2, 3),
        draws.integer(4, 5),
    )

    def case(note, batch, classes, others, **kind):
        return Case(note, tuple(draws.normal(batch, count, **kind) for count in (classes, others)))

    return [
        case("more classes in the second label", batch, few, many),
        case("more classes in the first label", batch, many, few),
        case("as many classes in both", batch, many, many),
        case("as many classes as samples", side, side, side),
        case("a batch of one", 1, few, many),
        case("one class in the first label", batch, 1, few),
        case("one class in the second label", batch, few, 1),
        case("float32", batch, few, many, dtype=torch.float32),
        case("with gradient", batch, many, few, gradient=True),
    ]


def _pairs(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Any function of the two logits, right or wrong, for all pairs."""
    return lambda first, second: combine(first[:, :, None], second[:, None, :]).flatten(1)


JOINT_LOGITS = Exercise(
    "classifier_guidance.joint_logits",
    '"Two labels at once", equation (3.17)',
    guidance.joint_logits,
    _joint_logits_cases,
    (
        Misconception(
            "second label first",
            lambda first, second: guidance.joint_logits(second, first),
            "Pair (i, j) stands at j K + i here. The second label runs fastest: it belongs at i M + j.",
        ),
        Misconception(
            "product of the logits",
            _pairs(torch.mul),
            "Probabilities are multiplied; their logarithms, and so the logits, are added.",
        ),
        Misconception(
            "difference",
            _pairs(torch.sub),
            "The second label's logits are subtracted; they are added.",
        ),
        Misconception(
            "mean of the logits",
            _pairs(lambda one, other: (one + other) / 2),
            "The logits are added, not averaged: half of them would be those of a far less certain "
            "classifier.",
        ),
        Misconception(
            "probabilities multiplied",
            lambda first, second: _pairs(torch.mul)(first.softmax(1), second.softmax(1)),
            "These are the pairs' probabilities; their logits are asked for, which the sums of the logits "
            "are.",
        ),
        Misconception(
            "probabilities added",
            lambda first, second: _pairs(torch.add)(first.softmax(1), second.softmax(1)),
            "Probabilities of independent labels are multiplied; it is the logits that are added.",
        ),
        Misconception(
            "log-probabilities for logits",
            lambda first, second: _pairs(torch.add)(first.log_softmax(1), second.log_softmax(1)),
            "The softmax over the pairs would come out the same, but asked for are the sums of the logits "
            "themselves. No normalising here: selected_log_probs does that.",
        ),
        Misconception(
            "one label or the other",
            _pairs(torch.logaddexp),
            "This adds probabilities, as for 'one or the other'. Both labels shall hold: add the logits.",
        ),
        Misconception(
            "larger of the two",
            _pairs(torch.maximum),
            "The pair needs both labels, so that both logits count: add them.",
        ),
        Misconception(
            "smaller of the two",
            _pairs(torch.minimum),
            "Both logits count, not only the weaker one: add them.",
        ),
        Misconception(
            "concatenated",
            lambda first, second: torch.cat([first, second], dim=1),
            "This puts K + M numbers side by side. There is a logit for each of the K M pairs.",
        ),
        Misconception(
            "added class by class",
            lambda first, second: first + second,
            "This adds class i of one label and class i of the other only. Every class is paired with every "
            "one: give them an axis each.",
        ),
        Misconception(
            "not flattened",
            lambda first, second: first[:, :, None] + second[:, None, :],
            "The pairs are still a table (B, K, M): make one axis of the last two.",
        ),
        Misconception(
            "batch flattened too",
            lambda first, second: guidance.joint_logits(first, second).flatten(),
            "The batch's axis stays: (B, K M).",
        ),
        Misconception(
            "both repeated as a whole",
            lambda first, second: first.repeat(1, second.shape[1]) + second.repeat(1, first.shape[1]),
            "Both labels run through their classes at the same time. One must stand still while the other "
            "runs: repeat_interleave for the first.",
        ),
        Misconception(
            "both repeated class by class",
            lambda first, second: (
                first.repeat_interleave(second.shape[1], 1) + second.repeat_interleave(first.shape[1], 1)
            ),
            "Both labels stand still at the same time. The second must run while the first stands still: "
            "repeat for the second.",
        ),
        Misconception(
            "second label ignored",
            lambda first, second: guidance.joint_logits(first, 0 * second),
            "The second label's logits do not appear in the result.",
        ),
        Misconception(
            "first label ignored",
            lambda first, second: guidance.joint_logits(0 * first, second),
            "The first label's logits do not appear in the result.",
        ),
        Misconception(
            "first sample of the second label",
            lambda first, second: guidance.joint_logits(first, second[:1].expand_as(second)),
            "The second label's logits are those of the first sample. Each sample has its own.",
        ),
        Misconception(
            "pairs across samples",
            lambda first, second: guidance.joint_logits(first, second.roll(1, dims=0)),
            "The logits of different samples are added: both labels are those of the same sample.",
        ),
    ),
)


EXERCISES = [
    GUIDED_EPS,
    SELECTED_LOG_PROBS,
    LOG_PROB_GRADIENT,
    GUIDED_MEAN,
    ATTENTION_POOL,
    JOINT_LOGITS,
]
