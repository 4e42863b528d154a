"""In the place of Ray's dashboard agent: says that it listens on no port, and ends when its node does.

Run by a raylet with nothing but the standard library; see infra/lean.py. Arguments: the names of the ports, with commas
between them, then what Ray gives its own agent.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    node = os.getppid()
    folder = next(word for word in sys.argv if word.startswith("--session-dir=")).partition("=")[2]
    for name in sys.argv[1].split(","):
        file = os.path.join(folder, f"{name}_{os.environ['RAY_NODE_ID']}")
        with open(f"{file}.tmp", "w") as text:
            text.write("-1")
        os.replace(f"{file}.tmp", file)  # the node may be reading already
    while os.getppid() == node:
        time.sleep(1.0)


if __name__ == "__main__":
    main()
