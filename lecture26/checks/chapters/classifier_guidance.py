"""Exercises of chapter 03: guided noise and answers, gradients, the slide's sampler, training, pooling."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lecture26 import classifier_guidance as guidance
from lecture26.ddpm import q_sample

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws, batches, transposed
from ..mistakes import (
    gradient_in_the_mode_around,
    gradient_of,
    gradient_of_outputs,
    schedule_mistakes,
    scores,
    step_mistakes,
    unit,
    with_arguments,
    with_result,
)
from ..optimizers import OptimizerArgument

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


def _classifier(draws: Draws, elements: int, classes: int, **numbers) -> CallableArgument:
    return draws.network("noisy_classifier", elements, classes, **numbers)


# What a denoiser predicts, as weights of x_0, eps and v: each by itself, and a mixture of all.
TARGETS = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.5, -1.5, 0.8))


def _guided_output_cases(seed: int) -> list[Case]:
    cases = []
    for number, (b, scale) in enumerate(zip(batches(seed), SCALES, strict=True)):
        elements, numbers = math.prod(b.shape[1:]), {"dtype": b.dtype}
        with_variance = number % 3 == 1
        kind = "learned_variance_denoiser" if with_variance else "noisy_denoiser"
        denoiser = b.draws.network(kind, elements, (1 + with_variance) * elements, **numbers)
        weights = torch.tensor(TARGETS[number % 4], dtype=b.dtype)
        given = (
            denoiser,
            _classifier(b.draws, elements, 5, **numbers),
            b.draws.normal(*b.shape, **numbers),
            b.t,
            _labels(b.draws, b.shape[0], 5),
            scale,
            b.alpha_bar,
            CallableArgument("target", (weights,)),
        )
        note = f"s = {scale:g}, {b.note}" + (", with a variance behind" if with_variance else "")
        cases.append(Case(note, given, "no_grad" if number == 3 else "grad"))
    return cases


def _guided(
    gradient: Callable = guidance.log_prob_gradient,
    noise: Callable = lambda gradient, alpha_bar, scale: -scale * (1 - alpha_bar).sqrt() * gradient,
    clean: Callable = lambda eps, alpha_bar: -((1 - alpha_bar) / alpha_bar).sqrt() * eps,
    shift: Callable = lambda target, x_0, alpha_bar, eps: target(x_0, alpha_bar, eps),
    joined: Callable = lambda output, moved: torch.cat([moved, output[:, moved.shape[1] :]], dim=1),
) -> Callable:
    """guided_output with one of its parts exchanged.

    gradient: of (classifier, x_t, t, y); noise, clean: by how much each moves; shift: of the answer; joined:
    the moved answer with its variance.
    """

    def wrong(denoiser, classifier, x_t, t, y, scale, alpha_bar, target):
        output = denoiser(x_t, t)
        eps = noise(gradient(classifier, x_t, t, y), alpha_bar, scale)
        moved = output[:, : x_t.shape[1]] + shift(target, clean(eps, alpha_bar), alpha_bar, eps)
        return joined(output, moved)

    return wrong


def _read_at(told: Callable[[Tensor], Tensor]) -> Callable:
    """The classifier's gradient at other steps."""
    return lambda classifier, x_t, t, y: guidance.log_prob_gradient(classifier, x_t, told(t), y)


def _taken_for_noise(denoiser, classifier, x_t, t, y, scale, alpha_bar, target):
    output, channels = denoiser(x_t, t), x_t.shape[1]
    gradient = guidance.log_prob_gradient(classifier, x_t, t, y)
    moved = guidance.guided_eps(output[:, :channels], gradient, alpha_bar, scale)
    return torch.cat([moved, output[:, channels:]], dim=1)


def _noise_made_anew(denoiser, classifier, x_t, t, y, scale, alpha_bar, target):
    output, channels = denoiser(x_t, t), x_t.shape[1]
    gradient = guidance.log_prob_gradient(classifier, x_t, t, y)
    eps = guidance.guided_eps(output[:, :channels], gradient, alpha_bar, scale)
    x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    return torch.cat([target(x_0, alpha_bar, eps), output[:, channels:]], dim=1)


def _asked_twice(denoiser, classifier, x_t, t, y, scale, alpha_bar, target):
    gradient = guidance.log_prob_gradient(classifier, x_t, t, y)
    return denoiser(x_t + scale * gradient, t)


GUIDED_OUTPUT = Exercise(
    "classifier_guidance.guided_output",
    '"A guided denoiser is a denoiser"',
    guidance.guided_output,
    _guided_output_cases,
    (
        Misconception(
            "every prediction taken for noise",
            _taken_for_noise,
            "The answer is moved as a noise is, whatever the denoiser predicts. `target` says what it "
            "predicts, and how far that moves.",
        ),
        Misconception(
            "answer taken for noise, then translated",
            _noise_made_anew,
            "The denoiser's answer is read as a noise and then made into what it is already. Translate the "
            "shift alone, and add it to the answer.",
        ),
        Misconception(
            "x_0 left in place",
            _guided(clean=lambda eps, alpha_bar: torch.zeros_like(eps)),
            "Only the noise moves here. x_t stays where it is, so x_0 must move the other way.",
        ),
        Misconception(
            "x_0 moved along with the noise",
            _guided(clean=lambda eps, alpha_bar: ((1 - alpha_bar) / alpha_bar).sqrt() * eps),
            "x_0 moves the wrong way: sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps is x_t, which stays.",
        ),
        Misconception(
            "x_0 moved as far as the noise",
            _guided(clean=lambda eps, alpha_bar: -eps),
            "x_0 moves by more or less than the noise: in x_t they have the factors sqrt(alpha_bar) and "
            "sqrt(1 - alpha_bar).",
        ),
        Misconception(
            "x_0 moved by ratio without root",
            _guided(clean=lambda eps, alpha_bar: -(1 - alpha_bar) / alpha_bar * eps),
            "The factors of x_t are the roots of alpha_bar and 1 - alpha_bar, and so is their ratio.",
        ),
        Misconception(
            "ratio upside down",
            _guided(clean=lambda eps, alpha_bar: -(alpha_bar / (1 - alpha_bar)).sqrt() * eps),
            "The ratio of the two factors is upside down: at high noise a small change of eps is a large one "
            "of x_0.",
        ),
        Misconception(
            "x_0 not divided",
            _guided(clean=lambda eps, alpha_bar: -(1 - alpha_bar).sqrt() * eps),
            "Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for x_0: there is a division by "
            "sqrt(alpha_bar).",
        ),
        Misconception(
            "plus for minus",
            _guided(noise=lambda gradient, alpha_bar, scale: scale * (1 - alpha_bar).sqrt() * gradient),
            "This steers away from the class. The noise points away from the data, so it moves by minus the "
            "gradient.",
        ),
        Misconception(
            "no root in the noise",
            _guided(noise=lambda gradient, alpha_bar, scale: -scale * (1 - alpha_bar) * gradient),
            "The factor of the gradient in (3.4) is the root of 1 - alpha_bar.",
        ),
        Misconception(
            "gradient for the noise",
            _guided(noise=lambda gradient, alpha_bar, scale: scale * gradient),
            "The gradient is no noise: (3.4) makes one of it.",
        ),
        Misconception(
            "scale ignored",
            _guided(noise=lambda gradient, alpha_bar, scale: -(1 - alpha_bar).sqrt() * gradient),
            "The scale does not appear in the result. It multiplies the gradient.",
        ),
        Misconception(
            "scale applied twice",
            _guided(noise=lambda gradient, alpha_bar, scale: -(scale**2) * (1 - alpha_bar).sqrt() * gradient),
            "The gradient is multiplied by the scale twice.",
        ),
        Misconception(
            "1 + scale",
            _guided(
                noise=lambda gradient, alpha_bar, scale: -(1 + scale) * (1 - alpha_bar).sqrt() * gradient
            ),
            "A scale of 0 must leave the answer as it is. The 1 + belongs to the weight w of chapter 05.",
        ),
        Misconception(
            "mean over the batch",
            _guided(gradient=lambda *given: guidance.log_prob_gradient(*given) / len(given[1])),
            "The gradient is B times too small: each sample gets its own, of the sum over the batch.",
        ),
        Misconception(
            "step not told",
            _guided(gradient=_read_at(torch.zeros_like)),
            "The classifier is told step 0, whatever t is: it reads noise as if it were the picture's.",
        ),
        Misconception(
            "papers' t for code's",
            _guided(gradient=_read_at(lambda t: t + 1)),
            "1 is added to the classifier's t. Code counts steps from 0, for both networks.",
        ),
        Misconception(
            "one t for the whole batch",
            _guided(gradient=_read_at(lambda t: t[:1].expand_as(t))),
            "The classifier is told the first sample's step for all. Each sample has a step of its own.",
        ),
        Misconception(
            "first sample's class for all",
            _guided(
                gradient=lambda classifier, x_t, t, y: guidance.log_prob_gradient(
                    classifier, x_t, t, y[:1].expand_as(y)
                )
            ),
            "The first sample's class is used for all. Each sample has a class of its own.",
        ),
        Misconception(
            "variance dropped",
            _guided(joined=lambda output, moved: moved),
            "The channels of the variance are missing: they come back as they were.",
        ),
        Misconception(
            "variance moved too",
            _guided(
                joined=lambda output, moved: (
                    output
                    + (moved - output[:, : moved.shape[1]]).repeat(
                        1, output.shape[1] // moved.shape[1], *[1] * (moved.ndim - 2)
                    )
                )
            ),
            "The channels of the variance have been moved as well. A score has none to move.",
        ),
        Misconception(
            "the shift alone",
            _guided(
                joined=lambda output, moved: torch.cat(
                    [moved - output[:, : moved.shape[1]], output[:, moved.shape[1] :]], dim=1
                )
            ),
            "This is by how much the answer moves; the denoiser's own answer is missing.",
        ),
        Misconception(
            "unguided",
            lambda denoiser, classifier, x_t, t, y, scale, alpha_bar, target: denoiser(x_t, t),
            "The denoiser's answer comes back as it was. Add what the gradient makes of it.",
        ),
        Misconception(
            "denoiser at a moved x_t",
            _asked_twice,
            "x_t is moved, and the denoiser asked there. It is asked at x_t; its answer is what moves.",
        ),
        *schedule_mistakes(guidance.guided_output, "alpha_bar"),
    ),
)


def _gentle_classifier(draws: Draws, elements: int, classes: int, **numbers) -> CallableArgument:
    """A classifier whose gradients are small enough that rounding does not grow from step to step."""
    inward, speed, outward = _classifier(draws, elements, classes, **numbers).tensors
    return CallableArgument("noisy_classifier", (inward / math.sqrt(elements), speed, outward / 3))


def _mean_shifted_chain_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    side, wide = draws.integer(3, 4), draws.integer(5, 6)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, shape, num_steps, scale, dtype, mode in (
        ("points", (side, wide), 5, 1.5, float64, "grad"),
        ("images", (side, 2, 2, wide), draws.integer(3, 5), 1.3, float64, "no_grad"),
        ("a square", (side, side), draws.integer(6, 8), 0.7, float64, "grad"),
        ("one sample", (1, wide), 4, 2.0, float64, "grad"),
        ("a single step", (side, 2), 1, 2.5, float64, "grad"),
        ("unguided", (side, wide), 3, 0.0, float64, "no_grad"),
        ("float32", (side, wide), 4, 0.6, float32, "no_grad"),
        ("inference mode", (side, 1, 2, 2), 3, 3.0, float64, "inference_mode"),
    ):
        elements, numbers = math.prod(shape[1:]), {"dtype": dtype}
        mixing = draws.normal(elements, elements, **numbers) / math.sqrt(elements)
        moments = CallableArgument("step_moments", (mixing, draws.normal(elements, **numbers)))
        classes = draws.integer(3, 5)
        given = (
            moments,
            _gentle_classifier(draws, elements, classes, **numbers),
            _labels(draws, shape[0], classes),
            scale,
            draws.normal(*shape, **numbers),
            draws.steps(num_steps, 1000).sort().values,
            CallableArgument("noise_table", (draws.normal(num_steps, *shape, **numbers),)),
        )
        cases.append(Case(f"s = {scale:g}, {note}, {num_steps} steps", given, mode))
    return cases


def _chain(
    order: Callable = lambda num_steps: range(num_steps - 1, -1, -1),
    own: Callable = lambda index, steps: index,
    told: Callable = lambda index, steps: int(steps[index]),
    mean: Callable = lambda mean, variance, gradient, scale: mean + scale * variance * gradient,
    read: Callable = lambda x_t, mean: x_t,
    noise: Callable = lambda noise_at, index: noise_at(index) if index > 0 else 0.0,
    spread: Callable = lambda variance: variance.sqrt(),
    after: Callable = lambda x_t: x_t,
    go_on: Callable = lambda x_t, x_T: x_t,
) -> Callable:
    """mean_shifted_chain with one of its parts exchanged.

    own, told: the steps that the model and the classifier are told; mean: the guided one; read: what the
    classifier is shown; noise: of a step; spread: its factor; after: what is done to a step's result; go_on:
    where the next step begins.
    """

    def wrong(moments, classifier, y, scale, x_T, steps, noise_at):
        x_t = x_T
        for index in order(len(steps)):
            x_t = go_on(x_t, x_T)
            mu, variance = moments(x_t, torch.full((len(x_t),), own(index, steps)))
            at = torch.full((len(x_t),), told(index, steps))
            gradient = guidance.log_prob_gradient(classifier, read(x_t, mu), at, y)
            moved = mean(mu, variance, gradient, scale)
            x_t = after(moved + spread(variance) * noise(noise_at, index))
        return x_t

    return wrong


def _guided_once(moments, classifier, y, scale, x_T, steps, noise_at):
    at = steps[-1:].expand(len(x_T))
    gradient = guidance.log_prob_gradient(classifier, x_T, at, y)
    x_t = x_T
    for index in reversed(range(len(steps))):
        mu, variance = moments(x_t, torch.full((len(x_t),), index))
        x_t = mu + scale * variance * gradient
        x_t = x_t + variance.sqrt() * noise_at(index) if index > 0 else x_t
    return x_t


MEAN_SHIFTED_CHAIN = Exercise(
    "classifier_guidance.mean_shifted_chain",
    '"Bayes\' rule on one step", equation (3.10)',
    guidance.mean_shifted_chain,
    _mean_shifted_chain_cases,
    (
        Misconception(
            "own steps told to the classifier",
            _chain(told=lambda index, steps: index),
            "The classifier is told 0, 1, 2, ... It has learned the original steps: look them up in `steps`.",
        ),
        Misconception(
            "original steps told to the model",
            _chain(own=lambda index, steps: int(steps[index])),
            "The model's moments are asked for by the original step; they count the steps of their own, "
            "shortened schedule.",
        ),
        Misconception(
            "t counted from 1",
            _chain(own=lambda index, steps: index + 1),
            "The model is told the papers' t. Code counts from 0.",
        ),
        Misconception(
            "the step before told to the classifier",
            _chain(told=lambda index, steps: int(steps[max(index - 1, 0)])),
            "The classifier is shown x_t and told the level of the step before.",
        ),
        Misconception(
            "gradient at the mean",
            _chain(read=lambda x_t, mean: mean),
            "The gradient is taken at the mean, as the Taylor step would have it. Here it is taken at x_t, "
            "the point whose noise level the classifier is told.",
        ),
        Misconception(
            "gradient of the start for all steps",
            _guided_once,
            "The gradient is taken once, at x_T. Each step has its own, at its own x_t.",
        ),
        Misconception(
            "minus for plus",
            _chain(mean=lambda mean, variance, gradient, scale: mean - scale * variance * gradient),
            "The mean moves away from the class. The minus belongs to the form for eps.",
        ),
        Misconception(
            "Sigma forgotten",
            _chain(mean=lambda mean, variance, gradient, scale: mean + scale * gradient),
            "Sigma is missing in the shift: the less freedom a step has, the less the gradient may move it.",
        ),
        Misconception(
            "sigma for Sigma",
            _chain(mean=lambda mean, variance, gradient, scale: mean + scale * variance.sqrt() * gradient),
            "The shift has the variance in it; this is the standard deviation.",
        ),
        Misconception(
            "half of the shift",
            _chain(mean=lambda mean, variance, gradient, scale: mean + scale / 2 * variance * gradient),
            "The shift is s Sigma g, without 1/2: the 1/2 stands before both squares and cancels.",
        ),
        Misconception(
            "scale ignored",
            _chain(mean=lambda mean, variance, gradient, scale: mean + variance * gradient),
            "The scale does not appear in the result. It multiplies the gradient.",
        ),
        Misconception(
            "scale applied twice",
            _chain(mean=lambda mean, variance, gradient, scale: mean + scale**2 * variance * gradient),
            "The gradient is multiplied by the scale twice.",
        ),
        Misconception(
            "mean scaled too",
            _chain(mean=lambda mean, variance, gradient, scale: scale * (mean + variance * gradient)),
            "The scale belongs to the gradient alone; the model's mean stays as it is.",
        ),
        Misconception(
            "mean over the batch",
            _chain(
                mean=lambda mean, variance, gradient, scale: (
                    mean + scale * variance * gradient / len(gradient)
                )
            ),
            "The gradient is B times too small: each sample gets its own, of the sum over the batch.",
        ),
        Misconception(
            "gradient normalised",
            _chain(mean=lambda mean, variance, gradient, scale: mean + scale * variance * unit(gradient)),
            "The gradient's length matters: it falls to 0 where the class is certain. Take it as it is.",
        ),
        Misconception(
            "unguided",
            _chain(mean=lambda mean, variance, gradient, scale: mean),
            "The means are the model's own: nothing steers them.",
        ),
        Misconception(
            "noise in the last step",
            _chain(noise=lambda noise_at, index: noise_at(index)),
            "The last step adds noise to finished samples. There the mean itself is returned.",
        ),
        Misconception(
            "no noise",
            _chain(noise=lambda noise_at, index: 0.0),
            "No step but the last goes without noise: these are draws from a normal.",
        ),
        Misconception(
            "variance for standard deviation",
            _chain(spread=lambda variance: variance),
            "The noise is multiplied by the variance. Noise of that variance is sqrt(variance) eps.",
        ),
        Misconception(
            "noise not scaled",
            _chain(spread=torch.ones_like),
            "The noise has the variance 1 here. It is the step's: multiply by its standard deviation.",
        ),
        Misconception(
            "noises in the other order",
            lambda moments, classifier, y, scale, x_T, steps, noise_at: _chain(
                noise=lambda noise_at, index: noise_at(len(steps) - 1 - index) if index > 0 else 0.0
            )(moments, classifier, y, scale, x_T, steps, noise_at),
            "The noises are numbered like the own steps: that of step t is noise_at(t).",
        ),
        Misconception(
            "forwards",
            _chain(order=range),
            "The steps are taken from 0 upwards. Sampling begins with the noisiest one.",
        ),
        Misconception(
            "last step left out",
            _chain(order=lambda num_steps: range(num_steps - 1, 0, -1)),
            "The step of t = 0, the last one, is missing: a range does not contain its end.",
        ),
        Misconception(
            "every step from x_T",
            _chain(go_on=lambda x_t, x_T: x_T),
            "Each step begins again with x_T. It goes on from where the step before has come to.",
        ),
        Misconception(
            "clipped on the way",
            _chain(after=lambda x_t: x_t.clamp(-1, 1)),
            "x_t is clamped to [-1, 1]. It is noisy, and noise has no such bounds.",
        ),
    ),
)


def _classifier_training_step_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    cases = []
    for number, b in enumerate(batches(seed)):
        elements, classes = math.prod(b.shape[1:]), (5, 3, 7)[number % 3]
        shapes = (elements, 7), (7,), (7, classes)
        weights = tuple(draws.normal(*shape, dtype=b.dtype, gradient=True) for shape in shapes)
        old = tuple(draws.normal(*shape, dtype=b.dtype) for shape in shapes)
        given = (
            OptimizerArgument(weights, old, draws.uniform(1, low=0.05, high=0.2).item()),
            CallableArgument("noisy_classifier", weights),
            draws.normal(*b.shape, dtype=b.dtype),
            _labels(draws, b.shape[0], classes),
            b.t,
            draws.normal(*b.shape, dtype=b.dtype),
            b.alpha_bar,
        )
        cases.append(Case(b.note, given))
    return cases


def _teaching(
    shown: Callable = q_sample,
    told: Callable = lambda t: t,
    loss: Callable = lambda logits, y: F.cross_entropy(logits, y),
    learn: Callable | None = None,
) -> Callable:
    """classifier_training_step with one of its parts exchanged.

    shown: x_t, of x_0, alpha_bar and noise; told: the steps; loss: of logits and classes; learn: what is done
    with the optimizer and a function that computes the loss.
    """

    def once(optimizer, compute):
        optimizer.zero_grad()
        value = compute()
        value.backward()
        optimizer.step()
        return value.detach()

    def wrong(optimizer, classifier, x_0, y, t, noise, alpha_bar):
        return (learn or once)(optimizer, lambda: loss(classifier(shown(x_0, alpha_bar, noise), told(t)), y))

    return wrong


CLASSIFIER_TRAINING_STEP = Exercise(
    "classifier_guidance.classifier_training_step",
    '"Training it"',
    guidance.classifier_training_step,
    _classifier_training_step_cases,
    (
        Misconception(
            "trained on clean data",
            _teaching(shown=lambda x_0, alpha_bar, noise: x_0),
            "The classifier is shown clean data. It must learn to read what the sampler will show it, x_t.",
        ),
        Misconception(
            "step not told",
            _teaching(told=torch.zeros_like),
            "The classifier is told step 0, whatever t is. It must know how noisy its data are.",
        ),
        Misconception(
            "papers' t for code's",
            _teaching(told=lambda t: t + 1),
            "1 is added to t. Code counts from 0, and the samplers will, too.",
        ),
        Misconception(
            "one t for the whole batch",
            _teaching(told=lambda t: t[:1].expand_as(t)),
            "The first sample's step is told for all. Each sample has a step of its own.",
        ),
        Misconception(
            "noise not scaled",
            _teaching(shown=lambda x_0, alpha_bar, noise: alpha_bar.sqrt() * x_0 + noise),
            "The noise has the factor sqrt(1 - alpha_bar) in x_t, (1.6).",
        ),
        Misconception(
            "x_0 not scaled",
            _teaching(shown=lambda x_0, alpha_bar, noise: x_0 + (1 - alpha_bar).sqrt() * noise),
            "x_0 has the factor sqrt(alpha_bar) in x_t, (1.6).",
        ),
        Misconception(
            "roots forgotten",
            _teaching(shown=lambda x_0, alpha_bar, noise: alpha_bar * x_0 + (1 - alpha_bar) * noise),
            "alpha_bar and 1 - alpha_bar are variances; in x_t stand their roots, (1.6).",
        ),
        Misconception(
            "signal and noise swapped",
            _teaching(shown=lambda x_0, alpha_bar, noise: q_sample(noise, alpha_bar, x_0)),
            "x_0 and the noise have changed places in x_t.",
        ),
        Misconception(
            "noise of its own",
            _teaching(shown=lambda x_0, alpha_bar, noise: q_sample(x_0, alpha_bar, torch.randn_like(x_0))),
            "The noise is drawn anew. The batch is given, its noise as well.",
        ),
        Misconception(
            "sum over the batch",
            _teaching(loss=lambda logits, y: F.cross_entropy(logits, y, reduction="sum")),
            "The losses of the batch are summed. Here the mean is wanted, so that the rate does not depend "
            "on the size of the batch.",
        ),
        Misconception(
            "uphill",
            _teaching(loss=lambda logits, y: -F.cross_entropy(logits, y)),
            "This is the log-probability itself, and the optimizer makes it small. The loss is minus it.",
        ),
        Misconception(
            "probability for log-probability",
            _teaching(loss=lambda logits, y: -_own(logits.softmax(1), y).mean()),
            "The loss is minus the mean probability. The cross-entropy has its logarithm.",
        ),
        Misconception(
            "raw logit",
            _teaching(loss=lambda logits, y: -_own(logits, y).mean()),
            "The loss is minus the mean logit, which a network lowers without learning anything: the "
            "log-probability is wanted.",
        ),
        Misconception(
            "softmax before the cross-entropy",
            _teaching(loss=lambda logits, y: F.cross_entropy(logits.softmax(1), y)),
            "The softmax is taken twice: the log-probabilities are made of the logits themselves.",
        ),
        Misconception(
            "its own answer for y",
            _teaching(loss=lambda logits, y: F.cross_entropy(logits, logits.argmax(1))),
            "The classifier is taught what it believes already. y says what is right.",
        ),
        Misconception(
            "first sample's class for all",
            _teaching(loss=lambda logits, y: F.cross_entropy(logits, y[:1].expand_as(y))),
            "The first sample's class is used for all. Each sample has a class of its own.",
        ),
        *step_mistakes(lambda learn: _teaching(learn=learn)),
        *schedule_mistakes(guidance.classifier_training_step, "alpha_bar"),
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
    GUIDED_OUTPUT,
    MEAN_SHIFTED_CHAIN,
    ATTENTION_POOL,
    JOINT_LOGITS,
    CLASSIFIER_TRAINING_STEP,
]
