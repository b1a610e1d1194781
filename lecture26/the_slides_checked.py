"""The slides, checked: what holds, and where to go next.

Generated from notebooks/09_the_slides_checked.py, which derives and checks it: edit there, then run `make
package`.
"""

from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import torch

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import ddim_step, noise_like, reverse_chain
from lecture26.kit.validation import check_positive_int
from lecture26.latent_diffusion import checked_prompts, from_latents, initial_noise

# --- A miniature Stable Diffusion ---


def words_to_images(
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
    """Draw images from words with a latent diffusion model, whatever its parts are.

    Args:
        tokens: of the captions, (B, L).
        empty_tokens: of as many empty captions, (B, L).
        encode_text: callable tokens -> what the denoiser is told.
        denoiser: callable (z_t, t, told) -> output.
        guide: callable (denoiser, said, unsaid) -> a denoiser (z_t, t) -> output; both conditions are as
            encode_text gives them, of the captions and of the empty ones.
        step: callable (denoiser, z_t, t, noise) -> z_{t-1}, with t (B,) integers.
        z_T: the noise to start from, on the diffusion's scale, (B, c, h, w).
        noise_at: callable (index) -> the noise of the step of that number, like z_T.
        num_steps: T; the steps are counted from T - 1 down to 0.
        decode: callable, latents on the first stage's own scale -> images (B, C, H, W).
        latent_scale: the diffusion's latents are the first stage's, times this number.

    Returns:
        Images (B, C, H, W).

    Source: Rombach et al. 2022, section 3; Ho and Salimans 2022, algorithm 2.
    """
    said, unsaid = encode_text(tokens), encode_text(empty_tokens)
    guided = guide(denoiser, said, unsaid)
    z_0 = reverse_chain(partial(step, guided), z_T, num_steps, noise_at)
    return from_latents(decode, z_0, latent_scale)


# --- One line for each part ---


class Parts(NamedTuple):
    """What a text-to-image model is made of; each may be exchanged for another that is called alike.

    Fields as `words_to_images` takes them, and:
        tokenizer: callable, B texts -> tokens (B, L), on the device where the parts compute.
        shape: of the latents of one image, (c, h, w).
    """

    tokenizer: Any
    encode_text: Any
    denoiser: Any
    guide: Any
    step: Any
    num_steps: int
    decode: Any
    latent_scale: float
    shape: tuple[int, ...]


def parts_of(pipeline, w=2.0, steps=25):
    """The parts of a LatentDiffusion, this course's or a `load_stable_diffusion`.

    Args:
        pipeline: the LatentDiffusion, on the device where it stays.
        w: weight of classifier-free guidance.
        steps: of DDIM.

    Returns:
        A Parts, with classifier-free guidance and DDIM.

    Raises:
        TypeError: if steps is no int.
        ValueError: if steps is out of the pipeline's range.
    """
    device = pipeline.example().device
    return Parts(
        tokenizer=lambda texts: pipeline.text_encoder.tokenizer(texts).to(device),
        encode_text=pipeline.text_encoder,
        denoiser=pipeline.denoiser,
        guide=partial(classifier_free_guided, w=w),
        step=partial(ddim_step, pipeline.respaced(steps)),
        num_steps=steps,
        decode=pipeline.vae.decode,
        latent_scale=pipeline.latent_scale,
        shape=pipeline.latent_shape(1)[1:],
    )


@torch.no_grad()
def draw(parts, prompts, generator=None):
    """Draw an image for each prompt.

    Args:
        parts: a Parts.
        prompts: a str, or a list of B of them, none empty.
        generator: source of all noise.

    Returns:
        Images (B, C, H, W), in [-1, 1] but for small overshoots.

    Raises:
        TypeError: if prompts are no texts.
        ValueError: if there is none, or one is empty.
    """
    prompts = checked_prompts(prompts)
    tokens = parts.tokenizer(prompts)
    z_T = initial_noise((len(prompts), *parts.shape), generator, torch.empty(0, device=tokens.device))
    return words_to_images(
        tokens,
        parts.tokenizer([""] * len(prompts)),
        parts.encode_text,
        parts.denoiser,
        parts.guide,
        parts.step,
        z_T,
        lambda index: noise_like(z_T, generator),
        parts.num_steps,
        parts.decode,
        parts.latent_scale,
    )


# --- Medical images, command by command ---


def split_by_patient(files, patient_of, share):
    """Choose files for a split of their own, with all files of a patient or none.

    Args:
        files: paths or names.
        patient_of: callable, a file -> whom it shows, any value that can be compared with others.
        share: of the patients, in (0, 1); the patients are those that come first in a fixed shuffled order.

    Returns:
        The list of the files of these patients, at least one patient, and not all, in the order of files.

    Raises:
        ValueError: if share lies outside (0, 1), or there are fewer than two patients.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1); got {share}")
    patients = sorted({patient_of(file) for file in files})
    if len(patients) < 2:
        raise ValueError(f"files must show two patients at least; got {len(patients)}")
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(0))
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    chosen = {patients[index] for index in order[:count]}
    return [file for file in files if patient_of(file) in chosen]


# --- Many tasks from one backbone ---


class Request(NamedTuple):
    """What a server is asked: an image (C, H, W), the name of its task, and where the answer goes."""

    image: torch.Tensor
    task: str
    reply: Future


def serve(requests, answer, batch_size):
    """Answer requests in batches until a None arrives; an error is handed to those whose batch it struck.

    Args:
        requests: a queue.Queue of Request, and of None to end.
        answer: callable (images (B, C, H, W), B names of tasks) -> B answers, such as a PromptBank.
        batch_size: at most so many are answered at once; fewer, where no more are waiting.

    Raises:
        TypeError: if batch_size is no int.
        ValueError: if it is below 1.
    """
    check_positive_int("batch_size", batch_size)
    is_open = True
    while is_open:
        batch = [requests.get()]  # wait for one, and take what else is there
        while batch[-1] is not None and len(batch) < batch_size and not requests.empty():
            batch.append(requests.get())
        is_open = batch[-1] is not None
        # the None is left out, and whoever waits no more
        batch = [one for one in batch if one is not None and one.reply.set_running_or_notify_cancel()]
        try:
            with torch.inference_mode():
                images = torch.stack([request.image for request in batch]) if batch else None
                answers = answer(images, [request.task for request in batch]) if batch else []
            answered = list(zip(batch, answers, strict=True))
        except Exception as error:
            for request in batch:
                request.reply.set_exception(error)
        else:
            for request, one in answered:
                request.reply.set_result(one)


class SeparateModels:
    """A network for each task, behind the interface of a PromptBank.

    Args:
        models: callables images -> logits, by the task's name.
    """

    def __init__(self, models):
        self.models = models

    def __call__(self, images, names):
        """Map images (B, C, H, W) and B names to a list of B logits; each network gets its own images."""
        answers = [None] * len(names)
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            for row, logits in zip(rows, self.models[name](images[rows]), strict=True):
                answers[row] = logits
        return answers
