"""How right the time left was that a run told: ``python -m benchmarks.time_left COMMAND …``.

It runs the command, notes when each line came, and compares what the lines of training said with
when the command ended: ``python -m benchmarks.time_left python -m train density --dataset digits``.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence

#: When a line came, in seconds, and the line.
Line = tuple[float, str]

_TOLD = re.compile(r" step [\d,]+/[\d,]+ .* left (\d+:\d\d:\d\d|-:--:--)")
_AFTER_SECONDS = 10.0


def seconds_of(text: str) -> int:
    """Return the seconds that "H:MM:SS" stands for."""
    hours, minutes, seconds = map(int, text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def estimates(lines: Sequence[Line]) -> list[tuple[float, int]]:
    """Return (when, seconds left) that were told from 10 s after the first step on."""
    told = [(when, match[1]) for when, line in lines if (match := _TOLD.search(line))]
    if not told:
        return []
    start = told[0][0] + _AFTER_SECONDS
    return [(when, seconds_of(left)) for when, left in told if when >= start and "-" not in left]


def worst_ratio(lines: Sequence[Line], end: float) -> float:
    """Return the largest factor by which an estimate was off, of a run that ended at ``end``."""
    pairs = [(left, end - when) for when, left in estimates(lines)]
    return max((max(pair) / max(1.0, min(pair)) for pair in pairs), default=float("nan"))


def main(command: Sequence[str]) -> int:
    """Run a command, pass on what it says, and print how far its estimates were off."""
    lines: list[Line] = []
    begin = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append((time.monotonic() - begin, line))
            print(f"{lines[-1][0]:7.1f}  {line}", end="", flush=True)
    end = time.monotonic() - begin
    for when, left in estimates(lines):
        print(f"{when:7.1f} s: {left} s left were told; {end - when:.0f} s it took.")
    print(f"At most off by a factor of {worst_ratio(lines, end):.2f}.")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
