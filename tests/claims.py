"""From predictions of several seeds and variants to tables: means, intervals, paired differences.

In:  predictions.jsonl of evaluations and metrics.jsonl of RL runs, as ablations.py leaves them.
Out: Markdown.

An interval is mean +- t * s / sqrt(n): n seeds, s their standard deviation, t the 97.5 % quantile
of Student's t with n - 1 degrees of freedom. A difference is taken within each seed first: both
variants share its world, its base and, if they are RL runs, its R-SFT, so that what varies with
these cancels.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import toy

from data import read_records
from evaluate import compute_metrics

# Student's t: the 97.5 % quantiles for 1, 2, ... 9 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SHOWN = ("f1", "mean_tokens", "seconds")
PARTS = (
    "f1_prompt f1_response f1_text f1_image f1_text_image f1_several f1_single"
    " format_ok recaps repeats"
).split()
COMPARED = ("f1", "f1_several", "mean_tokens")
COURSE = ("tokens", "entropy", "clipped")
RECAPPED = ". all of it: "  # how the last step of such a chain begins, in toy.py
DIGITS = {"format_ok": 3, "entropy": 3, "clipped": 4}  # behind the point; one for the others


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval; None for a single seed."""

    mean: float
    half_width: float | None

    def text(self, digits: int = 1, sign: str = "") -> str:
        shown = f"{self.mean:{sign}.{digits}f}"
        return shown if self.half_width is None else f"{shown} ± {self.half_width:.{digits}f}"


class Result(NamedTuple):
    """What one seed gave."""

    scores: dict[str, dict[str, float]]  # {variant: {metric: value}}
    courses: dict[str, dict[str, list[float]]]  # {RL variant: {metric: its mean in each quarter}}
    seconds: dict[str, float]  # {stage: wall seconds}


class Line(NamedTuple):
    """A row of the table."""

    claim: str
    variant: str
    against: str  # the variant that it is compared with


# ---------------------------------------------------------------------- numbers


def interval(values: list[float]) -> Interval:
    """The mean of independent values and its 95 % interval; a bit too wide beyond ten values."""
    n = len(values)
    if n == 1:
        return Interval(values[0], None)
    t = T_975[min(n, 10) - 2]
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n))


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """Ours less theirs ({seed: value}), over the seeds that both have; None if there is none."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval(differences) if differences else None


def scores(predictions: Path, seed: int) -> dict[str, float]:
    """The metrics of evaluate.py on a toy test set, and besides f1_several and f1_single: of rows
    with several items, where harm can hide, and of the others; recaps and repeats: % of outputs
    with a recap, and with more than one."""
    records = read_records(predictions)
    several = toy.several_items("test", seed, toy.SIZES["test"])
    hiding = [record for record in records if record["id"] in several]
    single = [record for record in records if record["id"] not in several]
    recaps = [record["output"].count(RECAPPED) for record in records]
    return compute_metrics(records) | {
        "f1_several": compute_metrics(hiding)["f1"],
        "f1_single": compute_metrics(single)["f1"],
        "recaps": 100 * statistics.mean(count > 0 for count in recaps),
        "repeats": 100 * statistics.mean(count > 1 for count in recaps),
    }


def course(metrics: Path) -> dict[str, list[float]]:
    """Length, entropy and share of clipped tokens: their means in each quarter of an RL run."""
    steps = [
        step | {"clipped": step["clipped_high"] + step["clipped_low"]}
        for step in read_records(metrics)
    ]
    ends = [len(steps) * quarter // 4 for quarter in range(5)]
    quarters = [steps[begin:end] for begin, end in zip(ends, ends[1:])]
    return {
        name: [statistics.mean(step[name] for step in part) for part in quarters if part]
        for name in COURSE
    }


def by_seed(results: dict[int, Result], variant: str, metric: str) -> dict[int, float]:
    """{seed: value}, over the seeds that have this variant and metric."""
    found = {seed: result.scores.get(variant, {}) for seed, result in results.items()}
    return {seed: values[metric] for seed, values in found.items() if metric in values}


def difference(results: dict[int, Result], line: Line, metric: str) -> Interval | None:
    """How much more a variant has than the one it is compared with; None without such a pair."""
    if line.variant == line.against:
        return None
    ours, theirs = (by_seed(results, name, metric) for name in (line.variant, line.against))
    return paired_difference(ours, theirs)


# ---------------------------------------------------------------------- tables


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(found: Interval | None, metric: str, sign: str = "") -> str:
    return "-" if found is None else found.text(DIGITS.get(metric, 1), sign)


def mean_cells(results: dict[int, Result], variant: str, metrics: Iterable[str]) -> list[str]:
    """Means over the seeds, with intervals."""
    found = [list(by_seed(results, variant, metric).values()) for metric in metrics]
    return [cell(interval(v) if v else None, metric) for v, metric in zip(found, metrics)]


def table_of_claims(results: dict[int, Result], lines: list[Line]) -> str:
    """A row per variant: means over the seeds and paired differences, both with intervals."""
    differences = [f"{metric}, difference" for metric in COMPARED]
    rows, above = [], ""
    for line in lines:
        seeds = len(by_seed(results, line.variant, "f1"))
        row = [line.claim if line.claim != above else "", line.variant, str(seeds)]
        row += mean_cells(results, line.variant, SHOWN)
        row.append(line.against if line.variant != line.against else "-")
        row += [cell(difference(results, line, metric), metric, "+") for metric in COMPARED]
        rows.append(row)
        above = line.claim
    return markdown(["claim", "variant", "seeds", *SHOWN, "against", *differences], rows)


def table_of_parts(results: dict[int, Result], lines: list[Line]) -> str:
    """A row per variant: PARTS, and in brackets how they differ from those of the variant that it is
    compared with."""
    rows = []
    for line in lines:
        row = mean_cells(results, line.variant, PARTS)
        if line.variant != line.against:
            apart = [cell(difference(results, line, metric), metric, "+") for metric in PARTS]
            row = [f"{mean} ({found})" for mean, found in zip(row, apart)]
        rows.append([line.variant, *row])
    return markdown(["variant", *PARTS], rows)


def table_of_seeds(results: dict[int, Result], lines: list[Line]) -> str:
    """A row per variant and seed."""
    metrics = [*SHOWN, *PARTS]
    rows = [
        [line.variant, str(seed), *mean_cells({seed: result}, line.variant, metrics)]
        for line in lines
        for seed, result in results.items()
        if line.variant in result.scores
    ]
    return markdown(["variant", "seed", *metrics], rows)


def table_of_courses(results: dict[int, Result]) -> str:
    """A row per RL variant: means over the seeds for each quarter of the run."""
    rows = []
    for variant in dict.fromkeys(name for result in results.values() for name in result.courses):
        found = [
            result.courses[variant] for result in results.values() if variant in result.courses
        ]
        row = [variant]
        for metric in COURSE:
            means = [statistics.mean(values) for values in zip(*(one[metric] for one in found))]
            row.append(", ".join(cell(Interval(mean, None), metric) for mean in means))
        rows.append(row)
    return markdown(["variant", *(f"{metric}, by quarter of the run" for metric in COURSE)], rows)


def control_note(results: dict[int, Result]) -> str:
    """Whether the control had as many seconds as what it is a control of."""
    control, rl = (
        statistics.mean(by_seed(results, name, "seconds").values()) for name in ("control", "grpo")
    )
    note = f"The control had {control:.0f} s of further SFT; mining and GRPO took {rl:.0f} s."
    return note if control >= rl else note + " That is too few: raise CONTROL in ablations.py."


def saving_note(results: dict[int, Result]) -> str:
    """How many tokens Eco saves, in %: per seed first, as all differences."""
    eco, grpo = (by_seed(results, name, "mean_tokens") for name in ("eco", "grpo"))
    saved = interval([100 * (1 - eco[seed] / grpo[seed]) for seed in eco if seed in grpo])
    return f"Eco needs {saved.text()} % fewer tokens than grpo."


def report(results: dict[int, Result], lines: list[Line]) -> str:
    """All tables as Markdown."""
    parts = [table_of_claims(results, lines)]
    if by_seed(results, "control", "f1") and by_seed(results, "grpo", "f1"):
        parts.append(control_note(results))
    if by_seed(results, "eco", "f1").keys() & by_seed(results, "grpo", "f1").keys():
        parts.append(saving_note(results))
    parts += [table_of_parts(results, lines), table_of_courses(results)]
    if len(results) > 1:
        parts.append(table_of_seeds(results, lines))
    return "\n\n".join(parts) + "\n"


def summary(results: dict[int, Result]) -> dict:
    """{variant: {metric: mean}}, "seconds": {stage: mean}, and "seeds": what these are means of."""

    def means(pick: Callable[[Result], dict]) -> dict[str, float]:
        found = [pick(result) for result in results.values()]
        names = dict.fromkeys(name for one in found for name in one)
        return {name: statistics.mean(one[name] for one in found if name in one) for name in names}

    variants = dict.fromkeys(name for result in results.values() for name in result.scores)
    return {
        **{name: means(lambda result: result.scores.get(name, {})) for name in variants},
        "seconds": means(lambda result: result.seconds),
        "seeds": {seed: result._asdict() for seed, result in results.items()},
    }
