"""Files of tensors: they come back as they were written, whole or not at all, and old ones are read."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save, save_file

from lecture26.kit.tensor_files import read_parts, read_tensors, write_parts, write_tensors

METADATA = {"format": "a test", "note": "some more"}


@pytest.fixture
def tensors():
    draws = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=draws),
        "transposed": torch.randn(2, 3, generator=draws).T,
        "double": torch.randn(2, generator=draws, dtype=torch.float64),
        "brain": torch.randn(5, generator=draws).bfloat16(),
        "count": torch.tensor(70_000),
        "nothing": torch.zeros(0, 3),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach())
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("metadata", [None, METADATA])
def test_tensors_come_back(tmp_path, tensors, metadata):
    file = tmp_path / "new" / "tensors"
    sha256 = write_tensors(file, tensors, metadata)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    found, told = read_tensors(file, sha256=sha256)
    assert same(found, tensors)
    assert {name: text for name, text in told.items() if name != "checksum"} == (metadata or {})
    assert [entry.name for entry in file.parent.iterdir()] == ["tensors"]
    if metadata:
        assert same(read_tensors(file, format="a test")[0], tensors)


def test_a_file_that_is_described_holds_nothing_but_the_tensors(tmp_path, tensors):
    write_tensors(tmp_path / "tensors", tensors)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "tensors").read_bytes() == save(plain)


def test_another_file_is_refused(tmp_path, tensors):
    sha256 = write_tensors(tmp_path / "one", tensors)
    other = write_tensors(tmp_path / "other", {"weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=f"other is not what was saved.* must be {sha256}; got {other}"):
        read_tensors(tmp_path / "other", sha256=sha256)
    with pytest.raises(FileNotFoundError, match="there is no file .*absent"):
        read_tensors(tmp_path / "absent", sha256=sha256)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "another"}])
def test_another_format_is_refused(tmp_path, tensors, metadata):
    write_tensors(tmp_path / "tensors", tensors, metadata)
    with pytest.raises(ValueError, match="tensors is a safetensors file, but its format is not 'a test'"):
        read_tensors(tmp_path / "tensors", format="a test")


def test_changed_numbers_are_refused_without_a_description(tmp_path):
    file = tmp_path / "tensors"
    write_tensors(file, {"weight": torch.ones(2)}, METADATA)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="tensors is damaged: its checksum is wrong"):
        read_tensors(file, format="a test")


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b"null", b'{"a": {"dtype": "F99"}}', b'{"__metadata__": null}']
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, header):
    file = tmp_path / "tensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="tensors is (damaged, or no|a) safetensors file"):
        read_tensors(file, format="a test")


def test_a_file_that_stands_alone_needs_its_checksum(tmp_path, tensors):
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "tensors", metadata=METADATA)
    with pytest.raises(ValueError, match="tensors is damaged: its checksum is wrong"):
        read_tensors(tmp_path / "tensors", format="a test")
    found, told = read_tensors(tmp_path / "tensors")
    assert same(found, tensors) and told == METADATA


def test_parts_come_back(tmp_path, tensors):
    settings, parts = {"width": 3, "names": ["a", "b"]}, {"one": tensors, "two": {"bias": torch.ones(1)}}
    write_parts(tmp_path / "model.json", settings, parts)
    found_settings, found = read_parts(tmp_path / "model.json", ("one", "two"))
    assert found_settings == settings
    assert same(found["one"], tensors) and same(found["two"], parts["two"])


@pytest.mark.parametrize("hashes", [{}, {"settings": "0"}, {"one": "0"}, None])
def test_parts_with_another_description_are_refused(tmp_path, hashes):
    file = tmp_path / "model.json"
    write_parts(file, {"width": 3}, {"one": {"bias": torch.ones(1)}})
    description = json.loads(file.read_text())
    description["sha256"] = hashes if not hashes else description["sha256"] | hashes
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="folder must hold a saved model"):
        read_parts(file, ("one",))
