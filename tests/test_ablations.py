"""ablations.py: a stage's progress is on the screen while it runs, and its log holds whole lines only.

    python -m pytest tests/test_ablations.py
"""

import os
import pty
import sys

import ablations
import pytest

STAGE = """
import sys, time
sys.stderr.write("\\rsampling  50%")
sys.stderr.write("\\rsampling 100%")
sys.stderr.write("\\r             \\r")
print("step 1/2")
print("step 2/2")
time.sleep(1.5)
print("done")
"""


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    return f"{tmp_path}/stage.py"


def test_in_a_file_the_newest_line_stands_from_time_to_time(stage, tmp_path, capsys):
    seconds = {}
    ablations.run("name", stage, tmp_path, seconds, every=0.1)
    assert (tmp_path / "name.log").read_text() == "step 1/2\nstep 2/2\ndone\n"  # no frame of the bar
    command, *live, last, before_last, _ = capsys.readouterr().out.splitlines()[1:]
    assert command == f"$ python {stage}" and (last, before_last) == ("step 2/2", "done ")
    assert any(line.endswith(" s  step 2/2") for line in live) and not any("\r" in line for line in live)
    assert 1.4 < seconds["name"] < 30
    ablations.run("name", stage, tmp_path, seconds)
    assert len(capsys.readouterr().out.splitlines()) == 5  # half a minute is not over


def test_on_a_terminal_the_newest_line_is_rewritten_in_place(stage, tmp_path, monkeypatch):
    reader, writer = pty.openpty()
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        ablations.run("name", stage, tmp_path, {})
        monkeypatch.undo()
        shown = os.read(reader, 4096).decode()
    os.close(reader)
    frames = shown.split(ablations.START_OF_LINE)
    assert any(frame.endswith(" s  step 2/2") for frame in frames[1:-1])
    assert not any("\n" in frame for frame in frames[1:-1])
    assert frames[-1].startswith("step 2/2\r\ndone")  # the terminal's line ends


def test_a_stage_that_fails_ends_the_demo(tmp_path, capsys):
    (tmp_path / "stage.py").write_text("raise SystemExit('error: no such file')")
    with pytest.raises(SystemExit) as stopped:
        ablations.run("name", f"{tmp_path}/stage.py", tmp_path, {})
    assert stopped.value.code == 1 and capsys.readouterr().out.count("error: no such file") == 2
