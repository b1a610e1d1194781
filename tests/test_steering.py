"""Ways of steering: one record is all that the command line needs to know of one."""

from enum import StrEnum
from types import SimpleNamespace

import pytest
import torch

from lecture26.__main__ import Guidance
from lecture26.commands import steering
from lecture26.commands.drawing import Drawing
from lecture26.commands.steering import OPTIONS, STEERINGS, Steering, choose, takers_of
from lecture26.ddpm import Diffusion, ddim_step, linear_betas
from lecture26.recipes.recipe import FAMILIES


class Magic(Steering):
    """A way that does not exist."""

    name = "magic"
    asks, strength, default = "--prompt", "--w", 3.0
    told = "by magic at w ="
    family = "enchanted"
    need = "--guidance magic needs an enchanted model; {model} is none"
    offer = "{model} is enchanted: it draws with --guidance magic"


@pytest.fixture
def magic(monkeypatch):
    way = Magic()
    monkeypatch.setattr(steering, "STEERINGS", (*STEERINGS, way))
    return way


def checkpoint(family):
    return SimpleNamespace(name="some_model", recipe=SimpleNamespace(family=family))


def refusal(guidance, *given, model="some_model"):
    with pytest.raises(ValueError) as refused:
        choose(guidance, given).check_options(given, model, "ddim", 0.0)
    return str(refused.value)


def test_the_options_of_guidance_are_the_names_of_the_ways():
    assert issubclass(Guidance, StrEnum)
    assert {choice.value for choice in Guidance} == {way.name for way in STEERINGS} - {None}


@pytest.mark.parametrize("way", STEERINGS, ids=lambda way: type(way).__name__)
def test_each_way_is_chosen_by_its_own_options_and_takes_them(way):
    given = [option for option in OPTIONS if way.takes(option)]
    assert choose(way.name, given) is way
    way.check_options(given, "some_model", "ddim", 0.0)
    assert way.default is None if way.strength is None else way.default > 0


def test_a_new_way_is_known_everywhere(magic):
    assert choose("magic", ["--prompt"]) is magic
    assert takers_of("--prompt") == "clip or magic"
    assert refusal("magic") == "--guidance magic needs --prompt; it is missing"
    assert refusal("magic", "--prompt", "--scale") == (
        "--guidance magic takes --w and not --scale: --scale is for --guidance classifier or clip"
    )
    assert refusal(None, "--w") == (
        "--w is for --prompt or --guidance cfg or --guidance magic; all are missing"
    )
    assert refusal("clip", "--prompt", "--w").endswith(": --w is for --guidance cfg or magic")
    assert refusal("magic", "--prompt", model=None).startswith("--model is missing")


def test_a_model_that_draws_in_one_way_alone_says_so_to_all_others(magic):
    magic.check_model(checkpoint("enchanted"))
    for way in STEERINGS:
        with pytest.raises(ValueError, match="'some_model' is enchanted: it draws with --guidance magic"):
            way.check_model(checkpoint("enchanted"))
    with pytest.raises(ValueError, match="needs an enchanted model; 'some_model' is none"):
        magic.check_model(checkpoint("ddpm"))


def test_the_families_that_ways_name_exist():
    assert {way.family for way in STEERINGS} - {None} <= FAMILIES.keys()
    for way in STEERINGS:
        told = way.said(SimpleNamespace(asked="a star", strength=2.5))
        assert told == "" or told == f", a star {way.told} 2.5"


def test_a_count_that_no_memory_holds_is_refused_before_its_generators_are_made(monkeypatch):
    drawing = Drawing(
        trained=None,
        asked=None,
        strength=None,
        count=10**11,
        steps=2,
        step=ddim_step,
        seed=0,
        device=torch.device("cpu"),
    )
    diffusion = Diffusion(linear_betas(30))
    monkeypatch.setattr(torch, "arange", lambda count: pytest.fail("the memory was not asked for"))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        drawing.sample(diffusion, lambda x_t, t: x_t, (3, 32, 32))
