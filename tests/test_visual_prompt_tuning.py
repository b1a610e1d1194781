"""Chapter 08 against oracles: timm's own forward pass with hooks, on many backbones; files; the bank."""

import copy
import hashlib
import io
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from simulated_device import SIMULATED, simulated_device, values_of
from tensors import agree, normal, perturbed
from timm.models import ResNet, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from lecture26.visual_prompt_tuning import (
    VPT,
    Adapter,
    LoRALinear,
    PromptBank,
    adapter_tuning,
    attention_to_prompts,
    attention_weights,
    backbone_fingerprint,
    bias_tuning,
    full_fine_tune,
    insert_prompts,
    linear_probe,
    load_task,
    lora_linear,
    lora_tuning,
    own_head,
    patches,
    pooled,
    prompted_tokens,
    replace_prompts,
    save_task,
    storage_ratio,
    trainable_parameters,
)

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
RESTLESS = {f"{part}drop_rate": 0.4 for part in ("pos_", "patch_", "proj_", "attn_")} | {"drop_rate": 0.4}
RESTLESS |= {"drop_path_rate": 0.5}
KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "class token without a position": {"no_embed_class": True, "reg_tokens": 1},
    "norm before the blocks": {"pre_norm": True},
    "layer scale": {"init_values": 1e-5},
    "normalised queries and keys": {"qk_norm": True},
    "oblong patches": {"patch_size": (4, 2)},
    "no final norm": {"final_norm": False},
    "norm behind the pooling": {"fc_norm": True},
    "any image size": {"dynamic_img_size": True},
    "no positions": {"pos_embed": "none"},
    "dropout everywhere": RESTLESS,
    "mean of the patches": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "attention pooling beside a class token": {"global_pool": "map", "reg_tokens": 2},
    "mean with the class token": {"global_pool": "avg", "pool_include_prefix": True},
    "distilled": {"distilled": True},
}


def small_vit(kind="plain", dtype=torch.float64, **changes):
    """A backbone of random weights, none of them 0, in training mode as a careless user hands it over."""
    options = SIZES | KINDS[kind] | changes
    make = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    torch.manual_seed(0)
    return perturbed(make(**options), dtype).train()


def small_vpt(vit, num_prompts=4, deep=True, num_classes=3, seed=1, **options):
    """Prompts as large as tokens, so that they count."""
    torch.manual_seed(seed)
    model = VPT(vit, num_classes, num_prompts, deep, **options)
    with torch.no_grad():
        model.prompts += normal(*model.prompts.shape, seed=seed, dtype=model.prompts.dtype)
    return model.eval()


def images(count=3, size=(16, 16), seed=2, dtype=torch.float64):
    return normal(count, 3, *size, seed=seed, dtype=dtype)


def tokens_by_hooks(vit, x, prompts, last=False):
    """What timm's own forward pass gives for the patches and what stands before them, (B, N, d).

    Before block i a hook puts prompts[i] (n, d) behind the prefix, or behind everything: attention does not
    mind where. Those of an earlier block are taken out again.
    """
    n = prompts.shape[1]

    def place(h):
        return h.shape[1] if last else vit.num_prefix_tokens

    def without(h):
        start = place(h) - (n if last else 0)
        return torch.cat([h[:, :start], h[:, start + n :]], dim=1)

    def hook_of(i):
        def put(block, arguments):
            h = without(arguments[0]) if i else arguments[0]
            return (torch.cat([h[:, : place(h)], prompts[i].expand(len(x), n, -1), h[:, place(h) :]], dim=1),)

        return put

    vit.eval()
    handles = [vit.blocks[i].register_forward_pre_hook(hook_of(i)) for i in range(len(prompts))]
    try:
        return without(vit.forward_features(x))
    finally:
        for handle in handles:
            handle.remove()


def recorded_inputs(vit, run):
    """What each block is called with while run() runs, block by block."""
    inputs = []
    handles = [
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in vit.blocks
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def trained(model, x, steps=5, learning_rate=0.05, weight_decay=0.5):
    """Train on any labels, with all parameters handed to the optimiser; the first and the last loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    labels, losses = torch.arange(len(x)) % 3, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def same_tensors(one, other):
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Patches and attention


@pytest.mark.parametrize(("p", "size"), [(4, (16, 16)), (2, (6, 10)), (5, (5, 15))])
def test_patches_times_the_kernel_are_the_tokens_of_timm(p, size):
    embed = timm.layers.PatchEmbed(img_size=size, patch_size=p, in_chans=3, embed_dim=7).double()
    x = images(size=size)
    tokens = patches(x, p) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    agree(tokens, embed(x), 1e-12)


@pytest.mark.parametrize("size", [(16, 15), (15, 16)])
def test_pictures_that_cannot_be_cut_are_refused(size):
    with pytest.raises(ValueError, match=rf"multiples of 4; got \(3, 3, {size[0]}, {size[1]}\)"):
        patches(images(size=size), 4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_weights_are_those_inside_timms_layer(qk_norm):
    attn, seen = small_vit(qk_norm=qk_norm).eval().blocks[1].attn, []
    attn.fused_attn = False  # so that the weights pass through attn_drop
    attn.attn_drop.register_forward_hook(lambda module, given, output: seen.append(output))
    tokens = normal(2, 9, 24)
    attn(tokens)
    agree(attention_weights(attn, tokens), seen[0], 1e-12)


def test_the_share_of_prompts_is_what_they_mix_in():
    """An attention layer with prompts is a blend of what it was without them and of the prompts' values."""
    attn, prompts = small_vit().eval().blocks[0].attn, normal(4, 24, seed=3)
    attn.proj = nn.Identity()
    tokens = normal(2, 9, 24)
    whole = insert_prompts(tokens, prompts, 1)
    share = attention_to_prompts(attention_weights(attn, whole), 1, 4)  # (2, heads, 13)
    others = [0, *range(5, 13)]
    alone = attn(tokens).unflatten(-1, (2, -1)).transpose(1, 2)  # (2, heads, 9, d_h)
    mixed = attn(whole).unflatten(-1, (2, -1)).transpose(1, 2)[:, :, others]
    share = share[:, :, others, None]
    values = attn.qkv(whole)[..., 48:].unflatten(-1, (2, -1)).transpose(1, 2)[:, :, 1:5]
    weights = attention_weights(attn, whole)[:, :, others, 1:5]
    agree(mixed, (1 - share) * alone + weights @ values, 1e-12)
    assert 0 < share.min() and share.max() < 1


# Prompts in the network


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_prompts_the_backbone_computes_what_it_did(kind, deep):
    vit, x = small_vit(kind), images()
    model = VPT(vit, 3, 0, deep).train()
    features = model.forward_features(x)
    agree(features, copy.deepcopy(vit).eval().forward_features(x), 0.0)
    agree(pooled(vit, features, 0), vit.forward_head(vit.forward_features(x), pre_logits=True), 1e-12)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_act_as_in_timms_own_forward_pass(kind, deep, last):
    vit, x = small_vit(kind), images()
    model = small_vpt(vit, deep=deep)
    tokens = tokens_by_hooks(vit, x, model.prompts, last)
    features, first = model.forward_features(x), vit.num_prefix_tokens
    agree(torch.cat([features[:, :first], features[:, first + 4 :]], dim=1), tokens, 1e-10)
    expected = model.head(vit.forward_head(tokens, pre_logits=True))
    agree(model(x), expected, 1e-10)
    without = model.head(vit.forward_head(vit.forward_features(x), pre_logits=True))
    assert not torch.isclose(model(x), without, rtol=1e-4).any()  # the prompts count
    if deep:
        shallow = prompted_tokens(vit, x, model.prompts[:1])
        assert not torch.isclose(shallow, features, rtol=1e-4).all(dim=2).any()


NAMED = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch32_clip_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch16_siglip_224": {},
}


@pytest.mark.parametrize("name", NAMED)
def test_models_by_name_agree_with_their_own_forward_pass(name):
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5} | NAMED[name]
    torch.manual_seed(0)
    vit = perturbed(timm.create_model(name, pretrained=False, **options))
    x = images(2, (options["img_size"],) * 2)
    agree(linear_probe(vit, 3).forward_features(x), vit.forward_features(x), 0.0)
    model = small_vpt(vit)
    tokens = tokens_by_hooks(vit, x, model.prompts)
    agree(model(x), model.head(vit.forward_head(tokens, pre_logits=True)), 1e-10)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "registers", "no class token", "distilled"])
def test_every_block_has_the_prompts_in_their_places(kind, deep):
    vit, x = small_vit(kind), images()
    model = small_vpt(vit, deep=deep)
    inputs = recorded_inputs(vit, lambda: model(x))
    first, count = vit.num_prefix_tokens, vit.num_prefix_tokens + 4 + 16
    assert [tuple(given.shape) for given in inputs] == [(3, count, 24)] * 3
    for number, given in enumerate(inputs):
        there = given[:, first : first + 4]
        if deep or number == 0:  # as they are learned: no position is added
            agree(there, model.prompts[number].expand(3, -1, -1), 0.0)
        else:
            assert not torch.isclose(there, model.prompts[0]).all(dim=2).any()
    own = recorded_inputs(vit, lambda: vit.forward_features(x))[0]
    agree(torch.cat([inputs[0][:, :first], inputs[0][:, first + 4 :]], dim=1), own, 0.0)


def test_prompts_have_no_order():
    vit, x = small_vit(), images()
    model = small_vpt(vit, deep=False)
    expected = model(x)
    with torch.no_grad():
        model.prompts.copy_(model.prompts[:, [2, 0, 3, 1]])
    agree(model(x), expected, 1e-10)


@pytest.mark.parametrize("deep", [False, True])
def test_each_sample_may_have_prompts_of_its_own(deep):
    vit, x = small_vit().eval(), images()
    layers = 3 if deep else 1
    own = normal(layers, 3, 4, 24)
    together = prompted_tokens(vit, x, own)
    one_by_one = [prompted_tokens(vit, x[i : i + 1], own[:, i]) for i in range(3)]
    agree(together, torch.cat(one_by_one), 1e-12)


@pytest.mark.parametrize("kind", ["plain", "mean of the patches", "attention pooling", "dropout everywhere"])
def test_samples_of_a_batch_do_not_depend_on_each_other(kind):
    model, x = small_vpt(small_vit(kind)), images(4)
    agree(torch.cat([model(row[None]) for row in x]), model(x), 1e-12)
    assert model(x[:0]).shape == (0, 3)


def test_another_image_size_where_the_backbone_takes_any():
    vit, x = small_vit("any image size"), images(size=(24, 8))
    model = small_vpt(vit)
    tokens = tokens_by_hooks(vit, x, model.prompts)
    agree(model(x), model.head(vit.forward_head(tokens, pre_logits=True)), 1e-10)


@pytest.mark.parametrize(
    ("kind", "patch_values"), [("plain", 48), ("oblong patches", 24), ("grey pictures", 16)]
)
def test_prompts_begin_within_the_bound_of_the_patch(kind, patch_values):
    options = {"in_chans": 1} if kind == "grey pictures" else KINDS[kind]
    torch.manual_seed(0)
    prompts = VPT(VisionTransformer(**SIZES | options), 3, 100, deep=True).prompts
    bound = math.sqrt(6 / (patch_values + 24))
    assert prompts.shape == (3, 100, 24) and prompts.dtype == torch.float32
    assert 0.99 * bound < prompts.abs().max() <= bound
    # the variance of a uniform distribution, within four standard errors of 7,200 draws
    assert abs(prompts.var() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / 7200)
    assert abs(prompts.mean()) < 4 * bound / math.sqrt(3 * 7200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_backbone(dtype):
    model = small_vpt(small_vit(dtype=dtype))
    assert {tensor.dtype for tensor in (model.prompts, model.head.weight, model.head.bias)} == {dtype}
    assert model(images(dtype=dtype)).dtype == dtype


def test_prompts_and_bank_run_on_the_device_of_their_input():
    vit, x = small_vit(dtype=torch.float32), images(dtype=torch.float32)
    model = small_vpt(vit)
    bank = PromptBank(vit)
    bank.add("a", model)
    expected = model(x).detach()
    with simulated_device():
        model.to(SIMULATED)  # with the backbone that it shares
        there = model(x.to(SIMULATED)).detach()
        rows = [row.detach() for row in bank(x.to(SIMULATED), ["a"] * 3)]
        there, rows = values_of(there), [values_of(row) for row in rows]
    agree(there, expected, 1e-5)
    agree(torch.stack(rows), expected, 1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prompts_work_without_gradients(mode):
    model, x = small_vpt(small_vit()), images()
    with mode():
        output = model(x)
    agree(output.clone(), model(x).detach(), 0.0)
    assert not output.requires_grad


def test_gradients_are_those_of_differences():
    model, x = small_vpt(small_vit(embed_dim=8, depth=2)), images(2)
    w = normal(2, 3, seed=4)

    def objective(prompts, x):
        features = pooled(model.vit, prompted_tokens(model.vit, x, prompts), 4)
        return (w * model.head(features)).sum()

    assert torch.autograd.gradcheck(objective, (model.prompts, x.requires_grad_()), fast_mode=True, atol=1e-5)


# Frozen


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "dropout everywhere", "attention pooling", "distilled"])
def test_training_leaves_the_backbone_as_it_was_bit_for_bit(kind, deep):
    vit, x = small_vit(kind), images(6)
    model = small_vpt(vit, deep=deep, prompt_dropout=0.1)
    before, start = copy.deepcopy(vit.state_dict()), model.task_state_dict()
    upstream = copy.deepcopy(vit).eval()(x)
    first, last = trained(model, x)
    assert last < first
    assert same_tensors(vit.state_dict(), before)
    assert all(parameter.grad is None for parameter in vit.parameters())
    agree(vit(x), upstream, 0.0)  # nothing is forgotten
    end = model.task_state_dict()
    assert all((end[name] != start[name]).all() for name in end)  # every prompt of every block has learned


@pytest.mark.parametrize("wake", ["train", "train of the parent", "train of the backbone", "train(True)"])
def test_the_backbone_stays_in_evaluation_mode(wake):
    vit, x = small_vit("dropout everywhere"), images(6)
    model = small_vpt(vit)
    expected = model(x)
    {
        "train": model.train,
        "train of the parent": nn.Sequential(model).train,
        "train of the backbone": vit.train,
        "train(True)": lambda: model.train(True),
    }[wake]()
    assert model.train() is model and model.training and model.head.training
    assert not any(module.training for module in vit.modules())  # before any image has been seen
    vit.train()
    agree(model(x), expected, 0.0)
    assert not any(module.training for module in vit.modules())


def test_prompt_dropout_is_for_the_prompts_in_training_alone():
    p, vit, x = 0.25, small_vit(), images(200)
    model = small_vpt(vit, num_prompts=5, deep=True, prompt_dropout=p)
    agree(model(x), small_vpt(vit, num_prompts=5)(x), 0.0)
    model.train()
    torch.manual_seed(0)
    inputs = recorded_inputs(vit, lambda: model(x))
    for number, given in enumerate(inputs):
        ratio = given[:, 1:6] / model.prompts[number]  # 0 or 1 / (1 - p), (200, 5, 24)
        lost = ratio == 0
        agree(ratio[~lost], torch.full_like(ratio[~lost], 1 / (1 - p)), 1e-12)
        assert abs(lost.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / lost.numel())
        assert not torch.equal(lost[0], lost[1])  # each image loses others
    own = recorded_inputs(vit, lambda: vit.forward_features(x))[0]
    agree(torch.cat([inputs[0][:, :1], inputs[0][:, 6:]], dim=1), own, 0.0)


@pytest.mark.parametrize(("deep", "num_prompts"), [(False, 4), (True, 4), (True, 1), (False, 0), (True, 0)])
def test_what_trains_are_the_prompts_and_the_head(deep, num_prompts):
    model = VPT(small_vit(), 7, num_prompts, deep)
    layers = 3 if deep else 1
    counted = sum(parameter.numel() for parameter in trainable_parameters(model))
    assert counted == layers * num_prompts * 24 + (24 + 1) * 7
    assert {id(p) for p in trainable_parameters(model)} <= {
        id(model.prompts),
        id(model.head.weight),
        id(model.head.bias),
    }
    assert (model.deep, model.num_prompts) == (deep, num_prompts)


def test_the_storage_ratio_counts_what_trains():
    models = [(VPT(small_vit(depth=depth), 7, n, True), depth, n) for depth, n in ((2, 3), (3, 5))]
    backbone = [
        sum(p.numel() for name, p in m.vit.named_parameters() if "head" not in name) for m, _, _ in models
    ]
    trained_numbers = [sum(p.numel() for p in trainable_parameters(m)) for m, _, _ in models]
    ratio = storage_ratio(
        torch.tensor(backbone).double(), torch.tensor([2, 3]), torch.tensor([3, 5]), torch.tensor([24, 24]), 7
    )
    agree(ratio, torch.tensor(backbone).double() / torch.tensor(trained_numbers), 1e-12)


def test_the_storage_claim_for_large_models():
    """The lecture's 100 to 1000 times, and 0.1% of the parameters, for ViT-B/16."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    numbers = torch.tensor([sum(p.numel() for p in vit.parameters())]).double()
    sizes = {"shallow, n = 100": (1, 100), "deep, n = 100": (12, 100), "deep, n = 10": (12, 10)}
    ratios = {
        name: storage_ratio(numbers, torch.tensor([depth]), n, torch.tensor([768]), 0).item()
        for name, (depth, n) in sizes.items()
    }
    assert {name: round(value) for name, value in ratios.items()} == {
        "shallow, n = 100": 1117,
        "deep, n = 100": 93,
        "deep, n = 10": 931,
    }


# The alternatives


def test_a_linear_probe_is_a_linear_layer_on_the_features():
    vit, x = small_vit("registers"), images(6)
    model = linear_probe(vit, 3)
    assert sum(p.numel() for p in trainable_parameters(model)) == 25 * 3
    features = vit.forward_head(vit.forward_features(x), pre_logits=True)
    agree(model(x), F.linear(features, model.head.weight, model.head.bias), 0.0)
    before = copy.deepcopy(vit.state_dict())
    first, last = trained(model, x)
    assert last < first and same_tensors(vit.state_dict(), before)


@pytest.mark.parametrize("tune", [full_fine_tune, bias_tuning])
@pytest.mark.parametrize("kind", ["plain", "mean of the patches", "attention pooling", "distilled"])
def test_fine_tuning_works_on_a_copy(kind, tune):
    vit, x = small_vit(kind), images(6)
    prompted = small_vpt(vit)
    before, answer = copy.deepcopy(vit.state_dict()), prompted(x)
    model = tune(vit, 3)
    assert not any(parameter.requires_grad for parameter in vit.parameters())  # still frozen for the prompts
    agree(model.eval().forward_features(x), vit.forward_features(x), 0.0)
    first, last = trained(model, x, learning_rate=0.01)
    assert last < first
    assert same_tensors(vit.state_dict(), before)
    agree(prompted(x), answer, 0.0)
    assert model(x).shape == (6, 3)


@pytest.mark.parametrize("kind", ["plain", "distilled", "registers"])
def test_full_fine_tuning_trains_everything(kind):
    vit = small_vit(kind)
    VPT(vit, 3, 2)  # which freezes the backbone
    model = full_fine_tune(vit, 3)
    assert len(trainable_parameters(model)) == len(list(model.parameters()))
    own = {name: parameter.shape for name, parameter in vit.named_parameters() if "head" not in name}
    assert own == {name: p.shape for name, p in model.named_parameters() if "head" not in name}
    start = copy.deepcopy(model.state_dict())
    trained(model, images(6), learning_rate=0.01)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())


def test_bias_tuning_trains_biases_and_the_head():
    model = bias_tuning(small_vit("registers"), 3)
    start = copy.deepcopy(model.state_dict())
    trained(model, images(6), learning_rate=0.01)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if name.endswith(".bias") or name == "head.weight"}
    assert sum(p.numel() for p in trainable_parameters(model)) == (
        24  # patches
        + 3 * (2 * 24 + 3 * 24 + 24 + 4 * 24 + 24)  # two norms, qkv, projection, MLP
        + 24  # last norm
        + (24 + 1) * 3
    )


@pytest.mark.parametrize(
    "kind", ["plain", "registers", "layer scale", "no positions", "normalised queries and keys"]
)
@pytest.mark.parametrize("tune", [lora_tuning, adapter_tuning])
def test_what_is_put_into_the_layers_begins_as_nothing(kind, tune):
    vit, x = small_vit(kind), images()
    model = tune(vit, 3).eval()
    agree(model.forward_features(x), vit.forward_features(x), 1e-12)
    start = copy.deepcopy(model.state_dict())
    trained(model, images(6), steps=2, learning_rate=0.01)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    own = ".down", ".up", ".down.weight", ".down.bias", ".up.weight", ".up.bias", "head.weight", "head.bias"
    assert changed == {name for name in start if name.endswith(own)}
    assert (model.eval().forward_features(x) - vit.forward_features(x)).abs().max() > 1e-4


def test_a_merged_low_rank_change_computes_the_same():
    vit, x = small_vit(), images()
    model = lora_tuning(vit, 3, rank=4)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.up)
    merged = copy.deepcopy(model)
    for block, plain in zip(merged.blocks, vit.blocks, strict=True):
        block.attn.qkv = block.attn.qkv.merged()
        assert type(block.attn.qkv) is nn.Linear
        assert torch.linalg.matrix_rank(block.attn.qkv.weight - plain.attn.qkv.weight) == 4
    agree(merged(x), model(x), 1e-11)
    assert sum(p.numel() for p in merged.parameters()) == sum(
        p.numel() for p in full_fine_tune(vit, 3).parameters()
    )


def test_a_mixed_batch_gets_each_tasks_own_low_rank_change():
    layers = [LoRALinear(nn.Linear(5, 7), rank=2, scale=0.5).double() for _ in range(3)]
    weight, bias = layers[0].linear.weight, layers[0].linear.bias
    for layer in layers:
        nn.init.normal_(layer.up)
        layer.linear = layers[0].linear
    x, tasks = normal(4, 6, 5), [2, 0, 2, 1]
    down, up = (torch.stack([getattr(layers[task], name) for task in tasks]) for name in ("down", "up"))
    alone = torch.stack([layers[task](row[None])[0] for task, row in zip(tasks, x, strict=True)])
    agree(lora_linear(x, weight, bias, down, up, 0.5), alone, 1e-12)


def test_a_low_rank_change_beside_a_layer_without_bias():
    layer = LoRALinear(nn.Linear(5, 7, bias=False), rank=2).double()
    nn.init.normal_(layer.up)
    x = normal(2, 3, 5)
    agree(layer(x), layer.merged()(x), 1e-12)


def test_an_adapter_is_a_bottleneck_beside_the_identity():
    adapter, h = Adapter(6, 2, like=torch.empty(0, dtype=torch.float64)), normal(2, 3, 6)
    assert torch.equal(adapter(h), h)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    bottleneck = F.gelu(h @ adapter.down.weight.T + adapter.down.bias)
    agree(adapter(h), h + bottleneck @ adapter.up.weight.T + adapter.up.bias, 1e-12)
    assert torch.linalg.matrix_rank((adapter(h) - h).flatten(0, 1) - adapter.up.bias) == 2


# A task's state and its file


@pytest.mark.parametrize("deep", [False, True])
def test_a_task_state_holds_what_trains_and_nothing_else(deep):
    vit = small_vit()
    model = small_vpt(vit, deep=deep)
    state = model.task_state_dict()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert same_tensors(state, learned)
    assert not any(tensor.requires_grad for tensor in state.values())
    copied = copy.deepcopy(dict(state))
    trained(model, images())
    assert same_tensors(dict(state), copied)  # a copy: training goes on without it

    other, x = small_vpt(vit, deep=deep, seed=7), images()
    other.load_task_state_dict(model.task_state_dict())
    model.eval()
    agree(other(x), model(x), 0.0)
    trained(other, x)
    assert not torch.equal(other.prompts, model.prompts)


@pytest.mark.parametrize("num_prompts", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_file_gives_the_same_task_again(tmp_path, num_prompts, dtype):
    vit, file = small_vit(dtype=dtype), tmp_path / "task.safetensors"
    model = small_vpt(vit, num_prompts)
    save_task(file, model.task_state_dict())
    state = load_task(file)
    assert same_tensors(state, model.task_state_dict())
    assert state.backbone == backbone_fingerprint(vit)
    again = small_vpt(vit, num_prompts, seed=7)
    again.load_task_state_dict(state)
    agree(again(images(dtype=dtype)), model(images(dtype=dtype)), 0.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["task.safetensors"]
    numbers = sum(p.numel() for p in trainable_parameters(model))
    assert file.stat().st_size < numbers * dtype.itemsize + 1000


def test_a_task_file_is_written_as_it_always_was(tmp_path):
    """So that the files of any version can be read: the file spelled out."""
    vit, checksum = small_vit(), hashlib.sha256()
    state = small_vpt(vit).task_state_dict()
    for name in ("head.bias", "head.weight", "prompts"):
        checksum.update(f"{name} torch.float64 {tuple(state[name].shape)} ".encode())
        checksum.update(state[name].numpy().tobytes())
    told = {"format": "lecture26 task", "backbone": state.backbone, "checksum": checksum.hexdigest()}
    save_task(tmp_path / "new", state)
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == told
    save_file(state, tmp_path / "old", metadata=told)
    assert same_tensors(load_task(tmp_path / "old"), state) and load_task(tmp_path / "old").about == {}
    save_file(state, tmp_path / "without", metadata=told | {"checksum": "0"})
    with pytest.raises(ValueError, match="without is damaged: its checksum is wrong"):
        load_task(tmp_path / "without")


def test_a_task_file_keeps_what_it_is_about(tmp_path):
    vit, file = small_vit(), tmp_path / "task.safetensors"
    state = small_vpt(vit).task_state_dict()
    state.about = {"classes": ["Katze", "犬", "a cow"], "channels": 1}
    save_task(file, state)
    assert load_task(file).about == state.about
    bank = PromptBank(vit)
    bank.load("animals", file)
    bank.save("animals", tmp_path / "again")
    assert load_task(tmp_path / "again").about == state.about
    save_task(file, small_vpt(vit).task_state_dict())
    assert load_task(file).about == {}


def test_a_task_of_the_chapters_size_takes_few_kilobytes(tmp_path):
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3)
    save_task(tmp_path / "task", VPT(vit, 10, 8, deep=True).task_state_dict())
    assert (tmp_path / "task").stat().st_size < 50_000


def test_the_fingerprint_is_that_of_the_weights_but_for_the_head():
    vit = small_vit(dtype=torch.float32)
    mark = backbone_fingerprint(vit)
    assert mark == backbone_fingerprint(copy.deepcopy(vit).double().eval())
    VPT(vit, 3, 2)
    assert mark == backbone_fingerprint(vit)
    headless = copy.deepcopy(vit)
    headless.reset_classifier(9)
    assert mark == backbone_fingerprint(headless)
    marks = {mark}
    for name, tensor in vit.state_dict().items():
        if not name.startswith("head."):
            number = tensor.view(-1)[-1]
            kept = number.item()
            number += 0.01
            marks.add(backbone_fingerprint(vit))
            number.fill_(kept)
    assert len(marks) == len(vit.state_dict()) - 1  # every tensor counts, but weight and bias of the head
    assert backbone_fingerprint(vit) == mark


OTHERS = {
    "another width": ({"embed_dim": 32}, False, "a backbone of 3 blocks of width 32"),
    "another depth": ({"depth": 2}, False, "a backbone of 2 blocks of width 24"),
    "one changed weight": ({}, True, "learned on another one"),
    "another position embedding": ({"img_size": 32}, False, "learned on another one"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_task_of_another_backbone_is_refused(case):
    options, is_changed, message = OTHERS[case]
    state, vit = small_vpt(small_vit()).task_state_dict(), small_vit(**options)
    if is_changed:
        with torch.no_grad():
            vit.blocks[1].mlp.fc1.weight[3, 3] += 1e-3
    model = small_vpt(vit)
    before = model.task_state_dict()
    for take in (model.load_task_state_dict, lambda state: PromptBank(vit).add("task", state)):
        with pytest.raises(ValueError, match=f"state must .*{message}"):
            take(state)
    assert same_tensors(model.task_state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 5}, r"prompts must have the shape of the model's, \(3, 4, 24\); got \(3, 5, 24\)"),
        ({"deep": False}, r"prompts must have the shape of the model's, \(3, 4, 24\); got \(1, 4, 24\)"),
        ({"num_classes": 7}, r"head.weight must have the shape of the model's, \(3, 24\); got \(7, 24\)"),
    ],
)
def test_a_task_of_other_sizes_is_refused_and_changes_nothing(options, message):
    vit = small_vit()
    model = small_vpt(vit)
    before = model.task_state_dict()
    with pytest.raises(ValueError, match=message):
        model.load_task_state_dict(small_vpt(vit, **options).task_state_dict())
    assert same_tensors(model.task_state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), r"must have the tensors .*got prompts, head.weight"),
        (lambda state: state.update({"vit.norm.bias": torch.zeros(24)}), "must have the tensors .*vit.norm"),
        (lambda state: state.update({"prompts": torch.zeros(4, 24)}), r"prompts \(1 or L, n, d\).*\(4, 24\)"),
        (lambda state: state.update({"head.bias": torch.zeros(4)}), r"biases \(K,\)"),
    ],
)
def test_an_incomplete_state_is_refused(change, message):
    vit = small_vit()
    model = small_vpt(vit)
    before, state = model.task_state_dict(), small_vpt(vit, seed=7).task_state_dict()
    change(state)
    for take in (model.load_task_state_dict, lambda state: PromptBank(vit).add("task", state)):
        with pytest.raises(ValueError, match=message):
            take(state)
    assert same_tensors(model.task_state_dict(), before)


def test_a_damaged_task_file_is_refused(tmp_path):
    """Whichever byte is wrong: the file is refused, or (blanks in its header) holds the task all the same."""
    vit, file = small_vit(embed_dim=4, depth=1), tmp_path / "task.safetensors"
    model = small_vpt(vit, 2)
    state = model.task_state_dict()
    state.about = {"classes": ["cat", "cow"]}
    save_task(file, state)
    content, refused = file.read_bytes(), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        file.write_bytes(damaged)
        try:
            loaded = load_task(file)
            model.load_task_state_dict(loaded)
            assert loaded.about == state.about
        except ValueError:
            refused += 1
        assert same_tensors(model.task_state_dict(), state)
    assert refused > len(content) - 20


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_half_a_task_file_is_refused(tmp_path, length):
    file = tmp_path / "task.safetensors"
    save_task(file, small_vpt(small_vit()).task_state_dict())
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="task.safetensors is damaged, or no safetensors file"):
        load_task(file)


def test_other_files_are_refused(tmp_path):
    state = dict(small_vpt(small_vit()).task_state_dict())
    save_file(state, tmp_path / "plain.safetensors")
    with pytest.raises(
        ValueError, match="plain.safetensors is a safetensors file, but its format is not 'lecture26 task'"
    ):
        load_task(tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "pickled.pt")
    (tmp_path / "text").write_text("a text that is longer than a header's length")
    buffer = io.BytesIO()
    pickle.dump(_Trap(), buffer)
    (tmp_path / "trap").write_bytes(buffer.getvalue())
    for name in ("pickled.pt", "text", "trap"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or no safetensors file"):
            load_task(tmp_path / name)
    assert not _Trap.sprung
    with pytest.raises(FileNotFoundError, match="there is no file .*absent"):
        load_task(tmp_path / "absent")


class _Trap:
    """What runs code when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (_Trap, "sprung", True)


def test_a_state_without_its_backbone_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="state must have the attribute `backbone`"):
        save_task(tmp_path / "task", dict(small_vpt(small_vit()).task_state_dict()))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file, model = tmp_path / "task", small_vpt(small_vit())
    save_task(file, model.task_state_dict())
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        save_task(file, small_vpt(small_vit(), seed=7).task_state_dict())
    assert file.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["task"]


# Many tasks on one backbone


def filled_bank(vit, num_prompts=4, deep=True):
    """A bank of three tasks with 3, 7 and 1 classes, and each task's own model."""
    models = {
        name: small_vpt(vit, num_prompts, deep, num_classes, seed)
        for seed, (name, num_classes) in enumerate([("digits", 3), ("counting", 7), ("textures", 1)])
    }
    bank = PromptBank(vit)
    for name, model in models.items():
        bank.add(name, model)
    return bank, models


MIXED = ["counting", "digits", "textures", "digits", "counting", "counting", "textures"]


@pytest.mark.parametrize(("deep", "num_prompts"), [(False, 4), (True, 4), (True, 0)])
@pytest.mark.parametrize(
    "kind", ["plain", "registers", "mean of the patches", "dropout everywhere", "distilled"]
)
def test_a_mixed_batch_gets_each_tasks_own_answers(kind, deep, num_prompts):
    vit, x = small_vit(kind), images(7)
    bank, models = filled_bank(vit, num_prompts, deep)
    bank.train()
    vit.train()
    logits = bank(x, MIXED)
    assert isinstance(logits, list) and len(logits) == 7
    for row, image, name in zip(logits, x, MIXED, strict=True):
        agree(row, models[name](image[None])[0], 1e-10)


@pytest.mark.parametrize("names", [["textures"], ["digits"] * 4, ["counting", "textures"], []])
def test_batches_of_other_kinds(names):
    vit, x = small_vit(), images(len(names))
    bank, models = filled_bank(vit)
    for row, image, name in zip(bank(x, names), x, names, strict=True):
        agree(row, models[name](image[None])[0], 1e-10)


def test_a_bank_in_single_precision():
    vit, x = small_vit(dtype=torch.float32), images(7, dtype=torch.float32)
    bank, models = filled_bank(vit)
    for row, image, name in zip(bank(x, MIXED), x, MIXED, strict=True):
        agree(row, models[name](image[None])[0], 1e-5)


def test_a_mixed_batch_takes_one_pass():
    vit = small_vit()
    bank, _ = filled_bank(vit)
    inputs = recorded_inputs(vit, lambda: bank(images(7), MIXED))
    assert [len(given) for given in inputs] == [7, 7, 7]


def test_tasks_come_and_go(tmp_path):
    vit, x = small_vit(), images(2)
    bank, models = filled_bank(vit)
    assert bank.names == ("digits", "counting", "textures") and len(bank) == 3
    assert "digits" in bank and "music" not in bank
    bank.save("counting", tmp_path / "task")
    bank.remove("counting")
    assert bank.names == ("digits", "textures") and "counting" not in bank
    with pytest.raises(ValueError, match="unknown task 'counting'; there are 'digits', 'textures'"):
        bank(x, ["digits", "counting"])
    bank.load("numbers", tmp_path / "task")
    bank.add("again", load_task(tmp_path / "task"))
    assert bank.names == ("digits", "textures", "numbers", "again")
    rows = bank(x, ["numbers", "again"])
    agree(torch.stack(rows), models["counting"](x), 1e-10)
    for name in bank.names:
        bank.remove(name)
    assert len(bank) == 0
    bank.add("shallow", small_vpt(vit, 2, deep=False))  # an empty bank takes other sizes


def test_a_bank_keeps_what_a_task_was_when_it_came():
    vit, x = small_vit(), images(2)
    model, bank = small_vpt(vit), PromptBank(vit)
    state = model.task_state_dict()
    bank.add("from a model", model)
    bank.add("from a state", state)
    expected = model(x)
    trained(model, x)
    for name in bank.names:
        agree(torch.stack(bank(x, [name] * 2)), expected, 1e-10)


def test_a_bank_trains_nothing_and_stores_no_backbone_twice():
    vit = small_vit("dropout everywhere")
    bank, _ = filled_bank(vit)
    assert trainable_parameters(bank) == []
    assert sum(p.numel() for p in bank.parameters()) == sum(p.numel() for p in vit.parameters())
    assert not bank(images(1), ["digits"])[0].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 5}, "'new' has 5 at each block, and 'digits' 4 at each block"),
        ({"deep": False}, "'new' has 4 at the first block, and 'digits' 4 at each block"),
        ({"num_prompts": 0}, "'new' has 0 at each block, and 'digits' 4 at each block"),
    ],
)
def test_a_task_with_other_prompts_needs_another_bank(options, message):
    vit = small_vit()
    bank, _ = filled_bank(vit)
    with pytest.raises(ValueError, match=message):
        bank.add("new", small_vpt(vit, **options))
    assert bank.names == ("digits", "counting", "textures")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank, x: bank.add("digits", small_vpt(bank.vit)), "there is a task 'digits' already"),
        (lambda bank, x: bank.add("new", small_vpt(small_vit(embed_dim=32))), "3 blocks of width 24"),
        (lambda bank, x: bank.add("new", small_vpt(small_vit(depth=4))), "3 blocks of width 24"),
        (lambda bank, x: bank.remove("music"), "unknown task 'music'; there are 'digits', 'counting'"),
        (lambda bank, x: bank.save("music", "a file"), "unknown task 'music'"),
        (lambda bank, x: bank(x, ["digits", "music"]), "unknown task 'music'"),
        (lambda bank, x: bank(x, ["digits"]), r"names must be a list of 2 names.*got \['digits'\]"),
        (lambda bank, x: bank(x, ["digits"] * 3), "names must be a list of 2 names"),
        (lambda bank, x: bank(x, "ab"), "names must be a list of 2 names.*got 'ab'"),
        (lambda bank, x: PromptBank(bank.vit)(x, ["a", "b"]), "unknown task 'a'; there are none"),
    ],
)
def test_wrong_use_of_a_bank(call, message):
    bank, models = filled_bank(small_vit())
    with pytest.raises(ValueError, match=message):
        call(bank, images(2))
    assert bank.names == ("digits", "counting", "textures")


def test_a_damaged_file_leaves_the_bank_as_it_was(tmp_path):
    bank, _ = filled_bank(small_vit())
    bank.save("digits", tmp_path / "task")
    content = bytearray((tmp_path / "task").read_bytes())
    content[-1] ^= 1
    (tmp_path / "task").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        bank.load("new", tmp_path / "task")
    assert len(bank) == 3


def test_own_head_is_each_tasks_linear_layer():
    features, weights, biases = normal(6, 5), normal(3, 4, 5, seed=1), normal(3, 4, seed=2)
    tasks = torch.tensor([2, 0, 0, 2, 1, 2])
    heads = [nn.Linear(5, 4, dtype=torch.float64) for _ in range(3)]
    for head, weight, bias in zip(heads, weights, biases, strict=True):
        head.load_state_dict({"weight": weight, "bias": bias})
    expected = torch.stack([heads[task](row) for row, task in zip(features, tasks, strict=True)])
    agree(own_head(features, weights, biases, tasks), expected.detach(), 1e-12)


# Wrong arguments


def custom_vit():
    """A subclass with a forward pass of its own."""

    class Custom(VisionTransformer):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    return Custom(**SIZES)


@pytest.mark.parametrize("make", [lambda vit: VPT(vit, 3, 2), lambda vit: full_fine_tune(vit, 3), PromptBank])
@pytest.mark.parametrize(
    ("vit", "error", "message"),
    [
        (nn.Linear(2, 3), TypeError, "vit must be a timm VisionTransformer; got a Linear"),
        (ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), TypeError, "got a ResNet"),
        ("vit_tiny_patch16_224", TypeError, "vit must be a timm VisionTransformer; got a str"),
        (custom_vit(), ValueError, "Custom has a forward_features of its own"),
        (VisionTransformer(**SIZES, global_pool=""), ValueError, "vit must pool its tokens"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(make, vit, error, message):
    with pytest.raises(error, match=message):
        make(vit)
    if isinstance(vit, nn.Module):
        assert all(parameter.requires_grad for parameter in vit.parameters())  # and left alone


VIT = small_vit()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VPT(VIT, 0, 2), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: VPT(VIT, 3.0, 2), TypeError, "num_classes must be an int; got 3.0"),
        (lambda: VPT(VIT, 3, -1), ValueError, "num_prompts must be at least 0; got -1"),
        (lambda: VPT(VIT, 3, 2.0), TypeError, "num_prompts must be an int; got 2.0"),
        (lambda: VPT(VIT, 3, 0.0), TypeError, "num_prompts must be an int; got 0.0"),
        (lambda: VPT(VIT, 3, True), TypeError, "num_prompts must be an int; got True"),
        (lambda: VPT(VIT, 3, False), TypeError, "num_prompts must be an int; got False"),
        (
            lambda: VPT(VIT, 3, 2, prompt_dropout=1.0),
            ValueError,
            r"prompt_dropout must be in \[0, 1\); got 1",
        ),
        (lambda: VPT(VIT, 3, 2, prompt_dropout=-0.1), ValueError, r"prompt_dropout must be .*got -0.1"),
        (lambda: full_fine_tune(VIT, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: bias_tuning(VIT, 2.5), TypeError, "num_classes must be an int; got 2.5"),
        (lambda: linear_probe(VIT, -1), ValueError, "num_classes must be at least 1; got -1"),
        (
            lambda: VPT(VIT, 3, 2)(images(size=(20, 20))),
            ValueError,
            r"shape \(B, 3, 16, 16\); got \(3, 3, 20, 20\)",
        ),
        (
            lambda: VPT(VIT, 3, 2)(images()[:, :1]),
            ValueError,
            r"shape \(B, 3, 16, 16\); got \(3, 1, 16, 16\)",
        ),
        (
            lambda: prompted_tokens(VIT, images(), torch.zeros(2, 4, 24)),
            ValueError,
            "prompts must be for 1 block or for all 3; got 2 sets",
        ),
        (
            lambda: PromptBank(VIT).add("new", bias_tuning(VIT, 3)),
            TypeError,
            "task must be a VPT or the state of one, and files are for load; got a VisionTransformer",
        ),
        (lambda: VPT(VIT, 3, 2)(images()[0]), ValueError, r"shape \(B, 3, 16, 16\); got \(3, 16, 16\)"),
        (lambda: PromptBank(VIT).add("new", "task"), TypeError, "files are for load; got a str"),
        (
            lambda: VPT(small_vit("any image size"), 3, 2)(images(size=(18, 16))),
            ValueError,
            r"\(B, 3, H, W\) with H a multiple of 4 and W of 4; got \(3, 3, 18, 16\)",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_functions_of_tensors_leave_their_arguments_alone():
    tokens, prompts = normal(2, 9, 24), normal(4, 24, seed=1)
    kept = tokens.clone()
    replaced = replace_prompts(insert_prompts(tokens, prompts, 1), 2 * prompts, 1)
    agree(replaced, insert_prompts(tokens, 2 * prompts, 1), 0.0)
    replaced += 1
    assert torch.equal(tokens, kept)
