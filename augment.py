"""The RL set: rejection sampling, then safety-aware concatenation (Eq. 4 and 5).

In:  TRAIN.jsonl (labelled samples) and the SFT model.
Out: RL.jsonl, with its images in images/ beside it, and RL.jsonl.parts/predictions.jsonl: all
     sampled outputs, kept so that the same command goes on after a kill and other choices (--size,
     --max-correct, ...) need no new sampling.

1. Mining: 4 outputs of every sample. One is right if every label that the sample has is read from
   it; a row is hard if none is right. Image-only rows are always kept, as released.
2. Concatenation: 20 % of the set joins two of the chosen rows: requests, responses and images side
   by side, harmful if either is. Harm then has to be found wherever it hides.

Deviations from the release: the joined labels are those the reward reads, and stay unknown where an
unknown label decides; request goes to request and response to response, not one role header after
the other; rows without an image get none; prompts over the limit of the RL stage are left out, not
cut; all draws are seeded. RL.jsonl holds no reasoning: RL does not use it.

    torchrun augment.py --model out/sft --data data/train.jsonl --out out/rl.jsonl
"""

import io
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

import data
import evaluate
from data import Encoder, InputError, Sample, open_image, option, place_image
from model import QwenVL, Ranks, generate, start_ranks
from reward import HARMFUL, UNHARMFUL, parse

CANVAS = (1024, 1024)  # pixels: two images side by side are shrunk to fit


@dataclass(frozen=True)
class Config:
    model: str = option("out/sft", "checkpoint or hub id", group="what it reads and writes")
    data: list[str] = option(["data/train.jsonl"], "labelled samples")
    out: str = option("out/rl.jsonl", "the RL set")
    fresh: bool = option(False, "drop the outputs of an earlier run")
    instruction: str | None = option(None, "file that replaces the system instruction")
    min_pixels: int | None = option(None, "smallest image area; default: the checkpoint's")
    max_pixels: int | None = option(None, "largest image area; default: the checkpoint's")
    skip_bad: bool = option(False, "set bad rows aside instead of stopping at the first")

    samples: int = option(4, "outputs per prompt, k", group="mining")
    temperature: float = option(1.0, "of the sampling")
    top_p: float = option(0.95, "nucleus of the sampling")
    max_new_tokens: int = option(4096, "longest output")
    max_prompt_tokens: int = option(3072, "longest prompt, as in the RL stage")
    seed: int = option(0, "random numbers of the sampling and of all draws")

    size: int = option(12000, "samples; fewer if too few rows are hard", group="the RL set")
    max_correct: int = option(0, "a row is hard if at most so many of its outputs are right")
    keep_images: bool = option(True, "image-only rows count as hard whatever the model can do")
    random_share: float = option(0.0, "share drawn from all rows; for data with few hard ones")
    augmented_share: float = option(0.2, "share of the RL set that is concatenated")

    max_branches: int = option(256, "outputs at once on each device", group="memory and device")
    device: str = option("auto", "cpu, cuda, or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of weights and computation")

    @property
    def to_save_memory(self) -> str:
        return evaluate.memory_advice(self.max_branches, self.samples, self.max_pixels)


# -------------------------------------------------- rejection sampling


def is_right(output: str, sample: Sample) -> bool:
    """Whether every label that the sample has is read from the output; unreadable is wrong."""
    verdict = parse(output)
    pairs = ((sample.request_label, verdict.request), (sample.response_label, verdict.response))
    return all(label == truth for truth, label in pairs if truth is not None)


def mine(
    model: QwenVL, encoder: Encoder, samples: list[Sample], todo: list[int], cfg: Config
) -> Iterator[tuple[int, dict]]:
    """Yield (i, {outputs}) of samples[i] for i in todo; an over-long prompt has no outputs."""
    too_long = []

    def prompts_within_limit() -> Iterator:
        for i, row in zip(todo, data.prefetch(encoder.prompt, (samples[i] for i in todo))):
            if len(row) <= cfg.max_prompt_tokens:
                yield i, row
            else:
                too_long.append(i)

    tokens = {"stop_ids": encoder.stop_ids, "banned": encoder.banned_ids}
    sampling = tokens | evaluate.sampling_flags(cfg)
    for i, completions in generate(model, prompts_within_limit(), cfg.samples, **sampling):
        yield i, {"outputs": [encoder.decode(completion.ids) for completion in completions]}
    yield from ((i, {"outputs": []}) for i in too_long)


def right_counts_table(samples: list[Sample], right: list[int], k: int) -> str:
    """A Markdown table: how many rows of each modality have 0 .. k right outputs."""
    counts = Counter((sample.modality, n) for sample, n in zip(samples, right))
    rows = []
    for name in evaluate.MODALITIES:
        rows.append({"right outputs": name, **{str(n): counts[name, n] for n in range(k + 1)}})
    return evaluate.markdown(rows, list(rows[0]))


def select_rl_rows(
    samples: list[Sample], right: list[int], rng: random.Random, cfg: Config
) -> list[Sample]:
    """The rows of the RL set before concatenation, in random order: hard ones, and a share of any.
    right: how many outputs of each sample are right."""
    hard = []
    for i, sample in enumerate(samples):
        always = cfg.keep_images and sample.modality == "image"
        if always or right[i] <= cfg.max_correct:
            hard.append(i)
    size = round(cfg.size * (1 - cfg.augmented_share))
    size_any = round(size * cfg.random_share)
    chosen = rng.sample(hard, min(size - size_any, len(hard)))
    rest = sorted(set(range(len(samples))) - set(chosen))
    chosen += rng.sample(rest, min(size_any, len(rest)))
    return [samples[i] for i in rng.sample(chosen, len(chosen))]


# -------------------------------------------------- safety-aware concatenation


def either(*labels: str | None) -> str | None:
    """Eq. (5): harmful if any label is, unharmful if all are, else unknown (None)."""
    if HARMFUL in labels:
        return HARMFUL
    return UNHARMFUL if set(labels) == {UNHARMFUL} else None


def join_texts(*texts: str | None) -> str | None:
    """Eq. (4), text_concat: the texts that are there, stripped, with spaces between; or None."""
    present = [text for text in texts if text is not None]
    if not present:
        return None
    joined = " ".join(text.strip() for text in present if text.strip())
    return joined if joined else max(present)  # spaces, if any is not empty: "" is no response


def merge_images(first: Image.Image, second: Image.Image) -> Image.Image:
    """Eq. (4), image_merge: side by side, tops aligned, the rest white; shrunk to fit CANVAS."""
    size = (first.width + second.width, max(first.height, second.height))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(first, (0, 0))
    canvas.paste(second, (first.width, 0))
    canvas.thumbnail(CANVAS, Image.Resampling.LANCZOS)
    return canvas


def copy_into(sample: Sample, folder: Path) -> Sample:
    """The sample as a row of a file in `folder`, without reasoning; its image is copied there."""
    image = None
    if sample.image is not None:
        image = place_image(sample.image, sample.folder, folder)
    return replace(sample, folder=folder, image=image, reasoning=None)


def concatenate(first: Sample, second: Sample) -> Sample:
    """Two samples of one folder as one exchange. Two images are merged into one; one stays itself.

    A missing response has nothing to label and nothing to hide: the other's label then stands.
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
    rows: list[Sample], count: int, rng: random.Random, encoder: Encoder, max_prompt_tokens: int
) -> Iterator[Sample]:
    """Up to `count` labelled samples, each of another pair of `rows`, none with a longer prompt."""
    seen = {row.id for row in rows}
    draws = 20 * count if len(rows) > 1 else 0  # pairs may run out where rows are few
    for _ in range(draws):
        if count == 0:
            return
        first, second = rng.sample(rows, 2)
        name, pair = f"{first.id}+{second.id}", frozenset((first.id, second.id))
        if seen & {name, pair}:
            continue
        seen |= {name, pair}
        sample = concatenate(first, second)
        try:
            length = len(encoder.prompt(sample))
        except InputError:  # two wide images can be too wide together
            continue
        if (sample.request_label or sample.response_label) and length <= max_prompt_tokens:
            count -= 1
            yield sample


# -------------------------------------------------- the stage


def mine_all(cfg: Config, ranks: Ranks, parts: Path) -> list[tuple[Sample, list[str]]]:
    """On rank 0 (sample, its outputs) of every labelled sample; mined now if `parts` lacks them."""
    pairs, files = [], {}
    for fields, sample in evaluate.read_pairs(cfg, parts):
        file = fields["file"]
        if files.setdefault(sample.id, file) != file:
            raise InputError(f"{file}: {sample.id}: another file of --data has this id, too")
        if sample.request_label or sample.response_label:
            pairs.append((fields, sample))
    if not pairs:
        raise InputError(f"{', '.join(cfg.data)}: no sample has a label to be right about")
    wanted, samples = zip(*pairs)

    def make(todo: list[int]) -> Iterator[tuple[int, dict]]:
        yield from mine(*evaluate.load_guard(cfg, ranks.device), samples, todo, cfg)

    settings = evaluate.settings_of(cfg, ranks.device)
    settings |= {"samples": cfg.samples, "max_prompt_tokens": cfg.max_prompt_tokens}
    records = evaluate.collect(parts, settings, wanted, make, cfg.fresh, ranks)
    for number, record in enumerate(records, 1):
        outputs = record.get("outputs")
        if not isinstance(outputs, list) or not all(isinstance(text, str) for text in outputs):
            raise InputError(
                f"{parts}/predictions.jsonl:{number}: {record['id']}: its outputs are no list of "
                "texts; remove the line, or start over with --fresh"
            )
    return [(sample, record["outputs"]) for sample, record in zip(samples, records)]


def write_rl_set(cfg: Config, mined: list[tuple[Sample, list[str]]]) -> None:
    """Choose, concatenate and write. mined: (sample, its outputs); over-long prompts have none."""
    # 1. How often each sample is right.
    kept = [(sample, outputs) for sample, outputs in mined if outputs]
    if not kept:
        limit = f"--max-prompt-tokens {cfg.max_prompt_tokens}"
        raise InputError(f"none of {len(mined)} samples is within {limit}")
    samples = [sample for sample, _ in kept]
    right = [sum(is_right(output, sample) for output in outputs) for sample, outputs in kept]
    print(right_counts_table(samples, right, cfg.samples))
    # 2. The hard rows.
    rng, folder = random.Random(cfg.seed), Path(cfg.out).parent
    rows = [copy_into(sample, folder) for sample in select_rl_rows(samples, right, rng, cfg)]
    if not rows:
        raise InputError(
            f"no row is hard for this model, of {len(samples)} within --max-prompt-tokens: "
            "raise --max-correct or --random-share"
        )
    # 3. Pairs of them: augmented_share of the whole set.
    encoder = Encoder(cfg.model, cfg.instruction, cfg.min_pixels, cfg.max_pixels)
    count = round(len(rows) * cfg.augmented_share / (1 - cfg.augmented_share))
    joined = list(concatenations(rows, count, rng, encoder, cfg.max_prompt_tokens))
    data.write_samples(cfg.out, rows + joined)
    print(
        f"{cfg.out}: {len(rows)} chosen of {len(samples)} rows "
        f"({len(mined) - len(samples)} too long), {len(joined)} of {count} concatenated"
    )


def main(cfg: Config) -> None:
    """Mine on all ranks; rank 0 then writes the RL set."""
    if not 0 <= cfg.augmented_share < 1 or not 0 <= cfg.random_share <= 1:
        raise InputError("--augmented-share must be in [0, 1), --random-share in [0, 1]")
    ranks, parts = start_ranks(cfg.device), Path(f"{cfg.out}.parts")
    evaluate.check_paths(cfg, str(parts), [cfg.out])
    with data.lock_output(cfg.out) if ranks.rank == 0 else nullcontext():
        mined = mine_all(cfg, ranks, parts)
        if ranks.rank == 0:
            write_rl_set(cfg, mined)


if __name__ == "__main__":
    data.cli(Config, main)
