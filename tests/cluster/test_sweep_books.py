"""The books of a sweep: trials on disk, what is lost by a kill and found again, points that are no configuration."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_records import LR, make_board, make_trial

from pipeline.artifacts import fingerprint, write_atomic
from pipeline.cluster.outcome import Outcome, failed
from pipeline.cluster.sweep import SearchFailed, Trial, load_trials, pareto_front
from pipeline.cluster.sweep.adopt import CHECKPOINTS
from pipeline.cluster.sweep.search import _identify, _known_trials, _result
from pipeline.cluster.sweep.trials import Leg, Point, save_trial
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, overlay
from pipeline.config.search import SearchConfig

BASE = ChainConfig()


def test_an_epoch_repeated_after_a_crash_replaces_itself():
    trial = make_trial(0, robust=(0.1, 0.2)).with_point(Point(epoch=2, robust=0.3, clean=0.5))
    assert [(point.epoch, point.robust) for point in trial.history] == [(1, 0.1), (2, 0.3)]


def test_the_board_keeps_every_trial_on_disk_and_runs_interrupted_ones_first(tmp_path: Path):
    board = make_board(tmp_path)
    first, second = board.next(), board.next()
    for trial in (first, second):
        board.started(trial.number, trial.values)
        board.reported(trial.number, Point(epoch=1, robust=0.2, clean=0.4))
    board.ended(first.number)
    known = load_trials(tmp_path)
    assert [trial.state for trial in known] == ["stopped", "running"]

    again = make_board(tmp_path, known)
    assert again.num_left == 2
    assert again.next().number == second.number
    assert again.next().number == 2
    assert again.next() is None


def test_the_board_records_why_a_trial_failed_and_goes_on(tmp_path: Path):
    heard: list[str] = []
    board = make_board(tmp_path, heard=heard)
    trials = [board.next() for _ in range(3)]
    for trial in trials:
        board.started(trial.number, trial.values)
    failed("run", ArithmeticError("diverged")).save(tmp_path / trials[0].job_directory)
    board.ended(trials[0].number)
    board.ended(trials[1].number, error="the process died")
    board.ended(trials[2].number)
    records = load_trials(tmp_path)
    assert [trial.state for trial in records] == ["failed"] * 3
    assert [trial.error for trial in records] == [
        "ArithmeticError: diverged",
        "the process died",
        "ended without a single epoch",
    ]
    assert [trial.retry for trial in records] == [False, True, True]
    assert heard[-1] == "failed"


@pytest.mark.parametrize(
    ("error", "retry"), [("TimeoutError: no room for 8 workers", True), ("OutOfMemoryError: CUDA out of memory", False)]
)
def test_workers_that_are_lost_are_a_fault_from_outside_and_what_they_raise_is_not(error, retry, tmp_path: Path):
    board = make_board(tmp_path)
    trial = board.next()
    Outcome(run="run", state="failed", error=error, outside=retry).save(tmp_path / trial.job_directory)
    board.ended(trial.number)
    (record,) = load_trials(tmp_path)
    assert (record.state, record.error, record.retry) == ("failed", error, retry)


def test_what_failed_from_outside_goes_on_in_the_next_run_and_what_failed_by_itself_does_not(tmp_path: Path):
    """As on a full disk: every trial uses up its attempts within seconds."""
    identify = _identify(BASE)
    board = make_board(tmp_path, identify=identify)
    trials = [board.next() for _ in range(3)]
    for trial in trials:
        board.started(trial.number, trial.values)
        board.reported(trial.number, Point(epoch=1, robust=0.2, clean=0.4))
    failed("run", ArithmeticError("diverged")).save(tmp_path / trials[0].job_directory)
    for trial in trials[:2]:
        board.ended(trial.number, error="OSError: [Errno 28] No space left on device")
    known = _known_trials(tmp_path, BASE)
    assert [(trial.state, trial.error) for trial in known] == [
        ("failed", "ArithmeticError: diverged"),
        ("running", ""),
        ("running", ""),
    ]
    again = make_board(tmp_path, known, identify=identify)
    assert [again.next().number for _ in range(again.num_left)] == [1, 2]
    Outcome(run="run", state="done").save(tmp_path / trials[1].job_directory)
    again.ended(1)
    assert [trial.state for trial in _known_trials(tmp_path, BASE)] == ["failed", "done", "running"]


def test_a_search_that_lost_most_of_its_trials_to_a_fault_from_outside_is_not_done(tmp_path: Path, caplog):
    full = {"state": "failed", "error": "OSError: no space", "retry": True}
    trials = [make_trial(n) for n in range(2)] + [make_trial(n).model_copy(update=full) for n in (2, 3, 4)]
    with pytest.raises(
        SearchFailed, match=r"3 of 5 trials failed .* outside: OSError: no space; mend it, and the same"
    ):
        _result(BASE, trials, tmp_path)
    assert _result(BASE, trials[:4], tmp_path).best == trials[0]
    assert "2 of 4 trials failed by a fault from outside: OSError: no space; the others decide" in caplog.text


def test_trials_of_other_settings_are_not_taken_for_known_ones(tmp_path: Path):
    base = overlay(BASE, {"search.enabled": True})
    trial = Trial(number=0, identity=_identify(base)({LR: 0.2}), legs=(Leg(epoch=0, values={LR: 0.2}),))
    save_trial(tmp_path, trial)
    assert _known_trials(tmp_path, base) == [trial]
    assert _known_trials(tmp_path, overlay(base, {"search.num_trials": 99})) == [trial]
    assert _known_trials(tmp_path, overlay(base, {"training.batch_size": 32})) == []


def test_trials_are_judged_by_the_epoch_that_is_best_in_the_first_objective(tmp_path: Path):
    """Robust accuracy is 0 in all epochs of standard training: its first one would stand for every trial."""
    points = tuple(Point(epoch=n, robust=0.0, clean=clean) for n, clean in enumerate((0.2, 0.9, 0.6), 1))
    base = overlay(BASE, {"search.enabled": True, "search.objectives": ["clean"]})
    trial = Trial(number=0, identity=_identify(base)({LR: 0.2}), legs=(Leg(epoch=0, values={LR: 0.2}),), history=points)
    save_trial(tmp_path, trial)  # as before it was known what counts
    (known,) = _known_trials(tmp_path, base)
    assert (known.best.epoch, known.score(["clean"])) == (2, [0.9])
    first = known.model_copy(update={"state": "done"})
    weaker = first.model_copy(update={"number": 1, "history": (points[0], points[2])})
    assert pareto_front([weaker, first], ["clean"]) == [first]

    board = make_board(tmp_path / "new", objective="clean")
    assert board.next().objective == "clean"


@pytest.mark.parametrize(("objective", "epoch"), [("robust", 2), ("clean", 4)])
def test_of_epochs_that_are_equal_in_the_objective_the_better_one_counts(objective, epoch):
    points = [(0.1, 0.9), (0.3, 0.5), (0.3, 0.4), (0.2, 0.9)]
    history = tuple(Point(epoch=n, robust=robust, clean=clean) for n, (robust, clean) in enumerate(points, 1))
    trial = make_trial(0).model_copy(update={"objective": objective, "history": history})
    assert trial.best.epoch == epoch


def history_of(*robust: float) -> dict:
    return {"history": [{"epoch": n, "val_robust": r, "val_clean": 0.5} for n, r in enumerate(robust, 1)]}


def test_an_epoch_whose_report_was_lost_by_a_kill_is_in_the_books_in_the_end(tmp_path: Path):
    board = make_board(tmp_path)
    trial = board.next()
    board.started(trial.number, trial.values)
    for epoch in (1, 3):
        board.reported(trial.number, Point(epoch=epoch, robust=0.1 * epoch, clean=0.4))
    Outcome(run="run", state="done", result=history_of(0.1, 0.8, 0.3)).save(tmp_path / trial.job_directory)
    board.ended(trial.number)
    (record,) = load_trials(tmp_path)
    assert [(point.epoch, point.clean) for point in record.history] == [(1, 0.4), (2, 0.5), (3, 0.4)]
    assert record.best.epoch == 2


def test_a_finished_trial_whose_only_report_was_lost_is_ranked(tmp_path: Path):
    board = make_board(tmp_path)
    trial = board.next()
    Outcome(run="run", state="done", result=history_of(0.7)).save(tmp_path / trial.job_directory)
    board.ended(trial.number)
    (record,) = load_trials(tmp_path)
    assert record.ranked
    assert record.score(["robust"]) == [0.7]


def test_the_epochs_that_a_copy_inherited_are_not_taken_for_its_own(tmp_path: Path):
    board = make_board(tmp_path)
    trial = board.next()
    job = tmp_path / trial.job_directory
    write_atomic(job / CHECKPOINTS / "taken.json", '{"source": "another", "epoch": 2}')
    board.reported(trial.number, Point(epoch=1, robust=0.1, clean=0.5))
    Outcome(run="run", state="done", result=history_of(0.9, 0.9, 0.2)).save(job)
    board.ended(trial.number)
    (record,) = load_trials(tmp_path)
    assert [(point.epoch, point.robust) for point in record.history] == [(1, 0.1), (3, 0.2)]


def test_a_point_that_is_no_configuration_is_a_failed_trial_and_the_next_one_is_asked_for(tmp_path: Path):
    def identify(values):
        if values[LR] == 0.1:
            raise ConfigError("not beside each other")
        return "0" * 8

    told: list[int] = []
    board = make_board(tmp_path, identify=identify, num_trials=2)
    board._sampler.tell = lambda trial: told.append(trial.number)
    assert board.next().values == {LR: 0.2}
    assert board.next() is None  # it was one of the two
    refused, accepted = load_trials(tmp_path)
    assert (refused.state, refused.error, accepted.state) == ("failed", "not beside each other", "running")
    assert told == [refused.number]


def test_a_refused_point_is_known_when_the_sweep_goes_on(tmp_path: Path):
    values = {LR: -1.0}
    refused = Trial(number=0, identity=fingerprint(values), legs=(Leg(epoch=0, values=values),), state="failed")
    foreign = refused.model_copy(update={"number": 1, "identity": "f" * 64})  # of a space that allows it
    for trial in (refused, foreign):
        save_trial(tmp_path, trial)
    assert _known_trials(tmp_path, BASE) == [refused]


def asha_decisions(known, reported, resumed=()):
    """What becomes of a new trial's reports, after those of `resumed`: numbers of known trials and their reports."""
    from pipeline.cluster.sweep.asha import asha

    scheduler = asha(SearchConfig(), epochs=9, known=known)
    assert scheduler.set_search_properties("robust", "max")
    decisions = []
    for number, reports in (*resumed, (99, reported)):
        trial = SimpleNamespace(trial_id=f"tune-{number}", config={"trial": {"number": number}})
        scheduler.on_trial_add(None, trial)
        decisions = [scheduler.on_trial_result(None, trial, {"epoch": e, "robust": r}) for e, r in reports]
    return decisions


def test_asha_knows_the_trials_of_the_run_before_and_stops_none_at_its_last_epoch():
    pytest.importorskip("ray")
    known = [make_trial(n, robust=(0.5,) * 9) for n in range(3)]
    assert asha_decisions((), [(1, 0.1)]) == ["CONTINUE"]  # the first at its rung
    assert asha_decisions(known, [(1, 0.1)]) == ["STOP"]
    assert asha_decisions(known, [(1, 0.9), (2, 0.1), (3, 0.1)]) == ["CONTINUE", "CONTINUE", "STOP"]
    assert asha_decisions(known, [(9, 0.1)]) == ["CONTINUE"]  # a rung, and the end


def test_an_interrupted_trial_counts_once_in_asha_though_it_goes_on_under_another_name():
    pytest.importorskip("ray")
    known = [
        make_trial(0, robust=(0.1,), state="stopped"),
        make_trial(1, robust=(0.2,), state="stopped"),
        make_trial(2, robust=(0.9,), state="running"),
    ]
    # At the first rung 0.1, 0.2 and 0.9: a third of them is at 0.43 or above. Counted twice, number 2 makes it 0.9.
    assert asha_decisions(known, [(1, 0.6)], resumed=[(2, [(2, 0.95)])]) == ["CONTINUE"]
    assert asha_decisions(known, [(1, 0.4)], resumed=[(2, [(2, 0.95)])]) == ["STOP"]
    # At the second rung, 3, it is measured by itself, with the others of that rung.
    assert asha_decisions(known, [(1, 0.9), (3, 0.7)], resumed=[(2, [(2, 0.7), (3, 0.8)])]) == ["CONTINUE", "STOP"]


def test_a_damaged_trial_record_is_passed_over_with_a_warning(tmp_path: Path, caplog):
    save_trial(tmp_path, make_trial(0))
    save_trial(tmp_path, make_trial(1))
    (tmp_path / make_trial(1).directory / "trial.json").write_text("{")
    assert [trial.number for trial in load_trials(tmp_path)] == [0]
    assert "cannot be read" in caplog.text
