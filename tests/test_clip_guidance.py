"""Chapter 04 against oracles: open_clip's loss and models, torch's transformer, closed forms of guidance."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed, seeded, unet_of_diffusers
from torch import nn

from lecture26 import recipes
from lecture26.clip_guidance import (
    CLIP,
    MAX_LOGIT_SCALE,
    ImageTower,
    OpenCLIP,
    TextTransformer,
    Tokenizer,
    TransformerBlock,
    clip_guided,
    contrastive_step,
    cosine_gradient,
    cosine_similarity_matrix,
    info_nce,
    load_open_clip,
    masked_attention,
    sentence_features,
    similarity_gradient,
    similarity_gradient_through_x_0,
    split_words,
    zero_shot_probabilities,
)
from lecture26.ddpm import Diffusion, ddim_step, ddpm_step, linear_betas, sample
from lecture26.kit.data import load
from lecture26.kit.sample_draws import SampleDraws
from lecture26.recipes import clip as clip_recipes
from lecture26.unet import UNet, attention

WORDS = ("a", "blue", "red", "ring", "star")
TOKENIZER = Tokenizer(WORDS, length=7)
SMALL_IMAGE = {"base_channels": 16, "channel_multipliers": (1, 2), "attention_levels": ()}
PREDICTIONS = ("eps", "x_0", "v")


def small_clip(noise_aware=False, dtype=torch.float64):
    torch.manual_seed(0)
    clip = CLIP(TOKENIZER, feature_dim=6, noise_aware=noise_aware, image=SMALL_IMAGE, text={"width": 16})
    return perturbed(clip, dtype).eval()


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


# Similarities and their loss


def test_cosine_similarity_matrix_is_torchs_for_each_pair():
    u, v = normal(5, 7), 3 * normal(4, 7, seed=1)
    expected = torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in v]) for a in u])
    agree(cosine_similarity_matrix(u, v), expected, 1e-12)


@pytest.mark.parametrize("tau", [0.0, math.log(1 / 0.07), MAX_LOGIT_SCALE])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_info_nce_is_that_of_open_clip_with_its_gradients(tau, count):
    open_clip = pytest.importorskip("open_clip")
    losses, gradients = [], []
    for loss in (info_nce, lambda u, v, tau: open_clip.ClipLoss()(u, v, tau.exp())):
        leaves = [unit(count, 5), unit(count, 5, seed=1), torch.tensor(tau, dtype=torch.float64)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        losses.append(loss(*leaves))
        gradients.append(torch.autograd.grad(losses[-1], leaves))
    agree(losses[0], losses[1], 1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        agree(ours, theirs, 1e-12)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 14.0, 300.0])
def test_info_nce_in_closed_form(kappa):
    identity = torch.eye(8, dtype=torch.float64)
    agree(info_nce(identity, identity, math.log(kappa)).item(), math.log1p(7 * math.exp(-kappa)), 1e-12)
    same = unit(1, 4).expand(8, 4)
    agree(info_nce(same, same, math.log(kappa)).item(), math.log(8), 1e-12)
    assert info_nce(same[:1], same[:1], math.log(kappa)) == 0


def test_info_nce_of_a_worse_order_is_higher():
    u = unit(6, 8)
    assert info_nce(u, u, 2.0) < info_nce(u, u.roll(1, 0), 2.0)


def test_zero_shot_probabilities():
    u, v = normal(3, 5), normal(4, 5, seed=1)
    p = zero_shot_probabilities(u, v, torch.tensor(1.5))
    agree(p.sum(dim=1), torch.ones(3, dtype=torch.float64), 1e-12)
    agree(p, zero_shot_probabilities(7 * u, 0.1 * v, 1.5), 1e-6)
    u.requires_grad_()
    assert zero_shot_probabilities(u, v, 1.5).requires_grad


def test_cosine_gradient_is_that_of_torch():
    u, v = normal(6, 5).requires_grad_(), 4 * normal(6, 5, seed=1)
    (expected,) = torch.autograd.grad(F.cosine_similarity(u, v, dim=1).sum(), u)
    agree(cosine_gradient(u, v), expected, 1e-12)


# Words


def test_tokens_of_a_text():
    assert TOKENIZER.num_tokens == 8
    tokens = TOKENIZER(["a red star", "", "A Blue  RING"])
    assert tokens.tolist() == [[1, 3, 5, 7, 2, 0, 0], [1, 2, 0, 0, 0, 0, 0], [1, 3, 4, 6, 2, 0, 0]]
    assert tokens.dtype == torch.int64
    assert TOKENIZER([]).shape == (0, 7)


@pytest.mark.parametrize(
    "text", ["a red star.", "A red star!", "a red, star", "a “red” star?", '(a: "red"; star)…', "a,red,star"]
)
def test_punctuation_is_no_part_of_a_word(text):
    assert torch.equal(TOKENIZER([text]), TOKENIZER(["a red star"]))


def test_signs_within_words_stay():
    assert split_words("An X-ray of one's hand.") == ["an", "x-ray", "of", "one's", "hand"]
    assert split_words(" . ,!") == split_words("") == []
    assert Tokenizer(["x-ray"], 4)(["X-ray."]).tolist() == [[1, 3, 2, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: TOKENIZER(["a green star"]),
            ValueError,
            "unknown word 'green' in 'a green star'; the words .*blue",
        ),
        (lambda: TOKENIZER(["a a a a a a"]), ValueError, "at most 5 words; got 6"),
        (lambda: TOKENIZER("a red star"), TypeError, "list of str"),
        (lambda: TOKENIZER([3]), TypeError, "list of str"),
        (lambda: Tokenizer(["a", "a"], 5), ValueError, "words must differ"),
        (lambda: Tokenizer(["a", "Red", "star."], 5), ValueError, r"without .*; got \['Red', 'star\.'\]"),
        (lambda: TOKENIZER(["a red * star"]), ValueError, r"unknown word '\*'"),
        (lambda: Tokenizer(["a"], 2), ValueError, "length must be at least 3.*got 2"),
    ],
)
def test_wrong_texts(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The text transformer


def test_masked_attention_is_that_of_torch():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 7, 4, seed=1), normal(2, 3, 7, 6, seed=2)
    mask = torch.rand(2, 1, 5, 7, generator=seeded()) < 0.5
    mask[..., 0] = True
    agree(masked_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 1e-12)
    agree(masked_attention(q, k, v, torch.ones_like(mask)), attention(q, k, v), 1e-12)


def test_masked_keys_are_inert():
    q, k, v = normal(2, 5, 4), normal(2, 7, 4, seed=1), normal(2, 7, 6, seed=2)
    mask = torch.arange(7) < torch.tensor([3, 6])[:, None, None]
    expected = masked_attention(q, k, v, mask)
    k[0, 3:], v[0, 3:] = 1e3, -1e3
    agree(masked_attention(q, k, v, mask), expected, 0.0)


def test_transformer_block_is_that_of_torch():
    ours = perturbed(TransformerBlock(16, heads=4))
    theirs = nn.TransformerEncoderLayer(
        16, 4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    pairs = [
        (ours.project, theirs.self_attn.out_proj),
        (ours.norm_attention, theirs.norm1),
        (ours.norm_mlp, theirs.norm2),
        (ours.mlp[0], theirs.linear1),
        (ours.mlp[2], theirs.linear2),
    ]
    for source, target in pairs:
        target.load_state_dict(source.state_dict())
    h, causal = normal(3, 5, 16), torch.ones(5, 5, dtype=torch.bool).tril()
    agree(ours(h, causal), theirs(h, src_mask=~causal), 1e-10)


def test_text_transformer_looks_back_only():
    model = perturbed(TextTransformer(8, 7, width=16))
    tokens = TOKENIZER(["a red star", "a blue ring"])
    changed = tokens.clone()
    changed[:, 3:] = torch.tensor([4, 3, 6, 7])
    agree(model(changed)[:, :3], model(tokens)[:, :3], 1e-12)
    assert not torch.isclose(model(changed)[:, 3:], model(tokens)[:, 3:]).all(dim=2).any()


def test_a_token_changes_all_features_from_its_place_on():
    model = perturbed(TextTransformer(8, 7, width=16))
    tokens = TOKENIZER(["a red star"])
    changed = tokens.clone()
    changed[0, 1] = 5
    assert not torch.isclose(model(changed)[:, 1:], model(tokens)[:, 1:]).all(dim=2).any()


def test_a_mask_decides_who_looks_at_whom():
    model, tokens = perturbed(TextTransformer(8, 7, width=16)), TOKENIZER(["a red star", "a blue ring"])
    place = torch.arange(tokens.shape[1])
    agree(model(tokens, place[:, None] >= place), model(tokens), 0.0)
    both_ways = torch.ones(2, 1, 1, len(place), dtype=torch.bool)
    assert not torch.isclose(model(tokens, both_ways), model(tokens)).all(dim=2)[:, :-1].any()
    alone = model(tokens, place[:, None] == place)
    changed = tokens.clone()
    changed[:, 2] = 5
    rest = place != 2
    agree(model(changed, place[:, None] == place)[:, rest], alone[:, rest], 1e-12)


def test_padding_changes_nothing():
    clip = small_clip()
    longer = Tokenizer(WORDS, length=6)
    agree(clip.encode_text(longer(["a red star"])), clip.encode_text(TOKENIZER(["a red star"])), 1e-12)
    tokens = TOKENIZER(["a red star"])
    other = tokens.clone()
    other[:, 5:] = 4  # whatever comes behind the end
    agree(clip.encode_text(other), clip.encode_text(tokens), 1e-12)


def test_words_and_their_order_count():
    clip = small_clip()
    features = clip.encode_text(TOKENIZER(["red star", "star red", "blue star"]))
    for i in range(2):
        assert not torch.isclose(features[i], features[i + 1]).all()


def test_sentence_features_are_at_the_first_end():
    features = normal(3, 5, 2)
    tokens = torch.tensor([[1, 3, 2, 0, 0], [1, 2, 2, 2, 2], [1, 3, 3, 3, 2]])
    agree(sentence_features(features, tokens, 2), features[[0, 1, 2], [2, 1, 4]], 0.0)
    with pytest.raises(ValueError, match="end token 2 in every row"):
        sentence_features(features, torch.ones(3, 5, dtype=torch.int64), 2)
    assert sentence_features(features[:0], tokens[:0], 2).shape == (0, 2)


# CLIP


@pytest.mark.parametrize("noise_aware", [False, True])
def test_clip_has_features_of_every_image_and_text_by_itself(noise_aware):
    clip = small_clip(noise_aware)
    x, tokens = normal(3, 3, 8, 8), TOKENIZER(["a red star", "a ring", "blue"])
    t = torch.tensor([0, 20, 999]) if noise_aware else None
    one_by_one = [clip.encode_image(x[i : i + 1], None if t is None else t[i : i + 1]) for i in range(3)]
    agree(clip.encode_image(x, t), torch.cat(one_by_one), 1e-12)
    agree(clip.encode_text(tokens), torch.cat([clip.encode_text(row[None]) for row in tokens]), 1e-12)
    image_features, text_features, tau = clip(x, tokens, t)
    agree(image_features.norm(dim=1), torch.ones(3, dtype=torch.float64), 1e-12)
    agree(text_features.norm(dim=1), torch.ones(3, dtype=torch.float64), 1e-12)
    assert tau is clip.logit_scale


def test_noise_aware_clip_knows_the_step():
    clip, x = small_clip(noise_aware=True), normal(1, 3, 8, 8).expand(2, -1, -1, -1)
    features = clip.encode_image(x, torch.tensor([5, 500]))
    assert not torch.isclose(features[0], features[1]).all()


@pytest.mark.parametrize(("start", "expected"), [(9.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (2.0, 2.0)])
def test_the_temperature_stays_in_its_range(start, expected):
    clip = small_clip()
    agree(CLIP(TOKENIZER).logit_scale.item(), math.log(1 / 0.07), 1e-6)
    nn.init.constant_(clip.logit_scale, start)
    clip(normal(2, 3, 8, 8), TOKENIZER(["a red star", "a ring"]))
    agree(clip.logit_scale.item(), expected, 1e-12)


def test_every_parameter_of_a_clip_learns():
    clip = small_clip(noise_aware=True)
    outputs = clip(
        normal(3, 3, 8, 8), TOKENIZER(["a red star", "a blue ring", "a ring"]), torch.tensor([0, 9, 99])
    )
    info_nce(*outputs).backward()
    without = [name for name, parameter in clip.named_parameters() if not parameter.grad.any()]
    assert without == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_clip_has_the_dtype_of_its_input(dtype):
    clip = small_clip(noise_aware=True, dtype=dtype)
    assert clip.encode_image(normal(2, 3, 8, 8, dtype=dtype), torch.tensor([0, 9])).dtype == dtype
    assert clip.encode_text(TOKENIZER(["a"])).dtype == dtype


def test_clip_runs_on_the_device_of_its_input():
    clip = small_clip(noise_aware=True, dtype=torch.float32)
    x, t, tokens = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 999]), TOKENIZER(["a", "red"])
    expected = clip.encode_image(x, t), clip.encode_text(tokens)
    with simulated_device():
        clip = clip.to(SIMULATED)
        there = clip.encode_image(x.to(SIMULATED), t.to(SIMULATED)), clip.encode_text(tokens.to(SIMULATED))
        there = [values_of(output) for output in there]
    for output, value in zip(there, expected, strict=True):
        agree(output, value, 1e-6)


@pytest.mark.slow
def test_a_small_clip_learns():
    torch.manual_seed(0)
    clip = CLIP(TOKENIZER, feature_dim=8, image=SMALL_IMAGE, text={"width": 16})
    x = torch.ones(4, 3, 8, 8) * torch.tensor([-1.0, -0.3, 0.3, 1.0])[:, None, None, None]
    x[:, 0, :4] *= -1
    tokens = TOKENIZER(["a red star", "a blue ring", "a red ring", "a blue star"])
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    for _ in range(100):
        contrastive_step(optimizer, clip.encode_image, clip.encode_text, x, tokens, clip.logit_scale)
    assert info_nce(*clip(x, tokens)) < 0.5
    assert cosine_similarity_matrix(clip.encode_image(x), clip.encode_text(tokens)).argmax(1).tolist() == [
        0,
        1,
        2,
        3,
    ]


# Guidance


class LinearCLIP(nn.Module):
    """Features are a matrix times the pixels, and, if noise-aware, times a cosine of the step."""

    def __init__(self, pixels=12, dim=5, noise_aware=False):
        super().__init__()
        self.weight = nn.Parameter(normal(pixels, dim, seed=7))
        self.noise_aware = noise_aware
        self.seen = []

    def encode_image(self, x, t=None):
        assert (t is not None) == self.noise_aware
        self.seen.append((x.detach(), t))
        features = x.flatten(1) @ self.weight
        return features if t is None else features + torch.cos(t.to(x.dtype))[:, None]


class LinearDenoiser(nn.Module):
    """A different linear map of the pixels for every step."""

    def __init__(self, pixels=12):
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(pixels, pixels, seed=8))

    def matrix(self, t):
        return self.weight * (1 + t.to(self.weight.dtype) / 100)[:, None, None]

    def forward(self, x_t, t):
        return torch.einsum("bij,bj->bi", self.matrix(t), x_t.flatten(1)).reshape(x_t.shape)


X_T, T, TEXTS = normal(3, 3, 2, 2, seed=1), torch.tensor([7, 50, 93]), 2 * normal(3, 5, seed=2)


def through_x_0(denoiser, encode_image, x_t, t, texts, diffusion):
    """The output and the gradient, x_0-hat being made as clip_guided makes it."""

    def x_0_of(output, x_t, t):
        prediction, _ = diffusion.split_output(output, x_t)
        return diffusion.predicted_x_0(prediction, x_t, diffusion.at(t, x_t).alpha_bar, clip=False)

    return similarity_gradient_through_x_0(denoiser, x_0_of, encode_image, x_t, t, texts)


def test_similarity_gradient_in_closed_form():
    clip = LinearCLIP(noise_aware=True)
    slope = cosine_gradient(clip.encode_image(X_T, T), TEXTS) @ clip.weight.T
    agree(similarity_gradient(clip.encode_image, X_T, T, TEXTS), slope.reshape(X_T.shape).detach(), 1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_through_x_0_in_closed_form(prediction):
    clip, denoiser, diffusion = LinearCLIP(), LinearDenoiser(), Diffusion(linear_betas(100), prediction)
    output, gradient = through_x_0(denoiser, clip.encode_image, X_T, T, TEXTS, diffusion)
    agree(output, denoiser(X_T, T).detach(), 1e-14)
    # what the output says of the noise, and its Jacobian, by hand
    kept, J = diffusion.alpha_bar[T, None, None], denoiser.matrix(T).detach()
    identity = torch.eye(12, dtype=torch.float64)
    eps_jacobian = {
        "eps": J,
        "x_0": (identity - kept.sqrt() * J) / (1 - kept).sqrt(),
        "v": kept.sqrt() * J + (1 - kept).sqrt() * identity,
    }[prediction]
    x_0 = clip.seen[-1][0].flatten(1)
    at_x_0 = cosine_gradient(x_0 @ clip.weight, TEXTS) @ clip.weight.T
    through_eps = torch.einsum("bij,bi->bj", eps_jacobian, at_x_0)
    expected = (at_x_0 - (1 - kept[:, :, 0]).sqrt() * through_eps) / kept[:, :, 0].sqrt()
    agree(gradient, expected.reshape(X_T.shape).detach(), 1e-10)
    eps = torch.einsum("bij,bj->bi", J, X_T.flatten(1))
    if prediction == "eps":
        agree(x_0, (X_T.flatten(1) - (1 - kept[:, :, 0]).sqrt() * eps) / kept[:, :, 0].sqrt(), 1e-12)


def test_nothing_is_clamped_before_the_gradient():
    clip, diffusion = LinearCLIP(), Diffusion(linear_betas(100), clip=True)
    _, gradient = through_x_0(LinearDenoiser(), clip.encode_image, 30 * X_T, T, TEXTS, diffusion)
    assert clip.seen[-1][0].abs().max() > 1
    assert (gradient != 0).all()


@pytest.mark.parametrize("through", ["x_t", "x_0"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_guided_denoiser_adds_the_score(through, prediction, learned):
    clip = LinearCLIP(noise_aware=through == "x_t")
    variance = "learned_range" if learned else "fixed_small"
    diffusion, linear = Diffusion(linear_betas(100), prediction, variance), LinearDenoiser()

    def denoiser(x_t, t):
        output = linear(x_t, t)
        return torch.cat([output, output.square()], dim=1) if learned else output

    if through == "x_t":
        gradient = similarity_gradient(clip.encode_image, X_T, T, TEXTS)
    else:
        _, gradient = through_x_0(denoiser, clip.encode_image, X_T, T, TEXTS, diffusion)
    guided = clip_guided(denoiser, clip, TEXTS, 2.5, diffusion, through)(X_T, T)
    expected = diffusion.add_score(denoiser(X_T, T), X_T, T, 2.5 * gradient)
    agree(guided.detach(), expected.detach(), 1e-12)
    assert (guided[:, :3] != denoiser(X_T, T)[:, :3]).all()
    agree(guided[:, 3:].detach(), denoiser(X_T, T)[:, 3:].detach(), 0.0)  # the variance is left alone
    agree(clip_guided(denoiser, clip, TEXTS, 0.0, diffusion, through)(X_T, T), denoiser(X_T, T), 0.0)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_the_scale_multiplies_the_cosine_and_kappa_is_not_included(through):
    clip, diffusion = LinearCLIP(noise_aware=through == "x_t"), Diffusion(linear_betas(100))
    clip.logit_scale = torch.tensor(4.0)
    outputs = [
        clip_guided(LinearDenoiser(), clip, TEXTS, scale, diffusion, through)(X_T, T) for scale in (0, 1, 3)
    ]
    agree((outputs[2] - outputs[0]).detach(), 3 * (outputs[1] - outputs[0]).detach(), 1e-12)
    clip.logit_scale = torch.tensor(0.0)
    again = clip_guided(LinearDenoiser(), clip, TEXTS, 1, diffusion, through)(X_T, T)
    agree(again.detach(), outputs[1].detach(), 0.0)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_the_length_of_text_features_does_not_matter(through):
    clip, diffusion = LinearCLIP(noise_aware=through == "x_t"), Diffusion(linear_betas(100))
    lengths = torch.tensor([[0.1], [5.0], [70.0]], dtype=torch.float64)
    output, other = (
        clip_guided(LinearDenoiser(), clip, texts, 2.0, diffusion, through)(X_T, T)
        for texts in (TEXTS, lengths * TEXTS)
    )
    agree(output.detach(), other.detach(), 1e-12)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_samples_of_a_batch_do_not_depend_on_each_other(through):
    clip, diffusion = small_clip(through == "x_t"), Diffusion(linear_betas(100))
    denoiser = perturbed(UNet(3, 16, (1, 2), 1, attention_levels=(1,)))
    x_t, texts = normal(4, 3, 8, 8), normal(4, 6, seed=1)
    t = torch.tensor([3, 40, 70, 99])
    whole = clip_guided(denoiser, clip, texts, 3.0, diffusion, through)(x_t, t)
    part = clip_guided(denoiser, clip, texts[1:3], 3.0, diffusion, through)(x_t[1:3], t[1:3])
    agree(whole[1:3].detach(), part.detach(), 1e-12)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_one_text_serves_a_batch(through):
    clip, diffusion = LinearCLIP(noise_aware=through == "x_t"), Diffusion(linear_betas(100))
    output, other = (
        clip_guided(LinearDenoiser(), clip, texts, 2.0, diffusion, through)(X_T, T)
        for texts in (TEXTS[:1], TEXTS[:1].expand(3, -1))
    )
    agree(output.detach(), other.detach(), 1e-14)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_guidance_works_under_any_mode_and_leaves_nothing_behind(through, mode):
    clip, denoiser = small_clip(through == "x_t"), perturbed(UNet(3, 16, (1, 2), 1, attention_levels=(1,)))
    diffusion = Diffusion(linear_betas(100), "v").respace(5)
    with mode():
        texts = clip.encode_text(TOKENIZER(["a red star", "a ring"]))  # an inference tensor in one of them
        guided = clip_guided(denoiser, clip, texts, 3.0, diffusion, through)
        x_T = normal(2, 3, 8, 8)
        x_0 = sample(diffusion, guided, x_T.shape, ddim_step, x_T=x_T, progress=False)
        output = guided(x_T, torch.tensor([50, 99]))
    assert not x_0.requires_grad and not output.requires_grad
    assert x_0.dtype == torch.float64
    for network in (clip, denoiser):
        assert all(parameter.grad is None for parameter in network.parameters())
    expected = clip_guided(denoiser, clip, texts.clone(), 3.0, diffusion, through)
    agree(
        sample(diffusion, expected, x_T.shape, ddim_step, x_T=x_T.clone(), progress=False), x_0.clone(), 1e-12
    )


@pytest.mark.parametrize("through", ["x_t", "x_0"])
@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_base_and_respaced_diffusion_give_the_same_samples(through, step):
    clip, denoiser = LinearCLIP(noise_aware=through == "x_t"), LinearDenoiser()
    base = Diffusion(linear_betas(100), "v", clip=True)
    short = base.respace(7)
    samples = [
        sample(
            short,
            clip_guided(denoiser, clip, TEXTS, 5.0, given, through),
            X_T.shape,
            step,
            seeded(),
            X_T,
            progress=False,
        )
        for given in (base, short)
    ]
    agree(*samples, 0.0)
    plain = sample(short, denoiser, X_T.shape, step, seeded(), X_T, progress=False)
    assert not torch.isclose(samples[0], plain).all()
    if through == "x_t":
        assert {int(t[0]) for _, t in clip.seen} == set(short.steps.tolist())  # original steps


@pytest.mark.parametrize("through", ["x_t", "x_0"])
@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_guidance_raises_the_similarity_of_samples(through, step):
    clip, base = LinearCLIP(noise_aware=through == "x_t"), Diffusion(linear_betas(100), "x_0")
    short = base.respace(10)

    def denoiser(x_t, t):  # for data from N(0, I)
        return base.alpha_bar[t, None, None, None].sqrt() * x_t

    similarities = []
    for scale in (0.0, 1.0):
        guided = clip_guided(denoiser, clip, TEXTS, scale, short, through)
        x_0 = sample(short, guided, X_T.shape, step, seeded(), X_T, progress=False)
        similarities.append(F.cosine_similarity(x_0.flatten(1) @ clip.weight, TEXTS, dim=1).mean())
    assert similarities[0] + 0.2 < similarities[1]


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_an_empty_batch(through):
    clip, denoiser = small_clip(through == "x_t"), perturbed(UNet(3, 16, (1, 2), 1, attention_levels=(1,)))
    diffusion = Diffusion(linear_betas(100))
    x_t, t = normal(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    assert clip_guided(denoiser, clip, normal(0, 6), 1.0, diffusion, through)(x_t, t).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("through", ["x_t", "x_0"])
def test_unet_of_diffusers_as_denoiser(through):
    theirs = unet_of_diffusers()
    clip, diffusion = small_clip(through == "x_t"), Diffusion(linear_betas(100), clip=True).respace(4)
    texts = clip.encode_text(TOKENIZER(["a red star", "a ring"]))
    guided = clip_guided(lambda x_t, t: theirs(x_t, t).sample, clip, texts, 3.0, diffusion, through)
    x_0 = sample(diffusion, guided, (2, 3, 8, 8), ddim_step, x_T=normal(2, 3, 8, 8), progress=False)
    assert x_0.isfinite().all() and x_0.dtype == torch.float64


def test_guidance_composes_with_guidance():
    """A guided denoiser is a denoiser, also for a second guidance through its x_0-hat."""
    diffusion, denoiser = Diffusion(linear_betas(100)), LinearDenoiser()
    noisy, clean = LinearCLIP(noise_aware=True), LinearCLIP()
    once = clip_guided(denoiser, noisy, TEXTS, 2.0, diffusion)
    twice = clip_guided(once, clean, -TEXTS, 1.0, diffusion, "x_0")(X_T, T)
    assert twice.shape == X_T.shape and not torch.isclose(twice, once(X_T, T)).any()


# The recipes


def drawn(name, count=400):
    recipe, images = recipes.find_recipe(name), load("shapes")
    recipe = recipe.fitted_to(images)
    return recipe, images, recipe.draw(images, SampleDraws(0, torch.arange(count)))


def test_captions_lose_words_at_the_rate_given():
    recipe, images, batch = drawn("clip_shapes32")
    lost = 10 - (batch["tokens"] > 0).sum(dim=1)  # size and colour are one word each, the background four
    for words, gone in ((4, lost >= 4), (1, lost % 4 == 1), (2, lost % 4 == 2)):
        p = {4: 0.3, 1: 2 * 0.3 * 0.7, 2: 0.3**2}[words]
        assert abs(gone.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / 400)
    assert set(batch) == {"image", "tokens"} and batch["image"].abs().max() <= 1


def test_the_noise_aware_clip_is_trained_on_what_the_denoiser_sees():
    recipe, images, batch = drawn("noisy_clip_shapes32", count=64)
    diffusion = recipes.find_recipe("ddpm_shapes32").diffusion
    agree(recipe.forward_process.alpha_bar, diffusion.alpha_bar, 0.0)
    random = SampleDraws(0, torch.arange(64))
    x_0 = images.batch(random.integers(len(images)))["image"]
    _ = [random.uniform() for _ in range(3)]
    t = random.integers(1000)
    assert torch.equal(batch["t"], t) and len(t.unique()) > 50
    agree(batch["image"], diffusion.q_sample(x_0, t, random.normal(3, 32, 32)), 1e-6)


def test_all_captions_and_groups_of_different_ones():
    images = load("shapes", "test")
    captions = clip_recipes.every_caption(images)
    assert len(set(captions)) == 512 and set(images.captions(range(300))) < set(captions)
    for group in clip_recipes.different_captions(images, 100, 3):
        assert len(set(images.captions(group))) == 100


@pytest.mark.parametrize(("name", "least"), [("clip_shapes32", 0.98), ("noisy_clip_shapes32", 0.88)])
def test_shipped_clips_find_captions_of_unseen_images(name, least):
    recipe, clip, images = recipes.load_recipe(name), recipes.load_model(name), load("shapes", "test")
    (group,) = clip_recipes.different_captions(images, 128, 1)
    share = recipe.retrieval(clip, images, group, step=0 if recipe.noise_aware else None)
    assert share >= least
    assert 0 <= clip.logit_scale <= MAX_LOGIT_SCALE


# A large CLIP


@pytest.fixture(scope="module")
def large():
    """An open_clip model of random weights and its preprocessing for PIL images, as small as they come."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(
        "ViT-B-32",
        pretrained=None,
        embed_dim=16,
        vision_cfg={"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    return OpenCLIP(model, open_clip.get_tokenizer("ViT-B-32")), preprocess


def test_preprocessing_is_that_of_open_clip(large):
    from PIL import Image

    clip, preprocess = large
    pixels = torch.randint(256, (2, 24, 24, 3), generator=seeded(), dtype=torch.uint8)
    expected = torch.stack([preprocess(Image.fromarray(image.numpy())) for image in pixels])
    ours = clip.preprocess(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert ours.shape == (2, 3, 64, 64)
    # Pillow rounds to whole grey levels and clamps what the cubic overshoots: within half a level elsewhere
    inside = (expected > expected.amin()) & (expected < expected.amax())
    assert (ours - expected)[inside].abs().median() < 0.5 / 255 / 0.26
    agree(ours.mean(), expected.mean(), 0.02)


def test_preprocessing_standardises_each_channel(large):
    clip, _ = large
    grey = clip.preprocess(torch.zeros(1, 3, 32, 32))
    expected = (0.5 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    agree(grey.mean(dim=(0, 2, 3)), expected, 1e-5)
    assert (clip.preprocess(torch.full((1, 3, 32, 32), 3.0)) > 4).all()  # nothing is clamped


def test_large_clip_guides(large):
    clip, _ = large
    texts = clip.encode_text(clip.tokenizer(["a photo of a corgi", "a red star"]))
    assert texts.shape == (2, 16)
    x = normal(2, 3, 32, 32, dtype=torch.float32)
    agree(clip.encode_image(x), clip.model.encode_image(clip.preprocess(x)), 0.0)
    diffusion = Diffusion(linear_betas(100), "x_0")
    _, gradient = through_x_0(
        lambda x_t, t: 1.0 * x_t, clip.encode_image, x, torch.tensor([3, 50]), texts, diffusion
    )
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    rise = F.cosine_similarity(clip.encode_image(x + step), texts) - F.cosine_similarity(
        clip.encode_image(x - step), texts
    )
    agree(rise, 2e-2 * gradient.flatten(1).norm(dim=1), 5e-2)
    assert (rise > 0).all() and not any(p.requires_grad for p in clip.parameters())
    short = diffusion.respace(3)
    guided = clip_guided(lambda x_t, t: 0.5 * x_t, clip, texts, 1.0, short, "x_0")
    assert sample(short, guided, x.shape, ddim_step, x_T=x, progress=False).isfinite().all()


def test_large_clip_knows_no_noise(large):
    clip, _ = large
    with pytest.raises(ValueError, match="clean images only.*through='x_0'"):
        clip.encode_image(torch.zeros(1, 3, 32, 32), torch.tensor([3]))


def test_loading_a_large_clip_of_random_weights_and_its_temperature(large):
    clip, _ = large
    agree(clip.logit_scale.item(), math.log(1 / 0.07), 1e-6)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open-clip-torch"):
        load_open_clip()


def test_without_a_network(monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def offline(*arguments, **options):
        raise RuntimeError("Failed to download weights for tag 'laion2b_s34b_b79k'")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ConnectionError, match="'laion2b_s34b_b79k' of 'ViT-B-32' .*Connect to the network"):
        load_open_clip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-Z-32",), "name must be one of .*got 'ViT-Z-32'"),
        (("ViT-B-32", "nothing"), "pretrained must be one of .*got 'nothing'"),
    ],
)
def test_unknown_large_clip(arguments, message):
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=message):
        load_open_clip(*arguments)


# Wrong arguments

CLEAN, NOISY = small_clip(), small_clip(noise_aware=True)
PIXELS, STEPS = normal(2, 3, 8, 8), torch.tensor([0, 5])
DIFFUSION = Diffusion(linear_betas(100))


def no_gradient(x_t, t):
    with torch.no_grad():
        return 0.5 * x_t


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(unit(2, 3), unit(3, 3), 1.0), r"got \(2, 3\) and \(3, 3\)"),
        (lambda: info_nce(unit(0, 3), unit(0, 3), 1.0), r"N >= 1; got \(0, 3\)"),
        (lambda: info_nce(unit(3), unit(3), 1.0), r"got \(3,\) and \(3,\)"),
        (lambda: TransformerBlock(10, 4), "width must be a multiple of heads=4; got width=10"),
        (lambda: TextTransformer(8, 7)(torch.zeros(1, 9, dtype=torch.int64)), r"L <= 7; got \(1, 9\)"),
        (lambda: CLEAN.encode_image(PIXELS, STEPS), "clean images only: leave out t"),
        (lambda: NOISY.encode_image(PIXELS), "noisy images: it needs t"),
        (
            lambda: NOISY.encode_image(PIXELS, STEPS[:1]),
            r"t must have the shape of one step per image, \(2,\); got \(1,\)",
        ),
        (
            lambda: cosine_gradient(unit(2, 3), unit(3, 3)),
            r"text_features must have shape \(2, 3\).*got \(3, 3\)",
        ),
        (
            lambda: cosine_gradient(unit(2, 3), unit(2, 4)),
            r"text_features must have shape \(2, 3\).*got \(2, 4\)",
        ),
        (lambda: clip_guided(no_gradient, NOISY, unit(6), 1.0, DIFFUSION), r"shape \(B, D\); got \(6,\)"),
        (
            lambda: clip_guided(no_gradient, NOISY, unit(2, 6), 1.0, DIFFUSION, through="x"),
            "through must be one of 'x_t', 'x_0'; got 'x'",
        ),
        (
            lambda: clip_guided(no_gradient, NOISY, unit(3, 6), 1.0, DIFFUSION)(PIXELS, STEPS),
            r"text_features must have shape \(2, 6\).*got \(3, 6\)",
        ),
        (
            lambda: clip_guided(no_gradient, CLEAN, unit(2, 6), 1.0, DIFFUSION)(PIXELS, STEPS),
            "clean images only",
        ),
        (
            lambda: clip_guided(lambda x_t, t: x_t, NOISY, unit(2, 6), 1.0, DIFFUSION, "x_0")(PIXELS, STEPS),
            "noisy images: it needs",
        ),
        (
            lambda: clip_guided(no_gradient, CLEAN, unit(2, 6), 1.0, DIFFUSION, "x_0")(PIXELS, STEPS),
            "denoiser must be differentiable",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_image_tower_alone():
    tower = perturbed(ImageTower(1, 4, **SMALL_IMAGE | {"patch_size": 1}))
    assert tower(normal(2, 1, 8, 12)).shape == (2, 4)
