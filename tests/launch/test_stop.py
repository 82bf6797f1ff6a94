"""Being asked to stop."""

import multiprocessing
import signal
import time

import pytest

from megadpo.parallel.stop import ASKING, StopSignal


def test_nobody_asked():
    with StopSignal() as stop:
        assert not stop.requested
    assert stop.signum is None


@pytest.mark.parametrize("signum", ASKING)
def test_asked(signum):
    before = [signal.getsignal(each) for each in ASKING]
    with StopSignal() as stop:
        signal.raise_signal(signum)
        assert stop.requested
        assert stop.exit_code == 128 + signum
        for other in ASKING:
            signal.raise_signal(other)  # again and again changes nothing
        assert stop.signum == signum
    assert [signal.getsignal(each) for each in ASKING] == before


def test_a_rank_that_got_no_signal_itself():
    assert StopSignal().exit_code == 128 + signal.SIGTERM


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_the_process():
    def insist() -> None:
        with StopSignal():
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.1)
            signal.raise_signal(signal.SIGINT)
            time.sleep(30)

    process = multiprocessing.get_context("fork").Process(target=insist)
    process.start()
    process.join(10)
    assert process.exitcode == -signal.SIGINT
