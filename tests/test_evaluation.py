"""Reading images, attribute accuracy, and the Frechet distance against what is known of it."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from lecture26.kit.data import load
from lecture26.kit.evaluation import (
    attribute_accuracy,
    extract_features,
    frechet_distance,
    read,
    read_right,
    real_against_real,
    recall,
    sample_quality,
)
from lecture26.kit.readers import canonical
from lecture26.kit.shapes import RELATIONS, Scenes, Shapes
from lecture26.recipes import ddpm as ddpm_recipes
from lecture26.recipes import find_recipe, load_model


def draw(generator_seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(generator_seed), dtype=torch.float64)


# Frechet distance


def sample_with(mean, covariance, num_samples, seed=0):
    """Samples (N, F) that have exactly this mean and covariance."""
    noise = draw(seed, num_samples, len(mean))
    noise = noise - noise.mean(dim=0)
    factor = torch.linalg.cholesky(noise.T @ noise / (num_samples - 1))
    whitened = torch.linalg.solve_triangular(factor, noise.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(size, seed):
    factor = draw(seed, size, size)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_frechet_distance_of_independent_features():
    mean_a, mean_b = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 0.5]], dtype=torch.float64)
    samples_a = sample_with(mean_a, std_a.square().diag(), 40, seed=1)
    samples_b = sample_with(mean_b, std_b.square().diag(), 50, seed=2)
    # Dimension by dimension, (mean_a - mean_b)^2 + (std_a - std_b)^2: 9 + 1, 0 + 0, 4 + 6.25.
    assert frechet_distance(samples_a, samples_b) == pytest.approx(20.25, abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_frechet_distance_of_dependent_features(size):
    mean_a, mean_b = draw(3, size), draw(4, size)
    cov_a, cov_b = random_covariance(size, 5), random_covariance(size, 6)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy())
    expected = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(root).real
    distance = frechet_distance(
        sample_with(mean_a, cov_a, 30, seed=7), sample_with(mean_b, cov_b, 20, seed=8)
    )
    assert distance == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_is_zero_between_a_set_and_itself():
    features = draw(0, 100, 6)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_grows_with_a_shift_as_its_square():
    features = draw(0, 100, 6)
    shift = draw(1, 6)
    for factor in (0.1, 1.0, 10.0):
        distance = frechet_distance(features, features + factor * shift)
        assert distance == pytest.approx(factor**2 * shift.square().sum().item(), rel=1e-6)


def test_frechet_distance_sees_a_collapse():
    features = draw(0, 200, 3)
    collapsed = features.mean(dim=0).expand(200, 3)
    # trace(cov_a): the covariance of the other set is 0, and so is that of their product.
    assert frechet_distance(features, collapsed) == pytest.approx(features.var(dim=0).sum().item(), abs=1e-6)


def test_frechet_distance_is_symmetric_and_blind_to_rotation():
    a, b = draw(0, 60, 4), draw(1, 50, 4) @ random_covariance(4, 2) + 1
    rotation = torch.linalg.qr(draw(3, 4, 4)).Q
    distance = frechet_distance(a, b)
    assert distance > 1
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_of_single_precision_features():
    a, b = draw(0, 60, 4) + 100, draw(1, 50, 4) + 100
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-3)


def test_frechet_distance_is_biased_by_the_number_of_samples():
    distances = [frechet_distance(draw(0, n, 8), draw(1, n, 8)) for n in (20, 200, 2000)]
    # The bias falls as 1 / N.
    assert distances[0] > 4 * distances[1] > 16 * distances[2] > 0


@pytest.mark.parametrize(
    ("features_a", "features_b", "message"),
    [
        (torch.zeros(10), torch.zeros(10, 3), r"features_a must be of shape \(samples, features\)"),
        (torch.zeros(10, 3), torch.zeros(10, 3, 1), r"features_b .*got \(10, 3, 1\)"),
        (torch.zeros(10, 3), torch.zeros(10, 4), "must be of one length; got 3 and 4"),
        (torch.zeros(10, 3), torch.zeros(3, 3), "takes at least 4 samples; got 10 and 3"),
        (torch.zeros(0, 3), torch.zeros(10, 3), "takes at least 4 samples; got 0 and 10"),
        (torch.full((10, 3), math.nan), torch.zeros(10, 3), "features_a must be finite"),
        (torch.zeros(10, 3), torch.full((10, 3), math.inf), "features_b must be finite"),
    ],
)
def test_frechet_distance_refuses(features_a, features_b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features_a, features_b)


# Reading


class Oracle(nn.Module):
    """Reads what is written into its images: channel k, everywhere, is the class of label k."""

    def __init__(self, labels, certainty=3.0):
        super().__init__()
        self.labels = labels
        self.certainty = nn.Parameter(torch.tensor(certainty))  # the logit of that class; the others have 0
        self.batch_sizes = []

    def features(self, images):
        self.batch_sizes.append(len(images))
        return images.mean(dim=(2, 3))

    def forward(self, images):
        classes = self.features(images).round().long()
        return {
            name: self.certainty * nn.functional.one_hot(classes[:, k], len(names))
            for k, (name, names) in enumerate(self.labels.items())
        }


def written(attributes):
    """Images that an Oracle reads as these attributes."""
    return torch.stack(list(attributes.values()), dim=1).float()[:, :, None, None].expand(-1, -1, 2, 2)


LABELS = {"digit": ("0", "1", "2"), "slant": ("left", "right")}


def test_reading_gives_the_likeliest_class_and_its_probability():
    wanted = {"digit": torch.tensor([2, 0, 1]), "slant": torch.tensor([0, 1, 1])}
    predicted, confidence = read(Oracle(LABELS), written(wanted))
    assert predicted.keys() == confidence.keys() == LABELS.keys()
    for name, others in (("digit", 2), ("slant", 1)):
        assert torch.equal(predicted[name], wanted[name])
        probability = math.exp(3) / (math.exp(3) + others)
        assert confidence[name].tolist() == pytest.approx([probability] * 3)


def test_batches_are_read_one_after_the_other_and_put_together():
    wanted = {"digit": torch.arange(10) % 3, "slant": torch.arange(10) % 2}
    oracle = Oracle(LABELS)
    predicted, _ = read(oracle, written(wanted), batch_size=4)
    assert oracle.batch_sizes == [4, 4, 2]
    assert torch.equal(predicted["digit"], wanted["digit"])
    features = extract_features(oracle, written(wanted), batch_size=3)
    assert torch.equal(features, torch.stack(list(wanted.values()), dim=1).float())


def test_nothing_is_differentiated():
    images = written({"digit": torch.tensor([1]), "slant": torch.tensor([1])})
    oracle = Oracle(LABELS)
    assert not read(oracle, images).confidence["digit"].requires_grad
    assert not extract_features(oracle, images.requires_grad_()).requires_grad


def test_accuracy_counts_each_label_and_all_at_once():
    shown = {"digit": torch.tensor([0, 1, 2, 0]), "slant": torch.tensor([0, 0, 1, 1])}
    wanted = {"digit": torch.tensor([0, 2, 2, 0]), "slant": torch.tensor([0, 0, 0, 0])}
    accuracy = attribute_accuracy(Oracle(LABELS), written(shown), wanted)
    assert accuracy == {"digit": 0.75, "slant": 0.5, "all": 0.25}
    right = read_right(Oracle(LABELS), written(shown), wanted)
    assert right["all"].tolist() == [True, False, False, False]


def test_accuracy_of_some_of_the_labels():
    shown = {"digit": torch.tensor([0, 1]), "slant": torch.tensor([0, 0])}
    wanted = {"slant": torch.tensor([0, 1])}
    assert attribute_accuracy(Oracle(LABELS), written(shown), wanted) == {"slant": 0.5, "all": 0.5}


def turned_round(attributes):
    """The same scenes, told from the other object: written out, not by `canonical`."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    turned = {
        "relation": torch.tensor(
            [RELATIONS.index(opposite[RELATIONS[relation]]) for relation in attributes["relation"]]
        ),
        "background": attributes["background"],
    }
    for label in ("shape", "colour", "size"):
        turned[f"{label}_1"], turned[f"{label}_2"] = attributes[f"{label}_2"], attributes[f"{label}_1"]
    return turned


def test_a_scene_may_be_told_from_either_object():
    wanted = Scenes("test").attributes(range(64))
    images = written(canonical(wanted))
    oracle = Oracle(Scenes.labels)
    for description in (wanted, turned_round(wanted)):
        assert set(attribute_accuracy(oracle, images, description).values()) == {1.0}
    # But objects that have traded places, or attributes, are another scene.
    mirrored = wanted | {"relation": turned_round(wanted)["relation"]}
    accuracy = attribute_accuracy(oracle, images, mirrored)
    assert accuracy["relation"] == 1.0 and accuracy["background"] == 1.0
    assert accuracy["all"] == 0.0
    recoloured = wanted | {"colour_1": wanted["colour_2"], "colour_2": wanted["colour_1"]}
    same_colour = (wanted["colour_1"] == wanted["colour_2"]).float().mean().item()
    assert attribute_accuracy(oracle, images, recoloured)["all"] == pytest.approx(same_colour)


SHOWN = {"digit": torch.tensor([0, 1]), "slant": torch.tensor([0, 0])}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "wanted must name labels of 'digit', 'slant'; got none"),
        ({"colour": torch.tensor([0, 1])}, "wanted must name labels of 'digit', 'slant'; got 'colour'"),
        ({"digit": torch.tensor([0])}, r"wanted\['digit'\] must be an int64 tensor of shape \(2,\)"),
        ({"digit": torch.tensor([0.0, 1.0])}, r"wanted\['digit'\] .*got torch.float32"),
        ({"digit": torch.tensor([0, 3])}, r"wanted\['digit'\] must be in 0, ..., 2; got 3"),
        ({"digit": torch.tensor([-1, 0])}, r"wanted\['digit'\] must be in 0, ..., 2; got -1"),
    ],
)
def test_accuracy_refuses(wanted, message):
    with pytest.raises(ValueError, match=message):
        attribute_accuracy(Oracle(LABELS), written(SHOWN), wanted)


@pytest.mark.parametrize("function", [read, extract_features])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 2, 2, 2), r"images must be at least one; got shape \(0, 2, 2, 2\)"),
        (torch.full((1, 2, 2, 2), math.nan), "images must be finite"),
    ],
)
def test_reading_refuses(function, images, message):
    with pytest.raises(ValueError, match=message):
        function(Oracle(LABELS), images)


# Samples against real images


def counted_recall(real, drawn):
    """Recall by its definition, one pair of images at a time."""
    inside = []
    for image in real:
        balls = []
        for centre in drawn:
            distances = sorted((centre - other).norm().item() for other in drawn)
            balls.append((image - centre).norm().item() <= distances[3])  # distances[0] is its own, 0
        inside.append(any(balls))
    return sum(inside) / len(inside)


def test_recall_and_precision_by_their_definition():
    real, drawn = draw(0, 30, 3), 0.7 * draw(1, 25, 3)
    assert 0.2 < recall(real, drawn) < 0.9
    assert recall(real, drawn) == pytest.approx(counted_recall(real, drawn))
    assert recall(drawn, real) == pytest.approx(counted_recall(drawn, real))


def test_recall_sees_what_is_missing_and_precision_what_should_not_be_there():
    left, right = draw(0, 100, 2), draw(1, 100, 2) + 50
    both = torch.cat([left, right])
    assert recall(both, draw(2, 100, 2)) < 0.55  # half of the real images are never drawn
    assert recall(draw(2, 100, 2), both) > 0.8  # what is drawn is real
    assert recall(left, draw(2, 100, 2)) > 0.8


@pytest.mark.parametrize(
    ("real", "drawn", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), r"shapes \(N, F\) and \(M, F\); got \(5, 3\) and \(5, 4\)"),
        (torch.zeros(5, 3), torch.zeros(3, 3), "features_drawn must be of more than 3 images.*got 3"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "features_drawn must be finite; got nan"),
    ],
)
def test_recall_refuses(real, drawn, message):
    with pytest.raises(ValueError, match=message):
        recall(real, drawn)


@pytest.fixture(scope="module")
def reader():
    return load_model("reader_shapes32")


def test_real_against_real_is_between_two_halves_without_overlap(reader):
    images = Shapes("test")
    first, second = (
        extract_features(reader, images.batch(part)["image"]) for part in (range(60), range(60, 120))
    )
    assert real_against_real(reader, images, 60) == pytest.approx(frechet_distance(first, second))


def test_real_against_real_refuses_more_than_half_of_the_set(reader):
    digits = load("digits", "test")
    with pytest.raises(ValueError, match=f"num_samples must be at most {len(digits) // 2}, .*got 200"):
        real_against_real(load_model("reader_digits"), digits, 200)
    with pytest.raises(ValueError, match="takes at least 49 samples; got 48 and 48"):
        real_against_real(reader, Shapes("test"), 48)


def test_quality_of_perfect_samples_and_of_worse_ones(reader):
    images = Shapes("test")
    perfect = Shapes("train").batch(range(256))["image"]
    quality = sample_quality(reader, perfect, images)
    assert quality["frechet_distance_real"] == pytest.approx(real_against_real(reader, images, 256))
    assert quality["frechet_distance"] < 1.5 * quality["frechet_distance_real"]
    assert quality["mean_confidence"] > 0.98 and quality["confident_share"] > 0.95

    ghosts = (perfect + perfect.roll(1, dims=0)) / 2  # two shapes, each half transparent
    red = Shapes("train").attributes(range(256)) | {"colour": torch.zeros(256, dtype=torch.int64)}
    one_colour = Shapes("train").render(red, range(256))
    for worse in (ghosts, one_colour):
        assert sample_quality(reader, worse, images)["frechet_distance"] > 2 * quality["frechet_distance"]
    assert sample_quality(reader, ghosts, images)["confident_share"] < 0.5


@pytest.fixture
def small_evaluation(monkeypatch):
    monkeypatch.setattr(ddpm_recipes, "EVALUATION_SAMPLES", 64)
    monkeypatch.setattr(ddpm_recipes, "EVALUATION_STEPS", 3)


def tiny_ddpm(data):
    network = {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "patch_size": 4}
    recipe = dataclasses.replace(find_recipe("ddpm"), data=data, model=network)
    images = recipe.load_images("test")
    recipe = recipe.fitted_to(images)
    torch.manual_seed(0)
    return recipe, recipe.build(), images


@pytest.mark.parametrize("data", ["shapes", "digits"])
def test_evaluation_of_a_denoiser_has_a_reader_look_at_its_samples(small_evaluation, data):
    recipe, model, images = tiny_ddpm(data)
    metrics = recipe.evaluate(model, images)
    assert list(metrics) == [
        "test_loss",
        "samples",
        "frechet_distance",
        "frechet_distance_real",
        "recall",
        "recall_real",
        "mean_confidence",
        "confident_share",
    ]
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["samples"] == 64
    assert metrics["frechet_distance"] > 2 * metrics["frechet_distance_real"]  # the network is untrained
    assert recipe.evaluate(model, images) == metrics


def test_evaluation_of_a_denoiser_without_a_reader(small_evaluation, monkeypatch, tmp_path):
    recipe, model, images = tiny_ddpm("shapes")
    monkeypatch.setenv("LECTURE26_DATA", str(tmp_path))  # no checkpoints there
    assert list(recipe.evaluate(model, images)) == ["test_loss"]
