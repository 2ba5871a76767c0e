"""What the READMEs say of the code is true: commands, names, lines to read, links.

python -m pytest tests/test_readme.py
"""

import ast
import re
import shlex
from pathlib import Path

import ablations
import compare
import pytest

import augment
import data
import evaluate
import grpo
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FLAGS = {
    "sft.py": sft.SFTFlags,
    "augment.py": augment.AugmentFlags,
    "grpo.py": grpo.GRPOFlags,
    "evaluate.py": evaluate.EvaluateFlags,
    "compare.py": compare.CompareFlags,
    "data.py convert": data.ConvertFlags,
    "data.py synthesize": data.SynthesizeFlags,
}
FILES = "model.py data.py reward.py sft.py augment.py grpo.py evaluate.py".split()


def readme_commands() -> list[tuple[str, str]]:
    """(script, flags) of every indented command line; optional parts are taken, comments and `; done` are not."""
    start = r"^    (?:.*?=\S+ )? *(?:python|torchrun .*?) ?(?:tests/)?"
    line = start + r"(\w+\.py(?: convert| synthesize)?)\b(.*)$"
    found = re.findall(line, README.replace("\\\n", ""), re.MULTILINE)
    found = [(script, re.sub(r"  #.*|; done|[][]", "", flags)) for script, flags in found]
    return [(script, flags) for script, flags in found if script in FLAGS]


def demo_commands() -> list[tuple[str, str]]:
    """Those of the demo. No variant with a fork: its sources would be written."""
    variants = [variant for variant in ablations.VARIANTS if not variant.fork]
    stages = ablations.stages_of(31, Path("out"), variants, True).values()
    commands = sorted({tuple(stage.command.split(maxsplit=1)) for stage in stages})
    return [(script, flags) for script, flags in commands if script in FLAGS]


@pytest.mark.parametrize("script, flags", [*demo_commands(), *readme_commands()])
def test_flags_are_known(script, flags):
    if script == "compare.py":  # whose files may come without the name of their flag
        flags = f"--predictions {flags}"
    seen = []
    data.cli(FLAGS[script], seen.append, shlex.split(flags))
    assert len(seen) == 1


def test_every_function_that_the_readme_names_exists():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", README)
    assert len(named) > 12
    for file, name in named:
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{file}:{name}"


def lines_to_read() -> list[tuple[str, int, int]]:
    """(file, first, last) of the ranges in the last column of the table of files."""
    rows = re.findall(r"^\| *`(\w+\.py)` *\|.*\|([^|\n]*)\| *$", README, re.MULTILINE)
    ranges = [(file, span) for file, cell in rows for span in re.findall(r"(\d+)-(\d+)", cell)]
    return [(file, int(first), int(last)) for file, (first, last) in ranges]


def test_the_readme_shows_every_stage_and_what_to_read_of_every_file():
    assert {script for script, _ in readme_commands()} == set(FLAGS)
    assert {file for file, _, _ in lines_to_read()} == set(FILES)


@pytest.mark.parametrize("file, first, last", lines_to_read())
def test_lines_to_read_are_whole_definitions(file, first, last):
    """From where a definition or the comment over a section begins, to where a definition ends."""
    source = (ROOT / file).read_text()
    starts = {n for n, line in enumerate(source.splitlines(), 1) if line.startswith("# --")}
    ends = set()
    for node in ast.parse(source).body:
        decorators = getattr(node, "decorator_list", [])
        starts.add(min(part.lineno for part in (node, *decorators)))
        ends.add(node.end_lineno)
    assert first < last and first in starts and last in ends


@pytest.mark.parametrize("readme", ["README.md", "tests/README.md"])
def test_every_file_that_a_readme_names_exists(readme):
    text, folder = (ROOT / readme).read_text(), (ROOT / readme).parent
    linked = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    scripts = re.findall(r"\b((?:tests/)?\w+\.(?:py|sh))\b", text)
    missing = [name for name in linked if not (folder / name).exists()]
    missing += [s for s in scripts if not (ROOT / s).exists() and not (folder / s).exists()]
    assert not missing


@pytest.mark.parametrize("readme", ["README.md", "tests/README.md"])
def test_links_to_a_heading_lead_there(readme):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", (ROOT / readme).read_text()):
        path = (ROOT / readme).parent / target if target else ROOT / readme
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in anchors, f"{target}#{anchor}"
