import io

import pytest

from data_pipelines import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_whole_lines_and_few_of_them(clock):
    log = io.StringIO()
    with progress.Progress("encoding", 100, log) as bar:
        for _ in range(50):
            clock[0] += 1
            bar.advance()
    lines = log.getvalue().splitlines()
    assert lines[0] == "encoding 15/100  1 pictures/s  1:25 left"
    assert lines[-1] == "encoding 50/100  1 pictures/s  0:50 left"
    assert len(lines) == 4 and "\r" not in log.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn(clock):
    terminal = Terminal()
    with progress.Progress("encoding", 4, terminal) as bar:
        for _ in range(4):
            clock[0] += 1
            bar.advance()
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert "[######..................] encoding 1/4" in shown
    assert "[########################] encoding 4/4" in shown


def test_what_an_earlier_run_did_counts_for_the_bar_and_not_for_the_rate(clock):
    log = io.StringIO()
    with progress.Progress("encoding", 1000, log) as bar:
        bar.skip(900)
        clock[0] += 20
        bar.advance(40)
    assert log.getvalue().splitlines()[-1] == "encoding 940/1,000  2 pictures/s  0:30 left"


def test_nothing_to_do_is_no_error(clock):
    with progress.Progress("encoding", 0, Terminal()):
        pass
