"""The training loop: restarts, several processes, settings, and what every draw depends on."""

import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_run
from torch import nn

from lecture26.ddpm import cosine_betas
from lecture26.kit.data import load
from lecture26.kit.files import replace_when_complete
from lecture26.kit.training import SampleDraws, StateError, learning_rate_factor, train
from lecture26.recipes import find_recipe
from lecture26.unet import EMA

PROGRAM = Path(training_run.__file__)


@pytest.fixture(autouse=True)
def one_thread_on_the_cpu(monkeypatch):
    """What is promised bitwise is promised on a CPU, for one number of threads."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(one, other):
    """Bitwise equality of two runs."""
    assert one["losses"] == other["losses"]
    for part in ("model", "average"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)


def start(state_file, out, batch_size=4, dropout=0.5, delay=0.05, **environment):
    """Start the run as a process of its own."""
    command = [sys.executable, PROGRAM, state_file, out, batch_size, dropout, delay]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


def wait_for_steps(process, count):
    for _ in range(count):
        assert process.stdout.readline() == "step\n"


@pytest.mark.slow
def test_killed_run_ends_with_the_same_weights(tmp_path):
    state_file = tmp_path / "killed.pt"
    with start(state_file, tmp_path / "out") as process:
        wait_for_steps(process, 8)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(torch.load(state_file)["losses"]) < training_run.STEPS
    assert_same(training_run.run(state_file), training_run.run(tmp_path / "uninterrupted.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_ends_with_the_same_weights(tmp_path, number):
    state_file = tmp_path / "stopped.pt"
    steps_begun = []

    def stop_in_step_8():
        steps_begun.append(len(steps_begun))
        if len(steps_begun) == 8:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        training_run.run(state_file, before_step=stop_in_step_8)
    assert len(torch.load(state_file)["losses"]) == 8  # the step was finished, and its state written
    assert_same(training_run.run(state_file), training_run.run(tmp_path / "uninterrupted.pt"))


def start_two(state_file, out, delay):
    """Start the run on two processes of half the batch size each, as torchrun and accelerate launch do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [start(state_file, out, 4, 0.0, delay, **world, **rank) for rank in ranks]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, monkeypatch):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    if not torch.accelerator.is_available():
        monkeypatch.delenv("ACCELERATE_USE_CPU")  # needed only where there is something else to use
    state_file, out = tmp_path / "two.pt", tmp_path / "two"

    # Stopped through one of them, both finish the same step and write one state; and both go on from it.
    processes = start_two(state_file, out, delay=0.05)
    wait_for_steps(processes[1], 8)
    processes[1].terminate()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == training_run.EXIT_STOPPED
    assert 8 <= len(torch.load(state_file)["losses"]) < training_run.STEPS
    for process in start_two(state_file, out, delay=0.0):
        process.communicate(timeout=60)
        assert process.returncode == 0

    two = torch.load(out)
    one = training_run.run(tmp_path / "one.pt", batch_size=8, dropout=0.0)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-6)
    for part in ("model", "average"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=1e-5)
    # One process may go on with what two have begun: the batch size of all processes counts.
    assert torch.load(state_file)["fingerprint"] == torch.load(tmp_path / "one.pt")["fingerprint"]


def mean_squared_output(model, batch):
    return (model(batch["x"]) - 1).square().mean()


def normal_batch(random):
    return {"x": random.normal(3)}


def tiny_run(model, **changes):
    settings = dict(steps=4, batch_size=2, learning_rate=0.1, progress=False) | changes
    return train(model, normal_batch, mean_squared_output, **settings)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    tiny_run(nn.Linear(3, 1))  # Accelerate looks for other processes once
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and Accelerate found 1: .*USE_CPU"):
        tiny_run(nn.Linear(3, 1))


def test_finished_run_is_not_repeated(tmp_path):
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    history = tiny_run(first, state_file=tmp_path / "state.pt")
    assert len(history.losses) == 4
    assert tiny_run(second, state_file=tmp_path / "state.pt").losses == history.losses
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 5}, "steps was 4 and is now 5"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"learning_rate": 0.2}, "learning_rate was 0.1 and is now 0.2"),
        ({"precision": "bf16"}, "precision was 'fp32' and is now 'bf16'"),
        ({"settings": {"data": "digits"}}, "data was 'shapes' and is now 'digits'"),
    ],
)
def test_state_of_other_settings_is_refused(tmp_path, changes, named):
    state_file = tmp_path / "state.pt"
    shared = {"state_file": state_file, "settings": {"data": "shapes"}}
    tiny_run(nn.Linear(3, 1), **shared)
    with pytest.raises(StateError, match="other settings") as refusal:
        tiny_run(nn.Linear(3, 1), **shared | changes)
    assert named in str(refusal.value)
    assert str(state_file) in str(refusal.value)
    assert str(refusal.value).count(" is now ") == 1


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 truncated"])
def test_broken_state_is_refused(tmp_path, content):
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(content)
    with pytest.raises(StateError, match="not a readable training state"):
        tiny_run(nn.Linear(3, 1), state_file=state_file)


def test_state_files_leave_nothing_else_behind(tmp_path):
    tiny_run(nn.Linear(3, 1), state_file=tmp_path / "states" / "state.pt", state_every=0.0)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["state.pt"]


def test_failed_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        with replace_when_complete(file) as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_average_follows_the_model():
    model = nn.Linear(3, 1)
    average = EMA(model, decay=0.5)
    start = model.weight.detach().clone()
    tiny_run(model, average=average)
    assert average.num_updates == 4
    assert not torch.equal(average.model.weight, start)
    assert not torch.equal(average.model.weight, model.weight)


def test_training_learns():
    model = nn.Linear(3, 1)
    history = tiny_run(model, steps=100)
    assert history.losses[-1] < 0.01 * history.losses[0]
    assert history.seconds > 0


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = nn.Linear(3, 1)
    torch.manual_seed(5)
    tiny_run(model)
    assert torch.equal(torch.rand(3), expected)


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tiny_run(nn.Linear(3, 1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_gradients_are_clipped():
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.bias.fill_(100.0)
    tiny_run(model)
    last_gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert last_gradient.norm().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_decides_what_the_network_computes_in(precision, dtype):
    seen = set()
    model = nn.Linear(3, 1)
    model.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    tiny_run(model, precision=precision)
    assert seen == {dtype}
    assert model.weight.dtype == torch.float32


def test_diverging_loss_stops_the_run(tmp_path):
    def loss(model, batch):
        return model(batch["x"]).sum() * float("nan")

    with pytest.raises(FloatingPointError, match="step 0"):
        train(
            nn.Linear(3, 1),
            normal_batch,
            loss,
            steps=2,
            batch_size=2,
            learning_rate=1.0,
            state_file=tmp_path / "state.pt",
            progress=False,
        )
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int; got 2.0"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1; got -1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be above 0; got 0.0"),
        ({"precision": "fp16"}, ValueError, "precision must be one of 'fp32', 'bf16'; got 'fp16'"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as refusal:
        tiny_run(nn.Linear(3, 1), **changes)
    assert message in str(refusal.value)


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(step, steps=110, warmup_steps=10, decay_to=0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[60] == pytest.approx(0.55)  # half-way down from 1 to 0.1
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_learning_rate_can_stay_constant():
    assert {learning_rate_factor(step, steps=50, warmup_steps=0, decay_to=1.0) for step in range(50)} == {1.0}


def test_draws_depend_on_seed_and_sample_only():
    def draws(seed, n):
        random = SampleDraws(seed, torch.tensor(n))
        return random.integers(1000), random.uniform(), random.normal(2, 3)

    together = draws(1, [4, 5, 6])
    for position, n in enumerate([4, 5, 6]):
        for batch, alone in zip(together, draws(1, [n]), strict=True):
            assert torch.equal(batch[position], alone[0])
    for batch, other_seed in zip(together, draws(2, [4, 5, 6]), strict=True):
        assert not torch.equal(batch, other_seed)


def test_draws_have_the_distributions_they_name():
    n = 20_000
    random = SampleDraws(0, torch.arange(n))
    integers, uniform, normal = random.integers(10), random.uniform(), random.normal(2)
    assert (integers.dtype, uniform.dtype, normal.dtype) == (torch.int64, torch.float32, torch.float32)
    assert normal.shape == (n, 2)
    # Six standard errors: of a count with p = 1/10, and of a mean of n numbers.
    counts = integers.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - n / 10).abs().max() < 6 * (n * 0.1 * 0.9) ** 0.5
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 6 * (1 / 12 / n) ** 0.5
    assert normal.mean(dim=0).abs().max() < 6 / n**0.5
    assert (normal.var(dim=0) - 1).abs().max() < 6 * (2 / n) ** 0.5
    # Neighbouring samples, seeded with neighbouring numbers, are uncorrelated.
    assert (normal[1:, 0] * normal[:-1, 0]).mean().abs() < 6 / n**0.5


# What steps a denoiser is trained at


@pytest.mark.parametrize("name", ["ddpm", "conditional_ddpm_shapes32"])
@pytest.mark.parametrize("density", ["steps", "signal"])
def test_steps_are_uniform_in_their_number_or_in_their_signal(name, density):
    """For "signal" the log SNR is compared with the logistic density, whose distribution is the sigmoid."""
    count = 20_000
    recipe = replace(find_recipe(name), density=density)
    t = recipe.draw_steps(SampleDraws(5, torch.arange(count)))
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)
    for step in (30, 200, 500, 700, 900):
        log_snr = (alpha_bar[step] / (1 - alpha_bar[step])).log()
        # t <= step where the signal is no less than the step's
        expected = (step + 1) / 1000 if density == "steps" else 1 - log_snr.sigmoid().item()
        share = (t <= step).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_steps_of_uniform_signal_number_the_boundaries_right():
    """A uniform number u gives the first step whose alpha_bar is no longer above u."""

    class Given:
        def uniform(self):
            return torch.tensor([0.999999, 0.5, 0.0])

    recipe = replace(find_recipe("ddpm"), density="signal")
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)
    first, middle, last = recipe.draw_steps(Given()).tolist()
    assert (first, last) == (0, 999)
    assert alpha_bar[middle] <= 0.5 < alpha_bar[middle - 1]


@pytest.mark.parametrize("name", ["ddpm", "conditional_ddpm_shapes32"])
def test_batches_hold_the_steps_of_the_density(name):
    shapes = load("shapes", image_size=32)
    recipe = find_recipe(name)
    if name != "ddpm":
        recipe = recipe.fitted_to(shapes)
    near_clean = [
        (replace(recipe, density=density).draw(shapes, SampleDraws(0, torch.arange(400)))["t"] < 250).sum()
        for density in ("steps", "signal")
    ]
    assert near_clean[1] < 0.8 * near_clean[0]  # .15 and .25 are expected: three standard errors apart at .8


def test_test_losses_compare_whatever_the_density():
    shapes = load("shapes", split="test", image_size=32)
    recipe = replace(
        find_recipe("ddpm"), model={"base_channels": 8, "channel_multipliers": (1,)}, batch_size=4
    )
    losses = []
    for density in ("steps", "signal"):
        trained = replace(recipe, density=density)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(trained._test_loss(trained.build(), shapes))
    assert losses[0] == losses[1]


def test_settings_name_the_density_only_where_it_is_not_the_old_one():
    recipe = find_recipe("ddpm")
    assert "density" not in replace(recipe, density="steps").settings()
    for density in ("steps", "signal"):
        chosen = replace(recipe, density=density)
        assert type(recipe)(**chosen.settings()) == chosen


def test_unknown_density_is_refused():
    with pytest.raises(ValueError, match="density must be one of 'steps', 'signal'; got 'middle'"):
        replace(find_recipe("ddpm"), density="middle")


# A run in parts


def test_parts_of_the_model_of_shapes_follow_each_other():
    parts, recipe = [], find_recipe("ddpm_shapes32")
    while True:
        parts.insert(0, recipe)
        if recipe.start is None:
            break
        recipe = find_recipe(recipe.start)
    assert len({part.name for part in parts}) == len({part.seed for part in parts}) == len(parts) > 1
    assert [part.decay_to for part in parts] == [1.0] * (len(parts) - 1) + [0.0]
    alike = {"name": "", "start": None, "seed": 0, "steps": 1, "decay_to": 0.0}
    assert len({str(replace(part, **alike)) for part in parts}) == 1
