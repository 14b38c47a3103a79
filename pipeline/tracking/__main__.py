"""Deliver later what MLflow could not take: `python -m pipeline.tracking sync runs/demo`.

    status DIR ...            how much of the chains in these directories is not in MLflow
    sync DIR ...              deliver it; again and again is harmless
    sync --all DIR ...        deliver everything anew, e.g. to a database that was emptied

Exit code 0 all is delivered, 1 not, 2 bad input, or a record that cannot be read.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.config.base import mistake
from pipeline.config.tracking import TrackingConfig, redact
from pipeline.tracking.client import first_line, sqlite_path
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.spool import Spool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command over every directory."""
    options = _parser().parse_args(arguments)
    try:
        deliveries = [_delivery(directory, options.uri) for directory in options.directories]
        if options.run is _sync and not options.uri:
            for delivery in deliveries:
                _require_own_choice(delivery)
        for delivery in deliveries if options.all else ():
            delivery.spool.forget(delivery.uri)
        codes: list[int] = [options.run(delivery) for delivery in deliveries]
        unreadable = [line for delivery in deliveries for line in delivery.spool.unreadable()]
        for line in unreadable:
            print(f"error: {line}", file=sys.stderr)
        return 2 if unreadable else max(codes)
    except (ValueError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except Exception as error:  # of MLflow, a driver of its database or its store of files
        print(f"error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="What is not in MLflow yet.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (("status", _status, "how much is left"), ("sync", _sync, "deliver what is left")):
        command = commands.add_parser(name, help=text)
        command.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="output directory of a chain")
        command.add_argument("--uri", help="deliver there; else where the chain meant to")
        command.set_defaults(run=run, all=False)
    commands.choices["sync"].add_argument("--all", action="store_true", help="also what was delivered before")
    return parser


def _delivery(directory: Path, uri: str | None) -> Delivery:
    spool = Spool(directory)
    if not (spool.directory / "runs").is_dir():
        raise ValueError(
            f"expected the output directory of a chain, got {str(directory)!r}, which has no tracking/runs"
        )
    noted = spool.target()
    if noted is not None and noted.uri is None and not (uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise ValueError(
            f"expected MLFLOW_TRACKING_URI: the runs of {directory} go to an address with credentials, which no file "
            "keeps; or --uri for another one"
        )
    config = noted or TrackingConfig()
    if not uri:
        return Delivery(config, spool)
    try:
        return Delivery(TrackingConfig.model_validate({**config.model_dump(), "uri": uri}), spool)
    except ValidationError as error:
        raise ValueError(f"--uri: {mistake(error.errors()[0])}") from error


def _require_own_choice(delivery: Delivery) -> None:
    """A directory may come from elsewhere: the server that it names gets none of the passwords that MLflow finds."""
    noted = delivery.config.uri
    if noted and sqlite_path(noted) is None and noted != os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            f"expected --uri or MLFLOW_TRACKING_URI: {delivery.spool.root} says to deliver to {redact(noted)}; "
            "say so too, if that is where it shall go"
        )


def _status(delivery: Delivery) -> int:
    left = delivery.spool.pending(delivery.uri)
    names = ": " + ", ".join(record.name for record in left) if left else ""
    print(f"{delivery.spool.root}: {len(left)} of {len(delivery.spool.records())} runs to deliver{names}")
    return 1 if left else 0


def _sync(delivery: Delivery) -> int:
    before = {record.key for record in delivery.spool.pending(delivery.uri)}
    refused = delivery.run()
    for line in refused:
        print(f"refused: {redact(line)}", file=sys.stderr)
    left = {record.key for record in delivery.spool.pending(delivery.uri)}
    print(f"{delivery.spool.root}: {len(before - left)} runs delivered to {redact(delivery.uri)}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
