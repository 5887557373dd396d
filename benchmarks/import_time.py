"""Time of `import tessel.zoo` after `import timm`: the median over several processes.

python benchmarks/import_time.py [--runs 7]
"""

import argparse
import statistics
import subprocess
import sys

CODE = "import time, timm; start = time.perf_counter(); import tessel.zoo; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes to start (default 7)")
    options = parser.parse_args()
    command = [sys.executable, "-c", CODE]
    seconds = [float(subprocess.check_output(command, text=True)) for _ in range(options.runs)]
    print(f"import tessel.zoo after timm: {statistics.median(seconds):.3f} s (median of {options.runs})")


if __name__ == "__main__":
    main()
