"""The lecture's quantitative and comparative statements, each beside papers and this course's measurements.

Chapter 09 shows them, and docs/results.md. The papers' numbers were held against the papers' own text, but
those that are marked (s): these are as others quote them. Where ± stands, it is two standard errors.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from lecture26.kit.claims import CARD, Claim, Measurement, Verdict, exceeds, is_above, share_error
from lecture26.recipes.classifiers import EVALUATION_IMAGES
from lecture26.studies.adaptation import UPSTREAM_IMAGES
from lecture26.studies.latents_and_pixels import first_stage_seconds, seconds_to_reach

ADAPTED = tuple(
    f"adaptation_{task}"
    for task in ("digits", "mnist", "line_drawings", "counting", "largest", "xray", "textures")
)
ONE_AXIS = "guidances_on_one_axis"
LATENT = "pixel_against_latent"
CLASSIFIER, CLEAN = "noisy_classifier_shapes32", "clean_classifier_shapes32"
CLEAN_STEP = 400  # of 1000, at which what the two classifiers still read is compared
THROUGH_SCALE = 800.0  # chapter 04's, of guidance through the predicted image
VIT_B = "ViT-B/16"
SIZES = "{seeds} seeds, {fewest} to {most_tested} test images"  # of measurements of accuracy


def chosen(runs: Sequence[Mapping], **wanted: object) -> Mapping:
    """The one run that has these values; ValueError if there is none, or more than one."""
    found = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"runs must hold one with {wanted}; got {len(found)}")
    return found[0]


def mean_accuracy(run: Mapping) -> float:
    """The mean test accuracy of a run's seeds."""
    return statistics.mean(run["accuracy"])


def seeds_error(run: Mapping) -> float:
    """The standard error of a run's mean accuracy that comes from its seeds; 0 of what has no seeds."""
    accuracies = run["accuracy"]
    return statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0


def difference(run: Mapping, other: Mapping) -> tuple[float, float]:
    """How much more accurate a run is than another on the same task, and the standard error of that.

    It has the seeds' scatter and that of counting on the test images in it; that both runs were tested on the
    same images is not made use of, so it is rather too large.
    """
    p, q = mean_accuracy(run), mean_accuracy(other)
    errors = (
        share_error(p, run["tested"]),
        share_error(q, other["tested"]),
        seeds_error(run),
        seeds_error(other),
    )
    return p - q, math.hypot(*errors)


def differences(results: Sequence[Mapping], method: str, other: str) -> list[tuple[str, float, float]]:
    """For each task its name, and `difference` of two methods there, on the course's backbone."""
    rows = []
    for result in results:
        runs = [chosen(result["runs"], method=name) for name in (method, other)]
        rows.append((runs[0]["task"].removeprefix("./"), *difference(*runs)))
    return rows


def _ahead(rows: Sequence[tuple[str, float, float]]) -> dict[str, int]:
    """On how many tasks the difference is above two standard errors, below minus two, or between."""
    ahead = sum(exceeds(value, error) for _, value, error in rows)
    behind = sum(exceeds(-value, error) for _, value, error in rows)
    return {"ahead": ahead, "behind": behind, "ties": len(rows) - ahead - behind, "tasks": len(rows)}


def _sizes(results: Sequence[Mapping]) -> dict[str, int]:
    """How many seeds each run has, and on how few and how many images they were tested."""
    tested = [run["tested"] for result in results for run in result["runs"]]
    return {"seeds": len(results[0]["seeds"]), "fewest": min(tested), "most_tested": max(tested)}


# --- Guidance ---


def _strength(axis: Mapping) -> dict:
    runs = [chosen(_of(axis, "classifier"), strength=strength) for strength in (1.0, 9.0)]
    low, high = runs
    return {
        "low": low["accuracy_all"],
        "high": high["accuracy_all"],
        "low_s": low["strength"],
        "high_s": high["strength"],
        "samples": low["num_samples"],
        "low_distance": low["frechet_distance"],
        "low_bound": 2 * low["frechet_distance_error"],
        "high_distance": high["frechet_distance"],
        "high_bound": 2 * high["frechet_distance_error"],
        "real": low["frechet_distance_real"],
        "large": high["share_large"],
    }


def _of(axis: Mapping, guidance: str) -> list[Mapping]:
    """The runs of a guidance as it is usually done, at all steps."""
    denoiser = "with labels" if guidance == "classifier-free" else "unconditional"
    wanted = {"guidance": guidance, "denoiser": denoiser, "interval": None}
    return [run for run in axis["runs"] if all(run[key] == value for key, value in wanted.items())]


def _clip_beside_classifier(axis: Mapping) -> dict:
    pairs = list(zip(_of(axis, "classifier"), _of(axis, "CLIP"), strict=True))
    gaps = [abs(one["accuracy_all"] - other["accuracy_all"]) for one, other in pairs]
    errors = [
        math.hypot(*(share_error(run["accuracy_all"], run["num_samples"]) for run in pair)) for pair in pairs
    ]
    shares = [run["accuracy_all"] for pair in pairs for run in pair]
    return {
        "gap": max(gaps),
        "ties": sum(gap < 2 * error for gap, error in zip(gaps, errors, strict=True)),
        "least": min(shares),
        "most": max(shares),
        "strengths": len(pairs),
        "samples": pairs[0][0]["num_samples"],
    }


def _two_networks(cost: Mapping, plain: Mapping, classifier: Mapping, told: Mapping) -> dict:
    free, by_classifier = (
        cost["guided_over_unguided"][name]["ratio"] for name in ("classifier-free", "classifier")
    )
    return {
        "one": told["parameters"] / 1e6,
        "denoiser": plain["parameters"] / 1e6,
        "classifier": classifier["parameters"] / 1e6,
        "free": free["median"],
        "free_least": free["min"],
        "free_most": free["max"],
        "by_classifier": by_classifier["median"],
        "by_classifier_least": by_classifier["min"],
        "by_classifier_most": by_classifier["max"],
    }


def _noisy_and_clean(noisy: Mapping, clean: Mapping, sweep: Mapping) -> dict:
    label = f"accuracy_shape_{CLEAN_STEP}"
    unguided = chosen(sweep["runs"], through="none", sampler="ddpm")
    through = chosen(sweep["runs"], through="x_0", scale=THROUGH_SCALE, below=None)
    return {
        "minutes": noisy["seconds"] / 60,
        "noisy": noisy["metrics"][label],
        "clean": clean["metrics"][label],
        "of_clean": clean["metrics"]["accuracy_shape_0"],
        "step": CLEAN_STEP,
        "images": EVALUATION_IMAGES,
        "through": through["accuracy_all"],
        "unguided": unguided["accuracy_all"],
        "samples": through["num_samples"],
    }


def _weight_of_words(evaluation: Mapping) -> dict:
    scenes = [run for run in evaluation["runs"] if (run["part"], run["split"]) == ("scenes", "test")]
    runs = {run["w"]: run for run in scenes}
    without, some, most = runs[0.0], runs[1.0], runs[max(runs)]
    return {
        "without": without["accuracy_asked"],
        "some": some["accuracy_asked"],
        "some_w": some["w"],
        "most": most["accuracy_asked"],
        "most_w": most["w"],
        "samples": some["num_samples"],
    }


def _delicate_weight(axis: Mapping) -> dict:
    runs = _of(axis, "classifier-free")
    bayes, twice = (chosen(runs, strength=strength) for strength in (1.0, 2.0))
    kept = next(run for run in axis["runs"] if run["interval"] is not None)
    return {
        "bayes": bayes["frechet_distance"],
        "bayes_bound": 2 * bayes["frechet_distance_error"],
        "bayes_w": bayes["strength"] - 1,
        "twice": twice["frechet_distance"],
        "twice_bound": 2 * twice["frechet_distance_error"],
        "twice_w": twice["strength"] - 1,
        "real": bayes["frechet_distance_real"],
        "kept": kept["frechet_distance"],
        "kept_bound": 2 * kept["frechet_distance_error"],
        "kept_w": kept["strength"] - 1,
        "samples": bayes["num_samples"],
    }


GUIDANCE = (
    Claim(
        "guidance",
        "A larger gradient scale s enforces the class more strongly",
        "Dhariwal and Nichol 2021, table 4 (3 in the proceedings), ImageNet at 256 pixels, FID and IS. "
        "Unconditional model: 26.21 and 39.70 unguided, 33.03 and 32.92 at s = 1, 12.00 and 95.41 at s = "
        "10. Conditional model: 10.94 and 100.98; 4.59 and 186.70; 9.11 and 283.92",
        Verdict.HOLDS,
        "Obedience rises with s here, and there but for the unconditional model's first step; the distance "
        "from the data rises with it here, and from some s on in the paper's conditional model. It is a "
        "trade.",
        Measurement(
            (ONE_AXIS,),
            _strength,
            "{low:.0%} as asked for at s = {low_s:g}, {high:.0%} at s = {high_s:g}; Fréchet distance "
            "{low_distance:.0f} ± {low_bound:.0f} and {high_distance:.0f} ± {high_bound:.0f} (real images "
            "{real:.0f}), most shapes being large then ({large:.0%}); {samples} samples each",
            lambda n: (
                is_above(n["high"], n["low"], n["samples"])
                and n["high_distance"] - n["low_distance"] > math.hypot(n["low_bound"], n["high_bound"])
                and n["large"] > 0.5
            ),
        ),
    ),
    Claim(
        "guidance",
        "CLIP guidance works like classifier guidance",
        "Nichol et al. 2022 (GLIDE), section 2.4: the classifier's gradient is replaced by that of the "
        "similarity; people there prefer classifier-free guidance to it (abstract)",
        Verdict.HOLDS,
        "At equal strengths the two rise alike, if the similarity is divided by its temperature first: both "
        "are meant to be gradients of one log-probability. Exact ones would be equal; these are not quite.",
        Measurement(
            (ONE_AXIS,),
            _clip_beside_classifier,
            "over {strengths} equal strengths the shares as asked for rise from {least:.0%} to {most:.0%}, "
            "and never lie more than {gap:.0%} apart; at {ties} of them they are a tie; {samples} samples "
            "each",
            lambda n: n["gap"] < (n["most"] - n["least"]) / 4,
        ),
    ),
    Claim(
        "guidance",
        "A guiding classifier has to be trained separately",
        "Dhariwal and Nichol 2021, section 4: trained on noisy images, by the step. Bansal et al. 2023, "
        "section 3: what was trained on clean images guides as well, through the predicted image",
        Verdict.HOLDS,
        "A second network it is in any case. One for clean images reads few of the noisy ones; a CLIP for "
        "clean images does guide when it is shown the predicted one, at the price of a way back through the "
        "denoiser (chapter 04).",
        Measurement(
            (CARD + CLASSIFIER, CARD + CLEAN, "clip_guidance_sweep"),
            _noisy_and_clean,
            "{minutes:.0f} minutes of training; at step {step} it reads the shape of {noisy:.0%} of {images} "
            "images. One that was trained on clean images reads {of_clean:.0%} of these, and {clean:.0%} at "
            "that step. Through the predicted image a CLIP for clean ones guides: {through:.0%} of {samples} "
            "as asked for, {unguided:.0%} without it",
            lambda n: (
                is_above(n["noisy"], n["clean"], n["images"])
                and n["clean"] < 0.5
                and is_above(n["through"], n["unguided"], n["samples"])
            ),
        ),
    ),
    Claim(
        "guidance",
        "Classifier-free guidance needs no classifier and simplifies the workflow",
        "Ho and Salimans 2022, section 3.2, algorithms 1 and 2: one network, its labels dropped at random",
        Verdict.HOLDS,
        "One network in the place of two; it is paid for at each step, where the network is asked twice.",
        Measurement(
            (
                "benchmark_guidance",
                CARD + "small_ddpm_shapes32",
                CARD + CLASSIFIER,
                CARD + "conditional_ddpm_shapes32",
            ),
            _two_networks,
            "{one:.2f} million parameters instead of {denoiser:.2f} and {classifier:.2f}; a guided step "
            "takes {free:.1f} times an unguided one ({free_least:.1f} to {free_most:.1f}), with a "
            "classifier {by_classifier:.1f} times ({by_classifier_least:.1f} to {by_classifier_most:.1f})",
            lambda n: n["one"] < n["denoiser"] + n["classifier"] and n["free_least"] > 1.5,
        ),
    ),
    Claim(
        "guidance",
        "w controls how strongly the condition acts",
        "Ho and Salimans 2022, table 1, ImageNet at 64 pixels: IS 53.71 at w = 0, 170.1 at w = 1, 260.2 at "
        "w = 4",
        Verdict.HOLDS,
        "Up to a point: beyond it more weight moves other things, and less is granted.",
        Measurement(
            ("text_to_image_evaluation",),
            _weight_of_words,
            "scenes drawn as asked for: {without:.0%} without guidance, {some:.0%} at w = {some_w:g}, "
            "{most:.0%} at w = {most_w:g}; {samples} captions",
            lambda n: (
                is_above(n["some"], n["without"], n["samples"])
                and is_above(n["some"], n["most"], n["samples"])
            ),
        ),
    ),
    Claim(
        "guidance",
        "(1 + w) and -w balance the conditional and the unconditional answer",
        "Ho and Salimans 2022, equation 6: for w > 0 the unconditional answer is subtracted",
        Verdict.WRONG,
        "The two weights add up to 1, but for w > 0 one of them is negative: guidance walks on beyond the "
        "conditional answer, away from the unconditional one.",
        shown="chapter 05, (5.5)",
    ),
    Claim(
        "guidance",
        "Its weight needs careful tuning",
        "Ho and Salimans 2022, FID. Table 1, 64 pixels: 1.80 at w = 0, 1.55 at 0.1, 12.6 at 1, 26.22 at 4. "
        "Table 2, 128 pixels: 7.27 at 0, 2.43 at 0.3, 21.53 at 4",
        Verdict.HOLDS,
        "From w = 0 to 1 the distance grows many times over; but that comes from the noisiest steps: without "
        "guidance there, the one larger weight that was tried does no harm.",
        Measurement(
            (ONE_AXIS,),
            _delicate_weight,
            "Fréchet distance {bayes:.0f} ± {bayes_bound:.0f} at w = {bayes_w:g}, {twice:.0f} ± "
            "{twice_bound:.0f} at w = {twice_w:g}; with the noisiest steps left unguided {kept:.0f} ± "
            "{kept_bound:.0f} even at w = {kept_w:g} (real images {real:.0f}; {samples} samples)",
            lambda n: (
                n["twice"] - n["bayes"] > math.hypot(n["twice_bound"], n["bayes_bound"])
                and n["kept"] - n["bayes"] < math.hypot(n["kept_bound"], n["bayes_bound"])
            ),
        ),
    ),
)


# --- Latent diffusion ---


def _operations(stored: Mapping) -> dict:
    costs = stored["costs"]["models"]

    def factor(name: str, cost: str = "gflops_per_step") -> float:
        return costs[name][cost] / costs["latents, f = 4"][cost]

    return {
        "plain": factor("pixels"),
        "folded": factor("pixels, 2 x 2 folded"),
        "same": factor("pixels, 4 x 4 folded"),
        "sampling": factor("pixels", "sampling_seconds_per_image"),
    }


def _saved(stored: Mapping) -> dict:
    looks = {model["name"]: model["looks"] for model in stored["models"]}
    end = looks["pixels, 4 x 4 folded"][-1]

    def saved(look: Mapping, quantity: str) -> float:
        """The share of the time up to `end` that latents save on their way to a quantity of `look`."""
        return 1 - seconds_to_reach(looks["latents, f = 4"], quantity, look[quantity]) / end["seconds"]

    return {
        "distance": saved(end, "frechet_distance"),
        "finer": saved(end["with_more_steps"], "frechet_distance"),
        "legible": saved(end, "confident_share"),
        "minutes": end["seconds"] / 60,
        "f": 4,
        "vae_minutes": first_stage_seconds(stored, "latents, f = 4") / 60,
    }


LATENT_DIFFUSION = (
    Claim(
        "latent diffusion",
        "It costs about four times less than diffusion of pixels",
        "Rombach et al. 2022, table 18, training: 232 against 60 V100 days on LSUN bedrooms (3.9 times; "
        "FID 1.90 and 2.95), 962 against 271 on ImageNet (3.5 times; FID 4.59 and 3.60, both guided)",
        Verdict.HERE_ONLY,
        "The factor belongs to a data set, a compression and a rival: nobody has to put layers at the "
        "highest resolution of a pixel model, and one that folds them four by four costs hardly more a step.",
        Measurement(
            (LATENT,),
            _operations,
            "a training step takes {plain:.1f} times the operations with plain pixels, {folded:.1f} times "
            "with pixels folded two by two, {same:.1f} times four by four; sampling {sampling:.1f} times the "
            "time with plain ones",
            lambda n: n["plain"] > 3 and n["same"] < 1.5,
        ),
    ),
    Claim(
        "latent diffusion",
        "It saves 75 % of the training costs",
        "Rombach et al. 2022, table 6, inpainting with as many parameters: 7.66 against 20.66 hours an "
        "epoch, 63 % less; the abstract and section 1 speak of computing, in words",
        Verdict.HERE_ONLY,
        "The same claim once more, since 75 % less is four times less. To equal quality it depends on how "
        "that is measured; and somebody has to train the autoencoder.",
        Measurement(
            (LATENT,),
            _saved,
            "of the {minutes:.0f} minutes in which pixels folded four by four are trained, latents "
            "with f = {f:g} save {distance:.0%} to the same Fréchet distance at equal sampling steps, "
            "{finer:.0%} if the pixels take four times as many, {legible:.0%} to the same share of legible "
            "shapes; the autoencoder's {vae_minutes:.0f} minutes not counted (one seed)",
            lambda n: 0 < min(n["finer"], n["legible"]) < 0.6 < n["distance"],
        ),
    ),
)


# --- Visual prompt tuning ---


def _shares(stored: Mapping) -> dict:
    runs = [run for run in stored["runs"] if run["backbone"] == VIT_B]

    def share(deep: bool, n: int) -> float:
        return chosen(runs, deep=deep, num_prompts=n)["share"]

    return {
        "shallow": share(False, 100),
        "short": share(True, 10),
        "long": share(True, 100),
        "few": 10,
        "many": 100,
        "backbone": VIT_B,
    }


def _less_storage(stored: Mapping, cost: Mapping) -> dict:
    runs = [run for run in stored["runs"] if run["backbone"] == VIT_B]

    def times(deep: bool, n: int, what: str = "times_less") -> float:
        return chosen(runs, deep=deep, num_prompts=n)[what]

    bank = cost["bank"]
    return {
        "shallow": times(False, 100),
        "short": times(True, 10),
        "long": times(True, 100),
        "with_head": times(True, 100, "times_less_with_head"),
        "few": 10,
        "many": 100,
        "classes": stored["num_classes"],
        "tasks": bank["tasks"],
        "bank": bank["disk_bytes"]["separate"] / bank["disk_bytes"]["bank"],
        "backbone": VIT_B,
    }


def _forgotten(*results: Mapping) -> dict:
    def kept(method: str, what: str) -> Iterator[float]:
        for result in results:
            yield from chosen(result["runs"], method=method)[what]

    before = results[0]["runs"][0]["upstream_before"]
    return {
        "before": before,
        "moved": max(abs(value - before) for value in kept("vpt-deep", "upstream")),
        "prompted": min(kept("vpt-deep", "upstream_prompted")),
        "full": statistics.mean(kept("full", "upstream")),
        "tasks": len(results),
        "images": UPSTREAM_IMAGES,
    }


def _against_probe(*results: Mapping) -> dict:
    *adapted, solved = results
    rows = differences(adapted, "vpt-deep", "linear")
    heads = []  # the solved ones of each task, as the runs of a comparison
    for of_task, result in zip(solved["runs"], adapted, strict=True):
        about = {"task": of_task["task"], "tested": chosen(result["runs"], method="full")["tested"]}
        runs = [
            about | {"method": reader, "accuracy": found} for reader, found in of_task["accuracy"].items()
        ]
        heads.append({"runs": runs})
    return (
        _ahead(rows)
        | _sizes(adapted)
        | {
            "smallest": min(value for _, value, _ in rows),
            "largest": max(value for _, value, _ in rows),
            "solved_ahead": _ahead(differences(heads, "vpt-deep", "class token"))["ahead"],
            "quarters_ahead": _ahead(differences(heads, "quarters", "vpt-deep"))["ahead"],
        }
    )


def _against_full(*results: Mapping) -> dict:
    rows = differences(results, "vpt-deep", "full")
    return (
        _ahead(rows)
        | _sizes(results)
        | {
            "least": -max(value for _, value, _ in rows),
            "most": -min(value for _, value, _ in rows),
        }
    )


def _deep_and_shallow(*results: Mapping) -> dict:
    return _ahead(differences(results, "vpt-deep", "vpt-shallow")) | _sizes(results)


def _widths(*results: Mapping) -> dict:
    narrow, *widest = results
    kept, compared, backbones = 0, 0, set()
    for runs in (narrow["runs"], *(result["runs"] for result in widest)):
        for place in {(run["backbone"], run["task"]) for run in runs}:
            of_place = [run for run in runs if (run["backbone"], run["task"]) == place]
            probe, deep, full = (chosen(of_place, method=m) for m in ("linear", "vpt-deep", "full"))
            pairs = difference(deep, probe), difference(full, deep)
            kept += all(value > 2 * error for value, error in pairs)
            compared += 1
            backbones.add(place[0])
    return {"kept": kept, "compared": compared, "widths": len(backbones)} | _sizes(results)


PROMPT_TUNING = (
    Claim(
        "prompt tuning",
        "What is stored for a task is 0.1 % of the parameters",
        "Jia et al. 2022, abstract: less than 1 % of the parameters; on average of the five fine-grained "
        "tasks 0.85 of 86 million with deep prompts, heads included (s)",
        Verdict.HERE_ONLY,
        "Shallow prompts, or few deep ones, and without the head.",
        Measurement(
            ("prompt_storage",),
            _shares,
            "{backbone}: {shallow:.2%} for {many} shallow prompts, {short:.2%} for {few} at each block, "
            "{long:.2%} for {many} at each",
            lambda n: n["shallow"] < 0.002 and n["short"] < 0.002 and n["long"] > 0.005,
        ),
    ),
    Claim(
        "prompt tuning",
        "Many tasks need 100 to 1000 times less storage",
        "Jia et al. 2022, table 1 (s): 24 tasks take 1.04 backbones in all with shallow prompts, 1.18 with "
        "deep ones, 24.02 with full fine-tuning, so 23 and 20 times less",
        Verdict.HERE_ONLY,
        "That is a further task's factor, for few prompts or shallow ones; T tasks save at most T times, "
        "since the backbone is kept.",
        Measurement(
            ("prompt_storage", "benchmark_adaptation"),
            _less_storage,
            "{backbone}: {shallow:.0f} times for {many} shallow prompts, {short:.0f} for {few} deep ones, "
            "{long:.0f} for {many} deep ones ({with_head:.0f} with a head of {classes} classes); our bank of "
            "{tasks} tasks in all {bank:.1f} times",
            lambda n: n["shallow"] > 1000 and n["short"] > 100 > n["long"] and n["bank"] < n["tasks"],
        ),
    ),
    Claim(
        "prompt tuning",
        "It prevents catastrophic forgetting",
        "Jia et al. 2022, section 3: the backbone is not touched",
        Verdict.HOLDS,
        "True by construction, with the prompts taken out; with a task's prompts left in, the old task "
        "suffers.",
        Measurement(
            ADAPTED,
            _forgotten,
            "of {images} photographs {before:.0%} are named right before and after each of {tasks} tasks; "
            "down to {prompted:.0%} with a task's prompts left in; {full:.0%} on average after full "
            "fine-tuning",
            lambda n: (
                n["moved"] == 0
                and is_above(n["before"], n["prompted"], n["images"])
                and is_above(n["before"], n["full"], n["images"])
            ),
        ),
    ),
    Claim(
        "prompt tuning",
        "It outperforms linear probing",
        "Jia et al. 2022, table 1, mean of five fine-grained tasks: 89.11 against 79.32, and ahead in the "
        "means of the other three groups (s)",
        Verdict.HERE_ONLY,
        "Against a probe that reads the class token and is trained as long; a solved one is nearer, and one "
        "that reads the picture's quarters is ahead of prompts on most tasks.",
        Measurement(
            (*ADAPTED, "adaptation_solved"),
            _against_probe,
            "deep prompts are ahead on {ahead} of {tasks} tasks, and tie on {ties} ({smallest:+.0%} to "
            "{largest:+.0%}); with solved heads on both sides on {solved_ahead}, and a solved head on the "
            "picture's quarters is ahead of them on {quarters_ahead}; " + SIZES,
            lambda n: (
                n["behind"] == 0
                and n["ahead"] > n["tasks"] / 2
                and n["solved_ahead"] < n["ahead"]
                and n["quarters_ahead"] > n["tasks"] / 2
            ),
        ),
    ),
    Claim(
        "prompt tuning",
        "It matches full fine-tuning on many tasks",
        "Jia et al. 2022, table 1 (s): means of 89.11 against 88.54 on five fine-grained tasks; ahead on "
        "20 of 24 tasks in all, behind on cars, 83.6 against 84.5 (table 14 (s)). Behind in the mean of "
        "every group with a Swin (table 2 (s)), and with a ViT pretrained without labels: 36.0 against "
        "59.3 on natural tasks (table 4 (s))",
        Verdict.HERE_ONLY,
        "There, with a ViT that was trained with labels on 14 million pictures; less with the paper's other "
        "backbones, and not with our small one.",
        Measurement(
            ADAPTED,
            _against_full,
            "deep prompts are ahead on {ahead} of {tasks} tasks and tie on {ties}; the means lie {least:.0%} "
            "to {most:.0%} below; " + SIZES,
            lambda n: n["ahead"] == 0 and n["behind"] > n["tasks"] / 2,
        ),
    ),
    Claim(
        "prompt tuning",
        "Prompts at every block adapt more deeply than at the first",
        "Jia et al. 2022, table 1, mean of five fine-grained tasks: 89.11 against 84.62 (s); with a Swin "
        "shallow ones are ahead on natural tasks, 79.85 against 76.78 (table 2 (s))",
        Verdict.HERE_ONLY,
        "Never behind, but ahead beyond doubt on few of the small tasks here.",
        Measurement(
            ADAPTED,
            _deep_and_shallow,
            "deep prompts are ahead of shallow ones on {ahead} of {tasks} tasks, and tie on {ties}; " + SIZES,
            lambda n: n["behind"] == 0 and 0 < n["ahead"] < n["tasks"] / 2,
        ),
    ),
    Claim(
        "prompt tuning",
        "VPT-Deep reaches 72.3 % on FGVC-Aircraft, full fine-tuning 68.1 %",
        "no source found: the paper's fine-grained tasks are CUB, NABirds, Flowers, Dogs and Cars",
        Verdict.NOT_SUPPORTED,
        "Aircraft are neither there nor in its other collection of tasks, VTAB; chapter 08 has the command "
        "that puts it to the test.",
    ),
    Claim(
        "prompt tuning",
        "It works consistently for ViT-Base, Large and Huge",
        "Jia et al. 2022, figure 4, on backbones of these three sizes: deep prompts ahead of full "
        "fine-tuning in two groups of tasks, level in the third (s)",
        Verdict.HERE_ONLY,
        "Three small widths have the same order, but another one than the paper's; the large ones were not "
        "tried.",
        Measurement(
            ("adaptation_widths", "adaptation_counting", "adaptation_xray"),
            _widths,
            "probe, deep prompts, full fine-tuning, in this order, in {kept} of {compared} comparisons with "
            "{widths} widths, apart by more than two standard errors; {seeds} seeds, {fewest} test images",
            lambda n: n["kept"] >= n["compared"] - 1,
        ),
    ),
    Claim(
        "prompt tuning",
        "In the slide's code, prompts and head alone are trained",
        "Jia et al. 2022, section 3.2: the backbone is frozen",
        Verdict.WRONG,
        "A comment freezes nothing: the backbone's weights are still given to the optimiser.",
        shown="chapter 08, 'A wrapper with nine faults'",
    ),
)

CLAIMS = (*GUIDANCE, *LATENT_DIFFUSION, *PROMPT_TUNING)
