"""Chapter 09: parts that are exchanged, patients that stay together, a server that answers whoever asks."""

import threading
from concurrent.futures import Future
from functools import partial
from queue import Queue

import pytest
import torch
from simulated_device import SIMULATED, simulated_device, values_of

from lecture26.classifier_free_guidance import classifier_free_guided
from lecture26.ddpm import Diffusion, ddim_step, linear_betas
from lecture26.kit.results import load_results
from lecture26.recipes.latent import load_pipeline
from lecture26.the_slides_checked import (
    Parts,
    Request,
    SeparateModels,
    draw,
    parts_of,
    serve,
    split_by_patient,
)

# --- Parts ---

DIFFUSION = Diffusion(linear_betas(30))


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def parts():
    """Parts whose denoiser is told the length of each text, and whose first stage doubles the sides."""
    return Parts(
        tokenizer=lambda texts: torch.tensor([[len(text)] for text in texts]),
        encode_text=lambda tokens: tokens.float() / 10,
        denoiser=lambda z_t, t, told: 0.5 * z_t + told[:, :, None, None],
        guide=partial(classifier_free_guided, w=1.0),
        step=partial(ddim_step, DIFFUSION),
        num_steps=30,
        decode=lambda z: z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3),
        latent_scale=2.0,
        shape=(3, 4, 5),
    )


def test_a_seed_decides_what_is_drawn_and_each_part_leaves_its_mark(parts):
    images = draw(parts, ["one", "three"], seeded())
    assert images.shape == (2, 3, 8, 10)
    assert torch.equal(images, draw(parts, ["one", "three"], seeded()))
    for changed in (
        parts._replace(guide=partial(classifier_free_guided, w=0.0)),
        parts._replace(step=partial(ddim_step, DIFFUSION, eta=1.0)),
        parts._replace(decode=torch.sin, shape=(3, 8, 10)),
        parts._replace(encode_text=lambda tokens: -tokens.float()),
    ):
        assert not torch.allclose(draw(changed, ["one", "three"], seeded()), images, atol=1e-3)


def test_the_scale_is_left_once(parts):
    images = draw(parts, ["one"], seeded())
    assert torch.allclose(draw(parts._replace(latent_scale=1.0), ["one"], seeded()), 2 * images)


def test_all_is_drawn_where_the_tokens_are(parts):
    with simulated_device():
        elsewhere = parts._replace(tokenizer=lambda texts: parts.tokenizer(texts).to(SIMULATED))
        images = values_of(draw(elsewhere, ["one", "three"], seeded()))
    assert torch.allclose(images, draw(parts, ["one", "three"], seeded()), atol=1e-5)


@pytest.mark.parametrize("prompts", [[], [""], ["one", "  "]])
def test_prompts_that_say_nothing_are_refused(parts, prompts):
    with pytest.raises(ValueError, match="prompts must"):
        draw(parts, prompts)


@pytest.mark.slow
def test_the_parts_of_the_trained_pipeline_draw_what_it_draws():
    pipeline = load_pipeline("text_to_image_shapes64")
    prompts = ["a red star on a dark background", "a blue ring on a light background"]
    images = draw(parts_of(pipeline, w=1.5, steps=4), prompts, seeded())
    noise_alone = torch.randn(2, 4, 16, 16, generator=seeded())
    assert images.shape == (2, 3, 64, 64) and noise_alone.shape == pipeline.latent_shape(2)
    by_itself = pipeline.text_to_image(prompts, w=1.5, steps=4, generator=seeded(), progress=False)
    assert torch.allclose(images, by_itself, atol=1e-4)


# --- Patients ---


def patient_of(file):
    return file.split("_")[0]


FILES = [f"{patient}_{film}" for patient in "abcdefghij" for film in range(3)]


@pytest.mark.parametrize(("share", "patients"), [(0.2, 2), (0.01, 1), (0.99, 9), (0.5, 5)])
def test_a_patient_is_in_one_split(share, patients):
    chosen = split_by_patient(FILES, patient_of, share)
    left = [file for file in FILES if file not in chosen]
    assert len(chosen) == 3 * patients
    assert {patient_of(file) for file in chosen}.isdisjoint(map(patient_of, left))
    assert chosen == sorted(chosen, key=FILES.index)
    assert chosen == split_by_patient(FILES, patient_of, share)


def test_the_order_of_the_files_does_not_choose_the_patients():
    chosen = split_by_patient(FILES[::-1], patient_of, 0.3)
    assert sorted(chosen) == sorted(split_by_patient(FILES, patient_of, 0.3))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=rf"share must lie in \(0, 1\); got {share}"):
        split_by_patient(FILES, patient_of, share)


def test_a_single_patient_cannot_be_split():
    with pytest.raises(ValueError, match="files must show two patients at least; got 1"):
        split_by_patient(FILES[:3], patient_of, 0.5)


# --- The server ---

TASKS = {"double": lambda x: 2 * x.flatten(1), "sum": lambda x: x.flatten(1).sum(dim=1, keepdim=True)}


def asked(names):
    """Requests for these tasks in a queue that is closed, and their replies."""
    queue, replies = Queue(), [Future() for _ in names]
    for number, (name, reply) in enumerate(zip(names, replies, strict=True)):
        queue.put(Request(torch.full((1, 2, 2), float(number)), name, reply))
    queue.put(None)
    return queue, replies


def values(replies):
    return [reply.result(timeout=60).tolist() for reply in replies]


EXPECTED = [[0.0] * 4, [4.0], [4.0] * 4, [6.0] * 4, [16.0]]
NAMES = ["double", "sum", "double", "double", "sum"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_each_request_gets_its_own_answer_whatever_the_batch(batch_size):
    sizes = []

    def answer(images, names):
        sizes.append(len(names))
        return SeparateModels(TASKS)(images, names)

    queue, replies = asked(NAMES)
    serve(queue, answer, batch_size)
    assert values(replies) == EXPECTED
    assert sum(sizes) == 5 and max(sizes) == min(batch_size, 5)


def test_a_server_waits_for_requests_that_come_later():
    queue = Queue()
    server = threading.Thread(target=serve, args=(queue, SeparateModels(TASKS), 4))
    server.start()
    for number in (3.0, 5.0):
        reply = Future()
        queue.put(Request(torch.full((1, 2, 2), number), "sum", reply))
        assert reply.result(timeout=60).tolist() == [4 * number]
    queue.put(None)
    server.join(timeout=60)
    assert not server.is_alive()


def test_an_error_is_handed_to_its_batch_and_the_server_goes_on():
    queue, replies = asked(["double", "unknown", "sum"])
    serve(queue, SeparateModels(TASKS), batch_size=1)
    assert isinstance(replies[1].exception(), KeyError)
    assert values(replies[::2]) == [[0.0] * 4, [8.0]]


def test_who_waits_no_more_is_left_out():
    seen = []

    def answer(images, names):
        seen.extend(images[:, 0, 0, 0].tolist())
        return SeparateModels(TASKS)(images, names)

    queue, replies = asked(["sum", "sum", "sum", "sum"])
    for number in (1, 3):
        assert replies[number].cancel()
    serve(queue, answer, batch_size=2)
    assert values(replies[::2]) == [[0.0], [8.0]] and seen == [0.0, 2.0]


@pytest.mark.parametrize("missing", [1, -1])
def test_too_few_or_too_many_answers_are_an_error_of_their_batch(missing):
    queue, replies = asked(["sum", "sum", "sum"])
    serve(queue, lambda images, names: [0.0] * (len(names) - missing), batch_size=2)
    assert all(isinstance(reply.exception(timeout=60), ValueError) for reply in replies)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        serve(Queue(), SeparateModels(TASKS), 0)


def test_a_network_for_each_task_sees_each_image_once():
    seen = []

    def model(images):
        seen.append(len(images))
        return images.flatten(1)

    images = torch.arange(12.0).view(3, 1, 2, 2)
    answers = SeparateModels({"a": model, "b": model})(images, ["a", "b", "a"])
    assert torch.equal(torch.stack(answers), images.flatten(1)) and seen == [2, 1]


def test_what_the_chapter_says_of_serving_is_what_was_measured():
    """A bank is slower with two tasks, level or faster with fifty; its memory hardly grows."""
    runs = {run["tasks"]: run for run in load_results("benchmark_serving")["runs"]}
    assert runs[2]["separate_over_bank"]["median"] < 1 <= runs[50]["separate_over_bank"]["median"] + 0.05
    assert runs[50]["memory_bytes"]["bank"] < 1.5 * runs[2]["memory_bytes"]["bank"]
    assert runs[50]["memory_bytes"]["separate"] > 20 * runs[2]["memory_bytes"]["separate"]
