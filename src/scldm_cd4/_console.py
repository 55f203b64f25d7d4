"""Where the user sits: a notebook, a terminal, or neither; and how far long work has come."""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, TypeVar

LOGGER = logging.getLogger("scldm_cd4")
LONG = 10.0
"""Seconds of work from which on an estimate is told."""
LINE_EVERY = 60.0
"""Seconds between two lines in a log."""

Part = TypeVar("Part")


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    return "ipykernel" in sys.modules and hasattr(sys.modules["builtins"], "__IPYTHON__")


def wants_progress(progress: bool | None) -> bool:
    """Resolve None: a bar on a terminal or in a notebook only."""
    return (in_notebook() or sys.stderr.isatty()) if progress is None else progress


def new_bar(total: int, name: str, unit: str, **options: Any) -> Any:
    """Return a progress bar: a widget in a notebook that has widgets, else a line on the terminal."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm then draws its line
        from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit=f" {unit}", unit_scale=True, mininterval=0.5)


class Lines:
    """Tells the logger how far work has come: once when it is seen to be long, then now and then.

    Parameters
    ----------
    name, total, unit
        What is done, its size, and in which unit it is counted.
    after
        Seconds before which no estimate is made.
    """

    def __init__(self, name: str, total: int, unit: str, *, after: float = 0.0) -> None:
        self.name, self.total, self.unit, self.after = name, total, unit, after
        self.start, self.done, self.told = time.monotonic(), 0, 0.0

    def update(self, n: int, more: str = "") -> None:
        """Count what was done; `more` is told with the first line."""
        self.done += n
        passed = time.monotonic() - self.start
        if passed < self.after or (self.told > 0.0 and passed - self.told <= LINE_EVERY):
            return
        left = passed * (self.total - self.done) / max(self.done, 1)
        if passed + left > LONG:
            done = f"{self.done} of {self.total} {self.unit}"
            LOGGER.info("%s: %s, about %s left%s", self.name, done, _span(left), "" if self.told > 0.0 else more)
        self.told = passed


def tracked(
    parts: Iterable[Part],
    total: int,
    name: str,
    unit: str,
    *,
    size: Callable[[Part], int] = lambda part: 1,
    n_bytes: Callable[[Part], int] | None = None,
    progress: bool | None = None,
) -> Generator[Part, None, None]:
    """Yield parts of work, and tell how long and how large the whole will be, by the first part.

    On a terminal or in a notebook a bar shows the time left, and goes away when the work is done. Elsewhere the logger
    ``scldm_cd4`` is told (level INFO), once after the first part and then now and then; short work stays silent.

    Parameters
    ----------
    parts
        The work, done as it is asked for.
    total
        Its size.
    name, unit
        What is done, and in which unit it is counted.
    size, n_bytes
        Of a part: how much of the total it is, and what it holds in memory.
    progress
        Show a bar; None on a terminal or in a notebook only.
    """
    bar = new_bar(total, name, unit, delay=1.0) if wants_progress(progress) and total > 0 else None
    lines = Lines(name, total, unit)
    source = (part for part in parts)
    try:
        with closing(source):
            for part in source:
                memory = "" if n_bytes is None else _memory(n_bytes(part) / size(part) * total)
                if bar is None:
                    lines.update(size(part), f", {memory} in all" if memory else "")
                else:
                    if memory and bar.n == 0:
                        bar.set_postfix_str(f"about {memory}", refresh=False)
                    bar.update(size(part))
                yield part
    finally:
        if bar is not None:
            bar.leave = False
            bar.close()
        close = getattr(parts, "close", None)
        if close is not None:
            close()


def _span(seconds: float) -> str:
    for length, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} s"


def _memory(n: float) -> str:
    for size, name in ((1 << 30, "GB"), (1 << 20, "MB")):
        if n >= size:
            return f"{n / size:.1f} {name}"
    return f"{n / 1024:.0f} kB"
