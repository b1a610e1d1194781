"""Visual prompt tuning: many tasks, one backbone.

Generated from notebooks/08_visual_prompt_tuning.py, which derives and checks it: edit there, then run `make
package`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn

from lecture26.kit.task_files import (
    TASK_TENSORS,
    backbone_fingerprint,
    check_task_state,
    load_task,
    save_task,
)
from lecture26.kit.validation import check_int, check_positive_int, check_shape

# --- A picture as a sequence ---


def patches(x, patch_size):
    """Cut images into square patches, each written as one vector.

    Args:
        x: images, (B, C, H, W).
        patch_size: p, the side of a patch in pixels.

    Returns:
        (B, N_p, C p^2) with N_p = (H / p)(W / p): patches by rows of the image; in each the channel changes
        slowest, then the row, then the column.

    Raises:
        ValueError: if the height or the width is no multiple of p.

    Source: Dosovitskiy et al. 2021, section 3.1.
    """
    batch, channels, height, width = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"x must have a height and a width that are multiples of {patch_size}; got {tuple(x.shape)}"
        )
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
    return x.reshape(batch, rows * columns, channels * patch_size**2)


def attention_weights(attn, tokens):
    """The attention weights of one of timm's attention layers.

    Args:
        attn: a timm Attention, such as `vit.blocks[0].attn`.
        tokens: what it is called with, normalised already by the block's `norm1`, (B, N, d).

    Returns:
        (B, heads, N, N): how much token i (third axis) takes from token j (fourth); each row sums to 1.

    Source: Dosovitskiy et al. 2021, appendix A, equations 5 to 8.
    """
    batch, length, _ = tokens.shape
    qkv = attn.qkv(tokens).reshape(batch, length, 3, attn.num_heads, attn.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d_h) each
    q, k = attn.q_norm(q), attn.k_norm(k)
    # a_ij = softmax_j(q_i . k_j / sqrt(d_h))
    return (q @ k.mT * attn.scale).softmax(dim=-1)


# --- Prompts ---


def insert_prompts(tokens, prompts, num_prefix):
    """Put prompts between the prefix tokens and the patches.

    Args:
        tokens: a sequence for each image, (B, N, d): num_prefix tokens (class token, registers), then
            patches.
        prompts: (n, d), the same for all images, or (B, n, d).
        num_prefix: the number of tokens before the first patch, at least 0.

    Returns:
        (B, N + n, d).

    Source: Jia et al. 2022, section 3.2 (VPT-shallow).
    """
    prompts = prompts.expand(len(tokens), *prompts.shape[-2:])  # (B, n, d)
    return torch.cat([tokens[:, :num_prefix], prompts, tokens[:, num_prefix:]], dim=1)


def replace_prompts(tokens, prompts, num_prefix):
    """A block's tokens (B, N, d), those behind num_prefix replaced by prompts, (n, d) or (B, n, d).

    Source: Jia et al. 2022, section 3.2 (VPT-deep).
    """
    num_prompts = prompts.shape[-2]
    rest = torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + num_prompts :]], dim=1)
    return insert_prompts(rest, prompts, num_prefix)


def prompted_blocks(blocks, tokens, prompts, num_prefix):
    """Send tokens through a transformer's blocks with prompts among them.

    Args:
        blocks: L callables, each from (B, N, d) to the same; prompts count as tokens for them.
        tokens: what goes in without prompts, (B, N, d): num_prefix tokens, then patches.
        prompts: sets of n: one, for the first block only, or L: (1 or L, n, d), or (1 or L, B, n, d) with
            prompts of its own for each image.
        num_prefix: the number of tokens before the first patch.

    Returns:
        What leaves the last block, (B, N + n, d).

    Source: Jia et al. 2022, section 3.2.
    """
    tokens = insert_prompts(tokens, prompts[0], num_prefix)
    for number, block in enumerate(blocks):
        if 0 < number < len(prompts):
            tokens = replace_prompts(tokens, prompts[number], num_prefix)
        tokens = block(tokens)
    return tokens


# --- How large a prompt begins ---


def initial_prompts(u, patch_values):
    """Uniform draws u on [0, 1), (..., d), stretched to [-v, v) for patches of patch_values = 3 p^2 numbers.

    Source: the code of Jia et al. 2022; Glorot and Bengio 2010, equation 16.
    """
    # v = sqrt(6 / (3 p^2 + d))
    v = (6 / (patch_values + u.shape[-1])) ** 0.5
    return v * (2 * u - 1)


# --- The network with prompts ---


def check_backbone(vit):
    """Raise unless a model is a VisionTransformer of timm that prompts can be put into.

    Args:
        vit: the model.

    Raises:
        TypeError: if it is no timm VisionTransformer.
        ValueError: if it computes its features in a way of its own, or does not pool them.
    """
    from timm.models.vision_transformer import VisionTransformer  # takes a second to import

    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"vit must be a timm VisionTransformer; got a {type(vit).__name__}")
    if type(vit).forward_features is not VisionTransformer.forward_features:
        raise ValueError(
            f"vit must compute its features as timm's VisionTransformer does; {type(vit).__name__} has a "
            "forward_features of its own"
        )
    if vit.global_pool == "" and vit.attn_pool is None:
        raise ValueError("vit must pool its tokens into one vector; got global_pool ''")


def prompted_tokens(vit, x, prompts):
    """What leaves a backbone, after its final normalisation, when prompts stand beside the patches.

    The backbone is put into evaluation mode: nothing in it is random.

    Args:
        vit: a timm VisionTransformer.
        x: images, (B, C, H, W).
        prompts: one set, which goes in at the first block only, or one for each block: (1 or L, n, d), or
            (1 or L, B, n, d) with prompts of its own for each image.

    Returns:
        (B, N + n, d): prefix tokens, prompts, patches.

    Raises:
        ValueError: if the images do not have the shape that the backbone takes, or there are sets of prompts
            for some blocks and not for others.

    Source: Jia et al. 2022, section 3.2.
    """
    if len(prompts) not in (1, len(vit.blocks)):
        raise ValueError(f"prompts must be for 1 block or for all {len(vit.blocks)}; got {len(prompts)} sets")
    _check_images(x, vit)
    vit.eval()  # whatever somebody has set it to since
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))  # (B, N, d)
    return vit.norm(prompted_blocks(vit.blocks, tokens, prompts, vit.num_prefix_tokens))


def pooled(vit, tokens, num_prompts):
    """What a backbone's own head would read, (B, d): the class token, or as it pools, without prompts.

    tokens, (B, N + n, d) with n = num_prompts, are what `prompted_tokens` returns for vit.
    """
    first, last = vit.num_prefix_tokens, vit.num_prefix_tokens + num_prompts
    tokens = torch.cat([tokens[:, :first], tokens[:, last:]], dim=1)  # (B, N, d)
    return vit.forward_head(tokens, pre_logits=True)


def _check_images(x, vit):
    height, width = vit.patch_embed.patch_size if vit.dynamic_img_size else vit.patch_embed.img_size
    fits = x.ndim == 4 and x.shape[1] == vit.in_chans
    if vit.dynamic_img_size:
        shape = f"(B, {vit.in_chans}, H, W) with H a multiple of {height} and W of {width}"
        fits = fits and (vit.patch_embed.dynamic_img_pad or not (x.shape[2] % height or x.shape[3] % width))
    else:
        shape = f"(B, {vit.in_chans}, {height}, {width})"
        fits = fits and tuple(x.shape[2:]) == (height, width)
    if not fits:
        raise ValueError(f"x must be images of shape {shape}; got {tuple(x.shape)}")


# --- Frozen ---


def freeze_all_but(parameters, endings):
    """Let those parameters train whose names end in one of some texts, and freeze the others.

    Args:
        parameters: by name, as `dict(model.named_parameters())` gives them; changed in place: afterwards each
            either asks for gradients, or asks for none and has none left over.
        endings: a tuple of texts, such as (".bias", "head.weight"); () freezes everything.

    Returns:
        The list of those that train, in their order: what an optimiser is to be given.

    Source: this course.
    """
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.endswith(endings))
        if not parameter.requires_grad:
            parameter.grad = None
    return [parameter for parameter in parameters.values() if parameter.requires_grad]


class VPT(nn.Module):
    """A frozen Vision Transformer with learned prompts and a new linear head.

    The backbone is shared, not copied; its parameters are frozen in place, and it stays in evaluation mode
    whatever `train()` is called. Without prompts this is a linear probe.

    Args:
        vit: a VisionTransformer of timm, with or without a head of its own, which is not used.
        num_classes: K, of the new task.
        num_prompts: n, for each block that gets any.
        deep: whether every block gets prompts of its own (VPT-deep), or only the first one (VPT-shallow).
        prompt_dropout: the probability, in training, with which a number of a prompt is set to zero.

    Attributes:
        vit: the backbone.
        num_prompts, deep, prompt_dropout: as given, the last as a layer nn.Dropout.
        prompts: (1 or L, n, d), trained.
        head: nn.Linear(d, K), trained.

    Raises:
        TypeError, ValueError: if an argument is out of range, or the backbone is not supported.

    Source: Jia et al. 2022, section 3.2.
    """

    def __init__(self, vit, num_classes, num_prompts, deep=False, prompt_dropout=0.0):
        super().__init__()
        check_backbone(vit)
        check_positive_int("num_classes", num_classes)
        check_int("num_prompts", num_prompts)
        if num_prompts < 0:
            raise ValueError(f"num_prompts must be at least 0; got {num_prompts}")
        if not 0 <= prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be in [0, 1); got {prompt_dropout}")
        weight = next(vit.parameters())
        like = {"dtype": weight.dtype, "device": weight.device}
        freeze_all_but(dict(vit.named_parameters()), ())
        self.vit = vit.eval()
        self.num_prompts, self.deep = num_prompts, bool(deep)
        u = torch.rand(len(vit.blocks) if deep else 1, num_prompts, vit.embed_dim, **like)
        height, width = vit.patch_embed.patch_size
        prompts = initial_prompts(u, vit.in_chans * height * width)  # (1 or L, n, d)
        # Without prompts there is nothing to differentiate the backbone for.
        self.prompts = nn.Parameter(prompts, requires_grad=num_prompts > 0)
        self.prompt_dropout = nn.Dropout(prompt_dropout)
        self.head = nn.Linear(vit.embed_dim, num_classes, **like)

    def train(self, mode=True):
        """Set the mode of the prompts' dropout; the backbone stays in evaluation mode. Returns the model."""
        super().train(mode)
        self.vit.eval()  # no dropout and no stochastic depth in what is frozen
        return self

    def forward_features(self, x):
        """The tokens (B, N + n, d) of images x (B, C, H, W) after the final norm, prompts included."""
        prompts = self.prompts[:, None].expand(-1, len(x), -1, -1)  # (1 or L, B, n, d)
        return prompted_tokens(self.vit, x, self.prompt_dropout(prompts))

    def forward(self, x):
        """Logits (B, K) of images x (B, C, H, W)."""
        return self.head(pooled(self.vit, self.forward_features(x), self.num_prompts))

    # --- Many tasks, one backbone ---

    def task_state_dict(self):
        """What this task has learned: copies on the CPU of the trained tensors, by parameter's name.

        Returns:
            An OrderedDict of TASK_TENSORS, whose attribute `backbone` is the fingerprint of the backbone
            that they belong to.
        """
        state = OrderedDict((name, self.get_parameter(name).detach().cpu().clone()) for name in TASK_TENSORS)
        state.backbone = backbone_fingerprint(self.vit)
        return state

    def load_task_state_dict(self, state):
        """Take over what another model has learned on the same backbone; nothing changes if it is refused.

        Args:
            state: what `task_state_dict` or `load_task` returns. A plain dict carries no fingerprint, and is
                judged by its shapes alone.

        Raises:
            ValueError: if it belongs to another backbone, or to prompts or a head of other sizes.
        """
        check_task_state(state, self.vit, backbone_fingerprint(self.vit))
        own = {name: self.get_parameter(name) for name in TASK_TENSORS}
        for name, tensor in own.items():
            check_shape(name, state[name], tensor.shape, of="the model's")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


# --- LoRA ---


def lora_linear(x, weight, bias, down, up, scale):
    """A linear layer with a low-rank change beside it.

    Args:
        x: tokens, (batch, N, d_in).
        weight, bias: W, (d_out, d_in), and b, (d_out,).
        down: the matrix A, (r, d_in), the same for all images, or (batch, r, d_in), one for each.
        up: the matrix B, (d_out, r), or (batch, d_out, r).
        scale: s, a number.

    Returns:
        (batch, N, d_out).

    Source: Hu et al. 2022, section 4.1, equation 3.
    """
    # z = W x + b + s B (A x)
    hidden = x @ down.mT  # (B, N, r)
    return x @ weight.mT + bias + scale * hidden @ up.mT


def lora_merged(weight, down, up, scale):
    """The one matrix that does what a linear layer does with its low-rank change.

    Args:
        weight: W, (d_out, d_in).
        down, up: A, (r, d_in), and B, (d_out, r).
        scale: s, a number.

    Returns:
        (d_out, d_in), a new tensor.

    Source: Hu et al. 2022, section 4.1.
    """
    # W' = W + s B A
    return weight + scale * up @ down


class LoRALinear(nn.Module):
    """A linear layer with a low-rank change that begins at zero.

    Args:
        linear: an nn.Linear.
        rank: r.
        scale: s.

    Source: Hu et al. 2022, section 4.1.
    """

    def __init__(self, linear, rank, scale=1.0):
        super().__init__()
        self.linear, self.scale = linear, scale
        down = linear.weight.new_empty(rank, linear.in_features)
        self.down = nn.Parameter(down.normal_(std=linear.in_features**-0.5))  # A
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))  # B

    def forward(self, x):
        """Tokens x (B, N, d_in) -> (B, N, d_out)."""
        bias = 0.0 if self.linear.bias is None else self.linear.bias
        return lora_linear(x, self.linear.weight, bias, self.down, self.up, self.scale)

    @torch.no_grad()
    def merged(self):
        """The nn.Linear that does the same."""
        linear = deepcopy(self.linear)
        linear.weight.copy_(lora_merged(linear.weight, self.down, self.up, self.scale))
        return linear


class Adapter(nn.Module):
    """A bottleneck beside the identity, which begins as the identity.

    Args:
        dim: d.
        width: m.
        like: a tensor whose dtype and device to take.

    Source: Houlsby et al. 2019, section 2.1.
    """

    def __init__(self, dim, width, like):
        super().__init__()
        self.down = nn.Linear(dim, width, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(width, dim, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h):
        """Tokens h (B, N, d) -> (B, N, d)."""
        # h' = h + W_up GELU(W_down h + b_down) + b_up
        return h + self.up(nn.functional.gelu(self.down(h)))


HEAD = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")  # endings of a head's parameters


def linear_probe(vit, num_classes):
    """A frozen backbone vit with a new linear head for num_classes classes: a `VPT` without prompts.

    The backbone is shared, and frozen in place. Raises TypeError or ValueError as `VPT` does.
    """
    return VPT(vit, num_classes, num_prompts=0)


def full_fine_tune(vit, num_classes):
    """A copy of a backbone with a new head, all of which trains.

    Args:
        vit: a VisionTransformer of timm; it stays as it is, frozen or not.
        num_classes: K.

    Returns:
        A VisionTransformer: model(x (B, C, H, W)) -> logits (B, K).

    Raises:
        TypeError, ValueError: as `VPT` does.
    """
    check_backbone(vit)
    check_positive_int("num_classes", num_classes)
    model = deepcopy(vit).requires_grad_(True)
    model.reset_classifier(num_classes)
    return model


def bias_tuning(vit, num_classes):
    """A copy of vit with a new head for num_classes classes, of which the biases and the head train.

    Raises TypeError or ValueError as `full_fine_tune` does. Source: Zaken et al. 2022, section 3.
    """
    model = full_fine_tune(vit, num_classes)
    freeze_all_but(dict(model.named_parameters()), (".bias", *HEAD))
    return model


def lora_tuning(vit, num_classes, rank=2):
    """A copy of vit with a new head for num_classes classes, and a `LoRALinear` of that rank in each block.

    Raises TypeError or ValueError as `full_fine_tune` does.
    """
    model = full_fine_tune(vit, num_classes)
    for block in model.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank)
    freeze_all_but(dict(model.named_parameters()), (".down", ".up", *HEAD))
    return model


def adapter_tuning(vit, num_classes, width=2):
    """A copy of vit with a new head for num_classes classes, and two `Adapter` layers of that width a block.

    Raises TypeError or ValueError as `full_fine_tune` does.
    """
    model = full_fine_tune(vit, num_classes)
    for block in model.blocks:
        for branch in ("ls1", "ls2"):  # timm's layer scale, or the identity: what comes last in a branch
            adapter = Adapter(vit.embed_dim, width, like=next(vit.parameters()))
            setattr(block, branch, nn.Sequential(getattr(block, branch), adapter))
    trained = tuple(f".{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias"))
    freeze_all_but(dict(model.named_parameters()), (*trained, *HEAD))
    return model


def trainable_parameters(model):
    """The parameters of a model that train, as a list: what an optimiser is to be given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- What a prompt can do ---


def attention_to_prompts(weights, num_prefix, num_prompts):
    """The share of each token's attention that goes to the prompts.

    Args:
        weights: (B, heads, N, N) as `attention_weights` gives them; each row (last axis) has sum 1.
        num_prefix: the number of tokens before the first prompt.
        num_prompts: n.

    Returns:
        lambda, (B, heads, N) in [0, 1].

    Source: this course, equation 8.14.
    """
    # lambda_i = sum over prompts j of a_ij
    return weights[..., num_prefix : num_prefix + num_prompts].sum(dim=-1)


# --- What is stored, and what it costs ---


def storage_ratio(backbone, depth, num_prompts, dim, num_classes):
    """How many times less prompts and a head are than a backbone of so many parameters (M).

    backbone (M), depth (L': 1 or L), num_prompts (n), dim (d): numbers, or tensors of one shape, as what is
    returned; num_classes: K, 0 without a head.
    """
    # M / (L' n d + (d + 1) K)
    return backbone / (depth * num_prompts * dim + (dim + 1) * num_classes)


# --- Many tasks, one backbone ---


def own_head(features, weights, biases, tasks):
    """The logits of each sample by the head of its own task.

    Args:
        features: (B, d).
        weights: of T heads with K classes each, (T, K, d).
        biases: (T, K).
        tasks: the number of each sample's task, (B,) int64 in [0, T).

    Returns:
        (B, K).

    Source: this course, equation 8.20.
    """
    # y_b = W^(tau_b) f_b + c^(tau_b)
    return torch.einsum("bd,bkd->bk", features, weights[tasks]) + biases[tasks]


class PromptBank(nn.Module):
    """One backbone and many tasks, served together.

    All tasks of a bank have the same number of prompts, at the same blocks; their heads may differ in size.

    Args:
        vit: a VisionTransformer of timm; shared, frozen in place and kept in evaluation mode.

    Raises:
        TypeError, ValueError: if the backbone is not supported.

    Source: Lester et al. 2021, figure 2 (several tasks in one batch).
    """

    def __init__(self, vit):
        super().__init__()
        check_backbone(vit)
        freeze_all_but(dict(vit.named_parameters()), ())
        self.vit = vit.eval()
        self._fingerprint = backbone_fingerprint(vit)
        self._states = {}  # by name, each as VPT.task_state_dict gives it

    @property
    def names(self):
        """The names of the tasks, in the order in which they came."""
        return tuple(self._states)

    def __len__(self):
        return len(self._states)

    def __contains__(self, name):
        return name in self._states

    def add(self, name, task):
        """Take in a task.

        Args:
            name: a text that no other task here has.
            task: a VPT on this backbone, or its state, see `VPT.task_state_dict` and `load_task`.

        Raises:
            TypeError: if the task is something else.
            ValueError: if the name is taken, the task belongs to another backbone, or its prompts are not as
                many as those of the tasks that are here already.
        """
        if not (isinstance(task, Mapping) or hasattr(task, "task_state_dict")):
            raise TypeError(
                f"task must be a VPT or the state of one, and files are for load; got a {type(task).__name__}"
            )
        if name in self:
            raise ValueError(f"name must be new; there is a task {name!r} already: remove it first")
        state = task if isinstance(task, Mapping) else task.task_state_dict()
        check_task_state(state, self.vit, self._fingerprint)
        sizes = state["prompts"].shape[:2]
        for other, present in self._states.items():
            if present["prompts"].shape[:2] != sizes:
                raise ValueError(
                    f"task must have prompts like the others; {name!r} has {_prompt_sizes(state)}, and "
                    f"{other!r} {_prompt_sizes(present)}: they need a bank of their own"
                )
        self._states[name] = deepcopy(state)

    def remove(self, name):
        """Forget the task of that name. ValueError if there is none."""
        self._check_known([name])
        del self._states[name]

    def save(self, name, file):
        """Write the task of that name into a file, see `save_task`. ValueError if there is none."""
        self._check_known([name])
        save_task(file, self._states[name])

    def load(self, name, file):
        """Take in a task from a file under a new name; raises what `load_task` and `add` raise."""
        self.add(name, load_task(file))

    def forward(self, x, names):
        """Classify images, each by a task of its own, in one pass through the backbone.

        Args:
            x: images, (B, C, H, W).
            names: B names of tasks.

        Returns:
            A list of B tensors, the logits (K,) of each image; K is that of its task.

        Raises:
            ValueError: if a name is unknown, or there are not as many as images.
        """
        if isinstance(names, str) or len(names) != len(x):
            raise ValueError(f"names must be a list of {len(x)} names, one for each image; got {names!r}")
        self._check_known(names)
        if not names:
            return []
        present = list(dict.fromkeys(names))  # each task of the batch once
        states = [self._states[name] for name in present]
        order = [present.index(name) for name in names]
        tasks = torch.tensor(order).to(x.device)  # (B,)
        prompts = torch.stack([state["prompts"] for state in states], dim=1).to(x)  # (1 or L, T, n, d)
        features = pooled(self.vit, prompted_tokens(self.vit, x, prompts[:, tasks]), prompts.shape[2])

        heads = [(state["head.weight"], state["head.bias"]) for state in states]
        sizes = [len(bias) for _, bias in heads]
        weights = features.new_zeros(len(heads), max(sizes), features.shape[1])  # (T, largest K, d)
        biases = features.new_zeros(len(heads), max(sizes))
        for number, (weight, bias) in enumerate(heads):
            weights[number, : sizes[number]], biases[number, : sizes[number]] = weight, bias
        logits = own_head(features, weights, biases, tasks)  # (B, largest K)
        return [row[: sizes[task]] for row, task in zip(logits, order, strict=True)]

    def _check_known(self, names):
        for name in names:
            if name not in self:
                raise ValueError(
                    f"unknown task {name!r}; there are {', '.join(map(repr, self.names)) or 'none'}"
                )


def _prompt_sizes(state):
    layers, num_prompts, _ = state["prompts"].shape
    return f"{num_prompts} at {'the first block' if layers == 1 else 'each block'}"
