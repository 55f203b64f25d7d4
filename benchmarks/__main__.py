"""One command for every benchmark: ``python -m benchmarks NAME [ARGUMENTS]``, ``--help`` after the name for its own.

Each prints what it measured and with what load; ``docs/performance.md`` holds the results with their hardware.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("__main__", "measure", "protocol", "rival")


def main() -> None:
    """Run the script of the name given."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in PARTS)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        asked = sys.argv[1:2]
        print(__doc__)
        for name in names:
            text = (HERE / f"{name}.py").read_text()
            print(f"  {name:20s} {text.removeprefix(chr(34) * 3).splitlines()[0]}")
        sys.exit(0 if not asked or asked[0] in ("-h", "--help") else f"no benchmark is called {asked[0]!r}")
    name = sys.argv[1]
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    sys.path[:0] = [str(HERE), str(HERE.parent)]  # the scripts import their neighbours either way
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
