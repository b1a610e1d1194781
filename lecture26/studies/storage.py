"""What prompts for a large backbone take beside a copy of it: counts, for the sizes that it names."""

from collections.abc import Mapping, Sequence

from lecture26.visual_prompt_tuning import storage_ratio

# ViT-Base, -Large and -Huge of Dosovitskiy et al. 2021 (table 1), by their names in timm
BACKBONES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
}
PROMPTS = (10, 50, 100)


def prompt_storage(
    backbones: Mapping[str, str] = BACKBONES, prompts: Sequence[int] = PROMPTS, num_classes: int = 200
) -> dict:
    """Count what shallow and deep prompts add to backbones, without weights of these.

    Args:
        backbones: timm's name of each.
        prompts: n, at the first block (shallow) or at each (deep).
        num_classes: of the head that is counted as well in the second of the ratios.

    Returns:
        "num_classes" and "runs": for each backbone, depth and n a dict of "backbone", "deep", "num_prompts",
        "parameters" (of the backbone without a head), "trained" (numbers in the prompts), "share" (of the
        backbone's), and "times_less" and "times_less_with_head" (storage of a copy over that of the task).
    """
    import timm  # takes seconds to import
    import torch

    runs = []
    for title, name in backbones.items():
        with torch.device("meta"):  # shapes without memory
            vit = timm.create_model(name, pretrained=False, num_classes=0)
        size = sum(parameter.numel() for parameter in vit.parameters())
        for depth in (1, len(vit.blocks)):
            for n in prompts:
                trained = depth * n * vit.embed_dim
                runs.append(
                    {
                        "backbone": title,
                        "deep": depth > 1,
                        "num_prompts": n,
                        "parameters": size,
                        "trained": trained,
                        "share": trained / size,
                        "times_less": size / trained,
                        "times_less_with_head": storage_ratio(size, depth, n, vit.embed_dim, num_classes),
                    }
                )
    return {"num_classes": num_classes, "runs": runs}
