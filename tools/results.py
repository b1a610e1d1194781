"""Write the tables of measured numbers in README, chapter 00 and docs/results.md, from stored results alone.

    python tools/results.py            write what is out of date, and draw the gallery's pictures that are
    python tools/results.py check      say what is out of date, and change nothing

docs/results.md is made anew as a whole. In the README and in chapter 00 only the measured columns of tables
are filled; the other columns are theirs. A picture of the gallery is drawn by the command beside it, and
carries a note of that command and of the checkpoints' hashes, by which it is known to be out of date.
"""

import argparse
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from course import ROOT, CourseError, notebook_sources
from lecture26.kit.checkpoints import list_checkpoints, load_card
from lecture26.kit.claims import COLUMNS, count_verdicts, share_error
from lecture26.kit.figures import markdown_table
from lecture26.kit.results import load_results
from lecture26.recipes import classifiers, ddpm, latent
from lecture26.studies.claims import ADAPTED, CLAIMS, mean_accuracy, seeds_error
from lecture26.studies.guidances import NAMES, Way, standard_error

PAGE = Path("docs") / "results.md"
PAGE_HEAD = """# Results

What this course has measured, in tables. The page is made from stored results by `make results`
(`tools/results.py`): each number comes out of `data/results/NAME.json` or a checkpoint's card, which say by
which command, on which machine and with which versions they were made.
`python -m lecture26 measure NAME --replace` makes a measurement anew.

Two settings are called different where they lie more than two standard errors apart; ± is two standard
errors. A Fréchet distance always stands beside that of real images against real ones, with as many
samples."""

Rows = list[list[str]]


@dataclass(frozen=True)
class Drawing:
    """A picture of the gallery: its file in docs/, the command that draws it, what it needs and shows."""

    file: str
    words: str  # of the command line, without --out
    checkpoints: tuple[str, ...]
    alt: str

    @property
    def command(self) -> str:
        return f"python -m lecture26 {self.words}"

    def source(self) -> str:
        """What the picture is drawn from, as its note says it."""
        return " ".join([self.command, *(load_card(name)["sha256"] for name in self.checkpoints)])

    def is_drawn(self, root: Path) -> bool:
        """Whether the picture is there, and was drawn from what there is now."""
        file = root / "docs" / self.file
        if not file.exists():
            return False
        with Image.open(file) as picture:
            return picture.text.get("drawn from") == self.source()

    def draw(self, root: Path) -> None:
        """Run the command, and add the note to what it draws."""
        file = root / "docs" / self.file
        words = [sys.executable, "-m", "lecture26", *shlex.split(self.words), "--out", str(file)]
        subprocess.run(words, check=True, cwd=root)
        note = PngInfo()
        note.add_text("drawn from", self.source())
        with Image.open(file) as drawn:
            drawn.load()
        drawn.save(file, optimize=True, pnginfo=note)


GALLERY = (
    Drawing(
        "samples.png",
        "sample --model ddpm_shapes32 --count 36",
        ("ddpm_shapes32",),
        "A six by six grid of generated shapes",
    ),
    Drawing(
        "stars.png",
        'sample --model ddpm_shapes32 --guidance classifier --class "red star" --sampler ddpm --count 36',
        ("ddpm_shapes32", "noisy_classifier_shapes32"),
        "A six by six grid, most of them red stars",
    ),
    Drawing(
        "moons.png",
        'sample --model ddpm_shapes32 --guidance clip --prompt "a yellow crescent on a dark background" '
        "--sampler ddpm --count 36",
        ("ddpm_shapes32", "noisy_clip_shapes32"),
        "A six by six grid, nearly all of them yellow crescents on dark ground",
    ),
    Drawing(
        "rings.png",
        'sample --model conditional_ddpm_shapes32 --guidance cfg --w 0.5 --class "blue ring" --count 36',
        ("conditional_ddpm_shapes32",),
        "A six by six grid of blue rings",
    ),
    Drawing(
        "prompt.png",
        'sample --prompt "a large yellow star on a striped background" --count 16',
        ("text_to_image_shapes64", "vae_shapes64"),
        "A four by four grid of yellow stars on striped ground",
    ),
)


# --- Cells ---


def minutes(seconds: float) -> str:
    """Seconds as whole minutes."""
    return f"{seconds / 60:.0f} min"


def spread(numbers: Mapping, digits: int, factor: float = 1) -> str:
    """Median and extremes of a benchmark."""
    median, least, most = (f"{factor * numbers[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def with_error(value: float, error: float, digits: int = 0) -> str:
    """A value and two standard errors."""
    return f"{value:.{digits}f} ± {2 * error:.{digits}f}"


def share_of(value: float, count: int) -> str:
    """A share of `count` samples in per cent; where none fails, above what it lies."""
    if value == 1:
        # (1 - 3 / n)^n = .05: a share of failures above 3 / n would have shown itself in 95 % of such counts
        return f"100 (> {100 * (1 - 3 / count):.1f})"
    return with_error(100 * value, 100 * share_error(value, count), digits=1)


def over_seeds(shares: Sequence[float]) -> str:
    """The mean of a share in per cent over several seeds, with two of its standard errors."""
    run = {"accuracy": shares}
    return with_error(100 * mean_accuracy(run), 100 * seeds_error(run), digits=1)


# --- Tables ---


SWEEPS = ("classifier_guidance_sweep_small", "classifier_guidance_sweep")
FROM_FEW = ("adaptation_few_photos", "adaptation_few_textures")
FROM_FORTY = {
    "photographs, upside down": "adaptation_forty_photos",
    "photographs of other kinds": "adaptation_forty_other_kinds",
    "textures": "adaptation_forty_textures",
}
PROMPTS_FROM_FORTY = {
    "photographs, upside down": ("adaptation_forty_where_photos", "adaptation_forty_how_many_photos"),
    "textures": ("adaptation_forty_where_textures", "adaptation_forty_how_many_textures"),
}
LONGER = {
    "photographs, upside down": "adaptation_forty_longer_photos",
    "textures": "adaptation_forty_longer_textures",
}
PLACING = ("placing", "placing_by_rise")
FEWEST_TOLD = 20  # scenes of which a share is told

METRICS = {  # by the family of the recipe: what is told of a model, and the card's names of it
    "ddpm": [("Fréchet distance {:.0f}, of real images {:.0f}", "frechet_distance", "frechet_distance_real")],
    "noisy_classifier": [
        ("reads {:.0%} of clean shapes", "accuracy_shape_0"),
        ("{:.0%} at step 400", "accuracy_shape_400"),
    ],
    "clip": [("finds {:.0%} of captions", "retrieval")],
    "conditional_ddpm": [
        ("{:.0%} as asked for at w = 0", "accuracy_all_w_0"),
        (
            "Fréchet distance {:.0f}, of real images {:.0f}",
            "frechet_distance_w_0",
            "frechet_distance_real_w_0",
        ),
    ],
    "vae": [("{:.1f} dB", "psnr"), ("scale {:.2f}", "latent_scale")],
    "latent_diffusion": [
        ("{:.0%} of shapes all right", "accuracy_shapes_all"),
        ("{:.0%} of scenes", "accuracy_scenes_all"),
    ],
    "backbone": [("names {:.1%} of photographs", "accuracy")],
    "reader": [("reads {:.1%} all right", "accuracy_all")],
}


def told_of(card: Mapping) -> str:
    """What a card's metrics say of a model, in a few words."""
    try:
        chosen = METRICS[card["recipe"]]
    except KeyError:
        raise CourseError(
            f"METRICS must say what is told of a {card['recipe']!r}, as {card['name']} is"
        ) from None
    return "; ".join(text.format(*(card["metrics"][key] for key in keys)) for text, *keys in chosen)


def models() -> tuple[Rows, list[str]]:
    rows = []
    for name in sorted(list_checkpoints()):
        card = load_card(name)
        rows.append(
            [
                f"`{name}`",
                f"{card['parameters']:,}",
                f"{card['steps']:,}",
                minutes(card["seconds"]),
                card["machine"]["processor"],
                told_of(card),
            ]
        )
    return rows, ["model", "parameters", "steps", "last training", "processor", "how good"]


def guidances() -> tuple[Rows, list[str]]:
    rows = []
    for run in load_results("guidances_on_one_axis")["runs"]:
        interval = run["interval"]
        way = Way(run["guidance"], run["denoiser"], None if interval is None else tuple(interval))
        rows.append(
            [
                NAMES[way],
                f"{run['strength']:g}",
                share_of(run["accuracy_all"], run["num_samples"]),
                with_error(run["frechet_distance"], standard_error(run, "frechet_distance")),
                f"{run['frechet_distance_real']:.0f}",
                f"{run['recall']:.2f}",
                share_of(run["share_large"], run["num_samples"]),
            ]
        )
    columns = ["guidance, and its strength", "strength", "as asked for, %", "Fréchet distance"]
    return rows, [*columns, "of real images", "recall", "large shapes, %"]


def scales_by_step() -> tuple[Rows, list[str]]:
    rows = [
        [
            f"{run['factor']:g}",
            share_of(run["accuracy_all"], run["num_samples"]),
            with_error(run["frechet_distance"], run["frechet_distance_error"]),
            f"{run['frechet_distance_real']:.0f}",
            share_of(run["share_large"], run["num_samples"]),
        ]
        for run in load_results("classifier_scale_by_step")["runs"]
    ]
    columns = ["factor", "as asked for, %", "Fréchet distance", "of real images", "large shapes, %"]
    return rows, columns


def of_two_networks() -> tuple[Rows, list[str]]:
    """The same classifier with a smaller network and with a larger one, by ancestral sampling."""
    of_network = [
        {
            run["scale"]: run
            for run in load_results(name)["runs"]
            if (run["sampler"], run["split"]) == ("ddpm", "test") and run["form"] != "mean shift"
        }
        for name in SWEEPS
    ]
    rows = []
    for scale in of_network[0]:
        row = [f"{scale:g}"]
        for quantity in ("confident_share", "accuracy_all"):
            row += [share_of(runs[scale][quantity], runs[scale]["num_samples"]) for runs in of_network]
        rows.append(row)
    columns = [
        f"{what}, %: {network}" for what in ("legible", "as asked for") for network in ("small", "large")
    ]
    return rows, ["scale", *columns]


def places() -> tuple[Rows, list[str]]:
    rows = [
        [
            arm["name"],
            f"{look['step']:,}",
            share_of(look["accuracy_relation"], look["num_samples"]),
            share_of(look["in_order"], look["num_told"]) if look["num_told"] >= FEWEST_TOLD else "-",
            str(look["num_told"]),
            share_of(look["accuracy_asked"], look["num_samples"]),
        ]
        for name in PLACING
        for arm in load_results(name)["arms"]
        for look in arm["looks"]
    ]
    columns = ["aids", "training steps", "axis right, %", "in the right order, %", "of so many scenes"]
    return rows, [*columns, "all that was asked for, %"]


def adaptation() -> tuple[Rows, list[str]]:
    rows, methods = [], ("linear", "vpt-shallow", "vpt-deep", "full")
    for name in ADAPTED:
        runs = {run["method"]: run for run in load_results(name)["runs"]}
        accuracies = [
            f"{100 * mean_accuracy(runs[method]):.1f} "
            f"({100 * min(runs[method]['accuracy']):.1f} to {100 * max(runs[method]['accuracy']):.1f})"
            for method in methods
        ]
        rows.append(
            [name.removeprefix("adaptation_").replace("_", " "), str(runs["full"]["tested"]), *accuracies]
        )
    trained = [f"{runs[method]['trained']:,}" for method in methods]
    rows.append(["numbers trained, on the last task", "-", *trained])
    return rows, ["task", "test images", "linear probe", "VPT-shallow", "VPT-deep", "full fine-tuning"]


def solved() -> tuple[Rows, list[str]]:
    readers = ("class token", "patches", "quarters", "vpt-deep")
    rows = [
        [
            run["task"].removeprefix("./").replace("_", " "),
            *(f"{100 * statistics.mean(run['accuracy'][reader]):.1f}" for reader in readers),
        ]
        for run in load_results("adaptation_solved")["runs"]
    ]
    return rows, ["task", "class token", "mean of patches", "quarters", "class token, deep prompts"]


def from_few() -> tuple[Rows, list[str]]:
    def told(of_task: Mapping) -> dict[str, str]:
        accuracies = {f"solved head on the {name}": shares for name, shares in of_task["solved"].items()}
        accuracies["the first without penalty"] = of_task["solved_without_penalty"]
        accuracies |= {run["method"]: run["accuracy"] for run in of_task["runs"]}
        return {name: over_seeds(shares) for name, shares in accuracies.items()}

    photographs, textures = (told(load_results(name)) for name in FROM_FEW)
    rows = [[method, photographs[method], textures[method]] for method in photographs]
    return rows, ["method", "photographs, upside down", "textures"]


def from_forty() -> tuple[Rows, list[str]]:
    def told(of_task: Mapping) -> dict[str, tuple[str, str]]:
        cells = {
            f"frozen backbone, {name}": ("-", over_seeds(shares))
            for name, shares in of_task["solved"].items()
        }
        runs = of_task["runs"]
        return cells | {
            run["method"]: (over_seeds(run["accuracy"]), over_seeds(run["solved"])) for run in runs
        }

    of_tasks = [told(load_results(name)) for name in FROM_FORTY.values()]
    rows = [[method, *chain(*(cells[method] for cells in of_tasks))] for method in of_tasks[0]]
    return rows, ["method", *chain(*((task, "head solved") for task in FROM_FORTY))]


def prompts_from_forty() -> tuple[Rows, list[str]]:
    places = {"vpt-deep": "all", "vpt-first-half": "first half", "vpt-last-half": "last half"}
    rows = []
    for task, names in PROMPTS_FROM_FORTY.items():
        runs = [run for name in names for run in load_results(name)["runs"]]
        everywhere = load_results(FROM_FORTY[task])["runs"][0]
        rows += [
            [
                task,
                places[run["method"]],
                run["num_prompts"],
                over_seeds(run["accuracy"]),
                over_seeds(run["solved"]),
                f"{run['trained']:,}",
            ]
            for run in [everywhere, *runs]
        ]
    return rows, ["task", "blocks with prompts", "prompts", "as trained", "head solved", "numbers trained"]


def longer() -> tuple[Rows, list[str]]:
    rows = []
    for task, name in LONGER.items():
        before = {run["method"]: run for run in load_results(FROM_FORTY[task])["runs"]}
        rows += [
            [
                task,
                run["method"],
                over_seeds(before[run["method"]]["accuracy"]),
                over_seeds(run["accuracy"]),
                ", ".join(str(best_step(shares)) for shares in run["validation_by_step"]),
                over_seeds(run["accuracy_at_end"]),
            ]
            for run in load_results(name)["runs"]
        ]
    return rows, ["task", "method", "800 steps", "best look of 2,000", "which (a seed each)", "end of 2,000"]


def best_step(shares: Mapping[str, float]) -> int:
    """The number of steps before the first of the best looks."""
    return min((int(step) for step in shares), key=lambda step: (-shares[str(step)], step))


def latents() -> tuple[Rows, list[str]]:
    stored = load_results("pixel_against_latent")
    rows = []
    for model in stored["models"]:
        cost, last = stored["costs"]["models"][model["name"]], model["looks"][-1]
        rows.append(
            [
                model["name"],
                f"{cost['parameters']:,}",
                f"{cost['gflops_per_step']:.0f}",
                f"{cost['seconds_per_step']:.2f}",
                f"{cost['activation_bytes'] / 1e6:.0f}",
                f"{cost['sampling_seconds_per_image']:.2f}",
                f"{last['step']:,}",
                with_error(last["frechet_distance"], last["frechet_distance_error"]),
                share_of(last["confident_share"], stored["num_samples"]),
            ]
        )
    columns = ["model", "parameters", "GFLOP a step", "seconds a step", "MB kept", "seconds an image"]
    minutes_each = round(stored["models"][0]["looks"][-1]["seconds"] / 60)
    columns += [f"steps in {minutes_each} min", "Fréchet distance then", "legible, %"]
    return rows, columns


def against_diffusers() -> tuple[Rows, list[str]]:
    rows = []
    for setting in load_results("benchmark_unet")["settings"]:
        network = "the same network" if setting["patch_size"] == 1 else "2 x 2 pixels folded"
        ratios = [spread(setting[step]["ratio"], 2) for step in ("training_step", "sampling_step")]
        rows.append([f"{network}, {setting['dtype'].removesuffix(' autocast')}", *ratios])
    return rows, ["diffusers' time over ours", "training step", "sampling step"]


def steering_costs() -> tuple[Rows, list[str]]:
    measured = load_results("benchmark_guidance")["guided_over_unguided"]
    rows = [[name, spread(values["ratio"], 2)] for name, values in measured.items()]
    return rows, ["guidance", "time of a guided step over an unguided one"]


def serving() -> tuple[Rows, list[str]]:
    rows = []
    for run in load_results("benchmark_serving")["runs"]:
        memory, rate = run["memory_bytes"], run["requests_per_second"]
        rows.append(
            [
                str(run["tasks"]),
                f"{memory['bank'] / 1e6:.1f}",
                f"{memory['separate'] / 1e6:.0f}",
                f"{rate['bank']:.0f}",
                f"{rate['separate']:.0f}",
                spread(run["separate_over_bank"], 2),
            ]
        )
    columns = ["tasks", "MB, bank", "MB, networks", "requests a second, bank", "requests a second, networks"]
    return rows, [*columns, "networks' time over the bank's"]


def small_speeds() -> Rows:
    """The README's table of what else was timed, without its first column's words: these are its own."""
    shares = load_results("benchmark_sampler")["share_of_the_network_time"]
    imports = load_results("benchmark_import")
    cells = [spread(shares[name], 2, 100) for name in ("ddpm", "ddim")]
    cells += [spread(rate, 0) for rate in load_results("benchmark_shapes")["images_per_second"].values()]
    cells += [spread(imports[name], 2) for name in imports if name.startswith("import ")]
    return [[cell] for cell in cells]


def chapters() -> tuple[Rows, list[str]]:
    rows = [
        [name, f"{run['seconds']:.0f} s", f"{run['peak_memory'] / 1e9:.1f} GB"]
        for name, run in sorted(load_results("chapters")["chapters"].items())
    ]
    return rows, ["chapter", "time", "peak memory"]


def verdicts() -> tuple[Rows, list[str]]:
    return [[v.value, str(count)] for v, count in count_verdicts(CLAIMS).items()], ["verdict", "statements"]


# --- The page ---


def section(title: str, said: str, table: tuple[Rows, list[str]], results: Sequence[str] = ()) -> str:
    """A section of the page: its table, and by which commands and where its results were made."""
    text = f"## {title}\n\n{said}\n\n{markdown_table(*table)}"
    return text + "".join(f"\n\n*{made(name)}*" for name in results)


def made(name: str) -> str:
    """By which command a stored result was made, and on what."""
    stored = load_results(name)
    machine = stored["machine"]
    where = machine["accelerator"] or machine["processor"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return f"`{name}`: `{stored['command']}`; {where}, {threads}; torch {stored['versions']['torch']}"


def page() -> str:
    """docs/results.md."""
    on_axis = load_results("guidances_on_one_axis")["runs"][0]
    seeds = load_results(ADAPTED[0])["seeds"]
    batch_size = load_results("benchmark_serving")["batch_size"]
    parts = [
        PAGE_HEAD,
        section(
            "Models",
            "The checkpoints that come with the course, by their cards. *Last training* is that of the "
            "card; some go on from earlier ones, and that of `ddpm_shapes32` counts hours in which it was "
            f"stopped. Distances are of {ddpm.EVALUATION_SAMPLES} samples; a "
            f"classifier's shares of {classifiers.EVALUATION_IMAGES:,} unseen images, those of text to image "
            f"of {latent.EVALUATION_SAMPLES} drawings of each kind.",
            models(),
        ),
        section(
            "Guidance on one axis",
            f"At strength 1 each is Bayes' rule. {on_axis['num_samples']} samples a row, {on_axis['steps']} "
            "ancestral steps; > is the lower end of 95 % where all are right. (Chapters 03 to 05.)",
            guidances(),
            ["guidances_on_one_axis"],
        ),
        section(
            "A classifier's scale by step",
            "At each step the scale is the factor over the share of the exact gradient that the classifier's "
            "has there. Samples as above. (Chapter 05.)",
            scales_by_step(),
            ["classifier_scale_by_step"],
        ),
        section(
            "One classifier, two networks",
            "`small_ddpm_shapes32` and `ddpm_shapes32`, guided by the same classifier from the same "
            "noise: of how many pictures all attributes can be read, and how many have the shape and the "
            "colour that were asked for. (Chapter 03.)",
            of_two_networks(),
            SWEEPS,
        ),
        section(
            "What guidance costs",
            "Median (least to most) of alternating runs.",
            steering_costs(),
            ["benchmark_guidance"],
        ),
        section(
            "Adapting a frozen backbone",
            f"Test accuracy in %, mean of {len(seeds)} seeds (least to most). (Chapter 08.)",
            adaptation(),
            ADAPTED,
        ),
        section(
            "Heads solved to the end",
            "Test accuracy in % of a linear head, solved instead of trained, on what the frozen backbone "
            "says; with deep prompts the mean of three seeds. (Chapter 08.)",
            solved(),
            ["adaptation_solved"],
        ),
        section(
            "Ten images of each class",
            "Test accuracy in %, mean of five seeds, each with training images of its own; ± is two standard "
            "errors of that mean. (Chapter 08.)",
            from_few(),
            FROM_FEW,
        ),
        section(
            "Forty images of each class",
            "Test accuracy in %, mean of three seeds, each with training images of its own; ± is two "
            "standard errors of that mean. Learning rate and weight decay were chosen by validation images. "
            "The backbone of the second task was trained on five other kinds of photographs. (Chapter 08.)",
            from_forty(),
            FROM_FORTY.values(),
        ),
        section(
            "Prompts elsewhere, fewer and more",
            "Forty images of each class, as above. (Chapter 08.)",
            prompts_from_forty(),
            list(chain(*PROMPTS_FROM_FORTY.values())),
        ),
        section(
            "Training from forty for longer",
            "As above, with early stopping: every 200 steps a look at the validation images; the weights of "
            "the best are kept. (Chapter 08.)",
            longer(),
            LONGER.values(),
        ),
        section(
            "Many tasks, one backbone",
            "A server of chapter 09 with a prompt bank, and with a network for each task, up to "
            f"{batch_size} requests in a batch: memory of all parameters, requests at the median time of "
            "alternating runs; of the ratio median (least to most).",
            serving(),
            ["benchmark_serving"],
        ),
        section(
            "Which one goes where",
            "Models of text to image from nothing, with none, one or both of two aids: coordinates, and a "
            "lesson on the sides of nouns; and one whose training steps were drawn mostly where words fall "
            "silent. Scenes on the right axis; of those whose order can be told by their colours the ones "
            "that are the right way round; and those with shapes, colours and relation all right. One seed. "
            "(Chapter 07.)",
            places(),
            PLACING,
        ),
        section(
            "Latents against pixels",
            "Five models of single shapes at 64 pixels, without words, after equal minutes of training on "
            "one core; 512 images each, ± is two standard errors of drawing anew. One seed. (Chapter 07.)",
            latents(),
            ["pixel_against_latent"],
        ),
        section(
            "Speed against diffusers",
            "The U-Net beside `UNet2DModel` with as many parameters; median (least to most). Above 1 ours "
            "is faster.",
            against_diffusers(),
            ["benchmark_unet"],
        ),
        section("What a chapter takes", "A whole run of its notebook.", chapters(), ["chapters"]),
        section(
            "The lecture's statements",
            "What chapter 09 makes of them; (s) is a paper's number as others quote it.",
            verdicts(),
        ),
        *(
            f"### {topic.capitalize()}\n\n"
            + markdown_table([claim.row() for claim in CLAIMS if claim.topic == topic], COLUMNS)
            for topic in dict.fromkeys(claim.topic for claim in CLAIMS)
        ),
        "## Gallery\n\nNone is left out, and none was chosen: each picture is what its command draws.",
        *(f"![{one.alt}]({one.file})\n\n```bash\n{one.command}\n```" for one in GALLERY),
    ]
    return "\n\n".join(parts) + "\n"


# --- Measured columns of other tables ---


def filled(text: str, first_heading: str, cells: Callable[[list[str], int], Mapping[int, str]]) -> str:
    """A text whose table of this first heading has its measured cells filled.

    Args:
        text: Markdown, or the source of a notebook, where the table stands in comments.
        first_heading: of the table's first column.
        cells: called with a row's cells and its number; returns new ones, by the number of the column.

    Raises:
        CourseError: if there is no such table.
    """
    lines = text.split("\n")
    table = re.compile(rf"(# )?\| {re.escape(first_heading)} \|")
    start = next((number for number, line in enumerate(lines) if table.match(line)), None)
    if start is None:
        raise CourseError(f"there is no table whose first column is {first_heading!r}")
    number = start + 2  # below the heading and its rule
    while number < len(lines) and lines[number].lstrip("# ").startswith("|"):
        before, _, inside = lines[number].partition("|")
        row = [cell.strip() for cell in inside.rstrip().removesuffix("|").split("|")]
        for column, cell in cells(row, number - start - 2).items():
            row[column] = cell
        lines[number] = f"{before}|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|"
        number += 1
    return "\n".join(lines)


def with_times(text: str) -> str:
    """The table of chapters, with time and memory of those that were run."""
    measured = {name[:2]: cells for name, *cells in chapters()[0]}

    def cells(row: list[str], number: int) -> dict[int, str]:
        found = re.match(r"\[(\d\d) ", row[0])
        if not found:
            return {}  # planned
        if found[1] not in measured:
            raise CourseError(f"chapter {found[1]} was never measured: run `make course NAMES=...`")
        return dict(enumerate(measured[found[1]], start=3))

    return filled(text, "chapter", cells)


def with_cards(text: str) -> str:
    """The table of checkpoints, with their sizes, and the time of those that one plain command makes."""

    def cells(row: list[str], number: int) -> dict[int, str]:
        card = load_card(row[0].strip("`"))
        is_plain = row[3] == f"`python -m lecture26 train {card['name']}`"
        size = {2: f"{card['bytes'] / 1e6:.1f} MB"}
        return size | {4: minutes(card["seconds"])} if is_plain else size

    return filled(text, "name", cells)


def with_column_of(rows: Rows, text: str, first_heading: str, first: int) -> str:
    """A table whose columns from `first` on are these rows."""
    return filled(text, first_heading, lambda _, number: dict(enumerate(rows[number], start=first)))


def readme(text: str) -> str:
    """The README with all that is measured in it."""
    text = with_cards(with_times(text))
    speeds, columns = against_diffusers()
    text = with_column_of([row[1:] for row in speeds], text, columns[0], 1)
    return with_column_of(small_speeds(), text, "what", 1)


def texts(root: Path) -> dict[Path, str]:
    """Each file with measured numbers, and what stands in it when they are those that are stored."""
    (start,) = notebook_sources(root, ["00_start_here"])
    files = {root / "README.md": readme, start: with_times}
    filled_files = {file: fill(file.read_text(encoding="utf-8")) for file, fill in files.items()}
    return {**filled_files, root / PAGE: page()}


def out_of_date(root: Path) -> list[str]:
    """What does not agree with the stored results."""
    problems = [
        f"{file.relative_to(root)} has other numbers than the stored results"
        for file, text in texts(root).items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    return problems + [f"docs/{one.file} is drawn from others" for one in GALLERY if not one.is_drawn(root)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", choices=["write", "check"], default="write")
    action = parser.parse_args().action
    try:
        if action == "check":
            problems = out_of_date(ROOT)
            sys.exit("\n".join([*problems, "run `make results`"]) if problems else None)
        for drawing in GALLERY:
            if not drawing.is_drawn(ROOT):
                drawing.draw(ROOT)
        for file, text in texts(ROOT).items():
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                file.write_text(text, encoding="utf-8", newline="\n")
                print(f"wrote {file.relative_to(ROOT)}")
    except (CourseError, ValueError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
