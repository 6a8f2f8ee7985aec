"""``python -m benchmarks to-likelihood``: curves, thresholds and the table."""

import math

import numpy as np
import pytest

from benchmarks.likelihood import report
from benchmarks.likelihood.cells import DEFAULT, TUNED
from benchmarks.likelihood.clock import LAST
from benchmarks.likelihood.curves import Curve, median_and_range, on_common_times
from benchmarks.likelihood.problems import (
    DATA,
)
from benchmarks.likelihood.thresholds import from_peers, thresholds

# Curves, thresholds and the table


def curve(*points, **more):
    """Of (seconds, test, validation)."""
    parts = {
        f"point {i:02d}": {
            "seconds": seconds,
            "test": test,
            "stderr": 0.0,
            "validation": validation,
            "whole": True,
            "enough": False,
        }
        for i, (seconds, test, validation) in enumerate(points)
    }
    return Curve.of({"method": {"parameters": 1234}, **parts, **more})


def test_a_threshold_is_crossed_at_the_first_point_at_or_below_it():
    found = curve((1.0, 3.0, 3.0), (2.0, 2.5, 2.5), (3.0, 2.6, 2.4), (4.0, 2.0, 2.6))
    assert [found.time_to(level) for level in (3.5, 2.5, 2.2, 1.9)] == [1.0, 2.0, 4.0, math.inf]
    assert found.time_to(2.2, limit=4.0) == 4.0 and found.time_to(2.2, limit=3.9) == math.inf


def test_the_final_value_is_chosen_by_validation_and_of_the_whole_test_set():
    assert curve((1.0, 3.0, 3.0), (2.0, 2.5, 2.4), (3.0, 2.0, 2.6)).final == (2.5, 0.0)
    parts = {"test": 2.0, "stderr": 0.1, "enough": False}
    of_some = {"seconds": 1.0, "validation": 1.0, "whole": False, **parts}
    of_all = {"seconds": 2.0, "validation": 2.0, "whole": True, **parts, "test": 2.2}
    assert Curve.of({"a": of_some, LAST: of_all}).final == (2.2, 0.1)
    assert math.isnan(Curve.of({"a": of_some}).final[0])


def test_seeds_that_missed_count():
    assert median_and_range([5.0, math.inf, 3.0]) == (5.0, 3.0, math.inf)
    assert median_and_range([math.inf, math.inf, 3.0])[0] == math.inf
    assert median_and_range([3.0, math.inf])[0] == math.inf


def test_curves_are_compared_where_all_have_begun():
    first = curve((1.0, 3.0, 0.0), (4.0, 2.0, 0.0), (9.0, 1.0, 0.0))
    second = curve((2.0, 5.0, 0.0), (8.0, 4.0, 0.0))
    times, values = on_common_times([first, second])
    assert times[0] == 2.0 and times[-1] == 8.0
    halfway = 2.0 - math.log(8.0 / 4.0) / math.log(9.0 / 4.0)
    np.testing.assert_allclose(values[:, 0], [2.5, 5.0])
    np.testing.assert_allclose(values[:, -1], [halfway, 4.0])
    with pytest.raises(ValueError, match="no time in common"):
        on_common_times([first, curve((10.0, 1.0, 1.0))])


def test_thresholds_are_the_peers_worst_middle_and_best():
    assert from_peers([1.234, 2.0, 1.5, 1.801]) == (2.0, 1.81, 1.24)
    assert from_peers([-3.456]) == (-3.45, -3.45, -3.45)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            from_peers(values)


def test_fixed_thresholds_come_easiest_first():
    fixed = thresholds()
    assert fixed.keys() <= set(DATA) and fixed["digits"] == (2.1, 2.0, 1.93)
    assert all(list(levels) == sorted(levels, reverse=True) for levels in fixed.values())


def test_the_table_shows_who_is_first_and_what_was_missed():
    found = {
        ("fit", DEFAULT): [
            curve((9.0, 2.6, 2.6), (90.0, 2.3, 2.7)),  # at 90 s, of 60: too late
            curve((8.0, 2.6, 2.6)),
            curve((7.0, 2.9, 2.9)),
        ],
        ("zuko-nsf", TUNED): [curve((3.0, 2.65, 2.6), (5.0, 2.5, 2.5))],
        ("flowjax-bnaf", DEFAULT): [curve((1.0, 4.0, 4.0), failed={"reason": "out of memory"})],
    }
    lines = report.table("checkerboard", found, (2.7, 2.6, 2.4)).splitlines()
    assert lines[0].startswith("| method | setting | s to 2.70 | s to 2.60 | s to 2.40 | final")
    nothing = "not in 60 s"
    fit = f"9.0 (8.0 to not) | 9.0 (8.0 to not) | {nothing} | 2.600 (2.600 to 2.900) | 3 | 1,234"
    assert lines[2] == f"| fit | default | {fit} |"
    zuko = f"**3.0** | **5.0** | {nothing} | 2.500 | 1 | 1,234"
    assert lines[3] == f"| zuko-nsf | tuned | {zuko} |"
    assert lines[-1] == "- flowjax-bnaf, default, seed 0: out of memory"


def test_curves_are_drawn_and_those_without_a_common_time_left_out(tmp_path):
    apart = [curve((1.0, 2.6, 2.6), (2.0, 2.5, 2.5)), curve((3.0, 2.9, 2.9))]
    found = {
        ("fit", DEFAULT): apart,
        ("zuko-nsf", TUNED): [curve((3.0, 2.7, 2.7), (9.0, 2.6, 2.6))],
    }
    report.draw(tmp_path / "curves.png", "checkerboard", found, (2.7, 2.6, 2.4))
    report.draw(tmp_path / "nothing.png", "checkerboard", {("fit", DEFAULT): apart}, None)
    drawn, nothing = ((tmp_path / f"{name}.png").stat().st_size for name in ("curves", "nothing"))
    assert drawn > nothing > 0
