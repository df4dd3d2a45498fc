"""What the programs of this folder share: jobs come in a file, each answer is a line of another.

A job: ``id``, ``model`` (a folder), ``adapter`` (a folder, a file or null), ``prompt`` (token ids),
``steps`` (how many tokens to choose), ``context`` (for how many the runtime has to reckon) and
``type`` (of the weights, where the runtime makes its model itself). The answer: ``tokens`` and
``logits [steps, V]``, or ``error``.
"""

import json
import sys
import time
from collections.abc import Callable

Answer = tuple[list[int], list[list[float]]]


def answer(run: Callable[[dict], Answer]) -> None:
    """Answer the jobs of the file that is named first into the file that is named second."""
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        started = time.monotonic()
        try:
            tokens, logits = run(job)
            found: dict = {"tokens": [int(t) for t in tokens], "logits": logits}
        except Exception as error:  # of any runtime, whatever it raises
            found = {"error": f"{type(error).__name__}: {error}"}
        found |= {"id": job["id"], "seconds": time.monotonic() - started}
        with open(sys.argv[2], "a") as file:  # line by line: the next may end the process
            file.write(json.dumps(found) + "\n")


def greedy(job: dict, logits_of: Callable[[list[int]], list[float]]) -> Answer:
    """Choose tokens greedily.

    Args:
        job: See above.
        logits_of: What follows the tokens that it is given, all of the text each time.
    """
    ids, rows = list(job["prompt"]), []
    for _ in range(job["steps"]):
        rows.append(logits_of(ids))
        ids.append(max(range(len(rows[-1])), key=rows[-1].__getitem__))
    return ids[len(job["prompt"]) :], rows
