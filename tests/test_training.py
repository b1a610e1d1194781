"""The training loop: restarts, several processes, settings."""

import copy
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_run
from torch import nn

from lecture26.kit import precision as kit_precision
from lecture26.kit.files import replace_when_complete
from lecture26.kit.training import StateError, learning_rate_factor, train
from lecture26.unet import EMA

PROGRAM = Path(training_run.__file__)
HANGS = 1800  # seconds after which a process is taken to hang, however busy the machine


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

    # Each would choose another precision by itself; all take the main one's.
    # Stopped through one of them, both finish the same step and write one state; and both go on from it.
    processes = start_two(state_file, out, delay=0.05)
    wait_for_steps(processes[1], 1 + 8)  # the first batch is drawn to choose the precision
    processes[1].terminate()
    for process in processes:
        process.communicate(timeout=HANGS)
        assert process.returncode == training_run.EXIT_STOPPED
    assert 8 <= len(torch.load(state_file)["losses"]) < training_run.STEPS
    for process in start_two(state_file, out, delay=0.0):
        process.communicate(timeout=HANGS)
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


def test_a_run_is_watched_step_by_step_and_not_changed_by_it():
    alone, watched, seen = nn.Linear(3, 1), nn.Linear(3, 1), []
    watched.load_state_dict(alone.state_dict())

    def watch(steps):
        seen.append((steps, watched.weight.clone()))
        torch.rand(3)  # what is drawn here belongs to nobody's batch

    assert tiny_run(watched, watch=watch).losses == tiny_run(alone).losses
    assert [steps for steps, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], alone.weight) and not torch.equal(seen[0][1], seen[1][1])


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    tiny_run(nn.Linear(3, 1))  # Accelerate looks for other processes once
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and Accelerate found 1: .*USE_CPU"):
        tiny_run(nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "aot_eager"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_settings_of_the_environment_do_not_change_a_training(monkeypatch, variable, value):
    torch.manual_seed(0)
    first = nn.Linear(3, 1)
    second = copy.deepcopy(first)
    history = tiny_run(first)
    monkeypatch.setenv(variable, value)
    assert tiny_run(second).losses == history.losses
    assert torch.equal(first.weight, second.weight)
    assert os.environ[variable] == value


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


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    leftover, of_a_live_one = (tmp_path / f".file.{number}.part" for number in (process.pid, os.getppid()))
    of_another_file = tmp_path / f".file2.{process.pid}.part"
    for other in (leftover, of_a_live_one, of_another_file):
        other.touch()
    with replace_when_complete(file) as temporary:
        temporary.write_text("new")
    assert {*tmp_path.iterdir()} == {file, of_a_live_one, of_another_file}


def test_a_path_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with replace_when_complete("~/made/file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "made" / "file").read_text() == "new"
    assert not (tmp_path / "~").exists()


def test_average_follows_the_model():
    model = nn.Linear(3, 1)
    average = EMA(model, decay=0.5)
    start = model.weight.detach().clone()
    tiny_run(model, average=average)
    assert average.num_updates == 4
    assert not torch.equal(average.model.weight, start)
    assert not torch.equal(average.model.weight, model.weight)


def compiled(model):
    return torch.compile(model, backend="eager")


def test_a_run_may_be_stopped_compiled_and_go_on_plain_or_the_other_way_round(tmp_path):
    def network(wrap_whole, wrap_part):
        torch.manual_seed(0)
        return wrap_whole(nn.Sequential(wrap_part(nn.Linear(3, 3)), nn.Linear(3, 1)))

    def plain(model):
        return model

    kinds = {"plain": (plain, plain), "whole": (compiled, plain), "part": (plain, compiled)}
    expected = None
    for first, second in itertools.permutations(kinds, 2):
        state_file = tmp_path / f"{first}_{second}.pt"
        steps_begun = itertools.count(1)

        def stop_in_step_2(random, steps_begun=steps_begun):
            if next(steps_begun) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return normal_batch(random)

        model = network(*kinds[first])
        with pytest.raises(KeyboardInterrupt):
            options = dict(steps=4, batch_size=2, learning_rate=0.1, progress=False, state_file=state_file)
            train(model, stop_in_step_2, mean_squared_output, average=EMA(model, 0.5), **options)
        model = network(*kinds[second])
        average = EMA(model, 0.5)
        tiny_run(model, average=average, state_file=state_file)
        names = list(average.model.state_dict())
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
        weights = torch.cat([weight.flatten() for weight in average.model.state_dict().values()])
        expected = weights if expected is None else expected
        torch.testing.assert_close(weights, expected)


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


def timed(monkeypatch, fp32, bf16):
    """Have a step take so many seconds in either precision, on a device that has units for bfloat16."""
    monkeypatch.setattr(kit_precision, "has_bfloat16_units", lambda device: True)
    seconds = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(kit_precision, "_time_step", lambda *arguments: seconds[arguments[-1]])


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(2.0, 1.0, "bf16"), (1.0, 2.0, "fp32"), (1.05, 1.0, "fp32"), (float("inf"), 1.0, "bf16")],
)
def test_the_faster_precision_is_chosen_and_said(monkeypatch, capsys, fp32, bf16, chosen):
    timed(monkeypatch, fp32, bf16)
    history = tiny_run(nn.Linear(3, 1), precision="auto", progress=True)
    assert history.precision == chosen
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("precision: ")]
    assert told == [f"precision: {chosen} (a step takes {bf16:.2g} s in bf16 and {fp32:.2g} s in fp32)"]


def test_without_units_for_bfloat16_it_is_not_tried(monkeypatch):
    monkeypatch.setattr(kit_precision, "has_bfloat16_units", lambda device: False)
    monkeypatch.setattr(kit_precision, "_time_step", lambda *arguments: pytest.fail("tried"))
    assert tiny_run(nn.Linear(3, 1), precision="auto").precision == "fp32"


def test_choosing_changes_nothing_of_the_training(monkeypatch):
    """It runs the network, whose dropout draws numbers and whose statistics move."""
    monkeypatch.setattr(kit_precision, "has_bfloat16_units", lambda device: True)
    monkeypatch.setattr(kit_precision, "ADVANTAGE", float("inf"))
    torch.manual_seed(0)
    fixed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    chosen = copy.deepcopy(fixed)
    expected = tiny_run(fixed, batch_size=4).losses
    state = torch.random.get_rng_state()
    assert tiny_run(chosen, batch_size=4, precision="auto").losses == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in fixed.state_dict().items():
        assert torch.equal(tensor, chosen.state_dict()[name]), name


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    timed(monkeypatch, fp32=2.0, bf16=1.0)

    def run(state_file, stop=False):
        torch.manual_seed(0)
        model, steps_begun = nn.Linear(3, 1), itertools.count(1)

        def draw(random):
            if next(steps_begun) == 3 and stop:
                os.kill(os.getpid(), signal.SIGINT)
            return normal_batch(random)

        options = dict(steps=4, batch_size=2, learning_rate=0.1, progress=False, precision="auto")
        return train(model, draw, mean_squared_output, state_file=state_file, **options)

    expected = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped.pt", stop=True)
    timed(monkeypatch, fp32=1.0, bf16=2.0)
    history = run(tmp_path / "stopped.pt")
    assert (history.precision, history.losses) == ("bf16", expected.losses)


class Unlucky(Exception):
    pass


@pytest.mark.parametrize("where", ["draw", "loss"])
def test_an_error_in_a_step_loses_none_of_those_before(tmp_path, where):
    def run(state_file, luck=True):
        torch.manual_seed(0)
        model, calls = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)), itertools.count()

        def meet_fate(place):
            if place == where and next(calls) == 2 and not luck:
                raise Unlucky

        def draw(random):
            meet_fate("draw")
            return normal_batch(random)

        def loss(network, batch):
            meet_fate("loss")
            return mean_squared_output(network, batch)

        options = dict(steps=4, batch_size=2, learning_rate=0.1, progress=False)
        return train(model, draw, loss, state_file=state_file, **options).losses

    state_file = tmp_path / "unlucky.pt"
    with pytest.raises(Unlucky):
        run(state_file, luck=False)
    assert len(torch.load(state_file)["losses"]) == 2
    assert run(state_file) == run(tmp_path / "lucky.pt")


def test_a_state_that_finds_no_room_is_one_error_of_the_system(tmp_path):
    resource = pytest.importorskip("resource")
    state_file = tmp_path / "state.pt"
    torch.manual_seed(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file must not grow further
        with pytest.raises(OSError, match=r"training state .*state.pt could not be written; .* MB free"):
            tiny_run(nn.Linear(3, 10_000), state_file=state_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


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
        ({"precision": "fp16"}, ValueError, "precision must be one of 'auto', 'fp32', 'bf16'; got 'fp16'"),
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
