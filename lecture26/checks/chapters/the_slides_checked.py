"""The exercise of chapter 09: a text-to-image model, put together from parts."""

import math
from collections.abc import Callable
from functools import partial

import torch

from lecture26 import the_slides_checked
from lecture26.ddpm import reverse_chain

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws
from ..mistakes import with_arguments

WORDS, TOLD = 11, 4  # of the table of words: rows and columns


def _words_to_images_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    float64, float32 = torch.float64, torch.float32
    cases = []
    for note, batch, latent, num_steps, length, dtype, mode in (
        ("three captions", 3, (2, 2, 3), 5, 4, float64, "grad"),
        ("as many captions as channels", 2, (2, 2, 2), draws.integer(3, 6), 3, float64, "grad"),
        ("one caption", 1, (3, 2, 2), 4, 5, float64, "no_grad"),
        ("a single step", 2, (1, 3, 2), 1, 3, float64, "grad"),
        ("many steps", 2, (1, 2, 2), 15, 2, float64, "no_grad"),
        ("float32", 3, (2, 2, 2), 6, 4, float32, "grad"),
        ("with gradient", 2, (2, 1, 3), 3, 3, float64, "grad"),
        ("inference mode", 2, (2, 2, 1), 4, 3, float64, "inference_mode"),
    ):
        elements, channels = math.prod(latent), latent[0]
        mixing = draws.normal(elements, elements, dtype=dtype) / math.sqrt(elements)
        shapes = (elements, 7), (7,), (7, elements), (TOLD, 7)
        cases.append(
            Case(
                note,
                (
                    draws.permutation(batch * length).view(batch, length) % (WORDS - 1) + 1,
                    torch.zeros(batch, length, dtype=torch.int64),
                    CallableArgument("text_encoder", (draws.normal(WORDS, TOLD, dtype=dtype),)),
                    CallableArgument("told_denoiser", tuple(draws.normal(*s, dtype=dtype) for s in shapes)),
                    CallableArgument("guidance", (draws.uniform(2, low=0.3, high=1.5, dtype=dtype),)),
                    CallableArgument("denoising_step", (mixing, draws.normal(elements, dtype=dtype))),
                    draws.normal(batch, *latent, dtype=dtype, gradient=note == "with gradient"),
                    CallableArgument("noise_table", (draws.normal(num_steps, batch, *latent, dtype=dtype),)),
                    num_steps,
                    CallableArgument(
                        "decoder",
                        (draws.normal(channels, 12, dtype=dtype), draws.normal(12, dtype=dtype)),
                    ),
                    float(draws.uniform(1, low=1.5, high=3.0)),
                ),
                mode,
            )
        )
    return cases


_correct = the_slides_checked.words_to_images
_changed = partial(with_arguments, _correct)


def _assembled(
    chain: Callable = reverse_chain,
    conditions: Callable = lambda encode_text, tokens, empty: (encode_text(tokens), encode_text(empty)),
    image: Callable = lambda decode, z_0, scale: decode(z_0 / scale),
) -> Callable:
    """words_to_images with something changed: the chain of steps, the conditions, or what becomes of z_0."""

    def wrong(
        tokens,
        empty_tokens,
        encode_text,
        denoiser,
        guide,
        step,
        z_T,
        noise_at,
        num_steps,
        decode,
        latent_scale,
    ):
        guided = guide(denoiser, *conditions(encode_text, tokens, empty_tokens))
        z_0 = chain(partial(step, guided), z_T, num_steps, noise_at)
        return image(decode, z_0, latent_scale)

    return wrong


def _chain(order: Callable = lambda count: reversed(range(count)), told: Callable = lambda index: index):
    """A chain of steps in an order, each with the noise of its number, and told a number."""

    def wrong(step, z_T, num_steps, noise_at):
        z_t = z_T
        for index in order(num_steps):
            z_t = step(z_t, torch.full((len(z_t),), told(index)), noise_at(index))
        return z_t

    return wrong


WORDS_TO_IMAGES = Exercise(
    "the_slides_checked.words_to_images",
    '"A miniature Stable Diffusion"',
    _correct,
    _words_to_images_cases,
    (
        Misconception(
            "scale forgotten",
            _assembled(image=lambda decode, z_0, scale: decode(z_0)),
            "The first stage gets latents on the diffusion's scale. On the way out they are brought back "
            "to its own (chapter 07, equation (7.4)).",
        ),
        Misconception(
            "multiplied by the scale on the way out",
            _assembled(image=lambda decode, z_0, scale: decode(z_0 * scale)),
            "The latents are multiplied by the scale on the way out, too. They were multiplied on the way "
            "in.",
        ),
        Misconception(
            "the image is divided",
            _assembled(image=lambda decode, z_0, scale: decode(z_0) / scale),
            "The decoded image is divided by the scale. The scale belongs to the latents, and a decoder is "
            "no linear map.",
        ),
        Misconception(
            "the noise is scaled",
            _changed(z_T=lambda z_T, latent_scale, **others: z_T * latent_scale),
            "The noise that it begins with is multiplied by the scale. It is on the diffusion's scale "
            "already: standard normal, whatever the first stage.",
        ),
        Misconception(
            "the noise is brought to the first stage's scale",
            _changed(z_T=lambda z_T, latent_scale, **others: z_T / latent_scale),
            "The noise that it begins with is divided by the scale. Only what leaves the diffusion is.",
        ),
        Misconception(
            "said and unsaid swapped",
            _assembled(
                conditions=lambda encode_text, tokens, empty: (encode_text(empty), encode_text(tokens))
            ),
            "Guidance walks away from the captions: the condition that is wanted comes first.",
        ),
        Misconception(
            "the captions twice",
            _assembled(
                conditions=lambda encode_text, tokens, empty: (encode_text(tokens), encode_text(tokens))
            ),
            "Both conditions are those of the captions, so there is nothing to be guided away from.",
        ),
        Misconception(
            "zeros for the empty caption",
            _assembled(
                conditions=lambda encode_text, tokens, empty: (
                    encode_text(tokens),
                    torch.zeros_like(encode_text(tokens)),
                )
            ),
            "Nothing said is taken to be zeros. The denoiser has learned the empty caption, read by the text "
            "encoder like any other.",
        ),
        Misconception(
            "without guidance",
            _changed(
                guide=lambda **given: lambda denoiser, said, unsaid: lambda z_t, t: denoiser(z_t, t, said)
            ),
            "The denoiser is asked for the captions alone: guide is not used.",
        ),
        Misconception(
            "without words",
            _changed(
                guide=lambda **given: lambda denoiser, said, unsaid: lambda z_t, t: denoiser(z_t, t, unsaid)
            ),
            "The denoiser is told nothing: neither guide nor the captions are used.",
        ),
        Misconception(
            "the first caption for all",
            _changed(tokens=lambda tokens, **others: tokens[:1].expand_as(tokens)),
            "Every image is drawn after the first caption. Each has its own.",
        ),
        Misconception(
            "forwards",
            _assembled(chain=_chain(order=range)),
            "The steps are taken from 0 upwards. Sampling begins with the noisiest one.",
        ),
        Misconception(
            "t counted from 1",
            _assembled(chain=_chain(told=lambda index: index + 1)),
            "The steps are told the papers' t, from T to 1. Code counts from 0.",
        ),
        Misconception(
            "last step left out",
            _assembled(chain=_chain(order=lambda count: range(count - 1, 0, -1))),
            "The step of t = 0, the last one, is missing: a range does not contain its end.",
        ),
        Misconception(
            "no noise in the steps",
            _changed(noise_at=lambda noise_at, **others: lambda index: torch.zeros_like(noise_at(0))),
            "The steps get no noise. Each gets its own, whether it has a use for it or not.",
        ),
        Misconception(
            "one noise for all steps",
            _changed(noise_at=lambda noise_at, num_steps, **others: lambda index: noise_at(num_steps - 1)),
            "Every step gets the noise of the first one. The steps' noises must be independent.",
        ),
    ),
)

EXERCISES = [WORDS_TO_IMAGES]
