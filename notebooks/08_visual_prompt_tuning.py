# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slide=["# A network that names photographs shall read digits", "? What could be done without training its weights anew?", "Leave every weight as it is, and hand it a few learned tokens beside the image: **prompts**.", "# What you can do afterwards", "- compute a Vision Transformer's answer by hand", "- find by experiment what is wrong with a wrapper that runs", "- build shallow and deep prompts, and prove the backbone untouched", "- say what a prompt adds to attention, and what it cannot change", "- compare methods fairly, and serve many tasks from one backbone"]
# # 08 Visual prompt tuning: many tasks, one backbone
#
# A Vision Transformer has learned to name photographs, and we want it to read digits. One could train all of its
# weights anew, and keep a second network of the same size. Or one could leave every weight as it is, and hand the
# network a few extra tokens beside the image, learned so that it does the new task: *prompts*. The lecture's slide
# gives a wrapper of a dozen lines for this. This chapter takes the network apart, finds out what is wrong with such a
# wrapper, mends it, and measures what prompts can do and what they cannot.
#
# **What you will be able to do**
#
# - name every part of a timm Vision Transformer, and compute its answer by hand;
# - find by experiment, not by reading, what is wrong with a wrapper that runs without complaint;
# - build VPT-shallow and VPT-deep on top of any timm `VisionTransformer`, and prove that the backbone is not touched;
# - say exactly what a prompt adds to an attention layer, and what it cannot change;
# - compare the linear probe, prompts and full fine-tuning fairly: accuracy, storage, cost, forgetting;
# - serve many tasks from one backbone, even within one batch;
# - adapt a real pretrained backbone to your own images by one command.
#
# **What it needs**: chapter 02 (attention). **What it takes**: under three minutes on two cores. All data are
# embedded, or made by code. Sections marked *(at a second reading)* can wait.

# %%
import copy
import math
import statistics
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import TqdmWarning

from lecture26.checks import check
from lecture26.kit.checkpoints import load_card
from lecture26.kit.data import load
from lecture26.kit.downstream import TASKS, downstream
from lecture26.kit.figures import PALETTE, show, show_grid, use_style
from lecture26.kit.proof import verify
from lecture26.kit.results import load_results
from lecture26.recipes import load_model
from lecture26.recipes.adaptation import (
    COMPARED,
    NUM_PROMPTS,
    SHORT_BUDGET,
    build,
    fit,
    open_task,
)
from lecture26.recipes.backbone import accuracy
from lecture26.studies.adaptation import attention_by_products
from lecture26.studies.probes import solved_by_reading

use_style()
colours = list(PALETTE.values())

# %% [markdown]
# The Vision Transformer is that of timm (*PyTorch Image Models*), the library from which most people take theirs.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # that bars will be plain text: there are none here
    import timm
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

# %% [markdown]
# Cells like the next one become the module `lecture26.visual_prompt_tuning`; the others stay in the notebook.

# %% tags=["export"]
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn

from lecture26.kit.tensor_files import read_tensors, tensor_bytes, write_tensors
from lecture26.kit.validation import check_int, check_positive_int, check_shape

# %% [markdown]
# Up to the comparison of methods everything is in double precision. The backbone is one that the course has trained:
# `vit_photos32` names small photographs of ten kinds (airplane, automobile, bird and so on).

# %%
torch.set_default_dtype(torch.float64)
vit = load_model("vit_photos32").double()
print(type(vit).__module__, type(vit).__name__)
print(f"{sum(p.numel() for p in vit.parameters()):,} parameters, {len(vit.blocks)} blocks")

# %% [markdown] tags=["core"]
# ## A picture as a sequence
#
# A transformer takes a sequence of vectors. An image of $32\times32$ pixels is cut into squares of $p=4$ pixels on
# each side, 64 of them, and each square with its three channels is written as a vector of $3p^2=48$ numbers. These
# are the **patches**. Call their number $N_p$.
#
# **Exercise 1.** Fill in `patches`. The order matters: patches from left to right and from top to bottom; within one
# patch first the channel, then the row, then the column.


# %% tags=["export", "exercise"]
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
    ### BEGIN SOLUTION
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
    return x.reshape(batch, rows * columns, channels * patch_size**2)
    ### END SOLUTION


# %%
check("visual_prompt_tuning.patches", patches)

# %%
shapes = load("shapes", "test")
x = shapes.batch(range(8))["image"].double()  # (8, 3, 32, 32)
cut = patches(x, 4)
print(f"images {tuple(x.shape)}, patches {tuple(cut.shape)}")

# %% slide=["# A picture becomes a list of patches", "[picture]", "64 small squares. Nothing in the list says which one lies beside which."]
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
left.imshow((x[0].permute(1, 2, 0) + 1) / 2)
left.set(title="an image, 32 x 32 pixels")
gap = torch.ones(8 * 5 - 1, 8 * 5 - 1, 3)
for number, patch in enumerate(cut[0].view(64, 3, 4, 4)):
    row, column = divmod(number, 8)
    gap[5 * row : 5 * row + 4, 5 * column : 5 * column + 4] = (patch.permute(1, 2, 0) + 1) / 2
right.imshow(gap)
right.set(title="64 patches of 4 x 4")
for axis in (left, right):
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
show(figure, "An image of a coloured shape, and the same image cut into eight times eight patches.")

# %% [markdown]
# *What the transformer is given: a list of 64 small squares. Nothing in the list says which one lies beside which.*
#
# A linear map makes of each patch $c_i$ a vector of the network's width $d$, its **token**. timm writes the same map
# as a convolution whose kernel is as large as its step, `patch_embed.proj`; the rows of its kernel, written out, are
# the rows of the matrix:
#
# $$e_i=W_e\,c_i+b_e,\qquad W_e\in\mathbb R^{d\times3p^2} \tag{8.1}$$

# %% slide=["# Patches become tokens, and a class token gathers the answer", "(8.1)", "$$z_0=\\bigl[e_\\text{cls},\\,e_1,\\dots,e_{N_p}\\bigr]+E_\\text{pos} \\tag{8.2}$$", "In each block tokens look at one another, then each is worked on by itself:", "$$z'=z_{\\ell-1}+\\operatorname{Attn}(\\operatorname{LN}(z_{\\ell-1})),\\qquad z_{\\ell}=z'+\\operatorname{MLP}(\\operatorname{LN}(z')) \\tag{8.3}$$"]
kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
print(f"kernel {tuple(kernel.shape)}: d = {kernel.shape[0]} numbers from {kernel[0].numel()}")
verify("8.1", cut @ kernel.flatten(1).T + bias, vit.patch_embed(x), atol=1e-10)

# %% [markdown]
# One token more is put in front, the same for every image, in which the answer is to be gathered: the **class token**
# $e_\text{cls}$ (`cls_token`). And since the tokens are to know where they come from, a learned vector is added to
# each place of the sequence, the **position embedding** (`pos_embed`):
#
# $$z_0=\bigl[e_\text{cls},\,e_1,\dots,e_{N_p}\bigr]+E_\text{pos},\qquad E_\text{pos}\in\mathbb R^{(1+N_p)\times d} \tag{8.2, definition}$$
#
# $L$ **blocks** (`blocks`) follow. Each lets the tokens look at one another and then works on each by itself, both
# times as a correction to what is there, and of a normalised copy (LN is layer normalisation):
#
# $$z'=z_{\ell-1}+\operatorname{Attn}(\operatorname{LN}(z_{\ell-1})),\qquad
# z_{\ell}=z'+\operatorname{MLP}(\operatorname{LN}(z')) \tag{8.3, definition}$$
#
# The MLP is a linear map from $d$ to $4d$ numbers, GELU, and one back to $d$. Attention is that of chapter 02. In
# each of the heads, token $i$ makes a query $q_i$, and every token $j$ a key $k_j$ and a value $v_j$, of $d_h$
# numbers each; token $i$ collects the values, weighted by how well its query goes with the keys:
#
# $$a_{ij}=\frac{e^{q_i\cdot k_j/\sqrt{d_h}}}{\sum_{m}e^{q_i\cdot k_m/\sqrt{d_h}}},\qquad
# o_i=\sum_ja_{ij}\,v_j \tag{8.4, definition}$$
#
# What the heads have collected is put side by side, $d$ numbers again, and goes through one more linear map (`proj`).
# The weights $a$ will be wanted often, and timm does not hand them out. So compute them from its parts.


# %% tags=["export"]
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


# %% [markdown]
# After the last block comes one more normalisation (`norm`), and the class token alone goes through a linear layer
# (`head`), which gives the **logits** of $K$ classes:
#
# $$y=W\,\operatorname{LN}(z_L)_\text{cls}+b \tag{8.5}$$
#
# The whole network by hand: timm's linear layers, and nothing else of its code:


# %%
def attention_by_hand(attn, tokens):
    """The output of an attention layer, (B, N, d)."""
    batch, length, width = tokens.shape
    values = attn.qkv(tokens)[..., 2 * width :].view(batch, length, attn.num_heads, -1).transpose(1, 2)
    collected = attention_weights(attn, tokens) @ values  # (B, heads, N, d_h)
    return attn.proj(collected.transpose(1, 2).reshape(batch, length, width))


def normalised(norm, tokens):
    """Layer normalisation: mean 0 and variance 1 over each token's d numbers, then scaled and shifted."""
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    deviation = (tokens.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight + norm.bias


# %% slide=["# The whole network by hand", "[code: z = torch .. y = normalised]", "It agrees with timm's to nine digits."]
e = patches(x, 4) @ kernel.flatten(1).T + bias  # (8, 64, d)
z = torch.cat([vit.cls_token.expand(len(x), 1, -1), e], dim=1) + vit.pos_embed  # (8, 65, d)
for block in vit.blocks:
    z = z + attention_by_hand(block.attn, normalised(block.norm1, z))
    hidden = block.mlp.fc1(normalised(block.norm2, z))
    z = z + block.mlp.fc2(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)  # GELU
y = normalised(vit.norm, z)[:, 0] @ vit.head.weight.T + vit.head.bias  # (8, 10)
verify("8.5", y, vit(x), atol=1e-9)
assert all(block.attn.scale == block.attn.head_dim**-0.5 for block in vit.blocks)  # 1 / sqrt(d_h)

# %% [markdown]
# So this is all of it:
#
# | part | in timm | shape or number |
# |---|---|---|
# | patches to tokens | `patch_embed` | 64 patches of 48 numbers to $d$ |
# | class token | `cls_token` | $1\times1\times d$ |
# | position embedding | `pos_embed` | $1\times65\times d$ |
# | normalisation before the blocks | `norm_pre` | nothing here; CLIP's ViTs have one |
# | blocks | `blocks` | $L$ of them, each `norm1`, `attn`, `norm2`, `mlp` |
# | final normalisation | `norm` | $d$ factors, $d$ shifts |
# | head | `head` | $K\times d$, and $K$ biases |
#
# Other models of timm differ in details: some have **register tokens** (`reg_token`) or a distillation token beside
# the class token, some have no class token at all and average the patches (`global_pool='avg'`). All tokens that
# stand before the patches are the *prefix*, `num_prefix_tokens` of them.
#
# ### What the position embedding is for
#
# Leave $E_\text{pos}$ out, and shuffle the patches. Attention (8.4) sums over all tokens, in whatever order; all else
# acts on each token alone. So with a permutation $\pi$ of the patches,
#
# $$y\bigl([e_\text{cls},e_{\pi(1)},\dots,e_{\pi(N_p)}]\bigr)=y\bigl([e_\text{cls},e_1,\dots,e_{N_p}]\bigr) \tag{8.6}$$
#
# A transformer without positions sees a bag of patches. Keep this in mind as a symptom.


# %% slide=["# Without positions it sees a bag of patches", "? Leave out the position embedding, and shuffle the patches. What changes?", "$$y\\bigl([e_\\text{cls},e_{\\pi(1)},\\dots,e_{\\pi(N_p)}]\\bigr)=y\\bigl([e_\\text{cls},e_1,\\dots,e_{N_p}]\\bigr) \\tag{8.6}$$", "Nothing. Keep this in mind as a symptom."]
def answer(tokens):
    """The logits that follow from tokens that go into the first block."""
    return vit.head(vit.norm(vit.blocks(tokens))[:, 0])


cls = vit.cls_token.expand(len(x), 1, -1)
shuffled = e[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
verify("8.6", answer(torch.cat([cls, shuffled], 1)), answer(torch.cat([cls, e], 1)), atol=1e-9)
with_positions = [answer(torch.cat([cls, tokens], 1) + vit.pos_embed) for tokens in (e, shuffled)]
is_changed = not torch.allclose(*with_positions)
assert is_changed
print("with positions, shuffling changes the answer:", is_changed)

# %% [markdown] tags=["core"]
# ## A wrapper with nine faults
#
# The idea of visual prompt tuning fits into a sentence: freeze the network, put a few learned tokens beside those of
# the image, train these and a new head. Here it is as one writes it down on a first evening. It reads well, and it
# has nine faults. Do not look for them; let experiments find them.


# %% slide=["# A wrapper as one writes it on a first evening", "[code FirstEvening.forward]", "? It reads well, and has nine faults. How would you find them, without reading?"]
class FirstEvening(nn.Module):
    def __init__(self, backbone, num_prompts, num_classes):
        super().__init__()
        self.backbone = backbone  # this stays frozen
        self.prompts = nn.Parameter(torch.randn(1, num_prompts, width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        image_tokens = self.backbone.patch_embed(x)
        prompts = self.prompts.expand(len(x), -1, -1)
        z = torch.cat((self.backbone.cls_token, prompts, image_tokens), dim=1)
        for block in self.backbone.blocks:
            z = block(z)
        return self.head(z[:, 0])


# %% [markdown]
# **Experiment 1: make one.**

# %%
try:
    FirstEvening(vit, num_prompts=5, num_classes=8)
except NameError as error:
    print("NameError:", error)
else:
    raise AssertionError("not refused")

# %% [markdown]
# Nobody said what `width` is; it is the backbone's `embed_dim`. Say so, and go on. (The copy's weights can train, as
# those of `timm.create_model` can; the loader of this course freezes what it loads.)
#
# **Experiment 2: a single image, then two.**

# %%
width = vit.embed_dim
first = FirstEvening(copy.deepcopy(vit).requires_grad_(True), num_prompts=5, num_classes=8)
print("one image: logits", tuple(first(x[:1]).shape))
try:
    first(x[:2])
except RuntimeError as error:
    print("two images:", type(error).__name__)
else:
    raise AssertionError("not refused")

# %% [markdown]
# There is one class token, and there are two images: it has to be expanded, like the prompts. A test with one image
# would never have told. From here on with both mended:


# %%
class SecondEvening(nn.Module):
    def __init__(self, backbone, num_prompts, num_classes):
        super().__init__()
        self.backbone = backbone
        self.prompts = nn.Parameter(torch.randn(1, num_prompts, backbone.embed_dim))
        self.head = nn.Linear(backbone.embed_dim, num_classes)

    def forward(self, x):
        image_tokens = self.backbone.patch_embed(x)
        prompts = self.prompts.expand(len(x), -1, -1)
        z = torch.cat((self.backbone.cls_token.expand(len(x), -1, -1), prompts, image_tokens), dim=1)
        for block in self.backbone.blocks:
            z = block(z)
        return self.head(z[:, 0])


second = SecondEvening(first.backbone, num_prompts=5, num_classes=8)

# %% [markdown]
# **Experiment 3: shuffle the image.** Cut it into its patches and lay them down in another order. A network that sees
# must say something else.

# %% slide=["# Shuffle the image: the same answer", "[picture]", "The wrapper gives both rows the same logits: the position embedding is missing."]
order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
puzzle = patches(x, 4)[:, order].view(8, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(8, 3, 32, 32)
with torch.no_grad():
    is_same = torch.allclose(second(puzzle), second(x), atol=1e-9)
assert is_same
print("the same logits, to 1e-9:", is_same)
figure = show_grid(torch.cat([x[:4], puzzle[:4]]), columns=4, row_titles=["images", "shuffled"])
show(figure, "Four images, and the same images with their patches in another order.")

# %% [markdown]
# *The wrapper gives both rows the same logits.* It is the symptom of (8.6): the position embedding is missing. The
# wrapper calls `patch_embed` and `blocks`, and what the backbone does in between it leaves out.
#
# **Experiment 4: no prompts.** With $n=0$ nothing is added, and what reaches the head must be what the backbone
# itself computes. Hand the head's input out, and compare, the position embedding mended:


# %% slide=["# Add nothing, and compare", "With no prompts, what reaches the head must be what the backbone computes.", "[output]", "Positions and the final norm are both missing. A test of shapes would never have told."]
def head_input(positions, final_norm):
    """What reaches the head of a wrapper without prompts, (8, d)."""
    z = torch.cat([cls, vit.patch_embed(x)], dim=1)
    z = vit.blocks(z + vit.pos_embed if positions else z)
    return (vit.norm(z) if final_norm else z)[:, 0]


own = vit.forward_features(x)[:, 0]
for settings in ((False, False), (False, True), (True, False), (True, True)):
    error = (head_input(*settings) - own).norm() / own.norm()
    assert (error < 1e-9) == all(settings)
    print("positions {!s:5}  final norm {!s:5}".format(*settings), f" relative error {error:.2f}")

# %% [markdown]
# The final normalisation was missing as well. *Add nothing and compare* is the strongest test in this chapter: it
# needs no training, and no eye for code.
#
# **Experiment 5: train one step.** The comment says that the backbone is frozen.

# %% slide=["# A comment freezes nothing", "? The wrapper says 'this stays frozen'. One step of AdamW. What has moved?", "[output]", "What stays put is what the wrapper never calls."]
before = copy.deepcopy(second.backbone.state_dict())
optimizer = torch.optim.AdamW((p for p in second.parameters() if p.requires_grad), lr=1e-3)
cross_entropy(second(x), torch.arange(8)).backward()
optimizer.step()
changed = [name for name, tensor in second.backbone.state_dict().items() if not tensor.equal(before[name])]
trained = sum(p.numel() for p in second.parameters() if p.requires_grad)
print(
    f"parameters that train: {trained:,}; tensors of the backbone that moved: {len(changed)} of {len(before)}"
)
assert before.keys() - set(changed) == {"pos_embed", "norm.weight", "norm.bias", "head.weight", "head.bias"}

# %% [markdown]
# A comment freezes nothing. What stays put after all is what the wrapper never calls: the position embedding, the
# final norm and the old head.
#
# **Experiment 6: look at the sizes.** How long are the tokens of an image, these prompts, and those of the paper's
# code?

# %%
in_block_1 = torch.cat([cls, e], 1) + vit.pos_embed
drawn = torch.randn(1000, vit.embed_dim, generator=torch.Generator().manual_seed(3))
print(f"tokens of an image:  standard deviation {in_block_1[:, 1:].std():.2f}")
print(f"randn prompts:       standard deviation {drawn.std():.2f}")
print(f"published prompts:   standard deviation {(2 / (48 + vit.embed_dim)) ** 0.5:.2f}")

# %% [markdown]
# Ten times as long as the published ones. This is no fault that the logits show, but a learning rate from the paper
# does not suit such prompts: 'How large a prompt begins', below, says why.
#
# **Experiment 7: call `.train()`.** Every training loop does. On a backbone that was built with stochastic depth and
# dropout (in timm both are 0 unless one asks for them):

# %%
torch.manual_seed(0)
restless = VisionTransformer(
    img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, drop_path_rate=0.3, proj_drop_rate=0.1
)
wrapped = SecondEvening(restless, num_prompts=5, num_classes=8).train()
is_same = torch.equal(wrapped(x), wrapped(x))
assert not is_same
print("twice the same images, the same logits:", is_same)

# %% [markdown]
# The features that the prompts are to learn from now change at every call, for the sake of weights that are not
# trained. A frozen backbone belongs in evaluation mode, whatever the wrapper's `.train()` says.
#
# **Experiment 8: save it.** What was learned are five prompts and a head.

# %% slide=["# Nine faults, and the experiments that find them", "| fault | found by |\n|---|---|\n| class token not expanded | two images in the place of one |\n| no position embedding | shuffling the patches |\n| no final norm; only one kind of ViT | no prompts, and comparing |\n| backbone not frozen | one step, and counting |\n| dropout in the backbone | calling twice after `.train()` |\n| whole backbone stored | counting what is saved |", "Two more: an undefined name, and prompts ten times as long as published ones."]
stored = sum(tensor.numel() for tensor in second.state_dict().values())
learned = second.prompts.numel() + sum(p.numel() for p in second.head.parameters())
print(f"numbers learned: {learned:,}; numbers in state_dict(): {stored:,}")

# %% [markdown]
# **Experiment 9: other backbones.** The *add nothing and compare* test, on timm models that are built a little
# differently:


# %%
def small_vit(seed=0, kind=VisionTransformer, **settings):
    """A ViT of timm, small enough to try things on, none of whose weights is zero."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**size | settings).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


variants = {
    "class token": small_vit(),
    "registers": small_vit(reg_tokens=2),
    "norm_pre, as in CLIP": small_vit(pre_norm=True),
    "no class token": small_vit(class_token=False, global_pool="avg"),
}
found = {}
for name, model in variants.items():
    try:
        z = model.patch_embed(x)
        z = torch.cat([model.cls_token.expand(len(x), -1, -1), z], dim=1) + model.pos_embed
        z = model.norm(model.blocks(z))
        found[name] = "equal" if torch.allclose(z, model.forward_features(x)) else "another answer"
    except (RuntimeError, AttributeError) as error:
        found[name] = type(error).__name__
    print(f"{name:22} {found[name]}")
assert list(found.values()) == ["equal", "RuntimeError", "another answer", "AttributeError"]

# %% [markdown]
# Even with everything mended that we found, the wrapper fits one kind of backbone only, and on another it may compute
# something else without a word. The list, with what each experiment was:
#
# | fault | found by |
# |---|---|
# | a name that is not defined | making one |
# | the class token is not expanded | two images; one image passes |
# | no position embedding | shuffling the patches |
# | no final normalisation | no prompts, and comparing |
# | the backbone is not frozen | counting; one step |
# | prompts ten times as long as published ones: they turn a tenth as far in a step, or less | standard deviations |
# | `.train()` switches dropout on in the backbone | calling twice |
# | the whole backbone is stored with each task | counting |
# | only one kind of ViT | no prompts, and comparing, on others |
#
# The rest of the chapter builds it without them. (The lecture also names a deep variant. The wrapper has none; that
# is another method, and no fault.)

# %% [markdown] tags=["core"]
# ## Prompts
#
# A **prompt** is a vector of width $d$, trained by gradient descent, and treated like a token. $n$ of them, the rows
# of $P\in\mathbb R^{n\times d}$, go between the prefix and the patches. Write
# $z_{0,\text{cls}},z_{0,1},\dots,z_{0,N_p}$ for the rows of (8.2), the class token and the patches:
#
# $$\tilde z_0=\bigl[z_{0,\text{cls}},\,P,\,z_{0,1},\dots,z_{0,N_p}\bigr] \tag{8.7, definition}$$
#
# They are put in *after* the position embedding has been added, so that they have none: a prompt has no place in the
# image. (Its place in the sequence is of no importance either, since the blocks know no order; but whoever reads the
# result wants to find the class token where it was.) With prompts at the first block only, this is **VPT-shallow**.
#
# **Exercise 2.** Fill in `insert_prompts`. Prompts may be the same for all images, $(n,d)$, or different ones for
# each, $(B,n,d)$.


# %% tags=["export", "exercise"]
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
    ### BEGIN SOLUTION
    prompts = prompts.expand(len(tokens), *prompts.shape[-2:])  # (B, n, d)
    return torch.cat([tokens[:, :num_prefix], prompts, tokens[:, num_prefix:]], dim=1)
    ### END SOLUTION


# %% slide=["# Prompts go between prefix and patches", "$$\\tilde z_0=\\bigl[z_{0,\\text{cls}},\\,P,\\,z_{0,1},\\dots,z_{0,N_p}\\bigr] \\tag{8.7}$$", "[code insert_prompts]", "After the position embedding: a prompt has no place in the image."]
check("visual_prompt_tuning.insert_prompts", insert_prompts)

# %% [markdown] tags=["optional"]
# ### How large a prompt begins *(at a second reading)*
#
# Jia et al. draw the prompts uniform on $[-v,v]$ with Glorot and Bengio's $v$ for a map from $3p^2$ to $d$ numbers,
#
# $$P_{kj}\sim\mathcal U(-v,v),\qquad v=\sqrt{\frac6{3p^2+d}},\qquad
# \operatorname{Var}[P_{kj}]=\frac{v^2}3=\frac2{3p^2+d} \tag{8.8}$$
#
# For ViT-B/16 with $d=768=3\cdot16^2$ that is a standard deviation of 0.036; for our backbone, whose patches and
# width are smaller, of 0.10, well below that of the tokens.
#
# What does the length matter? To attention in the block that they enter, nothing: for $c>0$ is
# $\operatorname{LN}(cP)=\operatorname{LN}(P)$, up to the small number that LN adds to the variance. So by the chain
# rule the gradient at $cP$ is $1/c$ of that at $P$. A step of Adam, whose size hardly depends on that of the
# gradient, turns a prompt that is ten times as long a tenth as far, and a step of SGD a hundredth. In VPT-shallow
# the length also decides how much of the prompt survives in the residual stream.
#
# **Exercise 3.** Fill in `initial_prompts`. It gets the draws, uniform on $[0,1)$, so that it can be checked.


# %% tags=["export", "exercise"]
def initial_prompts(u, patch_values):
    """Stretch uniform draws to the range in which prompts begin.

    Args:
        u: uniform on [0, 1), (..., d).
        patch_values: how many numbers a patch has: 3 p^2 for p x p pixels of three channels.

    Returns:
        Like u, uniform on [-v, v).

    Source: the code of Jia et al. 2022; Glorot and Bengio 2010, equation 16.
    """
    ### BEGIN SOLUTION
    # v = sqrt(6 / (3 p^2 + d))
    v = (6 / (patch_values + u.shape[-1])) ** 0.5
    return v * (2 * u - 1)
    ### END SOLUTION


# %% slide=["# How long should a prompt begin?", "$$P_{kj}\\sim\\mathcal U(-v,v),\\qquad v=\\sqrt{\\frac6{3p^2+d}} \\tag{8.8}$$", "? To attention, what is the difference between $P$ and $10P$?", "None: it is normalised first. But its gradient is a tenth, so a step turns it a tenth as far."]
check("visual_prompt_tuning.initial_prompts", initial_prompts)

# %%
grid = (torch.arange(10_000) + 0.5) / 10_000  # stands for the uniform distribution
drawn = torch.stack(
    [initial_prompts(grid[:, None].expand(-1, d), f)[:, 0] for d, f in ((160, 48), (768, 768))]
)
verify("8.8", drawn.var(dim=1, unbiased=False), torch.tensor([2 / (48 + 160), 2 / (768 + 768)]), atol=1e-8)
print("standard deviations:", [round(value, 3) for value in drawn.std(dim=1).tolist()])

# %% [markdown] tags=["core"]
# ### Deep prompts
#
# In VPT-shallow the prompts pass through the blocks like other tokens, and what comes out of block 1 at their places
# has already changed with the image. **VPT-deep** throws it away, and puts fresh prompts of its own into every block.
# Write $z_{\ell,\text{cls}},z_{\ell,1},\dots,z_{\ell,N_p}$ for what leaves block $\ell$ at the places of the class
# token and of the patches. Into block $\ell+1$ goes
#
# $$\tilde z_{\ell}=\bigl[z_{\ell,\text{cls}},\,P_{\ell},\,z_{\ell,1},\dots,z_{\ell,N_p}\bigr],
# \qquad\ell=0,\dots,L-1 \tag{8.9, definition}$$
#
# So the number of tokens is $1+n+N_p$ at each block: the prompts are *replaced*, not added to the old ones, and the
# sequence does not grow. There are $L\,n$ prompts in all.
#
# **Exercise 4.** Fill in `replace_prompts`, without changing `tokens` in place.


# %% tags=["export", "exercise"]
def replace_prompts(tokens, prompts, num_prefix):
    """Put fresh prompts into the places of those that a block has let out.

    Args:
        tokens: what a block returns, (B, N, d): num_prefix tokens, n prompts, then patches.
        prompts: the fresh ones, (n, d) or (B, n, d).
        num_prefix: the number of tokens before the first prompt.

    Returns:
        (B, N, d), a new tensor.

    Source: Jia et al. 2022, section 3.2 (VPT-deep).
    """
    ### BEGIN SOLUTION
    num_prompts = prompts.shape[-2]
    rest = torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + num_prompts :]], dim=1)
    return insert_prompts(rest, prompts, num_prefix)
    ### END SOLUTION


# %%
check("visual_prompt_tuning.replace_prompts", replace_prompts)

# %% [markdown]
# With numbers: width 2, a class token of ones, prompts of tens, patches 3, 4, 5.

# %% slide=["# Deep prompts: replaced at every block", "$$\\tilde z_{\\ell}=\\bigl[z_{\\ell,\\text{cls}},\\,P_{\\ell},\\,z_{\\ell,1},\\dots,z_{\\ell,N_p}\\bigr] \\tag{8.9}$$", "A class token of 1, prompts of tens, patches 3, 4, 5:", "[output]", "The sequence does not grow."]
tokens = torch.tensor([1.0, 3, 4, 5])[None, :, None].expand(1, 4, 2)
entering = insert_prompts(tokens, torch.full((2, 2), 10.0), num_prefix=1)
print("into block 1:  ", entering[0, :, 0].tolist())
leaving = entering + 0.5  # as if this were what the block does
print("out of block 1:", leaving[0, :, 0].tolist())
print("into block 2:  ", replace_prompts(leaving, torch.full((2, 2), 20.0), num_prefix=1)[0, :, 0].tolist())

# %% [markdown] tags=["core"]
# ## What a prompt can do
#
# Only attention mixes tokens, so only there can a prompt act on the others. How? In each head, split the sum (8.4)
# into prompts $\Pi$ and the other tokens, and call $\lambda_i$ the share of its attention that token $i$ pays to
# prompts:
#
# $$\lambda_i=\sum_{j\in\Pi}a_{ij} \tag{8.10, definition}$$
#
# (Elsewhere in the course $\lambda$ is a log signal-to-noise ratio; in this chapter it is not.)
#
# Let $a^0$ be the weights without prompts, for the same inputs of this layer. The numerators of (8.4) are the same in
# both, and of the softmax over all tokens the others keep the share $1-\lambda_i$. So
# $a_{ij}=(1-\lambda_i)\,a^0_{ij}$ for $i,j\notin\Pi$, and
#
# $$o_i=(1-\lambda_i)\,o_i^{\,0}+\lambda_i\,\bar p_i,\qquad
# \bar p_i=\frac1{\lambda_i}\sum_{j\in\Pi}a_{ij}\,v_j \tag{8.11}$$
#
# where $o_i^{\,0}=\sum_{j\notin\Pi}a^0_{ij}v_j$ is what the head would give *without* any prompts, and $\bar p_i$ an
# average of the prompts' own values. A prompt mixes in something, and fades the rest. What it cannot do is turn the
# head's view of the image:
#
# $$\frac{a_{ij}}{a_{im}}=\frac{a^{0}_{ij}}{a^{0}_{im}}\qquad\text{for all }j,m\notin\Pi \tag{8.12}$$
#
# Whichever of two patches was looked at more by token $i$, for given queries and keys, still is, and by the same
# factor. Full fine-tuning is free to change queries and keys, and with them this ratio. Prompts can only do so from
# afar: what they mix in at one block changes the queries and keys of the next.
#
# In VPT-shallow, too, every block looks at the prompts' places, but what stands there after block 1 is what the
# frozen weights have made of them. VPT-deep chooses it anew at each block, with $L$ times as many numbers. Neither
# contains the other; which does better is measured below.
#
# **Exercise 5.** Fill in `attention_to_prompts`, which computes $\lambda$ for all tokens.


# %% tags=["export", "exercise"]
def attention_to_prompts(weights, num_prefix, num_prompts):
    """The share of each token's attention that goes to the prompts.

    Args:
        weights: (B, heads, N, N) as `attention_weights` gives them; each row (last axis) has sum 1.
        num_prefix: the number of tokens before the first prompt.
        num_prompts: n.

    Returns:
        lambda, (B, heads, N) in [0, 1].

    Source: this course, equation 8.10.
    """
    ### BEGIN SOLUTION
    # lambda_i = sum over prompts j of a_ij
    return weights[..., num_prefix : num_prefix + num_prompts].sum(dim=-1)
    ### END SOLUTION


# %% slide=["# What a prompt can do: mix in, and fade the rest", "With $\\lambda_i$ the share of attention that token $i$ pays to prompts,", "$$o_i=(1-\\lambda_i)\\,o_i^{\\,0}+\\lambda_i\\,\\bar p_i \\tag{8.11}$$", "$o_i^{\\,0}$ is what the head would give without any prompt, $\\bar p_i$ an average of the prompts' values."]
check("visual_prompt_tuning.attention_to_prompts", attention_to_prompts)

# %%
n, block = 5, vit.blocks[0]
prompts = initial_prompts(torch.rand(n, vit.embed_dim, generator=torch.Generator().manual_seed(2)), 48)
z_0 = vit.pos_drop(torch.cat([cls, e], 1) + vit.pos_embed)
prompted = block.norm1(insert_prompts(z_0, prompts, num_prefix=1))  # (8, 70, d)
a, a_0 = attention_weights(block.attn, prompted), attention_weights(block.attn, block.norm1(z_0))
share = attention_to_prompts(a, 1, n)  # (8, heads, 70)
print(f"attention of the class token to {n} prompts among {a.shape[-1]} tokens, by head:")
print([round(value, 3) for value in share[:, :, 0].mean(dim=0).tolist()], f"by chance {n / a.shape[-1]:.3f}")

# %% [markdown]
# With prompts ten times as long the weights are the same, and the gradient is a tenth:

# %%
gradients = []
for scale in (1, 10):
    scaled = (scale * prompts).requires_grad_()
    weights = attention_weights(block.attn, block.norm1(insert_prompts(z_0, scaled, num_prefix=1)))
    gradients += torch.autograd.grad(weights[:, :, 0, 1 : 1 + n].sum(), scaled)
    print("the same weights, to 0.001:", torch.allclose(weights, a, atol=1e-3))
    assert torch.allclose(weights, a, atol=1e-3)
is_a_tenth = (gradients[0] - 10 * gradients[1]).norm() < 0.01 * gradients[0].norm()
assert is_a_tenth
print("a tenth of the gradient, to 1%:", bool(is_a_tenth))

# %% slide=["# What it cannot do: turn the head's view", "(8.12)", "Whichever of two patches was looked at more still is, by the same factor.", "? How can prompts change it after all?", "From afar: what they mix in at one block changes queries and keys of the next."]
others = [0, *range(1 + n, a.shape[-1])]  # the class token and the patches
values = (
    block.attn.qkv(prompted)[..., 2 * vit.embed_dim :].view(8, 70, block.attn.num_heads, -1).transpose(1, 2)
)
without = a_0 @ values[:, :, others]  # o^0, (8, heads, 65, d_h)
mixed_in = a[:, :, others, 1 : 1 + n] @ values[:, :, 1 : 1 + n] / share[:, :, others, None]
rest = 1 - share[:, :, others, None]
verify("8.11", rest * without + (1 - rest) * mixed_in, (a @ values)[:, :, others], atol=1e-12)
ratios = [w / w[..., [5]] for w in (a[:, :, others][..., others], a_0)]  # to the sixth token
verify("8.12", ratios[0].log(), ratios[1].log(), atol=1e-9)

# %% [markdown] tags=["core"]
# ## The network with prompts
#
# Now put it together, and let timm do what it can do itself: `_pos_embed` knows about class tokens, registers and
# positions of every variant, `norm_pre` is there or is the identity, and `forward_head` with `pre_logits=True` pools
# as the model was made to (class token, mean over patches, attention) and normalises. Two places remain ours: prompts
# go in after the prefix, and come out again before pooling, so that a mean over the patches is one over patches only.
#
# What does not fit is refused, with a word why.


# %% tags=["export"]
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
    tokens = insert_prompts(tokens, prompts[0], vit.num_prefix_tokens)  # (B, N + n, d)
    for number, block in enumerate(vit.blocks):
        if 0 < number < len(prompts):
            tokens = replace_prompts(tokens, prompts[number], vit.num_prefix_tokens)
        tokens = block(tokens)
    return vit.norm(tokens)


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


def pooled(vit, tokens, num_prompts):
    """What a backbone's own head would read, (B, d): the class token, or as it pools, without prompts.

    tokens, (B, N + n, d) with n = num_prompts, are what `prompted_tokens` returns for vit.
    """
    first, last = vit.num_prefix_tokens, vit.num_prefix_tokens + num_prompts
    tokens = torch.cat([tokens[:, :first], tokens[:, last:]], dim=1)  # (B, N, d)
    return vit.forward_head(tokens, pre_logits=True)


# %% [markdown]
# Nothing added, nothing changed, on all the variants, and on a DeiT with its distillation token:

# %%
variants |= {
    "distillation token": small_vit(kind=VisionTransformerDistilled),
    "layer scale, dynamic size": small_vit(init_values=0.1, dynamic_img_size=True),
    "no position for the class": small_vit(no_embed_class=True, reg_tokens=4),
    "attention pooling": small_vit(class_token=False, global_pool="map"),
    "our backbone": vit,
}
nothing = {name: torch.zeros(1, 0, model.embed_dim) for name, model in variants.items()}
for name, model in variants.items():
    tokens = prompted_tokens(model, x, nothing[name])
    features = pooled(model, tokens, 0)
    assert torch.equal(tokens, model.forward_features(x))
    assert torch.allclose(features, model.forward_head(model.forward_features(x), pre_logits=True))
    with_five = insert_prompts(tokens, torch.randn(5, model.embed_dim), model.num_prefix_tokens)
    assert torch.equal(pooled(model, with_five, 5), features)
    print(f"{name:26} tokens {tuple(tokens.shape)}, features {tuple(features.shape)}: equal")

# %% [markdown]
# ### Frozen
#
# A weight is frozen if its `requires_grad` is False: no gradient is computed for it, it stays `None`, and an
# optimiser passes over it. A gradient of *zero* would not do. AdamW's weight decay acts on every weight that has a
# gradient, whatever its value; so a backbone whose gradients are set to zero, or multiplied by zero, shrinks step by
# step without anybody noticing:

# %% slide=["# Frozen means no gradient, not a gradient of zero", "[output]", "AdamW's weight decay acts on every weight that has a gradient, whatever its value.", "? And the frozen network in `torch.no_grad()`?", "That cuts the prompts off: they lie before it."]
for name, gradient in (("None", None), ("zero", torch.zeros(1))):
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.05)
    for _ in range(1000):
        weight.grad = gradient
        optimizer.step()
    print(f"gradient {name}: after 1,000 steps the weight is {weight.item():.3f}")

# %% [markdown]
# Each step multiplies by $1-0.01\cdot0.05$, and $0.9995^{1000}=0.606$: the decay, and nothing else.
#
# The blocks themselves must be *differentiated through*, since the prompts lie before them. Whoever wraps the frozen
# network in `torch.no_grad()` cuts the prompts off, and trains a linear probe with a decoration.
#
# The class below holds the backbone, does not copy it (many tasks are to share it), freezes it in place, and keeps it
# in evaluation mode. `prompt_dropout` sets single numbers of the prompts to zero while training, each with that
# probability, and enlarges the others accordingly, separately for each image; the code of Jia et al. has it as
# well.


# %% tags=["export"]
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
        self.vit = vit.requires_grad_(False).eval()
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


# %% [markdown]
# The experiments again, where they apply. At every block there are $1+n+N_p$ tokens, and each block's prompts have a
# gradient; a batch of one and of many give the same, and a shuffled image something else; nothing added gives the
# backbone's features. After ten steps with weight decay the backbone is what it was, bit for bit, even if it has
# stochastic depth.

# %% slide=["# The experiments again, as tests", "- the same number of tokens at each block, and gradients for each block's prompts", "- a batch of one as in a batch; a shuffled image gives something else", "- nothing added, nothing changed", "- after ten steps the backbone is what it was, bit for bit"]
counts = []
hooks = [block.register_forward_hook(lambda *call: counts.append(call[-1].shape[1])) for block in vit.blocks]
model = VPT(vit, num_classes=8, num_prompts=5, deep=True)
logits = model(x)
for hook in hooks:
    hook.remove()
assert counts == [1 + 5 + 64] * len(vit.blocks)
print("tokens after each block:", counts)
cross_entropy(logits, torch.arange(8)).backward()
assert (model.prompts.grad.flatten(1).norm(dim=1) > 0).all()
assert not torch.allclose(model(puzzle), logits)
is_same = torch.allclose(model(x[:1]), logits[:1])
assert is_same
print("batch of one as in a batch:", is_same)
is_same = torch.equal(VPT(vit, 8, 0).forward_features(x), vit.forward_features(x))
assert is_same
print("with no prompt the backbone's own:", is_same)

# %%
model = VPT(restless, num_classes=8, num_prompts=5, deep=True).train()
is_same = torch.equal(model(x), model(x))
assert is_same
print("twice the same images, the same logits:", is_same)
before = copy.deepcopy(restless.state_dict())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    loss = cross_entropy(model(x), torch.arange(8))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
has_fallen = losses[-1] < losses[0]
is_same = all(tensor.equal(before[name]) for name, tensor in restless.state_dict().items())
assert has_fallen and is_same
print("the loss fell:", has_fallen)
print("bit for bit the same backbone:", is_same)

# %% [markdown] tags=["core"]
# ## What is stored
#
# ### The count
#
# Trained are the prompts and the head, which has $d$ weights and a bias for each class:
#
# $$\text{shallow: }\;n\,d+(d+1)K,\qquad\text{deep: }\;L\,n\,d+(d+1)K \tag{8.13}$$


# %% tags=["export"]
def trainable_parameters(model):
    """The parameters of a model that train, as a list: what an optimiser is to be given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# %% slide=["# What is stored: prompts and a head", "(8.13)", "$$r=\\frac{M}{L'\\,n\\,d+(d+1)K} \\tag{8.14}$$", "? 'A hundred to a thousand times less', says the lecture. On what does that depend?"]
L, d, K, n = len(vit.blocks), vit.embed_dim, 10, 8
counted = [sum(p.numel() for p in trainable_parameters(VPT(vit, K, n, deep=deep))) for deep in (False, True)]
print("trained, shallow and deep:", counted)
verify("8.13", counted, [n * d + (d + 1) * K, L * n * d + (d + 1) * K], atol=0)

# %% [markdown]
# Against the backbone's $M$ parameters, which a fine-tuned copy would store anew for each task, that is a factor of
#
# $$r=\frac{M}{L'\,n\,d+(d+1)K},\qquad L'=1\text{ (shallow) or }L\text{ (deep)} \tag{8.14, definition}$$
#
# The copy has a head, too; it is left out above the line, since it hardly changes the ratio.
#
# The lecture says that VPT reduces storage by 100 to 1000 times, and that prompts are 0.1% of the parameters. Let us
# compute it for the three sizes of the paper, not for one.
#
# **Exercise 6.** Fill in `storage_ratio`, for many models at once. `depth` is $L'$, and $K=0$ leaves the head out.


# %% tags=["export", "exercise"]
def storage_ratio(backbone, depth, num_prompts, dim, num_classes):
    """How many times less a task stores as prompts and a head than as a copy of the backbone.

    Args:
        backbone: the backbone's number of parameters without its head, floating point, (M,).
        depth: the number of blocks that get prompts: 1 for VPT-shallow, all for VPT-deep; (M,).
        num_prompts: n, for each of them; (M,) or a number.
        dim: d, the width; (M,).
        num_classes: K, a number; 0 leaves the head out of the count.

    Returns:
        (M,), in the dtype of `backbone`.

    Source: Jia et al. 2022, section 3.2.
    """
    ### BEGIN SOLUTION
    # M / (L' n d + (d + 1) K)
    return backbone / (depth * num_prompts * dim + (dim + 1) * num_classes)
    ### END SOLUTION


# %%
check("visual_prompt_tuning.storage_ratio", storage_ratio)

# %%
names = ["vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"]
with torch.device("meta"):  # shapes without numbers: nothing is downloaded or filled
    giants = [timm.create_model(name, num_classes=0) for name in names]
M = torch.tensor([float(sum(p.numel() for p in giant.parameters())) for giant in giants])
depths = torch.tensor([len(giant.blocks) for giant in giants])
widths = torch.tensor([giant.embed_dim for giant in giants])
print("                    ViT-B     ViT-L     ViT-H")
print(f"{'parameters':16}" + "".join(f"{m / 1e6:8.1f} M" for m in M))
for kind, num in (("shallow", 100), ("deep", 10), ("deep", 50), ("deep", 100)):
    blocks = depths if kind == "deep" else torch.ones(3)
    for classes in (0, 100):
        r = storage_ratio(M, blocks, num, widths, classes)
        print(
            f"{kind + f', n = {num}':16}" + "".join(f"{value:9.0f}x" for value in r),
            f" with a head for {classes} classes",
        )

# %% slide=["# The claim holds from ten deep prompts to some hundred", "[picture]", "Grey: the claim. Shallow prompts save more, and a head takes its share as well."]
lengths = torch.logspace(0, 2.3, 40)
figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
axis.axhspan(100, 1000, color="lightgrey", alpha=0.5, label="the lecture's claim")
for giant, m, depth, size, colour in zip(("ViT-B", "ViT-L", "ViT-H"), M, depths, widths, colours):
    for blocks, style in ((torch.ones(1), "--"), (depth, "-")):
        r = storage_ratio(m.expand(40), blocks, lengths, size, 0)
        kind = "deep" if style == "-" else "shallow"
        axis.loglog(lengths, r, style, color=colour, label=f"{giant}, {kind}")
axis.set(xlabel="prompts n", ylabel="times less than a copy")
axis.legend(ncols=2, fontsize="small")
show(figure, "The storage ratio falling with the number of prompts, for three sizes, shallow and deep.")

# %%
per_prompt = M / (depths * widths)  # r for one deep prompt, without a head
first, last = (per_prompt / 1000).ceil().int().tolist(), (per_prompt / 100).floor().int().tolist()
print("deep prompts save 1000 to 100 times: from n =", first, "to", last)
assert (first, last) == ([10, 13, 16], [93, 123, 153])

# %% [markdown]
# *Without heads. Shallow prompts save a factor of a thousand and more up to $n=100$. Deep ones lie in the range of
# the claim (grey) from $n=10$ (ViT-B), 13 (ViT-L) or 16 (ViT-H) on, and leave it beyond 93, 123 or 153. A head takes
# its share as well: with 100 classes it is as large as a hundred shallow prompts. '0.1% of the parameters' is a
# factor of 1000: on ViT-B that is shallow with $n=100$, or deep with $n=10$.*

# %% [markdown] tags=["optional"]
# ### What more tokens cost *(at a second reading)*
#
# Prompts are small to store, but each is a token that all blocks have to compute, for every image, for ever. A
# block's products are the four maps of attention ($4Nd^2$ multiplications for $N$ tokens), the two of the MLP
# ($8Nd^2$), and queries with keys and weights with values ($2N^2d$). With $n$ tokens more, the blocks cost
#
# $$\frac{12(N+n)d^2+2(N+n)^2d}{12Nd^2+2N^2d}=\frac{(N+n)(6d+N+n)}{N(6d+N)} \tag{8.15}$$
#
# times as much. torch can count the products itself:


# %% slide=["# Prompts are small to store, and cost at every image", "$$\\frac{(N+n)(6d+N+n)}{N(6d+N)} \\tag{8.15}$$", "times the products of the blocks, for ever.", "Of these methods, only prompts make the network slower."]
def products(model, x):
    """How many floating-point operations the matrix products of a model's blocks take."""
    with torch.no_grad(), attention_by_products(model), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


few = torch.randn(1, 65, d)
counted = [products(vit.blocks, torch.randn(1, 65 + n, d)) / products(vit.blocks, few) for n in (8, 50, 100)]
N, n = 65, torch.tensor([8.0, 50, 100])
verify("8.15", counted, (N + n) * (6 * d + N + n) / (N * (6 * d + N)), atol=1e-12)
print("our backbone, n = 8, 50, 100:", [f"{ratio:.2f}x" for ratio in counted])
N, wide = 197, 768
print(
    "ViT-B/16:                    ",
    [f"{(N + m) * (6 * wide + N + m) / (N * (6 * wide + N)):.2f}x" for m in (8, 50, 100)],
)

# %% [markdown]
# A linear probe and a fine-tuned network cost at inference what the backbone costs; so do tuned biases. Prompts are
# the only one of these methods that makes the network slower: 100 of them on ViT-B cost half as many products again.

# %% [markdown] tags=["optional"]
# ### A file for a task *(at a second reading)*
#
# What is to be written is the tensors that were trained, and what they belong to. Prompts mean nothing to another
# backbone, not even to one of the same shape. So a task remembers a *fingerprint* of the backbone: a hash of all its
# weights but the old head's. Like torch, which lets a `state_dict` carry its `_metadata`, the state of a task carries
# it as an attribute: its entries are the trained tensors and nothing else.


# %% tags=["export"]
def backbone_fingerprint(vit):
    """A text that tells backbones apart: a hash of all weights but those of the heads.

    Args:
        vit: a timm VisionTransformer, on any device. A copy in float64 of weights in float32 has the same
            fingerprint, one that was rounded to half precision another. Settings that are no weights do not
            count.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        if not name.startswith(("head.", "head_dist.")):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor_bytes(tensor.float()))
    return digest.hexdigest()


TASK_TENSORS = ("prompts", "head.weight", "head.bias")  # all that is trained and stored


class VPT(VPT):
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


def check_task_state(state, vit, fingerprint):
    """Raise unless a task's state is whole and belongs to a backbone.

    Args:
        state: what `VPT.task_state_dict` returns.
        vit: a timm VisionTransformer.
        fingerprint: its `backbone_fingerprint`.

    Raises:
        ValueError: if tensors are missing or too many, or do not fit each other or the backbone.
    """
    if set(state) != set(TASK_TENSORS):
        raise ValueError(f"state must have the tensors {', '.join(TASK_TENSORS)}; got {', '.join(state)}")
    prompts, weight, bias = (state[name] for name in TASK_TENSORS)
    if prompts.ndim != 3 or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"state must have prompts (1 or L, n, d), weights (K, d) and biases (K,); got {shapes}"
        )
    if {prompts.shape[2], weight.shape[1]} != {vit.embed_dim} or prompts.shape[0] not in (1, len(vit.blocks)):
        raise ValueError(
            f"state must belong to a backbone of {len(vit.blocks)} blocks of width {vit.embed_dim}; its "
            f"prompts have shape {tuple(prompts.shape)}, its head {tuple(weight.shape)}"
        )
    backbone = getattr(state, "backbone", None)
    if backbone not in (None, fingerprint):
        raise ValueError(
            "state must belong to this backbone; it was learned on another one of the same depth and width, "
            f"or before the weights were rounded (fingerprint {backbone[:12]}, here {fingerprint[:12]})"
        )


# %% [markdown]
# On the disk it is a safetensors file, raw numbers: unlike a pickle, reading it executes nothing. Beside the numbers it
# says what it is and to which backbone it belongs. The kit adds a checksum, which reveals damage. Numbers do not say what
# they are about: the attribute `about` of a state goes into the file, too, such as the names of the classes.


# %% tags=["export"]
TASK_FORMAT = "lecture26 task"


def save_task(file, state):
    """Write what a task has learned into a safetensors file.

    Args:
        file: the path; a file that is there is replaced as a whole.
        state: what `VPT.task_state_dict` returns. Its attribute `about`, if it has one, is a dict of plain
            values (JSON) to keep beside the numbers, such as the names of the classes.

    Raises:
        ValueError: if the state does not say what backbone it belongs to.
    """
    if getattr(state, "backbone", None) is None:
        raise ValueError(
            "state must have the attribute `backbone`, as VPT.task_state_dict() gives it; it has none"
        )
    about = getattr(state, "about", {})
    told = {"format": TASK_FORMAT, "backbone": state.backbone}
    write_tensors(file, state, told | ({"about": json.dumps(about)} if about else {}))


def load_task(file):
    """Read what `save_task` has written.

    Args:
        file: the path.

    Returns:
        An OrderedDict like that of `VPT.task_state_dict`; its attribute `about` is {} if nothing was told.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no task's file.
    """
    tensors, metadata = read_tensors(file, format=TASK_FORMAT)
    if "backbone" not in metadata:
        raise ValueError(f"{file} is damaged: it does not say what backbone it belongs to")
    state = OrderedDict(tensors)
    state.backbone, state.about = metadata["backbone"], json.loads(metadata.get("about", "{}"))
    return state


# %% [markdown]
# There and back, and what is refused: another width, another depth, another backbone of the same shape.

# %%
model = VPT(variants["class token"], num_classes=4, num_prompts=3, deep=True)
folder = Path(tempfile.mkdtemp())
save_task(folder / "task.safetensors", model.task_state_dict())
same = VPT(variants["class token"], num_classes=4, num_prompts=3, deep=True)
same.load_task_state_dict(load_task(folder / "task.safetensors"))
is_same = torch.equal(same(x), model(x))
assert is_same
print("the same logits after loading:", is_same)
for name, other in {
    "wider": small_vit(embed_dim=48),
    "deeper": small_vit(depth=4),
    "other": small_vit(seed=1),
}.items():
    try:
        VPT(other, num_classes=4, num_prompts=3, deep=True).load_task_state_dict(model.task_state_dict())
    except ValueError as error:
        print(f"{name:7}refused:", str(error).split(";")[0])
    else:
        raise AssertionError("not refused")

# %% [markdown] tags=["core"]
# ## The alternatives
#
# Prompts are one way among several:
#
# - **Linear probe**: nothing but a new head. The features are what they are. This is a `VPT` without prompts, so it
#   has the very same head, the same file, the same tests.
# - **Biases only** (Zaken et al. 2022, *BitFit*): the bias of every layer, normalisations included, and a head.
# - **Prompts**, shallow or deep.
# - **Full fine-tuning**: everything. It begins at the backbone's weights and ends elsewhere, so it has to work on a
#   copy.


# %% tags=["export"]
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


# %% [markdown] tags=["optional"]
# ### Only the biases *(at a second reading)*
#
# Most layers are $z=Wx+b$. Suppose that all weights $W$ stay, and only the $b$ train. By the chain rule a bias that
# is added to every token of every image collects all their gradients,
#
# $$\frac{\partial\mathcal L}{\partial b}=\sum_{\text{images}}\sum_{\text{tokens}}\frac{\partial\mathcal L}{\partial z} \tag{8.16}$$
#
# and does not need the inputs $x$, which a weight's gradient does. (What softmax, GELU and LN need for gradients of
# their own stays in memory all the same.) A bias adds the same vector to each token; a prompt, (8.11), moves token
# $i$ by $\lambda_i(\bar p_i-o_i^{\,0})$, different for each. And a bias of the queries changes the ratio of (8.12),
# which no prompt of the same block can: $\Delta b_q$ multiplies $a_{ij}/a_{im}$ by
# $\exp\bigl(\Delta b_q\cdot(k_j-k_m)/\sqrt{d_h}\bigr)$.
#
# **Exercise 7.** Fill in `bias_gradient`.


# %% tags=["export", "exercise"]
def bias_gradient(grad_output):
    """The gradient of a bias that has been added to every token of every image.

    Args:
        grad_output: the gradient with respect to what the layer returned, (..., d).

    Returns:
        The gradient with respect to its bias, (d,).

    Source: this course, equation 8.16.
    """
    ### BEGIN SOLUTION
    # dL/db = sum over images and tokens of dL/dz
    return grad_output.flatten(end_dim=-2).sum(dim=0)
    ### END SOLUTION


# %%
check("visual_prompt_tuning.bias_gradient", bias_gradient)


# %% tags=["export"]
def bias_tuning(vit, num_classes):
    """A copy of a backbone with a new head, of which the biases and the head train.

    Args:
        vit: a VisionTransformer of timm; it stays as it is, frozen or not.
        num_classes: K.

    Returns:
        A VisionTransformer: model(x (B, C, H, W)) -> logits (B, K).

    Raises:
        TypeError, ValueError: as `VPT` does.

    Source: Zaken, Goldberg and Ravfogel 2022, section 3.
    """
    model = full_fine_tune(vit, num_classes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or name.startswith(("head.", "head_dist.")))
    return model


# %% tags=["export"]
def freeze_all_but(parameters, endings):
    """Let those parameters train whose names end in one of some endings, and freeze the others.

    Args:
        parameters: by name, as `dict(model.named_parameters())` gives them; changed in place: each either asks
            for gradients, or does not and has none left over (.grad is None).
        endings: a tuple of texts, such as (".bias", "head.weight"); () freezes everything.

    Returns:
        The list of those that train, in their order.

    Source: this course.
    """
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.endswith(endings))
        if not parameter.requires_grad:
            parameter.grad = None
    return [parameter for parameter in parameters.values() if parameter.requires_grad]


# %% tags=["export"]
def lora_linear(x, weight, bias, down, up, scale):
    """A linear layer with a low-rank change beside it.

    Args:
        x: tokens, (B, N, d_in).
        weight, bias: W, (d_out, d_in), and b, (d_out,), frozen.
        down: A, (r, d_in), the same for all images, or (B, r, d_in), one for each.
        up: B, (d_out, r) or (B, d_out, r).
        scale: s, a number.

    Returns:
        (B, N, d_out).

    Source: Hu et al. 2022, section 4.1, equation 3.
    """
    # z = W x + b + s B (A x)
    return x @ weight.mT + bias + scale * (x @ down.mT) @ up.mT


# %% tags=["export"]
def lora_merged(weight, down, up, scale):
    """The one matrix that does the same as a linear layer with its low-rank change.

    Args:
        weight: W, (d_out, d_in).
        down, up, scale: A, (r, d_in), B, (d_out, r), and s, as `lora_linear` takes them.

    Returns:
        (d_out, d_in), a new tensor.

    Source: Hu et al. 2022, section 4.1.
    """
    # W + s B A
    return weight + scale * up @ down


# %% tags=["export"]
class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank change, which begins at zero: x (B, N, d_in) -> (B, N, d_out).

    linear: an nn.Linear with a bias; rank: r; scale: s.
    Source: Hu et al. 2022, section 4.1.
    """

    def __init__(self, linear, rank, scale=1.0):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.down = nn.Parameter(
            linear.weight.new_empty(rank, linear.in_features).normal_(std=linear.in_features**-0.5)
        )
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x):
        return lora_linear(x, self.linear.weight, self.linear.bias, self.down, self.up, self.scale)


class Adapter(nn.Module):
    """A bottleneck beside the identity, which begins as the identity: h (B, N, d) -> (B, N, d).

    dim: d; width: m; like: a tensor of the dtype and device to take.
    Source: Houlsby et al. 2019, section 2.1.
    """

    def __init__(self, dim, width, like):
        super().__init__()
        self.down, self.up = (
            nn.Linear(*sizes, dtype=like.dtype, device=like.device) for sizes in ((dim, width), (width, dim))
        )
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h):
        # h + W_up GELU(W_down h + b_down) + b_up
        return h + self.up(nn.functional.gelu(self.down(h)))


HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def lora_tuning(vit, num_classes, rank=2):
    """A copy of a backbone with a new head, in which every block's queries, keys and values get a `LoRALinear`."""
    model = full_fine_tune(vit, num_classes)
    for block in model.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank)
    freeze_all_but(dict(model.named_parameters()), (".down", ".up", *HEADS))
    return model


def adapter_tuning(vit, num_classes, width=2):
    """A copy of a backbone with a new head and an `Adapter` at the end of each branch, before it is added."""
    model = full_fine_tune(vit, num_classes)
    for block in model.blocks:
        for branch in ("ls1", "ls2"):  # timm's layer scale, or the identity: what comes last in a branch
            adapter = Adapter(vit.embed_dim, width, like=block.norm1.weight)
            setattr(block, branch, nn.Sequential(getattr(block, branch), adapter))
    endings = (".down.weight", ".down.bias", ".up.weight", ".up.bias", *HEADS)
    freeze_all_but(dict(model.named_parameters()), endings)
    return model


# %% slide=["# Prompts are one way among several", "- **linear probe**: a new head, and nothing else", "- **biases only**: the same vector for each token", "- **prompts**: shallow, or deep", "- **full fine-tuning**: everything, on a copy", "? Which of them can change the ratio (8.12) within a block?"]
model = bias_tuning(vit, num_classes=8)
collected = []
layer = model.blocks[2].mlp.fc1
layer.register_full_backward_hook(
    lambda module, gradients_in, gradients_out: collected.append(gradients_out[0])
)
cross_entropy(model(x), torch.arange(8)).backward()
verify("8.16", layer.bias.grad, bias_gradient(collected[0]), atol=1e-12)
assert layer.weight.grad is None
print("the weight beside it has no gradient:", layer.weight.grad is None)

# %% [markdown] tags=["core"]
# ## A fair comparison
#
# Which of these methods is the best depends on how they are compared. One learning rate for all would be unfair:
# those that suit prompts and heads lie far above those for full fine-tuning. So the rules are: the same images, the
# same number of steps of the same batch size, the same linear head. Each method begins with two learning rates of
# its own, and goes on beyond the better one, by factors of three, until the best lies between two others (at most
# seven are tried). The *validation* images choose, by shorter runs of the first seed, 200 steps in the place of 600;
# the *test* images take no part in the choice, and say how good it is. Three seeds draw prompts, heads and the order
# of the images.
#
# Equal steps are a choice, too. A step costs more by one method than by another, and a method that has not settled
# after these steps might gain by more.
#
# Seven small tasks, of at most 800 training images each, none of them photographs of airplanes or cats:

# %% slide=["# A fair comparison begins with its rules", "[picture]", "Seven tasks, none of photographs: the same images and steps for all, each method at a learning rate of its own."]
torch.set_default_dtype(torch.float32)
tasks = ("digits", *TASKS)
sets = {task: downstream(task) for task in tasks}
pictures = torch.cat([images.batch(range(10))["image"] for images in sets.values()])
show(show_grid(pictures, columns=10, row_titles=list(sets)), "Ten images of each of the seven tasks.")
for task, images in sets.items():
    print(f"{task:14} {len(images):4} images, {len(downstream(task, 'test')):4} to test, "
          f"classes: {', '.join(images.labels['class'])}")  # fmt: skip

# %% [markdown]
# *The tasks: handwritten digits (real ones, from scikit-learn), line drawings, the number of discs, the corner of the
# largest one, the corner of a bright nodule on something like an X-ray picture (or that there is none), textures, and
# shapes in the dark. Those in the last row are not black: an eighth of the light is left, under noise.*
#
# All but the last have been compared in full, and MNIST's digits, which are not embedded; the results are stored.
# (`python -m lecture26 measure adaptation_low_light` does the same for the last one, in half an hour to an hour on
# one core. MNIST came as a folder, made from its 10,000 official test images as `data/README.md` says. Of every
# folder without splits a tenth is set aside to validate and another tenth to test. Of each split at most as many
# images are used as above.)

# %%
compared = ("digits", "mnist", "line_drawings", "textures", "counting", "largest", "xray")
stored = {task: load_results(f"adaptation_{task}") for task in compared}
for comparison in stored.values():
    print(comparison["command"])


def result(task, method):
    """The run of the stored comparison for a task and a method."""
    (run,) = (run for run in stored[task]["runs"] if run["method"] == method)
    return run


def mean(values):
    """The mean of some numbers."""
    return sum(values) / len(values)


# %% [markdown]
# First the digits live: three of the methods at the learning rates that the stored comparison has chosen, for a third
# of its steps, 200 of 16 images each.

# %%
vit = load_model("vit_photos32")
tests = downstream("digits", "test")
models, curves = {}, {}


def adapt_live(method):
    """Train a method on the digits, at the learning rate that the stored comparison has chosen."""
    models[method] = build(method, vit, num_classes=10, num_prompts=NUM_PROMPTS, seed=0)
    rate = result("digits", method)["learning_rate"]
    curves[method] = fit(models[method], sets["digits"], rate, SHORT_BUDGET, progress=False).losses
    models[method].eval().cpu()  # wherever it was trained


adapt_live("linear")
adapt_live("vpt-deep")

# %%
adapt_live("full")

# %% slide=["# Deep prompts learn the digits nearly as fast as all weights", "[picture]", "Learning rates differ by far: what suits prompts and heads lies much above that of full fine-tuning."]
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (method, losses), colour in zip(curves.items(), colours):
    smooth = torch.tensor(losses).unfold(0, 10, 5).mean(dim=1)
    axis.plot(range(10, len(losses) + 1, 5), smooth, color=colour, label=method)
axis.set(xlabel="step", ylabel="training loss", ylim=(0, None))
axis.legend()
show(figure, "The training loss of the linear probe, deep prompts and full fine-tuning, falling.")

# %% [markdown]
# *The mean over ten steps each. The high learning rate, 0.45, throws the linear probe off at first; the loss falls
# with the rate.*

# %%
live = {method: accuracy(model, tests, 100) for method, model in models.items()}
for method, share in live.items():
    agrees = abs(share - result("digits", method)["accuracy"][0]) < 0.15
    print(f"{method:9} within 15 points of the stored, longer run with the same seed: {agrees}")
    assert agrees
model = models["vpt-deep"]
fresh = load_model("vit_photos32").state_dict()
is_same = all(tensor.equal(fresh[name]) for name, tensor in model.vit.state_dict().items())
assert is_same
print("the backbone is what it was after all this:", is_same)

# %% [markdown]
# ### The stored comparison


# %%
def with_spread(run):
    """A run's mean accuracy in percent, and its uncertainty: over the seeds, and over the draw of test images."""
    p = mean(run["accuracy"])
    over_seeds = statistics.stdev(run["accuracy"])
    over_images = math.sqrt(p * (1 - p) / run["tested"])
    return f"{100 * p:5.1f} ± {100 * math.hypot(over_seeds, over_images):.1f}"


print(f"{'test accuracy, %':14}" + "".join(f"{method:>15}" for method in COMPARED))
for task in compared:
    print(f"{task:16}" + "".join(f"{with_spread(result(task, method)):>15}" for method in COMPARED))

# %%
for method in COMPARED:
    rates = [f"{result(task, method)['learning_rate']:g}" for task in compared]
    print(f"learning rates chosen for {method:12} {', '.join(rates)}")
factors = [
    result(task, "vpt-deep")["learning_rate"] / result(task, "full")["learning_rate"] for task in compared
]
print("deep prompts over full fine-tuning:", ", ".join(f"{factor:.0f} times" for factor in factors))
at_edge = [f"{task}, {method}" for task in compared for method in COMPARED if result(task, method)["at_edge"]]
print("at an end of those tried:", "; ".join(at_edge) or "none")

# %% slide=["# Probe, prompts, full fine-tuning: in this order", "[picture]", "Bars are means of three seeds, dots the seeds: six hundred steps of sixteen images, the class token read by all."]
figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
for k, (method, colour) in enumerate(zip(COMPARED, colours)):
    shares = [result(task, method)["accuracy"] for task in compared]
    places = [t + 0.18 * (k - 1.5) for t in range(len(compared))]
    axis.bar(places, [mean(values) for values in shares], width=0.16, color=colour, label=method)
    for place, values in zip(places, shares):
        axis.plot([place] * len(values), values, ".", color="black", markersize=4)
axis.set(ylabel="test accuracy", ylim=(0, 1.02))
axis.set_xticks(range(len(compared)), compared)
axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
show(figure, "Bars of test accuracy for seven tasks and four methods, with a dot for each seed.")

# %% [markdown]
# *Bars: means of three seeds; dots: the seeds. All seeds are tested on the same images, so the dots do not show how
# far the accuracy depends on which images these are; the ± of the table does (the standard deviations of both, added
# as squares). All methods share these images, too, so a difference between two can be surer than their ± suggest.*

# %%
gains = {
    task: mean(result(task, "vpt-deep")["accuracy"]) - mean(result(task, "linear")["accuracy"])
    for task in compared
}
gaps = {
    task: mean(result(task, "full")["accuracy"]) - mean(result(task, "vpt-deep")["accuracy"])
    for task in compared
}
print(f"{'deep prompts, points':20} above linear   below full   of the way between")
for task in compared:
    of_the_way = gains[task] / (gains[task] + gaps[task])
    print(f"{task:20} {100 * gains[task]:12.1f} {100 * gaps[task]:12.1f} {of_the_way:20.0%}")
assert all(gain > 0 for gain in gains.values()) and all(gap > 0 for gap in gaps.values())

# %% [markdown]
# Deep prompts are above the linear probe on all seven tasks: by eight to eleven points where it is asked how many
# discs there are, which is the largest, or where the nodule is; by one to four where it is asked what the picture
# shows, and on the digits by no more than about the ±. There and on the line drawings the probe has 95% already, and
# even full fine-tuning only three or four points more. Shallow prompts lie between the two, but for the digits, where
# they fall behind the probe by less than the ±. Full fine-tuning is ahead of deep prompts everywhere: by two points
# where there is little to gain, by seven to ten in counting and on MNIST, by twenty-five and more on the textures,
# the largest discs and the nodules. These three it learns to more than 90%, the last two nearly to the end.

# %% [markdown] tags=["optional"]
# ### A third of the steps *(at a second reading)*
#
# How far does this depend on the budget? The same comparison of the two kinds of digits, with 200 steps:

# %%
shorter = load_results("adaptation_short")
print(shorter["command"])
points = {}  # of deep prompts over the linear probe, by task and steps
for task, name in {"digits": "digits", "mnist": "./mnist"}.items():
    of_task = {run["method"]: run for run in shorter["runs"] if run["task"] == name}
    for method in COMPARED:
        print(f"{task:8} {method:12} 200 steps {with_spread(of_task[method])}   "
              f"600 steps {with_spread(result(task, method))}")  # fmt: skip
    shares = [mean(of_task[method]["accuracy"]) for method in ("vpt-deep", "linear")]
    points[task] = shares[0] - shares[1], gains[task]

# %%
for task, (few, many) in points.items():
    print(f"{task:8} deep prompts over the linear probe: {100 * few:+.1f} points with 200 steps, "
          f"{100 * many:+.1f} with 600")  # fmt: skip
assert points["mnist"][0] < points["mnist"][1]

# %% [markdown]
# All gain by more steps, but for full fine-tuning on the digits, which it has learned after 200 already. The lead of
# the deep prompts grows a little on MNIST, and shrinks a little on the digits, where the probe catches up. So how much
# prompts gain depends on the task and on the budget, and a comparison has to name both. (The learning rates are those
# found with 200 steps. They may be too high for 600, for all methods alike.)
#
# What is left between prompts and full fine-tuning may come from (8.12), from the small number of parameters, from
# too few steps, or from our backbone, in which prompts may find little to call up. The next section looks at the steps,
# and at what there is to find; the rest we have not told apart. The published comparisons use backbones pretrained on
# millions of images; this is ours:

# %%
card = load_card("vit_photos32")
print(f"trained on {card['data']}; names {100 * card['metrics']['accuracy']:.0f}% of others right")

# %% [markdown]
# That many photographs are few for a transformer, which has to find out that neighbouring pixels belong together.
# Trained on the classes alone, for 26,000 steps, it named 69 of a hundred test photographs. A convolutional network of
# a third of its size, into which neighbourhood is built, named 81 after 4,500 steps. So for the last 10,000 steps the
# transformer had that network for a *teacher* (Li et al. 2022): beside the classes it learned to see at each of its
# $8\times8$ places what the teacher sees there. (`README.md` has the commands.)

# %% [markdown] tags=["core"]
# ### Is it the probe, or what it reads?
#
# The linear probe had as many steps as the others. For it that is not much: on frozen features its loss is convex in
# the $(d+1)K$ numbers of the head, and a solver finds the minimum in a second. And it reads the class token alone.
# What the *patches'* tokens know does not count, unless attention has brought it there. So two questions: how good is
# a head that is **solved** to the end; and how good would it be if it read the patches? First the corner of the
# largest disc, live. A head reads the class token, the mean of all patches, or the means of the picture's four quarters
# side by side, all from the frozen backbone:

# %%
solved = load_results("adaptation_solved")
print(solved["command"])
solved = {run["task"].removeprefix("./"): run["accuracy"] for run in solved["runs"]}
for name, share in solved_by_reading(vit, open_task("largest", 32)).items():
    expected = solved["largest"][name]
    agrees = abs(share - expected) < 0.02
    print(f"a solved head on the {name:12} {100 * expected:5.1f} %, here within two points of it: {agrees}")
    assert agrees

# %% [markdown]
# By chance it would be 25%. The class token knows the corner in nearly half of the pictures, the mean of the patches
# in three quarters of them, the four quarters practically always. So the frozen backbone has seen how large each disc
# is, and where. The class token has not kept it: it was trained to say what is on a photograph, wherever it is.
#
# The same for all tasks, and for the class token of a network with trained deep prompts (one seed each):

# %%
columns = dict(zip(("class token", "vpt-deep", "patches", "quarters"),
                   ("no prompts", "deep prompts", "patches", "quarters")))  # fmt: skip
print(f"{'solved heads, %':16}" + "".join(f"{title:>14}" for title in columns.values()) + "   deep - none")
for task in compared:
    shares = [100 * solved[task][name] for name in columns]
    print(f"{task:16}" + "".join(f"{share:14.1f}" for share in shares) + f"{shares[1] - shares[0]:+14.1f}")

# %% slide=["# Is it the probe, or what it reads?", "[picture]", "Filled: heads solved to the end. Stars: solved heads that read the patches' quarters, at no cost in tokens.", "# The place to read matters as much as the method", "? The class token knows the corner of the largest disc in half of the pictures. Has the network not seen it?", "A head on the frozen patches knows it nearly always.", "By (8.12) a prompt cannot turn the class token's attention to a patch: the knowledge is there, the way is not."]
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for method, reading, marker, colour in (
    ("linear", "class token", "o", colours[0]),
    ("vpt-deep", "vpt-deep", "s", colours[2]),
):
    trained_shares = [mean(result(task, method)["accuracy"]) for task in compared]
    solved_shares = [solved[task][reading] for task in compared]
    axis.plot(compared, trained_shares, marker, color=colour, fillstyle="none", label=f"{method}, trained")
    axis.plot(compared, solved_shares, marker, color=colour, label=f"{method}, solved")
quarters = [solved[task]["quarters"] for task in compared]
axis.plot(compared, quarters, "*", color=colours[4], markersize=9, label="quarters, solved")
full = [mean(result(task, "full")["accuracy"]) for task in compared]
axis.plot(compared, full, "_", color="black", markersize=16, label="full")
axis.set(ylabel="test accuracy", ylim=(0.4, 1.02))
axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
show(figure, "For seven tasks the accuracy of trained and of solved heads, with and without prompts.")

# %% [markdown]
# *Open marks: heads trained for 600 steps, means of three seeds, as above. Filled ones: heads solved to the end, with
# the prompts of the first seed. Stars: solved heads that read the quarters. Dashes: full fine-tuning.*
#
# Two things follow. First, six hundred steps were too few for the probe. Solved, it gains eight points on the nodules,
# five in counting, two or three on the largest discs, the textures and the line drawings, and one or less on the two
# kinds of digits. So a part of the prompts' lead in the comparison was the probe's unfinished training. But prompts
# have a head, too. With solved heads on both sides they are ahead by sixteen points on the largest discs, by seven in
# counting and on the nodules, and by five on MNIST; on the digits, the line drawings and the textures they are level
# with no prompts at all, within the ±.
#
# Second, the place where a head reads matters as much as the method. One that reads the quarters of the frozen
# backbone's patches is ahead of deep prompts on all tasks but counting, where one that reads their mean is. It needs no
# token more, no gradient through the blocks, and for ten classes $10\,(4d+1)=6{,}410$ numbers, where eight deep
# prompts and their head are 9,290. On MNIST it is even ahead of full fine-tuning, on the largest discs level with it.
# There, what the class token lacks is not knowledge but a way to it. By (8.12) a prompt cannot turn the class token's
# attention from one patch to another within a block; only what it mixes in, (8.11), changes what the next block asks
# for. On the textures, in counting and on the nodules full fine-tuning is ahead of every head, by five to fourteen
# points: there weights that move find what none of these readings of the frozen tokens does.
#
# The comparison above is the usual one, with the class token for everybody. It tells which way to change that token is
# the best, not whether it is the place to read.

# %% [markdown] tags=["core"]
# ### What it costs
#
# Training a prompt is not cheap: the gradient has to come back through all blocks, as in full fine-tuning. Only the
# products for the weights' own gradients are spared. What is small is what is stored.

# %%
whole = result("digits", "full")
steps = load_results("benchmark_adaptation")["methods"]
print("             trained    stored   times less   training    kept   forward pass")
for method in COMPARED:
    run, step = result("digits", method), steps[method]
    print(f"{method:12} {run['trained']:9,} {run['bytes'] / 1e3:7,.0f} kB {whole['bytes'] / run['bytes']:8,.0f}x"
          f" {1 / step['full_over_method']['ratio']['median']:9.2f}x {step['kept_bytes'] / 1e6:4.0f} MB"
          f" {run['operations'] / whole['operations']:11.2f}x")  # fmt: skip

# %% [markdown]
# *Times less: than full fine-tuning. Training: the time of a step relative to full fine-tuning, both timed in turn
# by `benchmarks/adaptation.py`. Kept: the memory of what a forward pass of 64 images keeps for the backward pass.
# Forward pass: its matrix products relative to those of full fine-tuning. The linear probe trains in less time,
# since nothing has to come back through the blocks (and less still if the features are computed once). That
# full fine-tuning does not come out at 1.00 shows how far the times can be trusted.*

# %% [markdown] tags=["optional"]
# ### How many prompts *(at a second reading)*
#
# All of this was with eight prompts. Counting again, with one and with thirty-two:

# %%
other_lengths = load_results("adaptation_prompts")
print(other_lengths["command"])
by_length = {
    method: sorted(
        [result("counting", method), *(run for run in other_lengths["runs"] if run["method"] == method)],
        key=lambda run: run["num_prompts"],
    )
    for method in ("vpt-shallow", "vpt-deep")
}
for method, runs in by_length.items():
    for run in runs:
        print(f"{method:12} n = {run['num_prompts']:2}  {with_spread(run)} %  trained {run['trained']:6,}  "
              f"learning rate {run['learning_rate']:g}")  # fmt: skip

# %% slide=["# One prompt gains a little, eight most of it", "[picture]", "Accuracy of counting by the number of prompts: full fine-tuning stays ahead."]
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for (method, runs), marker, colour in zip(by_length.items(), "os", colours[1:]):
    counts, shares = [run["num_prompts"] for run in runs], [run["accuracy"] for run in runs]
    axis.semilogx(counts, [mean(values) for values in shares], marker + "-", color=colour, label=method)
    axis.fill_between(counts, [min(v) for v in shares], [max(v) for v in shares], color=colour, alpha=0.2)
for method, style in (("linear", ":"), ("full", "--")):
    level = mean(result("counting", method)["accuracy"])
    axis.axhline(level, color="grey", linestyle=style, label=method)
axis.set_xticks(counts, counts)
axis.minorticks_off()
axis.set(xlabel="prompts n", ylabel="test accuracy, counting")
axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
show(figure, "Accuracy of counting against the number of prompts, shallow and deep, between two lines.")

# %% [markdown]
# *Means and ranges of three seeds, against the linear probe (dotted) and full fine-tuning (dashed). Every length has
# its own learning rate.*
#
# A single deep prompt at each block, six tokens in all, is three points above the linear probe, about as much as the
# ±; eight are eleven, and thirty-two twelve, with 97 tokens in the place of 65. One shallow prompt is no better than
# the probe, eight and thirty-two are four and six points. From the best of these to full fine-tuning it is still
# seven points. Whether still more prompts would go on gaining was not tried.

# %% [markdown] tags=["optional"]
# ### Narrower backbones *(at a second reading)*
#
# The slide says that prompts work across model sizes, and means ViT-B, L and H. These are out of reach here. What can be
# tried is the width: two narrower backbones, of as many blocks, trained on the same photographs from scratch
# (`python -m lecture26 train vit_photos32_96 --data ./photos`, and `_64`; fifty and thirty minutes on one core), beside
# the one of this chapter.

# %%
narrower = load_results("adaptation_widths")
print(narrower["command"])
of_width = {}  # by task: the backbones from narrow to wide, each with its runs by method
for task in ("counting", "xray"):
    runs = [run for run in narrower["runs"] if run["task"] == task]
    runs += [result(task, method) for method in ("linear", "vpt-deep", "full")]
    of_width[task] = {run["backbone"]: {} for run in runs}
    for run in runs:
        of_width[task][run["backbone"]][run["method"]] = run

# %%
widths = {"vit_photos32_64": 64, "vit_photos32_96": 96, "vit_photos32": vit.embed_dim}
for task, backbones in of_width.items():
    for name, width in widths.items():
        linear, deep, full = (backbones[name][method] for method in ("linear", "vpt-deep", "full"))
        gain = mean(deep["accuracy"]) - mean(linear["accuracy"])
        print(f"{task:8} d = {width:3}  {full['trained'] / 1e6:.1f} M parameters   linear {with_spread(linear)}"
              f"   deep {with_spread(deep)} ({100 * gain:+.1f})   full {with_spread(full)}")  # fmt: skip
        assert gain > 0

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for axis, (task, backbones) in zip(axes, of_width.items()):
    for method, colour in (("linear", colours[0]), ("vpt-deep", colours[2]), ("full", colours[3])):
        shares = [backbones[name][method]["accuracy"] for name in widths]
        axis.plot(widths.values(), [mean(v) for v in shares], "o-", color=colour, label=method)
        lowest, highest = [min(v) for v in shares], [max(v) for v in shares]
        axis.fill_between(widths.values(), lowest, highest, color=colour, alpha=0.2)
    axis.set(xlabel="width d of the backbone", xticks=list(widths.values()), title=task)
axes[0].set(ylabel="test accuracy")
axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
show(figure, "Accuracy of three methods against the backbone's width, for two tasks.")

# %% [markdown]
# *Means and ranges of three seeds.*
#
# At each width and on both tasks deep prompts are ahead of the linear probe, by five to twelve points, and full
# fine-tuning is ahead of both. So the order of the three is not peculiar to one network. How much prompts gain does not
# grow or shrink steadily with the width.
#
# That is all it shows. The three have 0.3 to 1.9 million parameters. The widest was trained for longer, and with a
# teacher: it names 77 of a hundred photographs, the narrower ones 62 and 63, so width and training change together. And
# nothing here speaks for networks of 86 to 632 million parameters, which the slide means.

# %% [markdown] tags=["optional"]
# ## What the prompts have learned *(at a second reading)*
#
# By (8.11) a prompt acts by $\lambda_i(\bar p_i-o_i^{\,0})$, and the share of attention $\lambda_i$ is easy to look
# at. Here is that of the class token in the model that was trained above, for each block and head, beside the same
# before training. By chance it would be $n/(1+n+N_p)$.


# %%
@torch.no_grad()
def shares_of_class_token(model, x):
    """The class token's attention to the prompts, mean over images: (L, heads)."""
    rows = []

    def note(block, inputs):
        weights = attention_weights(block.attn, block.norm1(inputs[0]))
        rows.append(attention_to_prompts(weights, 1, model.num_prompts)[:, :, 0].mean(dim=0))

    hooks = [block.register_forward_pre_hook(note) for block in model.vit.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


x = tests.batch(range(200))["image"]
untrained = build("vpt-deep", vit, num_classes=10, num_prompts=NUM_PROMPTS, seed=0).eval()
tables = [shares_of_class_token(m, x) for m in (untrained, model)]

# %% slide=["# Few heads listen, and these listen well", "[picture]", "The class token's attention to prompts: after training one head of the last block sees nothing else."]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for axis, table, title in zip(axes, tables, ("before training", "after training")):
    picture = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            shade = "black" if table[row, column] > 0.6 else "white"
            axis.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", color=shade)
    axis.set(title=title, xlabel="head", xticks=range(table.shape[1]), yticks=range(table.shape[0]))
    axis.set_yticklabels([f"block {number + 1}" for number in range(table.shape[0])])
    axis.grid(False)
figure.colorbar(picture, ax=axes, label="share of attention")
show(figure, "Two tables of blocks by heads: the share of the class token's attention that goes to prompts.")

# %% [markdown]
# *The class token's attention to the eight prompts, mean over 200 digits. By chance it would be 8/73, or 0.11.*
#
# One head of the last block now looks at nothing but prompts: of the image it hears only through its own query. One
# of the first block gives them more than half of its attention, and one of the fifth nearly half. In most other places
# the share is small, and less than it was before the training.
#
# What this does to the features $f$: the test images, projected on their two main directions, without prompts and
# with them. (The head separates the classes in all $d$ dimensions, so those that overlap here may be apart for it.)

# %% slide=["# What prompts do to the features", "[picture]", "The same frozen backbone, without prompts and with them, in its two main directions."]
labels = tests.batch(range(len(tests)))["class"]
with torch.no_grad():
    everything = tests.batch(range(len(tests)))["image"]
    none = torch.zeros(1, 0, vit.embed_dim)
    clouds = {
        "without prompts": pooled(vit, prompted_tokens(vit, everything, none), 0),
        "with deep prompts": pooled(vit, model.forward_features(everything), model.num_prompts),
    }
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axis, (title, f) in zip(axes, clouds.items()):
    centred = f - f.mean(dim=0)
    plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T  # (N, 2)
    for digit in range(10):
        points = plane[labels == digit]
        axis.scatter(*points.T, s=0)
        for point in points.tolist():
            axis.text(*point, str(digit), color=plt.cm.tab10(digit), fontsize=7, ha="center", va="center")
    axis.set(title=title, xticks=[], yticks=[])
show(figure, "Digits scattered in two planes, without prompts and with them.")

# %% [markdown]
# *Each test image at its place in the plane of the two main directions of the features, written as the digit that it
# shows. The backbone is the same in both.*


# %%
def spread_between_classes(f):
    """The share of the features' variance that lies between the classes' means."""
    means = torch.stack([f[labels == digit].mean(dim=0) for digit in range(10)])[labels]
    return ((means - f.mean(dim=0)) ** 2).sum() / ((f - f.mean(dim=0)) ** 2).sum()


without, prompted = (spread_between_classes(f) for f in clouds.values())
assert prompted > without
print("the share of variance between classes grows with prompts:", bool(prompted > without))

# %% [markdown] tags=["core"]
# ## What is forgotten
#
# 'Prevents catastrophic forgetting: original weights remain frozen', says the lecture. After each adaptation, give
# the network its old head back, and ask for the photographs once more. For prompts there are two ways to ask: with
# the prompts taken out, and with those of the new task left in. The numbers are means of the three seeds.


# %%
def print_row(label, shares):
    """Print the mean of each list of shares in percent."""
    print(f"{label:18}" + "".join(f"{100 * mean(values):14.1f}" for values in shares))


before = result("digits", "full")["upstream_before"]
print(f"photographs named right before: {100 * before:.1f}%; after learning ...")
print(f"{'':18}" + "".join(f"{task:>14}" for task in compared))
for method in COMPARED:
    print_row(method, [result(task, method)["upstream"] for task in compared])
    if "upstream_prompted" in result("digits", method):
        print_row("  prompts left in", [result(task, method)["upstream_prompted"] for task in compared])

# %% slide=["# Nothing is forgotten, as the thing is made", "? Take the prompts out, and ask for photographs again. How many are named right?", "As many as before, to the last bit. So it is with a linear probe, or with a copy.", "What prompts give: no copy is needed *for each task*. With the prompts left in, the network is another one."]
for task in compared:
    for method in ("linear", "vpt-shallow", "vpt-deep"):
        run = result(task, method)
        assert all(share == run["upstream_before"] for share in run["upstream"])

# %% [markdown]
# With prompts taken out nothing at all is forgotten, to the last bit (each of these runs compared the backbone's
# fingerprint before and after): that is no merit of the training, it is how the thing is made. The same holds for a
# linear probe, and for everybody who keeps a copy of the old weights. What prompts give is that the copy need not be
# kept *for each task*. With the prompts left in, the network is another one: it names 39 to 79 of a hundred
# photographs right. A fully fine-tuned one with its old head names a quarter of them or less; only after the line
# drawings, which it learned at a third of the rate, are there three in five.

# %% [markdown] tags=["core"]
# ## Many tasks, one backbone
#
# Fine-tuning $T$ tasks gives $T$ networks: each has to be kept in memory, and a batch that mixes tasks has to be
# split into $T$ batches. With prompts there is one network. All that differs between two samples of different tasks
# are a few tokens and the head, and attention never looks from one sample to another. So a single pass serves all:
# sample $b$, of task $\tau_b$, gets the prompts $P^{(\tau_b)}$, (8.7) or (8.9), and its own head,
#
# $$y_b=W^{(\tau_b)}f_b+c^{(\tau_b)} \tag{8.17}$$
#
# with $f_b$ the pooled features. In one tensor there must be as many tokens for each sample, so the tasks of a bank
# share $n$, and are all shallow or all deep. Their heads may differ in size: they are filled up with zeros to the
# largest, and cut back afterwards.
#
# **Exercise 8.** Fill in `own_head`.


# %% tags=["export", "exercise"]
def own_head(features, weights, biases, tasks):
    """The logits of each sample by the head of its own task.

    Args:
        features: (B, d).
        weights: of T heads with K classes each, (T, K, d).
        biases: (T, K).
        tasks: the number of each sample's task, (B,) int64 in [0, T).

    Returns:
        (B, K).

    Source: this course, equation 8.17.
    """
    ### BEGIN SOLUTION
    # y_b = W^(tau_b) f_b + c^(tau_b)
    return torch.einsum("bd,bkd->bk", features, weights[tasks]) + biases[tasks]
    ### END SOLUTION


# %%
check("visual_prompt_tuning.own_head", own_head)

# %% slide=["# Many tasks in one pass", "Attention never looks from one sample to another, so each sample brings its own prompts and head:", "(8.17)", "[code own_head]"]
generator = torch.Generator().manual_seed(5)
f, W, c = (
    torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (3, 2, 4), (3, 2))
)
tau = torch.tensor([2, 0, 1, 1, 0, 2])
one_by_one = torch.stack([W[task] @ row + c[task] for row, task in zip(f, tau)])
verify("8.17", own_head(f, W, c, tau), one_by_one, atol=1e-12)


# %% tags=["export"]
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
        self.vit = vit.requires_grad_(False).eval()
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


# %% [markdown]
# With three tasks on our backbone: the digits from above, and two with fresh prompts (trained or not, the arithmetic
# is the same), with 10, 8 and 6 classes. One batch, each image with its own question:

# %%
singles = {
    "digits": models["vpt-deep"],
    "line_drawings": build("vpt-deep", vit, 8, NUM_PROMPTS, seed=1).eval(),
    "counting": build("vpt-deep", vit, 6, NUM_PROMPTS, seed=2).eval(),
}
bank = PromptBank(vit)
for name, single in singles.items():
    bank.add(name, single)
mixed_names = ["digits", "counting", "line_drawings", "digits", "counting", "digits"]
mixed = torch.cat([sets[name].batch([i])["image"] for i, name in enumerate(mixed_names)])
with torch.no_grad():
    answers = bank(mixed, mixed_names)
    alone = [singles[name](image[None])[0] for name, image in zip(mixed_names, mixed)]
print("classes:", [len(row) for row in answers])
assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(answers, alone))
print("each image's logits are those of its task's own model, to 1e-5")

# %% slide=["# One batch, three tasks", "[picture]", "Each image is asked its own question, in one pass of one backbone.", "# What to remember", "- Experiments find what reading does not: shuffle, add nothing, count, call twice.", "- A prompt mixes in and fades; it cannot turn a head's view.", "- Small to store, not cheap to run.", "- Where a head reads matters as much as how one adapts.", "- Nothing is forgotten, and one backbone serves many tasks."]
titles = [f"{name}:\n{singles[name].head.out_features} logits" for name in mixed_names]
figure = show_grid(mixed, columns=6, titles=titles, inches_per_image=1.3)
figure.set_figheight(2.0)
show(figure, "Six images of three tasks, each with the name of the task that it is asked about.")

# %% [markdown]
# *One batch, three tasks, one pass.*
#
# Tasks are saved, removed, and loaded again. Asking for one that is not there, or adding one of another length, is
# refused with a word why.

# %%
for name in bank.names:
    bank.save(name, folder / f"{name}.safetensors")
    print(f"{name:14} {(folder / f'{name}.safetensors').stat().st_size / 1e3:.0f} kB")
bank.remove("digits")
try:
    bank(mixed, mixed_names)
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("not refused")
bank.load("digits", folder / "digits.safetensors")
with torch.no_grad():
    again = bank(mixed, mixed_names)
is_same = all(torch.equal(one, other) for one, other in zip(again, answers))
assert is_same
print("after loading the same:", is_same)
try:
    bank.add("short", build("vpt-deep", vit, 10, 3, seed=0))
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("not refused")

# %% [markdown]
# Against as many fine-tuned copies, measured by `benchmarks/adaptation.py`:

# %%
measured = load_results("benchmark_adaptation")["bank"]
print(f"{measured['tasks']} tasks             bank    separate networks")
for label, key in (("memory, MB", "memory_bytes"), ("disk, MB", "disk_bytes")):
    print(f"{label:14} {measured[key]['bank'] / 1e6:10.2f} {measured[key]['separate'] / 1e6:15.2f}")
print(f"time for a mixed batch of {measured['batch_size']}: separate networks take "
      f"{measured['seconds']['ratio']['median']:.2f} times that of the bank")  # fmt: skip

# %% [markdown]
# Memory and disk are where the bank wins: ten tasks in a tenth of the room, and each further one adds some kilobytes
# instead of a network. In time it gains nothing here. It computes a little more, for its prompts, and does so in one
# batch instead of ten small ones, which a CPU does not mind; a GPU may be another matter, and we have not tried it.

# %% [markdown] tags=["optional"]
# ## Your own images, and other people's backbones *(at a second reading)*
#
# ### A new modality: X-rays, ultrasound, microscopes
#
# The lecture names medical imaging as an application: a model of photographs, adapted to images of another kind, of
# which there are few. The recipe is one command, for a folder with one subfolder for each class (and, if there are
# any, `train`, `validation` and `test` above them; what is missing is split off):
#
# ```
# chest/train/normal/0001.png  chest/train/pneumonia/0001.png  chest/test/normal/0001.png  ...
# ```
#
# ```bash
# python -m lecture26 adapt --backbone vit_base_patch16_224.augreg_in21k --data ./chest --method vpt-deep --prompts 10
# ```
#
# Grey images are given three equal channels. The numbers go to `data/results`, what was learned to `data/tasks`, and
# `VPT.load_task_state_dict(load_task(file))` takes it up again. The names of the classes are kept with both, so that
#
# ```bash
# python -m lecture26 classify --task NAME picture.png ...
# ```
#
# names other pictures, NAME being what `adapt` has called its results. Three things that no program can do for you: put
# images of one *patient* into one split only, or the test will measure whether patients are recognised; look at
# sensitivity and specificity besides accuracy, where one class is rare; and do not diagnose anybody with it. (No
# `--augment` unless a mirrored image is a possible one: a mirrored chest has its heart on the wrong side.)
#
# ### Backbones with a name
#
# `--backbone` takes timm's `VisionTransformer`s by name (those of square images with three channels; others are
# refused), with their pretrained weights, image size and normalisation; `--data` takes what the course can load,
# such as `fgvc_aircraft`. The claim of the slide, 72.3 against 68.1% on FGVC-Aircraft, can be put to the test by
# whoever has a GPU:
#
# ```bash
# python -m lecture26 adapt --backbone vit_base_patch16_224.augreg_in21k --data fgvc_aircraft \
#     --method compare --prompts 10 --steps 5200 --seeds 3 --augment
# ```
#
# It trains a linear probe, VPT-shallow, VPT-deep and full fine-tuning, each at the learning rates of its own that the
# validation split is to choose from, and three seeds of the best; goes on where it was stopped; and takes several
# GPUs with `accelerate launch -m lecture26 adapt ...`. It optimises with AdamW, and the paper with SGD: a test of the
# claim, not a repetition of the paper's experiments.

# %% [markdown] tags=["core"]
# ## Your code runs the model
#
# Save this notebook, call `make mine` in a terminal, and run the next cell: it draws with your functions, as at the
# [end of chapter 01](01_ddpm.ipynb), and says which of them were called. Your prompts are put into the frozen backbone
# and learn to name digits, your head of the bank names them, and your count says what that saves.

# %% tags=["milestone", "nbval-ignore-output"]
from lecture26.kit.own_package import show_milestone

show_milestone(
    "milestone visual_prompt_tuning",
    alt="Twenty-four digits, each below the name that the network gives it; where that is wrong, the right one is added.",
)

# %% [markdown] tags=["core"]
# ## What the lecture's slide says
#
# - *The code of the slide.* It has the faults of the list above, and this chapter has found them by experiment on a
#   wrapper of our own with the same faults: it does not run as printed, takes one image at a time, forgets positions
#   and the final norm, and freezes nothing.
# - *VPT-Deep achieves 72.3% accuracy vs 68.1% for full fine-tuning on FGVC-Aircraft.* No source was found. The VPT
#   paper's fine-grained tasks are CUB, NABirds, Oxford Flowers, Stanford Dogs and Stanford Cars; aircraft are neither
#   among these nor in its other collection of tasks. The command above puts it to the test.
# - *Outperforms linear probing and matches full fine-tuning on many tasks.* This is what the paper reports for
#   ViT-B/16 pretrained on ImageNet-21k, as quoted by secondary sources: a mean of 89.1 against 88.5 on the five tasks
#   above (from 88.5 against 87.3 on CUB to 83.6 against 84.5 on Cars, where full fine-tuning is ahead), and better on
#   20 of 24 tasks.
#   On our seven tasks deep prompts are above the trained linear probe by 1 to 11 points, and below full fine-tuning by
#   2 to 47. With this backbone and 600 steps, then, the first half of the sentence holds, on one task by no more than
#   the ±, and the second on none; on two it is nearly so. With solved heads on both sides the first half holds on four
#   of seven, by 5 to 16 points; and a solved head that reads the patches does better than prompts on nearly all.
# - *Only prompts are stored, 0.1% of the parameters*, and *100 to 1000 times less storage.* Holds for shallow prompts
#   and for short deep ones; long deep prompts and large heads leave the range, as the table of (8.14) shows.
# - *Prevents catastrophic forgetting.* True by construction, with the prompts taken out.
# - *Works consistently across model sizes.* Between three small widths the order of the methods stays; ViT-B, L and H
#   were not tried here.
# - *Adapting to medical imaging; many prompt sets on one backbone.* The command and the bank above do both.
#
# Not on the slide: prompts make the network slower, (8.15), while a fine-tuned network, tuned biases or a linear
# probe do not; and training them saves at most the third of the products that goes into the weights' own gradients.

# %% [markdown] tags=["core"]
# ## Summary
#
# - A ViT is patches, (8.1), a class token, positions, (8.2), blocks, (8.3), a last norm and a head, (8.5). Without
#   positions it sees a bag of patches, (8.6).
# - *Add nothing and compare* finds what a wrapper leaves out of the backbone's own computation (positions, final
#   norm, the parts of other backbones). It says nothing about the prompts themselves; there it takes counting: what
#   trains, what moves, what is stored. One image and one kind of backbone would have missed most of it.
# - Prompts are tokens without positions, (8.7), that begin short, (8.8); deep ones are replaced at every block,
#   (8.9). They mix something into attention, (8.11), and cannot turn its view, (8.12).
# - Trained and stored are $L'nd+(d+1)K$ numbers, (8.13). What it saves is storage, (8.14); what it costs is tokens,
#   (8.15).
# - A method is as good as its learning rate: choose it on a validation split, for each method.
# - A linear probe can be solved to the end, and may read more than the class token. Try both before prompts.
# - One backbone serves many tasks in one batch, (8.17).
#
# ## References
#
# - Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim 2022, *Visual Prompt Tuning*: section 3.2 (shallow and deep),
#   section 4 (the comparison).
# - Dosovitskiy, Beyer, Kolesnikov et al. 2021, *An Image is Worth 16x16 Words*: section 3.1.
# - Li, Yu, Wang, Yuan, Song, Chen 2022, *Locality Guidance for Improving Vision Transformers on Tiny Datasets* (the
#   teacher of our backbone).
# - Glorot, Bengio 2010, *Understanding the Difficulty of Training Deep Feedforward Neural Networks*: equation 16.
# - Zaken, Goldberg, Ravfogel 2022, *BitFit*: section 3.
# - He, Zhou, Ma, Berg-Kirkpatrick, Neubig 2022, *Towards a Unified View of Parameter-Efficient Transfer Learning*:
#   section 3.1 (prompts as a mixture inside attention).
# - Petrov, Torr, Bibi 2024, *When Do Prompting and Prefix-Tuning Work? A Theory of Capabilities and Limitations*
#   (what prompts cannot change).
# - Lester, Al-Rfou, Constant 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*: figure 2 (tasks mixed
#   in one batch).
