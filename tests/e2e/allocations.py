"""Loads plans for real: one JSON plan per line in, llama.cpp's account of what it allocated per line out.

python -m tests.e2e.allocations
"""

from __future__ import annotations

import dataclasses
import json
import sys

from tensortier import planfile
from tensortier._llama import decode, memory


def main() -> None:
    for line in sys.stdin:
        plan = planfile.from_dict(json.loads(line))
        with decode.timer(plan) as timer:
            timer.compute(2)
            rows = [dataclasses.asdict(row) for row in memory.allocated(timer.context)]
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
