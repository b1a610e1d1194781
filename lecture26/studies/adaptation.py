"""The comparison of the methods of chapter 08, by which a backbone is adapted to new tasks."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lecture26.kit.checkpoints import load_card
from lecture26.kit.downstream import TASKS, Coloured, FewOfEach
from lecture26.kit.image_set import ImageSet
from lecture26.kit.precision import choose_precision, say
from lecture26.kit.processes import process_state
from lecture26.kit.training import History
from lecture26.kit.validation import check_choice
from lecture26.recipes import Trained
from lecture26.recipes.adaptation import (
    COMPARED,
    METHODS,
    NUM_PROMPTS,
    SHORT_BUDGET,
    SMALL_BUDGET,
    WEIGHT_DECAY,
    Budget,
    Method,
    class_loss,
    fit,
    open_task,
    save_trained,
    trained_weights,
)
from lecture26.recipes.backbone import accuracy
from lecture26.recipes.recipe import state_file
from lecture26.studies.ledger import Ledger, ledger_file
from lecture26.visual_prompt_tuning import (
    VPT,
    backbone_fingerprint,
    pooled,
    prompted_tokens,
    trainable_parameters,
)

EVALUATION_BATCH = 100
UPSTREAM_IMAGES = 500  # for what a network still knows of its first task
RATE_STEP = 3.0  # between the learning rates beyond the ends of a method's own
MOST_RATES = 7
SMALL_TASKS = ("digits", *TASKS)
PROMPT_COUNTS = (1, 32)  # beside NUM_PROMPTS


@dataclass(frozen=True)
class Setting:
    """What a training run is made of, beside its seed."""

    method: str
    num_prompts: int
    learning_rate: float
    weight_decay: float

    def __str__(self) -> str:
        return f"{self.method} {self.num_prompts} {self.learning_rate:g} {self.weight_decay:g}"


@dataclass
class Comparison:
    """One backbone, one task, several methods, on the same budget.

    Attributes:
        vit: the backbone, frozen in place; it ends as it began.
        splits: the task's images: "train", "validation" and "test".
        budget: what each training run gets.
        seeds: of the repetitions; the first one's runs choose the learning rate.
        upstream: images of the backbone's own task, to see what is forgotten; None leaves that out.
        ledger: where finished runs are kept.
        state_file: where the state of the running one is kept, with a sign of its own in the name; None
            keeps none.
        state_every: seconds between two such states.
        name: what tells this comparison from others in `ledger`.
        folder: where to keep what was trained, in METHOD.safetensors; None keeps none.
        search: what the runs get that choose learning rate and weight decay; None gives them as much as the
            others.
        about: plain values to keep in these files, beside the method, the number of prompts and the classes.
        per_class: of how many training images of each class a seed learns, which it draws; None takes all.
        weight_decays: to choose from, rising; the learning rate is chosen before, at the first of them.
        solve: solve(trained model, splits with what it was trained on), on the CPU -> the test accuracy of a
            head that is solved anew; None leaves that out.
        methods: those that can be compared, by name.
        look_every: after how many steps to look at the validation images, in the runs that are measured; the
            weights of the best look are kept (early stopping). None keeps those of the end.
    """

    vit: nn.Module
    splits: dict[str, ImageSet]
    budget: Budget
    seeds: Sequence[int] = (0, 1, 2)
    upstream: ImageSet | None = None
    ledger: Ledger = field(default_factory=lambda: Ledger(None, {}))
    state_file: Path | None = None
    state_every: float = 60.0
    name: str = ""
    folder: Path | None = None
    search: Budget | None = None
    about: dict = field(default_factory=dict)
    per_class: int | None = None
    weight_decays: Sequence[float] = (WEIGHT_DECAY,)
    solve: Callable[[nn.Module, dict[str, ImageSet]], float] | None = None
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    look_every: int | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the task's classes, in the order of their numbers."""
        return list(self.splits["train"].labels["class"])

    def run(self, method: str, num_prompts: int, learning_rates: Sequence[float] | None = None) -> dict:
        """Choose a method's learning rate and weight decay by validation images; measure it on test images.

        A method begins with two learning rates of its own. As long as an end of those tried does best, one
        beyond it is tried, until the best lies between others or there are MOST_RATES.

        Args:
            method: one of `methods`.
            num_prompts: n, for the methods that have prompts.
            learning_rates: to choose from, these and no others; None begins with the method's own.

        Returns:
            "method", "num_prompts"; "learning_rate", the one chosen, "at_edge", whether it is the lowest or
            the highest that was tried, and "validation", the accuracy with each; "weight_decay" and
            "validation_by_weight_decay" likewise; "accuracy", on the test images for each seed, and "tested",
            how many these are; "solved", for each seed what `solve` returned; with looks on the way, for each
            seed "validation_by_step", and "accuracy_at_end" on the test images; "trained", the number of
            parameters that train, and "bytes", that they take in float32; "seconds", the mean of a training
            run, and "precision", in which it computed;
            "operations", of an image's forward pass; with upstream images "upstream", for each seed the
            accuracy on these with the adapted weights and the old head, "upstream_before", and for prompts
            "upstream_prompted", with the prompts left in.

        Raises:
            ValueError: on an unknown method.
            RuntimeError: if the backbone itself has changed.
        """
        check_choice("method", method, tuple(self.methods))
        if not self.methods[method].has_prompts:
            num_prompts = 0
        by_rate = self._by_rate(method, num_prompts, learning_rates)
        rate = best_rate(by_rate)
        by_decay = {
            decay: self._validation(Setting(method, num_prompts, rate, decay)) for decay in self.weight_decays
        }
        best = Setting(method, num_prompts, rate, max(by_decay, key=by_decay.get))
        runs = [self._measured(best, seed) for seed in self.seeds]
        if self.folder is not None and process_state().is_main_process:
            if self._file(best).exists():
                self._file(best).replace(self.folder / f"{method}.safetensors")
            for file in self.folder.glob(f".{method} *.safetensors"):
                file.unlink()
        summary = {
            "method": method,
            "num_prompts": num_prompts,
            "learning_rate": rate,
            "at_edge": is_at_edge(rate, by_rate),
            "validation": {f"{rate:g}": by_rate[rate] for rate in sorted(by_rate)},
            "weight_decay": best.weight_decay,
            "validation_by_weight_decay": {f"{decay:g}": share for decay, share in by_decay.items()},
            "tested": len(self.splits["test"]),
            "seconds": sum(run["seconds"] for run in runs) / len(runs),
        }
        by_seed = (
            "accuracy",
            "validation_by_step",
            "accuracy_at_end",
            "upstream",
            "upstream_prompted",
            "solved",
        )
        summary |= {name: [run[name] for run in runs] for name in by_seed if name in runs[0]}
        return runs[0] | summary

    def _by_rate(
        self, method: str, num_prompts: int, learning_rates: Sequence[float] | None
    ) -> dict[float, float]:
        """The validation accuracy at each learning rate that is tried."""

        def share(rate: float) -> float:
            return self._validation(Setting(method, num_prompts, rate, self.weight_decays[0]))

        rates = self.methods[method].learning_rates if learning_rates is None else learning_rates
        shares = {rate: share(rate) for rate in rates}
        while learning_rates is None and len(shares) < MOST_RATES:
            best = best_rate(shares)
            if not is_at_edge(best, shares):
                break
            beyond = best * RATE_STEP if best == max(shares) else best / RATE_STEP
            beyond = float(f"{beyond:.2g}")
            shares[beyond] = share(beyond)
        return shares

    def _validation(self, setting: Setting) -> float:
        """The accuracy of the first seed's run on the validation images."""
        run = self._measured if self.search is None else self._searched
        return run(setting, self.seeds[0])["validation"]

    def _searched(self, setting: Setting, seed: int) -> dict:
        """A run that helps to choose, and is measured on the validation images alone."""

        def compute() -> dict:
            model = self._drawn(setting, seed)
            self._fit(model, setting, seed, self.search)
            return {"validation": accuracy(model, self.splits["validation"], EVALUATION_BATCH)}

        return self.ledger.once(f"search {self.name} {setting} {seed}", compute)

    def _measured(self, setting: Setting, seed: int) -> dict:
        key = f"{self.name} {setting} {seed}"
        state = {}
        if self.state_file is not None and self.look_every is None:  # a state has no best look so far
            sign = hashlib.sha256(key.encode()).hexdigest()[:8]
            file = self.state_file.with_stem(f"{self.state_file.stem}_{sign}")
            state = {"state_file": file, "state_every": self.state_every, "settings": {"run": key}}
        measured = self.ledger.once(key, lambda: self._one_run(setting, seed, state))
        # Not earlier: what was trained is worth nothing until it is measured.
        if state and process_state().is_main_process:
            file.unlink(missing_ok=True)
        return measured

    def _one_run(self, setting: Setting, seed: int, state: dict) -> dict:
        before, fingerprint = self._upstream_before(), backbone_fingerprint(self.vit)
        model = self._drawn(setting, seed)
        looks = None if self.look_every is None else Looks(model, self.splits["validation"], self.look_every)
        history = self._fit(model, setting, seed, self.budget, watch=looks, **state)
        if looks is not None:
            at_end = accuracy(model, self.splits["test"], EVALUATION_BATCH)
            looks.take_back()
        if self.folder is not None and seed == self.seeds[0] and process_state().is_main_process:
            about = self.about | {"method": setting.method, "num_prompts": setting.num_prompts}
            save_trained(self._file(setting), model, fingerprint, about | {"classes": self.classes})
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
        if looks is not None:
            measured |= {"validation_by_step": looks.shares, "accuracy_at_end": at_end}
        if self.upstream is not None:
            measured |= before | self._remembered(model)
        self.vit.to("cpu")
        if self.solve is not None:
            splits = self.splits | {"train": self.training_images(seed)}
            measured["solved"] = self.solve(model.cpu(), splits)
        if backbone_fingerprint(self.vit) != fingerprint:
            raise RuntimeError(
                f"the method {setting.method!r} has changed the backbone, which must stay as it was"
            )
        return measured

    def _drawn(self, setting: Setting, seed: int) -> nn.Module:
        """A model before its training."""
        self.vit.to("cpu")  # where prompts and heads are drawn, so that a seed means the same everywhere
        return self.methods[setting.method].drawn(self.vit, len(self.classes), setting.num_prompts, seed)

    def _fit(self, model: nn.Module, setting: Setting, seed: int, budget: Budget, **options) -> History:
        """Train a model, and leave it in evaluation mode; options of `fit`."""
        history = fit(
            model,
            self.training_images(seed),
            setting.learning_rate,
            replace(budget, precision=self._precision(budget, model)),
            seed,
            weight_decay=setting.weight_decay,
            **options,
        )
        model.eval()
        return history

    def training_images(self, seed: int) -> ImageSet:
        """What a seed's runs learn from."""
        images = self.splits["train"]
        return images if self.per_class is None else FewOfEach(images, self.per_class, seed)

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

        return self.ledger.once(f"precision {self.name}", choose)["precision"]

    def _file(self, setting: Setting) -> Path:
        return self.folder / f".{setting}.safetensors"

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
        changed = copy.deepcopy(model)
        for head in ("head", "head_dist"):
            if hasattr(self.vit, head):
                setattr(changed, head, copy.deepcopy(getattr(self.vit, head)))
        changed.to(process_state().device)
        return {"upstream": accuracy(changed, self.upstream, EVALUATION_BATCH)}


class Looks:
    """Looks at validation images while a model trains, and the weights of the best.

    Args:
        model: the model, in training.
        images: with the label "class".
        every: steps from one look to the next.

    Attributes:
        shares: the accuracy, by the number of steps before each look.
    """

    def __init__(self, model: nn.Module, images: ImageSet, every: int):
        self._model, self._images, self._every = model, images, every
        self.shares: dict[int, float] = {}
        self._best: dict[str, Tensor] = {}

    def __call__(self, step: int) -> None:
        """Look, if it is time: the `watch` of `lecture26.kit.training.train`."""
        if step % self._every:
            return
        share = accuracy(self._model.eval(), self._images, EVALUATION_BATCH)
        self._model.train()
        if share > max(self.shares.values(), default=-1.0):
            self._best = {name: weight.clone() for name, weight in trained_weights(self._model).items()}
        self.shares[step] = share

    def take_back(self) -> None:
        """Give the model the weights that it had at the best look, the first of several."""
        self._model.load_state_dict(self._best, strict=False)  # what does not train has stayed


def best_rate(validation: dict[float, float]) -> float:
    """The learning rate of the largest validation accuracy; of several the middle or the upper middle one.

    validation: the accuracy with each rate; at least one.
    """
    equal = [rate for rate in sorted(validation) if validation[rate] == max(validation.values())]
    return equal[len(equal) // 2]


def is_at_edge(rate: float, rates: Iterable[float]) -> bool:
    """Whether a learning `rate` is the lowest or the highest of the `rates` that were tried."""
    return rate in (min(rates), max(rates))


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
        state: a name under which finished runs are kept, until `forget_ledger`; None keeps none.

    Returns:
        "budget", "search", "seeds", and "runs": for each backbone, task, number of prompts and method a dict
        of "backbone", "task" and what `Comparison.run` says.
    """
    settings = {
        "budget": vars(budget),
        "search": search and vars(search),
        "weight_decay": WEIGHT_DECAY,
        "tasks": [str(task) for task in tasks],
        "backbones": {name: load_card(name)["sha256"] for name in backbones},
        "upstream_images": UPSTREAM_IMAGES if upstream else 0,
    }
    ledger = Ledger(None if state is None else ledger_file(state), settings)
    runs = []
    jobs = [
        (backbone, task, method, count)
        for backbone in backbones
        for task in tasks
        for method in methods
        for count in (prompt_counts if METHODS[method].has_prompts else prompt_counts[:1])
    ]
    for backbone, task, method, count in tqdm(jobs, "adapting", unit="method"):
        checkpoint = Trained(backbone)
        of_its_own = Coloured(checkpoint.recipe.load_images("test"), UPSTREAM_IMAGES) if upstream else None
        comparison = Comparison(
            checkpoint.network,
            open_task(task, checkpoint.recipe.image_size),
            budget,
            seeds,
            of_its_own,
            ledger,
            None if state is None else state_file(state),
            name=f"{backbone} {task}",
            search=search,
        )
        run = comparison.run(method, count, learning_rates)
        runs.append({"backbone": backbone, "task": str(task)} | run)
    return {"budget": vars(budget), "search": search and vars(search), "seeds": list(seeds), "runs": runs}
