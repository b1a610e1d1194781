"""What nobody asked for: how large the shapes are that a guidance draws, and what that does to distances."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lecture26.kit.evaluation import (
    extract_features,
    frechet_distance,
    frechet_distance_error,
    read,
    recall,
)
from lecture26.kit.image_set import ImageSet
from lecture26.kit.readers import Reader

NUM_WITHIN = 192  # images with a large shape, for the distance within one size
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.86, 0.93, 0.98)  # of large shapes among real images


class Sizes:
    """Real images with a label "size", with which drawn ones are compared, all of them and the large ones.

    Args:
        reader: a trained reader of the images.
        images: the real ones; the first `num_samples` are the reference, the others are compared with it.
        num_samples: of a comparison of all sizes.
        num_within: of a comparison of large shapes alone; well below half of `num_samples`.
    """

    def __init__(self, reader: Reader, images: ImageSet, num_samples: int, num_within: int):
        self._reader, self._images = reader, images
        self._num_samples, self._num_within = num_samples, num_within
        self._large = images.labels["size"].index("large")
        is_large = images.attributes(range(len(images)))["size"] == self._large
        self._first_large = is_large[:num_samples].nonzero().flatten()
        self._other_large = is_large[num_samples:].nonzero().flatten() + num_samples
        self._other_small = (~is_large[num_samples:]).nonzero().flatten() + num_samples
        self._reference = self._features_of(torch.arange(num_samples))  # (num_samples, F)
        self._reference_large = self._reference[self._first_large[:num_within]]  # (num_within, F)

    def of(self, samples: Tensor, group: int) -> dict:
        """Say of drawn images (num_samples, C, H, W) how large their shapes are, and how sure a distance.

        Returns:
            "share_large", as the reader sees it; "within_large", the "frechet_distance" and "recall" of the
            first `num_within` large ones against as many real large ones, None where there are too few;
            "contrast_large", the mean standard deviation of a large one, None where there is none;
            "frechet_distance_error", what `frechet_distance_error` says for groups of that size.
        """
        shows_large = read(self._reader, samples).predicted["size"] == self._large
        large = samples[shows_large][: self._num_within]
        enough = len(large) == self._num_within
        return {
            "share_large": shows_large.double().mean().item(),
            "within_large": _compare(self._reference_large, self._features(large)) if enough else None,
            "contrast_large": _contrast(samples[shows_large]) if len(large) else None,
            "frechet_distance_error": frechet_distance_error(self._reference, self._features(samples), group),
        }

    def of_real(self, shares: Sequence[float] = SHARES) -> dict:
        """Say the same of real images, with chosen shares of large shapes: the control.

        Returns:
            "real", for each share "share_large", "frechet_distance" and "recall" of as many real images
            against the reference; "within_large_real" and "contrast_large_real", as `of` says them.
        """
        real = []
        for share in shares:
            count = round(share * self._num_samples)
            chosen = [self._other_large[:count], self._other_small[: self._num_samples - count]]
            compared = _compare(self._reference, self._features_of(torch.cat(chosen)))
            real.append({"share_large": share} | compared)
        others = self._features_of(self._other_large[: self._num_within])
        return {
            "real": real,
            "within_large_real": _compare(self._reference_large, others),
            "contrast_large_real": _contrast(self._images.batch(self._first_large)["image"]),
        }

    def _features_of(self, indices: Tensor) -> Tensor:
        return self._features(self._images.batch(indices)["image"])

    def _features(self, pictures: Tensor) -> Tensor:
        return extract_features(self._reader, pictures)


def _compare(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """ "frechet_distance" and "recall" of features drawn (M, F) against real ones (N, F)."""
    return {"frechet_distance": frechet_distance(real, drawn), "recall": recall(real, drawn)}


def _contrast(pictures: Tensor) -> float:
    """The mean over pictures (B, C, H, W) of the standard deviation of all numbers of one."""
    return pictures.flatten(1).std(dim=1).mean().item()
