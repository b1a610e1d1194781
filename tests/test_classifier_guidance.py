"""Chapter 03 against oracles: a mixture of known classes, torch's functions, diffusers' U-Net and sampler."""

from dataclasses import replace
from functools import partial, reduce
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed, seeded, unet_of_diffusers
from torch.distributions import Categorical, Normal

from lecture26.classifier_guidance import (
    NoisyClassifier,
    attention_pool,
    classifier_guided,
    classifier_mean_shift,
    classifier_training_step,
    exact_classifier,
    guided_eps,
    guided_mean,
    guided_output,
    joint_class,
    joint_logits,
    log_prob_gradient,
    sample_mean_shifted,
    selected_log_probs,
)
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    cosine_betas,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    linear_betas,
    sample,
)
from lecture26.kit.data import load
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import classifiers, find_recipe

PREDICTIONS = ("eps", "x_0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
STEPS = {
    "ddpm": ddpm_step,
    "ddim": ddim_step,
    "ddim, eta 0.5": partial(ddim_step, eta=0.5),
    "ddim, eta 1": partial(ddim_step, eta=1.0),
}
SPACINGS = {"all steps": lambda diffusion: diffusion, "respaced": lambda diffusion: diffusion.respace(12)}
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]], [0.3, 0.5, 0.4])
CLASSES = [GaussianMixture([1.0], MIXTURE.means[[k]], MIXTURE.stds[[k]]) for k in range(3)]
SMALL = {"base_channels": 16, "channel_multipliers": (1, 2), "num_blocks": 1, "attention_levels": (1,)}


def integers(high, count, seed=0):
    return torch.randint(high, (count,), generator=seeded(seed))


def full(count, value):
    return torch.full((count,), value)


def always(output):
    """A denoiser that returns the same whatever it gets."""
    return lambda x_t, t: output


def class_log_probs(x_t, alpha_bar):
    """log q(class | x_t) of the mixture, (B, 3), with torch's normals."""
    stds = (alpha_bar * MIXTURE.stds**2 + 1 - alpha_bar).sqrt()  # (B, 3)
    normals = Normal(alpha_bar.sqrt()[:, :, None] * MIXTURE.means, stds[:, :, None])
    joint = normals.log_prob(x_t[:, None]).sum(dim=2) + MIXTURE.weights.log()
    return joint.log_softmax(dim=1)


def small_classifier(num_classes=(3, 2), dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturbed(NoisyClassifier(3, num_classes, **SMALL, patch_size=2), dtype).eval()


def smooth_classifier(x_t, t):
    """A classifier of images (B, 3, H, W) with 5 classes, which notes neither dtype nor size."""
    features = (x_t.flatten(2).mean(dim=2) + x_t.square().flatten(2).mean(dim=2)) * (1 + t[:, None] / 50)
    return torch.cat([features.sin(), features[:, :2].cos()], dim=1)


# Bayes' rule on scores


@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(100)], ids=["linear", "cosine"])
@pytest.mark.parametrize("y", range(3))
def test_guided_noise_is_the_noise_of_the_class(betas, y):
    diffusion = Diffusion(betas)
    t, x_t = integers(90, 64) + 5, normal(64, 2)
    gradient = log_prob_gradient(exact_classifier(MIXTURE, diffusion), x_t, t, full(64, y))
    eps_u = exact_denoiser(MIXTURE, diffusion)(x_t, t)
    eps_c = exact_denoiser(CLASSES[y], diffusion)(x_t, t)
    assert (eps_u - eps_c).abs().amax() > 0.1
    agree(guided_eps(eps_u, gradient, diffusion.alpha_bar[t, None], 1.0), eps_c, 1e-10)


def test_gradients_of_all_classes_cancel():
    diffusion = Diffusion(linear_betas(100))
    t, x_t = integers(90, 64) + 5, normal(64, 2)
    classifier = exact_classifier(MIXTURE, diffusion)
    probabilities = classifier(x_t, t).softmax(dim=1)
    gradients = torch.stack([log_prob_gradient(classifier, x_t, t, full(64, y)) for y in range(3)], dim=1)
    assert gradients.abs().amax() > 1
    agree((probabilities[:, :, None] * gradients).sum(dim=1), torch.zeros(64, 2).double(), 1e-9)


def test_guided_noise_by_elements():
    eps, gradient, alpha_bar = normal(2, 3), normal(2, 3, seed=1), torch.tensor([[0.9], [0.2]]).double()
    actual = guided_eps(eps, gradient, alpha_bar, 2.5)
    for b in range(2):
        expected = eps[b] - 2.5 * (1 - alpha_bar[b].item()) ** 0.5 * gradient[b]
        agree(actual[b], expected, 1e-14)


# From a classifier to its gradient


@pytest.mark.parametrize(("batch", "classes"), [(7, 3), (3, 7), (4, 4), (1, 5)])
def test_selected_log_probs_are_those_of_torch(batch, classes):
    logits, y = 3 * normal(batch, classes), integers(classes, batch)
    actual = selected_log_probs(logits, y)
    agree(actual, -F.cross_entropy(logits, y, reduction="none"), 1e-13)
    agree(actual, Categorical(logits=logits).log_prob(y), 1e-13)


def test_selected_log_probs_of_no_samples():
    agree(selected_log_probs(normal(0, 5), integers(5, 0)), normal(0), 0.0)


def test_selected_log_probs_survive_certainty():
    logits = torch.tensor([[0.0, 2000.0], [0.0, 2000.0]])
    agree(selected_log_probs(logits, torch.tensor([0, 1])), torch.tensor([-2000.0, 0.0]), 0.0)


def test_gradient_in_closed_form():
    """It is the difference of two scores."""
    diffusion = Diffusion(linear_betas(100))
    t, y, x_t = integers(90, 64) + 5, integers(3, 64, seed=1), normal(64, 2)
    alpha_bar = diffusion.alpha_bar[t, None]
    scores = torch.stack([single.score(x_t, alpha_bar) for single in CLASSES], dim=1)  # (64, 3, 2)
    expected = scores[torch.arange(64), y] - MIXTURE.score(x_t, alpha_bar)
    agree(log_prob_gradient(exact_classifier(MIXTURE, diffusion), x_t, t, y), expected, 1e-10)


def test_gradient_of_a_network_is_that_of_each_image_alone():
    classifier, x_t = small_classifier(), normal(5, 3, 8, 8)
    t, y = torch.tensor([0, 20, 400, 700, 999]), torch.tensor([0, 5, 2, 2, 3])
    gradient = log_prob_gradient(classifier, x_t, t, y)
    agree(log_prob_gradient(classifier, x_t[1:3], t[1:3], y[1:3]), gradient[1:3], 1e-12)

    def log_prob(x, step, label):
        return F.log_softmax(classifier(x[None], step[None]), dim=1)[0, label]

    alone = torch.stack([torch.func.grad(log_prob)(*row) for row in zip(x_t, t, y, strict=True)])
    agree(gradient, alone.detach(), 1e-12)
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_gradient_by_differences():
    classifier, x_t, t, y = (
        small_classifier(),
        normal(2, 3, 4, 4),
        torch.tensor([3, 800]),
        torch.tensor([1, 4]),
    )
    direction, small = normal(2, 3, 4, 4, seed=1), 1e-5
    with torch.no_grad():
        high, low = (
            -F.cross_entropy(classifier(x_t + sign * small * direction, t), y, reduction="none")
            for sign in (1, -1)
        )
    slope = (log_prob_gradient(classifier, x_t, t, y) * direction).flatten(1).sum(dim=1)
    agree(slope, (high - low) / (2 * small), 1e-7)


def test_gradient_leaves_no_graph_and_no_grad_behind():
    classifier, x_t = small_classifier(), normal(2, 3, 8, 8).requires_grad_()
    t, y = torch.tensor([3, 800]), torch.tensor([1, 4])
    before = [x_t.detach().clone(), t.clone(), y.clone()]
    gradient = log_prob_gradient(classifier, x_t, t, y)
    assert not gradient.requires_grad and gradient.grad_fn is None
    assert x_t.grad is None and x_t.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in classifier.parameters())
    for now, then in zip((x_t.detach(), t, y), before, strict=True):
        agree(now, then, 0.0)
    assert torch.is_grad_enabled()
    plain = x_t.detach()
    log_prob_gradient(classifier, plain, t, y)
    assert not plain.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_needs_no_mode_of_its_own(mode):
    classifier = small_classifier()

    def gradient():
        x_t, t, y = normal(2, 3, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 4])
        return log_prob_gradient(classifier, x_t, t, y)

    expected = gradient()
    with mode():
        actual = gradient()
        assert not torch.is_grad_enabled()
        assert not actual.requires_grad
    agree(actual, expected, 0.0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_exact_classifier(spacing):
    base = Diffusion(linear_betas(100))
    t, x_t = integers(100, 64), normal(64, 2)
    log_probs = exact_classifier(MIXTURE, SPACINGS[spacing](base))(x_t, t).log_softmax(dim=1)
    alpha_bar = base.alpha_bar[t, None]
    agree(log_probs, class_log_probs(x_t, alpha_bar), 1e-10)
    agree(log_probs.exp(), MIXTURE.responsibilities(x_t, alpha_bar), 1e-12)


# A guided denoiser is a denoiser


def path(diffusion, denoiser, x_T, step):
    """All x_t on the way, (T, B, ...), always with the same noise."""
    visited = []

    def recording_step(*arguments):
        visited.append(step(*arguments))
        return visited[-1]

    sample(diffusion, denoiser, x_T.shape, recording_step, seeded(1), x_T, progress=False)
    return torch.stack(visited)


@pytest.mark.parametrize("schedule", [linear_betas, cosine_betas])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_guided_output_is_that_of_an_added_score(prediction, schedule):
    """The shift by way of `target` against the factors of chapter 01, at all steps, the last one included."""
    diffusion = Diffusion(schedule(50), prediction)
    t, x_t, output = torch.arange(50), normal(50, 3, 4, 4), normal(50, 6, 4, 4, seed=1)
    y, alpha_bar = integers(5, 50, seed=2), diffusion.alpha_bar[:, None, None, None]
    given = always(output), smooth_classifier, x_t, t, y, 2.5, alpha_bar, diffusion.target
    gradient = log_prob_gradient(smooth_classifier, x_t, t, y)
    actual, expected = guided_output(*given), diffusion.add_score(output, x_t, t, 2.5 * gradient)
    scale = expected.abs().amax(dim=(1, 2, 3), keepdim=True)  # large where alpha_bar is nearly 0
    agree(actual / scale, expected / scale, 1e-12)
    agree(actual[:, 3:], output[:, 3:], 0.0)
    assert (actual[:, :3] - output[:, :3]).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_guided_paths_are_those_of_the_classes(step, prediction, spacing):
    base = Diffusion(linear_betas(60), prediction)
    diffusion, x_T, y = SPACINGS[spacing](base), normal(9, 2), torch.arange(9) % 3
    denoiser, classifier = exact_denoiser(MIXTURE, base), exact_classifier(MIXTURE, base)
    guided = path(diffusion, classifier_guided(denoiser, classifier, y, 1.0, base), x_T, STEPS[step])

    def class_denoiser(x_t, t):
        outputs = [exact_denoiser(single, base)(x_t, t) for single in CLASSES]
        return torch.stack(outputs)[y, torch.arange(9)]

    agree(guided, path(diffusion, class_denoiser, x_T, STEPS[step]), 1e-8)
    distances = (guided[-1][:, None] - MIXTURE.means).norm(dim=2)  # (9, 3)
    assert (distances.argmin(dim=1) == y).all()
    unguided = path(diffusion, denoiser, x_T, STEPS[step])
    assert (unguided[-1] - guided[-1]).abs().amax() > 0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_base_and_respaced_diffusion_make_the_same_wrapper(step, prediction):
    base = Diffusion(linear_betas(60), prediction)
    short = base.respace(20).respace(7)
    denoiser, classifier = exact_denoiser(MIXTURE, base), exact_classifier(MIXTURE, short)
    one, other = (
        path(
            short, classifier_guided(denoiser, classifier, full(4, 1), 3.0, given), normal(4, 2), STEPS[step]
        )
        for given in (base, short)
    )
    agree(one, other, 0.0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_both_forms_give_the_classifier_the_original_steps(spacing):
    base = Diffusion(linear_betas(60))
    diffusion = SPACINGS[spacing](base)
    seen = []

    def classifier(x_t, t):
        assert t.dtype == torch.int64 and t.shape == (4,)
        seen.append(t.unique().tolist())
        return smooth_classifier(x_t, t)

    x_T, y, denoiser = normal(4, 3, 2, 2), torch.tensor([0, 4, 2, 2]), lambda x_t, t: x_t.sin()
    expected = [[step] for step in reversed(diffusion.steps.tolist())]
    for step in STEPS.values():
        path(diffusion, classifier_guided(denoiser, classifier, y, 2.0, diffusion), x_T, step)
        assert seen == expected
        seen.clear()
    path(diffusion, denoiser, x_T, partial(ddpm_step, mean_shift=classifier_mean_shift(classifier, y, 2.0)))
    assert seen == expected


every_output = pytest.mark.parametrize(("prediction", "variance"), list(product(PREDICTIONS, VARIANCES)))


def images(variance, batch=3):
    """x_t, t, a denoiser's output for this variance, and labels."""
    channels = 6 if variance == "learned_range" else 3
    return (
        normal(batch, 3, 4, 4),
        integers(60, batch),
        normal(batch, channels, 4, 4, seed=1),
        torch.arange(batch),
    )


@every_output
def test_scale_0_is_no_guidance(prediction, variance):
    diffusion = Diffusion(linear_betas(60), prediction, variance)
    x_t, t, output, y = images(variance)
    agree(classifier_guided(always(output), smooth_classifier, y, 0.0, diffusion)(x_t, t), output, 0.0)
    for step in STEPS.values():
        unguided, guided = (
            path(diffusion.respace(5), denoiser, x_t, step)
            for denoiser in (
                always(output),
                classifier_guided(always(output), smooth_classifier, y, 0.0, diffusion),
            )
        )
        agree(guided, unguided, 0.0)
    shift = classifier_mean_shift(smooth_classifier, y, 0.0)
    agree(shift(x_t, x_t.abs(), x_t, t), torch.zeros_like(x_t), 0.0)


@every_output
def test_guidance_is_linear_in_the_scale(prediction, variance):
    diffusion = Diffusion(linear_betas(60), prediction, variance)
    x_t, t, output, y = images(variance)
    once, thrice = (
        classifier_guided(always(output), smooth_classifier, y, scale, diffusion)(x_t, t) - output
        for scale in (1.0, 3.0)
    )
    agree(thrice, 3 * once, 1e-12)
    assert once[:, :3].abs().amax() > 1e-3


@every_output
def test_guidance_leaves_variance_channels_alone(prediction, variance):
    diffusion = Diffusion(linear_betas(60), prediction, variance)
    x_t, t, output, y = images(variance)
    guided = classifier_guided(always(output), smooth_classifier, y, 5.0, diffusion)(x_t, t)
    assert guided.shape == output.shape
    agree(guided[:, 3:], output[:, 3:], 0.0)
    assert not torch.isclose(guided[:, :3], output[:, :3]).all()


@every_output
def test_guidance_moves_the_predicted_noise_of_any_network_alike(prediction, variance):
    diffusion = Diffusion(linear_betas(60), prediction, variance)
    x_t, t, output, y = images(variance)
    guided = classifier_guided(always(output), smooth_classifier, y, 2.5, diffusion)
    before, after = (diffusion.p_mean_variance(denoiser, x_t, t) for denoiser in (always(output), guided))
    gradient = log_prob_gradient(smooth_classifier, x_t, t, y)
    expected = guided_eps(before.eps, gradient, diffusion.alpha_bar[t, None, None, None], 2.5)
    agree(after.eps, expected, 1e-9)
    agree(after.log_variance, before.log_variance, 0.0)


def test_guided_denoiser_asks_the_denoiser_once_with_what_it_got():
    calls = []

    def denoiser(x_t, t):
        calls.append((x_t, t))
        return x_t.sin()

    x_t, t, y = normal(3, 3, 4, 4), torch.tensor([2, 40, 59]), torch.arange(3)
    classifier_guided(denoiser, smooth_classifier, y, 1.0, Diffusion(linear_betas(60)))(x_t, t)
    ((x, step),) = calls
    assert x is x_t and step is t


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["wrapped", "hook"])
def test_sampling_works_in_any_mode_and_leaves_nothing_behind(form, mode):
    classifier, diffusion = small_classifier(), Diffusion(linear_betas(60)).respace(4)
    factor = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    denoiser = lambda x_t, t: factor * x_t.sin()  # noqa: E731

    def samples():
        x_T, y = normal(2, 3, 8, 8), torch.tensor([0, 5])
        if form == "wrapped":
            guided = classifier_guided(denoiser, classifier, y, 2.0, diffusion)
            return sample(diffusion, guided, x_T.shape, ddim_step, x_T=x_T, progress=False)
        step = partial(ddpm_step, mean_shift=classifier_mean_shift(classifier, y, 2.0))
        return sample(diffusion, denoiser, x_T.shape, step, seeded(), x_T, progress=False)

    expected = samples()
    with mode():
        actual = samples()
    agree(actual, expected, 0.0)
    assert not actual.requires_grad
    assert all(parameter.grad is None for parameter in [factor, *classifier.parameters()])


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_single_step_works_in_inference_mode(step):
    """Without `sample`, which switches gradients off once more."""
    classifier, diffusion = small_classifier(), Diffusion(linear_betas(60), "v", clip=True)

    def stepped():
        x_t, noise, t, y = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), torch.tensor([0, 50]), full(2, 3)
        guided = classifier_guided(lambda x_t, t: x_t.sin(), classifier, y, 2.0, diffusion)
        return step(diffusion, guided, x_t, t, noise)

    expected = stepped()
    with torch.inference_mode():
        actual = stepped()
    agree(actual.clone(), expected, 0.0)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_input_is_kept_through_and_through(dtype, default):
    diffusion = Diffusion(linear_betas(60))
    torch.set_default_dtype(default)
    try:
        classifier = small_classifier(dtype=dtype)
        x_t, t, y = normal(2, 3, 8, 8, dtype=dtype), torch.tensor([3, 50]), torch.tensor([0, 5])
        assert log_prob_gradient(classifier, x_t, t, y).dtype == dtype
        guided = classifier_guided(lambda x_t, t: x_t.sin(), classifier, y, 2.0, diffusion)
        shift = classifier_mean_shift(classifier, y, 2.0)
        outputs = [
            guided(x_t, t),
            classifier(x_t, t),
            shift(x_t, x_t.abs(), x_t, t),
            exact_classifier(MIXTURE, diffusion)(x_t[:, 0, 0, :2], t),
            *(path(diffusion.respace(3), guided, x_t, step) for step in STEPS.values()),
            path(diffusion.respace(3), guided, x_t, partial(ddpm_step, mean_shift=shift)),
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [output.dtype for output in outputs] == [dtype] * len(outputs)
    if dtype == torch.float64:  # not by way of float32: both defaults give the same digits
        agree(guided(x_t, t), outputs[0], 1e-13)


def test_float32_agrees_with_float64():
    x_t, t, y = normal(2, 3, 8, 8), torch.tensor([3, 50]), torch.tensor([0, 5])
    one, other = (
        log_prob_gradient(small_classifier().to(dtype), x_t.to(dtype), t, y)
        for dtype in (torch.float64, torch.float32)
    )
    agree(other.double(), one, 1e-4)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_empty_batch(step):
    classifier, diffusion = small_classifier(), Diffusion(linear_betas(60)).respace(3)
    x_T, y = normal(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)
    assert log_prob_gradient(classifier, x_T, y, y).shape == (0, 3, 8, 8)
    guided = classifier_guided(lambda x_t, t: x_t, classifier, y, 2.0, diffusion)
    assert sample(diffusion, guided, x_T.shape, step, x_T=x_T, progress=False).shape == (0, 3, 8, 8)
    hooked = partial(ddpm_step, mean_shift=classifier_mean_shift(classifier, y, 2.0))
    assert sample(diffusion, lambda x_t, t: x_t, x_T.shape, hooked, x_T=x_T, progress=False).shape[0] == 0


def test_unet_of_diffusers_is_guided_through_one_lambda():
    theirs = unet_of_diffusers()
    base = Diffusion(linear_betas(100), clip=True)
    x_T, y = normal(2, 3, 8, 8), torch.tensor([1, 4])
    guided = classifier_guided(lambda x_t, t: theirs(x_t, t).sample, smooth_classifier, y, 3.0, base)
    ours = sample(base.respace(10), guided, x_T.shape, ddim_step, x_T=x_T, progress=False)

    scheduler = DDIMScheduler(100, clip_sample=True)
    scheduler.alphas_cumprod = base.alpha_bar
    scheduler.set_timesteps(9)  # takes the step before t for t - 11, which is right
    x_t = x_T
    for step in reversed(range(0, 100, 11)):
        x_t = x_t.detach().requires_grad_()
        log_probs = smooth_classifier(x_t, full(2, step)).log_softmax(dim=1)
        (gradient,) = torch.autograd.grad(log_probs[0, 1] + log_probs[1, 4], x_t)
        with torch.no_grad():
            eps = theirs(x_t, step).sample - 3.0 * (1 - base.alpha_bar[step]).sqrt() * gradient
            x_t = scheduler.step(eps, step, x_t, use_clipped_model_output=True).prev_sample
    agree(ours, x_t.detach(), 1e-9)


# The lecture's form


@every_output
def test_shifts_of_one_ancestral_step(prediction, variance):
    """The wrapped denoiser moves the mean by s beta / sqrt(alpha) g, the hook by s Sigma g."""
    for diffusion in (Diffusion(linear_betas(60), prediction, variance), None):
        diffusion = diffusion or Diffusion(linear_betas(60), prediction, variance).respace(12)
        x_t, _, output, y = images(variance, batch=5)
        noise, t = normal(5, 3, 4, 4, seed=2), torch.tensor([0, 1, 5, 10, 11])
        gradient = log_prob_gradient(smooth_classifier, x_t, diffusion.steps[t], y)
        step = partial(ddpm_step, diffusion, x_t=x_t, t=t, noise=noise)
        unguided = step(always(output))

        wrapped = classifier_guided(always(output), smooth_classifier, y, 2.5, diffusion)
        beta = diffusion.betas[t, None, None, None]
        agree(step(wrapped) - unguided, 2.5 * beta / (1 - beta).sqrt() * gradient, 1e-9)

        shift = classifier_mean_shift(smooth_classifier, y, 2.5)
        sigma = diffusion.p_mean_variance(always(output), x_t, t).variance
        hooked = step(always(output), mean_shift=shift)
        agree(hooked - unguided, 2.5 * sigma * gradient, 1e-12)
        assert (hooked[0] == unguided[0]).all() == (variance == "fixed_small")  # Sigma is 0 at t = 0

        both = step(wrapped, mean_shift=shift)
        agree(both, step(wrapped) + 2.5 * sigma * gradient, 1e-12)


def test_the_two_forms_meet_as_steps_get_finer():
    distances = []
    for num_steps in (50, 200, 800):
        diffusion = Diffusion(linear_betas(num_steps))
        t, y, x_t = full(64, num_steps // 2), full(64, 2), normal(64, 2)
        gradient = log_prob_gradient(exact_classifier(MIXTURE, diffusion), x_t, t, y)
        beta = diffusion.betas[t, None]
        shift = classifier_mean_shift(exact_classifier(MIXTURE, diffusion), y, 3.0)
        exact = 3.0 * beta / (1 - beta).sqrt() * gradient
        variance = diffusion.q_posterior(x_t, x_t, t).variance
        distances.append(((shift(x_t, variance, x_t, t) - exact).norm() / exact.norm()).item())
    assert distances[0] > 3 * distances[1] > 9 * distances[2]


@pytest.mark.parametrize("clip", [False, True])
def test_the_hook_moves_the_mean_after_clipping(clip):
    diffusion = Diffusion(linear_betas(60), clip=clip)
    x_t, t, output, y = images("fixed_small")
    t, zero = t + 0, torch.zeros_like(x_t)
    p = diffusion.p_mean_variance(always(output), x_t, t)
    moved = ddpm_step(
        diffusion, always(output), x_t, t, zero, mean_shift=classifier_mean_shift(smooth_classifier, y, 4.0)
    )
    gradient = log_prob_gradient(smooth_classifier, x_t, t, y)
    agree(moved, p.mean + 4.0 * p.variance * gradient, 1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_loop_with_the_mean_shift_draws_what_the_hook_draws(variance, spacing):
    base = Diffusion(linear_betas(60), "eps", variance)
    diffusion, x_T, y = SPACINGS[spacing](base), normal(9, 2), torch.arange(9) % 3
    exact, classifier = exact_denoiser(MIXTURE, base), exact_classifier(MIXTURE, base)

    def denoiser(x_t, t):
        eps = exact(x_t, t)
        return torch.cat([eps, 0.3 * eps], dim=1) if variance == "learned_range" else eps

    actual = sample_mean_shifted(diffusion, denoiser, classifier, y, 2.0, x_T, seeded(1))
    hooked = partial(ddpm_step, mean_shift=classifier_mean_shift(classifier, y, 2.0))
    agree(actual, sample(diffusion, denoiser, x_T.shape, hooked, seeded(1), x_T, progress=False), 1e-10)
    unguided = sample_mean_shifted(diffusion, denoiser, classifier, y, 0.0, x_T, seeded(1))
    agree(unguided, sample(diffusion, denoiser, x_T.shape, ddpm_step, seeded(1), x_T, progress=False), 1e-10)
    assert (actual - unguided).abs().amax() > 0.5


def test_a_step_of_training_is_that_of_torch():
    diffusion, y, t = Diffusion(cosine_betas(100)), torch.tensor([0, 5, 2, 3]), torch.tensor([0, 30, 60, 99])
    x_0, noise = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    losses, weights = [], []
    for own in (True, False):
        model = small_classifier().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if own:
            alpha_bar = diffusion.alpha_bar[t, None, None, None]
            loss = classifier_training_step(optimizer, model, x_0, y, t, noise, alpha_bar)
            assert not loss.requires_grad
        else:
            loss = F.cross_entropy(model(diffusion.q_sample(x_0, t, noise), t), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    agree(losses[0], losses[1], 1e-12)
    agree(weights[0], weights[1], 1e-12)
    start = torch.cat([weight.detach().flatten() for weight in small_classifier().parameters()])
    assert (weights[0] - start).abs().amax() > 1e-4


def test_guided_mean_completes_the_square():
    """log N(x; mu, Sigma) + s (x - mu) g and log N(x; mu + s Sigma g, Sigma) differ by a constant."""
    mean, gradient, variance = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2).exp()
    x = normal(50, 2, 3, seed=3)
    tilted = Normal(mean, variance.sqrt()).log_prob(x) + 2.5 * (x - mean) * gradient
    shifted = Normal(guided_mean(mean, variance, gradient, 2.5), variance.sqrt()).log_prob(x)
    difference = tilted - shifted
    agree(difference, difference[:1].expand(50, 2, 3), 1e-11)


# Pooling and joint labels


@pytest.mark.parametrize(
    ("batch", "places", "channels", "labels"), [(3, 7, 5, 2), (4, 4, 4, 4), (1, 6, 3, 1), (0, 6, 3, 2)]
)
def test_attention_pool_is_that_of_torch(batch, places, channels, labels):
    tokens, queries = normal(batch, places, channels), normal(labels, channels, seed=1)
    expected = F.scaled_dot_product_attention(queries.expand(batch, labels, channels), tokens, tokens)
    agree(attention_pool(tokens, queries), expected, 1e-12)


def test_attention_pool_with_queries_of_0_is_the_mean():
    tokens = normal(3, 7, 5)
    agree(
        attention_pool(tokens, torch.zeros(2, 5).double()),
        tokens.mean(dim=1, keepdim=True).expand(3, 2, 5),
        1e-13,
    )


def test_attention_pool_knows_no_order_of_places():
    tokens, queries = normal(3, 7, 5), normal(2, 5, seed=1)
    order = torch.randperm(7, generator=seeded())
    agree(attention_pool(tokens[:, order], queries), attention_pool(tokens, queries), 1e-13)


def test_joint_softmax_factorises():
    labels = [2 * normal(5, count, seed=count) for count in (4, 3, 2)]
    joint = reduce(joint_logits, labels).softmax(dim=1)
    one, two, three = (logits.softmax(dim=1) for logits in labels)
    for i, j, k in product(range(4), range(3), range(2)):
        agree(joint[:, (i * 3 + j) * 2 + k], one[:, i] * two[:, j] * three[:, k], 1e-14)


def test_gradients_of_joint_labels_add_up():
    classifier, x_t, t = small_classifier(), normal(3, 3, 8, 8), torch.tensor([0, 20, 999])
    labels = torch.tensor([[0, 1], [2, 0], [1, 1]])
    by_label = [
        log_prob_gradient(lambda x_t, t, i=i: classifier.label_logits(x_t, t)[i], x_t, t, labels[:, i])
        for i in range(2)
    ]
    agree(log_prob_gradient(classifier, x_t, t, joint_class(labels, (3, 2))), sum(by_label), 1e-12)


@pytest.mark.parametrize("num_classes", [(5,), (3, 4), (4, 1, 3)])
def test_joint_class_numbers_as_numpy_does(num_classes):
    labels = torch.tensor(list(product(*map(range, num_classes))))
    actual = joint_class(labels, num_classes)
    agree(actual, torch.arange(len(labels)), 0)
    agree(actual, torch.from_numpy(np.ravel_multi_index(labels.T.numpy(), num_classes)), 0)


def test_joint_class_of_no_samples():
    agree(joint_class(torch.empty(0, 2, dtype=torch.int64), (3, 2)), torch.empty(0, dtype=torch.int64), 0)


# The network


@pytest.mark.parametrize(
    "options",
    [
        {"base_channels": 8, "channel_multipliers": (2,), "attention_levels": ()},
        {"base_channels": 16, "channel_multipliers": (1, 3), "num_blocks": 2, "attention_levels": ()},
        {"base_channels": 16, "channel_multipliers": (2, 2, 4), "attention_levels": (0, 2), "patch_size": 2},
    ],
)
@pytest.mark.parametrize(
    ("num_classes", "counts"), [(5, (5,)), ((5,), (5,)), ((3, 4), (3, 4)), ([2, 3, 2], (2, 3, 2))]
)
def test_classes_of_the_network(options, num_classes, counts):
    model = perturbed(NoisyClassifier(3, num_classes, **options))
    x_t, t = normal(2, 3, 16, 8), torch.tensor([0, 999])
    by_label = model.label_logits(x_t, t)
    assert [logits.shape for logits in by_label] == [(2, count) for count in counts]
    assert model.num_classes == counts
    logits = model(x_t, t)
    assert logits.shape == (2, torch.tensor(counts).prod()) and logits.dtype == torch.float64
    expected = by_label[0]
    for other in by_label[1:]:
        expected = torch.stack(
            [row[:, None] + more for row, more in zip(expected, other, strict=True)]
        ).flatten(1)
    agree(logits, expected, 0.0)
    labels = torch.tensor([[count - 1 for count in counts], [0] * len(counts)])
    summed = sum(
        -F.cross_entropy(part, y, reduction="none") for part, y in zip(by_label, labels.T, strict=True)
    )
    agree(selected_log_probs(logits, joint_class(labels, counts)), summed, 1e-12)


def test_network_treats_images_by_themselves():
    model = small_classifier()
    x_t, t = normal(3, 3, 8, 8), torch.tensor([0, 20, 999])
    one_by_one = [model(x_t[i : i + 1], t[i : i + 1]) for i in range(3)]
    agree(model(x_t, t), torch.cat(one_by_one), 1e-12)
    model.train()  # it has neither dropout nor statistics of batches
    agree(model(x_t, t), torch.cat(one_by_one), 1e-12)


def test_network_knows_the_step():
    logits = small_classifier()(normal(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([0, 1, 999]))
    for i in range(2):
        assert not torch.isclose(logits[i], logits[i + 1]).any()


def test_network_sees_the_whole_image():
    """Every pixel of every channel has a say in every label."""
    model, t = small_classifier((3, 2)), torch.tensor([5])
    x_t = normal(1, 3, 8, 8).requires_grad_()
    for logits in model.label_logits(x_t, t):
        (gradient,) = torch.autograd.grad(logits[0, 0], x_t, retain_graph=True)
        assert (gradient != 0).all()


def test_every_parameter_of_the_network_learns():
    model, t = small_classifier((3, 4)), torch.tensor([0, 10, 500, 999])
    F.cross_entropy(model(normal(4, 3, 8, 8), t), torch.tensor([0, 5, 7, 11])).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_network_is_the_way_down_with_attention_at_its_levels():
    model = NoisyClassifier(
        3,
        5,
        base_channels=32,
        channel_multipliers=(1, 2, 3),
        num_blocks=2,
        attention_levels=(0, 2),
        patch_size=2,
    )
    sizes = []
    for level in model.levels:
        level.register_forward_hook(
            lambda module, given, maps: sizes.append([tuple(m.shape[1:]) for m in maps])
        )
    model(normal(1, 3, 32, 16, dtype=torch.float32), torch.tensor([3]))
    assert sizes == [
        [(32, 16, 8), (32, 16, 8), (32, 8, 4)],
        [(64, 8, 4), (64, 8, 4), (64, 4, 2)],
        [(96, 4, 2), (96, 4, 2)],
    ]
    attends = [[stage.attention is not None for stage in level.stages] for level in model.levels]
    assert attends == [[True, True], [False, False], [True, True]]


def test_network_asks_the_normalised_map_once_for_each_label():
    model, seen = small_classifier((3, 2)), {}
    model.norm.register_forward_hook(lambda module, given, output: seen.update(h=output))
    x_t, t = normal(2, 3, 8, 8), torch.tensor([0, 999])
    by_label = model.label_logits(x_t, t)
    h = seen["h"]  # (2, C, 2, 2)
    places = (h * h.sigmoid()).permute(0, 2, 3, 1).reshape(2, 4, -1)
    for query, head, logits in zip(model.queries, model.heads, by_label, strict=True):
        weights = (places @ query / len(query) ** 0.5).softmax(dim=1)
        answer = torch.einsum("bn,bnc->bc", weights, places)
        agree(logits, answer @ head.weight.T + head.bias, 1e-12)
    assert not NoisyClassifier(3, 5).queries.any()  # which makes the answer a mean at first


def test_network_round_trip_through_its_state():
    model, other = small_classifier(), NoisyClassifier(3, (3, 2), **SMALL, patch_size=2).double()
    other.load_state_dict(model.state_dict())
    x_t, t = normal(2, 3, 8, 8), torch.tensor([0, 999])
    agree(other(x_t, t), model(x_t, t), 0.0)


def test_network_runs_on_the_device_of_its_input():
    model = small_classifier(dtype=torch.float32)
    x_t, t, y = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([1, 999]), torch.tensor([1, 4])
    expected = selected_log_probs(model(x_t, t), y)
    with simulated_device():
        x_t, t, y = (tensor.to(SIMULATED) for tensor in (x_t, t, y))
        actual = values_of(selected_log_probs(model.to(SIMULATED)(x_t, t), y))
    agree(actual, expected, 1e-5)


def test_network_learns_to_read_noisy_images():
    torch.manual_seed(0)
    model, diffusion = NoisyClassifier(3, 2, **SMALL), Diffusion(linear_betas(100))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    y = torch.tensor([0, 1, 0, 1])
    x_0 = (2.0 * y - 1)[:, None, None, None].expand(4, 3, 8, 8)
    t, noise = torch.tensor([10, 40, 20, 30]), normal(4, 3, 8, 8, dtype=torch.float32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(diffusion.q_sample(x_0, t, noise), t), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# The recipe


@pytest.fixture(scope="module")
def shapes():
    return load("shapes", "train", 32)


@pytest.fixture(scope="module")
def recipe(shapes):
    return replace(find_recipe("noisy_classifier_shapes32"), model=SMALL).fitted_to(shapes)


def test_recipe_is_fitted_to_the_labels(recipe, shapes):
    assert recipe.num_classes == (len(shapes.labels["shape"]), len(shapes.labels["colour"]))
    assert recipe.channels == 3 and recipe.image_size == 32
    model = recipe.build()
    assert isinstance(model, NoisyClassifier) and model.num_classes == recipe.num_classes
    other = replace(recipe, labels=("size", "background", "shape")).fitted_to(shapes)
    assert other.num_classes == tuple(len(shapes.labels[name]) for name in other.labels)
    assert other.build().num_classes == other.num_classes


def test_recipe_refuses_data_without_the_labels():
    with pytest.raises(ValueError, match="data must have the labels shape, colour; 'digits' has class"):
        replace(find_recipe("noisy_classifier_shapes32"), data="digits").fitted_to(load("digits"))


def test_recipe_draws_by_the_numbers_of_the_samples(recipe, shapes):
    batch = recipe.draw(shapes, SampleDraws(3, torch.tensor([5, 6, 7, 8])))
    again = recipe.draw(shapes, SampleDraws(3, torch.tensor([8, 6])))
    assert set(batch) == {"x_0", "y", "t", "noise"}
    for name, value in batch.items():
        agree(again[name], value[[3, 1]], 0.0)
    other = recipe.draw(shapes, SampleDraws(4, torch.tensor([5, 6, 7, 8])))
    assert not torch.equal(other["noise"], batch["noise"]) and not torch.equal(other["t"], batch["t"])
    assert batch["noise"].shape == batch["x_0"].shape == (4, 3, 32, 32)
    many = recipe.draw(shapes, SampleDraws(0, torch.arange(300)))
    assert many["t"].min() < 50 and many["t"].max() > 949 and many["t"].max() < recipe.diffusion_steps
    assert abs(many["noise"].mean()) < 0.01 and abs(many["noise"].std() - 1) < 0.01


def test_recipe_asks_for_the_classes_of_the_images(recipe, shapes):
    batch = shapes.batch(range(40))
    agree(recipe.classes(batch), batch["shape"] * len(shapes.labels["colour"]) + batch["colour"], 0)


def test_loss_of_the_recipe_by_hand(recipe, shapes):
    model = perturbed(recipe.build(), torch.float32)
    batch = recipe.draw(shapes, SampleDraws(3, torch.arange(4)))
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)[batch["t"]].float()[:, None, None, None]
    x_t = alpha_bar.sqrt() * batch["x_0"] + (1 - alpha_bar).sqrt() * batch["noise"]
    shape, colour = model.label_logits(x_t, batch["t"])
    expected = F.cross_entropy(shape, batch["y"] // 8) + F.cross_entropy(colour, batch["y"] % 8)
    agree(recipe.loss(model, batch), expected, 1e-4)


def test_evaluation_counts_what_is_read_right(recipe, monkeypatch):
    monkeypatch.setattr(classifiers, "EVALUATION_IMAGES", 100)
    unseen = load("shapes", "test", 32)
    batch = unseen.batch(range(100))
    steps = []

    class Reader(torch.nn.Module):
        """It is certain of shape 3, and of colour 1 where there is much noise."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def label_logits(self, x_t, t):
            steps.extend(t.unique().tolist())
            colour = torch.where(t > 300, 1, 2)
            return [F.one_hot(number, 8).float() for number in (torch.full_like(t, 3), colour)]

    found = recipe.evaluate(Reader(), unseen)
    assert sorted(set(steps)) == sorted(classifiers.EVALUATION_STEPS)
    expected = {}
    for step in classifiers.EVALUATION_STEPS:
        expected[f"accuracy_shape_{step}"] = (batch["shape"] == 3).double().mean().item()
        expected[f"accuracy_colour_{step}"] = (
            (batch["colour"] == (1 if step > 300 else 2)).double().mean().item()
        )
    assert found == pytest.approx(expected, abs=1e-12)


# Wrong arguments

X, T, Y = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1]), torch.tensor([0, 4])
LOGITS = normal(2, 5)


def guided_with(y):
    diffusion = Diffusion(linear_betas(60))
    return classifier_guided(lambda x_t, t: x_t, smooth_classifier, y, 1.0, diffusion)(X, T)


def shifted_with(y):
    return classifier_mean_shift(smooth_classifier, y, 1.0)(X, X, X, T)


@pytest.mark.parametrize("use", [guided_with, shifted_with, lambda y: selected_log_probs(LOGITS, y)])
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (Y + 1, ValueError, r"y must lie in \[0, 5\); got values 1 to 5"),
        (Y - 1, ValueError, r"y must lie in \[0, 5\); got values -1 to 3"),
        (Y.float(), TypeError, "y must hold integers, as an int64 tensor; got torch.float32"),
        (Y.to(torch.uint8), TypeError, "y must hold integers, as an int64 tensor; got torch.uint8"),
        ([0, 4], TypeError, "y must hold integers, as an int64 tensor; got list"),
        (None, TypeError, "y must hold integers, as an int64 tensor; got NoneType"),
        (Y[:1], ValueError, r"y must have shapes \(B, K\) and \(B,\); got \(2, 5\) and \(1,\)"),
        (Y[:, None], ValueError, r"y must have shapes \(B, K\) and \(B,\); got \(2, 5\) and \(2, 1\)"),
        (Y[0], ValueError, r"y must have shapes \(B, K\) and \(B,\); got \(2, 5\) and \(\)"),
    ],
)
def test_a_wrong_label_is_refused(use, y, error, message):
    with pytest.raises(error, match=message):
        use(y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: selected_log_probs(normal(5), Y),
            ValueError,
            r"logits and y must have shapes \(B, K\) and \(B,\); got \(5,\) and \(2,\)",
        ),
        (
            lambda: selected_log_probs(normal(2, 5, 1), Y),
            ValueError,
            r"logits and y must have shapes .*; got \(2, 5, 1\) and \(2,\)",
        ),
        (
            lambda: NoisyClassifier(3, 5, **SMALL)(X, T[:1]),
            ValueError,
            r"t must have the shape of one step per image, \(2,\); got \(1,\)",
        ),
        (
            lambda: NoisyClassifier(3, 5, **SMALL)(X, T[0]),
            ValueError,
            r"t must have the shape of one step per image, \(2,\); got \(\)",
        ),
        (
            lambda: NoisyClassifier(3, 5, **SMALL, patch_size=2)(X[..., :7], T),
            ValueError,
            "must have sides that are multiples of 2; got 8 x 7",
        ),
        (
            lambda: log_prob_gradient(
                exact_classifier(MIXTURE, Diffusion(linear_betas(60))), X[:, 0, 0, :2], T + 59, Y
            ),
            ValueError,
            r"t must lie in \[0, 60\)",
        ),
        (lambda: joint_class(Y, (5,)), ValueError, r"labels must have shape \(B, 1\); got \(2,\)"),
        (
            lambda: joint_class(torch.stack([Y, Y], dim=1), (5, 5, 5)),
            ValueError,
            r"labels must have shape \(B, 3\); got \(2, 2\)",
        ),
        (
            lambda: joint_class(torch.stack([Y, Y], dim=1), (5, 4)),
            ValueError,
            r"labels must lie in \[0, 4\) in this column; got \[0, 4\]",
        ),
        (lambda: joint_class(normal(2, 1), (5,)), TypeError, "int64 tensor; got torch.float64"),
        (lambda: NoisyClassifier(3, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: NoisyClassifier(3, 5.0), TypeError, "num_classes must be an int; got 5.0"),
        (lambda: NoisyClassifier(3, 5, num_blocks=0), ValueError, "num_blocks must be at least 1; got 0"),
        (lambda: NoisyClassifier(3, 5, patch_size=0), ValueError, "patch_size must be at least 1; got 0"),
        (
            lambda: NoisyClassifier(3, 5, channel_multipliers=(1, 2), attention_levels=(2,)),
            ValueError,
            r"attention_levels must be among the levels 0 to 1; got \(2,\)",
        ),
        (
            lambda: classifier_guided(
                lambda x_t, t: x_t[:, :1], smooth_classifier, Y, 1.0, Diffusion(linear_betas(60))
            )(X, T),
            ValueError,
            r"output must have the shape \(2, 3, 8, 8\) of x_t, .* got \(2, 1, 8, 8\)",
        ),
        (
            lambda: joint_class(torch.stack([Y - 1, Y], dim=1), (5, 5)),
            ValueError,
            r"labels must lie in \[0, 5\) in this column; got \[-1, 3\]",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
