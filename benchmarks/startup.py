"""CPU-seconds and memory from the start of a process to the first token of a model, beside importing torch alone.

    python benchmarks/startup.py MODEL [--rounds 5]

The minimum of the rounds counts. The first run on a machine compiles or checks the decoding library: it is not counted.
"""

import argparse
import os
import subprocess
import sys

WAYS = {
    "import torch": ["-c", "import torch"],
    "llmctl --help": ["-m", "llmctl", "--help"],
    "first token": ["-m", "llmctl", "generate", "-n", "1", "-t", "0", "-q", "The", "-m"],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """Return the CPU-seconds and the peak memory in MB of a process."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled
    ways = {name: [*arguments, *([options.model] if arguments[-1] == "-m" else [])] for name, arguments in WAYS.items()}
    for arguments in ways.values():
        run(arguments)
    best = {name: (float("inf"), 0.0) for name in ways}
    for _ in range(options.rounds):
        for name, arguments in ways.items():
            best[name] = min(best[name], run(arguments))
    for name, (seconds, megabytes) in best.items():
        print(f"{name:<16}{seconds:6.2f} CPU-s{megabytes:8,.0f} MB")


if __name__ == "__main__":
    main()
