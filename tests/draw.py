"""The figures of report.py and of ablations.py. They need matplotlib.

In:  runs as report.py reads them, or results of claims.py. Out: PNG files as bytes.
"""

import io
import math
import statistics
import textwrap
from typing import NamedTuple

import claims
import torch

import data
from model import Row, Segment


class Panel(NamedTuple):
    """One diagram over steps. Metrics that no run has are not drawn, nor is a panel without any."""

    title: str
    metrics: tuple[str, ...]


PARTS = ("format", "request_accuracy", "response_accuracy", "l_norm")
PANELS = (
    Panel("Loss", ("loss", "validation_loss")),
    Panel("Reward", ("reward", "reward_std")),
    Panel("Parts of the reward (means)", PARTS),
    Panel("Held-out F1 (%)", ("val_f1", "val_f1_prompt", "val_f1_response")),
    Panel("Tokens per output", ("tokens", "val_mean_tokens")),
    Panel("Shares: outputs cut off, groups without spread", ("truncated", "zero_std_groups")),
    Panel("Entropy (nats)", ("entropy",)),
    Panel("Clip range", ("clip",)),
    Panel("Share of clipped tokens", ("clipped_high", "clipped_low")),
    Panel("Gap of sampler and trainer (nats)", ("logprob_diff_mean", "logprob_diff_max")),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Seconds per step", ("seconds", "seconds_rollout", "seconds_update")),
    Panel("Tokens per second", ("trained_tokens_per_second", "sampled_tokens_per_second")),
)
README_PANELS = tuple(Panel(name, (name,)) for name in ("reward", "val_f1", "tokens"))
# Metrics, and their titles.
DIFFERENCES = {"f1": "F1 x 100", "balanced": "balanced accuracy of the request, %"}
DIFFERENCES |= {"mean_tokens": "tokens per output"}


def new_figure(width: float, height: float):
    """An empty figure, in inches. InputError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise data.InputError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


# ---- what came out


def outcome(outcomes: dict[str, list[dict]]) -> bytes:
    """F1 with its interval, and tokens, of both tasks of every run. outcomes: {run: averages of
    compare.py's table}."""
    figure = new_figure(11, 1.1 + 0.4 * len(outcomes))
    left, right = figure.subplots(1, 2, sharey=True)
    for y, table in enumerate(outcomes.values()):
        for line in table:
            if line["modality"] == "all":
                is_prompt = line["task"] == "prompt"
                place, colour = (y - 0.12, "C0") if is_prompt else (y + 0.12, "C1")
                left.plot(line["f1"], place, "o", color=colour)
                left.plot(line["f1_interval"], [place, place], "|-", color=colour)
                right.barh(place, line["mean_tokens"], height=0.22, color=colour)
    left.set_yticks(range(len(outcomes)), outcomes)
    left.invert_yaxis()
    left.set_title("F1 x 100: blue of the request, orange of the response")
    right.set_title("tokens per output")
    return png(figure)


def differences(results: dict[int, claims.Result], lines: list[claims.Line]) -> bytes:
    """How each variant differs from the one it is compared with: means and 95 % intervals over the
    seeds, the variants of one claim in one colour. lines: only such as can be compared."""
    claimed, points = list(dict.fromkeys(line.claim for line in lines)), {}
    figure = new_figure(11, 1.6 + 0.3 * len(lines))
    panels = figure.subplots(1, len(DIFFERENCES), sharey=True)
    for axes, (metric, title) in zip(panels, DIFFERENCES.items()):
        for y, line in enumerate(lines):
            mean, half_width = claims.difference(results, line, metric)
            look = {"fmt": "o", "capsize": 3, "color": f"C{claimed.index(line.claim) % 10}"}
            points[line.claim] = axes.errorbar(mean, y, xerr=half_width, **look)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(lines)), [f"{line.variant} - {line.against}" for line in lines])
    panels[0].invert_yaxis()
    figure.legend(points.values(), points.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return png(figure)


# ---- curves


def series(run, metric: str) -> dict[int, float]:
    """{step: value} of a metric, for the steps that have a number."""
    found = ((line["step"], line.get(metric)) for line in run.metrics)
    return {s: v for s, v in found if isinstance(v, int | float) and abs(v) < 1e300}


def draw_metric(axes, metric: str, runs: list, **look) -> None:
    """A metric of all runs of one variant: a single run as a line; several as thin lines, and their
    mean over the steps that all of them have as a thick one."""
    found = [curve for curve in (series(run, metric) for run in runs) if curve]
    thin = {"alpha": 0.35, "linewidth": 0.8} if len(found) > 1 else {}
    for curve in found:
        axes.plot(curve.keys(), curve.values(), marker=".", **look, **thin)
    if len(found) > 1:
        steps = sorted(set.intersection(*(set(curve) for curve in found)))
        means = [statistics.mean(curve[step] for curve in found) for step in steps]
        axes.plot(steps, means, linewidth=2, **look)


def curves(runs: list, panels: tuple[Panel, ...]) -> bytes:
    """The curves of runs, up to three panels a line: a colour for each variant, a line style for
    each metric of a panel. Runs whose folders have the same name are several seeds of one variant.
    InputError if no run has any of the metrics."""
    drawn = lambda run, panel: any(series(run, metric) for metric in panel.metrics)
    members = [run for run in runs if any(drawn(run, panel) for panel in panels)]
    panels = [panel for panel in panels if any(drawn(run, panel) for run in members)]
    variants: dict[str, list] = {}
    for run in members:
        variants.setdefault(run.folder.name, []).append(run)
    if not panels:
        raise data.InputError("there is nothing to draw in the metrics.jsonl of these runs")
    columns, lines = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = new_figure(11, 0.5 + 2.6 * lines)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        metrics = [name for name in panel.metrics if any(series(run, name) for run in members)]
        for metric, style in zip(metrics, ("-", "--", ":", "-.")):
            for i, of_variant in enumerate(variants.values()):
                draw_metric(axes, metric, of_variant, color=f"C{i % 10}", linestyle=style)
            if len(metrics) > 1:
                axes.plot([], [], color="black", linestyle=style, label=metric)
                axes.legend(fontsize=7)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.25)
    handles = []
    for i, (name, of_variant) in enumerate(variants.items()):
        label = f"{name} ({len(of_variant)})" if len(of_variant) > 1 else name
        handles += axes.plot([], [], color=f"C{i % 10}", label=label)
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=9)
    return png(figure)


def page_figures(runs: list, outcomes: dict[str, list[dict]]) -> dict[str, bytes]:
    """{title: PNG} of the page: what came out, then the curves; a step of SFT and one of GRPO do
    not share an axis."""
    figures = {"The outcome": outcome(outcomes)} if outcomes else {}
    for title, name in (("GRPO, step by step", "reward"), ("SFT, step by step", "target_tokens")):
        members = [run for run in runs if series(run, name)]
        if members:
            figures[title] = curves(members, PANELS)
    return figures


# ---- one exchange, and a packed row


def exchange(prediction: dict, sample: data.Sample | None) -> bytes:
    """One prediction: image, request and response; what the guard writes, and P(harmful). sample:
    what holds its image. InputError if that is not there."""

    def wrapped(text: str | None, width: int) -> str:
        return "\n".join(textwrap.fill(line, width) for line in (text or "(none)").splitlines())

    request, response = (wrapped(prediction[name], 28) for name in ("request", "response"))
    asked = f"Request:\n{request}\n\nResponse:\n{response}"
    written = wrapped(prediction["output"], 48) + "\n"
    for task in ("request", "response"):
        if prediction[f"{task}_p"] is not None:
            written += f"\nP(harmful), {task}: {prediction[f'{task}_p']:.2f}"
    figure = new_figure(9, 0.9 + 0.15 * max(12, written.count("\n"), asked.count("\n")))
    columns = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    for axes, title in zip(columns, ("Image", "Exchange", "The guard")):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set(xticks=[], yticks=[], anchor="NW", frame_on=False)
    if prediction["image"] is not None:
        if sample is None:
            raise data.InputError(f"the image of {prediction['id']} is gone, or has changed")
        columns[0].imshow(data.open_image(sample.image_path))
    look = {"va": "top", "family": "monospace", "fontsize": 8, "parse_math": False}
    for axes, text in zip(columns[1:], (asked, written)):
        axes.text(0, 1, text, transform=axes.transAxes, **look)
    return png(figure)


def packed_example() -> tuple[Row, list[str]]:
    """A row of two prompts with three completions each, and the names of its segments."""
    rows, names = [], []
    for name, length, completions in (("A", 5, (3, 4, 2)), ("B", 4, (2, 3, 4))):
        ids, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length).repeat(3, 1)
        prompt = Row(ids, positions, (Segment(0, length),), ids.bool(), torch.empty(0, 1176))
        rows.append(prompt.extend([[0] * count for count in completions]))
        names += [f"prompt {name}", *(f"completion {name}{i}" for i in (1, 2, 3))]
    return rows[0].join(*rows[1:]), names


def visible(row: Row) -> torch.Tensor:
    """[T, T] int64: 2 where a token sees one of its own segment, 1 of its prompt, 0 elsewhere."""
    sees = torch.zeros(len(row), len(row), dtype=torch.int64)
    for start, length, prefix in row.segments:
        own = slice(start, start + length)
        sees[own, own] = 2 * torch.ones(length, length, dtype=torch.int64).tril()
        if prefix is not None:
            prompt = row.segments[prefix]
            sees[own, prompt.start : prompt.start + prompt.length] = 1
    return sees


def packed_row() -> bytes:
    """Who sees whom in packed_example, as a matrix: a token of a line sees the coloured columns."""
    figure, (row, names) = new_figure(6.2, 5.4), packed_example()
    axes = figure.subplots()
    axes.imshow(visible(row).numpy(), cmap="Blues")
    middles = [segment.start + (segment.length - 1) / 2 for segment in row.segments]
    axes.set_xticks(middles, names, fontsize=9, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, names, fontsize=9)
    for segment in row.segments[1:]:
        axes.axhline(segment.start - 0.5, color="#bbb", linewidth=0.7)
        axes.axvline(segment.start - 0.5, color="#bbb", linewidth=0.7)
    axes.set_title("Who sees whom in a packed row: a line sees its coloured columns", fontsize=10)
    return png(figure)
