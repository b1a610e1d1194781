"""The milestone of chapter 08: prompts."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lecture26.kit.figures import show_grid
from lecture26.kit.image_set import ImageSet
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import Budget, build, fit, open_task
from lecture26.visual_prompt_tuning import (
    VPT,
    PromptBank,
    attention_to_prompts,
    attention_weights,
    patches,
    pooled,
    prompted_tokens,
    storage_ratio,
    trainable_parameters,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASK = "digits"
NUM_PROMPTS = 4
LEARNING_RATE = 0.1
BUDGET = Budget(steps=80, batch_size=8, precision="fp32")
LORA_RATE, LORA_BUDGET = 0.01, Budget(steps=40, batch_size=8, precision="fp32")
TESTED = 200  # images, of which the first 24 are shown


def prompts() -> tuple["Figure", str]:
    """The course's backbone, frozen, after deep prompts have learned digits; what it names and looks at.

    Besides, LoRA learns the digits, and is merged into the weights of its copy.
    """
    trained = Trained("vit_photos32")
    images = open_task(TASK, trained.recipe.image_size)
    classes = images["train"].labels["class"]
    model = build("vpt-deep", trained.network, len(classes), NUM_PROMPTS, seed=0)
    fit(model, images["train"], LEARNING_RATE, BUDGET, progress=False)
    bank = PromptBank(trained.network)
    bank.add(TASK, model)
    tested = images["test"].batch(range(TESTED))
    with torch.no_grad():
        named = torch.stack(bank(tested["image"], [TASK] * TESTED)).argmax(dim=1)
        shares = shares_of_class_token(model.eval(), tested["image"])
    by_lora, moved_by_merging = lora_then_merged(trained.network, images["train"], tested)
    titles = [
        classes[name] if name == true else f"{classes[name]} for {classes[true]}"
        for name, true in zip(named[:24], tested["class"], strict=False)
    ]
    figure = show_grid(tested["image"][:24], 12, titles)
    figure.set_figheight(figure.get_figheight() + 1.5)  # room for the titles
    numbers = sum(parameter.numel() for parameter in trainable_parameters(model))
    right = (named == tested["class"]).float().mean()
    told = (
        f"{right:.0%} of {TESTED} digits right after {BUDGET.steps} steps; {numbers:,} numbers stored, "
        f"{stored_less(model, len(classes)):.0f} times fewer than a copy;\n"
        "the class token's attention to prompts, by block: "
        + ", ".join(f"{share:.2f}" for share in shares)
        + f";\nLoRA: {by_lora:.0%} right after {LORA_BUDGET.steps} steps; merged, its logits move by "
        f"{moved_by_merging:.0e}; patches times kernel are timm's tokens to "
        f"{deviation_of_tokens(trained.network, tested['image']):.0e}"
    )
    figure.suptitle(told, fontsize="medium")
    return figure, f"{TESTED} digits named by {trained.name} with deep prompts"


def lora_then_merged(vit: nn.Module, images: ImageSet, tested: dict[str, Tensor]) -> tuple[float, float]:
    """The share of tested images that LoRA names right, and by how much merging moves a logit at most."""
    classes = len(images.labels["class"])
    model = build("lora", vit, classes, NUM_PROMPTS, seed=0)
    fit(model, images, LORA_RATE, LORA_BUDGET, progress=False)
    with torch.no_grad():
        logits = model.eval()(tested["image"])
        for block in model.blocks:
            block.attn.qkv = block.attn.qkv.merged()
        moved = (model(tested["image"]) - logits).abs().max().item()
    return (logits.argmax(dim=1) == tested["class"]).float().mean().item(), moved


def deviation_of_tokens(vit: nn.Module, x: Tensor) -> float:
    """How far the tokens of images x, as patches times the kernel, are from timm's."""
    projection = vit.patch_embed.proj
    tokens = patches(x, vit.patch_embed.patch_size[0]) @ projection.weight.flatten(1).mT + projection.bias
    return (tokens - vit.patch_embed(x)).abs().max().item()


def shares_of_class_token(model: VPT, x: Tensor) -> list[float]:
    """The share of the class token's attention that goes to the prompts, for each block."""
    shares = []

    def note(block: nn.Module, inputs: tuple[Tensor]) -> None:
        weights = attention_weights(block.attn, block.norm1(inputs[0]))
        of_tokens = attention_to_prompts(weights, model.vit.num_prefix_tokens, model.num_prompts)
        shares.append(of_tokens[:, :, 0].mean().item())

    hooks = [block.register_forward_pre_hook(note) for block in model.vit.blocks]
    pooled(model.vit, prompted_tokens(model.vit, x, model.prompts), model.num_prompts)
    for hook in hooks:
        hook.remove()
    return shares


def stored_less(model: VPT, num_classes: int) -> float:
    """How many times less than a copy of the backbone the prompts and the head of a model are."""
    backbone = sum(weight.numel() for name, weight in model.vit.named_parameters() if "head" not in name)
    depth, num_prompts, dim = model.prompts.shape
    sizes = (torch.tensor([float(size)]) for size in (backbone, depth, num_prompts, dim))
    return storage_ratio(*sizes, num_classes).item()
