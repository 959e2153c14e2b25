"""One client of ``benchmarks.serving``: a process with numpy, msgpack and websockets, and without torch.

    python -m benchmarks._load_client REQUEST.msgpack ADDRESS ADDRESS ...

For every line on standard input, "which-address how-many", it asks so often without a pause and prints the milliseconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vlaflow.robot import Client, wire


def main() -> int:
    """Serve standard input until it ends."""
    request = wire.unpack(Path(sys.argv[1]).read_bytes())
    clients = [Client(address) for address in sys.argv[2:]]
    if "torch" in sys.modules:
        raise SystemExit("a client must not need torch")
    print("ready", flush=True)
    for line in sys.stdin:
        which, count = map(int, line.split())
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            clients[which].infer(request)
            taken.append(1e3 * (time.perf_counter() - began))
        print(json.dumps(taken), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
