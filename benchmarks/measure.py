"""Ways to do one thing side by side: in turn in one process, by CPU seconds, with the load of the machine.

A shared machine makes wall time worthless; the ratio of CPU seconds of two ways that take turns is what holds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Times = dict[str, list[float]]


def cpu_seconds(ways: Mapping[str, Callable[[], Any]], *, rounds: int = 5) -> Times:
    """Run all ways once to warm up, then in turn; return the CPU seconds of each run by way."""
    for way in ways.values():
        way()
    times: Times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: Times, slow: str, fast: str) -> float:
    """Return the median over the rounds of one way's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def report(name: str, times: Times, *, value: float, goal: float, per: float = 1.0, **facts: Any) -> dict[str, Any]:
    """Print a line for people and a line of JSON; return what it holds.

    Parameters
    ----------
    times
        From `cpu_seconds`; medians are printed, divided by `per` units of work.
    value, goal
        What was measured and what it must reach: a ratio, or a fraction of the limit.
    facts
        Further numbers, such as the limit.
    """
    medians = {way: statistics.median(values) / per for way, values in times.items()}
    result = {
        "name": name,
        "value": round(value, 4),
        "goal": goal,
        "reached": value >= goal,
        "cpu_milliseconds": {way: round(1e3 * seconds, 4) for way, seconds in medians.items()},
        "spread": {way: [round(1e3 * f(v) / per, 4) for f in (min, max)] for way, v in times.items()},
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        **facts,
    }
    sides = ", ".join(f"{way} {1e3 * seconds:.3g} ms" for way, seconds in medians.items())
    more = ", ".join(
        f"{key} {shown:.4g}" if isinstance(shown, float) else f"{key} {shown}" for key, shown in facts.items()
    )
    verdict = "reached" if result["reached"] else "NOT reached"
    print(f"{name}: {value:.2f} (goal {goal}, {verdict}); {sides}; {more}; load {result['load'][0]}", flush=True)
    print(json.dumps(result), flush=True)
    return result
