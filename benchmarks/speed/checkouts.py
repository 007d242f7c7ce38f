"""Did a change cost speed? Training steps of two checkouts, in turns, by processor time.

    git worktree add OLD COMMIT
    python benchmarks/speed/checkouts.py --old=OLD --sizes=ml100k,large --batch_sizes=2048,8192

Matrix factorisation without guidance and with the paper's gate, on the data and by the worker of
each checkout (benchmarks/worker.py before the rooms, benchmarks/speed/worker.py since). Each is a
process on one core, and its clock is its processor time, so that other work on the machine delays a
turn but does not lengthen it; only caches and memory are shared. The order of the two changes from
round to round. A ratio is the new rate by the old one, round by round: median, least and most.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from turns import Player

FOLDER = pathlib.Path(__file__).parent
CHILD = str(FOLDER / "checkouts_child.py")


def benchmark_folder(checkout: pathlib.Path) -> pathlib.Path:
    """Where a checkout has its worker."""
    for place in ("benchmarks/speed", "benchmarks"):
        if (checkout / place / "worker.py").is_file():
            return checkout / place
    raise SystemExit(f"error: {checkout} has no benchmarks/speed/worker.py; name a checkout")


def command(checkout: pathlib.Path, *words: str) -> list[str]:
    """A child that imports `checkout`, on the last core."""
    core = str(max(os.sched_getaffinity(0)))
    path = f"PYTHONPATH={checkout}"
    pinned = ["env", path, "JAX_PLATFORMS=cpu", "taskset", "-c", core, sys.executable, CHILD]
    return [*pinned, str(benchmark_folder(checkout)), *words]


def compare(
    old: pathlib.Path, new: pathlib.Path, size: str, batches: list[int], rounds: int, triples: int
) -> None:
    """Print a line per batch size, without guidance and with the paper's gate."""
    with tempfile.TemporaryDirectory() as folder:
        data = {checkout: f"{folder}/{number}" for number, checkout in enumerate((old, new))}
        for checkout, place in data.items():
            subprocess.run(command(checkout, "data", size, place), check=True)

        for batch, guided in itertools.product(batches, (False, True)):
            rates: dict[pathlib.Path, list[float]] = {old: [], new: []}
            players = {}
            for checkout, place in data.items():
                case = (size, place, str(batch), str(int(guided)))
                config = subprocess.check_output(command(checkout, "config", *case), text=True)
                job = {"pairs": place, "seconds": 1.0, "config": config.strip()}
                job |= {"steps": max(1, triples // batch)}
                players[checkout] = Player(command(checkout, "serve"), job)
            for number in range(rounds + 1):
                for checkout in (old, new) if number % 2 else (new, old):
                    turn = players[checkout].turn()
                    if number:  # the first round warms up
                        rates[checkout].append(turn.rate)
            for player in players.values():
                player.close()

            ratios = [n / o for n, o in zip(rates[new], rates[old], strict=True)]
            before, after = (statistics.median(rates[checkout]) / 1e6 for checkout in (old, new))
            print(
                f"{size:7} B = {batch:6,} {'paper gate' if guided else 'no guidance':11}  "
                f"old {before:.2f} M, new {after:.2f} M triples per processor second; new / old "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--old", type=pathlib.Path, required=True, help="checkout before")
    parser.add_argument("--new", type=pathlib.Path, default=FOLDER.parents[1], help="this one")
    parser.add_argument("--sizes", default="ml100k,large", help="of synthetic.SIZES")
    parser.add_argument("--batch_sizes", default="2048,8192")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--triples", type=int, default=1 << 20, help="of a turn")
    given = parser.parse_args()
    old, new = given.old.resolve(), given.new.resolve()
    batches = [int(text) for text in given.batch_sizes.split(",")]
    for size in given.sizes.split(","):
        compare(old, new, size, batches, given.rounds, given.triples)


if __name__ == "__main__":
    main()
