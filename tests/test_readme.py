"""Every command of the README and of the demo goes through the parser of the script it names.

python -m pytest tests/test_readme.py
"""

import re
import shlex
import sys
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
CONFIGS = {"sft.py": sft.Config, "augment.py": augment.Config, "grpo.py": grpo.Config, "evaluate.py": evaluate.Config,
           "compare.py": compare.Config,
           "data.py": {"convert": data.ConvertConfig, "synthesize": data.SynthesizeConfig}}  # fmt: skip
# No variant with a fork: its sources would be written. The commands differ by seed only.
STAGES = ablations.stages_of(31, Path("out"), [v for v in ablations.VARIANTS if not v.fork], True)
DEMO = sorted({tuple(stage.command.split(maxsplit=1)) for stage in STAGES.values()})
DEMO = [(script, flags) for script, flags in DEMO if script in CONFIGS]


def readme_commands() -> list[tuple[str, str]]:
    """(script, flags) of every indented command line; optional parts are taken, comments and `; done` are not."""
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    lines = re.findall(
        r"^    (?:.*?=\S+ )? *(?:python|torchrun .*?) ?(?:tests/)?(\w+\.py)\b(.*)$",
        text,
        re.MULTILINE,
    )
    return [
        (script, re.sub(r"  #.*|; done|[][]", "", flags))
        for script, flags in lines
        if script in CONFIGS
    ]


@pytest.mark.parametrize("script, flags", [*DEMO, *readme_commands()])
def test_flags_are_known(script, flags, monkeypatch):
    config, seen = CONFIGS[script], []
    if script == "compare.py":  # whose files may come without the name of their flag
        flags = f"--predictions {flags}"
    if isinstance(config, dict):
        config = {name: (sub, seen.append) for name, sub in config.items()}
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
    data.cli(config, seen.append)
    assert len(seen) == 1


def test_the_readme_names_every_stage():
    assert {script for script, _ in readme_commands()} == set(CONFIGS)


def named_functions(text: str) -> list[tuple[str, str]]:
    """(file, name) of every `file.py:name`."""
    return re.findall(r"`([\w/]+\.py):(\w+)`", text)


def test_every_function_that_the_readme_names_exists():
    named = named_functions((ROOT / "README.md").read_text())
    assert len(named) > 12
    for file, name in named:
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{file}:{name}"


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
