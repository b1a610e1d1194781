"""DDPM: denoising diffusion probabilistic models.

Generated from notebooks/01_ddpm.py, which derives and checks it: edit there, then run `make package`.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from lecture26.kit.progress import bar_stream
from lecture26.kit.validation import check_choice, check_positive_int, check_shape

# --- A schedule ---


def linear_betas(num_steps):
    """Noise variances that grow linearly, scaled so that every number of steps ends in noise.

    Args:
        num_steps: T, at least 21 (at 20 the last beta would reach 1).

    Returns:
        (T,) float64 on the CPU, from 0.1 / T to 20 / T.

    Raises:
        TypeError: if num_steps is no int.
        ValueError: if num_steps is below 21.

    Source: Ho et al. 2020, section 4 (1e-4 to 0.02 at T = 1000); the factor 1000 / T as in Nichol and
    Dhariwal 2021.
    """
    check_positive_int("num_steps", num_steps)
    if num_steps <= 20:
        raise ValueError(f"num_steps must be at least 21, since beta_T = 20 / T; got num_steps={num_steps}")
    # beta_t from 1e-4 to 0.02 at T = 1000, times 1000 / T otherwise
    factor = 1000 / num_steps
    return torch.linspace(factor * 1e-4, factor * 0.02, num_steps, dtype=torch.float64, device="cpu")


# --- Any step at once ---


def q_sample(x_0, alpha_bar, noise):
    """Draw x_t given x_0 in one step.

    Args:
        x_0: clean data, (B, ...).
        alpha_bar: signal left at each sample's step, broadcastable to x_0, in (0, 1).
        noise: standard normal, like x_0.

    Returns:
        x_t, like x_0.

    Source: Ho et al. 2020, equation 4.
    """
    # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


# --- A gentler schedule ---


def cosine_betas(num_steps):
    """Noise variances for which alpha_bar falls along a squared cosine, slowly at both ends.

    Args:
        num_steps: T, at least 1.

    Returns:
        (T,) float64 on the CPU, each at most 0.999.

    Raises:
        TypeError: if num_steps is no int.
        ValueError: if num_steps is below 1.

    Source: Nichol and Dhariwal 2021, equation 17, offset 0.008.
    """
    check_positive_int("num_steps", num_steps)
    # alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), u = t / T
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu")  # (T + 1,)
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


# --- A laboratory where everything is exact ---


def at_least_float32(dtype):
    """The dtype to compute with for data of a dtype: half precision has too few digits for 1 - alpha_bar."""
    return torch.promote_types(dtype, torch.float32)


class GaussianMixture:
    """A mixture of isotropic normals, of which everything about its noisy versions is known exactly.

    Every method takes points of the noisy marginal q(x_t) and the alpha_bar of their steps: a number, or a
    tensor (B, 1) of one value per point; alpha_bar = 1 is the data distribution itself.

    Args:
        weights: (K,), positive, with sum 1.
        means: (K, D).
        stds: (K,), positive.

    Raises:
        ValueError: if the shapes disagree, the weights are no distribution, or a std is not positive.
    """

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (
            torch.as_tensor(table, dtype=torch.float64, device="cpu") for table in (weights, means, stds)
        )
        if self.means.ndim != 2 or not self.weights.shape == self.stds.shape == self.means.shape[:1]:
            raise ValueError(
                "weights, means and stds must have shapes (K,), (K, D) and (K,); "
                f"got {tuple(self.weights.shape)}, {tuple(self.means.shape)} and {tuple(self.stds.shape)}"
            )
        if (self.weights <= 0).any() or abs(self.weights.sum() - 1) > 1e-9:
            raise ValueError(f"weights must be positive with sum 1; got {self.weights}")
        if (self.stds <= 0).any():
            raise ValueError(f"stds must be positive; got {self.stds}")

    def sample(self, count, generator=None):
        """Draw count points with the generator: (count, D) float64, and their components (count,)."""
        y = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[y] + self.stds[y, None] * noise, y

    def noisy_components(self, x_t, alpha_bar=1.0):
        """Weights (K,), means (B, K, D) and variances (B, K) of q(x_t), in at least float32."""
        dtype = at_least_float32(x_t.dtype)
        weights, means, stds = (
            table.to(dtype).to(x_t.device) for table in (self.weights, self.means, self.stds)
        )
        alpha_bar = torch.as_tensor(alpha_bar, dtype=dtype, device=x_t.device).expand(len(x_t), 1)
        # N(sqrt(alpha_bar) mu_k, (alpha_bar s_k^2 + 1 - alpha_bar) I)
        return weights, alpha_bar.sqrt()[:, :, None] * means, alpha_bar * stds**2 + 1 - alpha_bar

    def joint_log_density(self, x_t, alpha_bar=1.0):
        """log q(x_t, component k) for points (B, D), as (B, K)."""
        weights, means, variances = self.noisy_components(x_t, alpha_bar)
        squared_distance = ((x_t[:, None] - means) ** 2).sum(dim=-1)  # (B, K)
        dim = x_t.shape[1]
        # log pi_k - 1/2 (D log(2 pi v_k) + |x_t - m_k|^2 / v_k)
        return weights.log() - 0.5 * (dim * (2 * math.pi * variances).log() + squared_distance / variances)

    def log_prob(self, x_t, alpha_bar=1.0):
        """log q(x_t) for points (B, D), as (B,), in nats."""
        return self.joint_log_density(x_t, alpha_bar).logsumexp(dim=1)

    def responsibilities(self, x_t, alpha_bar=1.0):
        """q(component k | x_t) for points (B, D), as (B, K)."""
        return self.joint_log_density(x_t, alpha_bar).softmax(dim=1)

    def score(self, x_t, alpha_bar=1.0):
        """The gradient of log q(x_t) with respect to x_t, for points (B, D), as (B, D)."""
        _, means, variances = self.noisy_components(x_t, alpha_bar)
        pull = (means - x_t[:, None]) / variances[:, :, None]  # (B, K, D)
        # grad log q(x_t) = sum_k q(k | x_t) (m_k - x_t) / v_k
        return (self.responsibilities(x_t, alpha_bar)[:, :, None] * pull).sum(dim=1)


# --- Going back, when the clean data are known ---


def posterior_mean(x_0, x_t, beta, alpha_bar, alpha_bar_prev):
    """Mean of x_{t-1} given x_t and x_0.

    Args:
        x_0, x_t: clean and noisy data, (B, ...).
        beta, alpha_bar, alpha_bar_prev: the schedule at t, and alpha_bar at t - 1; broadcastable to x_0.

    Returns:
        mu~_t, like x_t. At the first step, where alpha_bar_prev = 1, it is x_0.

    Source: Ho et al. 2020, equation 7.
    """
    # mu~ = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
    #     + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
    weight_x_0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    weight_x_t = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return weight_x_0 * x_0 + weight_x_t * x_t


def posterior_variance(beta, alpha_bar, alpha_bar_prev):
    """beta~, the variance of x_{t-1} given x_t and x_0; beta, alpha_bar, alpha_bar_prev as for its mean.

    Source: Ho et al. 2020, equation 7.
    """
    # beta~ = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta


# --- Noise and clean data ---


def x_0_from_eps(x_t, alpha_bar, eps):
    """Clean data from noisy data x_t and its noise eps, with alpha_bar and shapes as in q_sample.

    Source: Ho et al. 2020, equation 15.
    """
    # x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
    return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def eps_from_x_0(x_t, alpha_bar, x_0):
    """Noise from noisy data x_t and clean data x_0, with alpha_bar and shapes as in q_sample.

    Source: Ho et al. 2020, equation 4.
    """
    # eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def exact_prediction(score, x_t, alpha_bar, target):
    """The expectation, given x_t, of what a denoiser is trained to return.

    Args:
        score: callable (x_t, alpha_bar) -> gradient of log q(x_t), like x_t.
        x_t: noisy data, (B, ...).
        alpha_bar: at each sample's step, broadcastable to x_t, in (0, 1).
        target: callable (x_0, alpha_bar, eps) -> what the denoiser should return, linear in x_0 and eps.

    Returns:
        The expected target, like x_t.

    Source: Efron 2011, equation 1.4 (Tweedie's formula).
    """
    # E[eps | x_t] = -sqrt(1 - alpha_bar_t) grad log q(x_t)
    eps = -(1 - alpha_bar).sqrt() * score(x_t, alpha_bar)
    # given x_t, E[x_0 | x_t] goes with it
    x_0 = x_0_from_eps(x_t, alpha_bar, eps)
    return target(x_0, alpha_bar, eps)


# --- The bound ---


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) of normals with mean_1, log_variance_1 and mean_2, log_variance_2, elementwise, in nats.

    Source: Ho et al. 2020, equation 5 needs it; Kingma and Welling 2014, appendix B.
    """
    # KL = 1/2 (log(sigma_2^2 / sigma_1^2) + (sigma_1^2 + (mu_1 - mu_2)^2) / sigma_2^2 - 1)
    variance_ratio = (log_variance_1 - log_variance_2).exp()
    scaled_distance = (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
    return 0.5 * (log_variance_2 - log_variance_1 + variance_ratio + scaled_distance - 1)


# --- The model's step ---


def learned_range_log_variance(v, beta, log_posterior_variance):
    """log sigma_t^2 between log_posterior_variance, at v = -1, and log beta, at v = 1; all broadcast to v.

    Source: Nichol and Dhariwal 2021, equation 15.
    """
    # log sigma^2 = f log beta + (1 - f) log beta~,  f = (v + 1) / 2
    fraction = (v + 1) / 2
    return fraction * beta.log() + (1 - fraction) * log_posterior_variance


# --- The last step, for 8-bit images ---


def normal_log_density(x, mean, log_variance):
    """Log-density at x of a normal with this mean and log_variance, for each element, in nats; all broadcast.

    Source: Ho et al. 2020, equation 1, where all distributions of the reverse process are of this kind.
    """
    # log N(x; mu, sigma^2) = -1/2 (log(2 pi) + log sigma^2 + (x - mu)^2 / sigma^2)
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * (-log_variance).exp())


def discretized_log_likelihood(x, mean, log_variance):
    """Log-probability of the 8-bit value that x stands for, under a normal, for each element.

    Args:
        x: data that started as integers 0 to 255, scaled to [-1, 1].
        mean, log_variance: of the normal, broadcastable to x.

    Returns:
        Log-probabilities in nats, like x: the normal's mass within 1/255 of x, the outermost two bins
        reaching to infinity.

    Source: Ho et al. 2020, equation 13.
    """
    standard = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    below = torch.where(x < -0.999, torch.zeros_like(x), standard.cdf(x - 1 / 255))
    above = torch.where(x > 0.999, torch.ones_like(x), standard.cdf(x + 1 / 255))
    # the mass of a far bin underflows; a floor keeps its logarithm finite
    return (above - below).clamp(min=1e-12).log()


# --- The diffusion, assembled ---


class StepNumbers(NamedTuple):
    """What the schedule says at each sample's step.

    t holds the steps of the original schedule, (B,), which a denoiser is told. All else is (B, 1, ...), in
    the dtype of the data, or in float32 for data in half precision. At the first step posterior_variance is
    0, and both logarithms are those of the second step's beta~, which stands in.
    """

    t: torch.Tensor
    beta: torch.Tensor
    alpha_bar: torch.Tensor
    alpha_bar_prev: torch.Tensor
    posterior_variance: torch.Tensor
    log_posterior_variance: torch.Tensor
    log_large_variance: torch.Tensor


class Posterior(NamedTuple):
    """The normal distribution of x_{t-1} given x_t and x_0, each field shaped like x_t."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


class ReverseStep(NamedTuple):
    """The model's distribution of x_{t-1} given x_t, and the clean data it rests on.

    mean and x_0 are shaped like x_t, and so are the variances where they are learned; fixed ones are
    (B, 1, ...), a number per sample.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    x_0: torch.Tensor


class PMeanVariance(NamedTuple):
    """A ReverseStep with each field shaped like x_t, and the noise that goes with its x_0."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    x_0: torch.Tensor
    eps: torch.Tensor


def check_steps(t, x, num_steps):
    """Raise unless t holds, for each sample of the data x (B, ...), a step in [0, num_steps).

    Raises:
        TypeError: if t is no tensor of integers, or x is not of a floating-point type.
        ValueError: if t has another shape than (B,), or a step lies outside.
    """
    if not isinstance(t, torch.Tensor) or t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"t must be a tensor of integers; got {getattr(t, 'dtype', t)}")
    if not x.is_floating_point():
        raise TypeError(f"data must be of a floating-point type; got {x.dtype}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must hold one step per sample, shape ({len(x)},); got {tuple(t.shape)}")
    steps = t.cpu().tolist()  # on a GPU, the one time that a step waits for it
    if steps and not 0 <= min(steps) <= max(steps) < num_steps:
        raise ValueError(f"t must lie in [0, {num_steps}); got values {min(steps)} to {max(steps)}")


class Diffusion:
    """A noise schedule, what the network predicts, and all that follows from the two.

    Data and noise are (B, C, ...) tensors of any floating dtype, on any device; steps t are (B,) integers
    counted from 0, so code step t is the papers' step t + 1. A denoiser is any callable (x_t, t) ->
    output of shape (B, C, ...), or (B, 2C, ...) with a learned variance, the last C channels being it.
    The t it receives is the step of the original schedule, also after respacing.

    Args:
        betas: noise variances, (T,), each strictly between 0 and 1.
        prediction: what the denoiser's output stands for, 'eps', 'x_0' or 'v'.
        variance: of the reverse step: 'fixed_small' (beta~), 'fixed_large' (beta) or 'learned_range'.
        clip: clamp the predicted x_0 to [-1, 1] when sampling; for pixels only.

    Attributes:
        num_steps: T.
        betas, alpha_bar, alpha_bar_prev: the schedule, (T,) float64 on the CPU; alpha_bar_prev[0] = 1.
        base: the diffusion this one was respaced from, or itself.
        steps: (T,) int64, the base's step that each own step stands for.

    Raises:
        TypeError: if betas is None or a name.
        ValueError: if betas is no (T,) table inside (0, 1), or a choice is unknown.

    Source: Ho et al. 2020; Nichol and Dhariwal 2021 (learned range); Salimans and Ho 2022 (v).
    """

    def __init__(self, betas, prediction="eps", variance="fixed_small", clip=False):
        check_choice("prediction", prediction, ("eps", "x_0", "v"))
        check_choice("variance", variance, ("fixed_small", "fixed_large", "learned_range"))
        if betas is None or isinstance(betas, str):
            raise TypeError(f"betas must be a (T,) table with 0 < beta < 1; got {betas!r}")
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be a (T,) table with 0 < beta < 1; got {betas}")
        self.prediction, self.variance, self.clip = prediction, variance, clip
        self.betas = betas
        self.num_steps = len(betas)
        self.base = self
        self.steps = torch.arange(self.num_steps, device="cpu")

        # alpha_bar_t = product over s <= t of (1 - beta_s)
        self.alpha_bar = (1 - betas).cumprod(dim=0)
        self.alpha_bar_prev = torch.cat([torch.ones_like(betas[:1]), self.alpha_bar[:-1]])
        self.posterior_variance = posterior_variance(betas, self.alpha_bar, self.alpha_bar_prev)
        # beta~ is 0 at the first step and has no logarithm there: the next one stands in
        second = self.posterior_variance[1:2] if self.num_steps > 1 else betas
        self.log_posterior_variance = torch.cat([second, self.posterior_variance[1:]]).log()
        self.log_large_variance = torch.cat([second, betas[1:]]).log()
        self._tables = {}  # see _table

    def at(self, t, x):
        """The schedule's numbers at each sample's step, ready for arithmetic with the data.

        Args:
            t: own steps, (B,), integers in [0, T).
            x: the data they are for, (B, ...).

        Returns:
            StepNumbers.

        Raises:
            TypeError: if t holds no integers, or x no floating-point numbers.
            ValueError: if t has another shape, or a step outside [0, T).
        """
        check_steps(t, x, self.num_steps)
        steps, numbers = self._table(at_least_float32(x.dtype), x.device)
        t = t.long().to(x.device)
        per_sample = numbers[t].reshape(len(t), 6, *[1] * (x.ndim - 1))  # (B, 6, 1, ...)
        return StepNumbers(steps[t], *per_sample.unbind(dim=1))

    def _table(self, dtype, device):
        """All of StepNumbers for every step: steps (T,), and a table (T, 6) of a dtype on a device, kept."""
        if (dtype, device) not in self._tables:
            # beta is that of the rounded alpha_bar, so that in lower precision, too, all formulas agree
            alpha_bar, alpha_bar_prev = (
                table.to(dtype).double() for table in (self.alpha_bar, self.alpha_bar_prev)
            )
            columns = (
                1 - alpha_bar / alpha_bar_prev,
                alpha_bar,
                alpha_bar_prev,
                self.posterior_variance,
                self.log_posterior_variance,
                self.log_large_variance,
            )
            numbers = torch.stack(columns, dim=1).to(dtype)
            self._tables[dtype, device] = self.steps.to(device), numbers.to(device)
        return self._tables[dtype, device]

    def q_sample(self, x_0, t, noise):
        """Draw x_t given x_0 (B, C, ...) at steps t; ValueError unless the normal noise has its shape."""
        check_shape("noise", noise, x_0.shape, of="the data")
        return q_sample(x_0, self.at(t, x_0).alpha_bar, noise).to(x_0.dtype)

    def q_posterior(self, x_0, x_t, t):
        """The distribution of x_{t-1} given x_t and x_0, as (mean, variance, log_variance) like x_t.

        The variance is exactly 0 at t = 0; its logarithm there is that of the next step.
        """
        now = self.at(t, x_t)
        mean = posterior_mean(x_0, x_t, now.beta, now.alpha_bar, now.alpha_bar_prev)
        moments = torch.broadcast_tensors(mean, now.posterior_variance, now.log_posterior_variance)
        return Posterior(*(moment.to(x_t.dtype) for moment in moments))

    def x_0_from_eps(self, x_t, t, eps):
        """Clean data from noisy data and its noise, each (B, C, ...)."""
        return x_0_from_eps(x_t, self.at(t, x_t).alpha_bar, eps).to(x_t.dtype)

    def eps_from_x_0(self, x_t, t, x_0):
        """Noise from noisy and clean data, each (B, C, ...)."""
        return eps_from_x_0(x_t, self.at(t, x_t).alpha_bar, x_0).to(x_t.dtype)

    def x_0_from_v(self, x_t, t, v):
        """Clean data from noisy data and its velocity, each (B, C, ...)."""
        return x_0_from_v(x_t, self.at(t, x_t).alpha_bar, v).to(x_t.dtype)

    def eps_from_v(self, x_t, t, v):
        """Noise from noisy data and its velocity, each (B, C, ...)."""
        return eps_from_v(x_t, self.at(t, x_t).alpha_bar, v).to(x_t.dtype)

    def v_from_eps(self, x_t, t, eps):
        """Velocity from noisy data and its noise, each (B, C, ...)."""
        alpha_bar = self.at(t, x_t).alpha_bar
        return v_from_x_0_and_eps(x_0_from_eps(x_t, alpha_bar, eps), alpha_bar, eps).to(x_t.dtype)

    def target(self, x_0, alpha_bar, eps):
        """What the denoiser should return for data x_0 with noise eps, like x_0; alpha_bar as in q_sample."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x_0":
            return x_0
        return v_from_x_0_and_eps(x_0, alpha_bar, eps).to(x_0.dtype)

    def split_output(self, output, x_t):
        """Part a denoiser's output into prediction and variance channels, each like x_t, the latter or None.

        Raises:
            TypeError: if the output is no tensor.
            ValueError: if the output has not the shape that this diffusion's variance asks for.
        """
        batch, channels, *rest = x_t.shape
        learned = self.variance == "learned_range"
        expected = (batch, channels * (1 + learned), *rest)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"the denoiser must return a tensor; got {type(output).__name__}")
        if output.shape != expected:
            raise ValueError(
                f"the denoiser must return shape {expected} with variance={self.variance!r}; "
                f"got {tuple(output.shape)}"
            )
        return output.split(channels, dim=1) if learned else (output, None)

    def predicted_x_0(self, prediction, x_t, alpha_bar, clip):
        """The clean data that a prediction stands for, like x_t (B, C, ...); in [-1, 1] with clip."""
        if self.prediction == "eps":
            x_0 = x_0_from_eps(x_t, alpha_bar, prediction)
        elif self.prediction == "v":
            x_0 = x_0_from_v(x_t, alpha_bar, prediction)
        else:
            x_0 = prediction
        return x_0.clamp(-1, 1) if clip else x_0

    def reverse_variance(self, v, now):
        """The model's variance of x_{t-1} and its logarithm: (B, 1, ...), of now, or like x_t, from v."""
        if self.variance == "fixed_small":
            return now.posterior_variance, now.log_posterior_variance
        log_variance = now.log_large_variance
        if self.variance == "learned_range":
            log_variance = learned_range_log_variance(v, now.beta, now.log_posterior_variance)
        return log_variance.exp(), log_variance

    def reverse_step(self, output, x_t, now, clip):
        """Turn a denoiser's output into the model's distribution of x_{t-1}.

        Args:
            output: what the denoiser returned for x_t and now.t.
            x_t: (B, C, ...).
            now: the StepNumbers of x_t.
            clip: whether to clamp the predicted x_0 to [-1, 1].

        Returns:
            ReverseStep, in at least float32.

        Source: Ho et al. 2020, algorithm 2 and section 3.2.
        """
        prediction, v = self.split_output(output, x_t)
        x_0 = self.predicted_x_0(prediction, x_t, now.alpha_bar, clip)
        # mu~ with the predicted x_0 in the place of the true one
        mean = posterior_mean(x_0, x_t, now.beta, now.alpha_bar, now.alpha_bar_prev)
        return ReverseStep(mean, *self.reverse_variance(v, now), x_0)

    def p_mean_variance(self, denoiser, x_t, t):
        """The model's distribution of x_{t-1} given x_t, clipped as in sampling, and all that it rests on.

        Args:
            denoiser: callable (x_t, t) -> output, see the class; it receives the original steps.
            x_t: (B, C, ...).
            t: own steps, (B,).

        Returns:
            PMeanVariance(mean, variance, log_variance, x_0, eps), each like x_t.

        Source: Ho et al. 2020, algorithm 2 and section 3.2.
        """
        now = self.at(t, x_t)
        reverse = self.reverse_step(denoiser(x_t, now.t), x_t, now, self.clip)
        eps = eps_from_x_0(x_t, now.alpha_bar, reverse.x_0)
        return PMeanVariance(*(field.to(x_t.dtype).expand_as(x_t) for field in (*reverse, eps)))

    def add_score(self, output, x_t, t, gradient):
        """Add the gradient of a log-probability to the score that a denoiser's output stands for.

        Args:
            output: the denoiser's raw output, (B, C, ...) or (B, 2C, ...).
            x_t: (B, C, ...).
            t: steps of the original schedule, (B,), whether or not this diffusion is respaced.
            gradient: of the log-probability with respect to x_t, (B, C, ...).

        Returns:
            The output for the sum of both scores, like output; variance channels are left alone.

        Raises:
            ValueError: if output has another shape.

        Source: Dhariwal and Nichol 2021, algorithm 2, for eps; the others follow from it.
        """
        batch, channels, *rest = x_t.shape
        if tuple(output.shape) not in ((batch, channels, *rest), (batch, 2 * channels, *rest)):
            raise ValueError(
                f"output must have the shape {tuple(x_t.shape)} of x_t, or twice its channels; "
                f"got {tuple(output.shape)}"
            )
        alpha_bar = self.base.at(t, x_t).alpha_bar
        if self.prediction == "eps":
            # eps = -sqrt(1 - alpha_bar) score
            shift = -(1 - alpha_bar).sqrt() * gradient
        elif self.prediction == "v":
            # v = (sqrt(alpha_bar) x_t - x_0) / sqrt(1 - alpha_bar), and x_0 moves as below
            shift = -((1 - alpha_bar) / alpha_bar).sqrt() * gradient
        else:
            # x_0 = (x_t + (1 - alpha_bar) score) / sqrt(alpha_bar)
            shift = (1 - alpha_bar) / alpha_bar.sqrt() * gradient
        moved = (output[:, :channels] + shift).to(output.dtype)
        return torch.cat([moved, output[:, channels:]], dim=1)

    # --- From the bound to the simple loss ---

    def bound_term(self, reverse, x_0, x_t, t, log_likelihood):
        """Each sample's term of the bound on -log p(x_0), in nats.

        Args:
            reverse: the model's distribution of x_{t-1}, a ReverseStep made without clipping.
            x_0, x_t: (B, C, ...).
            t: own steps, (B,).
            log_likelihood: callable (x_0, mean, log_variance) -> element-wise log-probability, for t = 0.

        Returns:
            (B,): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or -log p(x_0 | x_1) where t = 0.

        Source: Ho et al. 2020, equation 5.
        """
        x_0, x_t = x_0.to(reverse.mean.dtype), x_t.to(reverse.mean.dtype)
        posterior = self.q_posterior(x_0, x_t, t)
        kl = normal_kl(posterior.mean, posterior.log_variance, reverse.mean, reverse.log_variance)
        decoder = -log_likelihood(x_0, reverse.mean, reverse.log_variance)
        return torch.where(t == 0, decoder.flatten(1).sum(dim=1), kl.flatten(1).sum(dim=1))

    def loss(self, denoiser, x_0, t, noise):
        """The training loss, averaged over samples and elements.

        The squared error of the prediction; with a learned variance, plus the bound in bits per dimension
        times T / 1000, whose gradient reaches the variance channels only (data as 8-bit pixels in [-1, 1]).

        Args:
            denoiser: callable (x_t, t) -> output, see the class.
            x_0: (B, C, ...).
            t: own steps, (B,).
            noise: standard normal, like x_0.

        Returns:
            A scalar.

        Raises:
            ValueError: if noise has another shape than x_0.

        Source: Ho et al. 2020, equation 14; Nichol and Dhariwal 2021, equation 16 and section 3.1.
        """
        check_shape("noise", noise, x_0.shape, of="the data")
        now = self.at(t, x_0)
        seen = {}  # by the one call of the denoiser, for the bound

        def prediction_alone(x_t, t):
            seen["x_t"] = x_t.to(x_0.dtype)
            seen["prediction"], seen["v"] = self.split_output(denoiser(seen["x_t"], t), x_t)
            return seen["prediction"].to(x_0.dtype)

        loss = simple_loss(prediction_alone, x_0, now.t, noise, now.alpha_bar, self.target)
        if self.variance == "learned_range":
            x_t = seen["x_t"]
            frozen = torch.cat([seen["prediction"].detach(), seen["v"]], dim=1)
            reverse = self.reverse_step(frozen, x_t, now, clip=False)
            nats = self.bound_term(reverse, x_0, x_t, t, discretized_log_likelihood)  # (B,)
            bits_per_dim = nats.mean() / x_0.shape[1:].numel() / math.log(2)
            loss = loss + self.num_steps / 1000 * bits_per_dim
        return loss

    # --- Fewer steps ---

    def respace(self, num_steps):
        """A diffusion that visits num_steps of this one's steps, evenly spread, the first and last included.

        Args:
            num_steps: from 2 to T.

        Returns:
            Diffusion whose denoisers still receive the original steps.

        Raises:
            TypeError: if num_steps is no int.
            ValueError: if num_steps lies outside [2, T].

        Source: Nichol and Dhariwal 2021, section 4.
        """
        check_positive_int("num_steps", num_steps)
        if not 2 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps must lie in [2, {self.num_steps}]; got num_steps={num_steps}")
        betas, steps = respacing(self.alpha_bar, self.steps, num_steps)
        respaced = Diffusion(betas, self.prediction, self.variance, self.clip)
        respaced.base, respaced.steps = self.base, steps
        return respaced


# --- From the bound to the simple loss ---


def simple_loss(denoiser, x_0, t, noise, alpha_bar, target):
    """The mean squared error of a denoiser's predictions on a batch of noisy data.

    Args:
        denoiser: callable (x_t, t) -> prediction, like x_0.
        x_0: clean data, (B, ...).
        t: each sample's step, (B,), as the denoiser is told it.
        noise: standard normal, like x_0.
        alpha_bar: at each sample's step, broadcastable to x_0, in (0, 1).
        target: callable (x_0, alpha_bar, eps) -> what the denoiser should return, like x_0.

    Returns:
        A scalar, the mean over samples and elements.

    Source: Ho et al. 2020, algorithm 1 and equation 14.
    """
    x_t = q_sample(x_0, alpha_bar, noise)
    prediction = denoiser(x_t, t)
    # || target - prediction ||^2, averaged
    return F.mse_loss(prediction, target(x_0, alpha_bar, noise))


# --- Ancestral sampling ---


def ancestral_update(mean, log_variance, noise, t):
    """Draw x_{t-1} from the model's distribution; the last step adds no noise.

    Args:
        mean, noise: (B, C, ...).
        log_variance: broadcastable to them.
        t: steps, (B,), counted from 0; 0 is the last step of sampling.

    Returns:
        x_{t-1}, like mean.

    Source: Ho et al. 2020, algorithm 2.
    """
    is_noisy = (t > 0).to(mean.dtype).reshape(-1, *[1] * (mean.ndim - 1))  # (B, 1, ...)
    # x_{t-1} = mu + sigma z, and z = 0 at the last step
    return mean + is_noisy * (0.5 * log_variance).exp() * noise


# --- DDIM ---


def ddim_update(x_0, eps, alpha_bar, alpha_bar_prev, eta, noise):
    """Move from step t to the one before along DDIM's path.

    Args:
        x_0, eps: the predicted clean data and noise, (B, C, ...).
        alpha_bar, alpha_bar_prev: at t and at the step before, broadcastable to x_0.
        eta: how much fresh noise, from 0 (none) to 1 (as in DDPM with beta~).
        noise: standard normal, like x_0.

    Returns:
        x_{t-1}, like x_0. Where alpha_bar_prev = 1 it is x_0.

    Source: Song, Meng and Ermon 2021, equations 12 and 16.
    """
    # sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_prev)
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    # x_{t-1} = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z
    direction = (1 - alpha_bar_prev - variance).clamp(min=0).sqrt() * eps
    return alpha_bar_prev.sqrt() * x_0 + direction + variance.sqrt() * noise


# --- From noise to data ---


def ddpm_step(diffusion, denoiser, x_t, t, noise, mean_shift=None):
    """One ancestral step, from x_t to x_{t-1}.

    Args:
        diffusion: a Diffusion.
        denoiser: callable (x_t, t) -> output.
        x_t, noise: (B, C, ...).
        t: the diffusion's own steps, (B,).
        mean_shift: callable (mean, variance, x_t, t) -> shift, added to the mean, with the original t.

    Returns:
        x_{t-1}, like x_t.

    Raises:
        ValueError: if noise has another shape than x_t.

    Source: Ho et al. 2020, algorithm 2; Dhariwal and Nichol 2021, algorithm 1, for the shift.
    """
    check_shape("noise", noise, x_t.shape, of="the data")
    now = diffusion.at(t, x_t)
    output = denoiser(x_t, now.t)
    mean, variance, log_variance, _ = diffusion.reverse_step(output, x_t, now, diffusion.clip)
    if mean_shift is not None:
        mean = mean + mean_shift(mean, variance.expand_as(mean), x_t, now.t)
    return ancestral_update(mean, log_variance, noise, t).to(x_t.dtype)


def ddim_step(diffusion, denoiser, x_t, t, noise, eta=0.0):
    """One DDIM step, from x_t to x_{t-1}; deterministic for eta = 0.

    Args:
        diffusion, denoiser, x_t, t: as in ddpm_step.
        noise: like x_t; None will do for eta = 0.
        eta: how much fresh noise, from 0 (none) to 1 (as in DDPM with beta~).

    Returns:
        x_{t-1}, like x_t.

    Raises:
        ValueError: if eta lies outside [0, 1], or noise has another shape than x_t, or is missing.

    Source: Song, Meng and Ermon 2021, equation 12.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got eta={eta}")
    if noise is not None or eta > 0:
        check_shape("noise", noise, x_t.shape, of="the data")
    now = diffusion.at(t, x_t)
    prediction, _ = diffusion.split_output(denoiser(x_t, now.t), x_t)
    x_0 = diffusion.predicted_x_0(prediction, x_t, now.alpha_bar, diffusion.clip)
    # the noise that goes with the clipped x_0, so that the two still make up x_t
    eps = eps_from_x_0(x_t, now.alpha_bar, x_0)
    noise = 0.0 if noise is None else noise
    return ddim_update(x_0, eps, now.alpha_bar, now.alpha_bar_prev, eta, noise).to(x_t.dtype)


def reverse_chain(step, x_T, num_steps, noise_at):
    """Go back from pure noise to data, one step after the other.

    Args:
        step: callable (x_t, t, noise) -> x_{t-1}, with t (B,) integers.
        x_T: noise to start from, (B, ...).
        num_steps: T; the steps are counted from T - 1 down to 0.
        noise_at: callable (index) -> the noise of the step of that number, like x_T.

    Returns:
        x_0, like x_T.

    Source: Ho et al. 2020, algorithm 2.
    """
    x_t = x_T
    for index in reversed(range(num_steps)):
        t = torch.full((len(x_t),), index, device=x_t.device)
        x_t = step(x_t, t, noise_at(index))
    return x_t


def noise_like(x, generator):
    """Standard normal noise like x, drawn on the generator's device: one on the CPU serves all alike."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


@torch.no_grad()
def sample(
    diffusion,
    denoiser,
    shape,
    step=ddpm_step,
    generator=None,
    x_T=None,
    progress=True,
    *,
    device=None,
    start=None,
):
    """Draw samples, from pure noise down to x_0.

    Args:
        diffusion: a Diffusion; respace it first for fewer steps.
        denoiser: callable (x_t, t) -> output.
        shape: of the batch, (B, C, ...).
        step: callable (diffusion, denoiser, x_t, t, noise) -> x_{t-1}, such as ddpm_step or ddim_step.
        generator: source of all noise, which is drawn on its device: one on the CPU gives the same samples
            everywhere.
        x_T: the noise to start from, of that shape; drawn if None. Its dtype is kept.
        progress: show a progress bar when sampling takes longer than two seconds.
        device: where to sample; None for that of x_T, else that of the generator.
        start: the own step that x_T belongs to, for data that are noisy only so far; None for the last one.

    Returns:
        x_0, (B, C, ...).

    Raises:
        ValueError: if x_T has another shape, or start is given without it, or is no step.

    Source: Ho et al. 2020, algorithm 2.
    """
    if x_T is None:
        if start is not None:
            raise ValueError(f"start must come with an x_T, data noisy up to that step; got start={start}")
        source = device if generator is None else generator.device
        x_T = torch.randn(shape, generator=generator, device=source)
    check_shape("x_T", x_T, shape)
    start = diffusion.num_steps - 1 if start is None else start
    if not 0 <= start < diffusion.num_steps:
        raise ValueError(f"start must lie in [0, {diffusion.num_steps}); got start={start}")
    x_t = x_T if device is None else x_T.to(device)
    silent = {} if progress else {"disable": True}
    with tqdm(total=start + 1, desc="sampling", delay=2, leave=False, file=bar_stream(), **silent) as bar:

        def one_step(x_t, t, noise):
            x_t = step(diffusion, denoiser, x_t, t, noise)
            bar.update()
            return x_t

        def noise_at(index):
            # DDIM as it stands adds no noise, and drawing some would take as long as all the rest of its step
            return None if step is ddim_step else noise_like(x_t, generator)

        return reverse_chain(one_step, x_t, start + 1, noise_at)


# --- A whole chain that can be solved by hand ---


def exact_denoiser(mixture, diffusion):
    """The denoiser that a perfectly trained network would be, for data from a Gaussian mixture.

    Args:
        mixture: a GaussianMixture, the data distribution.
        diffusion: the Diffusion it is made for, with a fixed variance; respaced or not.

    Returns:
        denoiser(x_t (B, D), t (B,)) -> the conditional expectation of the prediction's target, (B, D).

    Source: Efron 2011, equation 1.4 (Tweedie's formula), with the mixture's score.
    """
    base = diffusion.base

    def denoiser(x_t, t):
        alpha_bar = base.at(t, x_t).alpha_bar
        return exact_prediction(mixture.score, x_t, alpha_bar, base.target).to(x_t.dtype)

    return denoiser


# --- Fewer steps ---


def respaced_betas(alpha_bar, steps):
    """Betas (S,) whose alpha_bar is that of a long schedule, alpha_bar (T,), at increasing steps (S,) of it.

    Source: Nichol and Dhariwal 2021, section 4.
    """
    kept = alpha_bar[steps]  # (S,)
    previous = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    # beta'_i = 1 - alpha_bar_{S_i} / alpha_bar_{S_{i-1}}
    return 1 - kept / previous


def respacing(alpha_bar, original_steps, num_steps):
    """A shorter schedule, and what a denoiser is told in it.

    Args:
        alpha_bar: of the schedule to shorten, (T,).
        original_steps: the step of the original schedule that each of its steps stands for, (T,) integers.
        num_steps: S, how many steps to keep, from 2 to T.

    Returns:
        betas (S,), such that their alpha_bar equals the long one's at the kept steps; and the original steps
        (S,) that these stand for.

    Source: Nichol and Dhariwal 2021, section 4.
    """
    evenly = torch.linspace(0, len(alpha_bar) - 1, num_steps, dtype=torch.float64, device=alpha_bar.device)
    kept = evenly.round().long()  # (S,), own steps
    return respaced_betas(alpha_bar, kept), original_steps[kept]


# --- A network learns the mixture ---


def training_step(optimizer, loss_of, x_0, t, noise):
    """One step of an optimizer along the gradient of the loss on a batch.

    Args:
        optimizer: a torch.optim.Optimizer of the network's weights.
        loss_of: callable (x_0, t, noise) -> the network's loss, a scalar.
        x_0, t, noise: the batch, as loss_of takes it.

    Returns:
        The loss before the step, a scalar that carries no gradient.

    Source: Ho et al. 2020, algorithm 1.
    """
    optimizer.zero_grad()
    loss = loss_of(x_0, t, noise)
    loss.backward()
    optimizer.step()
    return loss.detach()


# --- How likely are the data? ---


@torch.no_grad()
def bound(diffusion, denoiser, x_0, generator=None, log_likelihood=normal_log_density):
    """Upper bound on -log p(x_0), one noise draw per step.

    Args:
        diffusion: a Diffusion.
        denoiser: callable (x_t, t) -> output.
        x_0: (B, C, ...).
        generator: source of the noise.
        log_likelihood: of the last step; discretized_log_likelihood for 8-bit images.

    Returns:
        (B, T + 1) in nats: the terms of the steps t = 0 .. T - 1, then KL(q(x_T | x_0) || N(0, I)).
        Their sum is the bound.

    Source: Ho et al. 2020, equation 5.
    """
    terms = []
    for step in range(diffusion.num_steps):
        t = torch.full((len(x_0),), step, device=x_0.device)
        now = diffusion.at(t, x_0)
        x_t = q_sample(x_0, now.alpha_bar, noise_like(x_0, generator)).to(x_0.dtype)
        reverse = diffusion.reverse_step(denoiser(x_t, now.t), x_t, now, clip=False)
        terms.append(diffusion.bound_term(reverse, x_0, x_t, t, log_likelihood))
    # q(x_T | x_0) = N(sqrt(alpha_bar_T) x_0, (1 - alpha_bar_T) I), and the last step was T
    zero = torch.zeros_like(now.alpha_bar)
    prior = normal_kl(now.alpha_bar.sqrt() * x_0, (1 - now.alpha_bar).log(), zero, zero)
    return torch.stack([*terms, prior.flatten(1).sum(dim=1)], dim=1)


# --- The velocity ---


def v_from_x_0_and_eps(x_0, alpha_bar, eps):
    """The velocity v of a noisy sample.

    Args:
        x_0, eps: clean data and noise, (B, ...).
        alpha_bar: broadcastable to x_0, in (0, 1).

    Returns:
        v, like x_0.

    Source: Salimans and Ho 2022, section 4 and appendix D.
    """
    # v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


def x_0_from_v(x_t, alpha_bar, v):
    """Clean data from noisy data x_t and its velocity v, with alpha_bar and shapes as in v_from_x_0_and_eps.

    Source: Salimans and Ho 2022, section 4 and appendix D.
    """
    # x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v


def eps_from_v(x_t, alpha_bar, v):
    """Noise from noisy data x_t and its velocity v, with alpha_bar and shapes as in v_from_x_0_and_eps.

    Source: Salimans and Ho 2022, appendix D.
    """
    # eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t
    return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t
