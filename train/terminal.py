"""What a terminal can show: characters that it cannot encode are replaced, and what is going on."""

import codecs
import sys
from typing import Any

from rich.console import Console

_PLAIN = {
    "±": "+/-", "≤": "<=", "≥": ">=", "≈": "~", "−": "-", "–": "-", "—": "-", "…": "...",
    "×": "x", "·": "*", "‖": "||", "→": "->", "σ": "sigma", "²": "^2", "³": "^3",
    "₂": "2", "√": "sqrt",
    "━": "-", "─": "-", "•": "*", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error: ± becomes +/-, ≤ becomes <=, anything unknown a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in unknown), error.end


codecs.register_error("in_plain_characters", _in_plain_characters)


def degrade_characters() -> None:
    """Let standard output and error replace what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        degrade_characters_of(stream)


def degrade_characters_of(stream: Any) -> None:
    """Let one stream replace what its encoding lacks, if it can be set."""
    encoding = str(getattr(stream, "encoding", None) or "utf-8").lower()
    if hasattr(stream, "reconfigure") and not encoding.startswith("utf"):
        stream.reconfigure(errors="in_plain_characters")


def make_console(**options: Any) -> Console:
    """Return a console on standard output that writes whatever its encoding lacks as plain text."""
    degrade_characters()
    return Console(**options)


def tell(what: str) -> None:
    """Say what goes on, on standard error: what takes long and has no progress of its own."""
    degrade_characters()
    print(what, file=sys.stderr, flush=True)
