"""The figures of report.py (curves, one exchange, a packed row), and of ablations.py (differences).

In:  runs as report.py reads them, or results of claims.py. Out: PNG files as bytes.
They need matplotlib.
"""

import io
import math
import statistics
import textwrap
from typing import NamedTuple

import claims
import torch

import data


class Panel(NamedTuple):
    """One diagram over steps. Metrics that no run has are not drawn, nor is a panel without any."""

    title: str
    metrics: tuple[str, ...]
    log_scale: bool = False  # where all values are positive


PANELS = (
    Panel("Loss", ("loss", "validation_loss"), log_scale=True),
    Panel("Reward", ("reward", "reward_std")),
    Panel(
        "Parts of the reward (means)", ("format", "request_accuracy", "response_accuracy", "l_norm")
    ),
    Panel("Held-out F1 (%)", ("val_f1", "val_f1_prompt", "val_f1_response")),
    Panel("Tokens per output", ("tokens", "val_mean_tokens")),
    Panel("Shares: outputs cut off, groups without spread", ("truncated", "zero_std_groups")),
    Panel("Entropy (nats)", ("entropy",)),
    Panel("Clip range", ("clip",)),
    Panel("Share of clipped tokens", ("clipped_high", "clipped_low")),
    Panel(
        "Gap of sampler and trainer (nats)",
        ("logprob_diff_mean", "logprob_diff_max"),
        log_scale=True,
    ),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Seconds per step", ("seconds", "seconds_rollout", "seconds_update")),
    Panel("Tokens per second", ("trained_tokens_per_second", "sampled_tokens_per_second")),
)
README_PANELS = (
    Panel("Reward", ("reward",)),
    Panel("Held-out F1 (%)", ("val_f1",)),
    Panel("Tokens per output", ("tokens",)),
)
DIFFERENCES = {"f1": "F1 x 100", "mean_tokens": "tokens per output"}  # metrics, and their titles
LINE_STYLES = ("-", "--", ":", "-.")  # of the metrics of one panel
PACKED_COLOURS = ("white", "#c6dbef", "#3182bd", "#fdd0a2", "#e6550d")


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


# ---- curves


def series(run, metric: str) -> dict[int, float]:
    """{step: value} of a metric, for the steps that have it."""
    found = {line["step"]: line.get(metric) for line in run.metrics}
    return {step: value for step, value in found.items() if isinstance(value, (int, float))}


def draw_metric(axes, metric: str, runs: list, **look) -> None:
    """A metric of all runs of one variant: a single run as a line; several as thin lines, and their
    mean over the steps that all of them have as a thick one."""
    found = [curve for curve in (series(run, metric) for run in runs) if curve]
    for curve in found:
        thin = {"alpha": 0.35, "linewidth": 0.8} if len(found) > 1 else {}
        marker = "o" if len(curve) < 12 else None
        axes.plot(curve.keys(), curve.values(), marker=marker, markersize=3, **look, **thin)
    if len(found) > 1:
        steps = sorted(set.intersection(*(set(curve) for curve in found)))
        means = [statistics.mean(curve[step] for curve in found) for step in steps]
        axes.plot(steps, means, linewidth=2, **look)


def draw_panel(axes, panel: Panel, variants: dict[str, list]) -> None:
    """The panel's metrics: a colour for each variant, a line style for each metric."""
    for metric, style in zip(panel.metrics, LINE_STYLES):
        for i, runs in enumerate(variants.values()):
            draw_metric(axes, metric, runs, color=f"C{i % 10}", linestyle=style)
    lowest = min(min(line.get_ydata()) for line in axes.get_lines())
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.log_scale and lowest > 0:
        axes.set_yscale("log")
    if len(panel.metrics) > 1:
        for metric, style in zip(panel.metrics, LINE_STYLES):
            axes.plot([], [], color="black", linestyle=style, label=metric)
        axes.legend(fontsize=7)


def curves(runs: list, panels: tuple[Panel, ...]) -> bytes:
    """The curves of runs, up to three panels a line. Runs whose folders have the same name are
    several seeds of one variant. InputError if no run has any of the metrics."""
    drawn = [name for panel in panels for name in panel.metrics]
    runs = [run for run in runs if any(series(run, name) for name in drawn)]
    if not runs:
        raise data.InputError("there is nothing to draw in the metrics.jsonl of these runs")
    variants: dict[str, list] = {}
    for run in runs:
        variants.setdefault(run.folder.name, []).append(run)
    present = []
    for panel in panels:
        metrics = tuple(name for name in panel.metrics if any(series(run, name) for run in runs))
        if metrics:
            present.append(panel._replace(metrics=metrics))
    columns = min(3, len(present))
    lines = math.ceil(len(present) / columns)
    figure = new_figure(11, 0.5 + 2.6 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, present):
        draw_panel(axes, panel, variants)
    for axes in grid[len(present) :]:
        axes.axis("off")
    handles = []
    for i, (name, members) in enumerate(variants.items()):
        label = name.replace("$", r"\$")  # which would begin a formula
        label += f" ({len(members)} runs)" if len(members) > 1 else ""
        handles += grid[0].plot([], [], color=f"C{i % 10}", label=label)
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=9)
    return png(figure)


def stage_figures(runs: list) -> dict[str, bytes]:
    """{title: curves} of the page: a step of SFT and one of GRPO do not share an axis."""
    stages = {"SFT": [], "GRPO": []}
    for run in runs:
        if run.metrics:
            rewarded = any("reward" in metrics for metrics in run.metrics)
            stages["GRPO" if rewarded else "SFT"].append(run)
    return {stage: curves(members, PANELS) for stage, members in stages.items() if members}


# ---- differences


def differences(results: dict[int, claims.Result], lines: list[claims.Line]) -> bytes:
    """How each variant differs from the one it is compared with: means and 95 % intervals over the
    seeds, the variants of one claim in one colour. lines: only such as can be compared.

    Variants that are compared with another one have axes of their own: their effects are larger.
    """
    made = dict.fromkeys(line.claim for line in lines)
    colours = {claim: f"C{i % 10}" for i, claim in enumerate(made)}
    blocks: dict[str, list[claims.Line]] = {}
    for line in lines:
        blocks.setdefault(line.against, []).append(line)
    heights = [len(block) + 1 for block in blocks.values()]
    figure = new_figure(11, 1.0 + 0.32 * sum(heights))
    grid = figure.subplots(
        len(blocks), len(DIFFERENCES), sharey="row", squeeze=False, height_ratios=heights
    )
    for pair, (against, block) in zip(grid, blocks.items()):
        for axes, (metric, title) in zip(pair, DIFFERENCES.items()):
            for y, line in enumerate(block):
                mean, half_width = claims.difference(results, line, metric)
                colour = colours[line.claim]
                axes.errorbar(mean, y, xerr=half_width, fmt="o", capsize=3, color=colour)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(f"{title}, less those of {against}", fontsize=10)
            axes.tick_params(labelsize=8)
            axes.grid(axis="x", alpha=0.25)
        names, common = [], claims.by_seed(results, against, "f1").keys()
        for line in block:
            seeds = common & claims.by_seed(results, line.variant, "f1").keys()
            names.append(f"{line.variant} ({len(seeds)} seeds)")
        pair[0].set_yticks(range(len(block)), names)
        pair[0].set_ylim(len(block) - 0.5, -0.5)
    handles = [
        grid[0, 0].plot([], [], "o", color=colour, label=claim)[0]
        for claim, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return png(figure)


# ---- one exchange


def exchange(sample: data.Sample, prediction: dict) -> bytes:
    """One prediction: image, request and response; what the guard writes, and P(harmful)."""

    def wrapped(text: str | None, width: int) -> str:
        return "\n".join(textwrap.fill(line, width) for line in (text or "(none)").splitlines())

    asked = f"Request:\n{wrapped(sample.request, 28)}\n\nResponse:\n{wrapped(sample.response, 28)}"
    written = wrapped(prediction["output"], 48) + "\n"
    for task in ("request", "response"):
        if prediction.get(f"{task}_p") is not None:
            written += f"\nP(harmful), {task}: {prediction[f'{task}_p']:.2f}"
    figure = new_figure(9, 0.9 + 0.15 * max(12, written.count("\n"), asked.count("\n")))
    columns = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    for axes, title in zip(columns, ("Image", "Exchange", "The guard")):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set(xticks=[], yticks=[], anchor="NW")
        axes.set_frame_on(axes is columns[0] and sample.image is not None)
    if sample.image is not None:
        columns[0].imshow(data.open_image(sample.image_path))
    plain = {"va": "top", "family": "monospace", "fontsize": 8, "parse_math": False}
    for axes, text in zip(columns[1:], (asked, written)):
        axes.text(0, 1, text, transform=axes.transAxes, **plain)
    return png(figure)


# ---- a packed row


def packed_example() -> tuple[data.Row, list[str]]:
    """A row of two prompts with three completions each, and the names of its segments."""
    rows, names = [], []
    for name, length, completions in (("A", 5, (3, 4, 2)), ("B", 4, (2, 3, 4))):
        prompt = data.Row(
            ids=torch.zeros(length, dtype=torch.int64),
            positions=torch.arange(length).repeat(3, 1),
            segments=(data.Segment(0, length),),
            supervised=torch.zeros(length, dtype=torch.bool),
            pixels=torch.empty(0, 1176),
        )
        rows.append(prompt.extend([[0] * count for count in completions]))
        names += [f"prompt {name}", *(f"completion {name}{i}" for i in (1, 2, 3))]
    return rows[0].join(*rows[1:]), names


def visible(row: data.Row) -> torch.Tensor:
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
    figure = new_figure(6.2, 5.4)
    from matplotlib.colors import ListedColormap

    row, names = packed_example()
    colours = visible(row)
    second = next(i for i, segment in enumerate(row.segments) if i and segment.prefix is None)
    below = torch.arange(len(row)) >= row.segments[second].start  # [T]: tokens of the second prompt
    colours += 2 * (below[:, None] & (colours > 0))
    axes = figure.subplots()
    axes.imshow(colours.numpy(), cmap=ListedColormap(PACKED_COLOURS), vmin=0, vmax=4)
    middles = [segment.start + (segment.length - 1) / 2 for segment in row.segments]
    axes.set_xticks(middles, names, fontsize=9, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, names, fontsize=9)
    for segment in row.segments[1:]:
        axes.axhline(segment.start - 0.5, color="#bbb", linewidth=0.7)
        axes.axvline(segment.start - 0.5, color="#bbb", linewidth=0.7)
    axes.set_title("Who sees whom in a packed row: a line sees its coloured columns", fontsize=10)
    return png(figure)
