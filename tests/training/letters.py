"""A tokeniser of one token per character, quick to start, and a process that fills a folder of token ids with it.

python letters.py FOLDER NUM_ROWS NUM_CHUNKS HOLD    prints "half" at the row HOLD and waits for a line; then the rows it made
"""

import json
import sys
from pathlib import Path


class Letters:
    """Stands in for `Tokenise`.

    Attributes:
        hold: at this row it prints "half" and waits for a line on stdin.
        done: numbers of the rows that it was given.
    """

    def __init__(self, hold=None):
        self.hold, self.done = hold, []

    def __call__(self, rows, first, counts):
        if self.hold is not None and first <= self.hold < first + len(rows):
            print("half", flush=True)
            sys.stdin.readline()
        numbers = range(first, first + len(rows))
        self.done += numbers
        counts.rows += len(rows)
        counts.kept += len(rows)
        ids = [list(map(ord, row["text"])) for row in rows]
        return {"input_ids": ids, "labels": ids, "example": list(numbers)}


def texts(number):
    return [{"text": f"row {i}"} for i in range(number)]


if __name__ == "__main__":
    from rlhf.training.tokens import Job

    folder, rows, chunks, hold = sys.argv[1:]
    letters = Letters(int(hold))
    Job(Path(folder), int(rows), int(chunks)).work(texts(int(rows)), letters)
    print(json.dumps(letters.done))
