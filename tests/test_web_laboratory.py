"""The laboratory's mathematics in the browser is the course's: scores, guidance, densities and samplers."""

from functools import partial

import pytest
import torch
from browser_code import run_in_node
from scipy.integrate import solve_ivp
from scipy.stats import wasserstein_distance

from lecture26.classifier_free_guidance import classifier_free_guided, exact_conditional_denoiser
from lecture26.classifier_guidance import classifier_guided, exact_classifier
from lecture26.ddpm import (
    Diffusion,
    GaussianMixture,
    cosine_betas,
    ddim_step,
    ddpm_step,
    exact_denoiser,
    reverse_chain,
)

COMPONENTS = [
    {"weight": 0.2, "x": -0.55, "y": -0.35, "std": 0.12, "label": 0},
    {"weight": 0.3, "x": 0.6, "y": -0.3, "std": 0.10, "label": 1},
    {"weight": 0.1, "x": 0.05, "y": 0.6, "std": 0.16, "label": 0},
    {"weight": 0.4, "x": 0.9, "y": 0.7, "std": 0.25, "label": 1},
]
LABEL, BLUR, W, REACH, SIZE = 0, 0.2, 1.5, 2.2, 150
LEVELS = (0.05, 0.6, 1.0)
STEPS = (12, 24, 48, 96, 192, 384)


def mixture_of(components, blur=0.0):
    total = sum(c["weight"] for c in components)
    return GaussianMixture(
        [c["weight"] / total for c in components],
        [(c["x"], c["y"]) for c in components],
        [(c["std"] ** 2 + blur**2) ** 0.5 for c in components],
    )


OWN = mixture_of([c for c in COMPONENTS if c["label"] == LABEL])
OTHERS = mixture_of([c for c in COMPONENTS if c["label"] != LABEL])
WEAK = mixture_of([c for c in COMPONENTS if c["label"] == LABEL], BLUR)
ALL = mixture_of(COMPONENTS)


def log_class(x, alpha_bar=1.0):
    """log p(y | x_t) of the label."""
    responsibilities = ALL.responsibilities(x, alpha_bar)
    return responsibilities[:, [k for k, c in enumerate(COMPONENTS) if c["label"] == LABEL]].sum(dim=1).log()


def gradient_of(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.fixture(scope="module")
def points():
    return 1.2 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def draws():
    """Where the paths begin, and the noise of each step, in single precision."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(60, 2, generator=generator), torch.randn(max(STEPS), 60, 2, generator=generator)


NARROW, WIDE = ({"weight": 0.5, "x": 0.0, "y": 0.0, "std": std} for std in (0.1, 0.2))
NORMAL = [  # (own, other, way, w) and whether the tilted density can be normalised
    (NARROW, WIDE, "negative", 5.0, True),
    (WIDE, NARROW, "negative", 0.2, True),  # 1.2 / 0.2^2 > 0.2 / 0.1^2
    (WIDE, NARROW, "negative", 0.4, False),
    (WIDE, NARROW, "free", 8.0, True),
    (NARROW, WIDE, "free", -1.0, True),
    (NARROW, WIDE, "auto", 8.0, True),
]


@pytest.fixture(scope="module")
def found(points, draws):
    start, fresh = draws
    normal = [
        {"components": [own | {"label": 0}, other | {"label": 1}], "way": way, "w": w}
        for own, other, way, w, _ in NORMAL
    ]
    job = {"components": COMPONENTS, "label": LABEL, "blur": BLUR, "w": W, "reach": REACH, "size": SIZE}
    job |= {"points": points.tolist(), "levels": LEVELS, "steps": STEPS, "normal": normal}
    return run_in_node("laboratory.mjs", job | {"start": start.tolist(), "fresh": fresh.tolist()})


def assert_close(found, wanted, **tolerance):
    found = torch.tensor(found, dtype=torch.float64).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted.double(), **{"rtol": 1e-9, "atol": 1e-9} | tolerance)


@pytest.mark.parametrize("name, mixture", [("own", OWN), ("all", ALL)])
def test_exact_densities_and_scores(found, points, name, mixture):
    for level, at_level in zip(LEVELS, found[name], strict=True):
        assert_close(at_level["logs"], mixture.log_prob(points, level))
        assert_close(at_level["scores"], mixture.score(points, level))


def test_blurred_data_and_the_exact_classifier(found, points):
    assert_close(found["blurred"]["scores"], mixture_of(COMPONENTS, 0.3).score(points, 0.5))
    for level, at_level in zip(LEVELS, found["logClass"], strict=True):
        assert_close(at_level, log_class(points, level))


def test_each_way_to_guide_by_its_definition(found, points):
    for number, level in enumerate(LEVELS):
        own, everything = OWN.score(points, level), ALL.score(points, level)
        classifier = gradient_of(lambda x, level=level: log_class(x, level), points)
        clean = gradient_of(log_class, points)
        wanted = {
            "conditional": own,
            "classifier": everything + (1 + W) * classifier,
            "cleanClassifier": everything + (1 + W) * clean,
            "free": (1 + W) * own - W * everything,
            "negative": (1 + W) * own - W * OTHERS.score(points, level),
            "auto": (1 + W) * own - W * WEAK.score(points, level),
        }
        assert set(wanted) == set(found["ways"])
        for name, score in wanted.items():
            assert_close(found["ways"][name][number], score, rtol=1e-7, atol=1e-7)


def test_guidance_is_that_of_chapters_03_and_05(found, points):
    """Where each component is a class of its own, the course's wrappers give the same scores."""
    diffusion = Diffusion(cosine_betas(1000))
    t = torch.full((len(points),), 600)
    alpha_bar = diffusion.at(t, points).alpha_bar
    mixture = mixture_of([COMPONENTS[0], COMPONENTS[1]])
    y = torch.zeros(len(points), dtype=torch.long)
    by_classifier = classifier_guided(
        exact_denoiser(mixture, diffusion), exact_classifier(mixture, diffusion), y, 1 + W, diffusion
    )
    free = classifier_free_guided(exact_conditional_denoiser(mixture, diffusion), y, torch.full_like(y, 2), W)
    job = {"components": COMPONENTS[:2], "label": 0, "blur": BLUR, "w": W, "reach": REACH, "size": 4}
    job |= {"points": points.tolist(), "levels": [alpha_bar[0].item()], "steps": [], "normal": []}
    own = run_in_node("laboratory.mjs", job | {"start": [], "fresh": []})
    for name, denoiser in (("classifier", by_classifier), ("free", free)):
        score = -denoiser(points, t) / (1 - alpha_bar).sqrt()
        assert_close(own["ways"][name][0], score, rtol=1e-7, atol=1e-7)


def test_tilted_densities(found, points):
    own = OWN.log_prob(points)
    ratios = {
        "conditional": torch.zeros_like(own),
        "classifier": log_class(points),
        "cleanClassifier": log_class(points),
        "free": own - ALL.log_prob(points),
        "negative": own - OTHERS.log_prob(points),
        "auto": own - WEAK.log_prob(points),
    }
    for name, ratio in ratios.items():
        assert_close(found["tilted"][name], own + W * ratio)


def test_whether_a_tilted_density_can_be_normalised(found):
    assert found["normalised"] == [can for *_, can in NORMAL]


def guided_denoiser(diffusion):
    """Classifier-free guidance by the course's exact denoisers."""
    own, everything = exact_denoiser(OWN, diffusion), exact_denoiser(ALL, diffusion)
    return lambda x, t: (1 + W) * own(x, t) - W * everything(x, t)


@pytest.mark.parametrize("name, step", [("ddim", ddim_step), ("ddpm", ddpm_step)])
def test_ddim_and_ddpm_are_those_of_chapter_01(found, draws, name, step):
    start, fresh = (each.double() for each in draws)
    for number, steps in enumerate(STEPS):
        diffusion = Diffusion(cosine_betas(1000)).respace(steps)
        denoiser = guided_denoiser(diffusion)
        wanted = reverse_chain(partial(step, diffusion, denoiser), start, steps, fresh.__getitem__)
        assert_close(found["ends"][name][number], wanted, rtol=0, atol=1e-4)


def test_the_second_order_sampler_is_of_second_order_and_ddim_of_first(found, draws):
    """Both near the solution of the differential equation, which another library computes."""
    schedule = Diffusion(cosine_betas(1000))
    first, last = ((1 / schedule.alpha_bar[i] - 1).sqrt().item() for i in (-1, 0))

    def slope(sigma, flat):  # of x / sqrt(alpha_bar), with respect to sigma
        alpha_bar = 1 / (1 + sigma**2)
        x = alpha_bar**0.5 * torch.as_tensor(flat).reshape(-1, 2)
        score = (1 + W) * OWN.score(x, alpha_bar) - W * ALL.score(x, alpha_bar)
        return (-((1 - alpha_bar) ** 0.5) * score).flatten().numpy()

    # the start belongs to alpha_bar_T; the last step, from the first beta to none, is Euler's in each sampler
    x = draws[0].double() * (1 + first**2) ** 0.5
    exact = solve_ivp(slope, (first, last), x.flatten().numpy(), rtol=1e-7, atol=1e-8).y[:, -1]
    exact = torch.as_tensor(exact - last * slope(last, exact)).reshape(-1, 2)
    errors = {
        name: torch.tensor(
            [(torch.tensor(ends).reshape(-1, 2) - exact).norm(dim=1).median() for ends in found["ends"][name]]
        )
        for name in ("ddim", "second")
    }
    assert (errors["second"] < errors["ddim"]).all()
    # with four times the steps the error falls by 4, or by 16, which it nears from below
    quartering = {name: (error[-3] / error[-1]).item() for name, error in errors.items()}
    assert 3 < quartering["ddim"] < 5
    assert quartering["second"] > 8


def test_a_density_on_a_grid(found):
    centres = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE * 2 * REACH - REACH
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2)
    values = ((1 + W) * OWN.log_prob(grid) - W * ALL.log_prob(grid)).softmax(dim=0)
    assert_close(found["grid"]["values"], values)
    assert_close(found["grid"]["marginal"], values.reshape(SIZE, SIZE).sum(dim=0))
    mean = values @ grid
    variance = values @ ((grid - mean) ** 2).sum(dim=1) / 2
    assert_close(found["grid"]["spread"], variance.sqrt())
    assert_close(found["grid"]["share"], values @ (log_class(grid) > -0.693147).double())
    # the contour at a level goes where the density has it, and encloses half of the mass
    level, segments = found["contour"]["level"], torch.tensor(found["contour"]["segments"])
    assert values[values >= level].sum().item() == pytest.approx(0.5, abs=0.02)
    ends = segments.reshape(-1, 2).double()
    log_at = (1 + W) * OWN.log_prob(ends) - W * ALL.log_prob(ends)
    log_values = (1 + W) * OWN.log_prob(grid) - W * ALL.log_prob(grid)
    wanted = torch.tensor(level).log() + log_values.logsumexp(dim=0)
    assert (log_at - wanted).abs().max() < 0.15


def test_the_distance_of_points_from_a_density_on_a_grid(found, points):
    centres = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE * 2 * REACH - REACH
    values = torch.tensor(found["grid"]["values"], dtype=torch.float64).reshape(SIZE, SIZE)
    along = [
        wasserstein_distance(points[:, axis], centres, v_weights=values.sum(dim=axis)) for axis in (0, 1)
    ]
    assert found["grid"]["distance"] == pytest.approx(sum(along) / 2, abs=0.01)  # the width of a cell: .03
    assert along[0] > 0.3 and along[1] > 0.3  # far more than what the test allows


def test_what_is_measured_of_points(found, points):
    assert found["spread"] == pytest.approx(points.var(dim=0, correction=0).mean().sqrt().item(), rel=1e-6)
    assert found["share"] == pytest.approx((log_class(points) > -0.693147).double().mean().item())
    wanted = torch.histc(points[:, 0].float(), 7, -REACH, REACH)
    assert_close(found["histogram"], wanted)
