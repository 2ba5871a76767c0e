"""From predictions of several seeds and variants to tables: means, intervals, paired differences.

In:  predictions of evaluations, as ablations.py leaves them, and the truth.json of their world.
Out: Markdown.

An interval is mean +- t * s / sqrt(n): n seeds, s their standard deviation, t the 97.5 % quantile
of Student's t with n - 1 degrees of freedom. A difference is taken within each seed first: both
variants share its world, its base and, if they are RL runs, its R-SFT, so that what varies with
these cancels.
"""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import audit

from evaluate import classification_metrics, compute_metrics
from reward import HARMFUL

# Student's t: the 97.5 % quantiles for 1, 2, ... 9 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# F1 is of both tasks; the others up to the tokens are of the request alone.
SHOWN = ("f1", "balanced", "false_alarms", "mean_tokens", "seconds")
PARTS = (
    "f1_prompt f1_response f1_text f1_image f1_text_image false_alarms_plain f1_known f1_hidden"
    " f1_crowded balanced_crowded false_alarms_crowded format_ok"
).split()
CROWDED = 3  # items of a request, at least: where harm can hide
COMPARED = ("f1", "balanced", "f1_hidden", "mean_tokens")
DIGITS = {"format_ok": 3}  # behind the point; one for the others
ALWAYS = "(always harmful)"  # a variant that says so whatever it is asked


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval; None for a single seed."""

    mean: float
    half_width: float | None


Result = dict[str, dict[str, float]]  # what one seed gave: {variant: {metric: value}}


class Line(NamedTuple):
    """A line of the table."""

    claim: str
    variant: str
    against: str  # the variant that it is compared with


def interval(values: list[float]) -> Interval:
    """The mean of independent values and its 95 % interval; a bit too wide beyond ten values."""
    n = len(values)
    if n == 1:
        return Interval(values[0], None)
    t = T_975[min(n, 10) - 2]
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n))


def request_rates(records: list[dict]) -> dict[str, float]:
    """F1 of the request, false alarms (% of what is unharmful) and balanced accuracy (the mean of
    the shares of harmful and of unharmful requests that are judged right: 50 for any constant
    answer), without those that are undefined."""
    line = classification_metrics([r for r in records if r["request_label"]], "request")
    recall, false_alarms = line["recall"], line["false_positive_rate"]
    found = {"f1": line["f1"], "false_alarms": false_alarms}
    if recall is not None and false_alarms is not None:
        found["balanced"] = (recall + 100 - false_alarms) / 2
    return {name: value for name, value in found.items() if value is not None}


def scores(records: list[dict], truths: dict) -> dict[str, float]:
    """The metrics of evaluate.py on predictions of a toy test set, the rates of audit.py, and rates
    of the request: over all rows, over rows that plain, known or hidden clauses decide (plain ones
    are all unharmful: only false alarms), and over crowded rows. truths: truth.json."""
    found = compute_metrics(records) | audit.audit(records, truths)
    for name, value in request_rates(records).items():
        found.setdefault(name, value)  # f1 is that of both tasks
    groups = {"plain": [], "known": [], "hidden": [], "crowded": []}
    for record in records:
        truth = truths[record["id"]]
        groups[truth["decided_by"]].append(record)
        if len(truth["items"]) >= CROWDED:
            groups["crowded"].append(record)
    for group, members in groups.items():
        for name, value in request_rates(members).items():
            found[f"{name}_{group}"] = value
    return found


def scores_of_always_harmful(records: list[dict], truths: dict) -> dict[str, float]:
    """What a guard that calls everything harmful would score on the same rows."""
    said = {"request_pred": HARMFUL, "response_pred": HARMFUL, "request_p": 1.0, "response_p": 1.0}
    found = scores([record | said for record in records], truths)
    rates = ("f1", "balanced", "false_alarms")
    return {name: found[name] for name in found if name.startswith(rates)}


def by_seed(results: dict[int, Result], variant: str, metric: str) -> dict[int, float]:
    """{seed: value}, over the seeds that have this variant and metric."""
    found = {seed: result.get(variant, {}) for seed, result in results.items()}
    return {seed: values[metric] for seed, values in found.items() if metric in values}


def difference(results: dict[int, Result], line: Line, metric: str) -> Interval | None:
    """How much more a variant has than the one it is compared with, over the seeds that have both;
    None if no seed has, or if it is compared with nothing else."""
    ours, theirs = (by_seed(results, name, metric) for name in (line.variant, line.against))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval(differences) if differences and line.variant != line.against else None


def markdown(header: list[str], lines: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cell(found: Interval | None, metric: str, sign: str = "") -> str:
    if found is None:
        return "-"
    digits = DIGITS.get(metric, 1)
    mean = f"{found.mean:{sign}.{digits}f}"
    return mean if found.half_width is None else f"{mean} ± {found.half_width:.{digits}f}"


def mean_cells(results: dict[int, Result], variant: str, metrics: Iterable[str]) -> list[str]:
    """Means over the seeds, with intervals."""
    found = [list(by_seed(results, variant, metric).values()) for metric in metrics]
    return [cell(interval(v) if v else None, metric) for v, metric in zip(found, metrics)]


def table_of_claims(results: dict[int, Result], lines: list[Line]) -> str:
    """A line per variant: means over the seeds and paired differences, both with intervals."""
    table, above = [], ""
    for line in lines:
        seeds = len(by_seed(results, line.variant, "f1"))
        cells = [line.claim if line.claim != above else "", line.variant, str(seeds)]
        cells += mean_cells(results, line.variant, SHOWN)
        cells.append(line.against if line.variant != line.against else "-")
        cells += [cell(difference(results, line, metric), metric, "+") for metric in COMPARED]
        table.append(cells)
        above = line.claim
    differences = [f"{metric}, difference" for metric in COMPARED]
    return markdown(["claim", "variant", "seeds", *SHOWN, "against", *differences], table)


def table_of_parts(results: dict[int, Result], lines: list[Line]) -> str:
    """A line per variant: PARTS, and in brackets how they differ from those of the variant that it
    is compared with."""
    table = []
    for line in lines:
        cells = mean_cells(results, line.variant, PARTS)
        if line.variant != line.against:
            apart = [cell(difference(results, line, metric), metric, "+") for metric in PARTS]
            cells = [f"{mean} ({found})" for mean, found in zip(cells, apart)]
        table.append([line.variant, *cells])
    return markdown(["variant", *PARTS], table)


def table_of_seeds(results: dict[int, Result], lines: list[Line]) -> str:
    """A line per variant and seed."""
    table = []
    for variant in (line.variant for line in lines):
        for seed, result in results.items():
            if variant in result:
                cells = mean_cells({seed: result}, variant, [*SHOWN, *PARTS, *audit.RATES])
                table.append([variant, str(seed), *cells])
    return markdown(["variant", "seed", *SHOWN, *PARTS, *audit.RATES], table)


def saving_note(results: dict[int, Result]) -> str:
    """How many tokens Eco saves, in %: per seed first, as all differences."""
    eco, grpo = (by_seed(results, name, "mean_tokens") for name in ("eco", "grpo"))
    saved = interval([100 * (1 - eco[seed] / grpo[seed]) for seed in eco if seed in grpo])
    return f"Eco needs {cell(saved, 'mean_tokens')} % fewer tokens than grpo."


def table_of_audits(results: dict[int, Result], lines: list[Line]) -> str:
    """A line per variant: the rates of audit.py."""
    table = [[line.variant, *mean_cells(results, line.variant, audit.RATES)] for line in lines]
    return markdown(["variant", *audit.RATES], table)


def report(results: dict[int, Result], lines: list[Line]) -> str:
    """All tables as Markdown."""
    parts = [table_of_claims(results, lines)]
    eco, grpo = (by_seed(results, name, "f1") for name in ("eco", "grpo"))
    if eco.keys() & grpo.keys():
        parts.append(saving_note(results))
    always = Line("", ALWAYS, ALWAYS)
    parts += [table_of_parts(results, [*lines, always]), table_of_audits(results, lines)]
    if len(results) > 1:
        parts.append(table_of_seeds(results, lines))
    return "\n\n".join(parts) + "\n"
