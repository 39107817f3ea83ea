import logging

import pytest

from d4m_plugin import progress
from d4m_plugin.progress import Progress, say


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by twenty seconds a look."""
    looks = iter(range(0, 10**6, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(looks))


def test_where_no_terminal_shows_a_bar_plain_lines_tell_what_is_left(clock, capsys, caplog):
    caplog.set_level(logging.INFO, "d4m_plugin")
    with Progress("Encoding", 50_000, mininterval=0) as bar:
        bar.reach(10_000, "1/5 units")
        for _ in range(5):
            bar.update(1000)
    said = capsys.readouterr().err
    assert "\r" not in said
    *lines, last = said.splitlines()
    assert 1 < len(lines) < 6  # not one for each update
    assert all(line.startswith("Encoding: 1") and line.endswith(" left") for line in lines)
    assert "of 50000 images, 1/5 units, " in lines[-1]
    assert last.startswith("Encoding: 15000 of 50000 images in ")
    assert caplog.messages == said.splitlines()


def test_what_is_found_done_is_no_part_of_the_rate():
    with Progress("Encoding", 100) as bar:
        bar.reach(90)
        assert (bar.n, bar.initial) == (90, 90)
        bar.update(2)
        bar.reach(91)  # others have done less than what is shown
        assert (bar.n, bar.initial) == (92, 90)


def test_the_last_line_has_the_rate_of_the_whole_time(capsys):
    with Progress("Synthesising", 4) as bar:
        bar.start_t -= 8
        bar.update(1)
        bar.update(3)
    assert capsys.readouterr().err == "Synthesising: 4 of 4 images in 00:08, 2.00 s/images\n"


def test_nothing_done_is_nothing_told(capsys):
    with Progress("Encoding", 100) as bar:
        bar.reach(100)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_tells(monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, "d4m_plugin")
    monkeypatch.setenv("LOCAL_RANK", "1")
    say("once")
    with Progress("Encoding", 10) as bar:
        bar.update(10)
    assert (capsys.readouterr().err, caplog.messages) == ("", [])
