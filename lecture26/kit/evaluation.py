"""How good drawn images are: can what was asked for be read in them, and how far are they from real ones?"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lecture26.kit.image_set import ImageSet
from lecture26.kit.readers import Reader, canonical
from lecture26.kit.validation import check_positive_int

BATCH_SIZE = 256
NEIGHBOURS = 3  # of an image, among which recall looks for others
CONFIDENT = 0.9  # a label is read confidently if its class has a higher probability than this


class Reading(NamedTuple):
    """What a reader sees in B images: two dicts by label's name.

    A reader must name a class whatever it is shown, so look at its confidence as well.
    """

    predicted: dict[str, Tensor]  # (B,) int64: the likeliest class
    confidence: dict[str, Tensor]  # (B,) float32: its probability


@torch.no_grad()
def read(reader: Reader, images: Tensor, batch_size: int = BATCH_SIZE) -> Reading:
    """Read every label of some images.

    Args:
        reader: a trained reader.
        images: (B, C, H, W) in [-1, 1], on any device.
        batch_size: images read at once.

    Returns:
        The reading, on the CPU; that of a scene is canonical (see `lecture26.kit.readers.canonical`).

    Raises:
        ValueError: no images, images of a shape that is not the reader's, a value that is not finite.
    """
    outputs = [reader(batch) for batch in _batches(reader, images, batch_size)]
    predicted, confidence = {}, {}
    for name in reader.labels:
        logits = torch.cat([output[name] for output in outputs])  # (B, classes)
        highest = logits.softmax(dim=1).max(dim=1)
        predicted[name], confidence[name] = highest.indices.cpu(), highest.values.cpu()
    return Reading(predicted, confidence)


@torch.no_grad()
def extract_features(reader: Reader, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """The reader's features of some images, for `frechet_distance`.

    `reader`, `images` and `batch_size` are those of `read`, and so is what it raises.

    Returns:
        (B, F) on the CPU.
    """
    return torch.cat([reader.features(batch).cpu() for batch in _batches(reader, images, batch_size)])


def read_right(
    reader: Reader, images: Tensor, wanted: Mapping[str, Tensor], batch_size: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """Which images show what was wanted.

    Args:
        reader: a trained reader.
        images: (B, C, H, W) in [-1, 1], on any device.
        wanted: for some or all of the reader's labels, by name, the class wanted of each image, (B,) int64.
            Those of a scene may be told from either object: they are compared in canonical form (see
            `lecture26.kit.readers.canonical`), in which "shape_1" is of the object on the left, or above.
        batch_size: images read at once.

    Returns:
        For each label wanted (B,) bool, and "all": whether an image has all of them right at once.

    Raises:
        ValueError: as `read`; or nothing wanted, a label that the reader does not know, another number of
            classes than of images, a number that is no class of its label.
    """
    _check_wanted(reader, wanted, len(images))
    predicted = read(reader, images, batch_size).predicted
    right = {name: predicted[name] == classes.cpu() for name, classes in canonical(wanted).items()}
    return right | {"all": torch.stack(list(right.values())).all(dim=0)}


def attribute_accuracy(
    reader: Reader, images: Tensor, wanted: Mapping[str, Tensor], batch_size: int = BATCH_SIZE
) -> dict[str, float]:
    """The share of images that show what was wanted.

    `reader`, `images`, `wanted` and `batch_size` are those of `read_right`, and so is what it raises.

    Returns:
        For each label wanted the share of images, in [0, 1]; "all": of images with all of them right.
    """
    right = read_right(reader, images, wanted, batch_size)
    return {name: values.float().mean().item() for name, values in right.items()}


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The Frechet distance between two sets of features, taken as samples of two normal distributions.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), computed in float64.

    It is biased: two samples of the same distribution are not at distance 0, and the fewer they are, the
    farther apart. So compare only distances at the same number of samples, and with `real_against_real`.

    Args:
        features_a: (N, F) of one reader, N > F.
        features_b: (M, F) of the same reader, M > F.

    Returns:
        The (squared) distance, in the units of the squared features.

    Raises:
        ValueError: other shapes, too few samples to estimate a covariance, a value that is not finite.

    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash
    equilibrium", equation 6, where the features are those of Inception v3; on the bias, Chong and Forsyth
    2020, "Effectively unbiased FID and Inception score and where to find them".
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2:
            raise ValueError(f"{name} must be of shape (samples, features); got {tuple(features.shape)}")
    _check_finite(features_a=features_a, features_b=features_b)
    (num_a, size_a), (num_b, size_b) = features_a.shape, features_b.shape
    if size_a != size_b:
        raise ValueError(f"features_a and features_b must be of one length; got {size_a} and {size_b}")
    if min(num_a, num_b) <= size_a:
        raise ValueError(
            f"the covariance of {size_a} features takes at least {size_a + 1} samples; "
            f"got {num_a} and {num_b}"
        )

    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    # On the CPU, since some devices have no float64.
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=(size_a,)).set_dtype(
        torch.float64
    )
    metric.update(features_a.detach().cpu().double(), real=True)
    metric.update(features_b.detach().cpu().double(), real=False)
    return metric.compute().item()


def frechet_distance_error(features_real: Tensor, features_drawn: Tensor, group: int) -> float:
    """The standard error of a Fréchet distance: that of drawing anew, while the real images stay the same.

    Each group of what was drawn is left out once, and the distances are compared (the jackknife).

    Args:
        features_real, features_drawn: as `frechet_distance` takes them.
        group: how many rows of features_drawn are left out together; a number of which it has a multiple.

    Returns:
        In the units of the distance.

    Raises:
        ValueError: as `frechet_distance`.

    Source: Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 3.
    """
    groups = features_drawn.split(group)
    distances = [
        frechet_distance(features_real, torch.cat(groups[:left_out] + groups[left_out + 1 :]))
        for left_out in range(len(groups))
    ]
    # (G - 1) / G sum_g (d_g - mean d)^2
    spread = torch.tensor(distances, dtype=torch.float64).var(correction=0).item()
    return ((len(groups) - 1) * spread) ** 0.5


def recall(features_real: Tensor, features_drawn: Tensor) -> float:
    """How much of the variety of real images is found among drawn ones.

    Around each drawn image lies a ball that reaches to its third-nearest drawn neighbour; all balls together
    are where the model draws. Recall is the share of the real images that lie inside. With the arguments
    exchanged it is the precision: the share of the drawn images that lie where real ones do.

    Args:
        features_real: (N, F) of one reader.
        features_drawn: (M, F) of the same reader, M > 3.

    Returns:
        A share, in [0, 1]; like the Frechet distance it depends on N and M.

    Raises:
        ValueError: other shapes, numbers that are not finite, or too few drawn images.

    Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models",
    section 2, where the features are those of VGG-16, and k = 3.
    """
    if features_real.ndim != 2 or features_real.shape[1:] != features_drawn.shape[1:]:
        raise ValueError(
            "features_real and features_drawn must be of shapes (N, F) and (M, F); "
            f"got {tuple(features_real.shape)} and {tuple(features_drawn.shape)}"
        )
    if len(features_drawn) <= NEIGHBOURS:
        raise ValueError(
            f"features_drawn must be of more than {NEIGHBOURS} images, as many as the neighbours looked for; "
            f"got {len(features_drawn)}"
        )
    _check_finite(features_real=features_real, features_drawn=features_drawn)
    # On the CPU, since some devices have no float64.
    real, drawn = features_real.detach().cpu().double(), features_drawn.detach().cpu().double()
    # The nearest "neighbour" of each image is itself.
    radii = torch.cdist(drawn, drawn).kthvalue(NEIGHBOURS + 1, dim=1).values  # (M,)
    return (torch.cdist(real, drawn) <= radii).any(dim=1).double().mean().item()


def _check_finite(**features: Tensor) -> None:
    """Raise ValueError, by the argument's name, if a number is none or infinite."""
    for name, values in features.items():
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite; got nan or infinity")


def real_against_real(reader: Reader, images: ImageSet, num_samples: int) -> float:
    """The Fréchet distance of a perfect model: between a set's first num_samples images and as many more.

    The reader is one of such images. Raises ValueError if there are too few images, or too few samples (see
    `frechet_distance`), TypeError if num_samples is not an int.
    """
    return frechet_distance(*_two_real_sets(reader, images, num_samples))


def sample_quality(reader: Reader, samples: Tensor, images: ImageSet) -> dict[str, float]:
    """Compare what a model drew with real images.

    Args:
        reader: a trained reader of such images.
        samples: N images that the model drew, (N, C, H, W) in [-1, 1].
        images: at least 2 N real images of the same distribution, which the model has not seen.

    Returns:
        "frechet_distance": from the samples to the first N images;
        "frechet_distance_real": from the next N images to them, the distance of a perfect model;
        "recall", "recall_real": of the first N images in the samples, and in the next N images;
        "mean_confidence": with which labels are read, over all labels and samples;
        "confident_share": of the samples on which every label is read with over 90% confidence.

    Raises:
        ValueError: as `read`, `frechet_distance` and `real_against_real`.
    """
    reference, others = _two_real_sets(reader, images, len(samples))
    drawn = extract_features(reader, samples)
    confidence = torch.stack(list(read(reader, samples).confidence.values()))  # (labels, N)
    return {
        "frechet_distance": frechet_distance(reference, drawn),
        "frechet_distance_real": frechet_distance(reference, others),
        "recall": recall(reference, drawn),
        "recall_real": recall(reference, others),
        "mean_confidence": confidence.mean().item(),
        "confident_share": (confidence > CONFIDENT).all(dim=0).float().mean().item(),
    }


def _batches(reader: Reader, images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The images, in batches on the reader's device."""
    check_positive_int("batch_size", batch_size)
    if len(images) == 0:
        raise ValueError(f"images must be at least one; got shape {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images must be finite; got nan or infinity")
    device = next(reader.parameters()).device
    return (batch.to(device) for batch in images.split(batch_size))


def _two_real_sets(reader: Reader, images: ImageSet, num_samples: int) -> tuple[Tensor, Tensor]:
    """The features of the set's first N images, and of its next N."""
    check_positive_int("num_samples", num_samples)
    if 2 * num_samples > len(images):
        raise ValueError(
            f"num_samples must be at most {len(images) // 2}, half of the set; got {num_samples}"
        )
    # Read in batches, so that a large set is never in memory at once.
    features = [
        extract_features(reader, images.batch(part)["image"])
        for part in torch.arange(2 * num_samples).split(BATCH_SIZE)
    ]
    return torch.cat(features).split(num_samples)


def _check_wanted(reader: Reader, wanted: Mapping[str, Tensor], num_images: int) -> None:
    if not wanted or not set(wanted) <= set(reader.labels):
        raise ValueError(
            f"wanted must name labels of {', '.join(map(repr, reader.labels))}; "
            f"got {', '.join(map(repr, wanted)) or 'none'}"
        )
    for name, classes in wanted.items():
        if classes.shape != (num_images,) or classes.dtype != torch.int64:
            raise ValueError(
                f"wanted[{name!r}] must be an int64 tensor of shape ({num_images},), one class per image; "
                f"got {classes.dtype} of shape {tuple(classes.shape)}"
            )
        count = len(reader.labels[name])
        outside = classes[(classes < 0) | (classes >= count)]
        if len(outside):
            raise ValueError(f"wanted[{name!r}] must be in 0, ..., {count - 1}; got {outside[0].item()}")
