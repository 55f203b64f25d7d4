"""CPU seconds of `import scldm_cd4` in a fresh interpreter, and what heavy packages it brings along.

python -m benchmarks imports
"""

import argparse
import json
import subprocess
import sys

from benchmarks.measure import report

HEAVY = ("torch", "lightning", "scanpy", "ot", "matplotlib", "umap")
CODE = f"""
import json, sys, time
start = time.process_time()
import scldm_cd4
print(json.dumps([time.process_time() - start, [name for name in {HEAVY} if name in sys.modules]]))
"""


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(options.rounds)
    ]
    times = {"import scldm_cd4": [seconds for seconds, _ in runs]}
    report(
        "imports per CPU second",
        times,
        value=1 / sorted(times["import scldm_cd4"])[len(runs) // 2],
        goal=1.0,
        heavy=runs[0][1],
    )


if __name__ == "__main__":
    main()
