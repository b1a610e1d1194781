"""A backbone adapted to new tasks by every method of chapter 08, and the comparison of these."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lecture26.kit.checkpoints import list_checkpoints, load_card
from lecture26.kit.data import SPLITS, DataError
from lecture26.kit.downstream import TASKS, Coloured, downstream
from lecture26.kit.files import replace_when_complete
from lecture26.kit.image_set import ImageSet
from lecture26.kit.paths import data_dir
from lecture26.kit.precision import choose_precision, say
from lecture26.kit.processes import process_state
from lecture26.kit.training import History, SampleDraws, train
from lecture26.kit.validation import check_choice
from lecture26.recipes.backbone import accuracy, mirror_and_move
from lecture26.recipes.recipe import seeded, sole_use, state_file
from lecture26.visual_prompt_tuning import (
    VPT,
    backbone_fingerprint,
    bias_tuning,
    check_backbone,
    full_fine_tune,
    linear_probe,
    pooled,
    prompted_tokens,
    save_task,
    trainable_parameters,
)

WEIGHT_DECAY = 1e-4
EVALUATION_BATCH = 100
UPSTREAM_IMAGES = 500  # for what a network still knows of its first task
RATE_STEP = 3.0  # between the learning rates beyond the ends of a method's own
MOST_RATES = 7


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


METHODS = {
    "linear": Method(lambda vit, num_classes, num_prompts: linear_probe(vit, num_classes), (0.05, 0.15)),
    "vpt-shallow": Method(VPT, (0.03, 0.1), has_prompts=True),
    "vpt-deep": Method(partial(VPT, deep=True), (0.03, 0.1), has_prompts=True),
    "bias": Method(lambda vit, num_classes, num_prompts: bias_tuning(vit, num_classes), (3e-3, 1e-2)),
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


def fit(
    model: nn.Module,
    images: ImageSet,
    learning_rate: float,
    budget: Budget,
    seed: int = 0,
    **options,
) -> History:
    """Train what can be trained of a model to name the classes of images.

    Args:
        model: model(images (B, 3, H, W)) -> logits (B, K); trained in place.
        images: with the label "class".
        learning_rate: of AdamW at its highest; it rises for a tenth of the steps, then falls to 0.
        budget: how long.
        seed: decides the order of the images.
        options: `state_file`, `state_every`, `settings` and `progress` of `lecture26.kit.training.train`.

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
        weight_decay=WEIGHT_DECAY,
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
    return seeded(seed, lambda: METHODS[method].build(vit, num_classes, num_prompts))


class Progress:
    """Numbers that are kept in a file as they come, so that a study that was stopped goes on.

    Args:
        file: where; None keeps them in memory only.
        settings: plain values; a file of other ones is refused.

    Raises:
        ValueError: if the file belongs to a study with other settings, or is damaged.
    """

    def __init__(self, file: Path | None, settings: dict):
        self._file, self._settings, self._done = file, json.loads(json.dumps(settings)), {}
        if file is None or not file.exists():
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            settings, self._done = content["settings"], content["done"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it to start anew") from error
        if settings != self._settings:
            raise ValueError(f"{file} belongs to a study with other settings: delete it to start anew")

    def once(self, key: str, compute: Callable[[], dict]) -> dict:
        """What `compute` returned under this key, now or before the study was stopped.

        Of several processes all get what the main one has computed: what to do next is decided by it.
        """
        if key not in self._done:
            from accelerate.utils import broadcast_object_list  # takes a second to import

            measured = json.loads(json.dumps(compute()))
            (self._done[key],) = broadcast_object_list([measured])
            if self._file is not None and process_state().is_main_process:
                with replace_when_complete(self._file) as temporary:
                    temporary.write_text(json.dumps({"settings": self._settings, "done": self._done}))
        return self._done[key]


@dataclass
class Comparison:
    """One backbone, one task, several methods, on the same budget.

    Attributes:
        vit: the backbone, frozen in place; it ends as it began.
        splits: the task's images: "train", "validation" and "test".
        budget: what each training run gets.
        seeds: of the repetitions; the first one's runs choose the learning rate.
        upstream: images of the backbone's own task, to see what is forgotten; None leaves that out.
        progress: where finished runs are kept.
        state_file: where the state of the running one is kept, with a sign of its own in the name; None
            keeps none.
        state_every: seconds between two such states.
        name: what tells this comparison from others in `progress`.
        folder: where to keep what was trained, in METHOD.safetensors; None keeps none.
        search: what the runs get that choose the learning rate; None gives them as much as the others.
    """

    vit: nn.Module
    splits: dict[str, ImageSet]
    budget: Budget
    seeds: Sequence[int] = (0, 1, 2)
    upstream: ImageSet | None = None
    progress: Progress = field(default_factory=lambda: Progress(None, {}))
    state_file: Path | None = None
    state_every: float = 60.0
    name: str = ""
    folder: Path | None = None
    search: Budget | None = None

    def run(self, method: str, num_prompts: int, learning_rates: Sequence[float] | None = None) -> dict:
        """Choose a method's learning rate by the validation images, and measure it on the test images.

        A method begins with two learning rates of its own. As long as an end of those tried does best, one
        beyond it is tried, until the best lies between others or there are MOST_RATES.

        Args:
            method: one of METHODS.
            num_prompts: n, for the methods that have prompts.
            learning_rates: to choose from, these and no others; None begins with the method's own.

        Returns:
            "method", "num_prompts"; "learning_rate", the one chosen, "at_edge", whether it is the lowest or
            the highest that was tried, and "validation", the accuracy with each; "accuracy", on the test
            images for each seed, and "tested", how many these are; "trained", the number of parameters that
            train, and "bytes", that they take in float32; "seconds", the mean of a training run,
            and "precision", in which it computed;
            "operations", of an image's forward pass; with upstream images "upstream", for each seed the
            accuracy on these with the adapted weights and the old head, "upstream_before", and for prompts
            "upstream_prompted", with the prompts left in.

        Raises:
            ValueError: on an unknown method.
            RuntimeError: if the backbone itself has changed.
        """
        check_choice("method", method, tuple(METHODS))
        if not METHODS[method].has_prompts:
            num_prompts = 0
        validation = self._validation(method, num_prompts, learning_rates)
        best = best_rate(validation)
        runs = [self._measured(method, num_prompts, best, seed) for seed in self.seeds]
        if self.folder is not None and process_state().is_main_process:
            for rate in validation:
                file = self._file(method, rate)
                if rate == best and file.exists():
                    file.replace(self.folder / f"{method}.safetensors")
                file.unlink(missing_ok=True)
        by_seed = ("accuracy", "upstream", "upstream_prompted")
        summary = {
            "method": method,
            "num_prompts": num_prompts,
            "learning_rate": best,
            "at_edge": is_at_edge(best, validation),
            "validation": {f"{rate:g}": validation[rate] for rate in sorted(validation)},
            "tested": len(self.splits["test"]),
            "seconds": sum(run["seconds"] for run in runs) / len(runs),
        }
        summary |= {name: [run[name] for run in runs] for name in by_seed if name in runs[0]}
        return runs[0] | summary

    def _validation(
        self, method: str, num_prompts: int, learning_rates: Sequence[float] | None
    ) -> dict[float, float]:
        """The first seed's accuracy on the validation images at each learning rate that is tried."""

        def share(rate: float) -> float:
            run = self._measured if self.search is None else self._searched
            return run(method, num_prompts, rate, self.seeds[0])["validation"]

        rates = METHODS[method].learning_rates if learning_rates is None else learning_rates
        shares = {rate: share(rate) for rate in rates}
        while learning_rates is None and len(shares) < MOST_RATES:
            best = best_rate(shares)
            if not is_at_edge(best, shares):
                break
            beyond = best * RATE_STEP if best == max(shares) else best / RATE_STEP
            beyond = float(f"{beyond:.2g}")
            shares[beyond] = share(beyond)
        return shares

    def _searched(self, method: str, num_prompts: int, learning_rate: float, seed: int) -> dict:
        """A run that helps to choose the learning rate, and is measured on the validation images alone."""

        def compute() -> dict:
            model, _ = self._trained(method, num_prompts, learning_rate, seed, self.search)
            return {"validation": accuracy(model, self.splits["validation"], EVALUATION_BATCH)}

        key = f"search {self.name} {method} {num_prompts} {learning_rate:g} {seed}"
        return self.progress.once(key, compute)

    def _measured(self, method: str, num_prompts: int, learning_rate: float, seed: int) -> dict:
        key = f"{self.name} {method} {num_prompts} {learning_rate:g} {seed}"
        state = {}
        if self.state_file is not None:
            sign = hashlib.sha256(key.encode()).hexdigest()[:8]
            file = self.state_file.with_stem(f"{self.state_file.stem}_{sign}")
            state = {"state_file": file, "state_every": self.state_every, "settings": {"run": key}}
        measured = self.progress.once(
            key, lambda: self._one_run(method, num_prompts, learning_rate, seed, state)
        )
        # Not earlier: what was trained is worth nothing until it is measured.
        if state and process_state().is_main_process:
            file.unlink(missing_ok=True)
        return measured

    def _one_run(self, method: str, num_prompts: int, learning_rate: float, seed: int, state: dict) -> dict:
        before, fingerprint = self._upstream_before(), backbone_fingerprint(self.vit)
        model, history = self._trained(method, num_prompts, learning_rate, seed, self.budget, **state)
        if self.folder is not None and seed == self.seeds[0] and process_state().is_main_process:
            save_trained(self._file(method, learning_rate), model)
        trained = sum(parameter.numel() for parameter in trainable_parameters(model))
        measured = {
            "accuracy": accuracy(model, self.splits["test"], EVALUATION_BATCH),
            "validation": accuracy(model, self.splits["validation"], EVALUATION_BATCH),
            "seconds": history.seconds,
            "precision": history.precision,
            "trained": trained,
            "bytes": 4 * trained,
            "operations": operations(model, self.splits["test"]),
        }
        if self.upstream is not None:
            measured |= before | self._remembered(model)
        self.vit.to("cpu")
        if backbone_fingerprint(self.vit) != fingerprint:
            raise RuntimeError(f"the method {method!r} has changed the backbone, which must stay as it was")
        return measured

    def _trained(
        self, method: str, num_prompts: int, learning_rate: float, seed: int, budget: Budget, **state
    ) -> tuple[nn.Module, History]:
        """A model after its training, in evaluation mode, and the history of this."""
        self.vit.to("cpu")  # where prompts and heads are drawn, so that a seed means the same everywhere
        num_classes = len(self.splits["train"].labels["class"])
        model = build(method, self.vit, num_classes, num_prompts, seed)
        budget = replace(budget, precision=self._precision(budget, model))
        history = fit(model, self.splits["train"], learning_rate, budget, seed, **state)
        return model.eval(), history

    def _precision(self, budget: Budget, model: nn.Module) -> str:
        """The precision of all runs: where the budget leaves it open, what is faster for the first model."""
        if budget.precision != "auto":
            return budget.precision

        def choose() -> dict:
            device = process_state().device
            batch = self.splits["train"].batch(torch.arange(budget.batch_size) % len(self.splits["train"]))
            batch = {name: values.to(device) for name, values in batch.items()}
            choice = choose_precision(model.to(device), batch, class_loss)
            say(choice)
            return {"precision": choice.precision}

        return self.progress.once(f"precision {self.name}", choose)["precision"]

    def _file(self, method: str, learning_rate: float) -> Path:
        return self.folder / f".{method}_{learning_rate:g}.safetensors"

    def _upstream_before(self) -> dict[str, float]:
        """What the backbone knows of its own task before the training, on the same device."""
        if self.upstream is None:
            return {}
        vit = self.vit.to(process_state().device).eval()
        return {"upstream_before": accuracy(vit, self.upstream, EVALUATION_BATCH)}

    def _remembered(self, model: nn.Module) -> dict[str, float]:
        """What the network still knows of its first task, by its old head."""
        if isinstance(model, VPT):
            measured = {"upstream": accuracy(model.vit, self.upstream, EVALUATION_BATCH)}
            if model.num_prompts:
                measured["upstream_prompted"] = accuracy(_Prompted(model), self.upstream, EVALUATION_BATCH)
            return measured
        changed = copy.deepcopy(self.vit).to(process_state().device)
        weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head")}
        changed.load_state_dict(weights, strict=False)
        return {"upstream": accuracy(changed, self.upstream, EVALUATION_BATCH)}


def best_rate(validation: dict[float, float]) -> float:
    """The learning rate that does best.

    Args:
        validation: the accuracy with each rate; at least one.

    Returns:
        The rate with the largest accuracy; where several have it, the middle one of these (of an even number
        the upper one of the middle two).
    """
    equal = [rate for rate in sorted(validation) if validation[rate] == max(validation.values())]
    return equal[len(equal) // 2]


def is_at_edge(rate: float, rates: Iterable[float]) -> bool:
    """Whether a learning `rate` is the lowest or the highest of the `rates` that were tried."""
    return rate in (min(rates), max(rates))


def save_trained(file: Path, model: nn.Module) -> None:
    """Write what was trained: a task's file for prompts and linear probes, else all parameters that train."""
    if isinstance(model, VPT):
        save_task(file, model.task_state_dict())
        return
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with replace_when_complete(file) as temporary:
        temporary.write_bytes(save(weights))


class _Prompted(nn.Module):
    """A backbone with its own head, and with another task's prompts left in."""

    def __init__(self, model: VPT):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        vit = self.model.vit
        return vit.head(pooled(vit, prompted_tokens(vit, x, self.model.prompts), self.model.num_prompts))


def operations(model: nn.Module, images: ImageSet) -> int:
    """The floating-point operations of the matrix products in an image's forward pass.

    Not under torch.no_grad(), where torch's counter stumbles over a view of a parameter.
    """
    device = next(model.parameters()).device
    with attention_by_products(model), FlopCounterMode(display=False) as counter:
        model(images.batch([0])["image"].to(device))
    return counter.get_total_flops()


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Let the attention in a `model` multiply matrix by matrix, so that torch's counter sees every product.

    It misses the fused kernel of a CPU. Afterwards each layer computes as it did before.
    """
    fused = [layer for layer in model.modules() if getattr(layer, "fused_attn", False)]
    for layer in fused:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer in fused:
            layer.fused_attn = True


def open_task(data: str | Path, image_size: int) -> dict[str, ImageSet]:
    """The three splits of a task, see `lecture26.kit.downstream.downstream`."""
    return {split: downstream(data, split, image_size) for split in SPLITS}


SMALL_TASKS = ("digits", *TASKS)
SMALL_BUDGET = Budget(steps=600, batch_size=16)
# for choosing a learning rate, and for a notebook, whose numbers shall not depend on what is faster where
SHORT_BUDGET = Budget(steps=200, batch_size=16, precision="fp32")
COMPARED = ("linear", "vpt-shallow", "vpt-deep", "full")  # of METHODS
NUM_PROMPTS = 8
PROMPT_COUNTS = (1, 32)  # beside NUM_PROMPTS


def adaptation(
    backbones: Sequence[str] = ("vit_photos32",),
    tasks: Sequence[str] = SMALL_TASKS,
    methods: Sequence[str] = COMPARED,
    prompt_counts: Sequence[int] = (NUM_PROMPTS,),
    budget: Budget = SMALL_BUDGET,
    search: Budget | None = SHORT_BUDGET,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] | None = None,
    upstream: bool = True,
    state: str | None = None,
) -> dict:
    """Compare methods on several tasks, backbones and numbers of prompts.

    Args:
        backbones: checkpoints of the family "backbone".
        tasks: what `open_task` takes.
        methods: of METHODS.
        prompt_counts: n, each tried with the methods that have prompts; the others run once.
        budget: of each training run.
        search, seeds, learning_rates: as `Comparison` has them.
        upstream: whether to measure on the data of the backbones' cards what is forgotten.
        state: a name under which finished runs are kept, until `forget_progress`; None keeps none.

    Returns:
        "budget", "search", "seeds", and "runs": for each backbone, task, number of prompts and method a dict
        of "backbone", "task" and what `Comparison.run` says.
    """
    from lecture26.recipes import load_model, load_recipe  # not above, since that package imports this module

    settings = {
        "budget": vars(budget),
        "search": search and vars(search),
        "weight_decay": WEIGHT_DECAY,
        "tasks": [str(task) for task in tasks],
        "backbones": {name: load_card(name)["sha256"] for name in backbones},
        "upstream_images": UPSTREAM_IMAGES if upstream else 0,
    }
    progress = Progress(None if state is None else progress_file(state), settings)
    runs = []
    jobs = [
        (backbone, task, method, count)
        for backbone in backbones
        for task in tasks
        for method in methods
        for count in (prompt_counts if METHODS[method].has_prompts else prompt_counts[:1])
    ]
    for backbone, task, method, count in tqdm(jobs, "adapting", unit="method"):
        recipe = load_recipe(backbone)
        of_its_own = Coloured(recipe.load("test"), UPSTREAM_IMAGES) if upstream else None
        comparison = Comparison(
            load_model(backbone),
            open_task(task, recipe.image_size),
            budget,
            seeds,
            of_its_own,
            progress,
            None if state is None else state_file(state),
            name=f"{backbone} {task}",
            search=search,
        )
        run = comparison.run(method, count, learning_rates)
        runs.append({"backbone": backbone, "task": str(task)} | run)
    return {"budget": vars(budget), "search": search and vars(search), "seeds": list(seeds), "runs": runs}


def progress_file(name: str) -> Path:
    """Where what an unfinished comparison has found is kept."""
    return state_file(name).with_suffix(".json")


def forget_progress(name: str) -> None:
    """Delete what a comparison has found on its way, once its results are stored."""
    progress_file(name).unlink(missing_ok=True)


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
    import timm

    from lecture26.recipes import load_model, load_recipe

    if name in list_checkpoints():
        if load_recipe(name).family != "backbone":
            raise ValueError(f"backbone must be a Vision Transformer; the checkpoint {name!r} is none")
        if not pretrained:
            raise ValueError(f"random weights are for backbones of timm; got the checkpoint {name!r}")
        return load_model(name)
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


class Normalised(ImageSet):
    """Images as a backbone of timm wants them: with its mean and standard deviation of each channel.

    Args:
        images: in [-1, 1], with the label "class", grey or coloured.
        mean, std: of each channel, for images in [0, 1], as timm has them.
    """

    channels = 3

    def __init__(self, images: ImageSet, mean: Sequence[float], std: Sequence[float]):
        self._images, self.image_size, self.labels = Coloured(images), images.image_size, images.labels
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        batch = self._images.batch(indices)
        return batch | {"image": ((batch["image"] + 1) / 2 - self._mean) / self._std}


def compare_on(
    backbone: str,
    data: str,
    methods: Iterable[str],
    num_prompts: int,
    budget: Budget,
    *,
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] | None = None,
    pretrained: bool = True,
    name: str,
    state_every: float = 60.0,
) -> dict:
    """Adapt a backbone to a data set of any size, by one or more methods; a stopped call goes on.

    Args:
        backbone, pretrained: as `load_backbone` takes them.
        data: a data set's name or a folder, as `lecture26.kit.data.load` takes it; all of its images count.
        methods: of METHODS.
        num_prompts, budget, seeds, learning_rates: as `Comparison` has them.
        name: under which the states are kept, and what was found until `forget_progress`.
        state_every: seconds between two states.

    Returns:
        "backbone", "data", "images" (of each split), "budget", "seeds" and "runs" (see `Comparison.run`).

    Raises:
        ValueError, DataError, OSError: on a wrong name, images without classes, or weights out of reach; an
            InUseError if another call of this name is under way.
        KeyboardInterrupt: when stopped, with the state written.
    """
    import timm

    from lecture26.kit.data import load

    methods = list(methods)
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    for rate in learning_rates or ():
        if not rate > 0:
            raise ValueError(f"learning_rate must be above 0; got {rate}")
    with process_state().main_process_first():  # it may have to download
        vit = load_backbone(backbone, pretrained)
        config = timm.data.resolve_model_data_config(vit)
        if vit.in_chans != 3:
            raise ValueError(f"backbone must take images of 3 channels; {backbone!r} takes {vit.in_chans}")
        height, width = vit.patch_embed.img_size
        if height != width:
            raise ValueError(f"backbone must take square images; {backbone!r} takes {height} x {width}")
        mean, std = ((0.5,) * 3,) * 2 if backbone in list_checkpoints() else (config["mean"], config["std"])
        loaded = {split: load(data, split, height) for split in SPLITS}
        if process_state().is_main_process:
            for images in loaded.values():
                images.check()  # damage is found now, and not in the middle of a run
        splits = {split: Normalised(images, mean, std) for split, images in loaded.items()}
    settings = {
        "backbone": backbone,
        "pretrained": pretrained,
        "data": data,
        "budget": vars(budget),
        "images": {split: len(images) for split, images in splits.items()},
    }
    # The same name may come to mean another network.
    assumed = {"fingerprint": backbone_fingerprint(vit), "weight_decay": WEIGHT_DECAY}
    progress = Progress(progress_file(name), settings | assumed)
    process_state().wait_for_everyone()  # a main process that has nothing left to do may delete the file
    comparison = Comparison(
        vit,
        splits,
        budget,
        seeds,
        None,
        progress,
        state_file(name),
        state_every,
        name,
        tasks_dir(name),
    )
    with sole_use(name):
        runs = [comparison.run(method, num_prompts, learning_rates) for method in methods]
    return settings | {"seeds": list(seeds), "runs": runs}


def tasks_dir(name: str) -> Path:
    """Where what was trained on the way to the results of that name is kept."""
    return data_dir() / "tasks" / name


def check_name(name: str) -> None:
    """Raise ValueError unless a name of results is a plain file's: letters, digits, - and _."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"name must be made of letters, digits, - and _, beginning with a letter or digit; got {name!r}"
        )


def default_name(backbone: str, data: str, method: str) -> str:
    """A name for the results of adapting a backbone to data: adapt_BACKBONE_DATA_METHOD, in plain signs."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", f"{backbone} {Path(data).name} {method}").strip("_")
    return f"adapt_{words}"
