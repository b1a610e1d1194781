"""Chapter 07 against oracles: torch's attention, diffusers' networks and steps, an invertible VAE."""

import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed, seeded
from torch import nn

from lecture26 import recipes
from lecture26.clip_guidance import TextTransformer, Tokenizer
from lecture26.ddpm import Diffusion, cosine_betas, linear_betas
from lecture26.kit.checkpoints import CheckpointError, checkpoint_files, load_card, save_checkpoint
from lecture26.kit.data import load
from lecture26.kit.evaluation import attribute_accuracy
from lecture26.kit.readers import Reader
from lecture26.kit.sample_draws import SampleDraws
from lecture26.kit.shapes import NO_SIDE, noun_sides
from lecture26.latent_diffusion import (
    CrossAttention,
    DiffusersDenoiser,
    DiffusersVAE,
    LatentDiffusion,
    TextAttention,
    TextDenoiser,
    TextEncoder,
    TransformersText,
    coordinates,
    cross_attention,
    from_latents,
    initial_noise,
    keep_known,
    load_stable_diffusion,
    recorded_weights,
    share_of_wrong_guesses,
    split_heads,
    to_latents,
    to_pil,
    word_maps,
    word_weights,
)
from lecture26.recipes import latent
from lecture26.recipes.latent import EncodedImages, LatentDiffusionRecipe
from lecture26.unet import SelfAttention, UNet, patchify, unpatchify

WORDS = ("a", "blue", "red", "ring", "star")
PROMPTS = ["a red star", "a ring", "blue"]


def mask_of(lengths, tokens):
    """A mask (B, M) of texts of these lengths."""
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


X, CONTEXT = normal(3, 6, 10), normal(3, 7, 5, seed=1)
MASK = mask_of([2, 7, 5], 7)


def attention_layer(query_dim=10, context_dim=5, heads=3, head_dim=4):
    torch.manual_seed(0)
    return perturbed(CrossAttention(query_dim, context_dim, heads, head_dim))


# Cross-attention


@pytest.mark.parametrize("mask", [MASK, None])
def test_cross_attention_is_that_of_torch(mask):
    layer = attention_layer()
    q, k, v = (
        to(h).view(3, -1, 3, 4).transpose(1, 2)
        for to, h in ((layer.to_q, X), (layer.to_k, CONTEXT), (layer.to_v, CONTEXT))
    )
    attn_mask = None if mask is None else mask[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
    agree(layer(X, CONTEXT, mask), layer.to_out(mixed), 1e-12)
    everything = torch.ones_like(MASK) if mask is None else mask
    agree(cross_attention(X, CONTEXT, layer.to_q, layer.to_k, layer.to_v, 3, everything), mixed, 1e-12)


def test_cross_attention_is_torchs_layer_with_the_same_weights():
    ours = attention_layer(query_dim=12, context_dim=5, heads=3, head_dim=4)
    theirs = nn.MultiheadAttention(12, 3, kdim=5, vdim=5, batch_first=True).double()
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.to_q.weight)
        theirs.k_proj_weight.copy_(ours.to_k.weight)
        theirs.v_proj_weight.copy_(ours.to_v.weight)
        theirs.in_proj_bias.zero_()
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    x = normal(3, 6, 12)
    output, weights = theirs(x, CONTEXT, CONTEXT, key_padding_mask=~MASK)
    agree(ours(x, CONTEXT, MASK), output, 1e-12)
    agree(ours.weights(x, CONTEXT, MASK).mean(1), weights, 1e-12)


def test_the_order_of_the_context_does_not_matter():
    layer, order = attention_layer(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    agree(layer(X, CONTEXT[:, order], MASK[:, order]), layer(X, CONTEXT, MASK), 1e-12)
    agree(layer.weights(X, CONTEXT[:, order]), layer.weights(X, CONTEXT)[..., order], 1e-12)


def test_the_order_of_the_places_is_kept():
    layer, order = attention_layer(), torch.tensor([3, 0, 1, 5, 2, 4])
    agree(layer(X[:, order], CONTEXT, MASK), layer(X, CONTEXT, MASK)[:, order], 1e-12)


def test_masked_tokens_are_inert_and_have_no_gradient():
    layer = attention_layer()
    loud = torch.where(MASK[:, :, None], CONTEXT, 1e3 * normal(3, 7, 5, seed=2)).requires_grad_()
    output = layer(X, loud, MASK)
    agree(output, layer(X, CONTEXT, MASK), 0.0)
    (gradient,) = torch.autograd.grad(output.square().sum(), loud)
    assert not gradient[~MASK].any() and (gradient[MASK] != 0).all()
    assert not layer.weights(X, CONTEXT, MASK).transpose(1, 3)[~MASK].any()
    for row, length in enumerate([2, 7, 5]):
        alone = layer(X[row : row + 1], CONTEXT[row : row + 1, :length])
        agree(output[row : row + 1], alone, 1e-12)


def test_one_token_says_the_same_everywhere():
    layer = attention_layer()
    said = layer.to_out(layer.to_v(CONTEXT[:, :1]))  # (B, 1, C)
    agree(layer(X, CONTEXT[:, :1]), said.expand(-1, 6, -1), 1e-12)
    only_third = mask_of([1, 1, 1], 7).roll(2, dims=1)
    agree(layer(X, CONTEXT, only_third), layer.to_out(layer.to_v(CONTEXT[:, 2:3])).expand(-1, 6, -1), 1e-12)


def test_weights_are_those_that_mix_the_values():
    layer = attention_layer()
    weights = layer.weights(X, CONTEXT, MASK)
    assert weights.shape == (3, 3, 6, 7) and (weights >= 0).all()
    agree(weights.sum(3), torch.ones(3, 3, 6, dtype=torch.float64), 1e-12)
    values = split_heads(layer.to_v(CONTEXT), 3)
    agree(layer.to_out((weights @ values).transpose(1, 2).flatten(2)), layer(X, CONTEXT, MASK), 1e-12)
    agree(layer.weights(X, CONTEXT), layer.weights(X, CONTEXT, torch.ones_like(MASK)), 0.0)


class LowRank(nn.Module):
    """A layer with a product of two thin matrices added, as LoRA has it (Hu et al. 2022)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer
        self.down = normal(rank, layer.in_features, seed=2)
        self.up = normal(layer.out_features, rank, seed=3)

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
def test_a_layer_put_in_the_place_of_another_acts_in_output_and_weights(name):
    adapted, merged = attention_layer(), attention_layer()
    before = adapted(X, CONTEXT, MASK)
    setattr(adapted, name, LowRank(getattr(adapted, name)))
    with torch.no_grad():
        getattr(merged, name).weight += getattr(adapted, name).up @ getattr(adapted, name).down
    agree(adapted(X, CONTEXT, MASK), merged(X, CONTEXT, MASK), 1e-12)
    agree(adapted.weights(X, CONTEXT, MASK), merged.weights(X, CONTEXT, MASK), 1e-12)
    assert not torch.allclose(adapted(X, CONTEXT, MASK), before)


def test_a_hook_acts_in_output_and_weights():
    hooked, doubled = attention_layer(), attention_layer()
    hooked.to_q.register_forward_hook(lambda layer, arguments, output: 2 * output)
    with torch.no_grad():
        doubled.to_q.weight *= 2
    agree(hooked(X, CONTEXT, MASK), doubled(X, CONTEXT, MASK), 1e-12)
    agree(hooked.weights(X, CONTEXT, MASK), doubled.weights(X, CONTEXT, MASK), 1e-12)
    assert not torch.allclose(hooked.weights(X, CONTEXT, MASK), attention_layer().weights(X, CONTEXT, MASK))


def test_large_scores_do_not_overflow():
    q, k = 1e4 * normal(3, 2, 6, 4), normal(3, 2, 7, 4, seed=1)
    weights = word_weights(q, k, MASK)
    assert weights.isfinite().all()
    agree(weights.sum(3), torch.ones(3, 2, 6, dtype=torch.float64), 1e-12)


def test_samples_of_a_batch_look_at_their_own_text():
    layer = attention_layer()
    whole = layer(X, CONTEXT, MASK)
    for row in range(3):
        part = slice(row, row + 1)
        agree(layer(X[part], CONTEXT[part], MASK[part]), whole[part], 1e-12)


def test_heads_are_cut_in_blocks():
    features = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = split_heads(features, 4)
    assert heads.shape == (2, 4, 3, 2)
    agree(heads[1, 2], features[1, :, 4:6], 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cross_attention_keeps_the_dtype(dtype):
    layer = attention_layer().to(dtype)
    assert layer(X.to(dtype), CONTEXT.to(dtype), MASK).dtype == dtype
    assert layer.weights(X.to(dtype), CONTEXT.to(dtype)).dtype == dtype


def test_word_maps_of_known_weights():
    weights = torch.zeros(1, 2, 6, 3)
    weights[0, 0, 4, 1], weights[0, 1, 4, 1], weights[0, 1, 2, 0] = 0.2, 0.6, 1.0
    maps = word_maps(weights, 2, 3)
    assert maps.shape == (1, 3, 2, 3)
    agree(maps[0, 1], torch.tensor([[0, 0, 0], [0, 0.4, 0]]), 1e-6)
    agree(maps[0, 0], torch.tensor([[0, 0, 0.5], [0, 0, 0]]), 1e-6)
    layer = attention_layer()
    maps = word_maps(layer.weights(X, CONTEXT, MASK), 3, 2)
    agree(maps.sum(dim=1), torch.ones(3, 3, 2, dtype=torch.float64), 1e-12)
    assert not maps[~MASK].any()


# The block, and the U-Net made of it

SMALL = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1, "attention_levels": (1,)}
TEXT = {"width": 6, "depth": 1, "heads": 2}
COND = {"context": CONTEXT, "mask": MASK}


# row and column of the places of a map of 2 by 3
GRID = torch.tensor([[-1.0, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]], dtype=torch.float64)


def test_coordinates_are_rows_and_columns_from_minus_1_to_1():
    agree(coordinates(2, 3, GRID), GRID, 0.0)
    agree(coordinates(1, 2, GRID.float()), torch.tensor([[-1.0, -1], [-1, 1]]), 0.0)


def test_places_with_the_same_features_are_told_apart_by_where_they_are():
    torch.manual_seed(0)
    block = perturbed(TextAttention(8, 5, head_dim=4))
    flat = normal(3, 8, 1, 1).expand(3, 8, 2, 3)
    output = block(flat, COND).flatten(2)  # (3, 8, 6)
    distances = torch.cdist(output.transpose(1, 2), output.transpose(1, 2))
    assert (distances + torch.eye(6) > 1e-4).all()
    nn.init.zeros_(block.where.weight)
    agree(block(flat, COND), block(flat, COND)[:, :, :1, :1].expand_as(flat), 1e-12)


def text_unet(channels=4, context_dim=5, dtype=torch.float64):
    torch.manual_seed(0)
    attention = partial(TextAttention, context_dim=context_dim)
    return perturbed(UNet(channels, attention=attention, **SMALL), dtype).eval()


def encoder(length=7, **options):
    torch.manual_seed(1)
    return perturbed(TextEncoder(Tokenizer(WORDS, length), **TEXT | options)).eval()


def test_the_block_is_self_attention_then_cross_attention_each_added():
    torch.manual_seed(0)
    block = perturbed(TextAttention(8, 5, head_dim=4))
    h = normal(3, 8, 2, 3)
    after_places = block.places(h)
    places = block.norm(after_places).flatten(2).transpose(1, 2) + block.where(GRID)
    said = block.words(places, CONTEXT, MASK)
    expected = after_places + said.transpose(1, 2).unflatten(2, (2, 3))
    agree(block(h, COND), expected, 1e-12)
    assert isinstance(block.places, SelfAttention) and block.words.heads == 2


@pytest.mark.parametrize(("channels", "looks_around"), [(8, False), (16, True), (32, True)])
def test_a_map_with_few_channels_looks_at_the_words_only(channels, looks_around):
    torch.manual_seed(0)
    block = perturbed(TextAttention(channels, 5, head_dim=4, self_attention_from=16))
    h = normal(3, channels, 2, 3)
    assert (block.places is not None) == looks_around
    before = block.places(h) if looks_around else h
    places = block.norm(before).flatten(2).transpose(1, 2) + block.where(GRID)
    said = block.words(places, CONTEXT, MASK)
    agree(block(h, COND), before + said.transpose(1, 2).unflatten(2, (2, 3)), 1e-12)


def test_the_block_adds_no_words_at_first():
    torch.manual_seed(0)
    block, h = TextAttention(8, 5).double(), normal(3, 8, 2, 3)
    agree(block(h, COND), block.places(h), 0.0)
    agree(block(h, COND), h, 0.0)


def test_the_unet_minds_its_text_and_each_token_that_is_not_masked():
    unet, z_t, t = text_unet(), normal(3, 4, 4, 4), torch.tensor([3, 500, 999])
    output = unet(z_t, t, COND)
    assert output.shape == z_t.shape
    for row, place in ((0, 1), (1, 6), (2, 4)):
        changed = CONTEXT.clone()
        changed[row, place] += 1
        other = unet(z_t, t, {"context": changed, "mask": MASK})
        assert not torch.isclose(other[row], output[row]).any()
        others = [number for number in range(3) if number != row]
        agree(other[others], output[others], 1e-12)


def test_masked_tokens_are_inert_in_the_unet():
    unet, z_t, t = text_unet(), normal(3, 4, 4, 4), torch.tensor([3, 500, 999])
    loud = torch.where(MASK[:, :, None], CONTEXT, 1e3)
    agree(unet(z_t, t, {"context": loud, "mask": MASK}), unet(z_t, t, COND), 0.0)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = {"context": CONTEXT[:, order], "mask": MASK[:, order]}
    agree(unet(z_t, t, shuffled), unet(z_t, t, COND), 1e-10)


def test_the_text_encoder_has_features_of_every_token_and_says_which_are_there():
    text_encoder = encoder()
    tokens = text_encoder.tokenizer(PROMPTS + [""])
    cond = text_encoder(tokens)
    assert set(cond) == {"context", "mask"}
    assert cond["mask"].sum(1).tolist() == [5, 4, 3, 2]  # begin, the words, end
    assert isinstance(text_encoder.transformer, TextTransformer)
    assert cond["context"].shape == (4, 7, 6)


def test_every_token_knows_the_whole_text_and_no_padding():
    text_encoder = encoder()
    tokens = text_encoder.tokenizer(["a red star"])  # begin, three words, end, two of padding
    features = text_encoder(tokens)["context"][:, :5]
    for place in range(1, 5):
        changed = tokens.clone()
        changed[0, place] = text_encoder.tokenizer(["ring"])[0, 1]
        others = text_encoder(changed)["context"][:, :5]
        assert not torch.isclose(others, features).all(dim=2).any()
    nn.init.normal_(text_encoder.transformer.tokens.weight[text_encoder.tokenizer.padding])
    agree(text_encoder(tokens)["context"][:, :5], features, 0.0)


def test_padding_changes_nothing_that_the_unet_draws():
    short, long = encoder(length=5), encoder(length=7)
    state = long.state_dict()
    state["transformer.places.weight"] = state["transformer.places.weight"][:5]
    short.load_state_dict(state)
    unet, z_t, t = text_unet(context_dim=6), normal(3, 4, 4, 4), torch.tensor([3, 500, 999])
    outputs = [unet(z_t, t, encode(encode.tokenizer(PROMPTS))) for encode in (short, long)]
    agree(*outputs, 1e-10)


def test_denoiser_and_text_encoder_are_learned_together():
    model = TextDenoiser(text_unet(context_dim=6), encoder(), 4).double()
    tokens = model.text_encoder.tokenizer(["a red star blue ring", "a", ""])
    z_t, t = normal(3, 4, 4, 4), torch.tensor([3, 500, 999])
    output, sides = model(z_t, t, tokens)
    cond = model.text_encoder(tokens)
    agree(output, model.unet(z_t, t, cond), 0.0)
    agree(sides[1, :, 2], model.side(cond["context"][1, 2]), 1e-12)
    of_tokens = sides.transpose(1, 2)[cond["mask"]]  # padding is not asked
    (output.square().sum() + of_tokens.square().sum()).backward()
    unused = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert unused == set()
    rows = model.text_encoder.transformer.tokens.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False] + [True] * 7  # padding is never looked at


def test_weights_are_recorded_layer_by_layer_while_the_block_runs():
    unet, z_t, t = text_unet(), normal(3, 4, 4, 4), torch.tensor([3, 500, 999])
    layers = [module for module in unet.modules() if isinstance(module, CrossAttention)]
    seen = []
    handles = [layer.register_forward_pre_hook(lambda *call: seen.append(call)) for layer in layers]
    with recorded_weights(unet) as weights:
        unet(z_t, t, COND)
    for handle in handles:
        handle.remove()
    assert len(weights) == len(seen) == len(layers) == 4  # one on the way down, middle, two on the way up
    for recorded, (layer, arguments) in zip(weights, seen, strict=True):
        agree(recorded, layer.weights(*arguments), 0.0)
        assert not recorded.requires_grad
    unet(z_t, t, COND)
    assert len(weights) == 4
    with pytest.raises(RuntimeError), recorded_weights(unet) as weights:
        raise RuntimeError
    unet(z_t, t, COND)
    assert weights == []


def test_weights_of_a_layer_that_is_called_by_keyword():
    layer, x = CrossAttention(4, 5, heads=2, head_dim=3).double(), normal(3, 6, 4)
    with recorded_weights(layer) as weights:
        layer(x, CONTEXT, mask=MASK)
    agree(weights[0], layer.weights(x, CONTEXT, MASK), 0.0)
    assert not (weights[0] * ~MASK[:, None, None]).any()


# Latents and their scale


class LinearVAE(nn.Module):
    """Patches of 2 x 2 grey pixels to 4 numbers, each 3 times the pixel plus 1; the variance is exp(-2)."""

    in_channels, latent_channels, factor = 1, 4, 2

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def encode(self, x):
        mean = self.slope * patchify(x, 2) + 1
        return mean, torch.full_like(mean, -2.0)

    def decode(self, z):
        return unpatchify((z - 1) / self.slope, 2)


class Constant(nn.Module):
    """A denoiser that predicts the same x_0, whatever it is asked; it keeps what it was asked."""

    def __init__(self, x_0):
        super().__init__()
        self.x_0, self.calls = x_0, []

    def forward(self, z_t, t, cond):
        self.calls.append((z_t, t, cond))
        return self.x_0.expand(z_t.shape).to(z_t.dtype)


def linear_pipeline(denoiser=None, scale=0.5, prediction="x_0", num_steps=100, image_size=8):
    diffusion = Diffusion(linear_betas(num_steps), prediction)
    denoiser = denoiser or Constant(normal(1, 4, 4, 4, seed=9))
    return LatentDiffusion(LinearVAE(), denoiser, diffusion, scale, encoder(), image_size)


IMAGES = normal(3, 1, 8, 8, seed=4)


@pytest.mark.parametrize("scale", [0.18215, 1.0, 2.5])
def test_the_scale_is_applied_once_and_in_the_right_direction(scale):
    pipeline, noise = linear_pipeline(scale=scale), normal(3, 4, 4, 4, seed=5)
    clean = pipeline.encode(IMAGES)
    agree(clean, scale * (3 * patchify(IMAGES, 2) + 1), 1e-12)
    agree(pipeline.encode(IMAGES, noise), clean + scale * math.exp(-1) * noise, 1e-12)
    agree(pipeline.decode(clean), IMAGES, 1e-12)
    mean, log_variance = pipeline.vae.encode(IMAGES)
    agree(to_latents(mean, log_variance, noise, scale), pipeline.encode(IMAGES, noise), 1e-12)
    agree(from_latents(pipeline.vae.decode, clean, scale), IMAGES, 1e-12)


@pytest.mark.parametrize("scale", [0.18215, 1.0, 2.5])
def test_what_is_drawn_is_divided_by_the_scale_before_it_is_decoded(scale):
    denoiser = Constant(normal(1, 4, 4, 4, seed=9))
    pipeline = linear_pipeline(denoiser, scale)
    images = pipeline.text_to_image(PROMPTS, w=1.0, steps=5, generator=seeded())
    agree(images, unpatchify((denoiser.x_0 / scale - 1) / 3, 2).expand(3, -1, -1, -1), 1e-10)


def test_a_scale_of_one_over_the_standard_deviation_gives_latents_of_standard_deviation_1():
    images, noise = normal(64, 1, 8, 8), normal(64, 4, 4, 4, seed=1)
    std = math.sqrt(9 + math.exp(-2))
    assert abs(linear_pipeline(scale=1 / std).encode(images, noise).std() - 1) < 0.05


def test_decoding_is_not_clipped_and_draws_nothing():
    pipeline = linear_pipeline()
    images = pipeline.decode(pipeline.encode(5 * IMAGES))
    agree(images, 5 * IMAGES, 1e-12)
    assert images.abs().max() > 1


# The frozen VAE


class MovingVAE(LinearVAE):
    """A VAE that would change if it were trained: with dropout, and with statistics of its batches."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(1, dtype=torch.float64), nn.Dropout(0.5)

    def encode(self, x):
        return super().encode(self.dropout(self.norm(x)))


def test_the_vae_is_frozen_and_in_evaluation_mode_whatever_is_called():
    pipeline = LatentDiffusion(MovingVAE().train(), text_unet(context_dim=6), DIFFUSION, 0.5, encoder(), 8)
    for mode in (pipeline, pipeline.train(), pipeline.eval(), pipeline.train(True)):
        assert not any(module.training for module in mode.vae.modules())
        assert not any(parameter.requires_grad for parameter in mode.vae.parameters())
    assert pipeline.training and pipeline.denoiser.training and pipeline.text_encoder.training
    assert not pipeline.train(False).denoiser.training
    assert any(parameter.requires_grad for parameter in pipeline.denoiser.parameters())


def test_the_vae_is_bit_identical_after_training():
    pipeline = LatentDiffusion(MovingVAE(), text_unet(context_dim=6), DIFFUSION, 0.5, encoder(), 8)
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    optimizer = torch.optim.AdamW(pipeline.train().parameters(), 1e-2, weight_decay=0.1)
    model = TextDenoiser(pipeline.denoiser, pipeline.text_encoder, 4).double()
    t = torch.tensor([3, 50, 99])
    tokens = pipeline.text_encoder.tokenizer(PROMPTS)
    for step in range(3):
        x_0 = pipeline.encode(IMAGES, normal(3, 4, 4, 4, seed=step))
        optimizer.zero_grad()
        noise = normal(3, 4, 4, 4, seed=7)
        DIFFUSION.loss(lambda z_t, t: model(z_t, t, tokens)[0], x_0, t, noise).backward()
        optimizer.step()
    after = pipeline.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"denoiser", "text_encoder"}


# Text to image

DIFFUSION = Diffusion(linear_betas(100), "v")


def small_pipeline(diffusion=DIFFUSION, dtype=torch.float64):
    """A pipeline of the chapter's parts with random weights, in which every part matters."""
    settings = {
        "vae": {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1},
        "unet": SMALL,
        "attention": {"head_dim": 4},
        "text": TEXT,
        "words": list(WORDS),
        "length": 7,
        "schedule": "cosine",
        "diffusion_steps": 100,
        "prediction": "v",
        "latent_scale": 0.7,
        "image_size": 16,
    }
    torch.manual_seed(0)
    pipeline = perturbed(LatentDiffusion.from_settings(settings), dtype).eval()
    pipeline.diffusion = diffusion
    return pipeline


@pytest.mark.parametrize("w", [2.0, 0.5, -0.3])
def test_guidance_is_against_the_empty_caption(w):
    pipeline = small_pipeline()
    z_t, t = normal(3, 4, 4, 4), torch.tensor([3, 50, 99])
    conds = [pipeline.text_encoder(pipeline.text_encoder.tokenizer(texts)) for texts in (PROMPTS, [""] * 3)]
    told, untold = (pipeline.denoiser(z_t, t, cond) for cond in conds)
    agree(pipeline.guided(PROMPTS, w)(z_t, t), (1 + w) * told - w * untold, 1e-10)
    assert not torch.isclose(told, untold).any()


@pytest.mark.parametrize("negative", ["a blue ring", ["a blue ring"] * 3])
def test_a_negative_prompt_takes_the_place_of_the_empty_caption(negative):
    pipeline = small_pipeline()
    z_t, t = normal(3, 4, 4, 4), torch.tensor([3, 50, 99])
    told, unwanted = (
        pipeline.denoiser(z_t, t, pipeline.condition(texts)) for texts in (PROMPTS, ["a blue ring"] * 3)
    )
    agree(pipeline.guided(PROMPTS, 1.5, negative)(z_t, t), 2.5 * told - 1.5 * unwanted, 1e-10)


def test_text_to_image_by_hand():
    """The whole way, written out: tokens, noise, DDIM in v-prediction with guidance, scale, decoder."""
    pipeline, w = small_pipeline(), 1.5
    images = pipeline.text_to_image(PROMPTS, w=w, steps=4, generator=seeded(3), progress=False)
    alpha_bar = (1 - linear_betas(100)).cumprod(0)
    tokens = pipeline.text_encoder.tokenizer
    conds = [pipeline.text_encoder(tokens(texts)) for texts in (PROMPTS, ["", "", ""])]
    z = torch.randn(3, 4, 4, 4, generator=seeded(3), dtype=torch.float64)
    for t, before in ((99, 66), (66, 33), (33, 0), (0, None)):
        kept, next_kept = alpha_bar[t], 1.0 if before is None else alpha_bar[before]
        told, untold = (pipeline.denoiser(z, torch.full((3,), t), cond) for cond in conds)
        v = told + w * (told - untold)
        x_0, eps = kept**0.5 * z - (1 - kept) ** 0.5 * v, kept**0.5 * v + (1 - kept) ** 0.5 * z
        z = next_kept**0.5 * x_0 + (1 - next_kept) ** 0.5 * eps
    agree(images, pipeline.vae.decode(z / 0.7).detach(), 1e-8)


def test_every_step_asks_once_for_both_halves_with_the_steps_of_the_original_schedule():
    denoiser = Constant(normal(1, 4, 4, 4))
    pipeline = linear_pipeline(denoiser)
    pipeline.text_to_image(PROMPTS, w=2.0, steps=4)
    assert [(len(z_t), t.tolist()) for z_t, t, _ in denoiser.calls] == [
        (6, [step] * 6) for step in (99, 66, 33, 0)
    ]
    z_t, _, cond = denoiser.calls[0]
    agree(z_t[:3], z_t[3:], 0.0)
    agree(cond["mask"].sum(1), torch.tensor([5, 4, 3, 2, 2, 2]), 0)
    denoiser.calls.clear()
    pipeline.text_to_image(PROMPTS, w=0.0, steps=4)
    assert [len(z_t) for z_t, _, _ in denoiser.calls] == [3, 3, 3, 3]


def test_w_of_minus_1_knows_no_prompt():
    pipeline = small_pipeline()
    one, other = (
        pipeline.text_to_image(texts, w=-1.0, steps=3, generator=seeded())
        for texts in (PROMPTS, ["blue", "blue", "a star"])
    )
    agree(one, other, 1e-10)


def test_prompts_matter_and_so_do_weights_steps_and_seeds():
    pipeline = small_pipeline()
    draw = partial(pipeline.text_to_image, w=1.0, steps=3)
    images = draw(PROMPTS, generator=seeded())
    agree(images, draw(PROMPTS, generator=seeded()), 0.0)
    for other in (
        draw(["a blue star", "a ring", "red"], generator=seeded())[::2],
        draw(PROMPTS, w=2.0, generator=seeded())[::2],
        draw(PROMPTS, steps=4, generator=seeded())[::2],
        draw(PROMPTS, generator=seeded(1))[::2],
        draw(PROMPTS, generator=seeded(), negative_prompt="a star")[::2],
    ):
        assert not torch.isclose(other, images[::2]).any()
    agree(draw(["a blue star", "a ring", "red"], generator=seeded())[1], images[1], 1e-10)


def test_with_a_seed_each_an_image_does_not_depend_on_its_batch():
    pipeline = small_pipeline()
    draw = partial(pipeline.text_to_image, w=1.0, steps=3)
    together = draw(PROMPTS, generator=[seeded(seed) for seed in (5, 6, 7)])
    for row, seed in enumerate((5, 6, 7)):
        agree(draw(PROMPTS[row], generator=[seeded(seed)]), together[row : row + 1], 1e-10)
        agree(draw(PROMPTS[row : row + 1], generator=seeded(seed)), together[row : row + 1], 1e-10)
    same = draw([PROMPTS[0]] * 2, generator=[seeded(5), seeded(5)])
    agree(same[0], same[1], 1e-10)


def test_the_noise_comes_from_the_generators_alone():
    like = normal(1, dtype=torch.float32)
    noise = initial_noise((2, 4, 3, 3), seeded(3), like)
    agree(noise, torch.randn(2, 4, 3, 3, generator=seeded(3)), 0.0)
    by_two = initial_noise((2, 4, 3, 3), [seeded(3), seeded(4)], like)
    agree(by_two, torch.stack([torch.randn(4, 3, 3, generator=seeded(seed)) for seed in (3, 4)]), 0.0)
    pipeline, state = small_pipeline(), torch.get_rng_state()
    pipeline.text_to_image(PROMPTS, steps=2, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    pipeline.text_to_image(PROMPTS, steps=2)  # without one, torch's own
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_everything_works_in_every_mode_and_leaves_no_graph(mode):
    pipeline = small_pipeline()
    x, hole = normal(3, 3, 16, 16), torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    hole[:, :, :8] = True
    ways = (
        partial(pipeline.text_to_image, PROMPTS, w=1.0, steps=3),
        partial(pipeline.image_to_image, x, PROMPTS, 0.6, w=1.0, steps=3),
        partial(pipeline.inpaint, x, hole, PROMPTS, w=1.0, steps=3),
    )
    for way in ways:
        with mode():
            images = way(generator=seeded())
        assert not images.requires_grad
        agree(images.clone(), way(generator=seeded()), 1e-12)
    assert all(parameter.grad is None for parameter in pipeline.parameters())


def test_training_mode_draws_the_same():
    pipeline = small_pipeline()
    expected = pipeline.text_to_image(PROMPTS, steps=2, generator=seeded())
    agree(pipeline.train().text_to_image(PROMPTS, steps=2, generator=seeded()), expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_have_the_dtype_of_the_parts(dtype):
    images = small_pipeline(dtype=dtype).text_to_image(PROMPTS, steps=2)
    assert images.dtype == dtype and images.shape == (3, 3, 16, 16) and images.isfinite().all()


def test_a_pipeline_draws_on_the_device_of_its_parts():
    pipeline = small_pipeline(dtype=torch.float32)
    x, hole = normal(3, 3, 16, 16, dtype=torch.float32), torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    hole[:, :, :8] = True
    options = {"w": 1.0, "steps": 2}
    expected = [
        pipeline.text_to_image(PROMPTS, generator=seeded(), **options),
        pipeline.image_to_image(x, PROMPTS, 0.5, generator=seeded(), **options),
        pipeline.inpaint(x, hole, PROMPTS, generator=seeded(), **options),
    ]
    with simulated_device():
        there = pipeline.to(SIMULATED)
        x, hole = x.to(SIMULATED), hole.to(SIMULATED)
        drawn = [
            there.text_to_image(PROMPTS, generator=seeded(), **options),
            there.image_to_image(x, PROMPTS, 0.5, generator=seeded(), **options),
            there.inpaint(x, hole, PROMPTS, generator=seeded(), **options),
        ]
        drawn = [values_of(images) for images in drawn]
    for one, other in zip(drawn, expected, strict=True):
        agree(one, other, 1e-4)


def test_calling_the_pipeline_gives_pictures():
    pipeline = small_pipeline()
    tensor = pipeline(PROMPTS, steps=2, w=0.5, generator=seeded(), output="tensor")
    agree(tensor, pipeline.text_to_image(PROMPTS, w=0.5, steps=2, generator=seeded()), 0.0)
    pictures = pipeline(PROMPTS, steps=2, w=0.5, generator=seeded())
    assert [picture.size for picture in pictures] == [(16, 16)] * 3
    assert pictures == to_pil(tensor) and pictures[0].mode == "RGB"
    (one,) = pipeline("a red star", steps=2, negative_prompt="a ring")
    assert isinstance(one, Image.Image)


def test_pictures_have_256_levels_and_are_clipped():
    levels = torch.tensor([-1.7, -1.0, 0.0, 1.0, 3.0, 0.5])
    (grey,) = to_pil(levels.view(1, 1, 2, 3))
    assert grey.mode == "L" and list(grey.tobytes()) == [0, 0, 128, 255, 255, 191]
    colour = torch.stack([torch.full((2, 3), level) for level in (-1.0, 0.0, 1.0)])
    (picture,) = to_pil(colour[None])
    assert picture.size == (3, 2) and picture.getpixel((2, 1)) == (0, 128, 255)


# From a picture to a picture


def test_strength_0_gives_the_reconstruction_whatever_is_asked_for():
    pipeline, x = small_pipeline(), normal(3, 3, 16, 16)
    expected = pipeline.vae.decode(pipeline.vae.encode(x)[0])
    for texts, seed in ((PROMPTS, 0), (["blue"] * 3, 1)):
        agree(pipeline.image_to_image(x, texts, 0.0, steps=4, generator=seeded(seed)), expected, 1e-12)


def test_strength_1_is_text_to_image_from_the_same_noise():
    # the cosine schedule leaves hardly anything of the picture at its last step
    pipeline = small_pipeline(Diffusion(cosine_betas(1000), "v"))
    x, other = normal(3, 3, 16, 16), normal(3, 3, 16, 16, seed=1)
    expected = pipeline.text_to_image(PROMPTS, w=1.0, steps=4, generator=seeded())
    for images in (x, other):
        drawn = pipeline.image_to_image(images, PROMPTS, 1.0, w=1.0, steps=4, generator=seeded())
        agree(drawn, expected, 2e-3)


@pytest.mark.parametrize(
    ("strength", "steps"),
    [
        (0.1, []),
        (0.2, [0]),
        (0.42, [8, 0]),
        (0.58, [16, 8, 0]),
        (0.8, [24, 16, 8, 0]),
        (1.0, [32, 24, 16, 8, 0]),
    ],
)
def test_strength_is_the_share_of_the_steps_that_are_taken(strength, steps):
    denoiser = Constant(normal(1, 4, 4, 4))
    pipeline = linear_pipeline(denoiser, num_steps=33)  # five steps: 0, 8, 16, 24, 32
    pipeline.image_to_image(IMAGES, PROMPTS, strength, w=0.0, steps=5, generator=seeded())
    assert [t[0].item() for _, t, _ in denoiser.calls] == steps
    if not steps:
        return
    kept = (1 - linear_betas(33)).cumprod(0)[steps[0]]
    noise = torch.randn(3, 4, 4, 4, generator=seeded(), dtype=torch.float64)
    expected = kept.sqrt() * pipeline.encode(IMAGES) + (1 - kept).sqrt() * noise
    agree(denoiser.calls[0][0], expected, 1e-12)


def test_image_to_image_by_hand():
    pipeline, x, w = small_pipeline(), normal(3, 3, 16, 16), 1.5
    images = pipeline.image_to_image(x, PROMPTS, 0.5, w=w, steps=4, generator=seeded(3))
    alpha_bar = (1 - linear_betas(100)).cumprod(0)
    conds = [pipeline.condition(texts) for texts in (PROMPTS, ["", "", ""])]
    noise = torch.randn(3, 4, 4, 4, generator=seeded(3), dtype=torch.float64)
    z = alpha_bar[33] ** 0.5 * 0.7 * pipeline.vae.encode(x)[0] + (1 - alpha_bar[33]) ** 0.5 * noise
    for t, kept, next_kept in ((33, alpha_bar[33], alpha_bar[0]), (0, alpha_bar[0], 1.0)):
        told, untold = (pipeline.denoiser(z, torch.full((3,), t), cond) for cond in conds)
        v = (1 + w) * told - w * untold
        x_0, eps = kept**0.5 * z - (1 - kept) ** 0.5 * v, kept**0.5 * v + (1 - kept) ** 0.5 * z
        z = next_kept**0.5 * x_0 + (1 - next_kept) ** 0.5 * eps
    agree(images, pipeline.vae.decode(z / 0.7).detach(), 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_draws_in_half_precision(dtype):
    """Steps are computed in single precision, so that only what the networks round makes a difference."""
    pipeline, options = small_pipeline(dtype=torch.float32), {"w": 1.0, "steps": 20}
    drawn = pipeline.text_to_image(PROMPTS, generator=seeded(), **options)
    rounded = pipeline.to(dtype).text_to_image(PROMPTS, generator=seeded(), **options)
    assert rounded.dtype == dtype
    assert (rounded.float() - drawn).abs().mean() < 10 * torch.finfo(dtype).eps * drawn.std()


def test_image_to_image_does_not_depend_on_the_batch():
    pipeline, x = small_pipeline(), normal(3, 3, 16, 16)
    draw = partial(pipeline.image_to_image, strength=0.7, w=1.0, steps=4)
    together = draw(x, PROMPTS, generator=[seeded(seed) for seed in (5, 6, 7)])
    agree(draw(x[1:2], PROMPTS[1], generator=[seeded(6)]), together[1:2], 1e-10)


# Inpainting


def hole(images, rows=slice(None), columns=slice(None)):
    """A mask (B, 1, H, W) that is True in a part of the images."""
    is_unknown = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.bool)
    is_unknown[:, :, rows, columns] = True
    return is_unknown


def test_inpainting_keeps_the_known_pixels_exactly():
    pipeline, x = small_pipeline(), normal(3, 3, 16, 16)
    is_unknown = hole(x, slice(3, 9), slice(5, 14))
    is_unknown[1] = ~is_unknown[1]
    images = pipeline.inpaint(x, is_unknown, PROMPTS, w=1.0, steps=3, generator=seeded())
    kept = ~is_unknown.expand_as(x)
    assert torch.equal(images[kept], x[kept])
    assert not torch.isclose(images[~kept], x[~kept]).any()


def test_inpainting_of_everything_is_text_to_image_and_of_nothing_the_picture():
    pipeline, x = small_pipeline(), normal(3, 3, 16, 16)
    draw = partial(pipeline.inpaint, x, prompts=PROMPTS, w=1.0, steps=3)
    everything = draw(is_unknown=hole(x), generator=seeded())
    agree(everything, pipeline.text_to_image(PROMPTS, w=1.0, steps=3, generator=seeded()), 1e-12)
    nothing = draw(is_unknown=hole(x, slice(0, 0)), generator=seeded())
    assert torch.equal(nothing, x)


def test_known_latents_are_as_noisy_as_their_step_and_a_latent_is_known_if_all_its_pixels_are():
    denoiser = Constant(normal(1, 4, 4, 4))
    pipeline = linear_pipeline(denoiser, num_steps=33)
    is_unknown = hole(IMAGES, slice(2, 5), slice(3, 4))  # latents are 2 x 2 pixels: rows 1, 2, column 1
    is_known = torch.ones(4, 4, dtype=torch.bool)
    is_known[1:3, 1] = False
    pipeline.inpaint(IMAGES, is_unknown, PROMPTS, w=0.0, steps=5, generator=seeded())
    noise = torch.randn(3, 4, 4, 4, generator=seeded(), dtype=torch.float64)
    alpha_bar = (1 - linear_betas(33)).cumprod(0)
    assert [t[0].item() for _, t, _ in denoiser.calls] == [32, 24, 16, 8, 0]
    for z_t, t, _ in denoiser.calls:
        kept = alpha_bar[t[0]]
        given = pipeline.encode(IMAGES.masked_fill(is_unknown, 0))
        noisy = kept.sqrt() * given + (1 - kept).sqrt() * noise
        agree(z_t[:, :, is_known], noisy[:, :, is_known], 1e-12)
    assert not torch.isclose(z_t[:, :, ~is_known], noisy[:, :, ~is_known]).any()


def test_inpainting_changes_with_what_is_around_and_with_the_prompt():
    pipeline, x = small_pipeline(), normal(1, 3, 16, 16)
    is_unknown = hole(x, slice(4, 8), slice(4, 8))
    draw = partial(pipeline.inpaint, w=1.0, steps=3)
    images = draw(x, is_unknown, "a red star", generator=seeded())
    for other in (
        draw(x + 0.5, is_unknown, "a red star", generator=seeded()),
        draw(x, is_unknown, "a blue ring", generator=seeded()),
    ):
        assert not torch.isclose(other[:, :, 4:8, 4:8], images[:, :, 4:8, 4:8]).any()


def test_inpainting_does_not_see_what_is_hidden():
    pipeline, x = small_pipeline(), normal(1, 3, 16, 16)
    is_unknown = hole(x, slice(4, 9), slice(3, 8))
    other = torch.where(is_unknown, 1 - x, x)
    draw = partial(pipeline.inpaint, is_unknown=is_unknown, prompts="a red star", w=1.0, steps=3)
    assert torch.equal(draw(x, generator=seeded()), draw(other, generator=seeded()))


def test_inpainting_does_not_depend_on_the_batch():
    pipeline, x = small_pipeline(), normal(3, 3, 16, 16)
    is_unknown = hole(x, slice(4, 12))
    draw = partial(pipeline.inpaint, w=1.0, steps=3)
    together = draw(x, is_unknown, PROMPTS, generator=[seeded(seed) for seed in (5, 6, 7)])
    agree(draw(x[1:2], is_unknown[1:2], PROMPTS[1], generator=[seeded(6)]), together[1:2], 1e-10)


def test_keep_known_of_known_numbers():
    z_t, known, noise = torch.full((1, 1, 1, 2), 5.0), torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0)
    is_known = torch.tensor([True, False]).view(1, 1, 1, 2)
    kept = keep_known(z_t, known, is_known, torch.full((1, 1, 1, 1), 0.64), noise)
    agree(kept, torch.tensor([0.8 + 0.6 * 2, 5.0]).view(1, 1, 1, 2), 1e-6)


# Into a folder and back


@pytest.fixture
def folder(tmp_path):
    small_pipeline(dtype=torch.float32).save(tmp_path / "new" / "pipeline")
    return tmp_path / "new" / "pipeline"


def test_a_pipeline_is_loaded_onto_the_cpu_whatever_the_default_device(folder):
    expected = LatentDiffusion.load(folder).state_dict()
    with torch.device("meta"):
        found = LatentDiffusion.load(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_saved_and_loaded_pipeline_gives_identical_images(folder):
    pipeline, loaded = small_pipeline(dtype=torch.float32), LatentDiffusion.load(folder)
    pipeline.diffusion = loaded.diffusion  # the one that its settings name
    agree(loaded.diffusion.alpha_bar, (1 - cosine_betas(100)).cumprod(0), 1e-12)
    options = {"w": 1.0, "steps": 3}
    agree(
        loaded.text_to_image(PROMPTS, generator=seeded(), **options),
        pipeline.text_to_image(PROMPTS, generator=seeded(), **options),
        0.0,
    )
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.latent_scale, loaded.image_size) == (0.7, 16)
    assert loaded.diffusion.prediction == "v" and not loaded.diffusion.clip
    assert sorted(file.name for file in folder.iterdir()) == [
        "denoiser.safetensors",
        "pipeline.json",
        "text_encoder.safetensors",
        "vae.safetensors",
    ]


def test_a_loaded_pipeline_can_be_saved_again(folder, tmp_path):
    LatentDiffusion.load(folder).save(tmp_path / "copy")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_a_pipeline_is_written_as_it_always_was(folder):
    """So that what was saved by any version can be loaded: the files spelled out."""
    pipeline, hashes = small_pipeline(dtype=torch.float32), {}
    for part in ("vae", "denoiser", "text_encoder"):
        content = save({k: v.contiguous() for k, v in getattr(pipeline, part).state_dict().items()})
        assert (folder / f"{part}.safetensors").read_bytes() == content
        hashes[part] = hashlib.sha256(content).hexdigest()
    settings = json.dumps(pipeline.settings, sort_keys=True)
    hashes["settings"] = hashlib.sha256(settings.encode()).hexdigest()
    description = json.loads((folder / "pipeline.json").read_text())
    assert description == {"settings": json.loads(settings), "sha256": hashes}


def test_a_compiled_pipeline_is_saved_as_the_plain_one(tmp_path, monkeypatch):
    """And ~ is the home folder, for saving and for loading."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pipeline = small_pipeline(dtype=torch.float32)
    expected = pipeline.state_dict()
    pipeline.denoiser = torch.compile(pipeline.denoiser, backend="eager")
    pipeline.vae.encoder = torch.compile(pipeline.vae.encoder, backend="eager")
    pipeline.save("~/pipe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]
    loaded = LatentDiffusion.load("~/pipe").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_weights_in_half_precision_are_loaded_as_they_were_saved(tmp_path):
    pipeline = small_pipeline(dtype=torch.float32).half()
    pipeline.save(tmp_path)
    loaded = LatentDiffusion.load(tmp_path).state_dict()
    for name, value in pipeline.state_dict().items():
        agree(loaded[name], value.float(), 0.0)


@pytest.mark.parametrize("part", ["vae", "denoiser", "text_encoder"])
def test_a_damaged_file_is_refused(folder, part):
    file = folder / f"{part}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part}.safetensors is not what was saved"):
        LatentDiffusion.load(folder)


@pytest.mark.parametrize("name", ["vae.safetensors", "denoiser.safetensors", "pipeline.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"folder must hold a saved pipeline.*{name}"):
        LatentDiffusion.load(folder)


def test_files_of_another_pipeline_are_refused(folder, tmp_path):
    other = small_pipeline(dtype=torch.float32)
    with torch.no_grad():
        other.denoiser.stem.bias += 1
    other.save(tmp_path / "other")
    (folder / "denoiser.safetensors").write_bytes((tmp_path / "other" / "denoiser.safetensors").read_bytes())
    with pytest.raises(ValueError, match="denoiser.safetensors is not what was saved: its SHA-256"):
        LatentDiffusion.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description.pop("sha256"),
        lambda description: description.pop("settings"),
        lambda description: description.update(sha256=3),
        lambda description: description.update(settings=[]),
        lambda description: description["settings"].pop("latent_scale"),
        lambda description: description["settings"].update(latent_scale=7.0),
        lambda description: description["settings"].update(latent_scale="wide"),
        lambda description: description["settings"]["unet"].update(base_channels=16),
        lambda description: description["settings"]["words"].pop(),
    ],
)
def test_a_changed_description_is_refused(folder, change):
    file = folder / "pipeline.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="pipeline"):
        LatentDiffusion.load(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{"])
def test_a_description_that_is_none_is_refused(folder, content):
    (folder / "pipeline.json").write_text(content)
    with pytest.raises(ValueError, match="folder must hold a saved pipeline"):
        LatentDiffusion.load(folder)


def test_a_pipeline_put_together_by_hand_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="only a pipeline made by from_settings or load can be saved"):
        linear_pipeline().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Other people's networks


@pytest.fixture(scope="module")
def theirs():
    """diffusers' autoencoder and U-Net, of random weights, as small as they come."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return perturbed(vae).eval(), perturbed(unet).eval()


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_networks_of_diffusers_drive_through_the_same_sampler(theirs, prediction):
    """Held against a loop with diffusers' own scheduler, in double precision."""
    vae, unet = theirs
    betas, w, text_encoder = linear_betas(50), 1.5, encoder()
    pipeline = LatentDiffusion(
        DiffusersVAE(vae), DiffusersDenoiser(unet), Diffusion(betas, prediction), 0.18215, text_encoder, 16
    )
    images = pipeline.text_to_image(PROMPTS, w=w, steps=50, generator=seeded(), progress=False)

    scheduler = DDIMScheduler(
        num_train_timesteps=50,
        trained_betas=betas.tolist(),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(50)
    told, untold = (text_encoder(text_encoder.tokenizer(texts)) for texts in (PROMPTS, [""] * 3))
    z = torch.randn(3, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond_output, null_output = (
                unet(z, t, cond["context"], encoder_attention_mask=cond["mask"]).sample
                for cond in (told, untold)
            )
            output = null_output + (1 + w) * (cond_output - null_output)
            z = scheduler.step(output, t, z, eta=0.0).prev_sample
        expected = vae.decode(z / 0.18215).sample
    agree(images, expected, 1e-7)
    assert not torch.isclose(images[0], images[1]).all()


def test_autoencoder_of_diffusers_behind_our_interface(theirs):
    vae, x = DiffusersVAE(theirs[0]), normal(2, 3, 16, 16)
    assert (vae.in_channels, vae.latent_channels, vae.factor) == (3, 4, 2)
    mean, log_variance = vae.encode(x)
    distribution = theirs[0].encode(x).latent_dist
    agree(mean, distribution.mean, 0.0)
    agree(log_variance, distribution.logvar, 0.0)
    agree(vae.decode(mean), theirs[0].decode(mean).sample, 0.0)


def test_unet_of_diffusers_minds_text_and_mask(theirs):
    denoiser, z_t, t = DiffusersDenoiser(theirs[1]), normal(3, 4, 8, 8), torch.tensor([3, 50, 99])
    context = normal(3, 7, 6)
    output = denoiser(z_t, t, {"context": context, "mask": MASK})
    loud = torch.where(MASK[:, :, None], context, 3.0)
    agree(denoiser(z_t, t, {"context": loud, "mask": MASK}), output, 1e-10)
    everything = torch.ones_like(MASK)
    assert not torch.isclose(denoiser(z_t, t, {"context": context, "mask": everything})[0], output[0]).all()


def test_pictures_of_diffusers_networks_from_pictures(theirs):
    pipeline = LatentDiffusion(
        DiffusersVAE(theirs[0]), DiffusersDenoiser(theirs[1]), DIFFUSION, 0.18215, encoder(), 16
    )
    x = normal(3, 3, 16, 16)
    assert pipeline.image_to_image(x, PROMPTS, 0.5, steps=4).isfinite().all()
    is_unknown = hole(x, slice(3, 9))
    images = pipeline.inpaint(x, is_unknown, PROMPTS, steps=3)
    assert torch.equal(images[:, :, 9:], x[:, :, 9:])


class StubTokenizer:
    """What CLIPTokenizer does, with letters for tokens: begin, the letters, end, and padding with the end."""

    model_max_length = 9

    def __call__(self, texts, padding, max_length):
        rows = [[1, *(ord(letter) % 30 + 3 for letter in text), 2] for text in texts]
        assert padding == "max_length"
        return {"input_ids": [row + [2] * (max_length - len(row)) for row in rows]}

    @classmethod
    def from_pretrained(cls, name, subfolder):
        assert subfolder == "tokenizer"
        return cls()


class StubTextModel(nn.Module):
    """Tokens to features, as CLIPTextModel gives them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(40, 6, dtype=torch.float64)

    def forward(self, tokens):
        return SimpleNamespace(last_hidden_state=self.table(tokens))

    @classmethod
    def from_pretrained(cls, name, subfolder):
        assert subfolder == "text_encoder"
        return cls()


def test_text_model_of_transformers_behind_our_interface():
    text_encoder = TransformersText(StubTokenizer(), StubTextModel())
    tokens = text_encoder.tokenizer(["star", ""])
    assert tokens.shape == (2, 9) and tokens.dtype == torch.int64
    cond = text_encoder(tokens)
    agree(cond["context"], text_encoder.model.table(tokens), 0.0)
    assert cond["mask"].all() and cond["mask"].shape == (2, 9)
    with pytest.raises(ValueError, match="at most 9 tokens; got 10 in 'crescent'"):
        text_encoder.tokenizer(["star", "crescent"])


@pytest.fixture
def with_transformers(monkeypatch):
    stub = SimpleNamespace(CLIPTokenizer=StubTokenizer, CLIPTextModel=StubTextModel)
    monkeypatch.setitem(sys.modules, "transformers", stub)


def test_a_pretrained_model_is_loaded_from_a_folder(theirs, with_transformers, tmp_path):
    vae, unet = theirs
    vae.save_pretrained(tmp_path / "vae")
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler(
        num_train_timesteps=40, beta_schedule="scaled_linear", beta_end=0.5, prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "scheduler")
    pipeline = load_stable_diffusion(str(tmp_path)).double()
    assert (pipeline.latent_scale, pipeline.image_size, pipeline.diffusion.prediction) == (0.18215, 16, "v")
    betas = torch.linspace(1e-4**0.5, 0.5**0.5, 40, dtype=torch.float64) ** 2
    agree(pipeline.diffusion.alpha_bar, (1 - betas).cumprod(0), 1e-5)
    by_hand = LatentDiffusion(
        DiffusersVAE(vae),
        DiffusersDenoiser(unet),
        pipeline.diffusion,
        0.18215,
        TransformersText(StubTokenizer(), StubTextModel()),
        16,
    )
    draw = {"prompts": ["star", "ring"], "w": 2.0, "steps": 3}
    images = pipeline.text_to_image(generator=seeded(), **draw)
    agree(images, by_hand.text_to_image(generator=seeded(), **draw), 1e-3)
    assert not pipeline.training and images.shape == (2, 3, 16, 16)


def test_a_pretrained_model_that_is_not_there(with_transformers, tmp_path):
    with pytest.raises(ValueError, match="could not be read or downloaded"):
        load_stable_diffusion(str(tmp_path))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install diffusers transformers"):
        load_stable_diffusion()


# The recipe

TINY_VAE = {"base_channels": 8, "channel_multipliers": (1, 2), "num_blocks": 1}
CAPTIONS = (
    "a small red star on a striped background",
    "a small red star to the left of a large blue ring on a dark background",
    "a large pink heart above a small cyan cross on a checkered background",
)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A data folder with an untrained VAE 'tiny_vae', whose latents have the scale 1.7, as its card says."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setenv("LECTURE26_DATA", str(folder))
        patch.setattr(latent, "EVALUATION_BATCHES", 2)
        patch.setattr(latent, "EVALUATION_IMAGES", 8)
        recipe = replace(recipes.find_recipe("vae_shapes64"), model=TINY_VAE)
        torch.manual_seed(0)
        weights = perturbed(recipe.build(), torch.float32).state_dict()
        card = {"recipe": recipe.family, "settings": recipe.settings(), "command": "", "data": "", "steps": 0}
        save_checkpoint("tiny_vae", weights, card | {"seconds": 0, "metrics": {"latent_scale": 1.7}})
        yield folder


@pytest.fixture(scope="module")
def unfitted(data_folder):
    return replace(
        recipes.find_recipe("text_to_image_shapes64"),
        name="tiny_text",
        vae="tiny_vae",
        model=SMALL,
        attention={"head_dim": 4},
        text={"width": 8, "depth": 1},
        num_encoded=24,
        steps=5,
        batch_size=4,
        warmup_steps=2,
        precision="fp32",
    )


@pytest.fixture(scope="module")
def images(unfitted):
    return unfitted.load_images("train")


@pytest.fixture(scope="module")
def recipe(unfitted, images):
    return unfitted.fitted_to(images)


def draws(count, seed=0):
    return SampleDraws(seed, torch.arange(count))


def test_recipe_takes_scale_and_settings_from_the_card_of_its_vae(recipe):
    assert recipe.latent_scale == 1.7
    assert recipe.vae_model == {"in_channels": 3, **TINY_VAE, "channel_multipliers": [1, 2]}
    pipeline = recipe.pipeline(recipe.build())
    assert (pipeline.latent_scale, pipeline.image_size) == (1.7, 64)
    for name, value in recipes.load_model("tiny_vae").state_dict().items():
        agree(pipeline.vae.state_dict()[name], value, 0.0)
    agree(pipeline.diffusion.alpha_bar, (1 - cosine_betas(1000)).cumprod(0), 1e-12)
    assert pipeline.diffusion.prediction == "v" and not pipeline.diffusion.clip


def test_recipe_knows_the_words_of_every_split_and_has_room_for_every_caption(unfitted, recipe):
    for split in ("train", "test", "held_out"):
        captions = unfitted.load_images(split).images.captions(range(2000))
        tokens = recipe.tokenizer([*captions, ""])
        assert tokens.shape == (2001, recipe.length)
    assert set(" ".join(CAPTIONS).split()) < set(recipe.words)


def test_settings_make_the_recipe_again(recipe):
    again = type(recipe)(**json.loads(json.dumps(recipe.settings())))
    torch.manual_seed(0)
    one = recipe.build()
    torch.manual_seed(0)
    other = again.build()
    for (name, value), (other_name, other_value) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name
        agree(value, other_value, 0.0)
    agree(again.tokenizer(CAPTIONS), recipe.tokenizer(CAPTIONS), 0)


def test_the_vae_is_no_part_of_what_is_trained(recipe):
    parts = {name.partition(".")[0] for name in recipe.build().state_dict()}
    assert parts == {"unet", "text_encoder", "side"}
    own = replace(recipes.find_recipe("text_to_image_shapes64"), vae_model={}, latent_scale=1.0)
    size = sum(parameter.numel() for parameter in replace(own, words=recipe.words).build().parameters())
    assert size <= 3.5e6


def test_images_are_encoded_once_and_kept(images, monkeypatch):
    vae, x = recipes.load_model("tiny_vae"), images.batch([3, 0, 17])["image"]
    for kept, expected in zip(images.moments([3, 0, 17]), vae.encode(x), strict=True):
        agree(kept, expected, 2e-3)  # they are kept in half precision
        assert kept.dtype == torch.float32
    monkeypatch.setattr(recipes, "load_model", None)
    agree(images.moments([17])[0], vae.encode(x)[0][2:], 2e-3)
    assert len(images) == 24
    assert images.captions([3, 17]) == images.images.captions([3, 17])
    with pytest.raises(IndexError, match=r"index must be in 0, ..., 23; got 24"):
        images.moments([24])


def test_recipe_draws_by_the_numbers_of_the_samples(recipe, images):
    batch = recipe.draw(images, draws(40))
    again = recipe.draw(images, SampleDraws(0, torch.tensor([31, 6])))
    assert set(batch) == {"x_0", "tokens", "sides", "t", "noise"}
    for name, value in batch.items():
        agree(again[name], value[[31, 6]], 0.0)
    assert batch["x_0"].shape == (40, 4, 16, 16) and batch["tokens"].shape == (40, recipe.length)
    assert 0 <= batch["t"].min() and batch["t"].max() < 1000 and len(batch["t"].unique()) > 30
    assert not torch.isclose(batch["noise"], recipe.draw(images, draws(40, seed=1))["noise"]).all()


def test_recipe_scales_the_latents_it_draws(recipe, images):
    """Each draw of one image lies around its mean, with the encoder's spread; all of it times the scale."""
    pair = EncodedImages(images.images, "tiny_vae", 2)
    mean, log_variance = pair.moments([1])
    x_0 = replace(recipe, scenes=1.0).draw(pair, draws(400))["x_0"]
    spread = 1.7 * (log_variance[0] / 2).exp()
    assert ((x_0.mean(0) - 1.7 * mean[0]).abs() < 5 * spread / math.sqrt(400)).all()
    assert ((x_0.std(0) / spread - 1).abs() < 5 / math.sqrt(800)).all()


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_captions_are_dropped_at_the_rate_given_sample_by_sample(recipe, images, p):
    count = 2000
    tokens = replace(recipe, drop=p).draw(images, draws(count))["tokens"]
    empty = recipe.tokenizer([""])[0]
    dropped = (tokens == empty).all(dim=1)
    assert abs(dropped.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / count)
    for batch in dropped.view(-1, 100):
        assert 0 < batch.sum() < 100
    told = replace(recipe, drop=0.0).draw(images, draws(count))
    agree(tokens[~dropped], told["tokens"][~dropped], 0)
    assert not (told["tokens"] == empty).all(dim=1).any()
    assert (replace(recipe, drop=1.0).draw(images, draws(50))["tokens"] == empty).all()


def test_captions_lose_words_at_the_rate_given(recipe, images):
    count = 3000
    drawn = replace(recipe, drop=0.0, shorten=0.3)
    tokens = drawn.draw(images, draws(count))["tokens"]
    says_background = (tokens == recipe.tokenizer(["background"])[0, 1]).any(dim=1)
    assert abs(says_background.double().mean() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / count)
    whole = replace(drawn, shorten=0.0, drop=0.0).draw(images, draws(9))
    indices = drawn.draw_indices(images, draws(9))
    agree(whole["tokens"], recipe.tokenizer(images.captions(indices)), 0)


def test_sides_lie_at_the_nouns_of_what_is_told_and_nowhere_else(recipe, images):
    batch = replace(recipe, drop=0.3, shorten=0.3, scenes=0.5).draw(images, draws(60))
    empty = recipe.tokenizer([""])[0]
    for tokens, sides in zip(batch["tokens"], batch["sides"], strict=True):
        words = [recipe.tokenizer.words[token - 3] for token in tokens.tolist() if token > 2]
        expected = torch.full_like(sides, NO_SIDE)
        expected[1 : 1 + len(words)] = torch.tensor(noun_sides(" ".join(words)), dtype=torch.int64)
        agree(sides, expected, 0)
    assert (batch["tokens"] == empty).all(dim=1).any() and (batch["sides"] >= 0).any()


@pytest.mark.parametrize("scenes", [0.0, 0.3, 1.0])
def test_scenes_have_the_share_given_of_what_is_shown(recipe, images, scenes):
    count = 4000
    indices = replace(recipe, scenes=scenes).draw_indices(images, draws(count))
    is_scene = indices % 2 == 1
    assert abs(is_scene.double().mean() - scenes) <= 4 * math.sqrt(scenes * (1 - scenes) / count)
    for kind in (indices[is_scene], indices[~is_scene]):
        assert len(kind.unique()) in (0, 12)  # of either kind, each of the 24 images' twelve


def test_how_often_a_guess_is_wrong():
    z_a = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    z_b = z_a + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)  # 2 and 6 away
    shares = share_of_wrong_guesses(z_a, z_b, torch.tensor([0.5, 1e-12], dtype=torch.float64))
    by_hand = [[0.15865525393145707, 0.0013498980316300933], [0.5, 0.5]]  # Phi(-1), Phi(-3); all is noise
    agree(shares, torch.tensor(by_hand, dtype=torch.float64), 2e-6)


def test_all_steps_are_drawn_alike(recipe, images):
    t = torch.cat([recipe.draw(images, draws(100, seed))["t"] for seed in range(20)])
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < recipe.diffusion_steps
    for u in (0.2, 0.4, 0.6, 0.8, 0.9):
        share = (t < 1000 * u).double().mean().item()
        assert abs(share - u) < 4 * math.sqrt(u * (1 - u) / len(t))


def test_loss_of_the_recipe_by_hand(recipe, images):
    model = perturbed(recipe.build(), torch.float32)
    batch = recipe.draw(images, draws(4))
    kept = (1 - cosine_betas(1000)).cumprod(0)[batch["t"]].float()[:, None, None, None]
    z_t = kept.sqrt() * batch["x_0"] + (1 - kept).sqrt() * batch["noise"]
    v = kept.sqrt() * batch["noise"] - (1 - kept).sqrt() * batch["x_0"]
    cond = model.text_encoder(batch["tokens"])
    error = (model.unet(z_t, batch["t"], cond) - v).square().mean()
    agree(replace(recipe, lesson=0.0).loss(model, batch), error, 1e-4)
    log_shares = model.side(cond["context"]).log_softmax(dim=2)  # (4, L, 4)
    rows, places = (batch["sides"] >= 0).nonzero().T
    assert len(rows) > 0
    wrong = -log_shares[rows, places, batch["sides"][rows, places]].sum() / batch["sides"].numel()
    agree(recipe.loss(model, batch), error + 3 * wrong, 1e-4)


def test_images_for_captions_start_from_seeds_of_their_own(recipe):
    pipeline = recipe.pipeline(perturbed(recipe.build(), torch.float32))
    drawn = latent.draw_captions(pipeline, CAPTIONS, 1.0, 2, batch_size=2)
    for seed, caption in enumerate(CAPTIONS):
        alone = pipeline.text_to_image(caption, w=1.0, steps=2, generator=seeded(seed))
        agree(drawn[seed : seed + 1], alone, 1e-3)
    agree(latent.draw_captions(pipeline, CAPTIONS[2:], 1.0, 2, first_seed=2), drawn[2:], 1e-3)


def interrupted_at(step, monkeypatch):
    """Let the user press Ctrl-C while a step of the recipe draws its samples."""
    draw, begun = LatentDiffusionRecipe.draw, []

    def interrupted_draw(*arguments):
        begun.append(1)
        if len(begun) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(LatentDiffusionRecipe, "draw", interrupted_draw)


@pytest.mark.slow
def test_interrupted_training_ends_with_the_same_weights_and_leaves_the_vae_alone(unfitted, monkeypatch):
    vae_file, vae_card = checkpoint_files("tiny_vae")
    before = vae_file.read_bytes(), vae_card.read_bytes()
    whole = recipes.run(replace(unfitted, name="whole"), "a command")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(3, patch)
        recipes.run(replace(unfitted, name="stopped"), "a command")
    assert not checkpoint_files("stopped")[0].exists()
    stopped = recipes.run(replace(unfitted, name="stopped"), "a command")
    assert stopped["sha256"] == whole["sha256"]
    assert stopped["loss_curve"] == whole["loss_curve"] and whole["loss_curve"]["step"] == [1, 2, 3, 4, 5]
    assert stopped["metrics"] == whole["metrics"]
    assert set(whole["metrics"]) == {"test_loss", "test_loss_unconditional"}  # there are no readers here
    assert (vae_file.read_bytes(), vae_card.read_bytes()) == before


@pytest.fixture
def saved(recipe):
    """A checkpoint 'tiny_text' of random weights; gone after the test."""
    model = perturbed(recipe.build(), torch.float32)
    card = {"recipe": recipe.family, "settings": recipe.settings(), "command": "", "data": "", "steps": 0}
    save_checkpoint("tiny_text", model.state_dict(), card | {"seconds": 0, "metrics": {}})
    yield model
    for file in checkpoint_files("tiny_text"):
        file.unlink()


def test_the_pipeline_of_a_checkpoint(saved, recipe, tmp_path):
    pipeline = latent.load_pipeline("tiny_text")
    assert not pipeline.training and not any(parameter.requires_grad for parameter in pipeline.parameters())
    assert isinstance(recipes.load_model("tiny_text"), TextDenoiser)
    agree(recipes.load_diffusion("tiny_text").alpha_bar, pipeline.diffusion.alpha_bar, 0.0)
    for part, own in ((pipeline.denoiser, saved.unet), (pipeline.text_encoder, saved.text_encoder)):
        for name, value in part.state_dict().items():
            agree(value, own.state_dict()[name].half().float(), 0.0)
    pipeline.save(tmp_path)
    images = [
        each.text_to_image(CAPTIONS, w=1.0, steps=2, generator=seeded())
        for each in (pipeline, LatentDiffusion.load(tmp_path))
    ]
    agree(*images, 0.0)
    assert images[0].shape == (3, 3, 64, 64)


def test_what_is_no_text_to_image_model_is_refused(data_folder):
    with pytest.raises(ValueError, match="model must be one of text to image; got 'tiny_vae', a vae"):
        latent.load_pipeline("tiny_vae")
    with pytest.raises(CheckpointError, match="there is no checkpoint 'absent'"):
        latent.load_pipeline("absent")


def test_another_vae_under_the_same_name_is_refused(saved):
    _, card_file = checkpoint_files("tiny_vae")
    content = card_file.read_text()
    try:
        card = json.loads(content)
        card["metrics"]["latent_scale"] = 1.8
        card_file.write_text(json.dumps(card))
        with pytest.raises(ValueError, match="another.*'tiny_vae'"):
            latent.load_pipeline("tiny_text")
    finally:
        card_file.write_text(content)
    assert latent.load_pipeline("tiny_text").latent_scale == 1.7


def test_a_missing_vae_is_named(unfitted, saved, recipe):
    with pytest.raises(CheckpointError, match="there is no checkpoint 'no_vae'"):
        replace(unfitted, vae="no_vae").fitted_to(unfitted.load_images("train"))
    with pytest.raises(CheckpointError, match="there is no checkpoint 'no_vae'"):
        replace(recipe, vae="no_vae").pipeline(saved)


@pytest.mark.parametrize("data", ["digits", "shapes"])
def test_recipe_refuses_images_it_has_no_captions_for(unfitted, data):
    with pytest.raises(ValueError, match=f"data must be 'shapes_and_scenes', .*; got '{data}'"):
        replace(unfitted, data=data, image_size=None).load_images("train")


def test_evaluation_asks_for_what_unseen_and_held_out_images_show(recipe, unfitted, monkeypatch):
    torch.manual_seed(3)
    readers = {
        name: Reader(part.labels, 3, 64, widths=(8,), patch_size=4, num_features=4).eval()
        for name, part in zip(("shapes", "scenes"), unfitted.load_images("test").images.parts, strict=True)
    }
    monkeypatch.setattr(latent, "find_reader", lambda data, size: readers[data] if size == 64 else None)
    monkeypatch.setattr(latent, "EVALUATION_STEPS", 2)
    monkeypatch.setattr(latent, "EVALUATION_SAMPLES", 5)
    model, test = perturbed(recipe.build(), torch.float32).eval(), unfitted.load_images("test")
    found = recipe.evaluate(model, test)
    assert found["samples"] == 5
    pipeline, w = recipe.pipeline(model), latent.EVALUATION_WEIGHT
    for number, name in enumerate(readers):
        for split in ("test", "held_out"):
            part = unfitted.load_images(split).images.parts[number]
            drawn = latent.draw_captions(pipeline, part.captions(range(5)), w, 2)
            right = attribute_accuracy(readers[name], drawn, part.attributes(range(5)))
            if split == "held_out":
                assert found[f"accuracy_{name}_held_out"] == pytest.approx(right["all"])
            else:
                for label, share in right.items():
                    assert found[f"accuracy_{name}_{label}"] == pytest.approx(share)


# The checkpoint


@pytest.fixture
def shipped(monkeypatch):
    """Where the course's own checkpoints are looked for again."""
    monkeypatch.delenv("LECTURE26_DATA", raising=False)


def test_shipped_model_is_small_and_its_card_says_what_the_chapter_promises(shipped):
    card = load_card("text_to_image_shapes64")
    assert card["parameters"] <= 3.5e6 and card["bytes"] <= 7.0e6
    assert card["settings"]["latent_scale"] == load_card("vae_shapes64")["metrics"]["latent_scale"]
    metrics = card["metrics"]
    assert metrics["test_loss"] < metrics["test_loss_unconditional"]
    # the targets are .98 of each label, .90 of held-out pairs and .85 of scenes; the card counts 128 images
    attributes = "shape", "colour", "size", "background"
    assert min(metrics[f"accuracy_shapes_{name}"] for name in attributes) >= 0.98
    assert min(metrics[f"accuracy_{part}_held_out"] for part in ("shapes", "scenes")) >= 0.9
    assert metrics["accuracy_scenes_all"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "split", "least"), [(0, "test", 0.9), (0, "held_out", 0.9), (1, "test", 0.6)]
)
def test_shipped_model_draws_what_is_asked_for(shipped, part, split, least):
    images = load("shapes_and_scenes", split).parts[part]
    drawn = latent.draw_captions(
        latent.load_pipeline("text_to_image_shapes64"), images.captions(range(32)), 2.0, 20, batch_size=32
    )
    reader = recipes.load_model(("reader_shapes64", "reader_scenes64")[part])
    assert attribute_accuracy(reader, drawn, images.attributes(range(32)))["all"] >= least


# Wrong arguments

LAYER = attention_layer()
PIPELINE = small_pipeline()
PIXELS = normal(3, 3, 16, 16)
LONG = "a red star a red star"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CrossAttention(0, 5, 3, 4), ValueError, "query_dim must be at least 1; got 0"),
        (lambda: CrossAttention(10, 5.0, 3, 4), TypeError, "context_dim must be an int; got 5.0"),
        (lambda: CrossAttention(10, 5, -1, 4), ValueError, "heads must be at least 1; got -1"),
        (lambda: CrossAttention(10, 5, 3, True), TypeError, "head_dim must be an int; got True"),
        (lambda: LAYER(X[0], CONTEXT), ValueError, r"x must be of shape .*got \(6, 10\)"),
        (lambda: LAYER(X[..., :9], CONTEXT), ValueError, r"x must be of shape \(3, N, 10\); got \(3, 6, 9\)"),
        (lambda: LAYER(X, X), ValueError, r"context must be of shape \(3, N, 5\); got \(3, 6, 10\)"),
        (lambda: LAYER(X, CONTEXT[:2]), ValueError, r"context must be of shape \(3, N, 5\); got \(2, 7, 5\)"),
        (
            lambda: LAYER(X, CONTEXT, MASK[:2]),
            ValueError,
            r"mask must have the shape .*, \(3, 7\); got \(2, 7\)",
        ),
        (
            lambda: LAYER(X, CONTEXT, MASK[:, :6]),
            ValueError,
            r"mask must .* of the tokens, \(3, 7\); got \(3, 6\)",
        ),
        (lambda: LAYER(X, CONTEXT, MASK.double()), TypeError, "mask must be bool.*got torch.float64"),
        (lambda: LAYER(X, CONTEXT, MASK & False), ValueError, "at least one token in every row"),
        (lambda: LAYER.weights(X, CONTEXT, MASK[:2]), ValueError, r"mask must .* \(3, 7\)"),
        (lambda: TextAttention(12, 5, head_dim=8), ValueError, "channels must be a multiple of head_dim=8"),
        (
            lambda: text_unet()(normal(3, 4, 4, 4), torch.tensor([1, 2, 3])),
            TypeError,
            "cond must be a dict of 'context' and 'mask'.*got NoneType",
        ),
        (
            lambda: text_unet()(normal(3, 4, 4, 4), torch.tensor([1, 2, 3]), {"context": CONTEXT}),
            TypeError,
            r"cond must be a dict of 'context' and 'mask'.*got \['context'\]",
        ),
        (lambda: linear_pipeline(scale=0.0), ValueError, "latent_scale must be a number above 0; got 0.0"),
        (lambda: linear_pipeline(scale=-1), ValueError, "latent_scale must be a number above 0; got -1.0"),
        (lambda: linear_pipeline(scale=math.nan), ValueError, "latent_scale must be .* above 0; got nan"),
        (lambda: linear_pipeline(scale=math.inf), ValueError, "latent_scale must be .* above 0; got inf"),
        (lambda: linear_pipeline(image_size=0), ValueError, "image_size must be at least 1; got 0"),
        (lambda: linear_pipeline(image_size=9), ValueError, "image_size must be a multiple of 2.*; got 9"),
        (
            lambda: LatentDiffusion(
                LinearVAE(), Constant(X), Diffusion(linear_betas(100), clip=True), 1.0, encoder()
            ),
            ValueError,
            "diffusion must not clip.*got clip=True",
        ),
        (
            lambda: PIPELINE(["a green star"]),
            ValueError,
            "unknown word 'green' in 'a green star'; the words are: a, blue, red, ring, star",
        ),
        (
            lambda: LatentDiffusion.from_settings(PIPELINE.settings | {"schedule": "sigmoid"}),
            ValueError,
            "schedule must be one of 'linear', 'cosine'; got 'sigmoid'",
        ),
        (lambda: PIPELINE([LONG]), ValueError, f"a text must have at most 5 words; got 6 in '{LONG}'"),
        (lambda: PIPELINE(""), ValueError, "prompts must not be empty"),
        (lambda: PIPELINE(["a star", "  "]), ValueError, "prompts must not be empty"),
        (lambda: PIPELINE([]), ValueError, "prompts must hold at least one text; got none"),
        (lambda: PIPELINE([3]), TypeError, r"prompts must be a str or a list of str; got \[3\]"),
        (lambda: PIPELINE(["a star", None]), TypeError, "prompts must be a str or a list of str"),
        (lambda: PIPELINE(None), TypeError, "prompts must be a str or a list of str; got None"),
        (lambda: PIPELINE(7), TypeError, "prompts must be a str or a list of str; got 7"),
        (
            lambda: PIPELINE(PROMPTS, generator=[seeded(), seeded()]),
            ValueError,
            r"generator must be one, or a list of one for each of 3 prompt\(s\); got a list of 2",
        ),
        (
            lambda: PIPELINE(PROMPTS, negative_prompt=["a star"]),
            ValueError,
            r"negative_prompt must be one text, or one for each of 3 prompt\(s\); got 1",
        ),
        (lambda: PIPELINE(PROMPTS, negative_prompt="green"), ValueError, "unknown word 'green'"),
        (
            lambda: PIPELINE(PROMPTS, negative_prompt=None),
            TypeError,
            "negative_prompt must be a str or a list of str; got None",
        ),
        (
            lambda: TextAttention(40, 5, head_dim=32, self_attention_from=64),
            ValueError,
            "channels must be a multiple of head_dim=32; got channels=40",
        ),
        (lambda: PIPELINE(PROMPTS, negative_prompt=LONG), ValueError, "at most 5 words; got 6"),
        (lambda: PIPELINE(PROMPTS, steps=1), ValueError, r"steps must lie in \[2, 100\]; got .*1"),
        (lambda: PIPELINE(PROMPTS, steps=101), ValueError, r"steps must lie in \[2, 100\]; got .*101"),
        (lambda: PIPELINE(PROMPTS, steps=0), ValueError, "steps must "),
        (lambda: PIPELINE(PROMPTS, steps=2.5), TypeError, "steps must be an int; got 2.5"),
        (lambda: PIPELINE(PROMPTS, w=math.nan), ValueError, "w must be a finite number; got nan"),
        (lambda: PIPELINE(PROMPTS, w=math.inf), ValueError, "w must be a finite number; got inf"),
        (lambda: PIPELINE(PROMPTS, output="jpeg"), ValueError, "output must be one of 'pil', 'tensor'"),
        (
            lambda: PIPELINE.image_to_image(PIXELS, PROMPTS, 1.1),
            ValueError,
            r"strength must lie in \[0, 1\]; got 1.1",
        ),
        (
            lambda: PIPELINE.image_to_image(PIXELS, PROMPTS, -0.1),
            ValueError,
            r"strength must lie in \[0, 1\]; got -0.1",
        ),
        (
            lambda: PIPELINE.image_to_image(PIXELS, PROMPTS, math.nan),
            ValueError,
            r"strength must lie in \[0, 1\]; got nan",
        ),
        (
            lambda: PIPELINE.image_to_image(PIXELS[:2], PROMPTS, 0.5),
            ValueError,
            r"images must be of shape \(B, C, H, W\), one for each of 3 prompt\(s\); got \(2, 3, 16, 16\)",
        ),
        (lambda: PIPELINE.image_to_image(PIXELS[0], "a star", 0.5), ValueError, "images must be of shape"),
        (
            lambda: PIPELINE.image_to_image(PIXELS.to(torch.uint8), PROMPTS, 0.5),
            TypeError,
            r"images must be floating-point numbers in \[-1, 1\]; got torch.uint8",
        ),
        (
            lambda: PIPELINE.image_to_image(torch.full_like(PIXELS, 255), PROMPTS, 0.5),
            ValueError,
            r"images must lie in \[-1, 1\]; got values 255 to 255",
        ),
        (
            lambda: PIPELINE.inpaint(torch.full_like(PIXELS, math.nan), hole(PIXELS), PROMPTS),
            ValueError,
            r"images must lie in \[-1, 1\]; got values nan to nan",
        ),
        (lambda: PIPELINE.image_to_image(PIXELS, [""] * 3, 0.5), ValueError, "prompts must not be empty"),
        (lambda: PIPELINE.image_to_image(PIXELS[:, :1], PROMPTS, 0.5), ValueError, "x must be of shape"),
        (lambda: PIPELINE.inpaint(PIXELS[:2], hole(PIXELS), PROMPTS), ValueError, "images must be of shape"),
        (
            lambda: PIPELINE.inpaint(PIXELS, hole(PIXELS).double(), PROMPTS),
            TypeError,
            "is_unknown must be bool; got torch.float64",
        ),
        (
            lambda: PIPELINE.inpaint(PIXELS, hole(PIXELS)[:, 0], PROMPTS),
            ValueError,
            r"is_unknown must have the shape \(3, 1, 16, 16\); got \(3, 16, 16\)",
        ),
        (
            lambda: PIPELINE.inpaint(PIXELS, hole(PIXELS).expand(-1, 3, -1, -1), PROMPTS),
            ValueError,
            r"is_unknown must have the shape \(3, 1, 16, 16\); got \(3, 3, 16, 16\)",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
