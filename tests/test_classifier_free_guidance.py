"""Chapter 05 against oracles: the exact mixture, chapter 03's guidance, diffusers' guider and U-Net."""

import json
import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from tensors import agree, normal, perturbed, seeded, unet_of_diffusers

from lecture26.classifier_free_guidance import (
    cfg_combine,
    classifier_free_guided,
    combine_by_guidance_scale,
    drop_labels,
    exact_conditional_denoiser,
    implicit_gradient,
    labels_after_dropout,
    rescaled,
    within_interval,
)
from lecture26.classifier_guidance import classifier_guided, exact_classifier, guided_eps, log_prob_gradient
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    cosine_betas,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    linear_betas,
    sample,
    x_0_from_eps,
)
from lecture26.kit.checkpoints import save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import find_recipe, load_model, load_recipe, recipe, run
from lecture26.recipes.conditional import ConditionalDDPM
from lecture26.unet import UNet, zero_init

WEIGHTS = (-1.0, 0.0, 0.5, 3.0)
PREDICTIONS = ("eps", "x_0", "v")
STEPS = {
    "ddpm": ddpm_step,
    "ddim": ddim_step,
    "ddim, eta 0.5": partial(ddim_step, eta=0.5),
    "ddim, eta 1": partial(ddim_step, eta=1.0),
}
SPACINGS = {"all steps": lambda diffusion: diffusion, "respaced": lambda diffusion: diffusion.respace(12)}
MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]], [0.3, 0.5, 0.4])
CLASSES = [GaussianMixture([1.0], MIXTURE.means[[k]], MIXTURE.stds[[k]]) for k in range(3)]
SMALL = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=seeded(seed))


def full(count, value):
    return torch.full((count,), value)


def guider(scale, rescale=0.0, original=False):
    """diffusers' own guider."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(
        guidance_scale=scale, guidance_rescale=rescale, use_original_formulation=original
    )


def smooth_network(x_t, t, cond):
    """A conditional network of images (B, C, H, W) with labels (B,), in which samples do not meet."""
    shift = (cond.to(x_t.dtype) + t.to(x_t.dtype) / 50).view(-1, 1, 1, 1)
    return (x_t + shift).sin() + 0.3 * x_t * shift.cos()


def with_variance(x_t, t, cond):
    """The same with variance channels."""
    output = smooth_network(x_t, t, cond)
    return torch.cat([output, (2 * output).cos()], dim=1)


class Recorded:
    """A network that notes what it was called with."""

    def __init__(self, network=smooth_network):
        self.network, self.calls = network, []

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        return self.network(x_t, t, cond)


def path(diffusion, denoiser, x_T, step):
    """All x_t on the way, (T, B, ...), always with the same noise."""
    visited = []

    def recording_step(*arguments):
        visited.append(step(*arguments))
        return visited[-1]

    sample(diffusion, denoiser, x_T.shape, recording_step, seeded(1), x_T, progress=False)
    return torch.stack(visited)


X, T, COND, NULL = normal(3, 3, 4, 4), torch.tensor([2, 40, 59]), torch.tensor([0, 1, 4]), full(3, 7)


# The implicit classifier, and mixing


@pytest.mark.parametrize("betas", [linear_betas(100), cosine_betas(100)], ids=["linear", "cosine"])
def test_implicit_gradient_is_that_of_the_exact_classifier(betas):
    diffusion = Diffusion(betas)
    t, x_t, y = integers(90, 64) + 5, normal(64, 2), integers(3, 64, seed=1)
    eps_u = exact_denoiser(MIXTURE, diffusion)(x_t, t)
    eps_c = torch.stack([exact_denoiser(CLASSES[k], diffusion)(x_t, t) for k in range(3)])[
        y, torch.arange(64)
    ]
    gradient = log_prob_gradient(exact_classifier(MIXTURE, diffusion), x_t, t, y)
    assert gradient.abs().amax() > 1
    agree(implicit_gradient(eps_c, eps_u, diffusion.alpha_bar[t, None]), gradient, 1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_conditional_denoiser(prediction, spacing):
    base = Diffusion(linear_betas(60), prediction)
    t, x_t = integers(60, 8), normal(8, 2)
    cond = torch.tensor([0, 3, 1, 2, 3, 0, 2, 1])
    actual = exact_conditional_denoiser(MIXTURE, SPACINGS[spacing](base))(x_t, t, cond)
    for row, k in enumerate(cond.tolist()):
        alone = MIXTURE if k == 3 else CLASSES[k]
        agree(actual[[row]], exact_denoiser(alone, base)(x_t[[row]], t[[row]]), 1e-12)


@pytest.mark.parametrize("w", WEIGHTS)
def test_mixing_is_chapter_03s_guidance_at_scale_1_plus_w(w):
    eps_c, eps_u, alpha_bar = (
        normal(5, 3),
        normal(5, 3, seed=1),
        torch.rand(5, 1, generator=seeded()).double(),
    )
    gradient = implicit_gradient(eps_c, eps_u, alpha_bar)
    agree(cfg_combine(eps_c, eps_u, w), guided_eps(eps_u, gradient, alpha_bar, 1 + w), 1e-12)
    agree(cfg_combine(eps_c, eps_u, w), guided_eps(eps_c, gradient, alpha_bar, w), 1e-12)


def test_mixing_by_hand():
    eps_c, eps_u = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, -1.0]])
    agree(cfg_combine(eps_c, eps_u, 2.0), torch.tensor([[-7.0, 8.0]]), 0.0)
    agree(combine_by_guidance_scale(eps_c, eps_u, 2.0), torch.tensor([[-3.0, 5.0]]), 0.0)
    agree(cfg_combine(eps_c, eps_u, 0.0), eps_c, 0.0)
    agree(cfg_combine(eps_c, eps_u, -1.0), eps_u, 0.0)
    agree(combine_by_guidance_scale(eps_c, eps_u, 0.0), eps_u, 0.0)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("w", WEIGHTS)
def test_both_conventions_agree_with_each_other_and_with_diffusers_guider(w, rescale):
    eps_c, eps_u = normal(4, 3, 5, 5), 0.5 + normal(4, 3, 5, 5, seed=1)
    by_scale, by_weight = (
        guider(strength, rescale, original).forward(eps_c, eps_u).pred
        for strength, original in ((1 + w, False), (w, True))
    )
    agree(by_scale, by_weight, 1e-12)
    agree(combine_by_guidance_scale(eps_c, eps_u, 1 + w), cfg_combine(eps_c, eps_u, w), 1e-12)
    agree(rescaled(cfg_combine(eps_c, eps_u, w), eps_c, rescale), by_weight, 1e-10)

    def network(x_t, t, cond):
        return torch.where(
            cond.view(-1, 1, 1, 1) == 1, *(e.repeat(len(x_t) // 4, 1, 1, 1) for e in (eps_c, eps_u))
        )

    guided = classifier_free_guided(network, full(4, 1), full(4, 0), w, rescale)
    agree(guided(eps_c, full(4, 3)), by_weight, 1e-10)


# The wrapper


@pytest.mark.parametrize("w", [0.5, 3.0, -1.0])
def test_both_answers_come_from_one_forward_pass_of_twice_the_batch(w):
    network = Recorded()
    guided = classifier_free_guided(network, COND, NULL, w)(X, T)
    ((x_t, t, cond),) = network.calls
    agree(x_t, torch.cat([X, X]), 0.0)
    agree(t, torch.cat([T, T]), 0)
    agree(cond, torch.cat([COND, NULL]), 0)
    agree(guided, (1 + w) * smooth_network(X, T, COND) - w * smooth_network(X, T, NULL), 1e-12)


def test_w_of_0_and_minus_1_are_the_two_predictions_exactly():
    network = Recorded()
    agree(classifier_free_guided(network, COND, NULL, 0.0)(X, T), smooth_network(X, T, COND), 0.0)
    assert len(network.calls) == 1 and len(network.calls[0][0]) == 3
    agree(classifier_free_guided(network, COND, NULL, -1.0)(X, T), smooth_network(X, T, NULL), 0.0)
    agree(classifier_free_guided(network, COND, NULL, 0, rescale=1.0)(X, T), smooth_network(X, T, COND), 0.0)


@pytest.mark.parametrize("w", WEIGHTS)
def test_variance_channels_are_the_conditional_ones(w):
    guided = classifier_free_guided(with_variance, COND, NULL, w, rescale=0.5, interval=(0, 50))(X, T)
    agree(guided[:, 3:], with_variance(X, T, COND)[:, 3:], 0.0)
    plain = classifier_free_guided(smooth_network, COND, NULL, w, rescale=0.5, interval=(0, 50))(X, T)
    agree(guided[:, :3], plain, 0.0)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_is_guided_to_the_same_noise(prediction, variance):
    """A network that speaks of the noise, and the same one that speaks of something else."""
    spoken, of_noise = Diffusion(linear_betas(60), prediction, variance), Diffusion(linear_betas(60))

    def network(x_t, t, cond):
        eps = smooth_network(x_t, t, cond)
        alpha_bar = spoken.at(t, x_t).alpha_bar
        output = spoken.target(x_0_from_eps(x_t, alpha_bar, eps), alpha_bar, eps)
        return torch.cat([output, eps.cos()], dim=1) if variance == "learned_range" else output

    expected = of_noise.p_mean_variance(classifier_free_guided(smooth_network, COND, NULL, 3.0), X, T)
    actual = spoken.p_mean_variance(classifier_free_guided(network, COND, NULL, 3.0), X, T)
    agree(actual.eps, expected.eps, 1e-9)
    agree(actual.mean, expected.mean, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_paths_are_those_of_classifier_guidance(step, prediction, spacing):
    base = Diffusion(linear_betas(60), prediction)
    diffusion, x_T, y = SPACINGS[spacing](base), normal(9, 2), torch.arange(9) % 3
    denoiser = exact_conditional_denoiser(MIXTURE, base)
    for w in (0.0, 0.5, 3.0):
        guided = classifier_free_guided(denoiser, y, full(9, 3), w)
        by_classifier = classifier_guided(
            exact_denoiser(MIXTURE, base), exact_classifier(MIXTURE, base), y, 1 + w, diffusion
        )
        agree(
            path(diffusion, guided, x_T, STEPS[step]), path(diffusion, by_classifier, x_T, STEPS[step]), 1e-6
        )


@pytest.mark.parametrize("step", STEPS)
def test_paths_at_both_ends_of_w(step):
    diffusion, x_T, y = Diffusion(linear_betas(60)), normal(6, 2), full(6, 1)
    denoiser = exact_conditional_denoiser(MIXTURE, diffusion)
    for w, alone in ((0.0, CLASSES[1]), (-1.0, MIXTURE)):
        guided = classifier_free_guided(denoiser, y, full(6, 3), w)
        expected = path(diffusion, exact_denoiser(alone, diffusion), x_T, STEPS[step])
        agree(path(diffusion, guided, x_T, STEPS[step]), expected, 1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_two_normals_of_one_width_give_a_third(step):
    diffusion, x_T, w = Diffusion(linear_betas(60)), normal(6, 5), 3.0
    mu_c, mu_u = normal(1, 5, seed=1), normal(1, 5, seed=2)
    parts = [GaussianMixture([1.0], mu, [0.4]) for mu in (mu_c, mu_u, (1 + w) * mu_c - w * mu_u)]
    one, other, third = (exact_denoiser(part, diffusion) for part in parts)
    network = lambda x_t, t, cond: torch.where(cond[:, None] == 1, one(x_t, t), other(x_t, t))  # noqa: E731
    guided = classifier_free_guided(network, full(6, 1), full(6, 0), w)
    agree(path(diffusion, guided, x_T, STEPS[step]), path(diffusion, third, x_T, STEPS[step]), 1e-8)


def test_a_dict_of_conditions():
    def network(x_t, t, cond):
        assert list(cond) == ["text", "mask"] and cond["mask"].dtype == torch.bool
        return smooth_network(x_t, t, (cond["text"] * cond["mask"]).sum(dim=1))

    cond = {"text": normal(3, 5), "mask": torch.arange(5) < torch.tensor([[1], [3], [5]])}
    null_cond = {"mask": torch.ones(3, 5, dtype=torch.bool), "text": torch.zeros(3, 5).double()}
    guided = classifier_free_guided(network, cond, null_cond, 2.0)(X, T)
    labels = (cond["text"] * cond["mask"]).sum(dim=1)
    expected = 3 * smooth_network(X, T, labels) - 2 * smooth_network(X, T, torch.zeros(3).double())
    agree(guided, expected, 1e-12)
    assert set(cond) == {"text", "mask"} and cond["text"].shape == (3, 5)


def test_samples_do_not_meet():
    way = {"w": 3.0, "rescale": 0.6, "interval": (10, 50)}
    together = classifier_free_guided(with_variance, COND, NULL, **way)(X, T)
    for i in range(3):
        alone = classifier_free_guided(with_variance, COND[[i]], NULL[[i]], **way)(X[[i]], T[[i]])
        agree(together[[i]], alone, 1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_sampling_works_in_any_mode(step, mode):
    factor = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    network = lambda x_t, t, cond: factor * smooth_network(x_t, t, cond)  # noqa: E731
    diffusion = Diffusion(linear_betas(60), "v", clip=True).respace(4)

    def samples():
        guided = classifier_free_guided(network, COND, NULL, 2.0, 0.5, (5, 50))
        return sample(diffusion, guided, X.shape, step, seeded(), X, progress=False)

    expected = samples()
    with mode():
        actual = samples()
    agree(actual, expected, 0.0)
    assert not actual.requires_grad and factor.grad is None


def test_gradient_passes_through():
    x_t = X.clone().requires_grad_()
    classifier_free_guided(smooth_network, COND, NULL, 2.0)(x_t, T).sum().backward()
    y = X.clone().requires_grad_()
    (3 * smooth_network(y, T, COND) - 2 * smooth_network(y, T, NULL)).sum().backward()
    agree(x_t.grad, y.grad, 1e-12)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_input_is_kept(dtype, default):
    torch.set_default_dtype(default)
    try:
        guided = classifier_free_guided(smooth_network, COND, NULL, 0.3, 0.7, (5, 50))
        output = guided(X.to(dtype), T)
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == dtype
    expected = classifier_free_guided(smooth_network, COND, NULL, 0.3, 0.7, (5, 50))(X, T)
    agree(output.double(), expected, 1e-13 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("options", [{}, {"rescale": 0.7}, {"interval": (10, 20)}])
def test_empty_batch(options):
    none = torch.empty(0, dtype=torch.int64)
    for cond in (none, {"label": none}):
        network = lambda x_t, t, cond: x_t  # noqa: E731
        guided = classifier_free_guided(network, cond, cond, 2.0, **options)
        assert guided(normal(0, 3, 4, 4), none).shape == (0, 3, 4, 4)
        diffusion = Diffusion(linear_betas(60)).respace(3)
        x_0 = sample(diffusion, guided, (0, 3, 4, 4), ddim_step, x_T=normal(0, 3, 4, 4), progress=False)
        assert x_0.shape == (0, 3, 4, 4)


def test_network_of_diffusers_is_guided_through_one_lambda():
    theirs = unet_of_diffusers(num_class_embeds=6)
    base, x_T, cond, null = (
        Diffusion(linear_betas(100), clip=True),
        normal(2, 3, 8, 8),
        torch.tensor([1, 4]),
        full(2, 5),
    )
    network = lambda x_t, t, cond: theirs(x_t, t, class_labels=cond).sample  # noqa: E731
    guided = classifier_free_guided(network, cond, null, 2.0)
    ours = sample(base.respace(10), guided, x_T.shape, ddim_step, x_T=x_T, progress=False)

    scheduler, their_guider = DDIMScheduler(100, clip_sample=True), guider(3.0)
    scheduler.alphas_cumprod = base.alpha_bar
    scheduler.set_timesteps(9)  # takes the step before t for t - 11, which is right
    x_t = x_T
    with torch.no_grad():
        for step in reversed(range(0, 100, 11)):
            eps_c, eps_u = (theirs(x_t, step, class_labels=labels).sample for labels in (cond, null))
            assert (eps_c - eps_u).abs().amax() > 1e-3
            eps = their_guider.forward(eps_c, eps_u).pred
            x_t = scheduler.step(eps, step, x_t, use_clipped_model_output=True).prev_sample
    agree(ours, x_t, 1e-9)


def test_unet_of_chapter_02_is_guided_and_wrappers_nest():
    network = perturbed(UNet(3, num_classes=(3, 2), **SMALL))
    cond, null = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[3, 2], [3, 2]])
    x_t, t = normal(2, 3, 8, 8), torch.tensor([0, 999])
    inner = classifier_free_guided(network, cond, null, 1.5)
    expected = 2.5 * network(x_t, t, cond) - 1.5 * network(x_t, t, null)
    agree(inner(x_t, t), expected, 1e-10)
    diffusion = Diffusion(linear_betas(1000), "v")
    judge = lambda x_t, t: torch.stack([x_t.flatten(1).sum(dim=1), x_t.flatten(1)[:, 0]], dim=1)  # noqa: E731
    outer = classifier_guided(inner, judge, torch.tensor([0, 1]), 2.0, diffusion)
    gradient = log_prob_gradient(judge, x_t, t, torch.tensor([0, 1]))
    agree(outer(x_t, t), diffusion.add_score(expected, x_t, t, 2.0 * gradient), 1e-8)


# Rescaling and interval


def test_rescaled_spread_lies_in_between():
    guided, cond = 3 * normal(4, 3, 5, 5) + 1, normal(4, 3, 5, 5, seed=1)
    for phi in (0.0, 0.3, 1.0):
        spread = [x.flatten(1).std(dim=1) for x in (rescaled(guided, cond, phi), cond, guided)]
        agree(spread[0], phi * spread[1] + (1 - phi) * spread[2], 1e-12)
    agree(rescaled(guided, cond, 0.0), guided, 1e-15)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1)])
def test_samples_without_spread_stay_as_they_are(shape):
    flat = torch.full(shape, 0.25).double()
    agree(rescaled(flat, normal(*shape), 0.7), flat, 0.0)
    zeros = lambda x_t, t, cond: torch.zeros_like(x_t)  # noqa: E731
    agree(classifier_free_guided(zeros, COND, NULL, 2.0, 1.0)(X, T), torch.zeros_like(X), 0.0)


def test_rescaling_works_on_the_networks_output():
    """For a prediction of x_0 it keeps the predicted picture's spread, for one of noise the noise's."""
    guided = classifier_free_guided(smooth_network, COND, NULL, 4.0, rescale=1.0)(X, T)
    spread = [x.flatten(1).std(dim=1) for x in (guided, smooth_network(X, T, COND))]
    agree(*spread, 1e-12)


@pytest.mark.parametrize(("t", "guides"), [(9, False), (10, True), (15, True), (20, True), (21, False)])
def test_both_ends_belong_to_the_interval_and_outside_the_network_is_asked_once(t, guides):
    network, t = Recorded(), full(3, t)
    output = classifier_free_guided(network, COND, NULL, 2.0, interval=(10, 20))(X, t)
    assert [len(x_t) for x_t, _, _ in network.calls] == [6 if guides else 3]
    expected = classifier_free_guided(smooth_network, COND, NULL, 2.0 if guides else 0.0)(X, t)
    agree(output, expected, 0.0)


def test_each_sample_has_its_own_step_in_the_interval():
    output = classifier_free_guided(smooth_network, COND, NULL, 2.0, interval=(40, 50))(X, T)
    agree(output[[0, 2]], smooth_network(X, T, COND)[[0, 2]], 0.0)
    agree(output[1], classifier_free_guided(smooth_network, COND, NULL, 2.0)(X, T)[1], 0.0)


def test_the_interval_counts_steps_of_the_original_schedule():
    network = Recorded()
    guided = classifier_free_guided(network, COND, NULL, 2.0, interval=(20, 40))
    diffusion = Diffusion(linear_betas(60)).respace(7)  # steps 0, 10, 20, 30, 39, 49, 59
    sample(diffusion, guided, X.shape, ddim_step, x_T=X, progress=False)
    assert [(t[0].item(), len(x_t)) for x_t, t, _ in network.calls] == [
        (59, 3),
        (49, 3),
        *((step, 6) for step in diffusion.steps[[4, 3, 2]].tolist()),
        (10, 3),
        (0, 3),
    ]


@pytest.mark.parametrize("interval", [(0, 59), (0, 60), (-5, 1000)])
def test_an_interval_of_all_steps_changes_nothing(interval):
    expected = classifier_free_guided(smooth_network, COND, NULL, 2.0)(X, T)
    agree(classifier_free_guided(smooth_network, COND, NULL, 2.0, interval=interval)(X, T), expected, 0.0)
    agree(within_interval(X, -X, T, *interval), X, 0.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_steps_and_labels_may_be_integers_of_any_type(dtype):
    def network(x_t, t, cond):
        return smooth_network(x_t, t.long(), cond)

    guided = classifier_free_guided(network, COND, NULL, 2.0, interval=(-5, 50))
    agree(guided(X, T.to(dtype)), guided(X, T), 0.0)
    # as many points as classes, all labels or none: what is taken for a mask shows
    denoiser, x_t = exact_conditional_denoiser(MIXTURE, Diffusion(linear_betas(60))), normal(4, 2)
    for y in (full(4, 1), torch.tensor([0, 1, 2, 3])):
        agree(denoiser(x_t, full(4, 9), y.to(dtype)), denoiser(x_t, full(4, 9), y), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_mixed_in_single_precision(dtype):
    """What is rounded before the mixing would grow with w; afterwards it is half of the last digit."""
    cond = normal(3, 3, 8, 8).to(dtype)
    outputs = torch.cat([cond, cond + 0.1 * normal(3, 3, 8, 8, seed=1).to(dtype)])
    guided = classifier_free_guided(lambda x_t, t, c: outputs, COND, NULL, 7.5, rescale=0.7)
    found = guided(cond, T)
    assert found.dtype == dtype
    outputs = outputs.double()
    exact = guided(cond.double(), T)
    assert ((found.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


# Label dropout


@pytest.mark.parametrize("p", [0.1, 0.12, 0.5, 0.9])
def test_dropout_rate_is_within_four_sigma(p):
    count = 20_000
    dropped = drop_labels(integers(8, count), 8, p, seeded(3)) == 8
    assert abs(dropped.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / count)
    first, second = dropped[:-1].double() - p, dropped[1:].double() - p
    assert abs((first * second).mean()) < 4 * p * (1 - p) / math.sqrt(count)  # independent


def test_dropout_varies_within_a_batch_and_between_batches():
    generator, y = seeded(), integers(8, 64)
    one, other = (drop_labels(y, 8, 0.5, generator) == 8 for _ in range(2))
    assert 0 < one.sum() < 64 and 0 < other.sum() < 64 and not torch.equal(one, other)


@pytest.mark.parametrize("null_label", [(8, 5), [8, 5], torch.tensor([8, 5])])
def test_all_labels_of_a_sample_are_dropped_together(null_label):
    y = torch.stack([integers(8, 500), integers(5, 500, seed=1)], dim=1)
    kept = y.clone()
    dropped = drop_labels(y, null_label, 0.3, seeded())
    is_null = dropped == torch.tensor([8, 5])
    agree(is_null[:, 0], is_null[:, 1], 0)
    assert 100 < is_null[:, 0].sum() < 200
    agree(dropped[~is_null[:, 0]], y[~is_null[:, 0]], 0)
    agree(y, kept, 0)


def test_probabilities_0_and_1_are_certain():
    y = integers(8, 1000)
    agree(drop_labels(y, 8, 0.0, seeded()), y, 0)
    agree(drop_labels(y, 8, 1, seeded()), full(1000, 8), 0)


@pytest.mark.parametrize("null_label", [2.5, True, torch.tensor(8.0)])
def test_the_null_label_must_be_an_integer(null_label):
    with pytest.raises(TypeError, match="null_label must be of integers"):
        drop_labels(integers(8, 4), null_label, 0.5)


def test_the_null_label_must_fit_into_the_type_of_the_labels():
    with pytest.raises(ValueError, match="null_label must fit into torch.int8"):
        drop_labels(integers(8, 4).to(torch.int8), 128, 0.5)


def test_dropout_is_decided_by_its_generator():
    y = integers(8, 100)
    before = torch.get_rng_state()
    agree(drop_labels(y, 8, 0.5, seeded(5)), drop_labels(y, 8, 0.5, seeded(5)), 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert (drop_labels(y, 8, 0.5) == 8).any()


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_dropout_of_no_samples(shape):
    y = torch.empty(shape, dtype=torch.int32)
    agree(drop_labels(y, 8 if len(shape) == 1 else (8, 8), 0.5), y, 0)


def test_networks_drop_nothing_by_themselves():
    network = perturbed(UNet(3, num_classes=(3, 2), **SMALL))
    x_t, t, cond = normal(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([[0, 1], [2, 0]])
    expected = network.eval()(x_t, t, cond)
    for _ in range(3):
        agree(network.train()(x_t, t, cond), expected, 0.0)


def test_the_minimiser_of_the_dropout_loss_is_the_pair_of_expectations():
    """Least squares on a table of (x, y, eps) and both outcomes of the coin, weighted by their chances."""
    x, y, eps = integers(4, 400), integers(3, 400, seed=1), normal(400)
    for p in (0.1, 0.5):
        told = torch.cat([y, full(400, 3)])
        columns = torch.nn.functional.one_hot(4 * told + x.repeat(2), 16).double()
        weights = torch.cat([full(400, 1 - p), full(400, p)]).double().sqrt()[:, None]
        table = torch.linalg.lstsq(weights * columns, weights * eps.repeat(2)[:, None]).solution.view(4, 4)
        for k in range(4):
            for place in range(4):
                chosen = eps[(x == place) & ((y == k) if k < 3 else True)]
                agree(table[k, place], chosen.mean(), 1e-10)


# The recipe


@pytest.fixture(scope="module")
def shapes():
    return load("shapes", "train", 32)


@pytest.fixture(scope="module")
def tiny(shapes):
    return replace(
        find_recipe("conditional_ddpm_shapes32"), model=SMALL, start=None, batch_size=4, precision="fp32"
    ).fitted_to(shapes)


def test_recipe_builds_a_network_whose_labels_say_nothing_yet(tiny, shapes):
    assert tiny.num_classes == (len(shapes.labels["shape"]), len(shapes.labels["colour"]))
    model = tiny.build()
    assert [table.weight.shape[0] for table in model.labels.tables] == [9, 9]
    assert not any(parameter.any() for parameter in model.labels.parameters())


def test_every_label_row_of_the_recipes_network_learns_from_its_zeros(tiny, shapes):
    model = perturbed(tiny.build(), torch.float32)  # or its zero layers would hide the labels
    zero_init(model.labels)
    batch = replace(tiny, drop=0.5).draw(shapes, SampleDraws(0, torch.arange(16)))
    tiny.loss(model, batch).backward()
    for column, table in enumerate(model.labels.tables):
        learns = table.weight.grad.abs().sum(dim=1) > 0
        asked = torch.zeros(9, dtype=torch.bool).index_fill(0, batch["cond"][:, column], True)
        agree(learns, asked, 0)


def test_recipe_draws_by_the_numbers_of_the_samples_and_drops_both_labels(tiny, shapes):
    batch = tiny.draw(shapes, SampleDraws(3, torch.arange(2000)))
    again = tiny.draw(shapes, SampleDraws(3, torch.tensor([8, 6])))
    for name, value in batch.items():
        agree(again[name], value[[8, 6]], 0.0)
    is_null = batch["cond"] == 8
    agree(is_null[:, 0], is_null[:, 1], 0)
    share = is_null[:, 0].double().mean()
    assert abs(share - 0.12) < 4 * math.sqrt(0.12 * 0.88 / 2000)
    kept = replace(tiny, drop=0.0).draw(shapes, SampleDraws(3, torch.arange(2000)))
    agree(kept["x_0"], batch["x_0"], 0.0)
    agree(batch["cond"][~is_null[:, 0]], kept["cond"][~is_null[:, 0]], 0)
    assert kept["cond"].max() == 7


def test_loss_of_the_recipe_by_hand(tiny, shapes):
    model = perturbed(tiny.build(), torch.float32)
    batch = tiny.draw(shapes, SampleDraws(3, torch.arange(4)))
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)[batch["t"]].float()[:, None, None, None]
    x_t = alpha_bar.sqrt() * batch["x_0"] + (1 - alpha_bar).sqrt() * batch["noise"]
    v = alpha_bar.sqrt() * batch["noise"] - (1 - alpha_bar).sqrt() * batch["x_0"]
    expected = (model(x_t, batch["t"], batch["cond"]) - v).square().mean()
    agree(tiny.loss(model, batch), expected, 1e-4)


def test_recipe_refuses_data_without_the_labels(tiny):
    with pytest.raises(ValueError, match="data must have the labels shape, colour; 'digits' has class"):
        replace(tiny, data="digits").fitted_to(load("digits"))


def test_settings_name_the_start_only_where_there_is_one(tiny):
    assert "start" not in tiny.settings() and "start" not in find_recipe("ddpm").settings()
    started = replace(tiny, start="other")
    settings = json.loads(json.dumps(started.settings()))
    assert settings["start"] == "other"
    assert ConditionalDDPM(**settings).start == "other"


@pytest.fixture
def started(tiny, tmp_path, monkeypatch):
    """An unconditional checkpoint 'before' of random weights in a data folder of its own."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    before = find_recipe("ddpm_shapes32")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = perturbed(UNet(3, **SMALL), torch.float32).state_dict()
    card = {
        "recipe": before.family,
        "settings": before.settings() | {"model": SMALL},
        "command": "",
        "data": "",
    }
    save_checkpoint("before", weights, card | {"steps": 0, "seconds": 0, "metrics": {}})
    return replace(tiny, name="after", start="before", steps=1, learning_rate=1e-12, warmup_steps=0)


def test_training_begins_with_the_weights_of_another_checkpoint(started, monkeypatch):
    monkeypatch.setattr("lecture26.recipes.ddpm.EVALUATION_BATCHES", 1)
    card = run(started, "a command")
    assert card["settings"]["start"] == "before"
    assert set(card["metrics"]) == {"test_loss", "test_loss_unconditional"}
    before, after = load_model("before"), load_model("after")
    x_t, t = normal(2, 3, 32, 32, dtype=torch.float32), torch.tensor([10, 900])
    for cond in (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[8, 8], [8, 8]])):
        agree(after(x_t, t, cond), before(x_t, t), 1e-2)
    assert load_recipe("after").num_classes in ((8, 8), [8, 8])


def test_a_start_that_does_not_fit_is_refused(started):
    wider = replace(started, model=SMALL | {"base_channels": 16})
    with pytest.raises(
        ValueError, match=r"start must be .* 'before' has \S+ of shape .*, and the network one of"
    ):
        recipe.begin_with(wider.build(), "before")
    shallower = replace(started, model=SMALL | {"num_blocks": 1})
    with pytest.raises(ValueError, match="and the network none of that name"):
        recipe.begin_with(shallower.build(), "before")
    with pytest.raises(ValueError, match="there is no checkpoint 'absent'"):
        recipe.begin_with(started.build(), "absent")


def test_weights_beyond_the_start_stay_as_they_were(started):
    model = started.build()
    torch.nn.init.ones_(model.labels.tables[0].weight)
    recipe.begin_with(model, "before")
    assert (model.labels.tables[0].weight == 1).all()
    agree(model.stem.weight, load_model("before").stem.weight, 0.0)


# Wrong arguments


@pytest.mark.parametrize(
    ("cond", "null_cond", "error", "message"),
    [
        (
            COND[:2],
            NULL[:2],
            ValueError,
            r"cond must hold one row for each of 3 sample\(s\); got shape \(2,\)",
        ),
        (COND[0], NULL[0], ValueError, r"cond must hold one row for each of 3 sample\(s\); got shape \(\)"),
        (COND, NULL[:2], ValueError, r"null_cond must have the shape of cond, \(3,\); got \(2,\)"),
        (COND, NULL[:, None], ValueError, r"null_cond must have the shape of cond, \(3,\); got \(3, 1\)"),
        (
            COND,
            7,
            TypeError,
            "cond and null_cond must both be tensors, or dicts of tensors; got Tensor and int",
        ),
        (COND, {"y": NULL}, TypeError, "got Tensor and dict"),
        ({"y": COND}, NULL, TypeError, "got dict and Tensor"),
        ({"y": COND}, {"z": NULL}, ValueError, r"null_cond must have the keys of cond, \['y'\]; got \['z'\]"),
        (
            {"y": COND},
            {"y": NULL[:1]},
            ValueError,
            r"null_cond must have the shape of cond, \(3,\); got \(1,\)",
        ),
        ({"y": COND[:1]}, {"y": NULL[:1]}, ValueError, r"cond must hold one row for each of 3 sample\(s\)"),
        ({"y": [1, 2]}, {"y": NULL}, TypeError, "got list and Tensor"),
    ],
)
@pytest.mark.parametrize("w", [2.0, 0.0])
def test_conditions_that_do_not_fit_are_refused(cond, null_cond, error, message, w):
    with pytest.raises(error, match=message):
        classifier_free_guided(smooth_network, cond, null_cond, w)(X, T)


def test_a_label_that_is_none_is_refused_by_the_network():
    network = UNet(3, num_classes=5, **SMALL)
    x_t, t = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 5\]"):
        classifier_free_guided(network, torch.tensor([0, 6]), full(2, 5), 1.0)(x_t, t)
    with pytest.raises(ValueError, match=r"cond must hold 1 integer label\(s\) per sample"):
        classifier_free_guided(network, torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0]), 1.0)(x_t, t)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: classifier_free_guided(smooth_network, COND, NULL, 1.0, rescale=1.5),
            ValueError,
            r"rescale must lie in \[0, 1\]; got 1.5",
        ),
        (
            lambda: classifier_free_guided(smooth_network, COND, NULL, 1.0, rescale=-0.1),
            ValueError,
            r"rescale must lie in \[0, 1\]; got -0.1",
        ),
        (
            lambda: classifier_free_guided(smooth_network, COND, NULL, 1.0, interval=(20, 10)),
            ValueError,
            r"interval must be \(first, last\) with first <= last, or None; got \(20, 10\)",
        ),
        (
            lambda: classifier_free_guided(smooth_network, COND, NULL, 1.0, interval=(1, 2, 3)),
            ValueError,
            r"interval must be \(first, last\)",
        ),
        (lambda: drop_labels(COND, 7, 1.2), ValueError, r"p must be a probability in \[0, 1\]; got 1.2"),
        (lambda: drop_labels(COND, 7, -0.2), ValueError, r"p must be a probability in \[0, 1\]; got -0.2"),
        (lambda: drop_labels(COND.double(), 7, 0.2), TypeError, "y must hold integers; got torch.float64"),
        (lambda: drop_labels(COND > 0, 7, 0.2), TypeError, "y must hold integers; got torch.bool"),
        (lambda: drop_labels(COND, (7, 7), 0.2), ValueError, r"got \(3,\) and null_label \[7, 7\]"),
        (lambda: drop_labels(COND[:, None], 7, 0.2), ValueError, r"got \(3, 1\) and null_label 7"),
        (lambda: drop_labels(COND[0], 7, 0.2), ValueError, r"got \(\) and null_label 7"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_labels_after_dropout_broadcasts_over_labels():
    y, u = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([0.1, 0.5, 0.2])
    agree(labels_after_dropout(y, torch.tensor([8, 9]), u, 0.2), torch.tensor([[8, 9], [3, 4], [5, 6]]), 0)
