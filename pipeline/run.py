"""The one command line:

    python -m pipeline.run [CONFIG] [key.path=value ...] [[--from S] [--until S] | --only S] [--force S] [--dry-run]

CONFIG is a preset's name or a YAML file; without it the embedded demo runs. Exit codes: 0 done, 1 a stage failed,
2 bad configuration, 3 the cluster cannot satisfy the request, 130 interrupted, 141 nobody reads the output,
143 terminated.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NoReturn

from pipeline.artifacts import runs_root, write_atomic
from pipeline.chain import Chain, Decision, OutputLockedError
from pipeline.cluster import ClusterTooSmall, raised_as_such
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, load_config, preset_names
from pipeline.config.tracking import redact
from pipeline.data import DataError
from pipeline.report import PAGE as REPORT
from pipeline.report.study_page import PAGE as STUDY
from pipeline.stages.fit import check_images
from pipeline.stages.graph import STAGES, head, settled, tail, tuned
from pipeline.stages.node import Node
from pipeline.stages.services import Services
from pipeline.stages.summary import closing_lines

DONE, STAGE_FAILED, BAD_CONFIG, CLUSTER_TOO_SMALL, INTERRUPTED, NOBODY_READS, TERMINATED = 0, 1, 2, 3, 130, 141, 143


_COMES_BY = {"search": "; search.enabled=true adds it", "transfer": "; a target in `transfer` adds it"}


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException, so that no stage takes it for a failure of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with raised_as_such():
            code = _run(load_config(options.config, options.overrides), options)
            sys.stdout.flush()
            return code
    except (ConfigError, DataError, OutputLockedError) as error:
        return _fail(error, BAD_CONFIG)
    except BrokenPipeError:  # of `| head`; the interpreter's own last flush would fail as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except (ClusterTooSmall, ConnectionError) as error:
        return _fail(error, CLUSTER_TOO_SMALL)
    except OSError as error:  # where no stage could take it: a full disk under the chain's own records
        return _fail(f"{error}; the same command goes on from here", STAGE_FAILED)
    except (KeyboardInterrupt, Terminated) as stopped:
        how, code = ("terminated", TERMINATED) if isinstance(stopped, Terminated) else ("interrupted", INTERRUPTED)
        return _fail(f"{how}; {_again(options)} goes on from here", code)


def _again(options: argparse.Namespace) -> str:
    return "the same command without --force" if options.force else "the same command"


def _run(config: ChainConfig, options: argparse.Namespace) -> int:
    root = runs_root()
    first = STAGES.index(options.only or options.start or STAGES[0])
    last = STAGES.index(options.only or options.until or STAGES[-1])
    if first > last:
        raise ConfigError(f"expected --from not after --until, got --from {STAGES[first]} --until {STAGES[last]}")
    stages = STAGES[first : last + 1]
    planning = Chain(root / config.name, force=options.force, only=stages)
    planned = _plan(planning, config, STAGES[: last + 1], dry=options.dry_run)
    _require_stages(planned, options)
    asked = config
    if options.dry_run:
        _tell(planned, config, planning)
        return STAGE_FAILED if planning.failed else DONE
    chain = Chain(root / config.name, force=options.force, only=stages)
    with Services(config, root) as services:
        if ahead := _trainings_ahead(planned):
            services.check_cluster(searching="search" in ahead)
        with chain.alone():
            ahead_of_training = _chosen(head(config), STAGES[: last + 1])
            chain.execute([node for node in ahead_of_training if node.stage != "search"], services)  # minutes
            check_images([step.node for step in planned if step.node.stage == "evaluate"], chain.done)
            chain.execute([node for node in ahead_of_training if node.stage == "search"], services)  # hours
            if settled(config, chain.done):
                config = tuned(config, chain.done)
                chain.execute(_chosen(tail(config), STAGES[: last + 1]), services)
            _publish(chain if stages[-1] == STAGES[-1] else _found(chain, asked))
        if chain.failed:
            services.chain_run.fail()
    print(closing_lines(config, chain.output, chain.done, chain.failed))
    return _exit_code(chain)


def _require_stages(planned: Sequence[Decision], options: argparse.Namespace) -> None:
    """Refuse to do nothing: a stage that is named has to be one of this chain."""
    present = {step.node.stage for step in planned}
    if missing := [stage for stage in (*filter(None, [options.only]), *options.force) if stage not in present]:
        ordered, more = ", ".join(stage for stage in STAGES if stage in present), _COMES_BY.get(missing[0], "")
        raise ConfigError(f"expected a stage of this chain ({ordered}), got {missing[0]}{more}")


def _publish(chain: Chain) -> None:
    """Copy the page of this configuration to a place that stays; it holds everything it shows, so the copy is whole.
    Where there is none, that of another configuration does not stay."""
    made = set()
    for finished in (done for key, done in chain.done.items() if key.startswith("report:")):
        page = str(finished.record.payload["page"])
        write_atomic(chain.output / page, (finished.directory / page).read_text(encoding="utf-8"))
        made.add(page)
    for page in {REPORT, STUDY} - made:
        (chain.output / page).unlink(missing_ok=True)


def _found(chain: Chain, config: ChainConfig) -> Chain:
    """`chain` with what an earlier run has made of all stages, also those that were not asked for this time."""
    whole = Chain(chain.output)
    _plan(whole, config, STAGES, dry=True)
    return whole


def _trainings_ahead(planned: Sequence[Decision]) -> set[str]:
    """The stages that will ask the cluster for workers."""
    return {step.node.stage for step in planned if step.node.trains and step.ahead}


def _plan(chain: Chain, config: ChainConfig, stages: Sequence[str], *, dry: bool) -> list[Decision]:
    """What would be done; the stages after a search are planned with what it has found so far."""
    decisions = chain.plan(_chosen(head(config, planning=dry), stages))
    return decisions + chain.plan(_chosen(tail(tuned(config, chain.done)), stages))


def _tell(planned: Sequence[Decision], config: ChainConfig, chain: Chain) -> None:
    """What would be done and why, and what it would cost; what is done already costs nothing."""
    from pipeline.plan import estimate, table

    print("\n".join(decision.line() for decision in planned))
    trained, judged = config.training.threat, config.evaluation.threat
    if trained != judged:
        print(f"trained against {trained.label}, judged under {judged.label}")
    ahead = {decision.node.key for decision in planned if decision.ahead}
    estimates, speed = estimate([decision.node for decision in planned], config, chain.done)
    if ahead:
        print("\n".join(table([e for e in estimates if e.key in ahead], speed)))


def _chosen(nodes: Iterable[Node[Any]], stages: Sequence[str]) -> list[Node[Any]]:
    return [node for node in nodes if node.stage in stages]


def _exit_code(chain: Chain) -> int:
    refused = [error for error in chain.errors.values() if isinstance(error, ConfigError | DataError)]
    for error in refused:
        _fail(error, BAD_CONFIG)
    return BAD_CONFIG if refused else STAGE_FAILED if chain.failed else DONE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Train, freeze, register, transfer, evaluate and report a spatially attentive activation.",
        epilog=f"presets: {', '.join(preset_names())}. stages: {', '.join(STAGES)}. "
        "Exit codes: 0 done, 1 a stage failed, 2 bad configuration, 3 the cluster cannot satisfy the request.",
    )
    parser.add_argument("config", nargs="?", help="preset name or YAML file (default: the embedded demo)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    parser.add_argument(
        "--from", dest="start", choices=STAGES, help="first stage that may run; those before must be done"
    )
    parser.add_argument("--until", choices=STAGES, help="last stage that runs")
    parser.add_argument("--only", choices=STAGES, help="the one stage that may run")
    parser.add_argument(
        "--force", action="append", default=[], choices=STAGES, help="run a stage though it is up to date"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and why, start nothing")
    options = parser.parse_intermixed_args(arguments)
    if options.only and (options.start or options.until):
        parser.error("expected --only without --from and --until, got both: it names the one stage, they name a range")
    return options


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _fail(message: object, code: int) -> int:
    print(f"sparta: {redact(str(message))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
