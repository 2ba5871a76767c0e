"""The RL set: rejection sampling, then safety-aware concatenation (Eq. 4 and 5).

In:  TRAIN.jsonl (labelled samples) and the SFT model.
Out: RL.jsonl, with its images in images/ beside it, and RL.jsonl.parts/ with all sampled outputs:
     the same command goes on after a kill; another --size or --max-correct needs no new sampling.

1. Mining: sample 4 outputs of every prompt. An output is right if it agrees with every label that
   the sample has. A sample is hard if no output is right; image-only samples always count as hard,
   as released. The set is drawn from the hard samples.
2. Concatenation: 20 % of the set are pairs of drawn samples, with requests, responses and images
   side by side. A label is harmful if either one is: the guard must find harm wherever it hides.

Deviations from the release: the reward reads the joined labels, which are unknown where an unknown
label decides; requests join requests and responses join responses, not whole texts with their role
headers; rows without an image get no image; prompts over the limit of the RL stage are left out,
not cut; all draws are seeded. RL.jsonl holds no reasoning: RL does not use it.

    torchrun augment.py --model out/sft --data data/train.jsonl --out out/rl.jsonl
"""

import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

import data
import evaluate
from data import Encoder, InputError, Sample, open_image, option, place_image, say
from model import QwenVL, start_ranks
from reward import HARMFUL, UNHARMFUL, parse

CANVAS = (1024, 1024)  # pixels: two images side by side are shrunk to fit


@dataclass(frozen=True)
class AugmentFlags(data.Flags):
    model: str = option("out/sft", "checkpoint or hub id")
    data: list[str] = option(["data/train.jsonl"], "labelled samples")
    out: str = option("out/rl.jsonl", "the RL set")
    fresh: bool = option(False, "drop the outputs of an earlier run")

    samples: int = option(4, "outputs per prompt, k")
    temperature: float = option(1.0, "of the sampling")
    top_p: float = option(0.95, "nucleus of the sampling")
    max_new_tokens: int = option(4096, "longest output")
    max_prompt_tokens: int = option(3072, "longest prompt, as in the RL stage")
    max_branches: int = option(256, "outputs at once on each device")

    size: int = option(12000, "samples; fewer if too few rows are hard")
    max_correct: int = option(0, "a row is hard if at most so many of its outputs are right")
    keep_images: bool = option(True, "image-only rows count as hard whatever the model can do")
    random_share: float = option(0.0, "share drawn from other rows; for data with few hard ones")
    augmented_share: float = option(0.2, "share of the RL set that is concatenated")


# ---- rejection sampling


def is_right(output: str, sample: Sample) -> bool:
    """Whether the output agrees with every label of the sample; an unreadable one is wrong."""
    verdict = parse(output)
    is_request_right = sample.request_label in (None, verdict.request)
    return is_request_right and sample.response_label in (None, verdict.response)


def mine(
    model: QwenVL, encoder: Encoder, todo: dict[int, Sample], flags: AugmentFlags
) -> Iterator[tuple[int, dict]]:
    """Yield (i, {"outputs": texts}) as samples in todo finish; [] if the prompt is too long."""
    n, longest = flags.samples, flags.max_prompt_tokens
    for i, outputs in evaluate.sample_outputs(model, encoder, todo, flags, n, longest):
        texts = [encoder.decode(completion.ids) for completion in outputs]
        yield i, {"outputs": texts}


def select_samples(
    samples: list[Sample], right: list[int], rng: random.Random, flags: AugmentFlags
) -> list[Sample]:
    """The RL set before concatenation, in random order: hard samples, and a random_share
    of the set drawn from all other samples. right: how many outputs of each sample are right."""
    hard = []
    for i, sample in enumerate(samples):
        always = flags.keep_images and sample.modality == "image"
        if always or right[i] <= flags.max_correct:
            hard.append(i)
    size = round(flags.size * (1 - flags.augmented_share))
    size_any = round(size * flags.random_share)
    chosen = rng.sample(hard, min(size - size_any, len(hard)))
    rest = sorted(set(range(len(samples))) - set(chosen))
    chosen += rng.sample(rest, min(size_any, len(rest)))
    return [samples[i] for i in rng.sample(chosen, len(chosen))]


# ---- safety-aware concatenation


def either(*labels: str | None) -> str | None:
    """Eq. (5): harmful if any label is, unharmful if all are, else unknown (None)."""
    if HARMFUL in labels:
        return HARMFUL
    return UNHARMFUL if set(labels) == {UNHARMFUL} else None


def join_texts(*texts: str | None) -> str | None:
    """Eq. (4), text_concat: the texts that are not None, stripped, with spaces between; or None."""
    present = [text for text in texts if text is not None]
    if not present:
        return None
    joined = " ".join(text.strip() for text in present if text.strip())
    return joined or present[0]  # all texts are blank: keep the first


def merge_images(first: Image.Image, second: Image.Image) -> Image.Image:
    """Eq. (4), image_merge: side by side, tops aligned, the rest white; shrunk to fit CANVAS."""
    size = (first.width + second.width, max(first.height, second.height))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(first, (0, 0))
    canvas.paste(second, (first.width, 0))
    canvas.thumbnail(CANVAS, Image.Resampling.LANCZOS)
    return canvas


def copy_into(sample: Sample, folder: Path) -> Sample:
    """The sample for a file in `folder`, without reasoning; an image from outside is copied."""
    image = None
    if sample.image is not None:
        image = place_image(sample.image, sample.folder, folder)
    return replace(sample, folder=folder, image=image, reasoning=None)


def concatenate(first: Sample, second: Sample) -> Sample:
    """Join two samples of one folder as one exchange. Two images are merged; a single one is kept.

    A missing response has no label and hides no harm: the label of the other response then stands.
    """
    images = [s.image for s in (first, second) if s.image is not None]
    if len(images) == 2:
        file = io.BytesIO()
        merge_images(open_image(first.image_path), open_image(second.image_path)).save(file, "PNG")
        images = [place_image({"bytes": file.getvalue()}, first.folder, first.folder)]
    response_labels = [s.response_label for s in (first, second) if s.response is not None]
    return Sample(
        id=f"{first.id}+{second.id}",
        source="concat",
        folder=first.folder,
        request=join_texts(first.request, second.request),
        image=images[0] if images else None,
        response=join_texts(first.response, second.response),
        request_label=either(first.request_label, second.request_label),
        response_label=either(*response_labels),
        parents=(first.parents or (first.id,)) + (second.parents or (second.id,)),
    )


def concatenations(
    samples: list[Sample], count: int, rng: random.Random, encoder: Encoder, limit: int
) -> Iterator[Sample]:
    """Up to `count` labelled samples, each joined from a different pair, with prompts of at most
    `limit` tokens."""
    seen = {sample.id for sample in samples}
    draws = 20 * count if len(samples) > 1 else 0  # bounded: few samples have few pairs
    for _ in range(draws):
        if count == 0:
            return
        first, second = rng.sample(samples, 2)
        name, pair = f"{first.id}+{second.id}", frozenset((first.id, second.id))
        if seen & {name, pair}:
            continue
        seen |= {name, pair}
        joined = concatenate(first, second)
        try:
            length = len(encoder.prompt(joined))
        except InputError:  # two wide images can be too wide together
            continue
        if (joined.request_label or joined.response_label) and length <= limit:
            count -= 1
            yield joined


# ---- the stage


def write_rl_set(flags: AugmentFlags, samples: list[Sample], records: list[dict]) -> dict:
    """Choose samples, concatenate pairs, write both. Returns the counts. records: the outputs of
    each sample; a sample with an over-long prompt has none."""
    # 1. Count how many outputs of each sample are right.
    pool, right = [], []
    for sample, record in zip(samples, records):
        if record["outputs"]:
            pool.append(sample)
            right.append(sum(is_right(output, sample) for output in record["outputs"]))
    times = Counter((sample.modality, count) for sample, count in zip(pool, right))
    for (modality, count), number in sorted(times.items()):
        say(f"{modality}: {number} samples with {count} of {flags.samples} outputs right")
    # 2. Draw the hard samples.
    rng = random.Random(flags.seed)
    folder = Path(flags.out).parent
    hard = select_samples(pool, right, rng, flags)
    chosen = [copy_into(sample, folder) for sample in hard]
    if not chosen:
        advice = "raise --max-correct, --random-share or --max-prompt-tokens"
        raise InputError(f"none of {len(pool)} samples within the limit is hard: {advice}")
    # 3. Concatenate pairs of these: augmented_share of the whole set.
    encoder = Encoder(flags.model, flags.instruction, flags.min_pixels, flags.max_pixels)
    count = round(len(chosen) * flags.augmented_share / (1 - flags.augmented_share))
    joined = list(concatenations(chosen, count, rng, encoder, flags.max_prompt_tokens))
    data.write_samples(flags.out, chosen + joined)
    return {
        "samples": len(samples),
        "too_long": len(samples) - len(pool),
        "chosen": len(chosen),
        "concatenated": len(joined),
    }


def main(flags: AugmentFlags) -> None:
    """Mine on all ranks; rank 0 then writes the RL set."""
    if not 0 <= flags.augmented_share < 1 or not 0 <= flags.random_share <= 1:
        raise InputError("--augmented-share must be in [0, 1), --random-share in [0, 1]")
    out = Path(flags.out)
    parts = Path(f"{out}.parts")
    data.check_inputs(flags)
    data.check_output(out, [flags.model, *flags.data])
    if out.exists() and not (parts / "settings.json").exists():
        raise InputError(f"{out} exists, but augment.py did not make it; choose another --out")
    ranks = start_ranks(flags.device, flags.dtype)
    with data.lock(out) if ranks.rank == 0 else nullcontext():
        samples, left_out = data.read_samples(flags.data, flags.skip_bad)
        labelled = [s for s in samples if s.request_label or s.response_label]
        for name, count in Counter(sample.id for sample in labelled).items():
            if count > 1:
                raise InputError(f"{name!r} is the id of two samples in --data; change one of them")
        records = evaluate.collect(parts, labelled, mine, flags, ranks)
        if ranks.rank == 0:
            counts = write_rl_set(flags, labelled, records)
            counts |= {"unlabelled": len(samples) - len(labelled), "left_out": left_out}
            data.write_atomic(parts / "counts.json", json.dumps(counts, indent=1) + "\n")
            counts["left_out"] = len(left_out)
            say(f"{out}: {counts}")


if __name__ == "__main__":
    data.cli(AugmentFlags, main)
