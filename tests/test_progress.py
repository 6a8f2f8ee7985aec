import io
import itertools
import re

import pytest
from rich.console import Console

from iresnet_jax import Certificate
from iresnet_jax.certificates import BlockCertificate, BranchCertificate, LayerCertificate
from train import legend
from train.progress import (
    LikelihoodProgress,
    TrainingProgress,
    certificate_table,
    format_bound,
    format_metric,
    summary_table,
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def console(terminal, width=100):
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, color_system=None,
        legacy_windows=False, _environ={},
    )  # fmt: skip


def run(screen, updates, *, total=1000, description="digits"):
    """Each update is (seconds since the last, step, metrics); returns what was written."""
    clock = Clock()
    with TrainingProgress(total, description, console=screen, clock=clock) as progress:
        for seconds, step, metrics in updates:
            clock.now += seconds
            progress.update(step, **metrics)
    return screen.file.getvalue()


def lines_of(updates, **keywords):
    return run(console(terminal=False), updates, **keywords).splitlines()


# Without a terminal


def test_a_log_gets_a_line_every_ten_seconds_and_the_last():
    lines = lines_of([(1.0, step, {"loss": 2.0}) for step in range(1, 36)])
    steps = [int(re.search(r"step (\d+)/1,000", line).group(1)) for line in lines]
    assert steps == [1, 11, 21, 31, 35]


def test_a_last_step_already_printed_is_not_repeated():
    assert len(lines_of([(1.0, 1, {}), (10.0, 2, {})])) == 2


def test_a_log_line_says_all_in_plain_text():
    lines = lines_of([(30.0, 100, {}), (10.0, 300, {"loss": 1.2341, "bits_per_dim": 2.1})])
    assert lines[-1] == (
        "digits  step 300/1,000 (30%)  loss 1.234  bits/dim 2.100  20 steps/s"
        "  elapsed 0:00:40  left 0:00:35"
    )


def test_a_log_line_is_never_wrapped_and_markup_is_text():
    metrics = {f"metric_number_{k}": 1.0 for k in range(12)}
    (line,) = lines_of([(1.0, 1, metrics)], description="[bold]digits")
    assert len(line) > 200 and line.startswith("[bold]digits  step 1/1,000")


def test_no_update_prints_nothing():
    assert lines_of([]) == []


def test_an_exception_passes_through_after_the_last_line():
    screen, clock = console(terminal=False), Clock()
    with (
        pytest.raises(KeyboardInterrupt),
        TrainingProgress(1000, "digits", console=screen, clock=clock) as progress,
    ):
        progress.update(1)
        progress.update(7)
        raise KeyboardInterrupt
    assert "step 7/1,000" in screen.file.getvalue().splitlines()[-1]


# Speed


def test_speed_leaves_out_what_precedes_the_first_update():
    lines = lines_of([(500.0, 1, {}), (10.0, 101, {})])
    assert "steps/s" not in lines[0] and "left -:--:--" in lines[0]
    assert "10 steps/s" in lines[1] and "left 0:01:30" in lines[1]


def test_speed_forgets_what_is_older_than_its_window():
    slow = [(1.0, step, {}) for step in range(1, 101)]
    fast = [(1.0, 100 + 5 * k, {}) for k in range(1, 61)]
    assert "  5 steps/s" in lines_of(slow + fast)[-1]


def test_speed_survives_updates_rarer_than_its_window():
    assert "2 steps/s" in lines_of([(60.0, 120 * k, {}) for k in range(1, 5)])[-1]


# In a terminal


def test_a_terminal_gets_a_live_bar_with_the_metrics():
    written = run(console(terminal=True), [(1.0, 4, {}), (10.0, 404, {"sigma": 0.8971})])
    assert "\x1b[?25l" in written and written.endswith("\x1b[?25h")  # the cursor comes back
    assert "compiling the first step" in written
    last = written.rsplit("\x1b[2K", 1)[-1]
    for text in (
        "digits",
        "━",
        "404/1,000",
        "0:00:11 elapsed",
        "0:00:15 left",
        "while training 0.897",
    ):
        assert text in last
    assert "40 steps/s" in last


def test_a_metric_is_explained_once_above_its_lines():
    updates = [(1.0, 1, {"loss": 1.0}), (10.0, 2, {"sigma": 0.9}), (10.0, 3, {"sigma": 0.9})]
    lines = lines_of(updates)
    assert [line.startswith("layer norm while training:") for line in lines] == [
        *(False, True, False, False)
    ]


def test_the_time_left_is_that_of_the_whole_run():
    """With two validations of 5 s to come, and an evaluation as long as the 30 s of set-up."""
    clock, screen = Clock(), console(terminal=False)
    with TrainingProgress(
        100, "digits", planned={"validation": [1, 50, 100]}, evaluates=True, console=screen,
        clock=clock,
    ) as progress:  # fmt: skip
        clock.now += 25.0
        with progress.timed("validation"):
            clock.now += 5.0
        progress.update(1)
        clock.now += 10.0
        progress.update(21)
    assert screen.file.getvalue().splitlines()[-1].endswith("elapsed 0:00:40  left 0:01:20")


def test_the_bar_grows():
    def filled(step):
        written = run(console(terminal=True), [(1.0, step, {})])
        return written.rsplit("\x1b[2K", 1)[-1].count("━")

    assert filled(100) < filled(500) < filled(1000)


def test_a_certificate_keeps_its_digits_in_a_narrow_terminal():
    layer = LayerCertificate("scale 0, block 0, layer 0", 0.9, 0.900001, "")
    branch = BranchCertificate(0.900001, 4, (layer,) * 5)
    block = BlockCertificate("scale 0, block 0", (branch,), 1.900001, 10.0001)
    out = console(terminal=False, width=20)
    certificate_table(Certificate((block,), 12340.1, 98761.0), console=out)
    told = out.file.getvalue()
    assert told.count("0.9001") == 6 and "1.235e+04" in told and "…" not in told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_written_in_plain_characters(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    summary_table("Report", [("bits/dim", "2.1 ± 0.1 (bias ≤ 0.01) ☃")])
    stream.flush()
    told = stream.buffer.getvalue().decode(encoding)
    assert "(bias <= 0.01) ?" in told
    assert ("2.1 +/- 0.1" if encoding == "ascii" else "2.1 ± 0.1") in told


def test_what_takes_long_is_told_on_standard_error_at_once(capsys):
    with TrainingProgress(10, "digits", console=console(terminal=False)):
        assert capsys.readouterr().err == "digits: compiling (often half a minute) …\n"


def test_the_bar_fits_a_narrow_terminal():
    written = run(console(terminal=True, width=80), [(1.0, 12_345, {})], total=20_000)
    assert "12,345/20,000" in written and "0:00:01 elapsed" in written


# Formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2345, "1.234"),
        (-0.897, "-0.897"),
        (12.0, "12.000"),
        (1234.56, "1234.6"),
        (0.001, "1.0e-03"),
        (2.5e7, "2.5e+07"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_metrics_keep_a_steady_width(value, text):
    assert format_metric(value) == text


def test_what_is_explained_fits_a_line():
    """Of 80 columns."""
    in_rows = itertools.chain(*legend._IN_ROWS.values())
    terms = [*legend.LIKELIHOOD, *legend._IN_TRAINING.values(), *in_rows]
    assert max(len(term.line) for term in terms) < 79  # the final table's begin with a space


def test_the_summary_shows_rows_in_order_and_text_as_it_is():
    screen = console(terminal=False)
    summary_table("Report", [("bits/dim", "2.101"), ("[red]", "AUROC [0, 1)")], console=screen)
    title, first, second, meaning = (
        x.split() for x in screen.file.getvalue().splitlines() if x.strip()
    )
    assert (title, first, second) == (
        ["Report"],
        ["bits/dim", "2.101"],
        ["[red]", "AUROC", "[0,", "1)"],
    )
    assert meaning[0] == "AUROC:"


# Likelihoods


def likelihood(screen, updates, *, method="27 to 85 terms a block"):
    """Each update is (seconds since the last, draws, needed, value and stderr or nothing)."""
    clock = Clock()
    with LikelihoodProgress(
        "digits, test set", 2, target_stderr=0.002, target_bias=0.001, console=screen, clock=clock,
    ) as progress:  # fmt: skip
        progress.choose(method, 0.00094)
        for seconds, draws, needed, estimate in updates:
            clock.now += seconds
            progress.update(draws, needed, **estimate)
    return screen.file.getvalue()


FIRST, SECOND = {"value": 1.99, "stderr": float("inf")}, {"value": 1.9915, "stderr": 0.00512}
DRAWN = [(2.0, 0.5, 2, {}), (3.0, 1.0, 2, FIRST), (5.0, 2.0, 13, SECOND), (5.0, 2.5, 13, {})]


def test_a_log_line_says_how_far_the_standard_error_and_the_bias_are():
    *meanings, _, _ = lines = likelihood(console(terminal=False), DRAWN).splitlines()
    assert [meaning.split(":")[0] for meaning in meanings] == ["± of bits/dim", "± ?", "bias ≤"]
    lines = lines[3:]
    assert lines[0] == (
        "digits, test set  draw 1 of ~2  compiling the first draw  "
        "bias ≤ 0.00094 (target 0.001)  27 to 85 terms a block  elapsed 0:00:02  left -:--:--"
    )
    assert lines[-1] == (
        "digits, test set  draw 3 of ~13  bits/dim 1.9915 ± 0.0051 (target 0.002)  "
        "bias ≤ 0.00094 (target 0.001)  27 to 85 terms a block  elapsed 0:00:15  left 0:01:09"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_the_draws_and_the_errors_whole(width):
    written = likelihood(console(terminal=True, width=width), DRAWN)
    last = " ".join(written.rsplit("\x1b[2K", 1)[-1].split())
    for text in ("draw 3 of ~13", "0:00:15 elapsed", "1.9915 ± 0.0051 (target 0.002)",
                 "bias ≤ 0.00094 (target 0.001)", "85 terms", "0:01:09 left"):  # fmt: skip
        assert text in last


def test_the_standard_error_of_one_draw_is_unknown():
    assert "1.9900 ± ? (target 0.002)" in likelihood(console(terminal=False), DRAWN[:2])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000941, "0.00095"), (0.123, "0.13"), (9.99, "10"), (12.3, "13"), (0.0, "0"),
     (float("inf"), "inf"), (0.5, "0.5"), (9.41e-05, "9.5e-05")],
)  # fmt: skip
def test_bounds_are_rounded_up(value, text):
    assert format_bound(value) == text


def test_a_certificates_table_states_no_bound_that_is_too_low():
    layer = LayerCertificate("scale 0, block 0, layer 0", 0.9, 0.900001, "")
    branch = BranchCertificate(0.900001, 4, (layer,))
    block = BlockCertificate("scale 0, block 0", (branch,), 1.900001, 10.0001)
    out = console(terminal=False)
    certificate_table(Certificate((block,), 12340.1, 98761.0), console=out)
    told = out.file.getvalue()
    for number in ("0.9001", "1.901", "10.01", "1.235e+04", "9.877e+04"):
        assert number in told, told
