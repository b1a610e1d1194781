"""Checkpoints: what is stored, and that nothing else is ever loaded in its place."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lecture26.kit import paths
from lecture26.kit.checkpoints import (
    CARD_FIELDS,
    CheckpointError,
    checkpoint_files,
    list_checkpoints,
    load_card,
    load_state,
    save_checkpoint,
)
from lecture26.kit.results import load_results, save_results

DATA_DIRS = paths.data_dirs  # before conftest takes its place
SHIPPED = list_checkpoints()  # before the fixture below points elsewhere
CARD = {
    "recipe": "ddpm",
    "settings": {"name": "tiny", "model": {"widths": [1, 2]}},
    "command": "python -m lecture26 train tiny",
    "data": "shapes, 100 images of 32 pixels",
    "steps": 10,
    "seconds": 3,
    "metrics": {"test_loss": 0.25},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder instead of the course's."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
        "transposed": torch.randn(2, 3, generator=generator).T,
        "count": torch.tensor(70_000),  # beyond half precision
    }


def test_state_comes_back_in_single_precision(folder, state):
    save_checkpoint("tiny", state, CARD)
    loaded = load_state("tiny")
    assert loaded.keys() == state.keys()
    for key in ("weight", "double", "transposed"):
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], state[key].half().float())
    assert loaded["count"].dtype == torch.int64
    assert loaded["count"] == 70_000


def test_file_holds_half_precision(folder, state):
    save_checkpoint("tiny", state, CARD)
    stored = load_file(folder / "tiny.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == {
        "weight": torch.float16,
        "double": torch.float16,
        "transposed": torch.float16,
        "count": torch.int64,
    }


def test_card_describes_the_file(folder, state):
    returned = save_checkpoint("tiny", state, CARD)
    card = load_card("tiny")
    assert card == returned
    assert set(CARD_FIELDS) <= card.keys()
    assert {key: card[key] for key in CARD} == CARD
    content = (folder / "tiny.safetensors").read_bytes()
    assert card["name"] == "tiny"
    assert card["bytes"] == len(content)
    assert card["sha256"] == hashlib.sha256(content).hexdigest()
    assert card["parameters"] == 12 + 2 + 6
    assert card["machine"].keys() == {"processor", "threads", "accelerator"}
    assert card["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_same_weights_make_the_same_file(folder, state):
    first = save_checkpoint("tiny", state, CARD)
    second = save_checkpoint("other", dict(reversed(state.items())), CARD)
    assert first["sha256"] == second["sha256"]


def test_a_compiled_model_is_stored_under_its_plain_names(folder):
    model = nn.Sequential(torch.compile(nn.Linear(2, 3), backend="eager"), nn.Linear(3, 1))
    save_checkpoint("tiny", torch.compile(model, backend="eager").state_dict(), CARD)
    assert load_state("tiny").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_later_checkpoint_replaces_the_earlier(folder, state):
    save_checkpoint("tiny", state, CARD)
    save_checkpoint("tiny", {"weight": torch.ones(2)}, CARD | {"steps": 20})
    assert load_card("tiny")["steps"] == 20
    assert load_state("tiny").keys() == {"weight"}
    assert sorted(file.name for file in folder.iterdir()) == ["tiny.json", "tiny.safetensors"]


def test_list(folder, state):
    assert list_checkpoints() == []
    for name in ("b", "a_2-x"):
        save_checkpoint(name, state, CARD)
    assert list_checkpoints() == ["a_2-x", "b"]
    (folder / "b.json").unlink()  # as if stopped between weights and card
    (folder / "Another.safetensors").touch()
    assert list_checkpoints() == ["a_2-x"]


@pytest.mark.parametrize("position", [0, 100, -1])
def test_corrupted_file_is_refused(folder, state, position):
    card = save_checkpoint("tiny", state, CARD)
    file = folder / "tiny.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        load_state("tiny")
    message = str(refusal.value)
    assert str(file) in message
    assert card["sha256"] in message
    assert hashlib.sha256(content).hexdigest() in message
    assert f"git checkout -- {file}" in message
    assert "python -m lecture26 train tiny" in message


def test_truncated_file_is_refused(folder, state):
    save_checkpoint("tiny", state, CARD)
    file = folder / "tiny.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_state("tiny")


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        ([".safetensors"], "is not what was saved: its SHA-256 must be"),
        ([".safetensors", ".json"], "is the card of 'other', not of 'tiny'"),
    ],
)
def test_swapped_checkpoint_is_refused(folder, state, suffixes, message):
    save_checkpoint("tiny", state, CARD)
    save_checkpoint("other", state | {"weight": torch.zeros(3, 4)}, CARD)
    for suffix in suffixes:
        shutil.copy(folder / f"other{suffix}", folder / f"tiny{suffix}")
    with pytest.raises(CheckpointError) as refusal:
        load_state("tiny")
    assert message in str(refusal.value)


@pytest.mark.parametrize("missing", ["tiny.safetensors", "tiny.json"])
def test_missing_checkpoint_names_the_file_and_the_command(folder, state, missing):
    save_checkpoint("other", state, CARD)
    save_checkpoint("tiny", state, CARD)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError) as refusal:
        load_state("tiny")
    message = str(refusal.value)
    assert f"{folder / missing} is missing" in message
    assert "other" in message
    assert "python -m lecture26 train tiny" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('"text"', "is damaged"), ("{}", "no name")],
)
def test_damaged_card_is_refused(folder, state, content, message):
    save_checkpoint("tiny", state, CARD)
    (folder / "tiny.json").write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        load_card("tiny")
    assert message in str(refusal.value)


DAMAGED_VALUES = {
    "name": 3,
    "recipe": None,
    "settings": [],
    "command": ["python"],
    "data": {},
    "steps": 1.5,
    "seconds": None,
    "metrics": [],
    "parameters": -1,
    "machine": "a machine",
    "versions": None,
    "bytes": True,
    "sha256": "abc",
}


@pytest.mark.parametrize("field", CARD_FIELDS)
def test_a_card_with_a_damaged_value_is_refused(folder, state, field):
    card = save_checkpoint("tiny", state, CARD)
    (folder / "tiny.json").write_text(json.dumps(card | {field: DAMAGED_VALUES[field]}))
    with pytest.raises(CheckpointError, match=rf"tiny.json is damaged \({field} must be .*; got "):
        load_card("tiny")


def test_a_metric_that_is_no_number_is_refused_and_all_faults_are_named(folder, state):
    card = save_checkpoint("tiny", state, CARD)
    del card["data"]
    (folder / "tiny.json").write_text(json.dumps(card | {"metrics": {"loss": "low"}, "seconds": None}))
    with pytest.raises(CheckpointError, match="no data; seconds must be .* None; metrics must be .* 'low'"):
        load_card("tiny")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A data folder that came with the course, beside one's own."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path / "own"))
    monkeypatch.setattr(paths, "data_dirs", lambda: (tmp_path / "own", tmp_path / "shipped"))
    return tmp_path / "shipped"


def test_shipped_checkpoints_are_found_beside_ones_own(shared, tmp_path, monkeypatch, state):
    with monkeypatch.context() as patch:
        patch.setenv("LECTURE26_DATA", str(shared))
        save_checkpoint("shipped", state, CARD)
        save_checkpoint("both", state, CARD)
    before = {file: file.read_bytes() for file in shared.rglob("*") if file.is_file()}
    save_checkpoint("both", state, CARD | {"steps": 20})
    save_checkpoint("own", state, CARD)
    (tmp_path / "own" / "checkpoints" / "shipped.safetensors").touch()  # of a run that was killed
    assert list_checkpoints() == ["both", "own", "shipped"]
    assert load_card("both")["steps"] == 20 and load_card("shipped")["steps"] == 10
    assert checkpoint_files("new")[0] == tmp_path / "own" / "checkpoints" / "new.safetensors"
    assert load_state("shipped").keys() == state.keys()
    assert {file: file.read_bytes() for file in shared.rglob("*") if file.is_file()} == before


def test_shipped_results_are_found_beside_ones_own(shared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LECTURE26_DATA", str(shared))
        save_results("sweep", "a command", {"runs": 1})
    assert load_results("sweep")["runs"] == 1
    save_results("sweep", "a command", {"runs": 2})
    assert load_results("sweep")["runs"] == 2
    assert json.loads((shared / "results" / "sweep.json").read_text())["runs"] == 1
    with pytest.raises(ValueError, match=r"no results 'other': .*own.results.other.json .*present: sweep"):
        load_results("other")


def test_without_a_folder_of_ones_own_the_shipped_one_is_the_only(monkeypatch):
    monkeypatch.delenv("LECTURE26_DATA", raising=False)
    assert DATA_DIRS() == (paths.shipped_data_dir(),) == (paths.data_dir(),)
    monkeypatch.setenv("LECTURE26_DATA", "~")
    assert DATA_DIRS() == (Path.home(), paths.shipped_data_dir())


@pytest.mark.parametrize("name", ["", "../tiny", "a/b", "Tiny", ".tiny", "tiny.json", "-tiny", "tiny\n"])
def test_name_of_a_checkpoint_is_no_path(folder, name):
    with pytest.raises(ValueError, match="name is made of"):
        checkpoint_files(name)


@pytest.mark.parametrize("field", CARD)
def test_incomplete_card_is_not_written(folder, state, field):
    card = {key: value for key, value in CARD.items() if key != field}
    with pytest.raises(ValueError, match=f"missing: {field}"):
        save_checkpoint("tiny", state, card)
    assert not folder.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_beyond_half_precision_are_not_written(folder, value):
    with pytest.raises(ValueError, match="weight.* is not finite in half precision"):
        save_checkpoint("tiny", {"weight": torch.tensor([value])}, CARD)
    assert not folder.exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint(name):
    from lecture26.recipes import load_model, load_recipe

    card = load_card(name)
    assert all(card[field] not in (None, "", {}, []) for field in CARD_FIELDS)
    assert card["metrics"] and all(isinstance(value, float) for value in card["metrics"].values())
    assert json.loads(json.dumps(load_recipe(name).settings())) == card["settings"]
    parameters = load_model(name).state_dict().values()
    assert card["parameters"] == sum(tensor.numel() for tensor in parameters if tensor.is_floating_point())
