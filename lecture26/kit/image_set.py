"""What every data set of the course can do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class ImageSet(ABC):
    """Images with labels, read by index; also a map-style data set for torch's DataLoader.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        image_size: height and width in pixels.
        labels: what each label's numbers mean: its name -> the names of its classes.
    """

    channels: int
    image_size: int
    labels: dict[str, tuple[str, ...]]

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def batch(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        """Read B images.

        Args:
            indices: B integers in 0, ..., len - 1, in any order, repeated or not.

        Returns:
            "image": (B, C, H, W) float32 in [-1, 1]; for each label's name: (B,) int64.

        Raises:
            TypeError: `indices` is not a flat sequence of integers.
            IndexError: an index is out of range.
        """

    def check(self) -> None:  # noqa: B027 - what is made by code or held in memory cannot be damaged
        """Look at every image, which takes a while for files; DataError names all that cannot be read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The dict of `batch` for one image, without the batch axis."""
        return {name: values[0] for name, values in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The items of a batch, read at once; torch's DataLoader asks for this."""
        batch = self.batch(indices)
        return [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]

    def _checked(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """`indices` as an int64 tensor on the CPU, (B,)."""
        tensor = torch.as_tensor(indices, device="cpu")
        if tensor.numel() == 0:
            tensor = tensor.long()
        is_integer = tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if tensor.ndim != 1 or not is_integer:
            raise TypeError(f"indices must be a flat sequence of integers; got {indices!r}")
        outside = (tensor < 0) | (tensor >= len(self))
        if outside.any():
            raise IndexError(f"index must be in 0, ..., {len(self) - 1}; got {tensor[outside][0].item()}")
        return tensor.long()
