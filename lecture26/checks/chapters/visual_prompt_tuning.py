"""Exercises of chapter 08: patches, prompts (in, size, replaced, looked at), storage, biases, heads."""

import math
from functools import partial

import torch
from torch import Tensor

from lecture26 import visual_prompt_tuning

from ..core import Case, Exercise, Misconception
from ..draws import Draws, cast
from ..mistakes import patch_grid


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


def _initial_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, d, depth, p = draws.integer(3, 4), draws.integer(6, 8), draws.integer(2, 3), draws.integer(3, 5)

    def case(note, *shape, values, **kind):
        return Case(note, (draws.uniform(*shape, **kind), values))

    ends = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-24]], dtype=torch.float64)
    return [
        case("prompts for the first block", n, d, values=3 * p * p),
        case("prompts for every block", depth, n, d, values=3 * p * p),
        case("a patch of 16 x 16 pixels, tokens of 192 numbers", 2, 192, values=768),
        case("as many prompts as numbers in each", d, d, values=3 * p * p),
        case("patches of a single grey pixel", n, d, values=1),
        case("a single prompt of a single number", 1, 1, values=48),
        Case("the ends of the interval", (ends, 48)),
        case("float32", depth, n, d, values=3 * p * p, dtype=torch.float32),
        case("with gradient", n, d, values=48, gradient=True),
    ]


def _spread(bound):
    """Uniform on [-v, v], whatever v is; bound(u, patch_values)."""
    return lambda u, patch_values: bound(u, patch_values) * (2 * u - 1)


def _v(u: Tensor, patch_values: int) -> float:
    return math.sqrt(6 / (patch_values + u.shape[-1]))


INITIAL_PROMPTS = Exercise(
    "visual_prompt_tuning.initial_prompts",
    '"How large a prompt begins", equation (8.8)',
    visual_prompt_tuning.initial_prompts,
    _initial_cases,
    (
        Misconception(
            "from 0 to v",
            lambda u, values: _v(u, values) * u,
            "The interval reaches from -v to v: stretch u by 2 v and move it by -v.",
        ),
        Misconception(
            "half the interval",
            lambda u, values: _v(u, values) * (u - 0.5),
            "u - 1/2 reaches from -1/2 to 1/2: the interval is half as wide as it should be.",
        ),
        Misconception(
            "moved, but not stretched",
            lambda u, values: _v(u, values) * (u - 1),
            "u - 1 reaches from -1 to 0: stretch u by 2 first.",
        ),
        Misconception(
            "from -1 to 1",
            _spread(lambda u, values: 1.0),
            "The bound v is missing: u is only to be stretched to [-v, v].",
        ),
        Misconception(
            "0.02",
            _spread(lambda u, values: 0.02),
            "0.02 is what timm takes for the position embedding; a prompt's bound follows from the sizes of "
            "patch and token.",
        ),
        Misconception(
            "root forgotten",
            _spread(lambda u, values: _v(u, values) ** 2),
            "v is the root of the fraction; v^2 is three times the variance.",
        ),
        Misconception(
            "standard deviation taken for the bound",
            _spread(lambda u, values: _v(u, values) / math.sqrt(3)),
            "sqrt(2 / ...) is the standard deviation; a uniform distribution with it reaches sqrt(3) times "
            "as far.",
        ),
        Misconception(
            "the other variance, 1 / (fan in + fan out)",
            _spread(lambda u, values: _v(u, values) / math.sqrt(2)),
            "The variance is 2 / (patch_values + d), so that v^2 is 6 over the sum, not 3.",
        ),
        Misconception(
            "the token's size alone",
            _spread(lambda u, values: math.sqrt(6 / u.shape[-1])),
            "Both sizes go in, those of the patch and of the token: 6 / (patch_values + d).",
        ),
        Misconception(
            "the patch's size alone",
            _spread(lambda u, values: math.sqrt(6 / values)),
            "Both sizes go in, those of the patch and of the token: 6 / (patch_values + d).",
        ),
        Misconception(
            "product of the sizes",
            _spread(lambda u, values: math.sqrt(6 / (values * u.shape[-1]))),
            "The two sizes are added, not multiplied.",
        ),
        Misconception(
            "channels counted twice",
            _spread(lambda u, values: math.sqrt(6 / (3 * values + u.shape[-1]))),
            "patch_values counts all channels already: 3 p^2 for a colour picture.",
        ),
        Misconception(
            "width of the patch for its values",
            _spread(lambda u, values: math.sqrt(6 / (math.sqrt(values / 3) + u.shape[-1]))),
            "This takes p where the number of values of a patch belongs, 3 p^2.",
        ),
        Misconception(
            "number of prompts for their size",
            _spread(lambda u, values: math.sqrt(6 / (values + u.shape[-2]))),
            "d is the last axis, the length of a prompt; here the number of prompts is taken.",
        ),
        Misconception(
            "all axes counted",
            _spread(lambda u, values: math.sqrt(6 / (values + u.numel()))),
            "d is the length of one prompt, not the number of all values.",
        ),
    ),
)


def _replace_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, count, n, d = draws.integer(3, 4), draws.integer(9, 10), draws.integer(1, 2), draws.integer(5, 6)
    side = draws.integer(4, 5)
    case = partial(_prompt_case, draws)

    return [
        case("all axes but the prompts' of one length", side, side, 2, side, 1),
        case("the same prompts for all", batch, count, n + 1, d, 1),
        case("prompts of each sample's own", batch, count, n + 1, d, 1, each=True),
        case("a class token and two registers", batch, count, n + 2, d, 3),
        case("no class token", batch, count, n + 1, d, 0),
        case("as many prompts as samples", batch, count, batch, d, 2),
        case("a single prompt", batch, count, 1, d, 1),
        case("more prompts than patches", batch, count, count - 3, d, 1),
        case("a batch of one", 1, count, n + 1, d, 1),
        case("float32", batch, count, n + 1, d, 2, dtype=torch.float32),
        case("with gradient", batch, count, n + 1, d, 1, gradient=True),
        case("with gradient, prompts of each sample's own", 2, count, n, d, 2, each=True, gradient=True),
    ]


def _replaced_at(place):
    """The n tokens from a place on replaced; place(num_prefix, N, n)."""

    def put(tokens, prompts, num_prefix):
        n = prompts.shape[-2]
        i = place(num_prefix, tokens.shape[1], n)
        return torch.cat([tokens[:, :i], _for_each(prompts, tokens), tokens[:, i + n :]], dim=1)

    return put


def _without_old(tokens: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    return torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + prompts.shape[-2] :]], dim=1)


REPLACE_PROMPTS = Exercise(
    "visual_prompt_tuning.replace_prompts",
    '"Deep prompts", equation (8.9)',
    visual_prompt_tuning.replace_prompts,
    _replace_cases,
    (
        Misconception(
            "accumulated",
            visual_prompt_tuning.insert_prompts,
            "The old prompts are still there, and each block would see n tokens more: the new ones take "
            "their places.",
        ),
        Misconception(
            "added",
            _added,
            "The new prompts are added to what came out of the block before: they replace it.",
        ),
        Misconception(
            "nothing replaced",
            lambda tokens, prompts, num_prefix: tokens.clone(),
            "The tokens come back as they went in: that is VPT-shallow, whose prompts pass through.",
        ),
        Misconception(
            "mean of old and new",
            lambda tokens, prompts, num_prefix: (
                (tokens + visual_prompt_tuning.replace_prompts(tokens, prompts, num_prefix)) / 2
            ),
            "Nothing is left of the old prompts: they are replaced, not mixed.",
        ),
        Misconception(
            "class token overwritten",
            _replaced_at(lambda prefix, count, n: 0),
            "The first num_prefix tokens are the class token and registers, and stay: the prompts stand "
            "behind them.",
        ),
        Misconception(
            "always behind the first token",
            _replaced_at(lambda prefix, count, n: 1),
            "A backbone may have registers behind its class token, or no class token at all: num_prefix says "
            "how many tokens stay in front.",
        ),
        Misconception(
            "one place too early",
            _replaced_at(lambda prefix, count, n: max(prefix - 1, 0)),
            "num_prefix tokens stay in front; here it is one less.",
        ),
        Misconception(
            "one place too late",
            _replaced_at(lambda prefix, count, n: prefix + 1),
            "num_prefix tokens stay in front; here it is one more, and one old prompt stays, too.",
        ),
        Misconception(
            "behind the old prompts",
            _replaced_at(lambda prefix, count, n: min(prefix + n, count - n)),
            "This overwrites patches and keeps the old prompts: those stand right behind the first "
            "num_prefix tokens.",
        ),
        Misconception(
            "the last tokens replaced",
            _replaced_at(lambda prefix, count, n: count - n),
            "The last tokens are patches: the prompts stand behind the first num_prefix tokens.",
        ),
        Misconception(
            "moved to the end",
            lambda tokens, prompts, num_prefix: torch.cat(
                [_without_old(tokens, prompts, num_prefix), _for_each(prompts, tokens)], dim=1
            ),
            "Attention would not mind, but the next block looks for prompts behind the first num_prefix "
            "tokens and would take away patches.",
        ),
        Misconception(
            "moved to the front",
            lambda tokens, prompts, num_prefix: torch.cat(
                [_for_each(prompts, tokens), _without_old(tokens, prompts, num_prefix)], dim=1
            ),
            "The head reads token 0 and would find a prompt there: they stand behind the first num_prefix "
            "tokens.",
        ),
        Misconception(
            "inserted, then cut to length",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.insert_prompts(
                tokens, prompts, num_prefix
            )[:, : tokens.shape[1]],
            "The old prompts are kept, and the last patches lost in their place.",
        ),
        Misconception(
            "patches lost",
            lambda tokens, prompts, num_prefix: torch.cat(
                [tokens[:, :num_prefix], _for_each(prompts, tokens)], dim=1
            ),
            "The patches behind the old prompts are gone: N tokens come in, and N go out.",
        ),
        Misconception(
            "class token lost",
            lambda tokens, prompts, num_prefix: torch.cat(
                [_for_each(prompts, tokens), tokens[:, num_prefix + prompts.shape[-2] :]], dim=1
            ),
            "The first num_prefix tokens are gone: they stay in front of the prompts.",
        ),
        Misconception(
            "first sample's prompts for all",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.replace_prompts(
                tokens, _first_of(prompts), num_prefix
            ),
            "Prompts (B, n, d) belong to one sample each; here all get the first one's.",
        ),
        Misconception(
            "prompts detached",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.replace_prompts(
                tokens, prompts.detach(), num_prefix
            ),
            "The prompts are what is trained: a gradient has to reach them.",
        ),
        Misconception(
            "tokens detached",
            lambda tokens, prompts, num_prefix: visual_prompt_tuning.replace_prompts(
                tokens.detach(), prompts, num_prefix
            ),
            "The prompts of earlier blocks learn through these tokens: frozen weights let gradient pass.",
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
    '"What a prompt can do", equation (8.10)',
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


def _storage_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    n, classes, models = draws.integer(5, 9), draws.integer(11, 19), draws.integer(4, 5)

    def table(*numbers, dtype=torch.float64):
        return torch.tensor(numbers, dtype=dtype)

    def counts(count, low, high):
        return torch.tensor([draws.integer(low, high) for _ in range(count)])

    def case(note, models, **kind):
        backbone = cast(draws.uniform(models, low=1e4, high=1e6).round(), **kind)
        sizes = counts(models, 2, 12), counts(models, 1, 8), counts(models, 16, 48)
        return Case(note, (backbone, *sizes, classes))

    large = table(85.8e6, 303.3e6, 630.8e6)
    depth, dim = torch.tensor([12, 24, 32]), torch.tensor([768, 1024, 1280])
    return [
        case("small backbones", models),
        Case("ViT-B, ViT-L and ViT-H, deep", (large, depth, 10, dim, 200)),
        Case("ViT-B, ViT-L and ViT-H, shallow", (large, torch.ones(3, dtype=torch.int64), n, dim, 100)),
        Case(
            "several lengths on one backbone", (large[:1], depth[:1], torch.tensor([1, n, 100]), dim[:1], 200)
        ),
        Case("without a head", (large, depth, n, dim, 0)),
        Case("without prompts, a linear probe", (large, depth, 0, dim, classes)),
        Case("a single backbone", (table(2.7e6), torch.tensor([6]), n, torch.tensor([192]), 10)),
        case("float32", models, dtype=torch.float32),
        case("with gradient", models, gradient=True),
    ]


def _ratio(stored):
    """backbone / stored, whatever is taken for what is stored."""
    return lambda backbone, depth, n, d, classes: backbone / stored(depth, n, d, classes)


def _task(depth, n, d, classes):
    return depth * n * d + (d + 1) * classes


STORAGE_RATIO = Exercise(
    "visual_prompt_tuning.storage_ratio",
    '"The count", equation (8.14)',
    visual_prompt_tuning.storage_ratio,
    _storage_cases,
    (
        Misconception(
            "upside down",
            lambda backbone, *sizes: _task(*sizes) / backbone,
            "This is the task's share of the backbone: the ratio says how many times smaller the task is.",
        ),
        Misconception(
            "per cent",
            lambda backbone, *sizes: 100 * _task(*sizes) / backbone,
            "This is the task's size in per cent of the backbone: say how many times smaller it is.",
        ),
        Misconception(
            "the head forgotten",
            _ratio(lambda depth, n, d, classes: depth * n * d + 0 * classes + (n == 0) * (d + 1) * classes),
            "Each task has a head of its own, too, and it has to be stored: (d + 1) K numbers.",
        ),
        Misconception(
            "the head's biases forgotten",
            _ratio(lambda depth, n, d, classes: depth * n * d + d * classes),
            "A linear head has a bias for each class: (d + 1) K numbers.",
        ),
        Misconception(
            "a head in every block",
            _ratio(lambda depth, n, d, classes: depth * (n * d + (d + 1) * classes)),
            "There are prompts in every block, but only one head.",
        ),
        Misconception(
            "prompts of one block",
            _ratio(lambda depth, n, d, classes: n * d + (d + 1) * classes),
            "Deep prompts are different ones in every block: depth n d numbers.",
        ),
        Misconception(
            "one prompt for each block",
            _ratio(lambda depth, n, d, classes: depth * d + (d + 1) * classes),
            "Each block has n prompts, not one.",
        ),
        Misconception(
            "prompts without their length",
            _ratio(lambda depth, n, d, classes: depth * n + (d + 1) * classes),
            "A prompt is a token of d numbers.",
        ),
        Misconception(
            "prompts taken for matrices",
            _ratio(lambda depth, n, d, classes: depth * n * d * d + (d + 1) * classes),
            "A prompt is a vector of d numbers, not a d x d matrix.",
        ),
        Misconception(
            "sum for the product in the head",
            _ratio(lambda depth, n, d, classes: depth * n * d + d + classes),
            "The head maps d features to K logits: d K weights and K biases.",
        ),
        Misconception(
            "a bias for every feature",
            _ratio(lambda depth, n, d, classes: depth * n * d + d * classes + d),
            "A head has K biases, one for each class, not one for each feature.",
        ),
        Misconception(
            "backbone stored with every task",
            lambda backbone, *sizes: backbone / (backbone + _task(*sizes)),
            "The backbone is stored once for all tasks: a task costs its prompts and its head.",
        ),
        Misconception(
            "the task counted on both sides",
            lambda backbone, *sizes: (backbone + _task(*sizes)) / _task(*sizes),
            "What a fine-tuned copy costs is compared with what a task costs: no prompts above the line.",
        ),
        Misconception(
            "bytes above, numbers below",
            lambda backbone, *sizes: 4 * backbone / _task(*sizes),
            "Four bytes for each number above the line, one below it: count both sides alike.",
        ),
        Misconception(
            "difference",
            lambda backbone, *sizes: backbone - _task(*sizes),
            "This is how many numbers are saved: how many times fewer they are, is asked for.",
        ),
        Misconception(
            "rounded down",
            lambda backbone, *sizes: torch.div(backbone, _task(*sizes), rounding_mode="floor"),
            "The ratio is no whole number: do not round it.",
        ),
    ),
)


def _bias_cases(seed: int) -> list[Case]:
    draws = Draws(seed)
    batch, count, d, side = draws.integer(2, 3), draws.integer(4, 5), draws.integer(6, 7), draws.integer(3, 4)

    def case(note, *shape, **kind):
        return Case(note, (draws.normal(*shape, **kind),))

    return [
        case("tokens of a batch", batch, count, d),
        case("all axes of one length", side, side, side),
        case("no axis of tokens", batch + 1, d),
        case("several heads", batch, 2, count, d),
        case("a single picture", 1, count, d),
        case("a single token", batch, 1, d),
        case("a single bias", batch, count, 1),
        case("float32", batch, count, d, dtype=torch.float32),
        case("with gradient", batch, count, d, gradient=True),
    ]


def _rows(g: Tensor) -> Tensor:
    return g.flatten(0, -2)


def _changed_bias(change):
    return lambda grad_output: change(_rows(grad_output).sum(dim=0))


BIAS_GRADIENT = Exercise(
    "visual_prompt_tuning.bias_gradient",
    '"Only the biases", equation (8.16)',
    visual_prompt_tuning.bias_gradient,
    _bias_cases,
    (
        Misconception(
            "mean over all tokens",
            lambda g: _rows(g).mean(dim=0),
            "A mean in the loss is in grad_output already: what arrives at the tokens adds up.",
        ),
        Misconception(
            "mean over the batch",
            lambda g: _rows(g).sum(dim=0) / len(g),
            "A mean in the loss is in grad_output already: no second one over the batch.",
        ),
        Misconception(
            "mean over the tokens",
            lambda g: _rows(g).sum(dim=0) / g.shape[-2],
            "The bias is added to each token in full: what arrives at the tokens adds up.",
        ),
        Misconception(
            "sum over the batch alone",
            lambda g: g.sum(dim=0),
            "The same bias is added to every token: sum over the tokens, too.",
        ),
        Misconception(
            "sum over the tokens alone",
            lambda g: g.sum(dim=-2),
            "The same bias is added for every picture: sum over the batch, too.",
        ),
        Misconception(
            "sum over the features",
            lambda g: g.sum(dim=-1),
            "The last axis is that of the bias: it stays, and the others are summed over.",
        ),
        Misconception(
            "sum over everything",
            lambda g: g.sum(),
            "There is one bias for each feature: the last axis stays.",
        ),
        Misconception(
            "the class token alone",
            lambda g: _rows(g[..., :1, :]).sum(dim=0),
            "The head reads one token, but the bias is added to all of them, and through attention all "
            "matter.",
        ),
        Misconception(
            "the first picture alone",
            lambda g: _rows(g[:1]).sum(dim=0),
            "Every picture of the batch has its part in the gradient.",
        ),
        Misconception(
            "axes kept",
            lambda g: g.sum(dim=tuple(range(g.ndim - 1)), keepdim=True),
            "The bias has one axis, (d,), and its gradient too.",
        ),
        Misconception(
            "one row for each token and picture",
            lambda g: _rows(g),
            "This lists what arrives at each token: the bias is one for all, so that it adds up.",
        ),
        Misconception(
            "opposite sign",
            _changed_bias(torch.neg),
            "The step goes against the gradient, but this is the gradient itself: no minus.",
        ),
        Misconception(
            "squares",
            lambda g: _rows(g).square().sum(dim=0),
            "What arrives at the tokens is added with its sign, not squared.",
        ),
        Misconception(
            "absolute values",
            lambda g: _rows(g).abs().sum(dim=0),
            "What arrives at the tokens is added with its sign.",
        ),
        Misconception(
            "length 1",
            _changed_bias(lambda total: total / total.norm()),
            "The gradient has the length that it has: no normalisation.",
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
    '"Many tasks, one backbone", equation (8.17)',
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
    INITIAL_PROMPTS,
    REPLACE_PROMPTS,
    ATTENTION_TO_PROMPTS,
    STORAGE_RATIO,
    BIAS_GRADIENT,
    OWN_HEAD,
]
