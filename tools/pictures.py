"""Draw the pictures in docs/, which the README and chapter 00 show.

    python tools/pictures.py             all of them
    python tools/pictures.py map         one of them: map or denoising

`map` is to be drawn anew when a chapter is added, `denoising` when the checkpoint ddpm_shapes32 changes.
"""

import argparse
from io import BytesIO
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from course import ROOT, notebook_sources
from lecture26 import recipes
from lecture26.ddpm import Diffusion, GaussianMixture, cosine_betas, ddim_step, exact_denoiser, sample
from lecture26.kit.checkpoints import load_card
from lecture26.kit.figures import PALETTE, use_style

CHAPTERS = {  # number: title, column and row on the map, topic
    "00": ("Start\nhere", 0, 2, "the process"),
    "01": ("DDPM", 1, 2, "the process"),
    "02": ("U-Net", 2, 2, "the process"),
    "03": ("Classifier\nguidance", 3, 2, "guidance"),
    "04": ("CLIP\nguidance", 4, 2, "guidance"),
    "05": ("Classifier-\nfree guidance", 3, 1, "guidance"),
    "06": ("VAE", 2, 0, "a smaller space"),
    "07": ("Latent\ndiffusion", 4, 0, "a smaller space"),
    "08": ("Visual prompt\ntuning", 3, 3, "adapting a frozen model"),
    "09": ("The slides,\nchecked", 5, 1.5, "all of it together"),
}
ARROWS = "00-01 01-02 02-03 03-04 03-05 02-06 06-07 04-07 05-07 02-08 04-09 07-09 08-09"
TOPICS = dict.fromkeys(topic for *_, topic in CHAPTERS.values())
COLOURS = dict(zip(TOPICS, PALETTE.values(), strict=False))

CHECKPOINT = "ddpm_shapes32"
NUM_STEPS = 50
SHOWN_STEPS = (0, 17, 27, 36, 43)  # of NUM_STEPS, beside the end
NUM_IMAGES = 4


def chapters_here() -> str:
    """The numbers of the chapters that exist."""
    return " ".join(source.stem[:2] for source in notebook_sources(ROOT))


def checkpoint_here() -> str:
    """The hash of the checkpoint that exists."""
    return load_card(CHECKPOINT)["sha256"]


def draw_map() -> Figure:
    """The chapters as boxes, filled where they exist, with an arrow from what each builds on."""
    figure, axis = plt.subplots(figsize=(11, 4.8), layout="constrained")
    boxes = {number: _draw_chapter(axis, number) for number in CHAPTERS}
    for start, end in (arrow.split("-") for arrow in ARROWS.split()):
        (x_1, y_1), (x_2, y_2) = (CHAPTERS[number][1:3] for number in (start, end))
        style = {"arrowstyle": "-|>", "color": "dimgrey", "linewidth": 1.4, "mutation_scale": 16}
        style |= {"patchA": boxes[start], "patchB": boxes[end], "shrinkA": 1, "shrinkB": 1}
        axis.annotate("", (x_2, y_1 if end == "09" else y_2), (x_1, y_1), arrowprops=style)
    topics = [Patch(facecolor=to_rgba(c, 0.3), edgecolor=c, label=topic) for topic, c in COLOURS.items()]
    axis.legend(handles=topics, loc="lower left", fontsize=12.5, labelspacing=0.35)
    axis.set(xlim=(-0.45, 5.45), ylim=(-0.42, 3.42))
    axis.axis("off")
    return figure


def _draw_chapter(axis: plt.Axes, number: str) -> FancyBboxPatch:
    title, column, row, topic = CHAPTERS[number]
    width, height = 0.76, 3.66 if number == "09" else 0.66  # the last box takes arrows from every row
    corner = (column - width / 2, row - height / 2)
    box = FancyBboxPatch(corner, width, height, "round,pad=0.03", edgecolor=COLOURS[topic], linewidth=1.8)
    if number in chapters_here().split():
        box.set_facecolor(to_rgba(COLOURS[topic], alpha=0.3))
    else:
        box.set(facecolor="white", linestyle="--")
    axis.text(column, row, f"$\\bf{{{number}}}$\n{title}", ha="center", va="center", fontsize=12.5)
    return axis.add_patch(box)


def draw_denoising() -> Figure:
    """Points of a mixture under the exact denoiser, and images under the trained one, from noise to data."""
    diffusion = Diffusion(cosine_betas(1000)).respace(NUM_STEPS)
    mixture = GaussianMixture(  # that of chapter 01
        weights=[0.5, 0.3, 0.2], means=[[-0.55, -0.35], [0.6, -0.3], [0.05, 0.6]], stds=[0.12, 0.10, 0.16]
    )
    points = _path(diffusion, exact_denoiser(mixture, diffusion), (1500, 2), torch.float64)
    component = mixture.responsibilities(points[-1]).argmax(dim=1)  # where each point ends

    image_diffusion = recipes.load_diffusion(CHECKPOINT).respace(NUM_STEPS)
    recipe = recipes.load_recipe(CHECKPOINT)
    shape = (NUM_IMAGES, recipe.channels, recipe.image_size, recipe.image_size)
    images = _path(image_diffusion, recipes.load_model(CHECKPOINT), shape, torch.float32)

    columns = len(points)
    figure, axes = plt.subplots(2, columns, figsize=(1.65 * columns, 3.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    steps = [diffusion.steps[NUM_STEPS - 1 - index].item() for index in SHOWN_STEPS]
    titles = [f"paper t = {step + 1}\ncode t = {step}" for step in steps] + ["paper t = 0\nno noise"]
    colours = [list(PALETTE.values())[k] for k in component]
    for column in range(columns):
        above, below = axes[:, column]
        above.scatter(*points[column].T, s=1.5, c=colours, linewidths=0)
        above.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
        above.set_axis_off()
        above.set_title(titles[column], fontsize=12)
        grid = make_grid(images[column], nrow=2, padding=1, pad_value=1, normalize=True, value_range=(-1, 1))
        below.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        below.set_axis_off()
    return figure


def _path(diffusion: Diffusion, denoiser, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """x_t at SHOWN_STEPS of a DDIM run, and its x_0."""
    states = []

    def step(diffusion, denoiser, x_t, t, noise):
        states.append(x_t)
        return ddim_step(diffusion, denoiser, x_t, t, noise)

    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x_0 = sample(diffusion, denoiser, shape, step, x_T=x_T, progress=False)
    return [states[index] for index in SHOWN_STEPS] + [x_0]


PICTURES = {"map": (draw_map, chapters_here), "denoising": (draw_denoising, checkpoint_here)}


def save(figure: Figure, file: Path, drawn_from: str) -> None:
    """Write a figure with 256 colours, a third of the bytes, and a note that tells when it is out of date."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=90)
    notes = PngInfo()
    notes.add_text("drawn from", drawn_from)
    Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True, pnginfo=notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=PICTURES, help="which; none means all")
    chosen = parser.parse_args().name
    matplotlib.use("agg")
    use_style()
    for name in [chosen] if chosen else PICTURES:
        file = ROOT / "docs" / f"{name}.png"
        draw, source = PICTURES[name]
        save(draw(), file, source())
        print(f"wrote docs/{file.name}, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
