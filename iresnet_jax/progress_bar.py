"""A progress bar on a terminal, by rich or tqdm, whichever is installed; nothing elsewhere."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

#: (steps done, what to say) -> None.
Report = Callable[[int, str], None]


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Report]:
    """Give a function that tells how many of ``total`` steps are done, and a few words."""
    if shown and importlib.util.find_spec("rich"):
        with _by_rich(total) as report:
            yield report
    elif shown and importlib.util.find_spec("tqdm"):
        with _by_tqdm(total) as report:
            yield report
    else:
        yield lambda done, text: None


@contextlib.contextmanager
def _by_rich(total: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (console.is_terminal or console.is_jupyter)
    with Progress(console=console, disable=hidden) as progress:
        task = progress.add_task("compiling", total=total)
        yield lambda done, text: progress.update(task, completed=done, description=text)


@contextlib.contextmanager
def _by_tqdm(total: int) -> Iterator[Report]:
    from tqdm import tqdm

    with tqdm(total=total, desc="compiling", disable=None) as bar:

        def report(done: int, text: str) -> None:
            bar.set_description(text, refresh=False)
            bar.update(done - bar.n)

        yield report
