"""Every data set of the course, by name or by folder, with the interface of `ImageSet`."""

import hashlib
import math
import os
import warnings
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from lecture26.kit.files import NOT_WRITABLE
from lecture26.kit.image_set import ImageSet
from lecture26.kit.paths import OWN_FOLDER, expanded, find
from lecture26.kit.progress import progress_bar
from lecture26.kit.shapes import Scenes, Shapes, ShapesAndScenes
from lecture26.kit.validation import check_choice, check_positive_int

SPLITS = ("train", "validation", "test")
DEFAULT_IMAGE_SIZE = 32
DEFAULT_LARGE_IMAGE_SIZE = 64  # of photographs that need the detail
CACHE_BYTES = 512 * 2**20
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *((".avif",) if features.check("avif") else ()),  # Pillow may have been built without
)
GREY_MODES = ("1", "L", "LA")
EIGHT_BIT_MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError)
DAMAGE_ERRORS = (RuntimeError, OSError, EOFError, ValueError, KeyError, AssertionError, TarError, zlib.error)
MEND_IMAGES = (
    "mend or delete it (a training that has begun wants as many images as before: there, put a copy of "
    "another in its place)"
)
LISTED = 50  # unreadable files that are named one by one
AIRCRAFT_BANNER_HEIGHT = 20  # a line of text at the bottom of each aircraft photograph


class DataError(RuntimeError):
    """Images are missing or damaged; the message says what to do."""


class DataWarning(UserWarning):
    """Images can be used, but perhaps not as they were meant."""


def load(name: str | Path, split: str = "train", image_size: int | None = None) -> ImageSet:
    """Open one split of a data set.

    Args:
        name: "shapes", "scenes", "shapes_and_scenes" (half of each), "digits" (scikit-learn's, 8x8 pixels),
            "mnist", "fashion_mnist", "cifar10", "fgvc_aircraft" (these four are downloaded to data/downloads
            when first asked for), or a folder of images: a Path, or a str with a separator such as
            "./photos". A folder holds train/, validation/ (or val/) and test/, or at least train/; in each of
            these, or in the folder itself where it has none, images lie in one folder per class, or directly.
            Folders and files may be links. Transparent images are seen on white.
        split: "train", "validation" or "test"; shapes and scenes have "held_out" too. Where a set brings no
            validation split, a tenth of its training images is set aside; where a folder brings no test
            split, another tenth.
        image_size: height and width in pixels: 32 or 64 for shapes, 64 with scenes, any for the others, whose
            images are resized and cropped at the centre. None: 64 with scenes and fgvc_aircraft, else 32.

    Returns:
        The images, whose labels are {"class": names} but for shapes, scenes and folders without classes.

    Raises:
        ValueError, TypeError: an unknown name, split or size.
        FileNotFoundError, NotADirectoryError: no such folder.
        DataError: a download that failed or is damaged, a folder without images, unreadable files.

    Warns:
        DataWarning: a folder has a single class, or files that are left out, since they are no images.
    """
    if isinstance(name, Path) or (
        isinstance(name, str) and any(s and s in name for s in (os.sep, os.altsep))
    ):
        return _load_folder(expanded(name), split, image_size)
    if name not in LOADERS:
        raise ValueError(
            f"name must be one of {', '.join(map(repr, LOADERS))}, or a folder given as a Path or with a "
            f"separator, such as './photos'; got {name!r}"
        )
    return LOADERS[name](split, image_size)


def check_images(image_sets: Iterable[ImageSet]) -> None:
    """Look at every image of some sets before they are used; DataError names all that cannot be read."""
    errors = []
    for images in image_sets:
        try:
            images.check()
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError(" ".join(errors))


class PixelSet(ImageSet):
    """Images with 8 bits per channel and at most one label, "class"."""

    def __init__(self, channels: int, image_size: int, targets: torch.Tensor, class_names: Sequence[str]):
        """Describe a set of N images.

        Args:
            channels: 1 (grey) or 3 (RGB).
            image_size: height and width in pixels.
            targets: (N,) int64, the class of each image; without classes, only their number counts.
            class_names: the name of each class; none if the images have no label.
        """
        self.channels, self.image_size, self._targets = channels, image_size, targets
        self.labels = {"class": tuple(class_names)} if class_names else {}

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        indices = self._checked(indices)
        image = self._pixels(indices).float().div_(127.5).sub_(1)
        return {"image": image} | {name: self._targets[indices] for name in self.labels}

    @abstractmethod
    def _pixels(self, indices: torch.Tensor) -> torch.Tensor:
        """Images as (B, C, H, W) uint8."""


class StoredImages(PixelSet):
    """Images kept in memory, (N, C, H, W) uint8: resized if all fit in CACHE_BYTES, else as they came."""

    def __init__(
        self, pixels: torch.Tensor, targets: torch.Tensor, class_names: Sequence[str], image_size: int
    ):
        """Keep N images, resized if they have another size.

        Args:
            pixels: (N, C, H, W) uint8, H = W.
            targets: (N,) int64, the class of each image.
            class_names: the name of each class; none if the images have no label.
            image_size: height and width in pixels that the images get.
        """
        super().__init__(pixels.shape[1], image_size, targets, class_names)
        fits = len(pixels) * self.channels * image_size**2 <= CACHE_BYTES
        self._stored = self._resized(pixels) if fits else pixels

    def _pixels(self, indices: torch.Tensor) -> torch.Tensor:
        return self._resized(self._stored[indices])

    def _resized(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-1] == self.image_size:
            return pixels
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        return resize(pixels, [self.image_size] * 2, InterpolationMode.BICUBIC, antialias=True)


class FileImages(PixelSet):
    """Images read from their files when first asked for, and kept in memory if all fit in CACHE_BYTES."""

    def __init__(
        self,
        files: Sequence[Path],
        targets: Sequence[int],
        class_names: Sequence[str],
        channels: int,
        image_size: int,
        banner_height: int = 0,
    ):
        """Describe a set of N files; none is opened yet.

        Args:
            files: N image files.
            targets: the class of each image; without classes, any N ints.
            class_names: the name of each class; none if the images have no label.
            channels: 1 (grey) or 3 (RGB), to which the images are converted.
            image_size: height and width in pixels to which they are resized and cropped at the centre.
            banner_height: rows of pixels that are cut off at the bottom of each file's image first.
        """
        super().__init__(channels, image_size, torch.tensor(targets, device="cpu"), class_names)
        self._files, self._banner_height = files, banner_height
        self._image_shape = (channels, image_size, image_size)
        self._cache: torch.Tensor | None = None
        if len(files) * math.prod(self._image_shape) <= CACHE_BYTES:
            # The system hands out this memory page by page, as the images are written.
            self._cache = torch.empty(len(files), *self._image_shape, dtype=torch.uint8, device="cpu")
            self._is_cached = torch.zeros(len(files), dtype=torch.bool, device="cpu")

    def _pixels(self, indices: torch.Tensor) -> torch.Tensor:
        if self._cache is None:
            pixels = torch.empty(len(indices), *self._image_shape, dtype=torch.uint8, device="cpu")
            for position, i in enumerate(indices.tolist()):
                pixels[position] = self._decode(i)
            return pixels
        for i in indices[~self._is_cached[indices]].tolist():
            self._cache[i] = self._decode(i)
            self._is_cached[i] = True
        return self._cache[indices]

    def check(self) -> None:
        unreadable = {}
        for i in progress_bar(range(len(self)), "looking at all images"):
            try:
                self._pixels(torch.tensor([i]))
            except DataError as error:
                unreadable[self._files[i]] = error.__context__
        _raise_if_any(unreadable, len(self))

    def _decode(self, index: int) -> torch.Tensor:
        file = self._files[index]
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)
                image = _on_white(image).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # what Pillow raises depends on the format, and on what is damaged
            raise DataError(f"{file} is not a readable image ({error}): {MEND_IMAGES}") from None
        if self._banner_height:
            image = image.crop((0, 0, image.width, image.height - self._banner_height))
        image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, 3)
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    """What is seen of an image on a white page, where it is transparent; else the image itself."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _raise_if_any(unreadable: Mapping[Path, Exception], count: int) -> None:
    """Raise DataError if some of `count` files are not readable, naming up to LISTED of them, and why."""
    if not unreadable:
        return
    named = [
        str(file) if isinstance(error, UnidentifiedImageError) else f"{file} ({error})"
        for file, error in unreadable.items()
    ]
    more = f", and {len(named) - LISTED} more" if len(named) > LISTED else ""
    raise DataError(
        f"{len(named)} of {count} files are not readable images: {', '.join(named[:LISTED])}{more}. "
        f"Each of these: {MEND_IMAGES}"
    )


def _image_size(image_size: int | None, default: int = DEFAULT_IMAGE_SIZE) -> int:
    if image_size is None:
        return default
    check_positive_int("image_size", image_size)
    return image_size


def _load_digits(split: str, image_size: int | None) -> ImageSet:
    from sklearn.datasets import load_digits

    check_choice("split", split, SPLITS)
    digits = load_digits()
    targets = torch.from_numpy(digits.target).long()
    pixels = torch.from_numpy(digits.images * (255 / 16)).round().byte()[:, None]  # (1797, 1, 8, 8)
    # Of each class, in the order of its images, every sixth is for validation and every sixth for test.
    rank = torch.nn.functional.one_hot(targets).cumsum(dim=0).gather(1, targets[:, None])[:, 0] % 6
    chosen = {"train": rank > 1, "validation": rank == 0, "test": rank == 1}[split]
    names = [str(digit) for digit in range(10)]
    return StoredImages(pixels[chosen], targets[chosen], names, _image_size(image_size))


def _load_torchvision(class_name: str, split: str, image_size: int | None) -> ImageSet:
    """MNIST, FashionMNIST or CIFAR10; the last tenth of its training images is the validation split."""
    check_choice("split", split, SPLITS)
    image_size = _image_size(image_size)
    data_set = _download(class_name, train=split != "test")
    pixels, targets = torch.as_tensor(data_set.data), torch.as_tensor(data_set.targets)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (N, C, H, W)
    if split != "test":
        num_train = len(pixels) - len(pixels) // 10
        kept = slice(num_train) if split == "train" else slice(num_train, None)
        pixels, targets = pixels[kept], targets[kept]
    return StoredImages(pixels, targets, data_set.classes, image_size)


def _load_aircraft(split: str, image_size: int | None) -> ImageSet:
    """FGVC-Aircraft, its 100 variants, in the splits it comes with."""
    check_choice("split", split, SPLITS)
    image_size = _image_size(image_size, DEFAULT_LARGE_IMAGE_SIZE)
    data_set = _download("FGVCAircraft", split="val" if split == "validation" else split)
    files = [Path(file) for file in data_set._image_files]
    absent = [file for file in files if not file.exists()]
    if absent:
        raise DataError(f"{absent[0]} is missing: {_delete_and_repeat('FGVCAircraft')}")
    return FileImages(files, data_set._labels, data_set.classes, 3, image_size, AIRCRAFT_BANNER_HEIGHT)


def _download(class_name: str, **options):
    """One of torchvision's data sets, downloaded if it is not there yet."""
    import torchvision

    try:
        return getattr(torchvision.datasets, class_name)(_folder_of(class_name), download=True, **options)
    except (*NETWORK_ERRORS, *DAMAGE_ERRORS) as error:
        # torchvision lets some network errors through and wraps others in a RuntimeError.
        is_offline = isinstance(error, NETWORK_ERRORS) or "urlopen" in str(error)
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        is_not_writable = isinstance(error, OSError) and error.errno in NOT_WRITABLE
    folder = _folder_of(class_name)
    if is_not_writable:
        raise DataError(f"{class_name} cannot be put into {folder} ({reason}). {OWN_FOLDER}")
    if not is_offline:
        raise DataError(f"{class_name} is incomplete or damaged ({reason}): {_delete_and_repeat(class_name)}")
    leftover = f"; what is in {folder} is incomplete" if any(f.is_file() for f in folder.rglob("*")) else ""
    raise DataError(
        f"{class_name} could not be downloaded ({reason}){leftover}. Connect to the network and try again, "
        f"or copy the folder {folder} from a computer that has it. Without a network, load 'shapes', "
        "'scenes', 'digits' or a folder of images."
    )


def _folder_of(class_name: str) -> Path:
    return find("downloads", class_name)[0]


def _delete_and_repeat(class_name: str) -> str:
    return f"delete the folder {_folder_of(class_name)} and load the set again to repeat the download"


def _load_folder(folder: Path, split: str, image_size: int | None) -> ImageSet:
    check_choice("split", split, SPLITS)
    image_size = _image_size(image_size)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, not a folder of images; unpack it if it is an archive")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (from here: {folder.absolute()})")
    files, left_out = _files_by_split(folder)
    everything = [file for members in files.values() for file in members]
    told = _counted(left_out)
    if not everything:
        raise DataError(
            f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})" + (f", but {told}" if told else "")
        )
    if not files[split]:
        counts = ", ".join(f"{len(members)} for {name}" for name, members in files.items())
        raise DataError(f"{folder} has no images for the split {split!r} ({counts})")
    class_names = sorted({parts[0] for _, parts in everything if len(parts) > 1})
    unclassed = [file for file, parts in everything if len(parts) == 1]
    if class_names and unclassed:
        raise DataError(f"{folder} has folders of classes, but {unclassed[0]} is in none of them")
    channels = _common_channels([file for file, _ in everything])
    if told:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        warnings.warn(f"{folder}: left out {told}; what is read are {suffixes}", DataWarning, stacklevel=3)
    if len(class_names) == 1:
        warnings.warn(f"{folder} has a single class, {class_names[0]!r}", DataWarning, stacklevel=3)
    number = {class_name: i for i, class_name in enumerate(class_names)}
    targets = [number.get(parts[0], 0) for _, parts in files[split]]
    return FileImages([file for file, _ in files[split]], targets, class_names, channels, image_size)


def _counted(files: Sequence[Path]) -> str:
    """How many files there are of each suffix, such as '2 .heic, 1 .txt'."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _files_by_split(folder: Path) -> tuple[dict[str, list[tuple[Path, tuple[str, ...]]]], list[Path]]:
    """The image files of each split, each with the parts of its path inside the split's folder, sorted.

    Also the files that are left out, of all splits together.
    """
    folders = {entry.name: entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
    # A class may be called "train" as well, so that these are splits only if they are all there is.
    has_splits = "train" in folders and set(folders) <= {*SPLITS, "val"}
    named_like_splits = {name for name in folders if name.lower() in {*SPLITS, "val", "valid"}}
    if not has_splits and {name.lower() for name in named_like_splits} > {"train"}:
        raise DataError(
            f"{folder} has folders named like splits ({', '.join(sorted(named_like_splits))}) that cannot be "
            f"taken for them: splits are called {', '.join(SPLITS)} (or val), with no other folder beside "
            f"them; got {', '.join(sorted(folders))}. Rename or move some of them"
        )
    if not has_splits:
        folders = {"train": folder}
    if {"val", "validation"} <= set(folders):
        raise DataError(f"{folder} has val and validation, which are the same split: join them")
    if "val" in folders:
        folders["validation"] = folders["val"]
    files = {split: [] for split in SPLITS}
    left_out = []
    if has_splits:
        left_out += [entry for entry in folder.iterdir() if not entry.is_dir() and entry.name[0] != "."]
    for split in SPLITS:
        if split in folders:
            files[split], others = _image_files(folders[split])
            left_out += others
    # What has no folder of its own gets a tenth of the training images.
    for tenth, split in enumerate(SPLITS[1:]):
        if split not in folders:
            files[split] = [entry for entry in files["train"] if _tenth(entry[1]) == tenth]
            files["train"] = [entry for entry in files["train"] if _tenth(entry[1]) != tenth]
    return files, left_out


def _image_files(folder: Path) -> tuple[list[tuple[Path, tuple[str, ...]]], list[Path]]:
    """The image files in a folder and those in it, linked ones too, with the parts of their paths, sorted.

    Also the files left out, which have other suffixes. What is hidden, begins with a dot, counts as absent.

    Raises:
        OSError: if a folder cannot be read.
        DataError: if there is a link to nothing.
    """
    found, left_out = [], []
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(path).absolute()
        above = {place.resolve() for place in (here, *here.parents)}
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and Path(path, name).resolve() not in above  # a circle
        ]
        for name in files:
            file = Path(path, name)
            if name[0] == ".":
                continue
            if not file.exists():
                raise DataError(f"{file} is a link to nothing: mend or delete it")
            if file.suffix.lower() in IMAGE_SUFFIXES:
                found.append((file, file.relative_to(folder).parts))
            else:
                left_out.append(file)
    return sorted(found, key=lambda entry: entry[1]), left_out


def _raise(error: OSError) -> None:
    raise error


def _tenth(parts: tuple[str, ...]) -> int:
    """A number of 0, ..., 9 that depends on the path alone, so that new files move no old one."""
    return int.from_bytes(hashlib.sha256(os.fsencode("/".join(parts))).digest()[:8]) % 10


def _common_channels(files: Sequence[Path]) -> int:
    """1 if all files are grey, else 3; only their headers are read."""
    modes, unreadable = set(), {}
    for file in files:
        try:
            with Image.open(file) as image:
                mode = image.mode
        except Exception as error:  # what Pillow raises depends on the format, and on what is damaged
            unreadable[file] = error
            continue
        if mode not in EIGHT_BIT_MODES:
            raise DataError(f"{file} has the pixel format {mode!r}: convert it to 8 bits per channel")
        modes.add(mode)
    if unreadable:  # others may be damaged further on, and all shall be named at once
        FileImages(files, [0] * len(files), (), 3, DEFAULT_IMAGE_SIZE).check()
    _raise_if_any(unreadable, len(files))
    return 1 if modes <= set(GREY_MODES) else 3


def _torchvision_loader(class_name: str) -> Callable[[str, int | None], ImageSet]:
    return lambda split, image_size: _load_torchvision(class_name, split, image_size)


LOADERS: dict[str, Callable[[str, int | None], ImageSet]] = {
    "shapes": Shapes,
    "scenes": Scenes,
    "shapes_and_scenes": ShapesAndScenes,
    "digits": _load_digits,
    "mnist": _torchvision_loader("MNIST"),
    "fashion_mnist": _torchvision_loader("FashionMNIST"),
    "cifar10": _torchvision_loader("CIFAR10"),
    "fgvc_aircraft": _load_aircraft,
}
