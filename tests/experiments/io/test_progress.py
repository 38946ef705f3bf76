import io
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import monitoring

import retro_jax.experiments.io.progress
from retro_jax.experiments.generate.words import summary
from retro_jax.experiments.io.progress import Progress, Rates
from retro_jax.experiments.machine.compile_time import COMPILE_EVENTS, CompileTime


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(retro_jax.experiments.io.progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retro_jax.experiments.io.progress.time, "perf_counter", lambda: now[0])
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


EVENT = COMPILE_EVENTS + "backend_compile_duration"


def begin(event=EVENT):
    monitoring.record_scalar(event, 0.0, fun_name="f")


def end(event=EVENT):
    monitoring.record_event_time_span(event, 0.0, 1.0, fun_name="f")


def test_compiling_is_counted_once_and_only_between_start_and_stop(clock):
    changes = []
    compile_time = CompileTime(changes.append)
    begin()
    compile_time.start()
    end()  # of what had begun before
    assert compile_time.seconds == 0.0 and not compile_time.running and not changes
    clock[0] = 10.0
    begin(COMPILE_EVENTS + "jaxpr_trace_duration")
    clock[0] = 12.0
    begin("/jax/something/else")
    begin()
    clock[0] = 15.0
    end()
    assert compile_time.seconds == 5.0 and compile_time.running
    clock[0] = 16.0
    end(COMPILE_EVENTS + "jaxpr_trace_duration")
    clock[0] = 20.0
    assert compile_time.seconds == 6.0 and not compile_time.running
    begin()
    clock[0] = 21.0
    compile_time.stop()
    clock[0] = 30.0
    end()
    begin()
    assert compile_time.seconds == 7.0 and not compile_time.running
    assert changes == [True, False, True, False]


def test_compilations_of_several_threads_are_counted_once(clock):
    with Progress() as show:
        begin()
        clock[0] = 2.0
        for work in (begin, end):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            clock[0] += 1.0
        end()
        assert show.compile_seconds == 4.0


def test_a_real_compilation_is_timed(capsys):
    with Progress() as show:
        assert show.compile_seconds == 0.0
        jax.jit(lambda x: jax.numpy.sin(x) * 3.25)(np.arange(5.0)).block_until_ready()
        assert 0.0 < (first := show.compile_seconds) < 60.0
    jax.jit(lambda x: jax.numpy.cos(x) * 4.25)(np.arange(5.0)).block_until_ready()
    assert show.compile_seconds == first
    assert capsys.readouterr().out == ""


def test_compiling_is_said_while_it_goes_on_without_a_terminal(monkeypatch, capsys):
    said = threading.Event()
    monkeypatch.setattr(retro_jax.experiments.io.progress, "LEAST_COMPILING", 0.05)
    monkeypatch.setattr(Progress, "_print", lambda _, line: (print(line, file=sys.stderr), said.set()))
    with Progress("2/3 full: ") as show:
        begin()
        assert said.wait(30)
        assert capsys.readouterr().err == "2/3 full: compiling\n"
        end()
        begin()
        time.sleep(0.1)
        end()
        assert capsys.readouterr().err == ""  # once is enough
    assert capsys.readouterr().err == f"2/3 full: compiled for {show.compile_seconds:.0f} s\n"


def test_short_compilations_are_not_mentioned(clock, capsys):
    with Progress():
        begin()
        clock[0] = 0.9
        end()
    assert capsys.readouterr() == ("", "")


def test_compiling_stands_below_the_bars(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as show:
        show("prefill", 3, 7)
        begin()
        clock[0] = 0.9
        show._bars.refresh()
        assert "compil" not in terminal.getvalue()
        clock[0] = 12.0
        show._bars.refresh()
        assert "compiling for 12 s" in terminal.getvalue()
        end()
        clock[0] = 99.0
    assert "compiled for 12 s" in terminal.getvalue()


def test_the_summary_tells_the_seconds_of_compiling(clock):
    made = SimpleNamespace(tokens=[[1, 2], [3]], metrics=None)
    with Progress() as show:
        rates = Rates(show)
        begin()
        clock[0] = 2.5
        end()
        clock[0] = 4.0
        rates("prefill", 1, 1)
        assert summary(made, rates) == "[3 tokens in 4.0 s, 2.5 s of them compiling]"
    with Progress() as show:
        assert summary(made, Rates(show)) == "[3 tokens in 0.0 s]"


def test_rates_do_not_depend_on_compiling(clock):
    with Progress() as show:
        rates = Rates(show)
        for clock[0], done in [(10.0, 16), (12.0, 32), (14.0, 48), (16.0, 49)]:
            begin()
            rates("decode", done, 49)
            end()
    assert rates.per_second("decode") == 8.0
