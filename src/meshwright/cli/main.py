"""The `meshwright` command: finds the command's file, and turns a user's mistake into one line on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from meshwright.cli import doctor, inspect, plan, predict, train
from meshwright.errors import MeshwrightError

COMMANDS = (train, inspect, plan, predict, doctor)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a user's mistake, 1 a failure, 130 interrupted."""
    parser = _Parser(prog="meshwright", description="Any PyTorch module under any mix of parallelism, with the same numbers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = command.add_parser(subparsers)
        subparser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "inputs") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.inputs += rest  # argparse takes positional words in one run only; a user may put options between them
    try:
        code = parsed.run(parsed)
    except MeshwrightError as error:
        if parsed.json:
            print(json.dumps({"error": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    raise SystemExit(code)
