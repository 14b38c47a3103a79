"""The chain: decides for every node whether it is up to date, to be resumed or to be run, says why, and does it.

A node's files live in <output>/<stage>/<branch>/<first 12 digits of its fingerprint>/, so a changed configuration never
writes over the results of another one, and changing back finds them again.
"""

import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock, Timeout

from pipeline import artifacts
from pipeline.artifacts import StageRecord
from pipeline.config.tracking import redact
from pipeline.stages.node import Finished, Node, StageContext, StageResult
from pipeline.stages.services import Services

_CURRENT = "current.txt"


class Action(StrEnum):
    """What is to be done with a node."""

    SKIP = "up to date"
    RESUME = "resume"
    RUN = "run"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Decision:
    """A node's action with its reason; the directory is None while the fingerprint waits for upstream output."""

    node: Node[Any]
    action: Action
    reason: str
    directory: Path | None = None
    inputs: Mapping[str, Any] | None = None
    record: StageRecord | None = None

    @property
    def ahead(self) -> bool:
        """Whether there is something to do."""
        return self.action in (Action.RUN, Action.RESUME)

    def line(self) -> str:
        """One aligned line for people."""
        return f"{self.node.key:<34} {self.action.value:<10} {self.reason}"


class OutputLockedError(RuntimeError):
    """Another chain is writing to the same output directory."""


class Chain:
    """Runs nodes, given in an order in which every node comes after what it needs.

    Args:
        output: the chain's directory; created when first written to.
        force: stages that run again even when they are up to date.
        only: stages that may run; the others have to be done already. None: all.
        say: receives one line per event.
    """

    def __init__(
        self,
        output: Path,
        *,
        force: Collection[str] = (),
        only: Collection[str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.output = output
        self.done: dict[str, Finished] = {}
        self.failed: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self._force, self._only, self._say = force, only, say
        self._lock = FileLock(output / ".lock")

    # --- deciding ---------------------------------------------------------------------------------------------------

    def decide(self, node: Node[Any]) -> Decision:
        """What to do with `node`, given what has been done so far. Writes nothing."""
        if broken := [key for key in node.needs if key in self.failed]:
            return Decision(node, Action.BLOCKED, f"needs {', '.join(broken)}")
        if waiting := [key for key in node.needs if key not in self.done]:
            more = f" and {len(waiting) - 2} more" if len(waiting) > 2 else ""
            return Decision(node, Action.RUN, f"after {', '.join(waiting[:2])}{more}")
        inputs = self._inputs(node)
        directory = self.output / node.stage / node.branch / artifacts.fingerprint(inputs)[:12]
        record = artifacts.load_record(directory)
        action, reason = self._judge(node, inputs, directory, record)
        return Decision(node, action, reason, directory, inputs, record)

    def _judge(
        self, node: Node[Any], inputs: Mapping[str, Any], directory: Path, record: StageRecord | None
    ) -> tuple[Action, str]:
        if node.stage in self._force:
            return Action.RUN, "forced"
        if record is not None:
            for _, damage in artifacts.damaged_outputs(directory, record):
                return Action.RUN, damage
            return Action.SKIP, f"inputs {record.fingerprint[:12]} unchanged, {len(record.outputs)} outputs verified"
        if (directory / artifacts.RECORD).exists():
            return Action.RUN, f"{artifacts.RECORD} is unreadable"
        if (directory / artifacts.STARTED).exists():
            return Action.RESUME, _how_it_ended(directory)
        return Action.RUN, self._why_new(node, inputs)

    def plan(self, nodes: Iterable[Node[Any]]) -> list[Decision]:
        """The decision for every node, without running or writing anything."""
        decisions = []
        for node in nodes:
            decision = self._restricted(self.decide(node))
            decisions.append(decision)
            self._note(decision)
        return decisions

    def _inputs(self, node: Node[Any]) -> dict[str, Any]:
        inputs = {
            "stage": node.stage,
            "version": node.version,
            "sections": dict(node.sections),
            "upstream": {key: self.done[key].record.output_digest for key in node.needs},
        }
        if node.reads_records:
            inputs["records"] = self._upstream(node)
        return inputs

    def _upstream(self, node: Node[Any]) -> dict[str, str]:
        """The fingerprints of what it needs, by their keys."""
        return {key: self.done[key].record.fingerprint for key in node.needs}

    def _why_new(self, node: Node[Any], inputs: Mapping[str, Any]) -> str:
        current = self.output / node.stage / node.branch / _CURRENT
        last = artifacts.load_record(current.parent / current.read_text().strip()) if current.is_file() else None
        if last is None:
            return "first run"
        changes = artifacts.changed_inputs(last.inputs, inputs)
        shown = "; ".join(change.removeprefix("sections.") for change in changes[:3])
        return f"changed: {shown}" + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")

    def _note(self, decision: Decision) -> None:
        if decision.action is Action.BLOCKED:
            self.failed[decision.node.key] = decision.reason
        if decision.action is Action.SKIP and decision.directory is not None and decision.record is not None:
            self.done[decision.node.key] = Finished(decision.directory, decision.record)

    # --- doing ------------------------------------------------------------------------------------------------------

    def execute(self, nodes: Iterable[Node[Any]], services: Services) -> None:
        """Run what is not up to date. A node that fails blocks the nodes that need it and no others."""
        with self.alone():
            self._execute(list(nodes), services)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other chains out of the output directory, also between two calls of `execute` in the block.

        Raises OutputLockedError where another one is running.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            lock = self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputLockedError(
                f"expected to be the only chain in {self.output}, another one is running there; "
                "wait for it or choose another name=..."
            ) from None
        with lock:
            yield

    def _execute(self, nodes: Sequence[Node[Any]], services: Services) -> None:
        position = 0
        while position < len(nodes):
            first: Node[Any] = nodes[position]
            batch: list[Decision] = []
            while position < len(nodes) and nodes[position].runner is first.runner and (first.together or not batch):
                decision = self._restricted(self.decide(nodes[position]))
                if decision.ahead and decision.directory is None:
                    break  # needs a node of this very batch
                self._say(decision.line())
                self._note(decision)
                if decision.action is Action.SKIP:
                    _mark_current(self.done[decision.node.key].directory)
                elif decision.ahead:
                    batch.append(decision)
                position += 1
            self._run(batch, services)

    def _restricted(self, decision: Decision) -> Decision:
        stage = decision.node.stage
        if not decision.ahead or self._only is None or stage in self._only:
            return decision
        return replace(decision, action=Action.BLOCKED, reason=f"not done ({decision.reason}) and not chosen to run")

    def _run(self, batch: Sequence[Decision], services: Services) -> None:
        """Run nodes of one stage together; each has a run of its own in MLflow and ends by itself."""
        if not batch:
            return
        started = time.monotonic()
        if any(decision.node.trains for decision in batch):
            services.ray()
        with ExitStack() as stack:
            ends = [stack.enter_context(ExitStack()) for _ in batch]
            contexts = [
                end.enter_context(self._context(decision, services)) for end, decision in zip(ends, batch, strict=True)
            ]
            results = batch[0].node.runner(contexts)
            for decision, context, result, end in zip(batch, contexts, results, ends, strict=True):
                self._settle(decision, context, result)
                end.close()  # a signal that comes now is none of its business
                seconds = time.monotonic() - started
                if decision.node.key in self.done and isinstance(result, StageResult):
                    said = f": {result.said}" if result.said else ""
                    self._say(f"{decision.node.key:<34} done       after {seconds:.1f} s{said}")

    @contextmanager
    def _context(self, decision: Decision, services: Services) -> Iterator[StageContext[Any]]:
        node, directory, inputs = decision.node, decision.directory, decision.inputs
        assert directory is not None
        assert inputs is not None
        self._prepare_directory(decision, directory)
        needed = {key: self.done[key] for key in node.needs}
        fingerprint = artifacts.fingerprint(inputs)
        with services.stage_run(node.key, fingerprint, dict(node.sections), self._upstream(node)) as run:
            yield StageContext(node.key, node.task, directory, needed, run, services)

    def _settle(self, decision: Decision, context: StageContext[Any], result: StageResult | Exception) -> None:
        node, directory = decision.node, context.directory
        if not isinstance(result, Exception):
            try:
                record = _record(decision, directory, result)
                artifacts.save_record(directory, record)
                _mark_current(directory)
                context.run.tag({"output_digest": record.output_digest})
                self.done[node.key] = Finished(directory, record)
            except OSError as error:  # a full disk fails this node, not the chain
                result = error
        if isinstance(result, Exception):
            context.run.fail()
            self.failed[node.key] = redact(f"{type(result).__name__}: {result}")
            self.errors[node.key] = result
            with suppress(OSError):  # the disk may be full
                artifacts.write_atomic(directory / artifacts.FAILED, self.failed[node.key])
            details = context.services.log_failure(node.key, result)
            self._say(f"{node.key:<34} FAILED     {self.failed[node.key]} (traceback: {details})")

    def _prepare_directory(self, decision: Decision, directory: Path) -> None:
        if decision.node.stage in self._force and directory.exists():
            _set_aside(directory)
        elif decision.record is not None:
            # A stage goes on from what it finds, and has no digests of all of its files: what is damaged is not there.
            for name, _ in artifacts.damaged_outputs(directory, decision.record):
                artifacts.remove(directory / name)
        artifacts.remove_unfinished(directory)
        for name in (artifacts.RECORD, artifacts.FAILED):
            (directory / name).unlink(missing_ok=True)
        artifacts.write_atomic(directory / artifacts.STARTED, artifacts.canonical(decision.inputs) + "\n")


def _how_it_ended(directory: Path) -> str:
    """Of a node that was started and is not done."""
    failed = directory / artifacts.FAILED
    if not failed.is_file():
        return "was interrupted"
    return f"failed the last time: {shorten(failed.read_text(encoding='utf-8'), 100, placeholder=' ...')}"


def _mark_current(directory: Path) -> None:
    """Say beside the results of other configurations which one the chain has now."""
    path, name = directory.parent / _CURRENT, f"{directory.name}\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != name:
        artifacts.write_atomic(path, name)


def _record(decision: Decision, directory: Path, result: StageResult) -> StageRecord:
    assert decision.inputs is not None
    outputs = artifacts.digest_outputs(directory, result.outputs)
    return StageRecord(
        stage=decision.node.stage,
        branch=decision.node.branch,
        fingerprint=artifacts.fingerprint(decision.inputs),
        inputs=dict(decision.inputs),
        payload=result.payload,
        outputs=outputs,
        output_digest=result.digest or artifacts.output_digest(outputs),
    )


def _set_aside(directory: Path) -> None:
    """Rename a result that is made anew by force, so that nothing is lost by mistake."""
    for number in range(1, sys.maxsize):
        aside = directory.with_name(f"{directory.name}.superseded-{number}")
        if not aside.exists():
            shutil.move(directory, aside)
            return
