"""How the command line names settings in its errors."""

import pytest

from train.messages import as_typed

NAMES = ("seed", "steps", "target_bias", "process_id", "num_processes", "coeff")


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("target_bias must lie in (0, 1); got 2.", "--target-bias must lie in (0, 1); got 2."),
        ("seed must be ≥ 0; got -1.", "--seed must be ≥ 0; got -1."),
        ("coeff = 2 is too large.", "--coeff = 2 is too large."),
        ("after 5 steps of any seed", "after 5 steps of any seed"),
        ("process_id must lie in [0, 1], by num_processes",
         "--process-id must lie in [0, 1], by --num-processes"),
        ("pass --target-bias; runs/target_bias_2/x.target_bias",
         "pass --target-bias; runs/target_bias_2/x.target_bias"),
    ],
)  # fmt: skip
def test_settings_are_named_as_they_are_typed(message, typed):
    assert as_typed(message, NAMES) == typed
    assert as_typed(typed, NAMES) == typed
