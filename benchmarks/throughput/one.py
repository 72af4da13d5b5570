"""Runs a variant of a row once, in this process; prints its figures as the last line."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from benchmarks.throughput.measures import MEASURES
from benchmarks.throughput.rows import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("variant")
    parser.add_argument("changes", type=json.loads, help="fields of the row, as JSON")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    row = replace(ROWS[options.row], **options.changes)
    variant = row.variants[options.variant]
    variant = replace(variant, settings=(*variant.settings, *options.settings))
    print(json.dumps(MEASURES[row.measure](row, variant)))


if __name__ == "__main__":
    main()
