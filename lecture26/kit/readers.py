"""Classifiers that read a picture's labels: the judges of what a model draws."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lecture26.kit.shapes import OPPOSITE_RELATIONS, RELATIONS
from lecture26.kit.validation import check_positive_int

GROUPS = 8  # of channels that are normalised together

# A scene can be told in two ways: "A left of B" and "B right of A" are the same picture.
CANONICAL_RELATIONS = ("left of", "above")


class Reader(nn.Module):
    """A small convolutional network with one output for each label of a data set.

    Its stages halve the picture; what is left is read as a whole, place by place, so that the objects of a
    scene can be told apart. Of a scene it reads the canonical description (see `canonical`).

    Attributes:
        labels: what each label's numbers mean: its name -> the names of its classes.
        num_features: F, the length of the features that `features` returns.
    """

    def __init__(
        self,
        labels: Mapping[str, Sequence[str]],
        channels: int,
        image_size: int,
        widths: Sequence[int] = (32, 64, 96),
        patch_size: int = 1,
        num_features: int = 48,
    ):
        """Make an untrained network.

        Args:
            labels: as an ImageSet has them.
            channels: of the images.
            image_size: height and width in pixels, a multiple of patch_size * 2 ** len(widths).
            widths: the channels of each stage, multiples of GROUPS.
            patch_size: squares of so many pixels across are taken as one; 2 is faster at 64 pixels.
            num_features: length of the last hidden layer.

        Raises:
            ValueError: no labels, or a size that does not fit.
            TypeError: a size is not an int.
        """
        super().__init__()
        check_positive_int("channels", channels)
        check_positive_int("image_size", image_size)
        check_positive_int("patch_size", patch_size)
        check_positive_int("num_features", num_features)
        if not labels:
            raise ValueError("labels must name at least one label; got none: a reader needs labelled images")
        if not widths or any(width % GROUPS for width in widths):
            raise ValueError(f"widths must be multiples of {GROUPS}; got {tuple(widths)}")
        factor = patch_size * 2 ** len(widths)
        if image_size % factor:
            raise ValueError(
                f"image_size must be a multiple of {factor} for patches of {patch_size} and "
                f"{len(widths)} stages; got {image_size}"
            )
        self.labels = {name: tuple(classes) for name, classes in labels.items()}
        self.num_features = num_features
        self._image_shape = (channels, image_size, image_size)
        stages, width_before = [nn.PixelUnshuffle(patch_size)], channels * patch_size**2
        for width in widths:
            stages += [_layer(width_before, width, stride=2), _layer(width, width, stride=1)]
            width_before = width
        self.stages = nn.Sequential(*stages)
        places = (image_size // factor) ** 2
        self.summary = nn.Sequential(nn.Flatten(), nn.Linear(width_before * places, num_features), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(num_features, len(classes)) for name, classes in self.labels.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """What the outputs are computed from, for the Frechet distance.

        Args:
            images: (B, C, H, W) in [-1, 1], of the reader's channels and size.

        Returns:
            (B, F), F = `num_features`.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != self._image_shape:
            raise ValueError(
                f"images must be of shape (B, {', '.join(map(str, self._image_shape))}) for this reader; "
                f"got {tuple(images.shape)}"
            )
        return self.summary(self.stages(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits (B, classes) of each label, by its name, for images (B, C, H, W) in [-1, 1].

        Raises ValueError on images of another shape than the reader's.
        """
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    # Normalised image by image, so that an image is read the same whatever others are in the batch.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1),
        nn.GroupNorm(GROUPS, out_channels),
        nn.SiLU(),
    )


def canonical(attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Describe each scene from the object that is on the left, or above.

    A caption may begin with either object, and the picture does not show which: "A right of B" is drawn like
    "B left of A", "A below B" like "B above A". So only one of the two can be read from a picture: the one
    whose relation is in CANONICAL_RELATIONS. To get there from the other, the objects trade places.

    Args:
        attributes: class numbers (B,) by label. A description of other data than scenes comes back as it is;
            that of a scene may lack labels, if what it says of one object it says of the other as well.

    Returns:
        The class numbers of the canonical description, by label.

    Raises:
        ValueError: without the other object or the relation, the canonical description is not determined.
    """
    partners = {name: _other_object(name) for name in attributes if name.endswith(("_1", "_2"))}
    if not partners and "relation" not in attributes:
        return dict(attributes)
    missing = sorted(({"relation"} | set(partners.values())) - set(attributes))
    if missing:
        raise ValueError(
            "which object of a scene comes first cannot be told without "
            f"{', '.join(map(repr, missing))}; got {', '.join(map(repr, attributes))}"
        )
    relation = attributes["relation"]
    is_canonical, opposite = (table.to(relation.device)[relation] for table in (_IS_CANONICAL, _OPPOSITE))
    turned = {"relation": opposite} | {name: attributes[partner] for name, partner in partners.items()}
    return {
        name: torch.where(is_canonical, values, turned[name]) if name in turned else values
        for name, values in attributes.items()
    }


_IS_CANONICAL = torch.tensor([relation in CANONICAL_RELATIONS for relation in RELATIONS])
_OPPOSITE = torch.tensor([RELATIONS.index(OPPOSITE_RELATIONS[relation]) for relation in RELATIONS])


def _other_object(name: str) -> str:
    """'colour_2' for 'colour_1', and the other way round."""
    return name[:-1] + {"1": "2", "2": "1"}[name[-1]]
