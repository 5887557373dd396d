"""Train on two processes, kill them at random instants, begin again, until the run is finished.

    python tests/killing.py KILLS RECIPE [key=value ...]

Prints a JSON object a kill: when after the start, whom, whether a checkpoint was being written, what is left to go on.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import ranks
import torch

from tessel.train.config import load_recipe


def main() -> None:
    torch.set_num_threads(1)
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    recipe = load_recipe(arguments[0], arguments[1:])
    checkpoints = Path(recipe.run.out) / recipe.run.name / "checkpoints"
    rng = random.Random(0)
    number = 0
    while number < kills:
        more = [f"ckpt.background={'true' if number % 2 else 'false'}"]
        children = ranks.fork(2, [*arguments, *more])
        start, newest = time.monotonic(), last(checkpoints)
        # a third at once when writing begins, a third between two steps, the others anywhere, the start included
        kind = ("writing", "stepping", "anywhere")[number % 3]
        pause = rng.uniform(0, 0.2 if kind != "anywhere" else 2)
        while time.monotonic() - start < 60 and not dead(children):
            begun = kind == "anywhere" or last(checkpoints) > newest
            if begun and (kind != "writing" or list(checkpoints.glob(".tmp-*"))):
                break
            time.sleep(0.001)
        time.sleep(pause if kind != "writing" else pause / 10)
        ended = dead(children)
        victims = rng.choice([children, children, children[:1], children[1:]])
        partial = bool(list(checkpoints.glob(".tmp-*")))
        for child in victims:
            os.kill(child, signal.SIGKILL)
        codes = ranks.wait(children)
        if ended:
            assert codes == [0, 0], codes
            break
        facts = {"kind": kind, "seconds": round(time.monotonic() - start, 2), "victims": len(victims)}
        print(json.dumps(facts | {"partial": partial, "codes": codes, "step": last(checkpoints)}), flush=True)
        number += 1
    codes = ranks.wait(ranks.fork(2, arguments))
    print(json.dumps({"codes": codes, "step": last(checkpoints)}), flush=True)


def dead(children: list[int]) -> bool:
    """Whether all have ended; they stay to be waited for."""
    ended = [os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children]
    return all(ended)


def last(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


if __name__ == "__main__":
    main()
