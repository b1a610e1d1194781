"""Latent diffusion: from words to a picture.

Generated from notebooks/07_latent_diffusion.py, which derives and checks it: edit there, then run `make
package`.
"""

import math
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from lecture26.classifier_free_guidance import classifier_free_guided, labels_after_dropout
from lecture26.clip_guidance import TextTransformer, Tokenizer
from lecture26.ddpm import (
    SCHEDULES,
    Diffusion,
    ddim_step,
    noise_like,
    q_sample,
    sample,
    training_step,
)
from lecture26.kit.tensor_files import read_parts, write_parts
from lecture26.kit.validation import check_choice, check_positive_int, check_shape
from lecture26.unet import SelfAttention, UNet, group_norm, zero_init
from lecture26.vae import KLVAE, reparameterize

# --- Into the latent space and out of it ---


def to_latents(mean, log_variance, noise, latent_scale):
    """Draw latents, on the diffusion's scale, from an encoder's mean and log_variance, (B, c, h, w) each.

    noise: standard normal, like mean; zeros take the mean itself. latent_scale: one over the standard
    deviation of the VAE's latents. Source: Rombach et al. 2022, appendix G.
    """
    # z = s (mu + sigma eps)
    return latent_scale * reparameterize(mean, log_variance, noise)


def from_latents(decode, latents, latent_scale):
    """Bring latents back from the scale that the diffusion works on, and decode them.

    Args:
        decode: a VAE's decoder, callable (B, c, h, w) -> images (B, C, H, W).
        latents: as to_latents gives them, (B, c, h, w).
        latent_scale: as to_latents took it.

    Returns:
        What decode gives.

    Source: Rombach et al. 2022, section 3.1 and appendix G.
    """
    # x = D(z / s)
    return decode(latents / latent_scale)


# --- Words ---


class TextEncoder(nn.Module):
    """Features of every token of a text, each knowing the whole text, and which of the tokens are there.

    Args:
        tokenizer: callable, B texts -> tokens (B, L), with `num_tokens`, `length` and `padding`.
        width: E, length of a token's features.
        depth: the number of transformer blocks.
        heads: attention heads per block.

    Attributes:
        tokenizer, width: as given.

    Source: Rombach et al. 2022, section 3.3 and appendix E.2.1 (a transformer learned with the denoiser).
    """

    def __init__(self, tokenizer, width=128, depth=2, heads=4):
        super().__init__()
        self.tokenizer, self.width = tokenizer, width
        self.transformer = TextTransformer(tokenizer.num_tokens, tokenizer.length, width, depth, heads)

    def forward(self, tokens):
        """Map tokens (B, L) to {"context": features (B, L, E), "mask": (B, L) bool, False for padding}."""
        there = tokens != self.tokenizer.padding  # (B, L)
        # m_ij = there_j: every token looks at all that are there, before and after it
        context = self.transformer(tokens, mask=there[:, None, None, :])
        return {"context": context, "mask": there}


# --- Who looks at which word ---


def word_weights(q, k, mask):
    """How much each place of an image looks at each word.

    Args:
        q: queries of the N places, (B, heads, N, d).
        k: keys of the M tokens, (B, heads, M, d).
        mask: (B, M) bool, True for the tokens to be looked at; at least one in every row.

    Returns:
        (B, heads, N, M), at least 0; those of one place and head add up to 1.

    Source: Vaswani et al. 2017, section 3.2.1; Rombach et al. 2022, section 3.3.
    """
    # S = q k^T / sqrt(d) where a token is there, else -infinity; a = softmax over the tokens
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, heads, N, M)
    return scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(dim=-1)


# --- Queries from the image, keys and values from the words ---


def split_heads(features, heads):
    """Cut features (B, N, heads * d) into heads, (B, heads, N, d): head i gets the i-th d of them."""
    return features.unflatten(2, (heads, -1)).transpose(1, 2)


def cross_attention(x, context, to_q, to_k, to_v, heads, mask):
    """Give each place of an image a mixture of what the words have to say, in several heads.

    Args:
        x: features of the N places, (B, N, C).
        context: features of the M tokens, (B, M, E).
        to_q: the layer of the queries, callable (B, N, C) -> (B, N, heads * d).
        to_k, to_v: those of the keys and of the values, callable (B, M, E) -> (B, M, heads * d).
        heads: the number of heads.
        mask: (B, M) bool, True for the tokens to be looked at.

    Returns:
        (B, N, heads * d), the heads side by side.

    Source: Rombach et al. 2022, section 3.3; Vaswani et al. 2017, section 3.2.2.
    """
    # the image asks, the words answer: Q = x W_Q^T, K = c W_K^T, V = c W_V^T
    q, k, v = (split_heads(given, heads) for given in (to_q(x), to_k(context), to_v(context)))
    mixed = word_weights(q, k, mask) @ v  # a V in each head, (B, heads, N, d)
    return mixed.transpose(1, 2).flatten(2)


# --- As a layer ---


class CrossAttention(nn.Module):
    """Every place of an image looks at the tokens of a text.

    Args:
        query_dim: C, features of a place.
        context_dim: E, features of a token.
        heads: the number of heads.
        head_dim: d, features per head.

    Raises:
        TypeError, ValueError: if one of them is no positive int.

    Source: Rombach et al. 2022, section 3.3.
    """

    def __init__(self, query_dim, context_dim, heads, head_dim):
        super().__init__()
        sizes = {
            "query_dim": query_dim,
            "context_dim": context_dim,
            "heads": heads,
            "head_dim": head_dim,
        }
        for name, value in sizes.items():
            check_positive_int(name, value)
        self.query_dim, self.context_dim, self.heads = query_dim, context_dim, heads
        self.to_q = nn.Linear(query_dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, query_dim)

    def forward(self, x, context, mask=None):
        """Let each place, of features x (B, N, C), look at tokens of features context (B, M, E): (B, N, C).

        mask, (B, M) bool, is True for the tokens to be looked at; None means all. Raises TypeError if it is
        not bool, ValueError if shapes do not fit, or a row of it leaves no token.
        """
        mask = self.checked_mask(x, context, mask)
        mixed = cross_attention(x, context, self.to_q, self.to_k, self.to_v, self.heads, mask)
        return self.to_out(mixed)

    def weights(self, x, context, mask=None):
        """How much each place looks at each token, (B, heads, N, M); x, context and mask as in forward."""
        mask = self.checked_mask(x, context, mask)
        q, k = self.to_q(x), self.to_k(context)
        return word_weights(split_heads(q, self.heads), split_heads(k, self.heads), mask)

    def checked_mask(self, x, context, mask):
        """The mask (B, M), all True if mask is None, once x, context and mask fit each other and the layer.

        Raises TypeError or ValueError, as forward says, where they do not.
        """
        for name, value, dim in (
            ("x", x, self.query_dim),
            ("context", context, self.context_dim),
        ):
            if value.ndim != 3 or value.shape[2] != dim or len(value) != len(x):
                raise ValueError(f"{name} must be of shape ({len(x)}, N, {dim}); got {tuple(value.shape)}")
        if mask is None:
            return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True for tokens to be looked at; got {mask.dtype}")
        check_shape("mask", mask, context.shape[:2], of="the tokens")
        if not mask.any(dim=1).all():
            raise ValueError(f"mask must leave at least one token in every row; got {mask}")
        return mask


# --- A U-Net that listens ---


def coordinates(height, width, like):
    """Where the places of a feature map are.

    Args:
        height, width: of the map.
        like: a tensor with the dtype and the device that are wanted.

    Returns:
        (height * width, 2): row and column of each place, from -1 (top, left) to 1, row by row.
    """
    rows, columns = (
        torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device) for size in (height, width)
    )
    return torch.cartesian_prod(rows, columns)


class TextAttention(nn.Module):
    """Every place looks at all places, then at the words, knowing where it is; both are added.

    Made for UNet's `attention`: partial(TextAttention, context_dim=E) takes the channels.

    Args:
        channels: channels of the feature map.
        context_dim: E, features of a token.
        head_dim: channels per head; a narrower map has a single head.
        self_attention_from: a map with fewer channels looks at the words only. A U-Net's narrowest map
            has the most places, and so by far the most pairs of them.

    Raises:
        ValueError: if channels is above head_dim and no multiple of it.

    Source: Rombach et al. 2022, appendix E.2.1 (there with an MLP between the two attentions).
    """

    def __init__(self, channels, context_dim, head_dim=32, self_attention_from=0):
        super().__init__()
        head_dim = min(head_dim, channels)
        if channels % head_dim:
            raise ValueError(f"channels must be a multiple of head_dim={head_dim}; got channels={channels}")
        self.places = SelfAttention(channels, head_dim) if channels >= self_attention_from else None
        self.norm = group_norm(channels)
        self.where = nn.Linear(2, channels, bias=False)
        self.words = CrossAttention(channels, context_dim, channels // head_dim, head_dim)
        zero_init(self.words.to_out)

    def forward(self, x, cond):
        """Map x (B, C, H, W) and cond {"context": (B, M, E), "mask": (B, M)} to (B, C, H, W).

        Raises:
            TypeError: if cond is no dict with these two.
        """
        if not isinstance(cond, dict) or set(cond) != {"context", "mask"}:
            found = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
            raise TypeError(f"cond must be a dict of 'context' and 'mask', see TextEncoder; got {found}")
        if self.places is not None:
            x = self.places(x)
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        tokens = tokens + self.where(coordinates(*x.shape[2:], x))  # (H W, C), the same for all samples
        h = self.words(tokens, cond["context"], cond["mask"])  # (B, H W, C)
        return x + h.transpose(1, 2).reshape(x.shape)


# --- The whole, assembled ---


class LatentDiffusion(nn.Module):
    """Text to image: a text encoder, a denoiser of latents that is told the text, and a VAE around them.

    The VAE is frozen and put into evaluation mode, and stays so whatever `train` is called with.

    Args:
        vae: with `encode(x) -> (mean, log_variance)`, `decode(z)`, `in_channels`, `latent_channels` and
            `factor`, such as a KLVAE.
        denoiser: callable (z_t, t, cond) -> output, of latents.
        diffusion: the Diffusion that the denoiser was trained for; it must not clip.
        latent_scale: latents are multiplied by it before the diffusion, and divided by it afterwards.
        text_encoder: tokens (B, L) -> cond, a dict of tensors, with a `tokenizer`; see TextEncoder.
        image_size: of the images drawn, in pixels.

    Attributes:
        vae, denoiser, diffusion, latent_scale, text_encoder, image_size: as given.
        settings: what `from_settings` was given; None for a pipeline put together by hand.

    Raises:
        TypeError: if image_size is no int.
        ValueError: if latent_scale is not above 0, the diffusion clips, or image_size is no positive multiple
            of the VAE's factor.

    Source: Rombach et al. 2022, section 3.
    """

    def __init__(self, vae, denoiser, diffusion, latent_scale, text_encoder, image_size=64):
        super().__init__()
        latent_scale = float(latent_scale)
        if not 0 < latent_scale < math.inf:
            raise ValueError(f"latent_scale must be a number above 0; got {latent_scale}")
        if diffusion.clip:
            raise ValueError("diffusion must not clip, since latents have no bounds; got clip=True")
        check_positive_int("image_size", image_size)
        if image_size % vae.factor:
            raise ValueError(f"image_size must be a multiple of {vae.factor}; got {image_size}")
        self.vae = vae.eval().requires_grad_(False)
        self.denoiser, self.diffusion, self.text_encoder = denoiser, diffusion, text_encoder
        self.latent_scale, self.image_size, self.settings = latent_scale, image_size, None

    def train(self, mode=True):
        """Set the training mode of all parts but the VAE, which stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    @torch.no_grad()
    def encode(self, images, noise=None):
        """Map images (B, C, H, W) in [-1, 1] to scaled latents (B, c, h, w); noise None takes their mean."""
        mean, log_variance = self.vae.encode(images)
        noise = torch.zeros_like(mean) if noise is None else noise
        return to_latents(mean, log_variance, noise, self.latent_scale)

    @torch.no_grad()
    def decode(self, latents):
        """Map scaled latents (B, c, h, w) to images (B, C, H, W), in [-1, 1] but for small overshoots.

        Without a gradient; where one is wanted, call `from_latents` with `vae.decode`.
        """
        return from_latents(self.vae.decode, latents, self.latent_scale)

    @torch.no_grad()
    def condition(self, prompts):
        """What the denoiser is told of prompts, a list of str: a dict of tensors, batch first."""
        tokens = self.text_encoder.tokenizer(prompts)
        return self.text_encoder(tokens.to(self.example().device))

    def example(self):
        """A tensor with the dtype and on the device of the parameters."""
        return next(self.parameters(), torch.empty(0))

    # --- Nothing said: the empty caption ---

    def guided(self, prompts, w, negative_prompt=""):
        """The denoiser of latents, guided towards prompts: callable (z_t, t) -> output.

        Args:
            prompts: a list of B str.
            w: the weight of classifier-free guidance.
            negative_prompt: what stands against each prompt, a str or a list of B; the empty caption, as
                in training, if nothing is said.

        Returns:
            The guided denoiser.

        Raises:
            TypeError: if a negative prompt is no text.
            ValueError: if w is not finite, or there are not as many negative prompts as prompts.
        """
        if not math.isfinite(w):
            raise ValueError(f"w must be a finite number; got {w}")
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if not isinstance(negative, list | tuple) or not all(isinstance(text, str) for text in negative):
            raise TypeError(f"negative_prompt must be a str or a list of str; got {negative_prompt!r}")
        if len(negative) != len(prompts):
            raise ValueError(
                f"negative_prompt must be one text, or one for each of {len(prompts)} prompt(s); "
                f"got {len(negative)}"
            )
        return classifier_free_guided(self.denoiser, self.condition(prompts), self.condition(negative), w)

    @torch.no_grad()
    def text_to_image(self, prompts, *, w=2.0, steps=50, generator=None, negative_prompt="", progress=True):
        """Draw an image for each prompt, by DDIM.

        Args:
            prompts: a str, or a list of B of them.
            w: the weight of classifier-free guidance; 0 is the conditional model, -1 knows no prompt.
            steps: of DDIM, from 2 to those of the diffusion.
            generator: source of the noise that each image starts from: a torch.Generator, or a list of B.
            negative_prompt: what not to draw, a str or a list of B.
            progress: show a progress bar when it takes longer than two seconds.

        Returns:
            (B, C, H, W), in [-1, 1] but for small overshoots.

        Raises:
            TypeError: if prompts or negative prompts are no texts.
            ValueError: if there is no prompt, or one is empty, too long or has an unknown word; if steps is
                out of range, or there are not as many generators or negative prompts as prompts.

        Source: Rombach et al. 2022, section 3; Ho and Salimans 2022, algorithm 2.
        """
        prompts = checked_prompts(prompts)
        diffusion = self.respaced(steps)
        denoiser = self.guided(prompts, w, negative_prompt)
        z_T = initial_noise(self.latent_shape(len(prompts)), generator, self.example())
        z_0 = sample(diffusion, denoiser, z_T.shape, ddim_step, x_T=z_T, progress=progress)
        return self.decode(z_0)

    def respaced(self, steps):
        """The diffusion with that many steps; TypeError or ValueError unless it can take them."""
        check_positive_int("steps", steps)
        if not 2 <= steps <= self.diffusion.num_steps:
            raise ValueError(f"steps must lie in [2, {self.diffusion.num_steps}]; got {steps}")
        return self.diffusion.respace(steps)

    def latent_shape(self, batch):
        """The shape of the latents of a batch of images, (B, c, h, w)."""
        side = self.image_size // self.vae.factor
        return batch, self.vae.latent_channels, side, side

    def forward(self, prompts, *, steps=50, w=2.0, negative_prompt="", generator=None, output="pil"):
        """What calling the pipeline does: `text_to_image`, with the images in the form that is asked for.

        Args:
            prompts, steps, w, negative_prompt, generator: as `text_to_image` takes them.
            output: "pil" for a list of PIL images, "tensor" for what `text_to_image` gives.

        Returns:
            A list of B PIL images, or a tensor (B, C, H, W).

        Raises:
            ValueError: if output is neither; and what `text_to_image` raises.
        """
        check_choice("output", output, ("pil", "tensor"))
        images = self.text_to_image(
            prompts, w=w, steps=steps, generator=generator, negative_prompt=negative_prompt
        )
        return to_pil(images) if output == "pil" else images

    @classmethod
    def from_settings(cls, settings):
        """An untrained pipeline of this course's parts.

        Args:
            settings: a dict of plain values: "vae", "unet", "attention" and "text", the arguments of KLVAE,
                UNet, TextAttention and TextEncoder; "words" and "length" of the Tokenizer; "schedule"
                ("cosine" or "linear"), "diffusion_steps" and "prediction" of the Diffusion; "latent_scale"
                and "image_size".

        Returns:
            LatentDiffusion, which keeps a copy of the settings.

        Raises:
            KeyError: if one of them is missing.
            ValueError: if there is no such schedule.
        """
        check_choice("schedule", settings["schedule"], tuple(SCHEDULES))
        text_encoder = TextEncoder(Tokenizer(settings["words"], settings["length"]), **settings["text"])
        vae = KLVAE(**settings["vae"])
        attention = partial(TextAttention, context_dim=text_encoder.width, **settings["attention"])
        unet = UNet(vae.latent_channels, attention=attention, **settings["unet"])
        betas = SCHEDULES[settings["schedule"]](settings["diffusion_steps"])
        diffusion = Diffusion(betas, prediction=settings["prediction"])
        pipeline = cls(vae, unet, diffusion, settings["latent_scale"], text_encoder, settings["image_size"])
        pipeline.settings = deepcopy(settings)
        # channels last in memory: convolutions are up to a quarter faster that way
        return pipeline.to(memory_format=torch.channels_last)

    # --- From a picture to a picture ---

    @torch.no_grad()
    def image_to_image(
        self, images, prompts, strength, *, w=2.0, steps=50, generator=None, negative_prompt=""
    ):
        """Draw each image anew, as its prompt says, from a noised version of its latents.

        Args:
            images: (B, C, H, W) in [-1, 1].
            prompts: a str, or a list of B of them.
            strength: the share of the steps that are taken, in [0, 1], rounded to whole steps (halves to
                even numbers); none of them returns the VAE's reconstruction.
            w, steps, generator, negative_prompt: as `text_to_image` takes them.

        Returns:
            Like images.

        Raises:
            TypeError: if images are no floating-point numbers.
            ValueError: if strength lies outside [0, 1], images lie far outside of theirs, or there are not as
                many as prompts; and what `text_to_image` raises.

        Source: Meng et al. 2022, section 3 (SDEdit; of pixels and with a stochastic sampler there).
        """
        prompts = checked_prompts(prompts)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1]; got {strength}")
        check_images(images, prompts)
        diffusion = self.respaced(steps)
        denoiser = self.guided(prompts, w, negative_prompt)
        z_0 = self.encode(images.to(self.example()))
        noise = initial_noise(z_0.shape, generator, z_0)

        def step(z_t, t):
            return ddim_step(diffusion, denoiser, z_t, t, None)  # DDIM adds no noise

        return self.decode(image_to_image(step, z_0, noise, diffusion.alpha_bar.to(z_0), strength))

    # --- Inpainting ---

    @torch.no_grad()
    def inpaint(self, images, is_unknown, prompts, *, w=2.0, steps=50, generator=None, negative_prompt=""):
        """Draw a part of each image anew, as its prompt says, and keep the other pixels exactly.

        Args:
            images: (B, C, H, W) in [-1, 1].
            is_unknown: bool, (B, 1, H, W), True for the pixels to draw.
            prompts: a str, or a list of B of them; of the whole picture.
            w, steps, generator, negative_prompt: as `text_to_image` takes them.

        Returns:
            Like images, and equal to them wherever is_unknown is False.

        Raises:
            TypeError: if images are no floating-point numbers, or is_unknown is not bool.
            ValueError: if is_unknown has another shape, images lie far outside [-1, 1], or there are not as
                many as prompts; and what `text_to_image` raises.

        Source: Lugmayr et al. 2022, algorithm 1; here without resampling, by DDIM, with one noise for all.
        """
        prompts = checked_prompts(prompts)
        check_images(images, prompts)
        if is_unknown.dtype != torch.bool:
            raise TypeError(f"is_unknown must be bool; got {is_unknown.dtype}")
        check_shape("is_unknown", is_unknown, (len(images), 1, *images.shape[2:]))
        images = images.to(self.example())
        is_unknown = is_unknown.to(images.device)
        diffusion = self.respaced(steps)
        denoiser = self.guided(prompts, w, negative_prompt)
        known = self.encode(images.masked_fill(is_unknown, 0))  # what is hidden, the encoder must not see
        z_T = initial_noise(known.shape, generator, known)
        # a latent is known only if all of its pixels are
        is_known = F.max_pool2d(is_unknown.to(known.dtype), self.vae.factor) == 0  # (B, 1, h, w)

        def step(diffusion, denoiser, z_t, t, noise):
            z_t = keep_known(z_t, known, is_known, diffusion.at(t, z_t).alpha_bar, z_T)
            return ddim_step(diffusion, denoiser, z_t, t, noise)

        # DDIM adds no noise; what is drawn for its steps all the same leaves the global generator alone
        z_0 = sample(diffusion, denoiser, z_T.shape, step, torch.Generator(), z_T)
        return torch.where(is_unknown, self.decode(z_0), images)

    # --- Saved, loaded, exchanged ---

    def save(self, folder):
        """Write the pipeline into a folder: a safetensors file for each part, and pipeline.json.

        Args:
            folder: made if need be; files of these names are replaced.

        Raises:
            ValueError: if the pipeline was not made by `from_settings` or `load`.
        """
        if self.settings is None:
            raise ValueError(
                "only a pipeline made by from_settings or load can be saved; this has no settings"
            )
        states = {name: getattr(self, name).state_dict() for name in PARTS}
        write_parts(Path(folder, "pipeline.json"), self.settings, states)

    @classmethod
    def load(cls, folder):
        """Read a pipeline that `save` has written into a folder: frozen, in evaluation mode, on the CPU.

        Raises:
            ValueError: if a file is missing, or is not what was saved.
        """
        settings, states = read_parts(Path(folder, "pipeline.json"), PARTS)
        with torch.device("cpu"):
            pipeline = cls.from_settings(settings)
        for name, state in states.items():
            getattr(pipeline, name).load_state_dict(state)
        return pipeline.eval().requires_grad_(False)


def checked_prompts(prompts):
    """Prompts as a list; one text is a list of one.

    Raises:
        TypeError: if prompts is neither a str nor a list of them.
        ValueError: if there is none, or one is empty.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a str or a list of str; got {prompts!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one text; got none")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must not be empty (to draw without one, take w=-1); got {prompts!r}")
    return list(prompts)


def initial_noise(shape, generator, like):
    """Standard normal noise, the same for a seed on every device.

    Args:
        shape: (B, ...).
        generator: a torch.Generator; a list of B of them, so that each sample has its own; or None.
        like: a tensor with the dtype and the device that are wanted.

    Returns:
        Noise of that shape.

    Raises:
        ValueError: if there are not as many generators as samples.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != shape[0]:
            raise ValueError(
                f"generator must be one, or a list of one for each of {shape[0]} prompt(s); "
                f"got a list of {len(generator)}"
            )
        return torch.cat([initial_noise((1, *shape[1:]), one, like) for one in generator])
    return noise_like(like.new_empty(1).expand(shape), generator)


# --- Nothing said: the empty caption ---


def to_pil(images):
    """Images (B, 1 or 3, H, W) in [-1, 1] as a list of B PIL images; what lies outside is clipped."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in levels]


# --- Learning it ---


def captioned_training_step(
    optimizer, diffusion_loss, denoiser, text_encoder, z_0, tokens, empty, u, drop, t, noise
):
    """Train a denoiser and its text encoder for one step, some captions replaced by the empty one.

    Args:
        optimizer: a torch.optim.Optimizer of the weights of both networks.
        diffusion_loss: callable (denoiser, z_0, t, noise) -> scalar, for denoisers (z_t, t) -> output, as
            `Diffusion.loss` is.
        denoiser: callable (z_t, t, cond) -> output.
        text_encoder: callable, tokens (B, L) -> cond.
        z_0: scaled latents, (B, c, h, w).
        tokens: of the captions, (B, L).
        empty: of the empty caption, (L,).
        u: uniform on [0, 1), one for each caption, (B,): below drop, the caption is replaced.
        drop: the probability with which a caption is replaced.
        t: steps, (B,).
        noise: standard normal, like z_0.

    Returns:
        The loss before the step, a scalar without a graph.

    Source: Rombach et al. 2022, section 3.3; Ho and Salimans 2022, algorithm 1.
    """
    told = labels_after_dropout(tokens, empty, u, drop)  # (B, L)

    def loss_of(z_0, t, noise):
        cond = text_encoder(told)  # within the graph: the text encoder learns, too
        return diffusion_loss(lambda z_t, t: denoiser(z_t, t, cond), z_0, t, noise)

    return training_step(optimizer, loss_of, z_0, t, noise)


# --- Which one goes where ---


class TextDenoiser(nn.Module):
    """A denoiser, the text encoder that it is trained with, and a layer that asks each token for its side.

    Args:
        unet: called as (x_t, t, cond), cond being what the text encoder gives.
        text_encoder: tokens (B, L) -> cond, with "context" of its `width`; see TextEncoder.
        num_sides: how many sides there are to choose from.

    Attributes:
        unet, text_encoder: as given.
        side: the layer, which is used in training only.
    """

    def __init__(self, unet, text_encoder, num_sides):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.side = nn.Linear(text_encoder.width, num_sides)

    def forward(self, x_t, t, tokens):
        """Denoise x_t (B, c, h, w) at steps t (B,) as tokens (B, L) say, and say where the nouns stand.

        Returns the raw output, like x_t, and logits (B, num_sides, L) of each token's side, as cross_entropy
        takes them.
        """
        cond = self.text_encoder(tokens)
        return self.unet(x_t, t, cond), self.side(cond["context"]).transpose(1, 2)


# --- At which steps do the words decide? ---


def share_of_wrong_guesses(z_a, z_b, alpha_bar):
    """How often the best guess is wrong which of two latents a noisy version shows: (T, B).

    z_a, z_b: scaled latents (B, c, h, w), each shown half of the time; alpha_bar: of T steps, (T,).
    Source: this course, equation 7.11.
    """
    distance = (z_a - z_b).flatten(1).norm(dim=1)  # (B,)
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt().to(distance)  # (T,)
    # P(wrong) = Phi(-1/2 sqrt(alpha_bar / (1 - alpha_bar)) |z_a - z_b|)
    return torch.special.ndtr(-ratio[:, None] * distance / 2)


# --- Where each word is looked at from ---


def word_maps(weights, height, width):
    """Pictures of where each word is looked at from.

    Args:
        weights: of cross-attention, (B, heads, N, M), the N places row by row from the top.
        height, width: of the feature map, with height * width = N.

    Returns:
        (B, M, height, width): for each word the mean over the heads.

    Source: Hertz et al. 2023, section 3.
    """
    # A_m(place) = mean over the heads of a(place, m)
    return weights.mean(dim=1).transpose(1, 2).unflatten(2, (height, width))


@contextmanager
def recorded_weights(network):
    """Record the weights of every layer with a method `weights`, as CrossAttention has, while the block runs.

    Args:
        network: such as a UNet with TextAttention.

    Yields:
        A list, to which each call of each such layer adds its weights (B, heads, N, M), in the order of
        the calls.
    """
    recorded = []

    def record(module, arguments, keywords, output):
        recorded.append(module.weights(*arguments, **keywords).detach())

    layers = [module for module in network.modules() if callable(getattr(module, "weights", None))]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


# --- From a picture to a picture ---


def image_to_image(step, z_0, noise, alpha_bar, strength):
    """Make latents noisy up to a step, and denoise them from there.

    Args:
        step: of a sampler, callable (z_t, t) -> z_{t-1}, with t (B,) integers.
        z_0: scaled latents of the pictures to begin with, (B, c, h, w).
        noise: standard normal, like z_0.
        alpha_bar: of all S steps of the sampler, from the least noisy on, (S,).
        strength: the share of the steps that are taken, in [0, 1], rounded to whole steps (by `round`).

    Returns:
        Latents of the new pictures, like z_0; z_0 itself if no step is taken.

    Source: Meng et al. 2022, section 3 (SDEdit).
    """
    num_taken = round(strength * len(alpha_bar))
    if num_taken == 0:
        return z_0
    # as noisy as the first step expects it: z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps
    z_t = q_sample(z_0, alpha_bar[num_taken - 1], noise)
    for index in reversed(range(num_taken)):
        z_t = step(z_t, torch.full((len(z_t),), index, device=z_t.device))
    return z_t


def check_images(images, prompts):
    """Raise unless images (B, C, H, W) are as many as prompts, a list, and hold numbers in [-1, 1].

    Raises:
        TypeError: if images are no floating-point numbers, such as bytes.
        ValueError: if there are not as many, or values lie far outside; small overshoots are let through.
    """
    if images.ndim != 4 or len(images) != len(prompts):
        raise ValueError(
            f"images must be of shape (B, C, H, W), one for each of {len(prompts)} prompt(s); "
            f"got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point numbers in [-1, 1]; got {images.dtype}")
    if not (images.abs() < 10).all():  # grey levels reach 255
        raise ValueError(f"images must lie in [-1, 1]; got values {images.min():g} to {images.max():g}")


# --- Inpainting ---


def keep_known(z_t, known, is_known, alpha_bar, noise):
    """Put what is known of a picture in its place, made as noisy as the rest.

    Args:
        z_t: noisy latents, (B, c, h, w).
        known: the clean latents of the picture, like z_t.
        is_known: bool, (B, 1, h, w), True where they shall be kept.
        alpha_bar: of the step that z_t is at, (B, 1, 1, 1).
        noise: standard normal, like z_t.

    Returns:
        Like z_t.

    Source: Lugmayr et al. 2022, equation 8 (with fresh noise at each step there).
    """
    # z_t where nothing is known, sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps where it is
    return torch.where(is_known, q_sample(known, alpha_bar, noise), z_t)


# --- Saved, loaded, exchanged ---

PARTS = ("vae", "denoiser", "text_encoder")


# --- Other people's networks ---


class DiffusersVAE(nn.Module):
    """An AutoencoderKL of the library diffusers, behind KLVAE's interface.

    Args:
        vae: a diffusers.AutoencoderKL.

    Attributes:
        in_channels, latent_channels, factor: as KLVAE has them.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.in_channels, self.latent_channels = vae.config.in_channels, vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, x):
        """Map images x (B, C, H, W) to the mean and the log-variance of their latents, (B, c, h, w)."""
        distribution = self.vae.encode(x).latent_dist
        return distribution.mean, distribution.logvar

    def decode(self, z):
        """Map latents z (B, c, h, w) to images (B, C, H, W)."""
        return self.vae.decode(z).sample


class DiffusersDenoiser(nn.Module):
    """A UNet2DConditionModel of the library diffusers, as a denoiser (z_t, t, cond) -> output.

    Args:
        unet: a diffusers.UNet2DConditionModel; cond is {"context": (B, M, E), "mask": (B, M) bool}.
    """

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, z_t, t, cond):
        """Map z_t (B, c, h, w), steps t (B,) and cond to the raw output, like z_t."""
        return self.unet(z_t, t, cond["context"], encoder_attention_mask=cond["mask"]).sample


class TransformersText(nn.Module):
    """A CLIPTextModel of the library transformers, as a text encoder.

    Args:
        tokenizer: its CLIPTokenizer.
        model: a transformers.CLIPTextModel.

    Attributes:
        tokenizer: callable, B texts -> tokens (B, L).
    """

    def __init__(self, tokenizer, model):
        super().__init__()
        self.model = model
        self._tokenize = tokenizer

    def tokenizer(self, texts):
        """Map B texts to tokens (B, L), L being the longest the model takes; ValueError on a longer text."""
        length = self._tokenize.model_max_length
        rows = self._tokenize(texts, padding="max_length", max_length=length)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise ValueError(f"a text must have at most {length} tokens; got {len(row)} in {text!r}")
        return torch.tensor(rows)

    def forward(self, tokens):
        """Map tokens (B, L) to {"context", "mask"}; nothing is masked, as in Stable Diffusion."""
        context = self.model(tokens).last_hidden_state  # (B, L, E)
        return {"context": context, "mask": torch.ones_like(tokens, dtype=torch.bool)}


def load_stable_diffusion(name="stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """A pretrained model of the Stable Diffusion 1 and 2 families, as this course's pipeline.

    Args:
        name: of a model on the Hugging Face hub, or the folder of one; with an epsilon or v prediction.

    Returns:
        LatentDiffusion, in evaluation mode.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        ValueError: if there is no such model, or it cannot be downloaded.
    """
    try:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError(
            "a pretrained model needs two libraries: pip install diffusers transformers"
        ) from error
    try:
        vae = DiffusersVAE(AutoencoderKL.from_pretrained(name, subfolder="vae"))
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet")
        text = CLIPTextModel.from_pretrained(name, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
        schedule = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
    except OSError as error:
        raise ValueError(
            f"{name!r} could not be read or downloaded: name must be the folder of a model, or that of one "
            f"on the Hugging Face hub, which takes a connection ({error})"
        ) from error
    predictions = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
    diffusion = Diffusion(schedule.betas.double(), predictions[schedule.config.prediction_type])
    return LatentDiffusion(
        vae,
        DiffusersDenoiser(unet),
        diffusion,
        vae.vae.config.scaling_factor,
        TransformersText(tokenizer, text),
        unet.config.sample_size * vae.factor,
    ).eval()
