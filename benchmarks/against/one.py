"""Runs a peer once, in this process; prints its figures as the last line."""

from __future__ import annotations

import argparse
import importlib
import json

from benchmarks.against.match import fail_on_missing, match

PEERS = ("sb3", "jitted", "rllib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("row")
    parser.add_argument("seconds", type=float)
    parser.add_argument("limit", type=float)
    options = parser.parse_args()
    peer = importlib.import_module(f"benchmarks.against.{options.peer}")
    fail_on_missing(peer.NEEDS)
    clock = peer.train(match(options.row, options.seconds, options.limit))
    print(json.dumps(clock.figures()))


if __name__ == "__main__":
    main()
