"""Records of trials, and boards over them, for the tests of a sweep's books."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cluster.sweep import Trial
from pipeline.cluster.sweep.board import Board
from pipeline.cluster.sweep.samplers import ListSampler
from pipeline.cluster.sweep.trials import Leg, Point
from pipeline.config.search import Objective

LR, EPS, KIND = "training.optimizer.lr", "training.threat.eps", "training.method.kind"


def make_trial(number: int, *, robust=(0.1,), clean: float = 0.5, state="done", **values) -> Trial:
    history = tuple(Point(epoch=i + 1, robust=r, clean=clean) for i, r in enumerate(robust))
    legs = (Leg(epoch=0, values=values or {LR: 0.1 + number}),)
    return Trial(number=number, identity=f"{number:08d}", legs=legs, state=state, history=history)


def make_board(
    root: Path,
    known: Sequence[Trial] = (),
    num_trials: int = 3,
    heard: list[str] | None = None,
    objective: Objective = "robust",
    identify: Callable[[dict], str] = lambda values: f"{int(values[LR] * 10):08d}",
) -> Board:
    return Board(
        root,
        "run",
        sampler=ListSampler([{LR: 0.1}, {LR: 0.2}, {LR: 0.3}], set()),
        identify=identify,
        num_trials=num_trials,
        objective=objective,
        known=known,
        on_trial=lambda trial: heard.append(trial.state) if heard is not None else None,
    )
