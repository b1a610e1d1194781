"""The command `adapt`: a backbone adapted to images of one's own."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

from lecture26.commands.invocation import data_option, invocation, options
from lecture26.kit.checkpoints import list_checkpoints
from lecture26.kit.data import SPLITS, check_images, load
from lecture26.kit.downstream import Coloured
from lecture26.kit.image_set import ImageSet
from lecture26.kit.paths import data_dir
from lecture26.kit.processes import process_state
from lecture26.kit.results import results_file, save_results
from lecture26.kit.validation import check_choice
from lecture26.recipes.adaptation import COMPARED, METHODS, WEIGHT_DECAY, Budget, load_backbone
from lecture26.recipes.recipe import sole_use, state_file
from lecture26.studies.adaptation import Comparison
from lecture26.studies.ledger import Ledger, forget_ledger, ledger_file
from lecture26.visual_prompt_tuning import backbone_fingerprint


def adapt(
    backbone: str,
    data: str,
    method: str,
    prompts: int,
    budget: Budget,
    *,
    learning_rates: Sequence[float] | None,
    seeds: int,
    random_weights: bool,
    name: str | None,
    state_every: float,
    replace: bool,
) -> None:
    """Adapt a backbone to a data set, store what was learned and how well it does, and print a summary.

    Args:
        backbone, data, prompts, budget, learning_rates, state_every: as `compare_on` takes them.
        method: one of METHODS, or "compare" for the four of the lecture.
        seeds: the number of repetitions.
        random_weights: whether a backbone of timm stays untrained.
        name: of the results; None for one after backbone and data.
        replace: whether to write over the results of that name.

    Raises:
        ValueError, DataError, OSError: as `compare_on`; or a wrong name, or results that exist.
        KeyboardInterrupt: when stopped, with the state written.
    """
    data = data_option(data)
    settings = {
        "backbone": backbone,
        "data": data,
        "method": method,
        "prompts": prompts,
        "steps": budget.steps,
        "batch_size": budget.batch_size,
        "seeds": seeds,
        "precision": budget.precision,
    }
    words = options(settings)
    words += [word for rate in learning_rates or [] for word in ("--learning-rate", f"{rate:g}")]
    flags = {"--augment": budget.augment, "--random-weights": random_weights, "--replace": replace}
    words += [flag for flag, is_set in flags.items() if is_set]
    if name is None:
        name = default_name(backbone, data, method)
    else:
        words += ["--name", name]
    check_name(name)
    if results_file(name).exists() and not replace:
        raise ValueError(f"results {name!r} exist: choose another --name, or write over with --replace")
    results = compare_on(
        backbone,
        data,
        COMPARED if method == "compare" else (method,),
        prompts,
        budget,
        seeds=range(seeds),
        learning_rates=learning_rates,
        pretrained=not random_weights,
        name=name,
        state_every=state_every,
    )
    if not process_state().is_main_process:
        return
    save_results(name, invocation("adapt", *words), results)
    forget_ledger(name)
    for run in results["runs"]:
        mean = sum(run["accuracy"]) / len(run["accuracy"])
        typer.echo(
            f"{run['method']:12} accuracy {mean:.1%}, {run['trained']:,} trained parameters, "
            f"{run['bytes'] / 1e3:,.0f} kB, learning rate {run['learning_rate']:g}"
        )
    typer.echo(f"stored: {results_file(name)} and {tasks_dir(name)}")
    typer.echo(f"to name pictures: python -m lecture26 classify --task {name} PICTURE ...")


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
        name: under which the states are kept, and what was found until `forget_ledger`.
        state_every: seconds between two states.

    Returns:
        "backbone", "pretrained", "data", "channels" (of the images), "classes" (their names, in the order of
        their numbers), "images" (of each split), "budget", "seeds" and "runs" (see `Comparison.run`).

    Raises:
        ValueError, DataError, OSError: on a wrong name, images without classes, or weights out of reach; an
            InUseError if another call of this name is under way.
        KeyboardInterrupt: when stopped, with the state written.
    """
    methods = list(methods)
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    for rate in learning_rates or ():
        if not rate > 0:
            raise ValueError(f"learning_rate must be above 0; got {rate}")
    with process_state().main_process_first():  # it may have to download
        vit = load_backbone(backbone, pretrained)
        size, mean, std = wanted_images(vit, backbone)
        images = {split: load(data, split, size) for split in SPLITS}
        if process_state().is_main_process:
            check_images(images.values())  # damage is found now, and not in the middle of a run
    splits = {split: Normalised(of_split, mean, std) for split, of_split in images.items()}
    about = {"backbone": backbone, "pretrained": pretrained, "channels": images["train"].channels}
    settings = about | {
        "data": data,
        "budget": vars(budget),
        "classes": list(splits["train"].labels["class"]),
        "images": {split: len(of_split) for split, of_split in splits.items()},
    }
    # The same name may come to mean another network.
    assumed = {"fingerprint": backbone_fingerprint(vit), "weight_decay": WEIGHT_DECAY}
    ledger = Ledger(ledger_file(name), settings | assumed)
    process_state().wait_for_everyone()  # a main process that has nothing left to do may delete the file
    comparison = Comparison(
        vit,
        splits,
        budget,
        seeds,
        None,
        ledger,
        state_file(name),
        state_every,
        name,
        tasks_dir(name),
        about=about,
    )
    with sole_use(name):
        runs = [comparison.run(method, num_prompts, learning_rates) for method in methods]
    return settings | {"seeds": list(seeds), "runs": runs}


def wanted_images(vit: nn.Module, backbone: str) -> tuple[int, Sequence[float], Sequence[float]]:
    """What images a backbone wants.

    Args:
        vit: the backbone.
        backbone: its name.

    Returns:
        Their height and width in pixels; mean and standard deviation of each channel, as `Normalised` takes
        them.

    Raises:
        ValueError: if they are not square, or have other than 3 channels.
    """
    import timm  # takes seconds to import

    if vit.in_chans != 3:
        raise ValueError(f"backbone must take images of 3 channels; {backbone!r} takes {vit.in_chans}")
    height, width = vit.patch_embed.img_size
    if height != width:
        raise ValueError(f"backbone must take square images; {backbone!r} takes {height} x {width}")
    if backbone in list_checkpoints():  # the course's own take images in [-1, 1]
        return height, (0.5,) * 3, (0.5,) * 3
    config = timm.data.resolve_model_data_config(vit)
    return height, config["mean"], config["std"]


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
