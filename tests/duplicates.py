"""List samples that are there twice: within converted files, or in them and in others.

In: JSON Lines of samples, and of samples that count as seen (benchmarks, say, beside training data). Out: a
line for each duplicate, the counts, and with --drop a file without them. Samples are equal if their texts are, but for case, spaces, invisible characters and Unicode's compatible
spellings, and if their images have the same pixels. Where files are compared, a concatenated sample also
counts as each of its parents that a given file holds.

    python tests/duplicates.py --data data/train.jsonl --against data/test/*.jsonl --drop data/clean.jsonl
"""

import hashlib
import json
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (the repository is importable only from here on)
from data import Sample, option  # noqa: E402


@dataclass(frozen=True)
class DuplicateFlags:
    data: list[str] = option(help="files to look through")
    against: list[str] = option([], "files whose samples count as seen")
    drop: str | None = option(None, "file to write, of the samples that are no duplicates")


def content_key(sample: Sample) -> str:
    """Equal for duplicates. InputError if the image cannot be decoded."""
    words, size, pixels = [], None, b""
    for text in (sample.request, sample.response or ""):
        text = "".join(filter(is_visible, unicodedata.normalize("NFKC", text)))
        words.append(text.casefold().split())
    if sample.image:
        image = data.open_image(sample.image_path)
        size, pixels = image.size, image.tobytes()
    return hashlib.sha256(json.dumps([words, size]).encode() + pixels).hexdigest()


def is_visible(character: str) -> bool:
    """White space, or what shows: no control, no format, no joiner, filler or blank."""
    hidden = unicodedata.category(character)[0] == "C" or character in "\u034f\u115f\u2800\ufe0f"
    return character.isspace() or not hidden


def main(flags: DuplicateFlags) -> None:
    """Print the duplicates, and write the rest."""
    # 1. What counts as seen: {content: where}.
    files = {path: data.read_samples([path])[0] for path in [*flags.against, *flags.data]}
    by_id, seen, own, kept, total = defaultdict(list), {}, {}, [], 0
    for sample in sum(files.values(), []):
        by_id[sample.id].append(sample)

    def keys(sample: Sample) -> list[str]:
        parents = [parent for id in sample.parents or () for parent in by_id[id]]
        return [content_key(one) for one in (sample, *parents)]

    for path in flags.against:
        for sample in files[path]:
            seen |= {key: f"{sample.id!r} in {path}" for key in keys(sample) if key not in seen}

    # 2. Each sample is met for the first time, or a duplicate.
    for path in flags.data:
        for sample in files[path]:
            key, *of_parents = keys(sample)
            firsts = [seen[one] for one in (key, *of_parents) if one in seen]
            firsts += [own[key]] if key in own else []
            own.setdefault(key, f"{sample.id!r} in {path}")
            total += 1
            if firsts:
                data.say(data.printable(f"{path}: {sample.id!r} is equal to {firsts[0]}"))
            else:
                kept.append(sample)
    data.say(f"{total} samples = {len(kept)} met first + {total - len(kept)} duplicates")
    if flags.drop:
        data.check_output(flags.drop, files)
        folder = Path(flags.drop).parent
        for i, sample in enumerate(kept):
            if sample.image:
                image = data.place_image(sample.image, sample.folder, folder)
                kept[i] = replace(sample, image=image)
        if Path(flags.drop).exists() and Path(flags.drop).read_bytes() != data.json_lines(kept):
            raise data.InputError(
                f"{flags.drop} exists and holds other rows; choose another --drop"
            )
        data.write_samples(flags.drop, kept)


if __name__ == "__main__":
    data.cli(DuplicateFlags, main)
