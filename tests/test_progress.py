import time

from superclip import progress as module
from superclip.progress import progress


def test_without_a_terminal_long_work_writes_lines_and_short_work_none(capsys, monkeypatch):
    assert sum(progress(range(5), "short", unit="batch")) == 10
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "EVERY", 0.01)
    for _ in progress(range(4), "sweep", unit="batch"):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("sweep: ") and "batchs" not in line for line in lines)
    assert " of 4 batches, 00:00 so far, about 00:0" in lines[0]


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress(range(3), "sweep", unit="batch", mininterval=0)) == [0, 1, 2]
    assert "100%" in capsys.readouterr().err
