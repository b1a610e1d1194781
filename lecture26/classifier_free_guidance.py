"""Classifier-free guidance: two answers of one network.

Generated from notebooks/05_classifier_free_guidance.py, which derives and checks it: edit there, then run
`make package`.
"""

import torch

from lecture26.ddpm import GaussianMixture, at_least_float32, exact_denoiser

# --- The classifier that was there already ---


def implicit_gradient(eps_cond, eps_uncond, alpha_bar):
    """The gradient of log p(y | x_t) by x_t, of the classifier that two denoisers contain, like eps_cond.

    eps_cond and eps_uncond are the predicted noise given the class and given nothing, (B, ...); alpha_bar, in
    (0, 1), is broadcastable to them.

    Source: Ho and Salimans 2022, section 3.2.
    """
    # grad log p(y | x_t) = -(eps_c - eps_u) / sqrt(1 - alpha_bar_t)
    return (eps_uncond - eps_cond) / (1 - alpha_bar).sqrt()


def exact_conditional_denoiser(mixture, diffusion):
    """The conditional denoiser that a perfectly trained network would be, for data from a Gaussian mixture.

    Args:
        mixture: a GaussianMixture of K components, which are the classes.
        diffusion: the Diffusion it is made for, with a fixed variance; respaced or not.

    Returns:
        denoiser(x_t (B, D), t (B,), cond (B,)) -> (B, D), cond being integers in [0, K]; K means no label.

    Source: Efron 2011, equation 1.4 (Tweedie's formula), for each component and for all together.
    """
    parts = [
        GaussianMixture([1.0], m[None], s[None]) for m, s in zip(mixture.means, mixture.stds, strict=True)
    ]
    denoisers = [exact_denoiser(part, diffusion) for part in [*parts, mixture]]

    def denoiser(x_t, t, cond):
        outputs = torch.stack([each(x_t, t) for each in denoisers], dim=1)  # (B, K + 1, D)
        return outputs[torch.arange(len(cond), device=cond.device), cond.long()]

    return denoiser


# --- Longer than Bayes' rule ---


def cfg_combine(eps_cond, eps_uncond, w):
    """Mix a conditional and an unconditional prediction: classifier-free guidance.

    Args:
        eps_cond, eps_uncond: predictions given the condition and without it, (B, ...): of noise, of x_0 or
            of v.
        w: the weight, a number: -1 is the unconditional prediction, 0 the conditional one, above 0 guided.

    Returns:
        The guided prediction, like eps_cond.

    Source: Ho and Salimans 2022, equation 6.
    """
    # (1 + w) eps_c - w eps_u
    return (1 + w) * eps_cond - w * eps_uncond


# --- Two ways to count ---


def combine_by_guidance_scale(eps_cond, eps_uncond, guidance_scale):
    """Mix predictions with the condition, eps_cond, and without, eps_uncond, (B, ...), as most libraries do.

    guidance_scale is s = 1 + w: 0 gives the unconditional prediction, 1 the conditional one.

    Source: Nichol et al. 2022, section 2.3; Saharia et al. 2022, equation 2.
    """
    # eps_u + s (eps_c - eps_u)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


# --- A guided denoiser is a denoiser ---


def stacked_conditions(cond, null_cond, batch):
    """Put two conditions of a batch behind each other, after checking that they fit.

    Args:
        cond, null_cond: tensors, or dicts of tensors with the same keys, batch first.
        batch: B, the number of samples.

    Returns:
        A tensor, or a dict of them, whose first axis is 2 B long: cond, then null_cond.

    Raises:
        TypeError: if one of them is neither a tensor nor a dict of tensors, or they are not both the same.
        ValueError: if keys or shapes differ, or the first axis is not B long.
    """
    if isinstance(cond, dict) and isinstance(null_cond, dict):
        if cond.keys() != null_cond.keys():
            raise ValueError(f"null_cond must have the keys of cond, {sorted(cond)}; got {sorted(null_cond)}")
        return {name: stacked_conditions(cond[name], null_cond[name], batch) for name in cond}
    if not (isinstance(cond, torch.Tensor) and isinstance(null_cond, torch.Tensor)):
        raise TypeError(
            "cond and null_cond must both be tensors, or dicts of tensors; "
            f"got {type(cond).__name__} and {type(null_cond).__name__}"
        )
    if cond.shape[:1] != (batch,):
        raise ValueError(
            f"cond must hold one row for each of {batch} sample(s); got shape {tuple(cond.shape)}"
        )
    if null_cond.shape != cond.shape:
        raise ValueError(
            f"null_cond must have the shape of cond, {tuple(cond.shape)}; got {tuple(null_cond.shape)}"
        )
    return torch.cat([cond, null_cond])


def doubled_pass(denoiser, x_t, t, both_conds, mix):
    """Ask a denoiser for both answers in one pass, and mix its predictions.

    Args:
        denoiser: callable (x_t, t, cond) -> output, (B, C, ...), or (B, 2 C, ...) with variance channels
            last.
        x_t: noisy samples, (B, C, ...).
        t: the step of each, (B,) integers.
        both_conds: the conditions of all samples, followed by those that say nothing; 2 B long.
        mix: callable (prediction given the condition, prediction given nothing) -> like them, (B, C, ...).

    Returns:
        The mixed prediction, followed by the variance channels, if there are any; like denoiser's output.

    Source: Ho and Salimans 2022, algorithm 2; for the variance channels Nichol et al. 2022.
    """
    outputs = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both_conds)  # (2 B, C or 2 C, ...)
    output_cond, output_null = outputs.chunk(2)
    channels = x_t.shape[1]
    mixed = mix(output_cond[:, :channels], output_null[:, :channels])
    return torch.cat([mixed, output_cond[:, channels:]], dim=1)


def classifier_free_guided(denoiser, cond, null_cond, w, rescale=0.0, interval=None):
    """A denoiser that mixes a conditional network's answers with a condition and without it.

    Both answers come from one forward pass, of a batch twice as long.

    Args:
        denoiser: callable (x_t, t, cond) -> output, (B, C, ...), or (B, 2 C, ...) with variance channels
            last. These are not mixed: the conditional ones are kept.
        cond: the condition of each sample, a tensor or a dict of tensors, batch first.
        null_cond: what stands for no condition, like cond; for a negative prompt, what is not wanted.
        w: the weight, a number: -1 gives the unconditional prediction, 0 the conditional one.
        rescale: phi, how much of the conditional output's standard deviation is restored, in [0, 1]. It works
            in the space of the network's output, be it noise, x_0 or v.
        interval: (first, last), the steps of the original schedule at which to guide, both included; at the
            others the conditional prediction is returned. None guides at all steps.

    Returns:
        Callable (x_t, t) -> output, like denoiser's.

    Raises:
        TypeError: if cond or null_cond is neither a tensor nor a dict of tensors.
        ValueError: if rescale or interval is out of range; when called, if the conditions do not fit.

    Source: Ho and Salimans 2022, algorithm 2; Lin et al. 2024, section 3.4; Kynkaanniemi et al. 2024.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1]; got {rescale}")
    if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
        raise ValueError(f"interval must be (first, last) with first <= last, or None; got {interval}")

    def guided(x_t, t):
        both_conds = stacked_conditions(cond, null_cond, len(x_t))
        steps = t.long()  # smaller integers would wrap the interval's ends round
        is_idle = interval is not None and not ((steps >= interval[0]) & (steps <= interval[1])).any()
        if w == 0 or is_idle:
            return denoiser(x_t, t, cond)

        def mix(cond_part, null_part):
            # the difference is multiplied, and so would be what half precision rounds
            dtype = cond_part.dtype
            cond_part, null_part = (part.to(at_least_float32(dtype)) for part in (cond_part, null_part))
            mixed = cfg_combine(cond_part, null_part, w)
            if rescale:
                mixed = rescaled(mixed, cond_part, rescale)
            if interval is not None:
                mixed = within_interval(mixed, cond_part, steps, *interval)
            return mixed.to(dtype)

        return doubled_pass(denoiser, x_t, t, both_conds, mix)

    return guided


# --- Dropping labels ---


def labels_after_dropout(y, null_label, u, p):
    """Replace the labels of the samples whose draw falls below p.

    Args:
        y: labels, (B,) or (B, L) integers.
        null_label: what replaces them, a scalar tensor, or (L,) for several labels; integers.
        u: one number per sample, uniform on [0, 1), (B,).
        p: the probability with which a sample loses its labels, all of them together; in [0, 1].

    Returns:
        Like y; y itself is not changed.

    Source: Ho and Salimans 2022, algorithm 1.
    """
    is_dropped = (u < p).view(-1, *[1] * (y.ndim - 1))  # (B,) or (B, 1)
    return torch.where(is_dropped, null_label, y)


def drop_labels(y, null_label, p, generator=None):
    """Replace each sample's labels by the null label with probability p; for training only.

    Args:
        y: labels, (B,) or (B, L) integers.
        null_label: the null label, an integer; for L labels a sequence or tensor of L integers. All labels
            of a sample are dropped together.
        p: the probability, in [0, 1].
        generator: source of the draws, one per sample.

    Returns:
        Like y; y itself is not changed.

    Raises:
        TypeError: if y or null_label does not hold integers.
        ValueError: if p lies outside [0, 1], y has another shape, there are not as many null labels, or one
            is too large for y's type.

    Source: Ho and Salimans 2022, algorithm 1.
    """
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y must hold integers; got {y.dtype}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1]; got {p}")
    null_label = torch.as_tensor(null_label, device=y.device)
    if null_label.is_floating_point() or null_label.dtype == torch.bool:
        raise TypeError(f"null_label must be of integers; got {null_label.tolist()}")
    if (null_label > torch.iinfo(y.dtype).max).any():
        raise ValueError(f"null_label must fit into {y.dtype}, as y does; got {null_label.tolist()}")
    if y.ndim not in (1, 2) or null_label.shape != y.shape[1:]:
        raise ValueError(
            "y must have shape (B,) with one null label, or (B, L) with L of them; "
            f"got {tuple(y.shape)} and null_label {null_label.tolist()}"
        )
    device = y.device if generator is None else generator.device
    u = torch.rand(len(y), generator=generator, device=device).to(y.device)  # (B,)
    return labels_after_dropout(y, null_label.to(y.dtype), u, p)


def conditional_training_step(optimizer, loss_of, x_0, y, t, noise, null_label, u, p):
    """One step of an optimizer along the gradient of the loss on a batch, with label dropout.

    Args:
        optimizer: a torch.optim.Optimizer of the network's weights.
        loss_of: callable (x_0, t, noise, cond) -> the loss of the network that is told cond, a scalar.
        x_0, t, noise: the batch, as loss_of takes it.
        y: its labels, (B,) or (B, L) integers.
        null_label, u, p: as labels_after_dropout takes them.

    Returns:
        The loss before the step, a scalar that carries no gradient.

    Source: Ho and Salimans 2022, algorithm 1.
    """
    cond = labels_after_dropout(y, null_label, u, p)
    optimizer.zero_grad()
    loss = loss_of(x_0, t, noise, cond)
    loss.backward()
    optimizer.step()
    return loss.detach()


# --- Too much contrast ---


def dynamic_threshold(x_0, quantile):
    """Bring predicted pictures into [-1, 1], each by a bound of its own.

    Args:
        x_0: predictions of clean pictures, (B, ...).
        quantile: the share of a picture's absolute values that the bound must hold, in [0, 1].

    Returns:
        Like x_0, within [-1, 1]. A picture that lies within [-1, 1] already stays as it is.

    Source: Saharia et al. 2022, section 2.3.
    """
    bound = x_0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1)  # (B,)
    bound = bound.view(-1, *[1] * (x_0.ndim - 1))  # (B, 1, ...)
    return x_0.clamp(-bound, bound) / bound


def rescaled(guided, cond, phi):
    """Take back some of the spread that guidance has added to a prediction.

    Args:
        guided: guided predictions, (B, ...).
        cond: conditional predictions, like guided.
        phi: how much of it to take back, in [0, 1].

    Returns:
        Like guided. A sample without any spread stays as it is.

    Source: Lin et al. 2024, section 3.4.
    """
    # std over all elements of each sample
    axes = tuple(range(1, guided.ndim))
    std_guided = guided.std(axes, correction=0, keepdim=True)  # (B, 1, ...)
    std_cond = cond.std(axes, correction=0, keepdim=True)  # (B, 1, ...)
    # phi std_c / std_g guided + (1 - phi) guided
    factor = phi * std_cond / std_guided + 1 - phi
    return torch.where(std_guided > 0, factor, 1.0) * guided


# --- Only where it helps ---


def within_interval(guided, cond, t, first, last):
    """Choose the guided prediction at the steps of an interval, and the conditional one at all others.

    Args:
        guided, cond: predictions, (B, ...).
        t: steps of the original schedule, (B,) integers.
        first, last: the interval's ends, both included.

    Returns:
        Like guided.

    Source: Kynkaanniemi et al. 2024, for noise levels; here for steps.
    """
    is_inside = (t >= first) & (t <= last)  # (B,)
    return torch.where(is_inside.view(-1, *[1] * (guided.ndim - 1)), guided, cond)
