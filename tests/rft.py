"""Rejection-sampling fine-tuning: the control that uses RL's labels without RL.

In:  TRAIN.jsonl, and what augment.py has sampled of its rows (RL.jsonl.parts/predictions.jsonl).
Out: a JSON Lines file for sft.py: the rows that have reasoning, and of each labelled row without it
     up to --chains copies, each with the reasoning of another right output.

    python tests/rft.py --data world/train.jsonl --outputs rl.jsonl.parts/predictions.jsonl --out rft-rows.jsonl
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from augment import copy_into, is_right
from data import InputError, Sample, cli, option, read_records, read_samples, say, write_samples
from evaluate import sample_fields
from reward import parse


@dataclass(frozen=True)
class RFTFlags:
    data: list[str] = option(help="labelled samples")
    outputs: str = option(help="predictions.jsonl in the folder of augment.py's outputs")
    out: str = option(help="file to write")
    chains: int = option(2, "at most so many of a row's right outputs")


def right_chains(sample: Sample, outputs: list[str]) -> list[str]:
    """The reasoning of the outputs that are right and well-formed, each once."""
    right = [parse(output) for output in outputs if is_right(output, sample)]
    return list(dict.fromkeys(verdict.reasoning for verdict in right if verdict.format_ok))


def with_own_chains(sample: Sample, outputs: list[str], most: int) -> Iterator[Sample]:
    """A row without reasoning, once with each of the first `most` right chains."""
    for i, chain in enumerate(right_chains(sample, outputs)[:most], 1):
        yield replace(sample, id=f"{sample.id}#{i}", reasoning=chain)


def main(flags: RFTFlags) -> None:
    """Write the rows. InputError if a row without reasoning has not been sampled."""
    samples, _ = read_samples(flags.data)
    outputs = {record["key"]: record["outputs"] for record in read_records(Path(flags.outputs))}
    folder = Path(flags.out).resolve().parent
    rows, helped = [s for s in samples if s.is_complete], 0
    chainless = [s for s in samples if not s.reasoning and (s.request_label or s.response_label)]
    for sample in chainless:
        key = sample_fields(sample)["key"]
        if key not in outputs:
            raise InputError(f"{sample.id}: not among the samples of {flags.outputs}")
        own = list(with_own_chains(sample, outputs[key], flags.chains))
        rows, helped = rows + own, helped + bool(own)
    moved = [replace(copy_into(row, folder), reasoning=row.reasoning) for row in rows]
    write_samples(flags.out, moved)
    say(f"{flags.out}: {len(moved)} rows; own chains for {helped} of {len(chainless)} without one")


if __name__ == "__main__":
    cli(RFTFlags, main)
