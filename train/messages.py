"""Errors of the command line name a setting as it is typed: --target-bias, not target_bias."""

import re
from collections.abc import Iterable


def as_typed(message: str, settings: Iterable[str]) -> str:
    """Write the names of settings in a message as options of the command line.

    A name with an underscore is one wherever it stands; another, such as "seed" or "steps", which
    are words too, only where the message says what it must be.
    """
    for name in settings:
        option = f"--{name.replace('_', '-')}"
        where = r"\b" if "_" in name else r"(?=( must | = ))"
        message = re.sub(rf"(?<![-\w.]){re.escape(name)}{where}", option, message)
    return message
