"""The registry of frozen activations from the command line: `python -m pipeline.registry COMMAND ...`.

    list                      all versions, newest first
    show REF                  tags, aliases and description of a version
    lineage REF               the way from a version to its runs, data and source
    pull REF DIR              its files, verified, into DIR, for ActivationBank.load
    push DIR                  a bank directory as a new version
    promote REF ...           make it the champion, if audit, AutoAttack and comparison allow

REF is NAME@ALIAS or NAME/VERSION. Exit code 0 done, 1 refused or not reachable, 2 bad input.
"""

import argparse
import getpass
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline.artifacts import runs_root
from pipeline.config.base import mistake, one_line
from pipeline.config.tracking import DATABASE, TrackingConfig, database_uri, redact
from pipeline.tracking.lineage import DIGEST_TAG
from pipeline.tracking.registry import Registry

if TYPE_CHECKING:
    from torch import nn

CHAMPION = "champion"
_OVERRIDE_TAGS = ("promoted_anyway", "promotion_refused")
_OWN_TAGS = {"promotion", "promoted_by", "evaluated_weights", "digest", DIGEST_TAG, *_OVERRIDE_TAGS}
"""Tags that others take for evidence."""
_OPTIONS: dict[int | str, str] = {"uri": "--uri", "registry_model": "--model"}


class RefusedError(Exception):
    """A promotion that the gate does not allow, or that would go round it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        registry = Registry(_tracking(options), options.root)
        _require_database(registry, options)
        options.run(registry, options)
    except ValueError as error:
        print(f"error: {redact(one_line(error))}", file=sys.stderr)
        return 2
    except (RefusedError, OSError) as error:  # ConnectionError: MLflow is away; any other: a disk
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    return 0


def _require_database(registry: Registry, options: argparse.Namespace) -> None:
    """MLflow would make an empty one where a folder is misspelt; only `push` may begin one."""
    database = options.root.absolute() / DATABASE
    if options.run is not _push and registry.uri == database_uri(options.root) and not database.is_file():
        raise ValueError(f"expected the registry's database {database}, got none; --root names the folder of the runs")


def _tracking(options: argparse.Namespace) -> TrackingConfig:
    """Raises ValueError with the names of the options that do not do."""
    given = {"uri": options.uri, "registry_model": options.model}
    try:
        return TrackingConfig.model_validate({key: value for key, value in given.items() if value})
    except ValidationError as error:
        mistakes = (f"{_OPTIONS[detail['loc'][0]]}: {mistake(detail)}" for detail in error.errors())
        raise ValueError("; ".join(mistakes)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.registry", description="The registry of frozen activations."
    )
    parser.add_argument("--root", type=Path, default=runs_root(), help="where mlflow.db lies (SPARTA_RUNS, or runs)")
    parser.add_argument("--uri", help="tracking server or database; else MLFLOW_TRACKING_URI, else ROOT/mlflow.db")
    parser.add_argument("--model", help="name of the registered model (sparta-activation)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="all versions, newest first").set_defaults(run=_list)
    for name, run, text in (("show", _show, "tags and description"), ("lineage", _lineage, "runs, data and source")):
        command = commands.add_parser(name, help=text)
        command.add_argument("reference", metavar="REF")
        command.set_defaults(run=run)
    pull = commands.add_parser("pull", help="verified files of a version")
    pull.add_argument("reference", metavar="REF")
    pull.add_argument("directory", metavar="DIR", type=Path)
    pull.set_defaults(run=_pull)
    push = commands.add_parser("push", help="a bank directory as a new version")
    push.add_argument("directory", metavar="DIR", type=Path)
    push.add_argument("--alias", default="candidate")
    push.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE")
    push.add_argument("--description", default="")
    push.set_defaults(run=_push)
    promote = commands.add_parser("promote", help="candidate -> champion")
    promote.add_argument("reference", metavar="REF")
    promote.add_argument(
        "--network", type=Path, required=True, metavar="DIR", help="model directory with the activation"
    )
    promote.add_argument("--evaluation", type=Path, required=True, metavar="DIR", help="evaluation of that network")
    promote.add_argument("--control", type=Path, required=True, metavar="DIR", help="evaluation of its ReLU control")
    promote.add_argument("--control-network", type=Path, required=True, metavar="DIR", help="its model directory")
    promote.add_argument("--promote-anyway", metavar="REASON", help="promote against the gate, and record who and why")
    promote.set_defaults(run=_promote)
    return parser


def _list(registry: Registry, options: argparse.Namespace) -> None:
    versions = registry.versions()
    if not versions:
        print(f"no versions of {registry.config.registry_model} so far")
    for found in versions:
        aliases = ", ".join(found.aliases) or "-"
        print(f"{found.reference:<28} {aliases:<22} sha256:{found.digest[:12]}  {found.description}")


def _show(registry: Registry, options: argparse.Namespace) -> None:
    found = registry.resolve(options.reference)
    print(f"{found.reference} {' '.join(f'@{alias}' for alias in found.aliases)}\n{found.description}")
    for key, value in sorted(found.tags.items()):
        print(f"  {key:<20} {value}")


def _lineage(registry: Registry, options: argparse.Namespace) -> None:
    print(registry.lineage(options.reference))


def _pull(registry: Registry, options: argparse.Namespace) -> None:
    found = registry.pull(options.reference, options.directory)
    print(f"{found.reference} sha256:{found.digest} -> {options.directory}")


def _push(registry: Registry, options: argparse.Namespace) -> None:
    from pipeline.stages.freeze import bank_tags
    from sparta_models import ActivationBank

    if options.alias.lower() == CHAMPION:
        raise RefusedError(f"expected another alias than {CHAMPION}: push a candidate, then `promote` it with evidence")
    bank = ActivationBank.load(options.directory)
    tags = dict(_pair(text) for text in options.tag)
    known = registry.versions()
    before = next((version.reference for version in known if options.alias in version.aliases), None)
    found = registry.register(
        options.directory, tags={**bank_tags(bank), **tags}, description=options.description, alias=options.alias
    )
    twins = [version.reference for version in known if version.digest == found.digest]
    print(f"{found.reference} @{options.alias} sha256:{found.digest}")
    if before:
        print(f"@{options.alias} was {before}")
    if twins:
        print(f"the same files as {', '.join(twins)}")


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[\w. :/-]{1,250}", key):
        raise ValueError(f"expected --tag KEY=VALUE with a key of letters, digits, blanks and _-.:/, got {text!r}")
    if key in _OWN_TAGS:
        raise ValueError(
            f"expected --tag KEY=VALUE with a key of your own, got {key!r}, which only this program writes"
        )
    return key, value


def _promote(registry: Registry, options: argparse.Namespace) -> None:
    from pipeline.evaluation.promotion import control_reasons, paired_gain, promotion_verdict
    from pipeline.evaluation.records import Evaluation
    from pipeline.evaluation.sources import require_activation

    found = registry.resolve(options.reference)
    evaluation, control = Evaluation.load(options.evaluation), Evaluation.load(options.control)
    network = _require_weights(options.network, evaluation.model_digest)
    _require_weights(options.control_network, control.model_digest)
    require_activation(network, options.network, registry, found.reference)
    paired = paired_gain(options.evaluation, options.control)
    verdict = promotion_verdict(evaluation, control, evaluation.audit, paired=paired)
    reasons = [*verdict.reasons, *control_reasons(options.network, options.control_network)]
    if reasons and not options.promote_anyway:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise RefusedError(f"{found.reference} stays what it is:\n{listed}\n(--promote-anyway REASON overrides this)")
    tags = {"promotion": verdict.statement, "promoted_by": _user(), "evaluated_weights": evaluation.model_digest}
    if reasons:
        tags |= {"promoted_anyway": options.promote_anyway, "promotion_refused": "; ".join(reasons)}
    else:
        registry.remove_tags(found.reference, _OVERRIDE_TAGS)
    registry.set_tags(found.reference, tags)
    registry.set_alias(found.reference, CHAMPION)
    print(f"{found.reference} is @{CHAMPION}: {verdict.statement}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user, whom no passwd file knows
        return f"uid {os.getuid()}"


def _require_weights(network: Path, evaluated: str) -> "nn.Module":
    """The network in a directory, whose digest must be that of the evaluated one."""
    from pipeline.evaluation.judged_model import model_digest
    from pipeline.training import load_model

    model = load_model(network)
    if model_digest(model) != evaluated:
        raise ValueError(f"expected the evaluation to be of the weights in {network}, got one of other weights")
    return model


if __name__ == "__main__":
    sys.exit(main())
