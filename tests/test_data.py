"""load: every data set by name, folders of images, and what goes wrong with them."""

import errno
import gzip
import os
import tarfile
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features

from lecture26.kit import data
from lecture26.kit.data import DataError, DataWarning, StoredImages, check_images, load
from lecture26.kit.downstream import TASKS, downstream
from lecture26.kit.image_set import ImageSet

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    """Keep the tests away from what the user has downloaded."""
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def write_image(file: Path, grey=None, mode="RGB", size=(40, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    level = len(file.name) if grey is None else grey
    Image.new("L", size, level).convert(mode).save(file)


def images_of(folder: Path, split="train", image_size=8):
    images = load(folder, split, image_size)
    return images.batch(range(len(images)))


def write_folder(folder: Path, count=60, classes=("cat", "dog"), **options):
    for class_name in classes:
        for i in range(count):
            write_image(folder / class_name / f"{i:03}.png", grey=i, **options)


def damage(file: Path, size):
    """Put an image into a file, of which only the first bytes are there."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:size])


def check_protocol(images, num_channels, image_size):
    assert isinstance(images, ImageSet)
    assert (images.channels, images.image_size) == (num_channels, image_size)
    batch = images.batch(torch.tensor([1, 0, 1]))
    assert set(batch) == {"image", *images.labels}
    assert batch["image"].shape == (3, num_channels, image_size, image_size)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    for name, classes in images.labels.items():
        assert isinstance(classes, tuple)
        assert batch[name].dtype == torch.int64 and batch[name].shape == (3,)
        assert 0 <= batch[name].min() and batch[name].max() < len(classes)
    one = images[1]
    assert all(torch.equal(batch[name][0], one[name]) for name in batch)
    assert all(torch.equal(batch[name][2], one[name]) for name in batch)
    assert images.batch([])["image"].shape == (0, num_channels, image_size, image_size)


# What comes with the course


def test_shapes_and_scenes_by_name():
    check_protocol(load("shapes"), 3, 32)
    check_protocol(load("shapes", "held_out", 64), 3, 64)
    check_protocol(load("scenes", "test"), 3, 64)
    assert load("scenes").captions([0])[0].endswith(" background")


@pytest.mark.parametrize("image_size", [8, 16, 32])
def test_digits(image_size):
    check_protocol(load("digits", "train", image_size), 1, image_size)


def test_digits_are_split_once_and_evenly():
    from sklearn.datasets import load_digits

    images = {split: load("digits", split, 8) for split in SPLITS}
    everything = [images[split].batch(range(len(images[split]))) for split in SPLITS]
    joined = torch.cat([batch["image"] for batch in everything]).flatten(1)
    sixteenths = ((joined + 1) * 8).round().byte().numpy()
    assert sorted(map(bytes, sixteenths)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))
    for batch in everything[1:]:
        counts = torch.bincount(batch["class"])
        assert counts.max() - counts.min() <= 2 and counts.sum() == pytest.approx(1797 / 6, abs=10)
    assert load("digits").labels == {"class": tuple("0123456789")}


def test_default_size():
    assert load("digits").image_size == 32


# torchvision's sets, without a network


def fake_torchvision(monkeypatch, class_name, constructor):
    monkeypatch.setattr(torchvision.datasets, class_name, constructor)


def stored_set(folder, train, download):
    assert download
    generator = torch.Generator().manual_seed(int(train))
    number = 100 if train else 30
    pixels = torch.randint(0, 256, (number, 28, 28), generator=generator, dtype=torch.uint8)
    return SimpleNamespace(
        data=pixels, targets=torch.arange(number) % 10, classes=[f"{i}" for i in range(10)]
    )


@pytest.mark.parametrize(("name", "class_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_grey_sets(monkeypatch, name, class_name):
    fake_torchvision(monkeypatch, class_name, stored_set)
    check_protocol(load(name, "train", 28), 1, 28)
    check_protocol(load(name, "validation", 32), 1, 32)
    assert [len(load(name, split)) for split in SPLITS] == [90, 10, 30]
    source = stored_set(None, train=True, download=True)
    kept = torch.cat(
        [load(name, s, 28).batch(range(n))["image"] for s, n in (("train", 90), ("validation", 10))]
    )
    assert torch.equal(((kept + 1) * 127.5).round().byte()[:, 0], source.data)
    assert load(name, "validation").batch([0])["class"] == source.targets[90]


def test_cifar10(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    cifar = SimpleNamespace(data=pixels, targets=[i % 10 for i in range(50)], classes=list("abcdefghij"))
    fake_torchvision(monkeypatch, "CIFAR10", lambda folder, train, download: cifar)
    images = load("cifar10", "test", 32)
    check_protocol(images, 3, 32)
    red = ((images.batch([7])["image"][0, 0] + 1) * 127.5).round()
    assert np.array_equal(red.numpy(), pixels[7, :, :, 0])


def test_aircraft_without_its_banner(monkeypatch, tmp_path):
    file = tmp_path / "aircraft.png"
    photograph = np.full((60, 40, 3), 255, dtype=np.uint8)
    photograph[-20:] = 0
    Image.fromarray(photograph).save(file)
    asked = []

    def aircraft(folder, split, download):
        asked.append(split)
        return SimpleNamespace(_image_files=[str(file)] * 2, _labels=[0, 1], classes=["707-320", "A320"])

    fake_torchvision(monkeypatch, "FGVCAircraft", aircraft)
    images = load("fgvc_aircraft", "validation")
    check_protocol(images, 3, 64)
    assert images.batch([0])["image"].min() == 1
    assert asked == ["val"]
    file.unlink()
    with pytest.raises(DataError, match=r"aircraft.png is missing: delete the folder .*FGVCAircraft"):
        load("fgvc_aircraft")


TORCHVISION_SETS = [
    ("mnist", "MNIST"),
    ("fashion_mnist", "FashionMNIST"),
    ("cifar10", "CIFAR10"),
    ("fgvc_aircraft", "FGVCAircraft"),
]


def no_network(*arguments, **options):
    raise URLError("no route to host")


@pytest.mark.parametrize(("name", "class_name"), TORCHVISION_SETS)
def test_no_network(monkeypatch, name, class_name, data_folder):
    for function in ("_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(torchvision.datasets.utils, function, no_network)
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"{class_name} could not be downloaded")
    assert "no route to host" in message and "Connect to the network" in message
    assert str(data_folder / "downloads" / class_name) in message and "is incomplete" not in message
    assert "\n" not in message
    # One error, not torchvision's and urllib's on top of it.
    assert caught.value.__cause__ is None and (
        caught.value.__suppress_context__ or not caught.value.__context__
    )


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError("timed out"), IncompleteRead(b"")]
)
def test_network_lost_on_the_way(monkeypatch, error):
    def constructor(folder, train, download):
        raise error

    fake_torchvision(monkeypatch, "CIFAR10", constructor)
    with pytest.raises(DataError, match="CIFAR10 could not be downloaded"):
        load("cifar10")


@pytest.mark.parametrize(("name", "class_name"), TORCHVISION_SETS)
def test_truncated_download(monkeypatch, name, class_name):
    def half_an_archive(url, file, *arguments):
        Path(file).write_bytes(gzip.compress(os.urandom(10_000))[:5000])

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", half_an_archive)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **options: url)
    with pytest.raises(
        DataError, match=f"{class_name} is incomplete or damaged .*delete the folder"
    ) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_truncated_archive_without_network(monkeypatch, data_folder):
    folder = data_folder / "downloads" / "CIFAR10"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz"):
        pass
    for function in ("_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(torchvision.datasets.utils, function, no_network)
    with pytest.raises(DataError, match=f"what is in {folder} is incomplete"):
        load("cifar10")


def test_half_unpacked_aircraft(data_folder):
    (data_folder / "downloads" / "FGVCAircraft" / "fgvc-aircraft-2013b").mkdir(parents=True)
    with pytest.raises(DataError, match="FGVCAircraft is incomplete or damaged .*delete the folder"):
        load("fgvc_aircraft")


# Folders


def test_folder_with_splits(tmp_path):
    for count, split in ((6, "train"), (3, "validation"), (2, "test")):
        write_folder(tmp_path / split, count)
    images = {split: load(tmp_path, split, 8) for split in SPLITS}
    check_protocol(images["train"], 3, 8)
    assert [len(images[split]) for split in SPLITS] == [12, 6, 4]
    assert images["test"].labels == {"class": ("cat", "dog")}
    assert images["test"].batch(range(4))["class"].tolist() == [0, 0, 1, 1]


def test_folder_given_as_text(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert len(load("./photos")) == len(load(Path("photos")))


def test_val_is_validation(tmp_path):
    write_folder(tmp_path / "train", 20)
    write_folder(tmp_path / "val", 2)
    assert len(load(tmp_path, "validation")) == 4


def grey_levels(batch):
    """(class, grey level) of each image, the names that write_folder gives them."""
    level = ((batch["image"].mean(dim=(1, 2, 3)) + 1) * 127.5).round().long()
    return list(zip(batch["class"].tolist(), level.tolist(), strict=True))


def test_folder_without_splits_is_split_by_path(tmp_path):
    write_folder(tmp_path)
    members = {split: grey_levels(images_of(tmp_path, split)) for split in SPLITS}
    everything = sum(members.values(), [])
    assert len(everything) == len(set(everything)) == 120
    assert set(everything) == {(c, i) for c in range(2) for i in range(60)}
    assert 4 <= len(members["validation"]) <= 24 and 4 <= len(members["test"]) <= 24
    # Neither new files nor another place move an image to another split.
    write_image(tmp_path / "cat" / "new.png", grey=200)
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    for split in SPLITS:
        assert set(grey_levels(images_of(moved, split))) - {(0, 200)} == set(members[split])


def test_folder_with_train_and_test_gives_a_validation_split(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", 5)
    members = {split: grey_levels(images_of(tmp_path, split)) for split in SPLITS}
    assert len(members["test"]) == 10
    assert len(members["train"]) + len(members["validation"]) == 120
    assert not set(members["train"]) & set(members["validation"])


def test_classes_are_those_of_all_splits(tmp_path):
    write_folder(tmp_path / "train", 5, classes=("ant", "bee", "cow"))
    write_folder(tmp_path / "test", 2, classes=("bee",))
    images = load(tmp_path, "test")
    assert images.labels == {"class": ("ant", "bee", "cow")}
    assert images.batch([0])["class"] == 1


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, classes=("car", "plane", "train"))
    assert load(tmp_path).labels == {"class": ("car", "plane", "train")}


@pytest.mark.parametrize("other", ["valid", "__MACOSX"])
def test_splits_beside_another_folder_are_not_taken_for_classes(tmp_path, other):
    for name in ("train", "test", other):
        write_folder(tmp_path / name, 2, classes=("ant", "bee"))
    with pytest.raises(DataError, match=rf"folders named like splits .*got .*{other}.* Rename or move"):
        load(tmp_path)


def test_images_too_many_to_be_kept_enlarged_are_the_same(monkeypatch):
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = StoredImages(pixels, torch.zeros(6).long(), [], 20)
    monkeypatch.setattr("lecture26.kit.data.CACHE_BYTES", 100)
    enlarged = StoredImages(pixels, torch.zeros(6).long(), [], 20)
    assert enlarged.batch([4, 1])["image"].shape == (2, 3, 20, 20)
    assert torch.equal(enlarged.batch([4, 1])["image"], kept.batch([4, 1])["image"])


def test_folder_without_classes(tmp_path):
    for i in range(30):
        write_image(tmp_path / f"{i:03}.jpg", grey=i)
    images = load(tmp_path, image_size=16)
    check_protocol(images, 3, 16)
    assert images.labels == {}


def test_grey_folder_has_one_channel(tmp_path):
    write_folder(tmp_path, mode="L")
    check_protocol(load(tmp_path, image_size=16), 1, 16)
    # A single image in colour, even of another split, makes all of them three channels.
    write_image(tmp_path / "dog" / "colourful.png", mode="RGB")
    check_protocol(load(tmp_path, image_size=16), 3, 16)


def test_palette_and_transparency_become_rgb(tmp_path):
    for number, mode in enumerate(("P", "RGBA", "L", "CMYK")):
        write_image(tmp_path / "train" / f"{number}.tiff", grey=100, mode=mode)
    write_image(tmp_path / "test" / "0.tiff")
    write_image(tmp_path / "val" / "0.tiff")
    image = images_of(tmp_path)["image"]
    assert image.shape == (4, 3, 8, 8)
    assert (image - (100 / 127.5 - 1)).abs().max() < 0.02


def test_images_are_cropped_at_the_centre_and_turned_upright(tmp_path):
    # Three vertical thirds; a square crop of the wide picture shows the middle one.
    wide = np.zeros((30, 90), dtype=np.uint8)
    wide[:, 30:60] = 200
    options = {"exif": Image.Exif()}
    options["exif"][0x0112] = 6  # stored lying on its side
    for split in SPLITS:
        (tmp_path / split).mkdir()
        Image.fromarray(wide).save(tmp_path / split / "wide.png")
        upper = np.zeros((30, 30), dtype=np.uint8)
        upper[:, :15] = 200  # its left half is the upper one when turned
        Image.fromarray(upper).save(tmp_path / split / "turned.png", **options)
    turned, wide = images_of(tmp_path, image_size=10)["image"]
    assert (wide[:, :, 2:-2] - (200 / 127.5 - 1)).abs().max() < 0.05 and wide.min() > 0.3
    assert turned[0, :4].min() > 0.5 and turned[0, 6:].max() < -0.9


def test_other_files_and_hidden_folders_are_ignored(tmp_path):
    write_folder(tmp_path, 20)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._000.png").write_text("left by a file manager")
    (tmp_path / ".cache").mkdir()
    write_image(tmp_path / ".cache" / "thumbnail.png")
    images = [load(tmp_path, split) for split in SPLITS]
    assert sum(map(len, images)) == 40 and images[0].labels == {"class": ("cat", "dog")}


@pytest.fixture
def told(recwarn):
    """What the data warn of, as texts."""
    return lambda: [str(warning.message) for warning in recwarn if warning.category is DataWarning]


def test_links_to_folders_and_files_are_followed(tmp_path, told):
    write_folder(tmp_path / "store", 20, classes=("wolf", "cat"))
    pets = tmp_path / "pets"
    pets.mkdir()
    (pets / "dog").symlink_to(tmp_path / "store" / "wolf")
    (pets / "cat").mkdir()
    for file in (tmp_path / "store" / "cat").iterdir():
        (pets / "cat" / file.name).symlink_to(file)
    images = [load(pets, split) for split in SPLITS]
    assert images[0].labels == {"class": ("cat", "dog")} and sum(map(len, images)) == 40
    assert told() == []


def test_links_in_a_circle_end(tmp_path):
    write_folder(tmp_path / "pets", 20)
    (tmp_path / "pets" / "cat" / "again").symlink_to(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "above").symlink_to(tmp_path)
    assert sum(len(load(tmp_path / "pets", split)) for split in SPLITS) == 40


def test_a_link_to_nothing_is_damage(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "bird").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="bird is a link to nothing"):
        load(tmp_path)


def test_a_folder_may_be_called_like_a_file(tmp_path):
    write_folder(tmp_path, 20, classes=("x.png", "y.png"))
    images = [load(tmp_path, split) for split in SPLITS]
    assert images[0].labels == {"class": ("x.png", "y.png")} and sum(map(len, images)) == 40


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".avif"])
def test_suffixes_of_images(tmp_path, told, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without avif")
    write_folder(tmp_path, 20)
    for file in (tmp_path / "cat").iterdir():
        Image.open(file).save(file.with_suffix(suffix), {".avif": "AVIF"}.get(suffix, "JPEG"))
        file.unlink()
    images = [load(tmp_path, split) for split in SPLITS]
    assert images[0].labels == {"class": ("cat", "dog")} and sum(map(len, images)) == 40
    assert told() == []


def test_what_is_left_out_is_told(tmp_path, told):
    write_folder(tmp_path, 20)
    for name in ("1.heic", "2.HEIC", "notes", "list.txt"):
        (tmp_path / "cat" / name).write_bytes(b"")
    load(tmp_path)
    (message,) = told()
    assert message.startswith(f"{tmp_path}: left out 2 .heic, 1 .txt, 1 without a suffix; what is read")


def test_what_lies_beside_the_splits_is_told(tmp_path, told):
    for split in SPLITS:
        write_folder(tmp_path / split, 2)
    write_image(tmp_path / "stray.png")
    load(tmp_path)
    assert "left out 1 .png" in told()[0]


def test_only_images_left_out_are_told_in_the_error(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no images \(.*\), but 1 \.heic"):
        load(tmp_path)


def test_one_class_is_told(tmp_path, told):
    write_folder(tmp_path, 20, classes=("cat",))
    load(tmp_path)
    assert told() == [f"{tmp_path} has a single class, 'cat'"]


def test_two_folders_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "validation"):
        write_folder(tmp_path / name, 2)
    with pytest.raises(DataError, match="val and validation, which are the same split"):
        load(tmp_path)


def test_a_name_that_is_no_text_is_a_name(tmp_path):
    write_folder(tmp_path, 20)
    for folder in ("cat", "dog"):
        try:
            os.rename(
                tmp_path / folder / "000.png", os.path.join(os.fsencode(tmp_path / folder), b"\xff.png")
            )
        except OSError:
            pytest.skip("this file system takes names in UTF-8 only")
    assert sum(len(load(tmp_path, split)) for split in SPLITS) == 40
    (tmp_path / "cat" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    with pytest.raises(DataError, match="1 of 41 files are not readable images"):
        load(tmp_path)


def test_no_home_folder():
    with pytest.raises(FileNotFoundError, match="no home folder for '~nobody-of-this-name/x'"):
        load("~nobody-of-this-name/x")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "P", "RGB with a transparent colour", "L with one"])
def test_transparent_images_are_seen_on_white(tmp_path, kind):
    """Left half opaque grey, right half invisible, of a colour that must not be learned."""
    shown, hidden = (100, 100, 100), (255, 0, 255) if kind in ("RGBA", "P", "PA") else (7, 7, 7)
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4], pixels[:, 4:] = (*shown, 255), (*hidden, 0)
    image, options = Image.fromarray(pixels, "RGBA"), {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind in ("P", "PA"):
        image = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8), "P")
        image.putpalette([*shown, *hidden])
        options = {"transparency": 1}
        if kind == "PA":
            image = Image.merge("PA", (image, Image.fromarray(pixels[..., 3])))
            options = {}
    elif kind != "RGBA":
        image = image.convert("RGB" if kind.startswith("RGB") else "L")
        options = {"transparency": hidden if image.mode == "RGB" else hidden[0]}
    for split in SPLITS:
        (tmp_path / split).mkdir()
        image.save(tmp_path / split / ("0.tiff" if kind == "PA" else "0.png"), **options)
    seen = images_of(tmp_path)["image"]
    agree_with = torch.cat([torch.full((8, 4), 100 / 127.5 - 1), torch.ones(8, 4)], dim=1)
    assert (seen - agree_with).abs().max() < 1e-6


def test_half_transparent_images_let_white_through(tmp_path):
    for split in SPLITS:
        (tmp_path / split).mkdir()
        Image.new("RGBA", (8, 8), (0, 100, 200, 51)).save(tmp_path / split / "0.png")
    seen = (images_of(tmp_path)["image"][0, :, 0, 0] + 1) * 127.5
    assert seen.tolist() == pytest.approx([0.8 * 255, 0.8 * 255 + 20, 0.8 * 255 + 40], abs=1)


@pytest.mark.parametrize("cache_bytes", [0, data.CACHE_BYTES])
def test_all_damaged_images_are_named_at_once(tmp_path, monkeypatch, cache_bytes):
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    for split in SPLITS:
        write_folder(tmp_path / split, 5)
    load(tmp_path).check()
    for name in ("cat/001.png", "dog/003.png"):
        damage(tmp_path / "train" / name, 2000)
    images = load(tmp_path)
    with pytest.raises(DataError) as caught:
        images.check()
    message = str(caught.value)
    assert message.startswith("2 of 10 files are not readable images: ")
    assert "cat/001.png (image file is truncated)" in message and "dog/003.png (" in message
    load(tmp_path, "test").check()
    damage(tmp_path / "test" / "cat" / "002.png", 2000)
    with pytest.raises(DataError, match=r"(?s)cat/001.*dog/003.*test/cat/002"):
        check_images([load(tmp_path), load(tmp_path, "test")])


def test_damaged_headers_and_what_is_damaged_further_on_are_named_at_once(tmp_path):
    for split in SPLITS:
        write_folder(tmp_path / split, 5)
    damage(tmp_path / "train" / "cat" / "001.png", 0)
    damage(tmp_path / "test" / "dog" / "003.png", 2000)
    with pytest.raises(DataError, match=r"2 of 30 files .*train/cat/001.png, .*test/dog/003.png \("):
        load(tmp_path)


def test_sets_without_files_have_nothing_to_check():
    assert load("digits").check() is None and load("shapes").check() is None


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 3)
    write_image(tmp_path / "cat" / "huge.png", size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30)
    with pytest.raises(
        DataError, match=r"1 of 7 files .*huge.png \(Image size \(2500 pixels\) exceeds limit"
    ):
        load(tmp_path)


def test_damage_of_any_kind_is_named(tmp_path, monkeypatch):
    """Pillow's readers raise what they stumble over."""
    write_folder(tmp_path / "train", 3)
    images = load(tmp_path)

    def stumble(*arguments):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(data.ImageOps, "exif_transpose", stumble)
    with pytest.raises(DataError, match=r"\.png is not a readable image \(division by zero\)"):
        images.batch([0])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_not_called_damaged(monkeypatch, data_folder, number):
    def constructor(folder, train, download):
        raise OSError(number, os.strerror(number), str(folder))

    fake_torchvision(monkeypatch, "MNIST", constructor)
    with pytest.raises(DataError) as caught:
        load("mnist")
    message = str(caught.value)
    assert message.startswith(f"MNIST cannot be put into {data_folder / 'downloads' / 'MNIST'} ")
    assert "LECTURE26_DATA" in message and "delete" not in message


@pytest.mark.parametrize("cache_bytes", [0, data.CACHE_BYTES])
def test_files_are_kept_in_memory_if_they_fit(tmp_path, monkeypatch, cache_bytes):
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    write_folder(tmp_path)
    images = load(tmp_path, image_size=8)
    first = images.batch([3, 0, 3])
    check_protocol(images, 3, 8)
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    if cache_bytes:
        assert torch.equal(images.batch([3, 0, 3])["image"], first["image"])
    else:
        with pytest.raises(DataError, match=r"\.png is not a readable image"):
            images.batch([3])


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("shape",),
            ValueError,
            "name must be one of 'shapes', 'scenes', .*'digits'.*'./photos'; got 'shape'",
        ),
        ((3,), ValueError, "name must be one of .*got 3"),
        (("shapes", "dev"), ValueError, "split must be one of 'train'.*got 'dev'"),
        (("digits", "held_out"), ValueError, "split must be one of .*got 'held_out'"),
        (("mnist", "held_out"), ValueError, "split must be one of .*got 'held_out'"),
        (("fgvc_aircraft", "trainval"), ValueError, "split must be one of .*got 'trainval'"),
        (("shapes", "train", 28), ValueError, "image_size must be one of 32, 64; got 28"),
        (("scenes", "train", 32), ValueError, "image_size must be one of 64; got 32"),
        (("digits", "train", 0), ValueError, "image_size must be at least 1; got 0"),
        (("digits", "train", 32.0), TypeError, "image_size must be an int; got 32.0"),
        (("cifar10", "train", True), TypeError, "image_size must be an int; got True"),
        (("./nowhere",), FileNotFoundError, "there is no folder nowhere"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load(*arguments)


def test_archive_instead_of_folder(tmp_path):
    (tmp_path / "images.tar.xz").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="images.tar.xz is a file.*unpack it"):
        load(tmp_path / "images.tar.xz")


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load(tmp_path)


def test_empty_split(tmp_path):
    write_folder(tmp_path / "train", 3)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"no images for the split 'test' \(.*0 for test\)"):
        load(tmp_path, "test")


def test_bad_split_of_a_folder(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match="split must be one of"):
        load(tmp_path, "held_out")


def test_unreadable_files_are_named(tmp_path):
    write_folder(tmp_path, 5)
    (tmp_path / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (tmp_path / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 of 12 files are not readable images: .*broken.jpg, .*empty.png"):
        load(tmp_path)


def test_truncated_image_is_named_when_read(tmp_path):
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "test", 3)
    write_folder(tmp_path / "val", 3)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    file = tmp_path / "train" / "cat" / "001.png"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    images = load(tmp_path)
    assert images.batch([0])["image"].isfinite().all()
    with pytest.raises(DataError, match=r"cat.001\.png is not a readable image .*mend or delete it"):
        images.batch([0, 1])


def test_sixteen_bits_are_refused(tmp_path):
    write_folder(tmp_path, 3)
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(DataError, match="deep.png has the pixel format .*8 bits"):
        load(tmp_path)


def test_images_beside_classes_are_refused(tmp_path):
    write_folder(tmp_path, 3)
    write_image(tmp_path / "stray.png")
    with pytest.raises(DataError, match="folders of classes, but .*stray.png is in none"):
        load(tmp_path)


def test_index_out_of_range():
    images = load("digits", "test")
    with pytest.raises(IndexError, match=f"got {len(images)}"):
        images.batch([len(images)])


# Real images, where they are


@pytest.fixture
def real_data():
    folder = os.environ.get("LECTURE26_REAL_DATA")
    folder = Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}; set LECTURE26_REAL_DATA to their folder")
    return folder


def test_cifar_photographs_as_a_folder(real_data, tmp_path):
    archive = real_data / "cifar10_jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as files:
        # The first members are enough, and the archive need not be read to its end.
        for _ in range(1500):
            files.extract(files.next(), tmp_path, filter="data")
    images = load(tmp_path / os.listdir(tmp_path)[0], image_size=32)
    check_protocol(images, 3, 32)
    batch = images.batch(range(min(64, len(images))))
    assert batch["image"].std() > 0.3  # photographs, not blank


def test_mnist_as_a_folder(real_data, tmp_path):
    file = real_data / "mnist_test_10k.npz"
    if not file.exists():
        pytest.skip(f"no {file}")
    with np.load(file) as arrays:
        digits, labels = arrays["images"][:300], arrays["labels"][:300]
    for i, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(digit).save(tmp_path / str(label) / f"{i:04}.png")
    images = load(tmp_path, image_size=28)
    check_protocol(images, 1, 28)
    assert images.labels == {"class": tuple("0123456789")}
    everything = np.concatenate([images_of(tmp_path, s, 28)["image"].numpy() for s in SPLITS])
    assert everything.shape == (300, 1, 28, 28)
    pixels = np.rint((everything[:, 0] + 1) * 127.5).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, digits))


@pytest.mark.parametrize("name", ["shapes", "scenes", "shapes_and_scenes", "digits", "folder", *TASKS])
def test_images_are_on_the_cpu_whatever_the_default_device(tmp_path, name):
    write_folder(tmp_path / "pets", count=6)

    def batch():
        images = downstream(name) if name in TASKS else load(tmp_path / "pets" if name == "folder" else name)
        return images.batch([0, 3])

    expected = batch()
    with torch.device("meta"):
        found = batch()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
