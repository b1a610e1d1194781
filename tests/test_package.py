"""The house: who may import whom, what an import costs, and the names that users rely on."""

import ast
import inspect
import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lecture26"
HEAVY = ("IPython", "accelerate", "diffusers", "matplotlib", "sklearn", "timm", "torchmetrics", "torchvision")
# Each room may import what comes before it, and itself.
ROOMS = ("kit", "chapters", "recipes", "studies", "commands", "__main__")
OUTSIDE = ("benchmarks", "tests", "tools", *(file.stem for file in (ROOT / "tools").glob("*.py")))

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
NOTEBOOKS = {file.stem: file for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))}
CHAPTERS = [name[3:] for name in NOTEBOOKS if (PACKAGE / f"{name[3:]}.py").exists()]  # in the course's order


def imports(source, module="", is_package=False):
    """The modules that Python source imports anywhere; `module`: its own name, for relative imports."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from lecture26 import ddpm` imports lecture26.ddpm
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def imports_at_start(source):
    """The modules that source imports as soon as it is imported itself, by their first names."""
    found = set()

    def collect(nodes):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                collect(node.orelse)
            elif isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
            else:
                collect(ast.iter_child_nodes(node))

    collect(ast.parse(source).body)
    return found


def allowed(module):
    """What a module of the package may import of the package, as the beginnings of names."""
    part = module.split(".")[1] if "." in module else ""
    if part in CHAPTERS:
        return ["lecture26.kit", *(f"lecture26.{name}" for name in CHAPTERS[: CHAPTERS.index(part)])]
    if part == "checks":
        return ["lecture26.kit", *(f"lecture26.{name}" for name in CHAPTERS), "lecture26.checks"]
    rooms = ROOMS[: ROOMS.index(part) + 1] if part in ROOMS else ()
    return [f"lecture26.{name}" for room in rooms for name in (CHAPTERS if room == "chapters" else [room])]


def graph():
    """The modules of the package that each of its modules imports, anywhere, functions' bodies included.

    A room's own module comes after all the others of that room, whether it imports them or not.
    """
    edges = {}
    for module, file in FILES.items():
        is_package = file.name == "__init__.py"
        found = imports(file.read_text(encoding="utf-8"), module, is_package) & FILES.keys()
        if is_package and "." in module:
            found |= {name for name in FILES if name.startswith(f"{module}.")}
        edges[module] = found - {module, "lecture26"}
    return edges


def cycle(edges):
    """The modules of one circle of imports, each of which imports the next; empty if there is none."""
    finished = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(edges[module]):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(edges))), [])


def is_part_of(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    file = FILES[module]
    found = imports(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    own = {name for name in found if is_part_of(name, ["lecture26"])} - {"lecture26"}
    assert [name for name in sorted(own) if not is_part_of(name, allowed(module))] == []
    assert [name for name in sorted(found) if is_part_of(name, OUTSIDE)] == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(graph()) == []


def test_the_search_for_circles():
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_graph_sees_what_functions_import():
    edges = graph()
    assert "lecture26.commands.train" in edges["lecture26.__main__"]  # which imports it when it is called
    assert "lecture26.recipes.ddpm" in edges["lecture26.recipes"]  # which imports whatever lies there


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebooks_import_nothing_from_later_chapters_or_from_outside(notebook):
    found = imports(NOTEBOOKS[notebook].read_text(encoding="utf-8"))
    is_map = notebook.startswith("00")  # of the course: it shows what comes
    later = [] if is_map else [f"lecture26.{name[3:]}" for name in NOTEBOOKS if name > notebook]
    assert [name for name in sorted(found) if is_part_of(name, [*later, *OUTSIDE])] == []


@pytest.mark.parametrize("module", FILES)
def test_no_module_begins_by_importing_a_heavy_library(module):
    assert imports_at_start(FILES[module].read_text(encoding="utf-8")).isdisjoint(HEAVY)


def test_every_module_is_a_chapter_or_known_part():
    """The rules above are about these; a module that is none of them would go unchecked."""
    parts = {name.split(".")[1] for name in FILES if "." in name}
    assert parts == {*CHAPTERS, *ROOMS, "checks"} - {"chapters"}


def test_the_reading_of_imports():
    source = """
import a.b, c
from typing import TYPE_CHECKING
from . import d
from .e import f
from ..g import h
if TYPE_CHECKING:
    import heavy_for_types
else:
    import light
def function():
    import heavy_for_function
class Class:
    import of_class
"""
    everything = imports(source, "lecture26.kit.module")
    assert {
        "a.b",
        "c",
        "lecture26.kit.d",
        "lecture26.kit.e",
        "lecture26.g.h",
        "heavy_for_function",
    } <= everything
    assert "lecture26.checks.d" in imports(source, "lecture26.checks", is_package=True)
    assert imports_at_start(source) == {"a", "c", "typing", "light", "of_class"}


@pytest.mark.slow
def test_importing_everything_is_light_and_leaves_no_trace():
    modules = [name for name in FILES if name != "lecture26.__main__"]
    program = f"""
import sys, torch
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
import {", ".join(modules)}
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
assert before[0].equal(after[0]) and before[1:] == after[1:]
assert not [name for name in {HEAVY} if name in sys.modules], sorted(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


SIGNATURES = {
    "classifier_free_guidance.drop_labels": "y, null_label, p, generator=None",
    "classifier_free_guidance.cfg_combine": "eps_cond, eps_uncond, w",
    "classifier_free_guidance.classifier_free_guided": "denoiser, cond, null_cond, w, rescale=0.0, "
    "interval=None",
    "ddpm.linear_betas": "num_steps",
    "ddpm.cosine_betas": "num_steps",
    "ddpm.Diffusion": "betas, prediction='eps', variance='fixed_small', clip=False",
    "ddpm.Diffusion.q_sample": "self, x_0, t, noise",
    "ddpm.Diffusion.q_posterior": "self, x_0, x_t, t",
    "ddpm.Diffusion.x_0_from_eps": "self, x_t, t, eps",
    "ddpm.Diffusion.eps_from_x_0": "self, x_t, t, x_0",
    "ddpm.Diffusion.x_0_from_v": "self, x_t, t, v",
    "ddpm.Diffusion.eps_from_v": "self, x_t, t, v",
    "ddpm.Diffusion.v_from_eps": "self, x_t, t, eps",
    "ddpm.Diffusion.p_mean_variance": "self, denoiser, x_t, t",
    "ddpm.Diffusion.add_score": "self, output, x_t, t, gradient",
    "ddpm.Diffusion.loss": "self, denoiser, x_0, t, noise",
    "ddpm.Diffusion.respace": "self, num_steps",
    "ddpm.Posterior": "mean, variance, log_variance",
    "ddpm.PMeanVariance": "mean, variance, log_variance, x_0, eps",
    "ddpm.ddpm_step": "diffusion, denoiser, x_t, t, noise, mean_shift=None",
    "ddpm.ddim_step": "diffusion, denoiser, x_t, t, noise, eta=0.0",
    "ddpm.sample": "diffusion, denoiser, shape, step=ddpm_step, generator=None, x_T=None, progress=True, "
    "device=None, start=None",
    "ddpm.Diffusion.at": "self, t, x",
    "unet.UNet": "in_channels, base_channels=64, channel_multipliers=(1, 2, 2), num_blocks=2, "
    "attention_levels=None, patch_size=1, out_channels=None, num_classes=None, attention=SelfAttention",
    "unet.UNet.forward": "self, x_t, t, cond=None",
    "unet.EMA": "model, decay=0.999",
    "unet.EMA.update": "self, model",
    "clip_guidance.CLIP.encode_image": "self, x, t=None",
    "clip_guidance.CLIP.encode_text": "self, tokens",
    "clip_guidance.info_nce": "image_features, text_features, logit_scale",
    "clip_guidance.clip_guided": "denoiser, clip, text_features, scale, diffusion, through='x_t'",
    "visual_prompt_tuning.VPT": "vit, num_classes, num_prompts, deep=False, prompt_dropout=0.0",
    "visual_prompt_tuning.VPT.task_state_dict": "self",
    "visual_prompt_tuning.VPT.load_task_state_dict": "self, state",
    "visual_prompt_tuning.linear_probe": "vit, num_classes",
    "visual_prompt_tuning.full_fine_tune": "vit, num_classes",
    "visual_prompt_tuning.trainable_parameters": "model",
    "visual_prompt_tuning.PromptBank": "vit",
    "visual_prompt_tuning.PromptBank.add": "self, name, task",
    "visual_prompt_tuning.PromptBank.forward": "self, x, names",
    "vae.KLVAE": "in_channels=3, latent_channels=4, base_channels=32, channel_multipliers=(1, 2), "
    "num_blocks=2, patch_size=2",
    "vae.KLVAE.encode": "self, x",
    "vae.KLVAE.decode": "self, z",
    "vae.KLVAE.forward": "self, x, noise",
    "vae.reparameterize": "mean, log_variance, noise",
    "vae.kl_to_standard_normal": "mean, log_variance",
    "vae.vae_loss": "x, x_hat, mean, log_variance, kl_weight",
    "vae.latent_scale": "latents",
    "latent_diffusion.CrossAttention": "query_dim, context_dim, heads, head_dim",
    "latent_diffusion.CrossAttention.forward": "self, x, context, mask=None",
    "latent_diffusion.LatentDiffusion": "vae, denoiser, diffusion, latent_scale, text_encoder, image_size=64",
    "latent_diffusion.LatentDiffusion.text_to_image": "self, prompts, w=2.0, steps=50, generator=None, "
    "negative_prompt='', progress=True",
    "latent_diffusion.LatentDiffusion.forward": "self, prompts, steps=50, w=2.0, negative_prompt='', "
    "generator=None, output='pil'",
    "latent_diffusion.LatentDiffusion.save": "self, folder",
    "latent_diffusion.LatentDiffusion.load": "folder",
    "checks.check": "exercise, candidate",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_arguments_that_users_rely_on(name):
    module, *path = name.split(".")
    found = reduce(getattr, path, import_module(f"lecture26.{module}"))
    arguments = [
        argument.name
        if argument.default is argument.empty
        else f"{argument.name}={getattr(argument.default, '__name__', repr(argument.default))}"
        for argument in inspect.signature(found).parameters.values()
    ]
    assert ", ".join(arguments) == SIGNATURES[name]
