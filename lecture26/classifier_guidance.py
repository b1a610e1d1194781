"""Classifier guidance: steering a finished model.

Generated from notebooks/03_classifier_guidance.py, which derives and checks it: edit there, then run `make
package`.
"""

from functools import reduce

import torch
from torch import nn
from torch.nn import functional as F

from lecture26.ddpm import noise_like, q_sample
from lecture26.kit.validation import check_positive_int, check_shape
from lecture26.unet import (
    DownLevels,
    SelfAttention,
    StepEmbedding,
    attention,
    group_norm,
    levels_with_attention,
    patchify,
)

# --- Bayes' rule on scores ---


def guided_eps(eps, gradient, alpha_bar, scale):
    """Steer a predicted noise by the gradient of a log-probability.

    Args:
        eps: predicted noise, (B, ...).
        gradient: of log p(y | x_t) with respect to x_t, like eps.
        alpha_bar: at each sample's step, broadcastable to eps, in (0, 1).
        scale: s, a number; 1 is Bayes' rule, 0 no guidance.

    Returns:
        The guided noise, like eps.

    Source: Dhariwal and Nichol 2021, algorithm 2.
    """
    # eps_guided = eps - s sqrt(1 - alpha_bar_t) grad log p(y | x_t)
    return eps - scale * (1 - alpha_bar).sqrt() * gradient


# --- From a classifier to its gradient ---


def check_classes(y):
    """Raise TypeError unless y holds class numbers: a tensor, int64."""
    if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
        found = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"y must hold integers, as an int64 tensor; got {found}")


def selected_log_probs(logits, y):
    """The log-probability of each sample's own class.

    Args:
        logits: (B, K).
        y: the classes, (B,) integers in [0, K).

    Returns:
        log p(y | x), (B,), in nats.

    Raises:
        TypeError: if y is no int64 tensor.
        ValueError: if the shapes do not fit, or a class lies outside [0, K).

    Source: Dhariwal and Nichol 2021, section 4.
    """
    check_classes(y)
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and y must have shapes (B, K) and (B,); got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    if y.numel() and not 0 <= y.min() <= y.max() < logits.shape[1]:
        raise ValueError(f"y must lie in [0, {logits.shape[1]}); got values {y.min()} to {y.max()}")
    # log p(y | x) = l_y - log sum_k exp(l_k)
    log_probs = logits.log_softmax(dim=1)  # (B, K)
    return log_probs.gather(1, y[:, None])[:, 0]


def log_prob_gradient(classifier, x_t, t, y):
    """The gradient of log p(y | x_t) with respect to x_t, for each sample by itself.

    It works under no_grad and inference_mode too (where the classifier was made outside of the latter), and
    leaves no graph and no .grad behind.

    Args:
        classifier: callable (x_t, t) -> logits (B, K), in evaluation mode.
        x_t: (B, ...).
        t: steps of the original schedule, (B,).
        y: the class that each sample shall have, (B,) integers in [0, K).

    Returns:
        Like x_t.

    Raises:
        TypeError, ValueError: if y does not fit the classifier, see selected_log_probs.

    Source: Dhariwal and Nichol 2021, algorithms 1 and 2.
    """
    check_classes(y)
    with torch.inference_mode(False), torch.enable_grad():
        x_t, t, y = x_t.detach().clone(), t.clone(), y.clone()  # inference tensors cannot be differentiated
        x_t.requires_grad_()
        log_probs = selected_log_probs(classifier(x_t, t), y)  # (B,)
        # the gradient of the sum: no sample's log-probability depends on another sample
        (gradient,) = torch.autograd.grad(log_probs.sum(), x_t)
        return gradient


def exact_classifier(mixture, diffusion):
    """The noisy classifier that a perfectly trained network would be, for data from a Gaussian mixture.

    Its classes are the mixture's components: classifier(x_t (B, D), t (B,)) -> logits (B, K), whose softmax
    is q(component | x_t), for the steps of a diffusion, respaced or not.

    Source: Bayes' rule, with `GaussianMixture.joint_log_density`.
    """

    def classifier(x_t, t):
        return mixture.joint_log_density(x_t, diffusion.base.at(t, x_t).alpha_bar)

    return classifier


# --- A guided denoiser is a denoiser ---


def guided_output(denoiser, classifier, x_t, t, y, scale, alpha_bar, target):
    """What a denoiser that is guided by a classifier returns, whatever it predicts.

    Args:
        denoiser: callable (x_t, t) -> (B, C, ...), or (B, 2C, ...) with the channels of a variance behind.
        classifier: callable (x_t, t) -> logits (B, K), for noisy data and the same steps.
        x_t: (B, C, ...).
        t: steps of the original schedule, (B,).
        y: the class that each sample shall have, (B,) integers in [0, K).
        scale: s, a number; 1 is Bayes' rule, 0 no guidance.
        alpha_bar: at these steps, broadcastable to x_t, in (0, 1).
        target: callable (x_0, alpha_bar, eps) -> what the first C channels stand for; linear in x_0 and eps.

    Returns:
        Like the denoiser's output.

    Raises:
        ValueError: if the denoiser's output has another shape.

    Source: Dhariwal and Nichol 2021, algorithm 2, for a denoiser that predicts eps.
    """
    output, (batch, channels, *rest) = denoiser(x_t, t), x_t.shape
    if tuple(output.shape) not in ((batch, channels, *rest), (batch, 2 * channels, *rest)):
        raise ValueError(
            f"output must have the shape {tuple(x_t.shape)} of x_t, or twice its channels; "
            f"got {tuple(output.shape)}"
        )
    gradient = log_prob_gradient(classifier, x_t, t, y)
    # by how much the noise moves (3.4), and the clean data with it, since x_t stays (1.22)
    eps = guided_eps(torch.zeros_like(x_t), gradient, alpha_bar, scale)
    x_0 = -((1 - alpha_bar) / alpha_bar).sqrt() * eps
    moved = output[:, :channels] + target(x_0, alpha_bar, eps)
    return torch.cat([moved.to(output.dtype), output[:, channels:]], dim=1)


def classifier_guided(denoiser, classifier, y, scale, diffusion):
    """A denoiser whose score is moved along the gradient of a classifier's log-probability.

    Args:
        denoiser: callable (x_t, t) -> output, unconditional.
        classifier: callable (x_t, t) -> logits (B, K), for noisy data and the same steps.
        y: the class that each sample shall have, (B,) integers in [0, K).
        scale: s, a number; 1 is Bayes' rule, 0 no guidance.
        diffusion: the Diffusion that the denoiser was trained for, or one respaced from it.

    Returns:
        Callable (x_t, t) -> output, like denoiser.

    Source: Dhariwal and Nichol 2021, algorithm 2.
    """
    base = diffusion.base

    def guided(x_t, t):
        alpha_bar = base.at(t, x_t).alpha_bar
        return guided_output(denoiser, classifier, x_t, t, y, scale, alpha_bar, base.target)

    return guided


# --- Bayes' rule on one step ---


def guided_mean(mean, variance, gradient, scale):
    """The mean (B, ...) of a step, moved by scale times variance, the diagonal of Sigma, times gradient.

    Source: Dhariwal and Nichol 2021, algorithm 1 and equations 5 to 10.
    """
    # mu + s Sigma g
    return mean + scale * variance * gradient


def mean_shifted_chain(moments, classifier, y, scale, x_T, steps, noise_at):
    """Sample by ancestral steps whose means are moved along a classifier's gradient.

    Args:
        moments: callable (x_t, t) -> (mean, variance) of p(x_{t-1} | x_t), with own steps t (B,), integers.
        classifier: callable (x_t, t) -> logits (B, K), with original steps t (B,).
        y: the class that each sample shall have, (B,) integers in [0, K).
        scale: s, a number.
        x_T: noise to start from, (B, ...).
        steps: the original step that each own step 0, ..., T - 1 stands for, (T,) integers.
        noise_at: callable (index) -> the noise of the own step of that number, like x_T.

    Returns:
        x_0, like x_T.

    Source: Dhariwal and Nichol 2021, algorithm 1.
    """
    x_t = x_T
    for index in reversed(range(len(steps))):
        own = torch.full((len(x_t),), index, device=x_t.device)
        mean, variance = moments(x_t, own)
        gradient = log_prob_gradient(classifier, x_t, steps[own], y)
        x_t = guided_mean(mean, variance, gradient, scale)
        if index > 0:
            x_t = x_t + variance.sqrt() * noise_at(index)
    return x_t


@torch.no_grad()
def sample_mean_shifted(diffusion, denoiser, classifier, y, scale, x_T, generator=None):
    """Draw samples in the lecture's form of guidance, from x_T down to x_0.

    Args:
        diffusion: a Diffusion, respaced or not.
        denoiser: callable (x_t, t) -> output, unconditional.
        classifier, y, scale: as in mean_shifted_chain.
        x_T: noise to start from, (B, C, ...).
        generator: source of the noise on the way.

    Returns:
        x_0, like x_T.

    Source: Dhariwal and Nichol 2021, algorithm 1.
    """

    def moments(x_t, t):
        p = diffusion.p_mean_variance(denoiser, x_t, t)
        return p.mean, p.variance

    steps = diffusion.steps.to(x_T.device)
    return mean_shifted_chain(
        moments, classifier, y, scale, x_T, steps, lambda index: noise_like(x_T, generator)
    )


def classifier_mean_shift(classifier, y, scale):
    """The lecture's form of guidance, for ddpm_step(..., mean_shift=...).

    The gradient is taken at x_t and its step t.

    Args:
        classifier: callable (x_t, t) -> logits (B, K).
        y: the class that each sample shall have, (B,) integers in [0, K).
        scale: s, a number.

    Returns:
        Callable (mean, variance, x_t, t) -> s Sigma grad log p(y | x_t), to be added to the mean.

    Source: Dhariwal and Nichol 2021, algorithm 1.
    """

    def mean_shift(mean, variance, x_t, t):
        gradient = log_prob_gradient(classifier, x_t, t, y)
        return guided_mean(torch.zeros_like(mean), variance, gradient, scale)

    return mean_shift


# --- One question for each label ---


def attention_pool(tokens, queries):
    """Sum up a set of places, once for each query.

    Args:
        tokens: features of N places, (B, N, C).
        queries: one per question, the same for all samples, (L, C).

    Returns:
        (B, L, C): for each query a weighted mean of the places.

    Source: Vaswani et al. 2017, equation 1; pooling by attention as in Radford et al. 2021, section 2.4.
    """
    # softmax(q h^T / sqrt(C)) h, the softmax over the places
    queries = queries.expand(len(tokens), -1, -1)  # (B, L, C)
    return attention(queries, tokens, tokens)


# --- Two labels at once ---


def joint_logits(first, second):
    """Logits of all pairs of classes of two labels that are independent given the image.

    Args:
        first: logits of the first label, (B, K).
        second: logits of the second label, (B, M).

    Returns:
        (B, K M), the pair (i, j) at i M + j.

    Source: conditional independence of the labels, equation (3.16) of the chapter.
    """
    # l_ij = l_i + l_j
    pairs = first[:, :, None] + second[:, None, :]  # (B, K, M)
    return pairs.flatten(1)


def joint_class(labels, num_classes):
    """Number the combinations of several labels as joint_logits does.

    Args:
        labels: one column per label, (B, L) integers, column l in [0, num_classes[l]).
        num_classes: the number of classes of each label.

    Returns:
        (B,) integers in [0, product of num_classes).

    Raises:
        TypeError: if labels are no int64 tensor.
        ValueError: if there are not as many columns as labels, or a class lies outside its range.
    """
    check_classes(labels)
    if labels.ndim != 2 or labels.shape[1] != len(num_classes):
        raise ValueError(f"labels must have shape (B, {len(num_classes)}); got {tuple(labels.shape)}")
    joint = torch.zeros_like(labels[:, 0])
    for column, count in zip(labels.unbind(dim=1), num_classes, strict=True):
        if column.numel() and not 0 <= column.min() <= column.max() < count:
            raise ValueError(f"labels must lie in [0, {count}) in this column; got {column.tolist()}")
        joint = joint * count + column
    return joint


# --- The network ---


class DownPath(nn.Module):
    """The way down of a U-Net: from images, noisy or clean, to one coarse feature map.

    Args:
        in_channels: channels of the images.
        base_channels, channel_multipliers, num_blocks, attention_levels, patch_size: as in UNet.
        noise_aware: whether the images are noisy, and their steps are given.

    Attributes:
        out_channels: channels of the feature map.

    Raises:
        TypeError, ValueError: on multipliers, levels, blocks or patches that make no network.

    Source: Dhariwal and Nichol 2021, section 4 (the downsampling trunk of the U-Net).
    """

    def __init__(
        self,
        in_channels,
        base_channels=32,
        channel_multipliers=(1, 2, 4),
        num_blocks=1,
        attention_levels=None,
        patch_size=1,
        noise_aware=True,
    ):
        super().__init__()
        attention_levels = levels_with_attention(channel_multipliers, attention_levels)
        check_positive_int("num_blocks", num_blocks)
        check_positive_int("patch_size", patch_size)
        self.patch_size = patch_size
        self.embedding_dim = 4 * base_channels
        self.time_mlp = StepEmbedding(base_channels, self.embedding_dim) if noise_aware else None
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        attention_at = [SelfAttention if level in attention_levels else None for level in range(len(widths))]
        self.out_channels = widths[-1]
        self.stem = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.levels = DownLevels(widths, num_blocks, self.embedding_dim, attention_at)
        self.norm = group_norm(widths[-1])

    def features(self, x, t=None):
        """Map images x (B, C, H, W), noisy ones with their steps t (B,), to a map (B, out_channels, h, w).

        Raises:
            ValueError: if t is missing for noisy images, given for clean ones, or not one step per image.
        """
        if (t is None) != (self.time_mlp is None):
            kind = "clean images only: leave out t" if self.time_mlp is None else "noisy images: it needs t"
            raise ValueError(f"this network reads {kind}")
        if t is None:
            embedding = x.new_zeros(len(x), self.embedding_dim)
        else:
            check_shape("t", t, x.shape[:1], of="one step per image")
            embedding = self.time_mlp(t)
        *_, h = self.levels(self.stem(patchify(x, self.patch_size)), embedding, None)
        return F.silu(self.norm(h))


class NoisyClassifier(DownPath):
    """Say what a noisy image shows, given its step.

    Args:
        in_channels: channels of the images.
        num_classes: a number of classes, or a tuple of them for several labels, whose combinations are then
            the classes (see joint_class).
        path: further arguments of DownPath.

    Raises:
        TypeError, ValueError: if a number of classes is not a positive int; and as DownPath.

    Source: Dhariwal and Nichol 2021, section 4.
    """

    def __init__(self, in_channels, num_classes, **path):
        super().__init__(in_channels, **path)
        self.num_classes = (num_classes,) if isinstance(num_classes, int | float) else tuple(num_classes)
        for count in self.num_classes:
            check_positive_int("num_classes", count)
        self.queries = nn.Parameter(torch.zeros(len(self.num_classes), self.out_channels))
        self.heads = nn.ModuleList(nn.Linear(self.out_channels, count) for count in self.num_classes)

    def label_logits(self, x_t, t):
        """Map x_t (B, C, H, W) and steps t (B,) to the logits of each label by itself: a list of (B, K_l)."""
        tokens = self.features(x_t, t).flatten(2).transpose(1, 2)  # (B, N, C)
        answers = attention_pool(tokens, self.queries).unbind(dim=1)  # (B, C) for each label
        return [head(answer) for head, answer in zip(self.heads, answers, strict=True)]

    def forward(self, x_t, t):
        """Map x_t (B, C, H, W) and steps t (B,) to the logits of the classes, (B, K)."""
        return reduce(joint_logits, self.label_logits(x_t, t))


# --- Training it ---


def classifier_training_step(optimizer, classifier, x_0, y, t, noise, alpha_bar):
    """One step of an optimizer that teaches a classifier to read noisy data.

    Args:
        optimizer: a torch.optim.Optimizer of the classifier's weights.
        classifier: callable (x_t, t) -> logits (B, K).
        x_0: clean data, (B, ...).
        y: their classes, (B,) integers in [0, K).
        t: steps, (B,).
        noise: standard normal, like x_0.
        alpha_bar: at these steps, broadcastable to x_0.

    Returns:
        The cross-entropy before the step, the mean over the batch in nats, a scalar that carries no gradient.

    Source: Dhariwal and Nichol 2021, section 4.
    """
    optimizer.zero_grad()
    # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    x_t = q_sample(x_0, alpha_bar, noise)
    loss = -selected_log_probs(classifier(x_t, t), y).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()
