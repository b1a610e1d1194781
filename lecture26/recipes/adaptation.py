"""A backbone adapted to a new task: the methods of chapter 08, and how each is trained."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lecture26.kit.checkpoints import list_checkpoints
from lecture26.kit.data import SPLITS, DataError
from lecture26.kit.downstream import downstream
from lecture26.kit.image_set import ImageSet
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.training import History, train
from lecture26.kit.validation import check_choice
from lecture26.recipes.backbone import mirror_and_move
from lecture26.recipes.recipe import seeded
from lecture26.recipes.trained import Trained
from lecture26.visual_prompt_tuning import (
    VPT,
    adapter_tuning,
    backbone_fingerprint,
    bias_tuning,
    check_backbone,
    full_fine_tune,
    linear_probe,
    lora_tuning,
    save_task,
)

WEIGHT_DECAY = 1e-4
NUM_PROMPTS = 8
COMPARED = ("linear", "vpt-shallow", "vpt-deep", "full")  # of METHODS
INSIDE = ("bias", "adapter", "lora")  # what trains about as many numbers, inside the layers


@dataclass(frozen=True)
class Method:
    """A way to adapt a backbone.

    Attributes:
        build: build(vit, num_classes, num_prompts) -> the model to train.
        learning_rates: the two to begin with; others are tried beyond the better one.
        has_prompts: whether their number counts.
    """

    build: Callable[[nn.Module, int, int], nn.Module]
    learning_rates: tuple[float, float]
    has_prompts: bool = False

    def drawn(self, vit: nn.Module, num_classes: int, num_prompts: int, seed: int) -> nn.Module:
        """The untrained model, prompts and head drawn from a seed."""
        return seeded(seed, lambda: self.build(vit, num_classes, num_prompts))


METHODS = {
    "linear": Method(lambda vit, num_classes, num_prompts: linear_probe(vit, num_classes), (0.05, 0.15)),
    "vpt-shallow": Method(VPT, (0.03, 0.1), has_prompts=True),
    "vpt-deep": Method(partial(VPT, deep=True), (0.03, 0.1), has_prompts=True),
    "bias": Method(lambda vit, num_classes, num_prompts: bias_tuning(vit, num_classes), (3e-3, 1e-2)),
    "adapter": Method(lambda vit, num_classes, num_prompts: adapter_tuning(vit, num_classes), (3e-3, 1e-2)),
    "lora": Method(lambda vit, num_classes, num_prompts: lora_tuning(vit, num_classes), (3e-3, 1e-2)),
    "full": Method(lambda vit, num_classes, num_prompts: full_fine_tune(vit, num_classes), (3e-4, 1e-3)),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike.

    Attributes:
        steps, batch_size, precision: as `lecture26.kit.training.train` takes them; "auto" is decided once for
            all runs of a comparison.
        augment: whether training images are mirrored and moved.
    """

    steps: int = 300
    batch_size: int = 64
    precision: str = "auto"
    augment: bool = False


# One precision for all stored comparisons, whatever is faster where.
SMALL_BUDGET = Budget(steps=600, batch_size=16, precision="fp32")
# for choosing a learning rate, and for a notebook, whose numbers shall not depend on what is faster where
SHORT_BUDGET = Budget(steps=200, batch_size=16, precision="fp32")


def fit(
    model: nn.Module,
    images: ImageSet,
    learning_rate: float,
    budget: Budget,
    seed: int = 0,
    weight_decay: float = WEIGHT_DECAY,
    **options,
) -> History:
    """Train what can be trained of a model to name the classes of images.

    Args:
        model: model(images (B, 3, H, W)) -> logits (B, K); trained in place.
        images: with the label "class".
        learning_rate: of AdamW at its highest; it rises for a tenth of the steps, then falls to 0.
        budget: how long.
        seed: decides the order of the images.
        weight_decay: of AdamW.
        options: `state_file`, `state_every`, `settings`, `watch` and `progress` of
            `lecture26.kit.training.train`.

    Returns:
        The History of the losses.
    """

    def draw(random: SampleDraws) -> dict[str, Tensor]:
        batch = images.batch(random.integers(len(images)))
        if budget.augment:
            batch["image"] = mirror_and_move(batch["image"], random)
        return batch

    return train(
        model,
        draw,
        class_loss,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=budget.steps // 10,
        seed=seed,
        precision=budget.precision,
        **options,
    )


def class_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross entropy of a model's logits at the classes of a batch, its mean."""
    return cross_entropy(model(batch["image"]).float(), batch["class"])


def build(method: str, vit: nn.Module, num_classes: int, num_prompts: int, seed: int) -> nn.Module:
    """The untrained model of one of METHODS, prompts and head drawn from a seed; ValueError for others."""
    check_choice("method", method, tuple(METHODS))
    return METHODS[method].drawn(vit, num_classes, num_prompts, seed)


def save_trained(file: Path, model: nn.Module, backbone: str, about: dict) -> None:
    """Write what was trained into a task's file: prompts and a head, or else all parameters that train.

    Args:
        file: the path.
        model: what one of METHODS has built, trained.
        backbone: the `backbone_fingerprint` of what it was built from.
        about: plain values (JSON) to keep with it; `load_trained` needs "method", "num_prompts", "classes".
    """
    if isinstance(model, VPT):
        state = model.task_state_dict()
    else:
        state = OrderedDict(trained_weights(model))
        state.backbone = backbone
    state.about = about
    save_task(file, state)


def load_trained(state: OrderedDict, vit: nn.Module) -> nn.Module:
    """The trained model again, in evaluation mode.

    Args:
        state: what `load_task` reads from a file of `save_trained`.
        vit: the backbone that it was built from; shared by prompts and linear probes, copied by the others.

    Raises:
        ValueError: if the state belongs to another backbone, or does not fit the model.
    """
    about = state.about
    check_choice("method", about["method"], tuple(METHODS))
    model = METHODS[about["method"]].build(vit, len(about["classes"]), about["num_prompts"])
    if isinstance(model, VPT):
        model.load_task_state_dict(state)
        return model.eval()
    if state.backbone != backbone_fingerprint(vit):
        raise ValueError("state must belong to this backbone; it was learned on another one")
    own = trained_weights(model)
    if {name: own[name].shape for name in own} != {name: state[name].shape for name in state}:
        raise ValueError(f"state must have what the method {about['method']!r} trains; it has other tensors")
    model.load_state_dict(state, strict=False)  # what does not train is the backbone's
    return model.eval()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that train, by name."""
    return {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def open_task(data: str | Path, image_size: int) -> dict[str, ImageSet]:
    """The three splits of a task, see `lecture26.kit.downstream.downstream`."""
    return {split: downstream(data, split, image_size) for split in SPLITS}


def load_backbone(name: str, pretrained: bool = True) -> nn.Module:
    """A backbone by its checkpoint's name, or by timm's name of it.

    Args:
        name: a checkpoint of the family "backbone", or such as "vit_base_patch16_224.augreg_in21k".
        pretrained: whether timm shall fetch its trained weights; else they are random, for trying things
            out. A checkpoint is always trained.

    Raises:
        ValueError: if there is no model of that name, prompts cannot be put into it, or a checkpoint is
            asked for with random weights.
        DataError: if the weights cannot be fetched.
    """
    import timm  # takes seconds to import

    if name in list_checkpoints():
        checkpoint = Trained(name)
        if checkpoint.recipe.family != "backbone":
            raise ValueError(f"backbone must be a Vision Transformer; the checkpoint {name!r} is none")
        if not pretrained:
            raise ValueError(f"random weights are for backbones of timm; got the checkpoint {name!r}")
        return checkpoint.network
    if not timm.is_model(name.split(".")[0]):
        own = ", ".join(list_checkpoints())
        raise ValueError(f"backbone must be a model of timm or a checkpoint ({own}); got {name!r}")
    try:
        # Without a pretrained tag of its own, a random network needs no weights to exist.
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except RuntimeError as error:  # an unknown tag, or no pretrained weights
        raise ValueError(f"backbone {name!r} cannot be made: {error}") from error
    except Exception as error:  # the hub's library raises what its network library does
        if not pretrained:
            raise  # nothing was fetched: a fault of the code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the weights of {name!r} could not be fetched: {reason} Connect to the network and try again "
            "(with HF_HUB_OFFLINE=1 only what was fetched before is looked for, at once), or use a "
            "checkpoint of the course, such as vit_photos32"
        ) from error
    try:
        check_backbone(vit)
    except TypeError as error:
        raise ValueError(f"backbone {name!r} cannot be prompted: {error}") from error
    return vit
