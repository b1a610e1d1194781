"""Chapter 02 against oracles: torch's attention and averaging, diffusers' blocks and its whole U-Net."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed, seeded, unet_of_diffusers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lecture26 import unet
from lecture26.ddpm import Diffusion, ddim_step, ddpm_step, linear_betas, sample
from lecture26.recipes import load_model
from lecture26.unet import (
    EMA,
    DownLevels,
    LabelEmbedding,
    ResidualBlock,
    SelfAttention,
    StepEmbedding,
    UNet,
    attention,
    ema_update,
    group_norm,
    patchify,
    scale_shift,
    timestep_embedding,
    unpatchify,
    zero_init,
)

SMALL = {"base_channels": 16, "channel_multipliers": (1, 2), "num_blocks": 1, "attention_levels": (1,)}


# Telling the network the step


@pytest.mark.parametrize("dim", [2, 32, 130])
def test_timestep_embedding_is_that_of_diffusers(dim):
    t = torch.tensor([0, 1, 17, 999])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    agree(timestep_embedding(t, dim), expected, 1e-6)
    agree(
        timestep_embedding(t.float(), dim, max_period=100.0), reference_embedding(t, dim, 100.0).float(), 1e-4
    )


def reference_embedding(t, dim, max_period):
    rows = []
    for step in t.tolist():
        angles = [step / max_period ** (2 * k / dim) for k in range(dim // 2)]
        rows.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("max_period", [10_000.0, 50.0])
def test_timestep_embedding_in_closed_form(max_period):
    t = torch.tensor([0.0, 0.5, 17.0, 999.0], dtype=torch.float64)
    agree(timestep_embedding(t, 16, max_period), reference_embedding(t, 16, max_period), 1e-11)


# Labels


def test_label_embeddings_add_up():
    embedding = LabelEmbedding((3, 5), 8)
    assert [table.num_embeddings for table in embedding.tables] == [4, 6]  # the last row is for 'no label'
    labels = torch.tensor([[0, 4], [3, 5]])
    expected = embedding.tables[0].weight[[0, 3]] + embedding.tables[1].weight[[4, 5]]
    agree(embedding(labels), expected, 0.0)


@pytest.mark.parametrize(("num_classes", "shape"), [(3, (0,)), (3, (0, 1)), ((3, 5), (0, 2))])
def test_no_labels_have_no_embeddings(num_classes, shape):
    assert LabelEmbedding(num_classes, 8)(torch.empty(shape, dtype=torch.int64)).shape == (0, 8)


def test_one_label_needs_no_second_axis():
    embedding = LabelEmbedding(3, 8)
    labels = torch.tensor([0, 3, 2])
    agree(embedding(labels), embedding.tables[0].weight[[0, 3, 2]], 0.0)
    agree(embedding(labels[:, None]), embedding(labels), 0.0)


def test_labels_of_any_integer_type_are_labels():
    embedding, labels = LabelEmbedding((3, 5), 8), torch.tensor([[0, 1], [3, 5], [2, 0], [1, 1]])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        agree(embedding(labels.to(dtype)), embedding(labels), 0.0)


# Blocks


def test_scale_shift():
    h, scale, shift = normal(2, 3, 2, 2), normal(2, 3, seed=1), normal(2, 3, seed=2)
    actual = scale_shift(h, scale, shift)
    for b in range(2):
        for c in range(3):
            agree(actual[b, c], h[b, c] * (1 + scale[b, c]) + shift[b, c], 1e-14)


def test_zero_init():
    layer = nn.Linear(3, 4)
    assert zero_init(layer) is layer
    assert not layer.weight.any() and not layer.bias.any()
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(4, 1), (8, 1), (24, 1), (32, 4), (34, 2), (64, 8), (66, 2), (96, 4), (128, 16), (160, 4), (512, 32)],
)
def test_group_norm_has_groups_of_at_least_8_channels(channels, groups):
    assert group_norm(channels).num_groups == groups
    assert group_norm(channels).num_channels == channels


def test_group_norm_takes_any_width():
    for channels in range(1, 300):
        groups = group_norm(channels).num_groups
        assert channels % groups == 0
        assert groups == 1 or channels // groups >= 8


@torch.no_grad()
def copy_layers(pairs):
    for source, target in pairs:
        target.load_state_dict(source.state_dict())


def copy_residual_block(ours, theirs):
    pairs = [
        (ours.norm_in, theirs.norm1),
        (ours.conv_in, theirs.conv1),
        (ours.embedding, theirs.time_emb_proj),
        (ours.norm_out, theirs.norm2),
        (ours.conv_out, theirs.conv2),
    ]
    if theirs.conv_shortcut is not None:
        pairs.append((ours.skip, theirs.conv_shortcut))
    copy_layers(pairs)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 16), (16, 32), (32, 16)])
def test_residual_block_is_that_of_diffusers(in_channels, out_channels):
    ours = perturbed(ResidualBlock(in_channels, out_channels, embedding_dim=12))
    theirs = ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=12,
        groups=ours.norm_in.num_groups,
        groups_out=ours.norm_out.num_groups,
        eps=1e-5,
        time_embedding_norm="scale_shift",
    ).double()
    copy_residual_block(ours, theirs)
    x, embedding = normal(2, in_channels, 4, 6), normal(2, 12, seed=1)
    agree(ours(x, embedding), theirs(x, embedding), 1e-10)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 16), (16, 32)])
def test_residual_block_starts_as_its_skip(in_channels, out_channels):
    block = ResidualBlock(in_channels, out_channels, embedding_dim=12)
    x, embedding = normal(2, in_channels, 4, 4, dtype=torch.float32), normal(2, 12, dtype=torch.float32)
    agree(block(x, embedding), block.skip(x), 0.0)
    assert block.skip(x).any()


# Attention


def test_attention_is_that_of_torch():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 7, 4, seed=1), normal(2, 3, 7, 6, seed=2)
    agree(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-12)


def test_narrow_maps_have_a_single_head():
    assert SelfAttention(24).heads == 1
    assert SelfAttention(32).heads == 1
    assert SelfAttention(64).heads == 2


@pytest.mark.parametrize(
    ("channel_multipliers", "levels"),
    [((1,), ()), ((1, 2), (1,)), ((1, 2, 2), (1, 2)), ((1, 1, 2, 2), (1, 2, 3))],
)
def test_by_default_all_levels_but_the_first_have_attention(channel_multipliers, levels):
    model = UNet(3, 8, channel_multipliers, num_blocks=1)
    found = tuple(i for i, level in enumerate(model.down) if level.stages[0].attention is not None)
    assert found == levels


@pytest.mark.parametrize("head_dim", [8, 32])
def test_self_attention_is_that_of_torch(head_dim):
    ours = perturbed(SelfAttention(32, head_dim))
    theirs = nn.MultiheadAttention(32, 32 // head_dim, batch_first=True).double()
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    copy_layers([(ours.project, theirs.out_proj)])
    x = normal(2, 32, 3, 4)
    tokens = ours.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
    mixed = theirs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    agree(ours(x), x + mixed, 1e-10)


def test_self_attention_starts_as_the_identity():
    x = normal(2, 32, 3, 4, dtype=torch.float32)
    agree(SelfAttention(32)(x), x, 0.0)


# Patches


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patchify_is_pixel_unshuffle(patch_size):
    x = normal(2, 3, 8, 12)
    patches = patchify(x, patch_size)
    assert torch.equal(patches, F.pixel_unshuffle(x, patch_size))
    assert torch.equal(unpatchify(patches, patch_size), x)


# The whole


def reference_of(ours, in_channels, num_groups, num_classes):
    """The U-Net of diffusers that has the layers of `ours` (two levels, attention at the second one)."""
    theirs = UNet2DModel(
        in_channels=in_channels,
        out_channels=ours.head.out_channels,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=num_groups,
        attn_norm_num_groups=num_groups,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=num_classes + 1,
    ).double()
    copy_layers(
        [
            (ours.time_mlp[0], theirs.time_embedding.linear_1),
            (ours.time_mlp[2], theirs.time_embedding.linear_2),
            (ours.labels.tables[0], theirs.class_embedding),
            (ours.stem, theirs.conv_in),
            (ours.down[0].downsample, theirs.down_blocks[0].downsamplers[0].conv),
            (ours.up[0].upsample, theirs.up_blocks[0].upsamplers[0].conv),
            (ours.head_norm, theirs.conv_norm_out),
            (ours.head, theirs.conv_out),
        ]
    )
    copy_stages([ours.middle_in, ours.middle_out], theirs.mid_block)
    for levels, blocks in ((ours.down, theirs.down_blocks), (ours.up, theirs.up_blocks)):
        for level, block in zip(levels, blocks, strict=True):
            copy_stages(level.stages, block)
    return theirs


def copy_stages(stages, block):
    for stage, resnet in zip(stages, block.resnets, strict=True):
        copy_residual_block(stage.residual, resnet)
    attentions = [stage.attention for stage in stages if stage.attention is not None]
    for ours, theirs in zip(attentions, getattr(block, "attentions", []), strict=True):
        copy_layers([(ours.norm, theirs.group_norm), (ours.project, theirs.to_out[0])])
        projections = (theirs.to_q, theirs.to_k, theirs.to_v)
        weights, biases = ours.qkv.weight.data.chunk(3), ours.qkv.bias.data.chunk(3)
        for projection, weight, bias in zip(projections, weights, biases, strict=True):
            projection.weight.data, projection.bias.data = weight, bias


def test_unet_is_that_of_diffusers(monkeypatch):
    num_groups = 4  # diffusers has one number for all layers
    monkeypatch.setattr(unet, "group_norm", lambda channels: nn.GroupNorm(num_groups, channels))
    ours = perturbed(UNet(3, 32, (1, 2), num_blocks=2, attention_levels=(1,), out_channels=6, num_classes=5))
    theirs = reference_of(ours, 3, num_groups, num_classes=5)
    x_t, t, y = normal(3, 3, 8, 8), torch.tensor([0, 17, 999]), torch.tensor([0, 4, 5])
    agree(ours(x_t, t, y), theirs(x_t, t, y).sample, 1e-10)


@pytest.mark.parametrize(
    ("options", "in_channels", "size", "out_channels"),
    [
        ({}, 3, (8, 8), 3),
        ({"out_channels": 6}, 3, (8, 8), 6),
        ({"patch_size": 2}, 1, (8, 12), 1),
        ({"patch_size": 4, "out_channels": 2}, 1, (16, 8), 2),
        ({"channel_multipliers": (1,), "attention_levels": ()}, 2, (5, 7), 2),
        ({"channel_multipliers": (2, 4, 2, 2), "num_blocks": 2, "attention_levels": (0, 3)}, 3, (16, 8), 3),
    ],
    ids=str,
)
def test_unet_output(options, in_channels, size, out_channels):
    model = UNet(in_channels, **SMALL | options)
    x_t, t = normal(2, in_channels, *size, dtype=torch.float32), torch.tensor([0, 999])
    fresh = model(x_t, t)
    assert fresh.shape == (2, out_channels, *size)
    assert not fresh.any()  # every denoiser begins by predicting 0
    output = perturbed(model)(x_t.double(), t)
    assert output.shape == (2, out_channels, *size) and output.dtype == torch.float64
    assert (output != 0).all()


@pytest.mark.parametrize(
    ("num_classes", "labels"),
    [(10, [0, 3, 10]), ((8, 4), [[0, 0], [8, 1], [2, 4]])],  # 10, 8 and 4 are 'no label'
    ids=["one label", "two labels"],
)
def test_unet_is_conditioned_on_labels(num_classes, labels):
    model = perturbed(UNet(3, **SMALL, num_classes=num_classes))
    x_t, t, labels = normal(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([5, 5, 5]), torch.tensor(labels)
    output = model(x_t, t, labels)
    agree(model(x_t, t, labels.flip(0)), output.flip(0), 1e-12)
    for i in range(2):
        assert not torch.isclose(output[i], output[i + 1]).all()


def test_unet_takes_an_empty_batch():
    model = perturbed(UNet(3, **SMALL, patch_size=2, out_channels=6, num_classes=(2, 3)), torch.float32)
    t, labels = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    assert model(torch.empty(0, 3, 8, 8), t, labels).shape == (0, 6, 8, 8)
    diffusion = Diffusion(linear_betas(100), variance="learned_range").respace(3)
    for step in (ddpm_step, ddim_step):
        samples = sample(diffusion, lambda x_t, t: model(x_t, t, labels), (0, 3, 8, 8), step, progress=False)
        assert samples.shape == (0, 3, 8, 8)


def test_a_way_down_gives_every_map_in_its_order():
    torch.manual_seed(0)
    down = perturbed(DownLevels((4, 8), 2, 6, (None, SelfAttention)))
    h, embedding = normal(2, 4, 6, 6), normal(2, 6, seed=1)
    (first, second), maps = down, down(h, embedding, None)
    halved = first(h, embedding, None)[-1]
    expected = [h, *first(h, embedding, None), *second(halved, embedding, None)]
    assert len(maps) == 6  # what comes in, two stages and a halving, two stages
    for found, wanted in zip(maps, expected, strict=True):
        agree(found, wanted, 0.0)
    assert [tuple(found.shape[1:]) for found in maps] == [(4, 6, 6)] * 3 + [(4, 3, 3)] + [(8, 3, 3)] * 2
    # the names of the levels in every stored network
    assert {name.split(".")[0] for name in down.state_dict()} == {"0", "1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_embedding_is_two_layers_on_the_code_of_the_step(dtype):
    torch.manual_seed(0)
    layers, t = perturbed(StepEmbedding(8, 12), dtype), torch.tensor([0, 3, 999])
    code = timestep_embedding(t, 8).to(dtype)
    hidden = F.silu(F.linear(code, layers[0].weight, layers[0].bias))
    agree(layers(t), F.linear(hidden, layers[2].weight, layers[2].bias), 0.0)
    assert layers(t).dtype == dtype


def test_unet_knows_the_step():
    model = perturbed(UNet(3, **SMALL))
    output = model(normal(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([0, 1, 999]))
    for i in range(2):
        assert not torch.isclose(output[i], output[i + 1]).all()


def test_unet_treats_the_images_of_a_batch_by_themselves():
    model = perturbed(UNet(3, **SMALL, num_classes=4))
    x_t, t, y = normal(3, 3, 8, 8), torch.tensor([0, 20, 999]), torch.tensor([1, 4, 0])
    one_by_one = [model(x_t[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    agree(model(x_t, t, y), torch.cat(one_by_one), 1e-12)


def test_every_parameter_of_the_unet_learns():
    model = perturbed(UNet(3, **SMALL, patch_size=2, out_channels=6, num_classes=(2, 3)))
    t, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([[0, 0], [1, 1], [2, 2], [0, 3]])
    output = model(normal(4, 3, 8, 8), t, labels)
    (output * normal(*output.shape, seed=1)).sum().backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert without == []


def test_first_step_of_training_reaches_what_is_not_hidden_by_zeros():
    """The last layer is 0 at first, yet its own gradient must not be."""
    model = UNet(3, **SMALL)
    output = model(normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 999]))
    (output - 1).square().mean().backward()
    assert model.head.weight.grad.any() and model.head.bias.grad.any()


class Recorder(nn.Module):
    """An attention that notes what it is called with."""

    def __init__(self, channels, calls):
        super().__init__()
        self.channels, self.calls = channels, calls

    def forward(self, h, cond):
        self.calls.append((self.channels, h.shape[1], h.shape[2], cond))
        return h


def test_attention_comes_from_a_factory_and_gets_the_condition():
    calls = []
    model = UNet(3, 16, (1, 2, 3), 1, attention_levels=(0, 2), attention=lambda c: Recorder(c, calls))
    cond = {"tokens": normal(2, 5, 4)}
    model(normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 1]), cond)
    # down to level 2, the middle, and up again with one block more per level
    expected = [(16, 8), (48, 2), (48, 2), (48, 2), (48, 2), (16, 8), (16, 8)]
    assert [(built, height) for built, _, height, _ in calls] == expected
    assert all(built == given for built, given, _, _ in calls)
    assert all(received is cond for *_, received in calls)


def test_attention_changes_the_output():
    class Plus(nn.Module):
        def forward(self, h, cond):
            return h + cond[:, None, None, None]

    model = perturbed(UNet(3, **SMALL, attention=lambda channels: Plus()))
    x_t, t = normal(2, 3, 8, 8), torch.tensor([0, 1])
    output, other = (model(x_t, t, torch.tensor(cond).double()) for cond in ([0, 0], [0, 1]))
    agree(output[0], other[0], 1e-12)
    assert not torch.isclose(output[1], other[1]).any()


def test_unet_round_trip_through_its_state():
    model, other = perturbed(UNet(3, **SMALL, num_classes=4)), UNet(3, **SMALL, num_classes=4).double()
    other.load_state_dict(model.state_dict())
    x_t, t, y = normal(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([1, 4])
    agree(other(x_t, t, y), model(x_t, t, y), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unet_has_the_dtype_of_its_input(dtype):
    model = perturbed(UNet(3, **SMALL), dtype)
    assert model(normal(2, 3, 8, 8, dtype=dtype), torch.tensor([0, 999])).dtype == dtype


def test_unet_takes_channels_last():
    model = perturbed(UNet(3, **SMALL, patch_size=2))
    x_t, t = normal(2, 3, 8, 8), torch.tensor([0, 999])
    expected = model(x_t, t)
    model.to(memory_format=torch.channels_last)
    agree(model(x_t.to(memory_format=torch.channels_last), t), expected, 1e-12)


def test_unet_runs_on_the_device_of_its_input():
    model = perturbed(UNet(3, **SMALL, patch_size=2, num_classes=4), torch.float32)
    x_t, t, y = normal(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 999]), torch.tensor([1, 4])
    expected = model(x_t, t, y)
    with simulated_device():
        there = [tensor.to(SIMULATED) for tensor in (x_t, t, y)]
        output = values_of(model.to(SIMULATED)(*there))
    agree(output, expected, 1e-6)


# Denoisers


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_unet_is_a_denoiser(variance):
    learned = variance == "learned_range"
    model = UNet(3, **SMALL, out_channels=6 if learned else 3)
    diffusion = Diffusion(linear_betas(100), variance=variance, clip=True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x_0 = torch.ones(4, 3, 8, 8) * torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None, None]
    t, noise = torch.tensor([10, 40, 70, 99]), normal(4, 3, 8, 8, dtype=torch.float32)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = diffusion.loss(model, x_0, t, noise)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    samples = sample(diffusion.respace(5), model, (2, 3, 8, 8), generator=seeded(), progress=False)
    assert samples.shape == (2, 3, 8, 8)
    assert samples.isfinite().all() and samples.std() > 0.1


def test_unet_of_diffusers_drops_in_with_one_lambda():
    theirs = unet_of_diffusers()
    diffusion = Diffusion(linear_betas(100), clip=True).respace(10)
    x_T = normal(2, 3, 8, 8)
    denoiser = lambda x_t, t: theirs(x_t, t).sample  # noqa: E731
    ours = sample(diffusion, denoiser, x_T.shape, step=ddim_step, x_T=x_T, progress=False)

    scheduler = DDIMScheduler(100, clip_sample=True)
    scheduler.alphas_cumprod = Diffusion(linear_betas(100)).alpha_bar
    scheduler.set_timesteps(9)  # takes the step before t for t - 11, which is right
    x_t = x_T
    with torch.no_grad():
        for step in reversed(range(0, 100, 11)):
            output = theirs(x_t, step).sample
            x_t = scheduler.step(output, step, x_t, use_clipped_model_output=True).prev_sample
    agree(ours, x_t, 1e-10)


# Functions with the classes' arithmetic


def test_the_way_up_takes_each_map_once_the_last_one_first():
    maps = [torch.tensor(float(number)) for number in range(6)]
    told = []

    def level(h, skips, embedding, cond):
        told.append((h.item(), [skip.item() for skip in skips], embedding, cond))
        return h + 1

    result = unet.unet_forward(
        maps[0], "e", "c", lambda h, e, c: [h, *maps[1:]], lambda h, e, c: h + 10, [level] * 3
    )
    assert told == [(15.0, [5.0, 4.0], "e", "c"), (16.0, [3.0, 2.0], "e", "c"), (17.0, [1.0, 0.0], "e", "c")]
    assert result == 18.0


@pytest.mark.parametrize(
    "name", ["ddpm_shapes32", "conditional_ddpm_shapes32", "noisy_classifier_shapes32", "vae_shapes64"]
)
def test_shipped_weights_still_fit(name):
    """Loading is strict: every key of the file is one of the network, and the other way round."""
    assert sum(weights.numel() for weights in load_model(name).parameters()) > 100_000


# Averaging the weights


def test_ema_update():
    average, parameter = normal(3, 4), normal(3, 4, seed=1)
    agree(ema_update(average, parameter, 0.9), average + 0.1 * (parameter - average), 1e-14)
    agree(ema_update(average, parameter, 0.0), parameter, 0.0)
    agree(ema_update(average, parameter, 1.0), average, 0.0)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


@torch.no_grad()
def walk(model, generator):
    """Change a model's weights and buffers."""
    for parameter in model.parameters():
        parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    model[1].running_mean += 1
    model[1].num_batches_tracked += 1


def test_ema_is_that_of_torch_after_the_warm_up():
    model = network()
    ours = EMA(model, decay=0.9)
    ours.num_updates.fill_(1000)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.n_averaged.fill_(1)
    generator = seeded()
    for _ in range(5):
        walk(model, generator)
        ours.update(model)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    assert ours.num_updates == 1005
    for name, value in ours.model.state_dict().items():
        agree(value, expected[name], 1e-12)
    assert not torch.isclose(ours.model[0].weight, model[0].weight).any()
    agree(ours.model[1].running_mean, model[1].running_mean, 0.0)


def test_ema_warms_up():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.22)
    nn.init.ones_(model.weight)
    distance = 1.0  # from the average to the model, which no longer moves
    for decay in (1 / 10, 2 / 11, 0.22, 0.22):  # 3 / 12 is more than 0.22
        ema.update(model)
        distance *= decay
        agree(ema.model.weight, torch.tensor([[1 - distance]], dtype=torch.float64), 1e-14)


def test_ema_follows_closely_at_first_with_its_usual_decay():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ema = EMA(model)
    nn.init.ones_(model.weight)
    for _ in range(20):
        ema.update(model)
    assert ema.model.weight > 0.999
    assert EMA(model).decay == 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ema_of_a_model_in_half_precision_does_not_stop_on_its_way(dtype):
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).to(dtype)
    nn.init.zeros_(model[0].weight)
    ema = EMA(model)
    ema.num_updates.fill_(10_000)  # past the warm-up
    nn.init.ones_(model[0].weight)
    for _ in range(5000):
        ema.update(model)
    # 1 - 0.999^5000 = 0.993; a step of 0.001 * (1 - 0.5) is lost in half precision
    assert ema.model[0].weight.item() == pytest.approx(1 - 0.999**5000, abs=1e-4)
    assert model[0].weight.dtype == dtype
    assert {v.dtype for v in ema.model.state_dict().values()} == {torch.float32, torch.int64}
    assert ema.model(torch.ones(2, 1)).dtype == torch.float32


def test_ema_keeps_other_precisions():
    for dtype in (torch.float32, torch.float64):
        assert EMA(nn.Linear(1, 1).to(dtype)).model.weight.dtype == dtype
    layer = nn.Linear(1, 1)
    layer.register_buffer("count", torch.tensor(3))
    assert EMA(layer).model.count.dtype == torch.int64


def test_ema_keeps_a_frozen_copy():
    model = network()
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model, decay=0.9)
    walk(model, seeded())
    for name, value in ema.model.state_dict().items():
        agree(value, before[name], 0.0)
    ema.update(model)
    assert not any(module.training for module in ema.model.modules())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_ema_round_trip_through_its_state():
    model = network()
    ema, other = EMA(model, decay=0.9), EMA(network(), decay=0.9)
    generator = seeded()
    for _ in range(3):
        walk(model, generator)
        ema.update(model)
    other.load_state_dict(ema.state_dict())
    walk(model, generator)
    for average in (ema, other):
        average.update(model)
    expected = ema.model.state_dict()
    for name, value in other.model.state_dict().items():
        agree(value, expected[name], 0.0)


def test_ema_of_a_compiled_network_is_one_of_the_network_itself():
    torch.manual_seed(0)
    network = nn.Sequential(torch.compile(nn.Linear(2, 3), backend="eager"), nn.BatchNorm1d(3))
    ema = EMA(torch.compile(network, backend="eager"), decay=0.5)
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    plain.load_state_dict(ema.model.state_dict())  # the names are the plain ones
    ema.update(network)
    assert type(network[0]) is not nn.Linear  # what is followed stays compiled
    x = torch.randn(4, 2)
    agree(ema.model(x), plain.eval()(x), 1e-6)


def test_ema_of_another_network_is_refused():
    ema = EMA(network())
    with pytest.raises((ValueError, RuntimeError)):
        ema.update(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double())
    with pytest.raises(ValueError):
        ema.update(nn.Linear(3, 4).double())


# Wrong arguments

T, X = torch.tensor([0, 1]), normal(2, 3, 8, 8, dtype=torch.float32)
PLAIN, LABELLED, PATCHED = (
    UNet(3, **SMALL, **options) for options in ({}, {"num_classes": 3}, {"patch_size": 2})
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: timestep_embedding(T, 7), ValueError, "dim must be even.*got dim=7"),
        (
            lambda: SelfAttention(48),
            ValueError,
            "channels must be a multiple of head_dim=32; got channels=48",
        ),
        (
            lambda: UNet(3, base_channels=40, attention_levels=(0,)),
            ValueError,
            "channels must be a multiple of head_dim=32; got channels=40",
        ),
        (
            lambda: patchify(normal(1, 3, 8, 9), 2),
            ValueError,
            "x must have sides that are multiples of 2; got 8 x 9",
        ),
        (
            lambda: patchify(normal(1, 3, 6, 8), 4),
            ValueError,
            "x must have sides that are multiples of 4; got 6 x 8",
        ),
        (
            lambda: LabelEmbedding((2, 3), 8)(torch.tensor([0, 1])),
            ValueError,
            r"cond must hold 2 integer label\(s\) per sample; got torch.int64 of shape \(2,\)",
        ),
        (
            lambda: LabelEmbedding(3, 8)(torch.tensor([[0, 1]])),
            ValueError,
            r"cond must hold 1 integer label\(s\) per sample; got torch.int64 of shape \(1, 2\)",
        ),
        (
            lambda: LabelEmbedding(3, 8)(torch.tensor([0.0, 1.0])),
            ValueError,
            r"cond must hold 1 integer label\(s\) per sample; got torch.float32 of shape \(2,\)",
        ),
        (
            lambda: LabelEmbedding((2, 3), 8)(torch.empty(0, dtype=torch.int64)),
            ValueError,
            r"cond must hold 2 integer label\(s\) per sample; got torch.int64 of shape \(0,\)",
        ),
        (
            lambda: UNet(3, channel_multipliers=(1, 2), attention_levels=(1, 2)),
            ValueError,
            r"attention_levels must be among the levels 0 to 1; got \(1, 2\)",
        ),
        (
            lambda: UNet(3, attention_levels=(-1,)),
            ValueError,
            r"attention_levels must be among the levels 0 to 2; got \(-1,\)",
        ),
        (
            lambda: UNet(3, attention_levels=(1)),
            TypeError,
            r"attention_levels must be a tuple, such as .*; got 1",
        ),
        (
            lambda: UNet(3, channel_multipliers=(2)),
            TypeError,
            r"channel_multipliers must be a tuple, such as .*; got 2",
        ),
        (
            lambda: UNet(3, channel_multipliers=(), attention_levels=()),
            ValueError,
            r"channel_multipliers must hold a width per level; got \(\)",
        ),
        (lambda: UNet(3, 0), ValueError, "base_channels must be at least 1; got 0"),
        (lambda: UNet(3, 33), ValueError, "base_channels must be even.*got base_channels=33"),
        (lambda: UNet(3, num_blocks=0), ValueError, "num_blocks must be at least 1; got 0"),
        (lambda: UNet(3, patch_size=0), ValueError, "patch_size must be at least 1; got 0"),
        (lambda: LABELLED(X, T), (TypeError, ValueError), "cond must hold .* got None"),
        (
            lambda: LABELLED(X, T, torch.ones(2, dtype=torch.bool)),
            ValueError,
            "cond must hold .* integer .* got torch.bool",
        ),
        (lambda: LABELLED(X, T, T + 3), ValueError, r"cond must .*\[0, 3\].* got .*4"),
        (lambda: LABELLED(X, T, T[:1]), ValueError, r"cond must .*2.* got .*\(1,\)"),
        (lambda: PLAIN(X, 5), ValueError, r"t must .*\(2,\).* got 5"),
        (lambda: PLAIN(X, T[:1]), ValueError, r"t must .*\(2,\).* got \(1,\)"),
        (lambda: PLAIN(X[..., :7], T), ValueError, "x_t must .* multiples of 2; got 8 x 7"),
        (lambda: PATCHED(X[..., :6, :], T), ValueError, "x_t must .* multiples of 4; got 6 x 8"),
        (lambda: EMA(nn.Linear(1, 1), decay=1.5), ValueError, r"decay must lie in \[0, 1\]; got decay=1.5"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
