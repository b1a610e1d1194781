"""The U-Net: a denoiser for images.

Generated from notebooks/02_unet.py, which derives and checks it: edit there, then run `make package`.
"""

import copy
import math
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import nn

from lecture26.ddpm import at_least_float32
from lecture26.kit.state_dicts import without_compilation
from lecture26.kit.validation import check_positive_int, check_shape

# --- Telling the network the step ---


def timestep_embedding(t, dim, max_period=10_000.0):
    """Encode each step as cosines and sines of geometrically spaced frequencies.

    Args:
        t: steps of the original schedule, (B,), integer or floating point.
        dim: length of the embedding, even.
        max_period: P; the frequencies fall from 1 towards 1 / P.

    Returns:
        (B, dim), the cosines first; float32 for integer t, else t's dtype.

    Raises:
        ValueError: if dim is odd.

    Source: Vaswani et al. 2017, section 3.5, with the cosines first as in Ho et al.'s successors.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, for as many cosines as sines; got dim={dim}")
    if not t.is_floating_point():
        t = t.float()
    k = torch.arange(dim // 2, dtype=t.dtype, device=t.device)
    # omega_k = P^(-k / (dim / 2))
    omega = torch.exp(-math.log(max_period) * k / (dim // 2))  # (dim / 2,)
    angles = t[:, None] * omega  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


class StepEmbedding(nn.Sequential):
    """Turn steps into the embedding that every block receives: their code, then two layers.

    Args:
        code_dim: length of the code, as `timestep_embedding` makes it; even.
        dim: length of the embedding.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(self, code_dim, dim):
        super().__init__(nn.Linear(code_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        """Map steps t (B,) to (B, dim), in the dtype of the layers."""
        first = self[0]
        return super().forward(timestep_embedding(t, first.in_features).to(first.weight.dtype))


# --- Labels ---


class LabelEmbedding(nn.Module):
    """Embed one or several class labels and add them up; each has an extra row for 'no label'.

    Args:
        num_classes: the number of classes, or a tuple of numbers for several labels (shape, colour).
        dim: length of the embedding.

    Source: Ho and Salimans 2022, section 3.2 (the null label is index num_classes).
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = (num_classes,) if isinstance(num_classes, int) else tuple(num_classes)
        self.tables = nn.ModuleList(nn.Embedding(n + 1, dim) for n in self.num_classes)

    def forward(self, labels):
        """Map labels, (B,) or (B, number of labels) integers, to (B, dim); ValueError on any other."""
        columns = labels[:, None] if labels.ndim == 1 else labels  # (B, number of labels)
        is_integer = not columns.is_floating_point() and columns.dtype != torch.bool
        if columns.shape[1:] != (len(self.tables),) or not is_integer:
            raise ValueError(
                f"cond must hold {len(self.tables)} integer label(s) per sample; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        columns = columns.long().unbind(dim=1)
        for column, count in zip(columns, self.num_classes, strict=True):
            if column.numel() and not 0 <= column.min() <= column.max() <= count:
                raise ValueError(
                    f"cond must hold labels in [0, {count}], the last meaning none; got {column}"
                )
        return sum(table(column) for table, column in zip(self.tables, columns, strict=True))


# --- Each image normalised by itself ---


def group_norm(channels):
    """Group normalisation with at most 32 groups of at least 8 channels each, or a single group."""
    return nn.GroupNorm(math.gcd(32, max(channels // 8, 1), channels), channels)


# --- What the step changes ---


def scale_shift(h, scale, shift):
    """Let scale and shift (B, C) act on each channel of h (B, C, H, W): h (1 + scale) + shift.

    Source: Dhariwal and Nichol 2021, section 3.1 (adaptive group normalisation, y_s = 1 + scale).
    """
    return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


# --- The path around ---


def residual_block(x, embedding, norm_in, conv_in, to_scale_shift, norm_out, conv_out, skip):
    """Pass feature maps through two convolutions, told the embedding, and around them.

    Args:
        x: feature maps, (B, in_channels, H, W).
        embedding: of step and label, (B, D).
        norm_in, conv_in: layers of feature maps, in front: in_channels -> in_channels, -> out_channels.
        to_scale_shift: layer, (B, D) -> (B, 2 out_channels), the scales first.
        norm_out, conv_out: layers of feature maps, behind: out_channels -> out_channels.
        skip: layer of feature maps, around all of it: in_channels -> out_channels.

    Returns:
        (B, out_channels, H, W).

    Source: Dhariwal and Nichol 2021, section 3.
    """
    h = conv_in(F.silu(norm_in(x)))  # (B, out_channels, H, W)
    scale, shift = to_scale_shift(F.silu(embedding)).chunk(2, dim=1)  # (B, out_channels) each
    h = scale_shift(norm_out(h), scale, shift)
    h = conv_out(F.silu(h))
    return skip(x) + h


def zero_init(module):
    """Set all parameters of a module to zero, so that the branch it ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """Two convolutions around a skip, the second one's input scaled and shifted by the embedding.

    Args:
        in_channels, out_channels: channels before and after.
        embedding_dim: length of the embedding of step and label.

    Source: Dhariwal and Nichol 2021, section 3.
    """

    def __init__(self, in_channels, out_channels, embedding_dim):
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, embedding):
        """Map x (B, in_channels, H, W) and embedding (B, embedding_dim) to (B, out_channels, H, W)."""
        inward, outward = (self.norm_in, self.conv_in), (self.norm_out, self.conv_out)
        return residual_block(x, embedding, *inward, self.embedding, *outward, self.skip)


# --- Self-attention ---


def attention(q, k, v):
    """Mix the values by how well each query matches each key.

    Args:
        q: queries, (..., N, d).
        k: keys, (..., M, d).
        v: values, (..., M, e).

    Returns:
        (..., N, e), a weighted mean of the values for each query.

    Source: Vaswani et al. 2017, equation 1.
    """
    # softmax(q k^T / sqrt(d)) v, the softmax over the keys
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (..., N, M)
    return weights @ v


# --- The layer ---


def self_attention(x, norm, qkv, project, heads):
    """Let every pixel look at every other one, in several heads, and add what it finds.

    Args:
        x: feature maps, (B, C, H, W).
        norm: layer of feature maps, keeps the shape.
        qkv: layer of tokens, (B, N, C) -> (B, N, 3 C): all queries, then all keys, then all values.
        project: layer of tokens, (B, N, C) -> (B, N, C), which mixes the heads.
        heads: the number of heads, a divisor of C; each takes C / heads channels side by side.

    Returns:
        (B, C, H, W).

    Source: Vaswani et al. 2017, section 3.2.2; Dhariwal and Nichol 2021, section 3.
    """
    batch, channels, height, width = x.shape
    tokens = norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
    split = qkv(tokens).unflatten(2, (3, heads, -1))  # (B, H W, 3, heads, C / heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, heads, H W, C / heads) each
    mixed = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H W, C)
    h = project(mixed).transpose(1, 2).reshape(batch, channels, height, width)
    return x + h


class SelfAttention(nn.Module):
    """Every pixel looks at every other one, in several heads; added to its input.

    Args:
        channels: channels of the feature map.
        head_dim: channels per head; a narrower map has a single head.

    Raises:
        ValueError: if channels is above head_dim and no multiple of it.

    Source: Dhariwal and Nichol 2021, section 3 (64 channels a head there).
    """

    def __init__(self, channels, head_dim=32):
        super().__init__()
        head_dim = min(head_dim, channels)
        if channels % head_dim:
            raise ValueError(f"channels must be a multiple of head_dim={head_dim}; got channels={channels}")
        self.heads = channels // head_dim
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_init(nn.Linear(channels, channels))

    def forward(self, x, cond=None):
        """Map x (B, C, H, W) to (B, C, H, W); cond is for attention that looks outside the image."""
        return self_attention(x, self.norm, self.qkv, self.project, self.heads)


# --- Down and up ---


class Stage(nn.Module):
    """A residual block, and attention after it where a factory for one is given.

    Args:
        in_channels, out_channels: channels before and after.
        embedding_dim: length of the embedding.
        attention: None, or a factory: channels -> module called as (h, cond).
    """

    def __init__(self, in_channels, out_channels, embedding_dim, attention=None):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, embedding_dim)
        self.attention = attention(out_channels) if attention else None

    def forward(self, h, embedding, cond):
        """Map h (B, in_channels, H, W), with embedding and cond, to (B, out_channels, H, W)."""
        h = self.residual(h, embedding)
        return h if self.attention is None else self.attention(h, cond)


class DownLevel(nn.Module):
    """The stages of one resolution on the way down; all but the last level then halve it.

    Args:
        in_channels, out_channels: channels before and after.
        num_blocks: the number of stages.
        embedding_dim, attention: as in Stage.
        last: whether this is the lowest resolution.
    """

    def __init__(self, in_channels, out_channels, num_blocks, embedding_dim, attention, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.stages = nn.ModuleList(Stage(*pair, embedding_dim, attention) for pair in pairwise(widths))
        self.downsample = None if last else nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.skip_channels = widths[1:] + [out_channels] * (not last)

    def forward(self, h, embedding, cond):
        """Map h (B, C, H, W), with embedding and cond, to all maps on the way; the last is the output."""
        outputs = []
        for stage in self.stages:
            h = stage(h, embedding, cond)
            outputs.append(h)
        if self.downsample is not None:
            outputs.append(self.downsample(h))
        return outputs


class DownLevels(nn.ModuleList):
    """The way down: a DownLevel for each resolution, from the highest to the lowest.

    Args:
        widths: the channels of each level.
        num_blocks, embedding_dim: as in DownLevel.
        attention_at: for each level None, or a factory as in Stage.
    """

    def __init__(self, widths, num_blocks, embedding_dim, attention_at):
        last = len(widths) - 1
        super().__init__(
            DownLevel(before, after, num_blocks, embedding_dim, attention_at[level], level == last)
            for level, (before, after) in enumerate(pairwise([widths[0], *widths]))
        )

    def forward(self, h, embedding, cond):
        """Map h (B, widths[0], H, W), with embedding and cond, to all maps on the way, h the first."""
        maps = [h]
        for level in self:
            maps += level(maps[-1], embedding, cond)
        return maps


class UpLevel(nn.Module):
    """The stages of one resolution on the way up, each fed with a skip; all but the last then double it.

    Args:
        in_channels, out_channels: channels before and after.
        skip_channels: the channels of each stage's skip.
        embedding_dim, attention: as in Stage.
        last: whether this is the highest resolution.
    """

    def __init__(self, in_channels, out_channels, skip_channels, embedding_dim, attention, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.stages = nn.ModuleList(
            Stage(width + skip, out_channels, embedding_dim, attention)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsample = None if last else nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, h, skips, embedding, cond):
        """Map h (B, C, H, W), with skips, one for each stage, embedding and cond, to the next resolution."""
        for stage, skip in zip(self.stages, skips, strict=True):
            h = stage(torch.cat([h, skip], dim=1), embedding, cond)
        if self.upsample is not None:
            h = self.upsample(F.interpolate(h, scale_factor=2, mode="nearest"))
        return h


# --- Patches ---


def patchify(x, patch_size):
    """Fold each patch of pixels into the channels.

    Args:
        x: images, (B, C, H, W), with H and W multiples of patch_size.
        patch_size: side of a patch, p.

    Returns:
        (B, C p^2, H / p, W / p), channel c p^2 + i p + j holding pixel (i, j) of each patch of channel c.

    Raises:
        ValueError: if H or W is no multiple of patch_size.
    """
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"x must have sides that are multiples of {patch_size}; got {height} x {width}")
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/p, p, W/p, p)
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (B, C, p, p, H/p, W/p), then C p p -> C p^2


def unpatchify(x, patch_size):
    """Undo patchify: x (B, C p^2, H, W), with p = patch_size, to (B, C, p H, p W)."""
    x = x.unflatten(1, (-1, patch_size, patch_size))  # (B, C, p, p, H, W)
    return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)  # (B, C, H, p, W, p), then merged


# --- The whole ---


def unet_forward(h, embedding, cond, down, middle, up):
    """Send a feature map down, through the middle, and up again, where it meets the maps of the way down.

    Args:
        h: the first feature map, (B, C, H, W).
        embedding: of step and label, (B, D).
        cond: the condition, for attention that looks at it; any.
        down: (h, embedding, cond) -> list of all maps, in the order in which they are made, h the first.
        middle: (map, embedding, cond) -> map.
        up: the levels of the way up, the lowest first: (map, skips, embedding, cond) -> map. Each takes as
            many skips as the others, in the order in which its stages meet them; together, all maps.

    Returns:
        What the last level returns.

    Source: Ronneberger et al. 2015, section 2; Ho et al. 2020, appendix B.
    """
    maps = down(h, embedding, cond)
    h = middle(maps[-1], embedding, cond)
    skips_per_level = len(maps) // len(up)
    for level in up:
        skips = [maps.pop() for _ in range(skips_per_level)]  # the last one first
        h = level(h, skips, embedding, cond)
    return h


def levels_with_attention(channel_multipliers, attention_levels):
    """The levels that get attention, from channel_multipliers and attention_levels as UNet takes them.

    Raises TypeError or ValueError where the two make no network.
    """
    given = {"channel_multipliers": channel_multipliers, "attention_levels": attention_levels}
    for name, values in given.items():
        if isinstance(values, int):
            raise TypeError(f"{name} must be a tuple, such as (1,) or (1, 2); got {values}")
    last = len(channel_multipliers) - 1
    if last < 0:
        raise ValueError(f"channel_multipliers must hold a width per level; got {channel_multipliers}")
    if attention_levels is None:
        return tuple(range(1, last + 1))
    if not set(attention_levels) <= set(range(last + 1)):
        raise ValueError(f"attention_levels must be among the levels 0 to {last}; got {attention_levels}")
    return tuple(attention_levels)


class UNet(nn.Module):
    """Predict, from noisy images and their step, what the diffusion's prediction type asks for.

    Args:
        in_channels: channels of the images.
        base_channels: channels at the highest resolution, an even number.
        channel_multipliers: width of each level, in units of base_channels; the resolution halves in between.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_levels: the levels, counted from 0, with attention after each residual block; all but the
            first if None.
        patch_size: fold this many pixels each way into channels first (1 leaves the image as it is).
        out_channels: channels of the output; in_channels unless given (2 in_channels for a learned variance).
        num_classes: None, a number of classes, or a tuple of them for several labels.
        attention: factory, channels -> module called as (h, cond).

    Raises:
        TypeError, ValueError: on channels, multipliers, levels, blocks or patches that make no network.

    Source: Ho et al. 2020, appendix B; Dhariwal and Nichol 2021, section 3.
    """

    def __init__(
        self,
        in_channels,
        base_channels=64,
        channel_multipliers=(1, 2, 2),
        num_blocks=2,
        attention_levels=None,
        patch_size=1,
        out_channels=None,
        num_classes=None,
        attention=SelfAttention,
    ):
        super().__init__()
        attention_levels = levels_with_attention(channel_multipliers, attention_levels)
        check_positive_int("base_channels", base_channels)
        check_positive_int("num_blocks", num_blocks)
        check_positive_int("patch_size", patch_size)
        if base_channels % 2:
            raise ValueError(
                f"base_channels must be even, for as many cosines as sines; got base_channels={base_channels}"
            )
        self.patch_size = patch_size
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        attention_at = [attention if level in attention_levels else None for level in range(len(widths))]

        embedding_dim = 4 * base_channels
        self.time_mlp = StepEmbedding(base_channels, embedding_dim)
        self.labels = None if num_classes is None else LabelEmbedding(num_classes, embedding_dim)

        self.stem = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.down = DownLevels(widths, num_blocks, embedding_dim, attention_at)
        self.middle_in = Stage(widths[-1], widths[-1], embedding_dim, attention_at[-1])
        self.middle_out = Stage(widths[-1], widths[-1], embedding_dim)

        skips = [widths[0]] + [channels for level in self.down for channels in level.skip_channels]
        self.up = nn.ModuleList()
        width = widths[-1]
        for level in reversed(range(len(widths))):
            own = [skips.pop() for _ in range(num_blocks + 1)]
            self.up.append(UpLevel(width, widths[level], own, embedding_dim, attention_at[level], level == 0))
            width = widths[level]

        self.head_norm = group_norm(width)
        self.head = zero_init(nn.Conv2d(width, (out_channels or in_channels) * patch_size**2, 3, padding=1))

    def check_arguments(self, x_t, t, cond):
        """Raise ValueError unless x_t, t and cond, as forward takes them, fit each other and the network."""
        height, width = x_t.shape[-2:]
        multiple = self.patch_size * 2 ** (len(self.down) - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"x_t must have sides that are multiples of {multiple}; got {height} x {width}")
        check_shape("t", t, x_t.shape[:1], of="one step per image")
        if self.labels is not None and (cond is None or len(cond) != len(x_t)):
            found = None if cond is None else tuple(cond.shape)
            raise ValueError(f"cond must hold the labels of {len(x_t)} image(s); got {found}")

    def forward(self, x_t, t, cond=None):
        """Map x_t (B, C, H, W), steps t (B,) and labels cond to the raw output (B, out_channels, H, W)."""
        self.check_arguments(x_t, t, cond)
        embedding = self.time_mlp(t)
        if self.labels is not None:
            embedding = embedding + self.labels(cond)

        h = self.stem(patchify(x_t, self.patch_size))
        h = unet_forward(h, embedding, cond, self.down, self.middle, self.up)
        return unpatchify(self.head(F.silu(self.head_norm(h))), self.patch_size)

    def middle(self, h, embedding, cond):
        """Map the last map of the way down, h, with embedding and cond, to what the way up begins with."""
        return self.middle_out(self.middle_in(h, embedding, cond), embedding, cond)


# --- Averaging the weights ---


def ema_update(average, parameter, decay):
    """Move an average a little towards a parameter.

    Args:
        average, parameter: tensors of one shape.
        decay: how much of the average is kept, in [0, 1].

    Returns:
        decay * average + (1 - decay) * parameter, same shape.

    Source: Ho et al. 2020, appendix B (decay 0.9999 there).
    """
    return decay * average + (1 - decay) * parameter


def out_of_half_precision(model):
    """Turn the weights and buffers of a model that are in half precision into float32; returns the model."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(at_least_float32(tensor.dtype))
    return model


class EMA(nn.Module):
    """An exponential moving average of a model's weights, kept as a second, frozen model.

    Early on, when the average would be made mostly of the random start, the decay is
    (1 + n) / (10 + n) after n updates, if that is smaller.

    Args:
        model: the model to follow; it is copied, without what torch.compile has made of it, and the copy
            is in float32 where the model is in half precision.
        decay: how much of the average each update keeps, in [0, 1].

    Raises:
        ValueError: if decay lies outside [0, 1].
    """

    def __init__(self, model, decay=0.999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1]; got decay={decay}")
        self.decay = decay
        followed = without_compilation(copy.deepcopy(model)).eval().requires_grad_(False)
        self.model = out_of_half_precision(followed)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, model):
        """Take the model's present weights into the average; buffers are copied as they are."""
        n = self.num_updates.item()
        decay = min(self.decay, (1 + n) / (10 + n))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.copy_(ema_update(average, parameter.to(average.dtype), decay))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.num_updates += 1


# --- Bits per dimension ---


def bits_per_dim(nats, num_dimensions):
    """Turn nats, -ln P of images of num_dimensions numbers (any shape), into bits per dimension.

    Source: Ho et al. 2020, section 4.3 and table 1.
    """
    # 1 nat = 1 / ln 2 bits
    return nats / (num_dimensions * math.log(2))
