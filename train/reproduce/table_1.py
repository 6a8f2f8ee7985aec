"""Table 1: properties of invertible networks; each mark of the i-ResNet's row has its test."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from train.reproduce.published import MEMORY, PROPERTIES, TABLE_1
from train.reproduce.result import Context, Result

_FILE = "tests/test_properties.py"
#: Property -> the test in tests/test_properties.py that checks the i-ResNet's mark.
TESTS = {
    "free-form Jacobian": "test_the_jacobian_is_free_form",
    "analytic forward": "test_the_forward_map_is_analytic",
    "analytic inverse": "test_the_inverse_is_iterative_not_analytic",
    "non-volume-preserving": "test_volume_is_not_preserved",
    "exact likelihood": "test_the_series_gives_no_exact_likelihood",
    "unbiased log-det estimator": "test_the_truncated_series_is_biased",
}


def run(context: Context) -> Result:
    """The table, with the outcome of the tests of the i-ResNet's row."""
    del context
    outcomes = {name: _outcome(test) for name, test in TESTS.items()}
    rows = [
        {
            "property": name,
            **{f"{model} (published)": marks[i] for model, marks in TABLE_1.items()},
            "i-ResNet (measured)": outcomes[name],
            "test": f"{_FILE}::{TESTS[name]}",
        }
        for i, name in enumerate(PROPERTIES)
    ]
    note = (
        f"Marks of the paper are {MEMORY}. Measured: the test of the published mark of the "
        "i-ResNet's row. The estimator's mark is of the paper's truncated series."
    )
    return Result(rows, note=note)


def _outcome(test: str) -> str:
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"{_FILE}::{test}"]
    status = subprocess.run(command, cwd=root, capture_output=True, check=False).returncode
    return "test passed" if status == 0 else f"TEST FAILED (status {status})"
