"""What tests of chapters share: seeded tensors, comparison to a tolerance, networks out of their zeros."""

import torch
from diffusers import UNet2DModel


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal noise."""
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def agree(actual, expected, tolerance):
    """Same shape, dtype and device, and values to an absolute and relative tolerance."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def perturbed(module, dtype=torch.float64):
    """The module with noise on every parameter: layers that are 0 at first hide all that lies before."""
    module.to(dtype)
    generator = seeded(5)
    for parameter in module.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return module


def unet_of_diffusers(**settings):
    """A small U-Net of three channels as diffusers has them, without zeros."""
    return perturbed(
        UNet2DModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            norm_num_groups=4,
            **settings,
        )
    )
