"""The backbone of chapter 08: a small Vision Transformer that has learned to name photographs."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, mse_loss, pad

from lecture26.kit.image_set import ImageSet
from lecture26.kit.processes import process_state
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes.recipe import Recipe, register
from lecture26.recipes.trained import load_model

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue, as ITU-R BT.601 has them


@dataclass(frozen=True, kw_only=True)
class NamingRecipe(Recipe):
    """A network that learns to name the classes of an image folder.

    It sees no image twice in the same way: each is mirrored or not, moved, and, as the settings say,
    tinted and hidden in part.

    Attributes:
        num_classes: of the data; taken from them when training begins.
        smoothing: the share of probability that the targets spread over all classes.
        erase: the share of images that lose a square.
        tint: how far brightness, contrast and saturation may depart from 1.
    """

    num_classes: int = 0
    smoothing: float = 0.1
    erase: float = 0.0
    tint: float = 0.0

    def fitted_to(self, images: ImageSet) -> "NamingRecipe":
        if "class" not in images.labels:
            raise ValueError(f"data must be images in one folder per class; {self.data!r} has no classes")
        return replace(super().fitted_to(images), num_classes=len(images.labels["class"]))

    def draw(self, images: ImageSet, random: SampleDraws) -> dict[str, Tensor]:
        batch = images.batch(random.integers(len(images)))
        return {"image": self.vary(batch["image"], random), "class": batch["class"]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.class_loss(model(batch["image"]), batch["class"])

    def class_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of logits (B, K) at the smoothed classes (B,)."""
        return cross_entropy(logits.float(), target, label_smoothing=self.smoothing)

    def vary(self, x: Tensor, random: SampleDraws) -> Tensor:
        """Mirror, move, tint and blot out images (B, C, H, W), each by draws of its own."""
        x = mirror_and_move(x, random)

        def factor() -> Tensor:
            return (1 + self.tint * (2 * random.uniform() - 1))[:, None, None, None]

        light = (x + 1) * factor() - 1
        contrasted = torch.lerp(light.mean(dim=(1, 2, 3), keepdim=True), light, factor())
        x = torch.lerp(grey(contrasted), contrasted, factor()).clamp(-1, 1)

        # A square of a quarter to a half of the image's width, anywhere, also partly outside.
        pixels = torch.arange(x.shape[-1])
        half_width = (len(pixels) * (0.125 + 0.125 * random.uniform()))[:, None]  # (B, 1)
        rows, columns = (
            (pixels - len(pixels) * random.uniform()[:, None]).abs() < half_width for _ in range(2)
        )
        is_erased = (random.uniform() < self.erase)[:, None, None]
        erased = is_erased & rows[:, :, None] & columns[:, None, :]  # (B, H, W)
        return x.masked_fill(erased[:, None], 0.0)

    def evaluate(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """The share of unseen images whose class it names: "accuracy"."""
        return {"accuracy": accuracy(model, images, self.batch_size)}


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe(NamingRecipe):
    """A VisionTransformer of timm that learns the classes of an image folder.

    Attributes:
        patch_drop: the share of patches that training leaves out, others for each image and step: a step
            takes little more than half the time (Liu et al. 2022, *PatchDropout*).
        teacher: the checkpoint of a ConvNet, or None. The network then also learns to see at each place what
            the teacher sees there, which is a lesson for every patch where the class is one for the whole
            image (Li et al. 2022, *Locality Guidance for Improving Vision Transformers on Tiny Datasets*).
        lesson: the weight of what the teacher teaches, beside that of the classes, 1.
    """

    family: ClassVar[str] = "backbone"

    patch_drop: float = 0.0
    teacher: str | None = None
    lesson: float = 1.0

    def build(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer  # a second to import

        size = {"img_size": self.image_size, "in_chans": self.channels, "num_classes": self.num_classes}
        return VisionTransformer(**size, **self.model)

    def regularise(self, model: nn.Module) -> None:
        from timm.layers import PatchDropout  # a second to import

        model.patch_drop = PatchDropout(self.patch_drop, model.num_prefix_tokens)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.teacher is None:
            return super().loss(model, batch)
        logits, tokens = with_tokens(model, batch["image"])
        return self.class_loss(logits, batch["class"]) + self.lesson * self.distance(tokens, batch["image"])

    def distance(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The mean squared distance from tokens (B, N, d) to what the teacher sees at their places."""
        with torch.no_grad():
            seen = self._teacher.stages(images).flatten(2).transpose(1, 2)  # (B, N, d)
        if seen.shape != tokens.shape:
            raise ValueError(
                f"teacher must see {tokens.shape[1]} places in {tokens.shape[2]} channels, as the patches "
                f"are; {self.teacher!r} sees {seen.shape[1]} in {seen.shape[2]}"
            )
        return mse_loss(standardised(tokens), standardised(seen))

    @cached_property
    def _teacher(self) -> "ConvNet":
        return load_model(self.teacher).to(process_state().device)


def mirror_and_move(x: Tensor, random: SampleDraws) -> Tensor:
    """Mirror half of the images (B, C, H, W), H = W, and move each by up to an eighth of its width."""
    size = x.shape[-1]
    shift = size // 8
    is_mirrored = (random.uniform() < 0.5)[:, None]
    columns = torch.arange(size).expand(len(x), size)  # (B, W)
    columns = torch.where(is_mirrored, columns.flip(1), columns) + random.integers(2 * shift + 1)[:, None]
    rows = torch.arange(size) + random.integers(2 * shift + 1)[:, None]  # (B, H)
    moved = pad(x, (shift,) * 4, mode="reflect")  # (B, C, H + 2 shift, W + 2 shift)
    batch = torch.arange(len(x))[:, None, None]
    return moved[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def grey(x: Tensor) -> Tensor:
    """The brightness (B, 1, H, W) of images (B, C, H, W)."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(dim=1, keepdim=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, batch_size: int) -> float:
    """The share of images whose class has the largest logit.

    Args:
        model: model(images (B, C, H, W)) -> logits (B, K).
        images: images with the label "class".
        batch_size: images per forward pass.

    Returns:
        A number in [0, 1].
    """
    device = next(model.parameters()).device
    right = []
    for indices in torch.arange(len(images)).split(batch_size):
        batch = images.batch(indices)
        right.append(model(batch["image"].to(device)).argmax(dim=1).cpu() == batch["class"])
    return torch.cat(right).double().mean().item()


def with_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A Vision Transformer's logits (B, K), and its patches' tokens (B, N, d) before its last block.

    That block is left free to gather what the class token needs. The tokens are taken out as they pass by,
    since a model that several processes train must be called as a whole.
    """
    from accelerate.utils import extract_model_from_parallel  # takes a second to import

    vit = extract_model_from_parallel(model)
    passed = []
    hook = vit.blocks[-1].register_forward_pre_hook(lambda block, inputs: passed.extend(inputs))
    try:
        logits = model(images)
    finally:
        hook.remove()
    return logits, passed[0][:, vit.num_prefix_tokens :]


def standardised(tokens: Tensor) -> Tensor:
    """Tokens (B, N, d) with mean 0 and variance 1 each."""
    return layer_norm(tokens.float(), tokens.shape[-1:])


class ConvNet(nn.Module):
    """A small convolutional network that names images, and what it sees at each place of them.

    Args:
        channels: of the images.
        num_classes: K.
        widths: the channels at full, half and a quarter of the image's size.
    """

    def __init__(self, channels: int, num_classes: int, widths: tuple[int, int, int]):
        super().__init__()
        full, half, quarter = widths
        self.stages = nn.Sequential(
            _convolution(channels, full),
            _convolution(full, half),
            nn.MaxPool2d(2),
            _Residual(half),
            _convolution(half, quarter),
            nn.MaxPool2d(2),
            _Residual(quarter),
        )
        self.head = nn.Linear(quarter, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W)."""
        return self.head(self.stages(images).mean(dim=(2, 3)))


def _convolution(channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(NamingRecipe):
    """A convolutional network that learns the same, and sooner: what teaches the Vision Transformer."""

    family: ClassVar[str] = "teacher"

    def build(self) -> nn.Module:
        # On a CPU, convolutions take 0.7 of the time where an image's channels lie side by side.
        network = ConvNet(self.channels, self.num_classes, **self.model)
        return network.to(memory_format=torch.channels_last)


CONVNET_PHOTOS_32 = TeacherRecipe(
    name="convnet_photos32",
    data="cifar10",
    image_size=32,
    model={"widths": (32, 64, 160)},
    erase=0.25,
    tint=0.2,
    steps=4_500,
    batch_size=32,  # for each of two processes, which is how the checkpoints were made
    learning_rate=2e-3,
    weight_decay=0.05,
    warmup_steps=200,
)
# First with half of the patches hidden and one image in four blotted out, which makes for cheap steps ...
PHOTOS_32_MASKED = BackboneRecipe(
    name="vit_photos32_masked",
    data="cifar10",
    image_size=32,
    model={"patch_size": 4, "embed_dim": 160, "depth": 6, "num_heads": 5},
    patch_drop=0.5,
    erase=0.25,
    tint=0.3,
    steps=17_000,
    batch_size=32,  # for each of two processes, which is how the checkpoints were made
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup_steps=500,
)
# ... then with whole images ...
PHOTOS_32_WHOLE = replace(
    PHOTOS_32_MASKED,
    name="vit_photos32_whole",
    start=PHOTOS_32_MASKED.name,
    patch_drop=0.0,
    erase=0.0,
    tint=0.2,
    steps=9_000,
    learning_rate=8e-4,
)
# ... then with a teacher ...
PHOTOS_32_TAUGHT = replace(
    PHOTOS_32_WHOLE,
    name="vit_photos32_taught",
    start=PHOTOS_32_WHOLE.name,
    teacher=CONVNET_PHOTOS_32.name,
    steps=4_000,
    warmup_steps=200,
)
# ... whose lesson weighs more in the end: at 1 its gradient was a quarter of that of the classes.
PHOTOS_32 = replace(
    PHOTOS_32_TAUGHT,
    name="vit_photos32",
    start=PHOTOS_32_TAUGHT.name,
    lesson=5.0,
    steps=6_000,
    learning_rate=6e-4,
)


def of_width(width: int) -> BackboneRecipe:
    """A narrower backbone, from scratch, for the question what prompts gain on backbones of other sizes."""
    return replace(
        PHOTOS_32_WHOLE,
        name=f"vit_photos32_{width}",
        start=None,
        model=PHOTOS_32.model | {"embed_dim": width, "num_heads": width // 32},
        steps=7_000,
        batch_size=64,  # of one process
        learning_rate=1e-3,
    )


# For the question what methods gain on kinds of photographs that a backbone has never seen: from scratch on
# five of the ten kinds, in two of the four runs above.
FIVE_KINDS_MASKED = replace(
    PHOTOS_32_MASKED,
    name="vit_photos32_five_masked",
    data="./photos_five",
    steps=10_000,
    batch_size=64,  # of one process
)
FIVE_KINDS = replace(
    PHOTOS_32_WHOLE,
    name="vit_photos32_five",
    data=FIVE_KINDS_MASKED.data,
    start=FIVE_KINDS_MASKED.name,
    steps=2_500,
    batch_size=64,  # of one process
)

register(
    CONVNET_PHOTOS_32,
    PHOTOS_32_MASKED,
    PHOTOS_32_WHOLE,
    PHOTOS_32_TAUGHT,
    PHOTOS_32,
    FIVE_KINDS_MASKED,
    FIVE_KINDS,
    of_width(96),
    of_width(64),
)
