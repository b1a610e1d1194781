"""Exercises of chapter 08: patches, prompts (in, through the blocks, looked at), freezing, LoRA, heads."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lecture26 import visual_prompt_tuning

from ..callables import CallableArgument
from ..core import Case, Exercise, Misconception
from ..draws import Draws, cast
from ..mistakes import patch_grid
from ..optimizers import ParametersArgument


def _patches_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, channels, p = draws.integer(2, 3), draws.integer(2, 4), draws.integer(2, 3)
    rows, columns, side = draws.integer(2, 3), draws.integer(4, 5), draws.integer(2, 3)

    def case(note, batch, channels, rows, columns, p, **kind):
        return Case(note, (draws.normal(batch, channels, rows * p, columns * p, **kind), p))

    return [
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side * side, side * side, side, side, side),
        case("wide pictures", batch, channels, rows, columns, p),
        case("tall pictures", batch, channels, columns, rows, p),
        case("a single picture", 1, 3, rows, rows, 4),
        case("one channel", batch, 1, rows, columns, p),
        case("each pixel a patch", batch, channels, rows, columns, 1),
        case("the whole picture one patch", batch, channels, 1, 1, 5),
        case("float32", batch, channels, rows, columns, p, dtype=torch.float32),
        case("with gradient", batch, channels, rows, rows, p, gradient=True),
    ]


def _ordered(*order: int):
    """The six axes of patch_grid in another order; the first three of them count the tokens."""
    return lambda x, p: patch_grid(x, p).permute(*order).flatten(3).flatten(1, 2)


def _square_grid(x: Tensor, p: int) -> Tensor:
    batch, channels, height, _ = x.shape
    grid = x.reshape(batch, channels, height // p, p, height // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _overlapping(x: Tensor, p: int) -> Tensor:
    windows = x.unfold(2, p, 1).unfold(3, p, 1)  # (B, C, H - p + 1, W - p + 1, p, p)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


PATCHES = Exercise(
    "visual_prompt_tuning.patches",
    '"A picture as a sequence", equation (8.1)',
    visual_prompt_tuning.patches,
    _patches_cases,
    (
        Misconception(
            "reshaped as it lies in memory",
            lambda x, p: x.reshape(len(x), -1, x.shape[1] * p * p),
            "A reshape takes pixels as they lie in memory, row after row of one channel. A patch is a square "
            "of all channels: split the axes, move them, then flatten.",
        ),
        Misconception(
            "tokens from top to bottom first",
            _ordered(0, 4, 2, 1, 3, 5),
            "The tokens run along the columns here. They are read like text: left to right, then down.",
        ),
        Misconception(
            "channels last within a patch",
            _ordered(0, 2, 4, 3, 5, 1),
            "Within a patch the channel comes first, then row and column, as in a convolution's weight.",
        ),
        Misconception(
            "columns before rows within a patch",
            _ordered(0, 2, 4, 1, 5, 3),
            "Each patch is transposed: within a channel, the rows come first.",
        ),
        Misconception(
            "channels and rows swapped within a patch",
            _ordered(0, 2, 4, 3, 1, 5),
            "Within a patch the channel comes first, then the row; here they have changed places.",
        ),
        Misconception(
            "pixels that lie far apart",
            lambda x, p: (
                x.reshape(*x.shape[:2], p, x.shape[2] // p, p, x.shape[3] // p)
                .permute(0, 3, 5, 1, 2, 4)
                .flatten(3)
                .flatten(1, 2)
            ),
            "An axis of H pixels splits into (H / p, p): the patch first, then the pixel inside. The other "
            "way round a token gathers pixels from all over the picture.",
        ),
        Misconception(
            "tokens and values swapped",
            lambda x, p: visual_prompt_tuning.patches(x, p).mT,
            "The tokens are the second axis, the values of each the last one.",
        ),
        Misconception(
            "overlapping patches",
            _overlapping,
            "The window moves on by one pixel here; patches do not overlap, so it moves by patch_size.",
        ),
        Misconception(
            "a grid of patches",
            lambda x, p: visual_prompt_tuning.patches(x, p).unflatten(1, (x.shape[2] // p, x.shape[3] // p)),
            "A transformer takes a sequence: make one axis of the patches' rows and columns.",
        ),
        Misconception(
            "patches not flattened",
            lambda x, p: visual_prompt_tuning.patches(x, p).unflatten(2, (x.shape[1], p, p)),
            "A token is a vector: flatten channel, row and column.",
        ),
        Misconception(
            "the mean of each patch",
            lambda x, p: visual_prompt_tuning.patches(x, p).unflatten(2, (x.shape[1], -1)).mean(-1),
            "This keeps one colour for each patch: all its pixels belong to the token.",
        ),
        Misconception(
            "every channel's patches for themselves",
            lambda x, p: patch_grid(x, p).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(1, 3),
            "A token holds all channels of its patch; here each channel makes tokens of its own.",
        ),
        Misconception(
            "the channels of a patch averaged",
            lambda x, p: visual_prompt_tuning.patches(x, p).unflatten(2, (x.shape[1], -1)).mean(2),
            "This makes the picture grey: every channel of a patch belongs to the token.",
        ),
        Misconception(
            "square pictures only",
            _square_grid,
            "The height is used for the width, too: the picture may be oblong.",
        ),
        Misconception(
            "the first patch alone",
            lambda x, p: visual_prompt_tuning.patches(x, p)[:, :1],
            "All patches of the picture are wanted, not the first one alone.",
        ),
    ),
)


def _prompt_case(draws: Draws, note, batch, count, n, d, num_prefix, each=False, **kind) -> Case:
    """Tokens (batch, count, d) and n prompts: the same for all images, or `each` with its own."""
    lead = (batch,) if each else ()
    return Case(note, (draws.normal(batch, count, d, **kind), draws.normal(*lead, n, d, **kind), num_prefix))


def _insert_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, count, n, d = draws.integer(3, 4), draws.integer(7, 8), draws.integer(1, 2), draws.integer(5, 6)
    side = draws.integer(3, 4)
    case = partial(_prompt_case, draws)

    return [
        case("all axes of one length", side, side, side, side, 1),
        case("the same prompts for all", batch, count, n + 1, d, 1),
        case("prompts of each sample's own", batch, count, n + 1, d, 1, each=True),
        case("a class token and two registers", batch, count, n + 2, d, 3),
        case("no class token", batch, count, n + 1, d, 0),
        case("as many prompts as samples", batch, count, batch, d, 2),
        case("a single prompt", batch, count, 1, d, 1),
        case("a batch of one", 1, count, n + 1, d, 1),
        case("no prompts", batch, count, 0, d, 1),
        case("float32", batch, count, n + 1, d, 2, dtype=torch.float32),
        case("with gradient", batch, count, n + 1, d, 1, gradient=True),
        case("with gradient, prompts of each sample's own", 2, count, n, d, 2, each=True, gradient=True),
    ]


def _for_each(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Prompts (n, d) or (B, n, d) as (B, n, d)."""
    return prompts.expand(len(tokens), *prompts.shape[-2:])


def _joined(place):
    """Prompts between the tokens before a place and those behind it; place(num_prefix, N, n)."""

    def put(tokens, prompts, num_prefix):
        i = place(num_prefix, tokens.shape[1], prompts.shape[-2])
        return torch.cat([tokens[:, :i], _for_each(prompts, tokens), tokens[:, i:]], dim=1)

    return put


def _first_of(prompts: Tensor) -> Tensor:
    return prompts if prompts.ndim == 2 else prompts[0]


def _added(tokens: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    tokens, n = tokens.clone(), prompts.shape[-2]
    tokens[:, num_prefix : num_prefix + n] += prompts[..., : tokens.shape[1] - num_prefix, :]
    return tokens


def _overwritten(tokens: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    tokens, n = tokens.clone(), prompts.shape[-2]
    tokens[:, num_prefix : num_prefix + n] = prompts[..., : tokens.shape[1] - num_prefix, :]
    return tokens


INSERT_PROMPTS = Exercise(
    "visual_prompt_tuning.insert_prompts",
    '"Prompts", equation (8.7)',
    visual_prompt_tuning.insert_prompts,
    _insert_cases,
    (
        Misconception(
            "before the class token",
            _joined(lambda prefix, count, n: 0),
            "Attention would not mind, but the head reads token 0 and would find a prompt there: they come "
            "behind the first num_prefix tokens.",
        ),
        Misconception(
            "at the end",
            _joined(lambda prefix, count, n: count),
            "Attention would not mind, but the prompts have their place behind the first num_prefix tokens, "
            "where the next block looks for them.",
        ),
        Misconception(
            "always behind the first token",
            _joined(lambda prefix, count, n: 1),
            "A backbone may have registers behind its class token, or no class token at all: num_prefix says "
            "how many tokens stay in front.",
        ),
        Misconception(
            "one place too early",
            _joined(lambda prefix, count, n: max(prefix - 1, 0)),
            "num_prefix tokens stay in front; here it is one less.",
        ),
        Misconception(
            "one place too late",
            _joined(lambda prefix, count, n: prefix + 1),
            "num_prefix tokens stay in front; here it is one more.",
        ),
        Misconception(
            "num_prefix counted from the end",
            _joined(lambda prefix, count, n: count - prefix),
            "The tokens that stay in front are the first ones, not the last ones.",
        ),
        Misconception(
            "the class token lost",
            lambda tokens, prompts, num_prefix: torch.cat(
                [_for_each(prompts, tokens), tokens[:, num_prefix:]], dim=1
            ),
            "The first num_prefix tokens are gone: they stay in front of the prompts.",
        ),
        Misconception(
            "the class token twice",
            lambda tokens, prompts, num_prefix: torch.cat(
                [tokens[:, :num_prefix], _for_each(prompts, tokens), tokens], dim=1
            ),
            "The first num_prefix tokens stand there twice: behind the prompts, only the others follow.",
        ),
        Misconception(
            "added to the patches",
            _added,
            "Prompts are tokens of their own: N tokens and n prompts make N + n.",
        ),
        Misconception(
            "written over patches",
            _overwritten,
            "The picture's first patches are lost: prompts are put between, so that N + n tokens result.",
        ),
        Misconception(
            "one prompt for each sample",
            lambda tokens, prompts, num_prefix: (
                torch.cat([tokens[:, :num_prefix], prompts[:, None], tokens[:, num_prefix:]], dim=1)
                if prompts.ndim == 2
                else visual_prompt_tuning.insert_prompts(tokens, prompts, num_prefix)
            ),
            "The prompts' first axis is taken for the batch. All of them go to every sample.",
        ),
        Misconception(
            "first sample's prompts for all",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.insert_prompts(
                tokens, _first_of(prompts), num_prefix
            ),
            "Prompts (B, n, d) belong to one sample each; here all get the first one's.",
        ),
        Misconception(
            "one prompt alone",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.insert_prompts(
                tokens, prompts[..., :1, :], num_prefix
            ),
            "There are n prompts, and all go in; here it is the first one alone.",
        ),
        Misconception(
            "prompts detached",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.insert_prompts(
                tokens, prompts.detach(), num_prefix
            ),
            "The prompts are what is trained: a gradient has to reach them.",
        ),
        Misconception(
            "everything detached",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.insert_prompts(
                tokens.detach(), prompts.detach(), num_prefix
            ),
            "Frozen means that weights do not change: the gradient still has to pass, to the prompts and "
            "through the tokens.",
        ),
    ),
)


def _blocks_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, count, n, d = draws.integer(3, 4), draws.integer(7, 8), draws.integer(2, 3), draws.integer(5, 6)

    def case(note, depth, sets, batch, n, num_prefix, each=False, **kind):
        numbers = {"dtype": kind.get("dtype", torch.float64)}
        blocks = tuple(
            CallableArgument("token_block", (draws.normal(d, d, **numbers),)) for _ in range(depth)
        )
        lead = (sets, batch) if each else (sets,)
        tokens, prompts = draws.normal(batch, count, d, **kind), draws.normal(*lead, n, d, **kind)
        return Case(note, (blocks, tokens, prompts, num_prefix))

    return [
        case("deep, four blocks", 4, 4, batch, n, 1),
        case("shallow, three blocks", 3, 1, batch, n, 1),
        case("deep, prompts of each image's own", 3, 3, batch, n, 1, each=True),
        case("shallow, prompts of each image's own", 3, 1, batch, n, 1, each=True),
        case("deep, a class token and two registers", 3, 3, batch, n, 3),
        case("deep, no class token", 3, 3, batch, n, 0),
        case("deep, two blocks", 2, 2, batch, n, 1),
        case("a single block", 1, 1, batch, n, 2),
        case("as many blocks as images", batch, batch, batch, n, 1),
        case("a batch of one, a single prompt", 3, 3, 1, 1, 1),
        case("no prompts", 3, 3, batch, 0, 1),
        case("float32, deep", 3, 3, batch, n, 2, dtype=torch.float32),
        case("deep, with gradient", 3, 3, batch, n, 1, gradient=True),
        case("shallow, with gradient", 3, 1, batch, n, 1, gradient=True),
    ]


def _through(
    change: Callable = visual_prompt_tuning.replace_prompts,
    choose: Callable = lambda prompts, number: prompts[number] if 0 < number < len(prompts) else None,
    first: Callable = lambda tokens, prompts, prefix: visual_prompt_tuning.insert_prompts(
        tokens, prompts[0], prefix
    ),
    order: Callable = list,
    last: Callable = lambda tokens, prompts, prefix: tokens,
) -> Callable:
    """The way through the blocks with one part exchanged; choose(prompts, number) -> a set, or None."""

    def forward(blocks, tokens, prompts, num_prefix):
        tokens = first(tokens, prompts, num_prefix)
        for number, block in enumerate(order(blocks)):
            fresh = choose(prompts, number)
            tokens = block(tokens if fresh is None else change(tokens, fresh, num_prefix))
        return last(tokens, prompts, num_prefix)

    return forward


def _at(prefix_of: Callable) -> Callable:
    """The right way, with the prompts at another place; prefix_of(num_prefix)."""
    return lambda blocks, tokens, prompts, num_prefix: visual_prompt_tuning.prompted_blocks(
        blocks, tokens, prompts, prefix_of(num_prefix)
    )


def _with_prompts(change: Callable) -> Callable:
    """The right way with other prompts; change(prompts)."""
    return lambda blocks, tokens, prompts, num_prefix: visual_prompt_tuning.prompted_blocks(
        blocks, tokens, change(prompts), num_prefix
    )


def _replaced_behind(blocks, tokens, prompts, num_prefix):
    tokens = visual_prompt_tuning.insert_prompts(tokens, prompts[0], num_prefix)
    for number, block in enumerate(blocks):
        tokens = block(tokens)
        if number < len(prompts):
            tokens = visual_prompt_tuning.replace_prompts(tokens, prompts[number], num_prefix)
    return tokens


def _blocks_without_gradient(blocks, tokens, prompts, num_prefix):
    with torch.no_grad():
        return visual_prompt_tuning.prompted_blocks(blocks, tokens, prompts, num_prefix)


def _without_old(tokens: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    return torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + prompts.shape[-2] :]], dim=1)


PROMPTED_BLOCKS = Exercise(
    "visual_prompt_tuning.prompted_blocks",
    '"Prompts", equations (8.7) and (8.8)',
    visual_prompt_tuning.prompted_blocks,
    _blocks_cases,
    (
        Misconception(
            "accumulated",
            _through(visual_prompt_tuning.insert_prompts),
            "The old prompts are still there, and each block sees n tokens more: the new ones take their "
            "places.",
        ),
        Misconception(
            "added",
            _through(_added),
            "The new prompts are added to what came out of the block before: they replace it.",
        ),
        Misconception(
            "never replaced",
            _through(choose=lambda prompts, number: None),
            "Only the first set is used: with as many sets as blocks, each block has its own.",
        ),
        Misconception(
            "the first set for every block",
            _through(choose=lambda prompts, number: prompts[0] if 0 < number < len(prompts) else None),
            "All blocks get the first set of prompts: each has its own.",
        ),
        Misconception(
            "one block late",
            _through(
                choose=lambda prompts, number: prompts[number - 1] if 0 < number < len(prompts) else None
            ),
            "The sets are one block late: the second block already gets the second set.",
        ),
        Misconception(
            "sets in reverse",
            _with_prompts(lambda prompts: prompts.flip(0)),
            "The first block gets the first set, and so on up to the last.",
        ),
        Misconception(
            "shallow prompts put in at every block",
            _through(
                choose=lambda prompts, number: (
                    prompts[0] if len(prompts) == 1 else prompts[number] if number else None
                )
            ),
            "A single set is for the first block only: then it passes through the others like all tokens.",
        ),
        Misconception(
            "replaced behind the block",
            _replaced_behind,
            "A set goes in before its block, which is to see it; here it takes the place of what the block "
            "has made of it.",
        ),
        Misconception(
            "prompts taken out at the end",
            _through(last=lambda tokens, prompts, prefix: _without_old(tokens, prompts[0], prefix)),
            "What leaves the last block is asked for, prompts included: N + n tokens.",
        ),
        Misconception(
            "no prompts for the first block",
            lambda blocks, tokens, prompts, num_prefix: visual_prompt_tuning.prompted_blocks(
                blocks[1:], blocks[0](tokens), prompts[1:] if len(prompts) > 1 else prompts, num_prefix
            ),
            "The first block gets prompts, too: they go in before it.",
        ),
        Misconception(
            "the last block left out",
            _through(order=lambda blocks: blocks[:-1]),
            "All blocks are passed, the last one as well.",
        ),
        Misconception(
            "the first block alone",
            _through(order=lambda blocks: blocks[:1]),
            "It stops behind the first block: all of them are passed.",
        ),
        Misconception(
            "blocks in reverse",
            _through(order=lambda blocks: list(reversed(blocks))),
            "The blocks are passed in their order.",
        ),
        Misconception(
            "every block on the first tokens",
            lambda blocks, tokens, prompts, num_prefix: blocks[-1](
                visual_prompt_tuning.insert_prompts(tokens, prompts[-1], num_prefix)
            ),
            "What leaves one block goes into the next; here each begins with the tokens of the image again.",
        ),
        Misconception(
            "before the class token",
            _at(lambda prefix: 0),
            "Prompts stand behind the first num_prefix tokens, where the head does not read them.",
        ),
        Misconception(
            "always behind the first token",
            _at(lambda prefix: 1),
            "A backbone may have registers behind its class token, or no class token at all: num_prefix says "
            "how many tokens stay in front.",
        ),
        Misconception(
            "class token overwritten",
            _through(
                lambda tokens, prompts, prefix: torch.cat(
                    [_for_each(prompts, tokens), tokens[:, prompts.shape[-2] :]], dim=1
                )
            ),
            "The first num_prefix tokens stay when the prompts are replaced: these stand behind them.",
        ),
        Misconception(
            "first sample's prompts for all",
            _with_prompts(
                lambda prompts: prompts if prompts.ndim == 3 else prompts[:, :1].expand_as(prompts)
            ),
            "Prompts (L, B, n, d) belong to one sample each; here all get the first one's.",
        ),
        Misconception(
            "blocks in no_grad",
            _blocks_without_gradient,
            "Frozen means that weights do not change. The gradient still has to come back through the "
            "blocks, to the prompts that lie before them.",
        ),
        Misconception(
            "prompts detached",
            _with_prompts(torch.Tensor.detach),
            "The prompts are what is trained: a gradient has to reach them.",
        ),
    ),
)


_NAMES = (
    "prompts",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.qkv.down",
    "blocks.0.attn.qkv.up",
    "blocks.0.downscale.weight",
    "norm.bias",
    "bias_table",
    "old_head.bias",
    "head.weight",
    "head.bias",
)


def _freeze_cases(seed: int) -> list[Case]:
    draws = Draws(seed)

    def case(note, endings, names=_NAMES, dtype=torch.float64, asking=None, old=None):
        asking = tuple(bool(draws.integer(0, 1)) for _ in names) if asking is None else (asking,) * len(names)
        has_old = [bool(draws.integer(0, 2)) for _ in names] if old is None else [old] * len(names)
        values = tuple(draws.normal(draws.integer(2, 4), 3, dtype=dtype) for _ in names)
        gradients = tuple(
            draws.normal(*value.shape, dtype=dtype) if has else None
            for value, has in zip(values, has_old, strict=True)
        )
        return Case(note, (ParametersArgument(names, values, gradients, asking), endings))

    lora = (".down", ".up", "head.weight", "head.bias")
    return [
        case("LoRA, all asking and with old gradients", lora, asking=True, old=True),
        case("LoRA, all frozen, without gradients", lora, asking=False, old=False),
        case("LoRA", lora),
        case("biases and a head", (".bias", "head.weight")),
        case("nothing trains", (), asking=True),
        case("nothing trains, all frozen with old gradients", (), asking=False, old=True),
        case("everything trains", ("",)),
        case("one ending", ("head.bias",)),
        case("no name with that ending", (".gamma",)),
        case("two parameters", ("bias",), names=_NAMES[-2:]),
        case("float32", lora, dtype=torch.float32),
    ]


def _frozen(
    matches: Callable = lambda name, endings: name.endswith(endings),
    freeze: Callable = lambda parameter: _freeze(parameter),
    wake: Callable = lambda parameter: parameter.requires_grad_(True),
    returned: Callable = lambda trained, parameters: trained,
) -> Callable:
    """Freezing with one of its parts exchanged."""

    def decide(parameters, endings):
        trained = [parameter for name, parameter in parameters.items() if matches(name, endings)]
        for name, parameter in parameters.items():
            (wake if matches(name, endings) else freeze)(parameter)
        return returned(trained, parameters)

    return decide


def _freeze(parameter: Tensor) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None


def _freeze_with_zeros(parameter: Tensor) -> None:
    parameter.requires_grad_(False)
    parameter.grad = torch.zeros_like(parameter)


def _nothing(parameter: Tensor) -> None:
    """What some wrong answers do."""


FREEZE_ALL_BUT = Exercise(
    "visual_prompt_tuning.freeze_all_but",
    '"Frozen"',
    visual_prompt_tuning.freeze_all_but,
    _freeze_cases,
    (
        Misconception(
            "nothing frozen",
            _frozen(freeze=_nothing),
            "The others still ask for gradients: set their requires_grad to False.",
        ),
        Misconception(
            "nothing done but choosing",
            _frozen(freeze=_nothing, wake=_nothing),
            "The list is right, and requires_grad is what it was: it decides what trains.",
        ),
        Misconception(
            "what shall train not woken",
            _frozen(wake=_nothing),
            "What was frozen before stays frozen: what shall train has to be told to ask for gradients.",
        ),
        Misconception(
            "everything frozen",
            _frozen(wake=_freeze),
            "All parameters are frozen, those that shall train as well.",
        ),
        Misconception(
            "the wrong ones frozen",
            _frozen(matches=lambda name, endings: not name.endswith(endings)),
            "Those with the endings are to train, and the others to be frozen; here it is reversed.",
        ),
        Misconception(
            "a gradient of zero",
            _frozen(freeze=_freeze_with_zeros),
            "A gradient of zero is a gradient: AdamW lets the weight decay. Set .grad to None.",
        ),
        Misconception(
            "old gradients left",
            _frozen(freeze=lambda parameter: parameter.requires_grad_(False)),
            "An optimiser moves whatever has a .grad, also one that is left over: set it to None.",
        ),
        Misconception(
            "gradients removed, nothing frozen",
            _frozen(freeze=lambda parameter: setattr(parameter, "grad", None)),
            "The next backward pass fills .grad again: requires_grad has to be False as well.",
        ),
        Misconception(
            "anywhere in the name",
            _frozen(matches=lambda name, endings: any(ending in name for ending in endings)),
            "The texts are endings: a name that has one of them further to the front does not count.",
        ),
        Misconception(
            "beginnings",
            _frozen(matches=lambda name, endings: name.startswith(endings)),
            "The texts are endings of names, not beginnings.",
        ),
        Misconception(
            "the whole name",
            _frozen(matches=lambda name, endings: name in endings),
            "The texts are endings: a name may be longer.",
        ),
        Misconception(
            "the first ending alone",
            _frozen(matches=lambda name, endings: name.endswith(endings[:1])),
            "There are several endings, and each of them counts.",
        ),
        Misconception(
            "the head alone",
            _frozen(matches=lambda name, endings: name.startswith("head") and name.endswith(endings)),
            "What trains besides the head is missing.",
        ),
        Misconception(
            "all returned",
            _frozen(returned=lambda trained, parameters: list(parameters.values())),
            "Only those that train are returned: it is what an optimiser is to be given.",
        ),
        Misconception(
            "the frozen ones returned",
            _frozen(
                returned=lambda trained, parameters: [p for p in parameters.values() if not p.requires_grad]
            ),
            "Those that train are returned, not those that are frozen.",
        ),
        Misconception(
            "in reverse",
            _frozen(returned=lambda trained, parameters: trained[::-1]),
            "The parameters keep their order.",
        ),
    ),
)


def _lora_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, count, rank, d_in, d_out = (
        draws.integer(*ends) for ends in ((3, 4), (2, 5), (2, 3), (5, 6), (7, 8))
    )
    side = draws.integer(3, 4)

    def case(note, batch, count, rank, d_in, d_out, scale, each=False, **kind):
        lead = (batch,) if each else ()
        shapes = (batch, count, d_in), (d_out, d_in), (d_out,), (*lead, rank, d_in), (*lead, d_out, rank)
        return Case(note, (*(draws.normal(*shape, **kind) for shape in shapes), scale))

    return [
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", side, side, side, side, side, 0.5),
        case("the same matrices for all", batch, count, rank, d_in, d_out, 0.5),
        case("each image's own", batch, count, rank, d_in, d_out, 2.0, each=True),
        case("each image's own, all axes of one length", side, side, side, side, side, 0.5, each=True),
        case("rank 1", batch, count, 1, d_in, d_out, 3.0),
        case("a batch of one", 1, count, rank, d_out, d_in, 0.25, each=True),
        case("a single token", batch, 1, rank, d_in, d_out, 2.0),
        case("scale 0", batch, count, rank, d_in, d_out, 0.0),
        case("float32", batch, count, rank, d_in, d_out, 0.5, dtype=torch.float32),
        case("with gradient", batch, count, rank, d_in, d_out, 0.5, gradient=True),
        case(
            "with gradient, each image's own", batch, count, rank, d_in, d_out, 2.0, each=True, gradient=True
        ),
    ]


def _lora(change: Callable) -> Callable:
    """LoRA's layer with other arguments; change(x, weight, bias, down, up, scale) -> these six."""
    return lambda *arguments: visual_prompt_tuning.lora_linear(*change(*arguments))


def _low_rank(x: Tensor, down: Tensor, up: Tensor, between: Callable = lambda hidden: hidden) -> Tensor:
    return between(x @ down.mT) @ up.mT


LORA_LINEAR = Exercise(
    "visual_prompt_tuning.lora_linear",
    '"LoRA", equation (8.11)',
    visual_prompt_tuning.lora_linear,
    _lora_cases,
    (
        Misconception(
            "scale forgotten",
            _lora(lambda x, W, b, A, B, s: (x, W, b, A, B, 1.0)),
            "The change is multiplied by scale.",
        ),
        Misconception(
            "everything scaled",
            lambda x, W, b, A, B, s: s * (x @ W.mT + b + _low_rank(x, A, B)),
            "scale belongs to the change alone, not to W x + b.",
        ),
        Misconception(
            "scale squared",
            _lora(lambda x, W, b, A, B, s: (x, W, b, s * A, B, s)),
            "scale counts once, not for each of the two matrices.",
        ),
        Misconception(
            "divided by the rank",
            _lora(lambda x, W, b, A, B, s: (x, W, b, A, B, s / A.shape[-2])),
            "scale is s itself; alpha / r has been worked out already.",
        ),
        Misconception(
            "divided by scale",
            lambda x, W, b, A, B, s: x @ W.mT + b + _low_rank(x, A, B) / (s or 1.0),
            "The change is multiplied by scale, not divided.",
        ),
        Misconception(
            "change subtracted",
            _lora(lambda x, W, b, A, B, s: (x, W, b, A, B, -s)),
            "The change is added.",
        ),
        Misconception(
            "change forgotten",
            lambda x, W, b, A, B, s: x @ W.mT + b,
            "This is the frozen layer alone: the change of low rank comes beside it.",
        ),
        Misconception(
            "the change alone",
            lambda x, W, b, A, B, s: s * _low_rank(x, A, B),
            "This is the change alone: it comes beside the frozen layer W x + b.",
        ),
        Misconception(
            "bias forgotten",
            _lora(lambda x, W, b, A, B, s: (x, W, 0 * b, A, B, s)),
            "The frozen layer has a bias.",
        ),
        Misconception(
            "bias twice",
            _lora(lambda x, W, b, A, B, s: (x, W, 2 * b, A, B, s)),
            "The change has no bias: b is added once.",
        ),
        Misconception(
            "bias scaled",
            _lora(lambda x, W, b, A, B, s: (x, W, s * b, A, B, s)),
            "scale belongs to the change, not to the bias.",
        ),
        Misconception(
            "W x left out of the change's place",
            lambda x, W, b, A, B, s: x @ W.mT + b + s * x @ A.mT @ B.mT * (x @ W.mT),
            "The change is added to W x, and does not multiply it.",
        ),
        Misconception(
            "A and B exchanged",
            lambda x, W, b, A, B, s: x @ W.mT + b + s * (x @ B.mT) @ A.mT,
            "x goes through A first, which makes r numbers of d_in, and then through B.",
        ),
        Misconception(
            "A and B not transposed",
            lambda x, W, b, A, B, s: x @ W.mT + b + s * x @ A @ B,
            "Tokens are rows here: A x for each of them is x @ A.mT, as with W.",
        ),
        Misconception(
            "W not transposed",
            lambda x, W, b, A, B, s: x @ W + b + s * _low_rank(x, A, B),
            "Tokens are rows here: W x for each of them is x @ W.mT, as in nn.Linear.",
        ),
        Misconception(
            "an adapter",
            lambda x, W, b, A, B, s: x @ W.mT + b + s * _low_rank(x, A, B, torch.relu),
            "Between A and B stands nothing: with a nonlinearity it could not be merged.",
        ),
        Misconception(
            "first image's matrices for all",
            _lora(lambda x, W, b, A, B, s: (x, W, b, A, B, s) if A.ndim == 2 else (x, W, b, A[0], B[0], s)),
            "A (B, r, d_in) and B (B, d_out, r) belong to one image each; here all get the first one's.",
        ),
        Misconception(
            "mean over the images' matrices",
            _lora(
                lambda x, W, b, A, B, s: (
                    (x, W, b, A, B, s) if A.ndim == 2 else (x, W, b, A.mean(dim=0), B.mean(dim=0), s)
                )
            ),
            "Each image has a task of its own: the mean of the matrices belongs to none.",
        ),
        Misconception(
            "A and B detached",
            _lora(lambda x, W, b, A, B, s: (x, W, b, A.detach(), B.detach(), s)),
            "A and B are what is trained: a gradient has to reach them.",
        ),
        Misconception(
            "x detached",
            _lora(lambda x, W, b, A, B, s: (x.detach(), W, b, A, B, s)),
            "Frozen means that weights do not change: the gradient still passes, to the blocks before.",
        ),
    ),
)


def _merge_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    rank, d_in, d_out, side = (
        draws.integer(2, 3),
        draws.integer(5, 6),
        draws.integer(7, 8),
        draws.integer(3, 4),
    )

    def case(note, rank, d_in, d_out, scale, **kind):
        shapes = (d_out, d_in), (rank, d_in), (d_out, rank)
        return Case(note, (*(draws.normal(*shape, **kind) for shape in shapes), scale))

    return [
        case("all axes of one length", side, side, side, 0.5),
        case("a tall matrix", rank, d_in, d_out, 0.5),
        case("a wide matrix", rank, d_out, d_in, 2.0),
        case("rank 1", 1, d_in, d_out, 3.0),
        case("scale 0", rank, d_in, d_out, 0.0),
        case("float32", rank, d_in, d_out, 0.5, dtype=torch.float32),
        case("with gradient", rank, d_in, d_out, 0.5, gradient=True),
    ]


LORA_MERGED = Exercise(
    "visual_prompt_tuning.lora_merged",
    '"LoRA", equation (8.13)',
    visual_prompt_tuning.lora_merged,
    _merge_cases,
    (
        Misconception(
            "scale forgotten",
            lambda W, A, B, s: W + B @ A,
            "The change is multiplied by scale.",
        ),
        Misconception(
            "everything scaled",
            lambda W, A, B, s: s * (W + B @ A),
            "scale belongs to the change alone, not to W.",
        ),
        Misconception(
            "divided by the rank",
            lambda W, A, B, s: W + s / len(A) * B @ A,
            "scale is s itself; alpha / r has been worked out already.",
        ),
        Misconception(
            "change subtracted",
            lambda W, A, B, s: W - s * B @ A,
            "That is how a change is taken out again; to merge it, add it.",
        ),
        Misconception(
            "the change alone",
            lambda W, A, B, s: s * B @ A,
            "This is the change alone: it is added to W.",
        ),
        Misconception(
            "A B for B A",
            lambda W, A, B, s: W + s * A @ B,
            "x goes through A first, so A stands on the right: B A.",
        ),
        Misconception(
            "the change transposed",
            lambda W, A, B, s: W + s * (B @ A).mT,
            "A weight has a row for each output: B A has the shape of W, its transpose has not.",
        ),
        Misconception(
            "the mean of both",
            lambda W, A, B, s: (W + s * B @ A) / 2,
            "The merged matrix does what both do together: their sum, not their mean.",
        ),
        Misconception(
            "change detached",
            lambda W, A, B, s: W + s * (B @ A).detach(),
            "A gradient has to reach A and B: nothing is cut off here.",
        ),
    ),
)


def _attention_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, heads, count, n = (
        draws.integer(2, 3),
        draws.integer(2, 3),
        draws.integer(8, 9),
        draws.integer(2, 3),
    )
    side = draws.integer(5, 6)

    def case(note, batch, heads, count, num_prefix, n, **kind):
        weights = (2 * draws.normal(batch, heads, count, count)).softmax(dim=-1)
        return Case(note, (cast(weights, **kind), num_prefix, n))

    uniform = torch.full((batch, heads, count, count), 1 / count, dtype=torch.float64)
    return [
        case("a class token", batch, heads, count, 1, n),
        case("all axes of one length", side, side, side, 1, 2),
        case("a class token and two registers", batch, heads, count, 3, n),
        case("no class token", batch, heads, count, 0, n),
        case("a single prompt", batch, heads, count, 1, 1),
        case("one picture, one head", 1, 1, count, 2, n),
        case("nothing but prompts behind the class token", batch, heads, count, 1, count - 1),
        Case("equal attention to all", (uniform, 1, n)),
        case("float32", batch, heads, count, 2, n, dtype=torch.float32),
        case("with gradient", batch, heads, count, 1, n, gradient=True),
    ]


def _share_at(place):
    """The attention to n tokens from a place on; place(num_prefix, N, n)."""

    def share(weights, num_prefix, n):
        i = place(num_prefix, weights.shape[-1], n)
        return weights[..., i : i + n].sum(dim=-1)

    return share


def _to_prompts(weights: Tensor, num_prefix: int, n: int) -> Tensor:
    return weights[..., num_prefix : num_prefix + n]


ATTENTION_TO_PROMPTS = Exercise(
    "visual_prompt_tuning.attention_to_prompts",
    '"What a prompt can do", equation (8.14)',
    visual_prompt_tuning.attention_to_prompts,
    _attention_cases,
    (
        Misconception(
            "what the prompts look at",
            lambda weights, num_prefix, n: weights[..., num_prefix : num_prefix + n, :].sum(dim=-2),
            "Rows are tokens that look, columns those looked at: this sums the prompts' rows.",
        ),
        Misconception(
            "what the prompts alone look at among themselves",
            lambda weights, num_prefix, n: weights[
                ..., num_prefix : num_prefix + n, num_prefix : num_prefix + n
            ].sum(dim=-1),
            "This keeps the prompts' own rows alone: every token's attention is asked for.",
        ),
        Misconception(
            "mean over the prompts",
            lambda weights, num_prefix, n: _to_prompts(weights, num_prefix, n).mean(dim=-1),
            "The share that goes to all prompts together is a sum, not a mean.",
        ),
        Misconception(
            "the largest weight",
            lambda weights, num_prefix, n: _to_prompts(weights, num_prefix, n).amax(dim=-1),
            "The share that goes to all prompts together is a sum, not the largest weight.",
        ),
        Misconception(
            "every prompt for itself",
            _to_prompts,
            "One number for each token is asked for: sum over the prompts.",
        ),
        Misconception(
            "the first tokens",
            _share_at(lambda prefix, count, n: 0),
            "The sequence begins with the class token and registers: the prompts come behind num_prefix "
            "tokens.",
        ),
        Misconception(
            "always behind the first token",
            _share_at(lambda prefix, count, n: 1),
            "A backbone may have registers behind its class token, or no class token at all: num_prefix says "
            "where the prompts begin.",
        ),
        Misconception(
            "the last tokens",
            _share_at(lambda prefix, count, n: count - n),
            "The last tokens are patches: the prompts come behind num_prefix tokens.",
        ),
        Misconception(
            "one place too late",
            _share_at(lambda prefix, count, n: prefix + 1),
            "Counting begins with 0, so that the first prompt is token num_prefix.",
        ),
        Misconception(
            "one place too early",
            lambda weights, num_prefix, n: weights[..., max(num_prefix - 1, 0) : num_prefix - 1 + n].sum(-1),
            "num_prefix tokens stand before the prompts; here it is one less.",
        ),
        Misconception(
            "up to num_prompts",
            lambda weights, num_prefix, n: weights[..., num_prefix:n].sum(dim=-1),
            "The prompts end at num_prefix + num_prompts, not at num_prompts.",
        ),
        Misconception(
            "the patches' share",
            lambda weights, num_prefix, n: weights[..., num_prefix + n :].sum(dim=-1),
            "This is the share that goes to the patches behind the prompts.",
        ),
        Misconception(
            "the share of all others",
            lambda weights, num_prefix, n: 1 - _to_prompts(weights, num_prefix, n).sum(dim=-1),
            "This is the share that does not go to prompts.",
        ),
        Misconception(
            "prompts and what stands before them",
            lambda weights, num_prefix, n: weights[..., : num_prefix + n].sum(dim=-1),
            "The class token and registers are counted, too: begin at num_prefix.",
        ),
        Misconception(
            "averaged over the heads",
            lambda weights, num_prefix, n: _to_prompts(weights, num_prefix, n).sum(dim=-1).mean(dim=1),
            "Each head has a share of its own: keep the axis of the heads.",
        ),
        Misconception(
            "the class token's row alone",
            lambda weights, num_prefix, n: _to_prompts(weights, num_prefix, n).sum(dim=-1)[..., 0],
            "This is one token's attention: every token's is asked for.",
        ),
        Misconception(
            "relative to an equal share",
            lambda weights, num_prefix, n: (
                _to_prompts(weights, num_prefix, n).sum(dim=-1) * (weights.shape[-1] / n)
            ),
            "This compares with equal attention to all tokens; the share itself is asked for.",
        ),
        Misconception(
            "softmax taken again",
            lambda weights, num_prefix, n: _to_prompts(weights.softmax(dim=-1), num_prefix, n).sum(dim=-1),
            "The weights of a row add up to 1 already: they have been through the softmax.",
        ),
    ),
)


def _own_head_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, tasks, classes, d = 6, draws.integer(3, 4), draws.integer(2, 3), draws.integer(5, 7)
    side = draws.integer(4, 5)

    def case(note, chosen, tasks, classes, d, **kind):
        shapes = (len(chosen), d), (tasks, classes, d), (tasks, classes)
        return Case(note, (*(draws.normal(*shape, **kind) for shape in shapes), torch.tensor(chosen)))

    last = tasks - 1
    return [
        case("a mixed batch", [last, 0, 1, 0, last, 2], tasks, classes, d),
        # With all axes of one length, a mistake about the axes raises no error.
        case("all axes of one length", [2, 0, 3, 1, 0][:side], side, side, side),
        case("one task alone, not the first", [1] * batch, tasks, classes, d),
        case("tasks without samples", [last, 1, 1, last], tasks, classes, d),
        case("a batch of one", [last], tasks, classes, d),
        case("a single task", [0, 0, 0], 1, classes, d),
        case("one class", [1, 0, last], tasks, 1, d),
        case("float32", [1, last, 0, 2, 0], tasks, classes, d, dtype=torch.float32),
        case("with gradient", [0, last, 1, last], tasks, classes, d, gradient=True),
    ]


def _heads(features: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Every sample's logits by every head: (B, T, K)."""
    return torch.einsum("bd,tkd->btk", features, weights) + biases


def _by(choose):
    """The right logits with other heads chosen; choose(tasks, T) -> (B,)."""

    def logits(features, weights, biases, tasks):
        return visual_prompt_tuning.own_head(features, weights, biases, choose(tasks, len(weights)))

    return logits


def _of_all(reduce):
    return lambda features, weights, biases, tasks: reduce(_heads(features, weights, biases))


OWN_HEAD = Exercise(
    "visual_prompt_tuning.own_head",
    '"Many tasks, one backbone", equation (8.20)',
    visual_prompt_tuning.own_head,
    _own_head_cases,
    (
        Misconception(
            "first head for all",
            _by(lambda tasks, count: torch.zeros_like(tasks)),
            "All samples go through the first task's head: each has its own, weights[tasks].",
        ),
        Misconception(
            "first sample's head for all",
            _by(lambda tasks, count: tasks[:1].expand_as(tasks)),
            "All samples go through the head of the first one's task: a batch may mix tasks.",
        ),
        Misconception(
            "one head after another",
            _by(lambda tasks, count: torch.arange(len(tasks)) % count),
            "Sample i goes through head i: which head it needs is in tasks.",
        ),
        Misconception(
            "tasks numbered anew",
            _by(lambda tasks, count: tasks.unique(return_inverse=True)[1]),
            "The tasks that occur in the batch are numbered anew: a batch may lack some of them.",
        ),
        Misconception(
            "samples sorted by task",
            lambda features, weights, biases, tasks: visual_prompt_tuning.own_head(
                features[tasks.argsort(stable=True)], weights, biases, tasks.sort(stable=True).values
            ),
            "The samples come back sorted by task: their order must stay.",
        ),
        Misconception(
            "heads sorted, samples not",
            _by(lambda tasks, count: tasks.sort().values),
            "The heads are sorted by task, and the samples are not: row i belongs to tasks[i].",
        ),
        Misconception(
            "bias forgotten",
            lambda features, weights, biases, tasks: visual_prompt_tuning.own_head(
                features, weights, torch.zeros_like(biases), tasks
            ),
            "Each head has biases, too: add those of the sample's task.",
        ),
        Misconception(
            "bias subtracted",
            lambda features, weights, biases, tasks: visual_prompt_tuning.own_head(
                features, weights, -biases, tasks
            ),
            "The bias is added, not subtracted.",
        ),
        Misconception(
            "first task's bias",
            lambda features, weights, biases, tasks: (
                (weights[tasks] * features[:, None]).sum(-1) + biases[0].expand(len(tasks), -1)
            ),
            "The weights are those of the sample's task, the biases those of the first: take both by tasks.",
        ),
        Misconception(
            "first task's weights",
            lambda features, weights, biases, tasks: features @ weights[0].mT + biases[tasks],
            "The biases are those of the sample's task, the weights those of the first: take both by tasks.",
        ),
        Misconception(
            "every head's logits",
            _of_all(lambda logits: logits),
            "Each sample needs its own task's logits: choose among the heads.",
        ),
        Misconception(
            "mean over the heads",
            _of_all(lambda logits: logits.mean(dim=1)),
            "The heads answer different questions: their mean answers none.",
        ),
        Misconception(
            "sum over the heads",
            _of_all(lambda logits: logits.sum(dim=1)),
            "The heads answer different questions: their sum answers none.",
        ),
        Misconception(
            "the surest head",
            _of_all(lambda logits: logits.amax(dim=1)),
            "The task is given: it is not for the logits to choose the head.",
        ),
        Misconception(
            "weights transposed",
            lambda features, weights, biases, tasks: (
                torch.einsum("bd,bdk->bk", features, weights[tasks]) + biases[tasks]
            ),
            "A head's weights are (K, d), a row for each class, as in nn.Linear.",
        ),
        Misconception(
            "every sample with every other",
            lambda features, weights, biases, tasks: features @ weights[tasks].mT + biases[tasks],
            "This multiplies all samples with each sample's head, (B, B, K): row i goes with head i alone.",
        ),
        Misconception(
            "probabilities",
            lambda features, weights, biases, tasks: visual_prompt_tuning.own_head(
                features, weights, biases, tasks
            ).softmax(dim=1),
            "The logits are asked for: the loss takes the softmax.",
        ),
    ),
)


EXERCISES = [
    PATCHES,
    INSERT_PROMPTS,
    PROMPTED_BLOCKS,
    FREEZE_ALL_BUT,
    LORA_LINEAR,
    LORA_MERGED,
    ATTENTION_TO_PROMPTS,
    OWN_HEAD,
]
