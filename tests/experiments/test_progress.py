import io
import sys

import pytest

import experiments.progress
from experiments.progress import Progress, Rates


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(experiments.progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(experiments.progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_now_and_then_without_a_terminal(clock, capsys):
    with Progress("first: ") as show:
        for second in range(0, 50, 5):
            clock[0] = second
            show("decode", second, 200)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"first: decode: {done} of 200 ({share}%)" for done, share in
                                [(15, 8), (30, 15), (45, 22)]]  # fmt: skip


def test_nothing_is_said_of_short_work(capsys):
    with Progress() as show:
        show("load", 1, 2)
        show("load", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal_leave_stdout_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as show:
        show("prefill", 3, 7)
        print("a result")
        show.stop()
        shown = terminal.getvalue()
        show("prefill", 7, 7)
        assert terminal.getvalue() == shown  # silent once stopped
    assert "prefill" in shown
    assert "3/7" in shown
    assert capsys.readouterr().out == "a result\n"


def test_rates_leave_the_first_and_the_last_report_out(clock):
    rates = Rates(Progress())
    assert rates.seconds == 0.0
    for clock[0], done in [(10.0, 16), (12.0, 32), (14.0, 56), (16.0, 57)]:
        rates("decode", done, 57)
    assert rates.per_second("decode") == 10.0  # 40 in 4 seconds
    assert rates.per_second("prefill") is None
    rates("prefill", 1, 2)
    rates("prefill", 2, 2)
    assert rates.per_second("prefill") is None
    assert rates.seconds == 16.0
