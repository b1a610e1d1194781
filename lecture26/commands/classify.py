"""The command `classify`: pictures named by the classes of a task that `adapt` has learned."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from torch import nn

from lecture26.commands.adapt import Normalised, check_name, tasks_dir, wanted_images
from lecture26.kit.data import DataError, FileImages
from lecture26.kit.paths import expanded
from lecture26.kit.processes import process_state
from lecture26.recipes.adaptation import load_backbone, load_trained
from lecture26.visual_prompt_tuning import backbone_fingerprint, load_task


@torch.no_grad()
def classify(task: str, method: str | None, pictures: Sequence[Path]) -> bool:
    """Print for each picture the most probable class and its probability, one picture a line.

    Args:
        task: the name of `adapt`'s results.
        method: which of the methods that the task was learned by; None if there is only one.
        pictures: image files.

    Returns:
        Whether all pictures could be read. Of the others each gets an error of its own.

    Raises:
        ValueError, DataError, OSError: if there is no such task, or it does not go with its backbone.
    """
    pictures = [expanded(picture) for picture in pictures]
    file = task_file(task, method)
    state = described_task(task, file)
    classes, channels = state.about["classes"], state.about["channels"]
    vit = backbone_of(task, state)
    size, mean, std = wanted_images(vit, state.about["backbone"])
    model = load_trained(state, vit).to(process_state().device)
    all_read = True
    for picture in pictures:
        images = Normalised(FileImages([picture], [0], classes, channels, size), mean, std)
        try:
            image = images.batch([0])["image"].to(process_state().device)  # (1, 3, H, W)
        except DataError as error:
            # without the advice for images of a training
            typer.echo(f"error: {picture} is not a readable image ({error.__context__})", err=True)
            all_read = False
            continue
        probability, number = model(image).float().softmax(dim=1)[0].max(dim=0)
        typer.echo(f"{picture}: {classes[number]} {probability:.1%}")
    return all_read


def task_file(task: str, method: str | None) -> Path:
    """The file of a task by a method; None for the only one.

    Raises:
        ValueError: if there is none, or more than one to choose from.
    """
    check_name(task)
    methods = [file.stem for file in sorted(tasks_dir(task).glob("[!.]*.safetensors"))]
    if not methods:
        folders = tasks_dir(task).parent.glob("*/")
        present = ", ".join(sorted(folder.name for folder in folders)) or "none"
        raise ValueError(
            f"there is no task {task!r} in {tasks_dir(task).parent} (present: {present}): learn one with "
            "`python -m lecture26 adapt`"
        )
    if method is None and len(methods) > 1:
        raise ValueError(f"the task {task!r} was learned by {', '.join(methods)}: choose one with --method")
    if method not in (None, *methods):
        raise ValueError(f"the task {task!r} was learned by {', '.join(methods)}; got --method {method}")
    return tasks_dir(task) / f"{method or methods[0]}.safetensors"


def described_task(task: str, file: Path) -> OrderedDict:
    """What a task has learned, with all in its attribute `about` that `compare_on` tells of it.

    Raises:
        ValueError: if the file is damaged, or of an earlier version, which told nothing.
    """
    again = f"learn it again with `python -m lecture26 adapt ... --name {task} --replace`"
    try:
        state = load_task(file)
    except ValueError as error:
        raise ValueError(f"{error}, or from an earlier version of the course: {again}") from error
    missing = {"backbone", "pretrained", "channels", "classes", "method", "num_prompts"} - state.about.keys()
    if missing:
        raise ValueError(
            f"{file} does not say what its classes are called, as files of earlier versions of the course: "
            f"{again}"
        )
    return state


def backbone_of(task: str, state: OrderedDict) -> nn.Module:
    """The backbone that a task was learned on.

    Raises:
        ValueError: if it is not there, or another one of that name is.
        DataError: if its weights cannot be fetched.
    """
    name = state.about["backbone"]
    if not state.about["pretrained"]:
        raise ValueError(f"the task {task!r} was learned on random weights of {name!r}, which are not kept")
    try:
        vit = load_backbone(name)
    except ValueError as error:
        raise ValueError(f"the backbone of the task {task!r} is missing: {error}") from error
    if backbone_fingerprint(vit) != state.backbone:
        raise ValueError(
            f"the task {task!r} was learned on other weights than those that {name!r} has now: bring these "
            "back, or learn the task again"
        )
    return vit
