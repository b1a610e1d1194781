"""Our U-Net against diffusers' UNet2DModel: python benchmarks/unet_against_diffusers.py

Writes data/results/benchmark_unet.json. Parameters, resolution, batch, dtype and threads are the same for
both; runs alternate; "ratio" is diffusers' time over ours. Ours runs twice: plain, layer for layer the same
network; and with 2 x 2 pixels folded into channels, as the course trains it: another network of as many
parameters.
"""

import torch
from _timing import compare
from diffusers import UNet2DModel

from lecture26.kit.results import save_results
from lecture26.unet import UNet

BATCH_SIZE, IMAGE_SIZE, REPEATS = 32, 32, 7
WIDTHS = (32, 64, 96)


def diffusers_unet() -> UNet2DModel:
    """diffusers' network with our widths, blocks, attention and conditioning."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
        resnet_time_scale_shift="scale_shift",
    )


def our_unet(patch_size: int) -> UNet:
    return UNet(3, WIDTHS[0], (1, 2, 3), num_blocks=1, attention_levels=(1, 2), patch_size=patch_size)


def training_step(network, predict, x_t, t, bf16):
    """One AdamW step towards an arbitrary target."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = (predict(x_t, t) - x_t).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def denoising_step(predict, x_t, t, bf16):
    """One evaluation, as a sampler makes it."""

    @torch.no_grad()
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predict(x_t, t)

    return step


def main() -> None:
    x_t = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    t = torch.randint(0, 1000, (BATCH_SIZE,))
    peer = diffusers_unet()
    results = []
    for patch_size in (1, 2):
        ours = our_unet(patch_size)
        for bf16 in (False, True):
            setting = {"patch_size": patch_size, "dtype": "bfloat16 autocast" if bf16 else "float32"}
            networks = ((ours, ours), (peer, lambda x_t, t: peer(x_t, t).sample))
            training = compare(*(training_step(*pair, x_t, t, bf16) for pair in networks), REPEATS)
            denoising = compare(*(denoising_step(predict, x_t, t, bf16) for _, predict in networks), REPEATS)
            results.append(setting | {"training_step": training, "sampling_step": denoising})
            print(setting, training["ratio"], denoising["ratio"], flush=True)
    save_results(
        "benchmark_unet",
        "python benchmarks/unet_against_diffusers.py",
        {
            "batch_size": BATCH_SIZE,
            "image_size": IMAGE_SIZE,
            "parameters": {
                "ours, patch_size 1": sum(p.numel() for p in our_unet(1).parameters()),
                "ours, patch_size 2": sum(p.numel() for p in our_unet(2).parameters()),
                "diffusers": sum(p.numel() for p in peer.parameters()),
            },
            "settings": results,
        },
    )


if __name__ == "__main__":
    main()
