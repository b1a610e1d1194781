"""What prompts take beside a backbone: by hand, on a small one."""

import timm

from lecture26.studies.storage import prompt_storage


def test_counts_are_those_of_a_network_that_is_really_there():
    stored = prompt_storage({"ViT-Ti/16": "vit_tiny_patch16_224"}, prompts=(7,), num_classes=5)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    size = sum(parameter.numel() for parameter in vit.parameters())
    shallow, deep = stored["runs"]
    assert [run["deep"] for run in stored["runs"]] == [False, True]
    assert shallow["parameters"] == size and shallow["trained"] == 7 * 192
    assert deep["trained"] == 12 * 7 * 192
    assert deep["share"] == 12 * 7 * 192 / size
    assert deep["times_less"] == size / (12 * 7 * 192)
    assert deep["times_less_with_head"] == size / (12 * 7 * 192 + 193 * 5)
