"""Progress outside a terminal, and its arithmetic."""

import io

import pytest

from vlaflow.progress import QUIET_SECONDS, Lines, counting, duration, progress, seconds_left


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_now_and_then_with_the_time_left_and_one_at_the_end():
    now, out = [0.0], io.StringIO()
    lines = Lines(10, "Recording", out, clock=lambda: now[0])
    for _ in range(10):
        now[0] += QUIET_SECONDS / 2
        lines.advance(note="drawer-open")
    lines.close()
    written = out.getvalue().splitlines()
    assert written[0] == "Recording: 2/10, 1:00 left, drawer-open"
    assert written[-1] == "Recording: 10/10, took 1:15, drawer-open"
    assert len(written) == 5  # at steps 2, 4, 6 and 8, and the end


def test_what_was_done_before_counts_as_position_and_not_as_pace():
    """Of 4000 steps 3000 were taken yesterday: 10 more in 30 s leave 990 of 3 s each."""
    now, out = [0.0], io.StringIO()
    lines = Lines(4000, "Training", out, clock=lambda: now[0], done=3000)
    now[0] = 30.0
    lines.advance(10)
    assert out.getvalue() == "Training: 3010/4000, 49:30 left\n"


def test_a_bar_begins_where_the_work_was_left():
    out = Terminal()
    with progress(4000, "Training", out, done=3000) as bar:
        bar.advance()
    assert "3001/4000" in out.getvalue()


def test_work_that_is_counted_shows_what_was_there_before(capsys):
    with counting("Decoding episodes") as report:
        for done in range(31, 41):
            report(done, 40)
    assert capsys.readouterr().err.startswith("Decoding episodes: 40/40")


def test_progress_without_a_terminal_draws_no_bar():
    out = io.StringIO()
    with progress(2, "Training", out) as bar:
        bar.advance(2)
    assert out.getvalue() == "Training: 2/2, took 0:00\n"


def test_progress_in_a_terminal_draws_a_bar_with_the_count_and_the_note():
    out = Terminal()
    with progress(3, "Training", out) as bar:
        bar.advance(3, note="loss 0.12 [kept]")
    assert "3/3" in out.getvalue()
    assert "loss 0.12 [kept]" in out.getvalue()


def test_nothing_is_estimated_before_the_first_step():
    assert seconds_left(0, 10, 5.0) is None
    assert seconds_left(4, 10, 8.0) == 12.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (185, "3:05"), (3720, "1:02:00")])
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text
