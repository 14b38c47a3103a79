"""The parts of a sweep that need no Ray: samplers, records, the board, the space against the configuration, results."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cluster.outcome import failed
from pipeline.cluster.sweep import Trial, load_trials, pareto_front
from pipeline.cluster.sweep.board import Board
from pipeline.cluster.sweep.plots import importance
from pipeline.cluster.sweep.results import write_results
from pipeline.cluster.sweep.samplers import ListSampler, make_sampler
from pipeline.cluster.sweep.search import _known_trials, checked_space
from pipeline.cluster.sweep.space import check_space, judged, overrides, trial_config
from pipeline.cluster.sweep.table import Table, short_names
from pipeline.cluster.sweep.trials import Leg, Point, save_trial
from pipeline.cluster.sweep.tuning import _clipped, mutable_keys
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, load_config, overlay, validate
from pipeline.config.search import SearchConfig
from pipeline.stages.graph import head, tail
from tune_spaces import SPACES, Choice, Integer, Uniform, When

LR, EPS, KIND = "training.optimizer.lr", "training.threat.eps", "training.method.kind"
SPACE = {LR: Uniform(0.01, 1.0, log=True), "training.eps_warmup_epochs": Choice(0.0, 1.0)}
BASE = ChainConfig()


def make_trial(number: int, *, robust=(0.1,), clean: float = 0.5, state="done", **values) -> Trial:
    history = tuple(Point(epoch=i + 1, robust=r, clean=clean) for i, r in enumerate(robust))
    legs = (Leg(epoch=0, values=values or {LR: 0.1 + number}),)
    return Trial(number=number, identity=f"{number:08d}", legs=legs, state=state, history=history)


@pytest.mark.parametrize("name", SPACES)
def test_every_space_fits_the_configuration_at_both_ends_of_every_parameter(name):
    checked_space(overlay(BASE, {"search.space": name}))


def test_the_attack_space_follows_the_preset_from_photographs_to_digits():
    ranges = [checked_space(load_config(name, ["search.space=attack"]))[EPS] for name in ("cifar10_cpu", "demo")]
    assert [(r.low, r.high) for r in ranges] == [(pytest.approx(e / 4), pytest.approx(2 * e)) for e in (8 / 255, 0.15)]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"training.optimizer.lrr": Uniform(0.1, 1.0)}, "did you mean 'lr'"),
        ({LR: Uniform(-1.0, 1.0)}, "greater than 0"),
        ({"model.activation.options.kernel_size": Choice(3, 4)}, "kernel_size=4"),
        ({"training.selection.threat": Choice(1, 2)}, "cannot be searched"),
        ({"evaluation.threat.eps": Uniform(0.1, 0.2)}, "cannot be searched"),
        ({"data.val_fraction": Uniform(0.1, 0.2)}, "cannot be searched"),
        ({KIND: Choice("pgd_at", "mart"), "training.method.step_factor": Uniform(1.0, 2.0)}, "step_factor"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_and_the_parameter_named(space, message):
    with pytest.raises(ConfigError, match=message):
        check_space(space, BASE)


def test_a_conditional_parameter_is_tried_where_its_condition_holds():
    beta = "training.method.beta"
    kinds = Choice("pgd_at", "trades")
    check_space({KIND: kinds, beta: When(KIND, ("trades",), Uniform(1.0, 9.0))}, BASE)
    with pytest.raises(ConfigError, match=r"beta: input should be greater than or equal to 0, got -1"):
        check_space(
            {KIND: Choice("pgd_at", "trades"), "training.method.beta": When(KIND, ("trades",), Uniform(-1.0, 9.0))},
            BASE,
        )


def test_another_kind_brings_its_own_defaults_and_the_same_kind_keeps_the_settings():
    base = overlay(BASE, {"training.method.attack.steps": 3})
    method = overlay(base, overrides(base, {KIND: "trades", "training.method.beta": 2.0})).training.method
    assert (method.kind, method.beta, method.attack.loss) == ("trades", 2.0, "kl")
    assert overlay(base, overrides(base, {KIND: "pgd_at"})).training.method.attack.steps == 3


def test_every_trial_is_judged_by_one_threat_whatever_it_trains_against():
    weak, strong = trial_config(BASE, {EPS: 0.001}), trial_config(BASE, {EPS: 0.5})
    assert (weak.training.threat.eps, strong.training.threat.eps) == (0.001, 0.5)
    assert weak.training.selection == strong.training.selection
    assert weak.training.selection.threat.eps == BASE.evaluation.threat.eps
    assert overlay(BASE, judged(BASE, {EPS: 0.5})).training.selection.threat.eps == BASE.evaluation.threat.eps


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna"])
def test_a_sampler_repeats_itself_by_its_seed_and_never_a_point(algorithm):
    def points():
        sampler = make_sampler(SPACE, SearchConfig(algorithm=algorithm, grid_points=5), seed=3)
        return [sampler.ask() for _ in range(8)]

    first = points()
    assert first == points()
    assert len({str(point) for point in first}) == 8


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna"])
def test_a_sampler_that_continues_a_sweep_proposes_no_known_point(algorithm):
    config, space = SearchConfig(algorithm=algorithm), {"training.batch_size": Integer(1, 6)}
    sampler = make_sampler(space, config, seed=0)
    known = [make_trial(n, **sampler.ask()) for n in range(3)]
    continued = make_sampler(space, SearchConfig(algorithm=algorithm, grid_points=6), seed=0, known=known)
    rest = []
    while (point := continued.ask()) is not None:
        rest.append(point["training.batch_size"])
    seen = {trial.values["training.batch_size"] for trial in known}
    assert not seen & set(rest)
    assert seen | set(rest) == set(range(1, 7))


def test_optuna_finds_the_optimum_more_often_than_chance_and_bears_failed_trials():
    sampler = make_sampler({"x": Uniform(0.0, 1.0)}, SearchConfig(), seed=0)
    late = []
    for n in range(40):
        x = sampler.ask()["x"]
        if n % 10 == 9:
            sampler.tell(make_trial(n, state="failed", robust=(), x=x))
            continue
        sampler.tell(make_trial(n, robust=(1 - abs(x - 0.3),), x=x))
        if n >= 20:
            late.append(x)
    assert sum(abs(x - 0.3) < 0.15 for x in late) / len(late) > 0.6  # uniform draws: 0.3


def test_optuna_takes_two_objectives_and_conditional_parameters():
    config = SearchConfig(objectives=("robust", "clean"), scheduler="none")
    space = {KIND: Choice("pgd_at", "trades"), "beta": When(KIND, ("trades",), Uniform(1.0, 9.0))}
    sampler = make_sampler(space, config, seed=0)
    for n in range(15):
        values = sampler.ask()
        assert ("beta" in values) == (values[KIND] == "trades")
        sampler.tell(make_trial(n, robust=(0.1 * (n % 3),), **values))


def test_the_pareto_front_is_what_no_other_trial_beats():
    trials = [
        make_trial(0, robust=(0.3,), clean=0.9),
        make_trial(1, robust=(0.4,), clean=0.8),
        make_trial(2, robust=(0.3,), clean=0.8),  # beaten by both
        make_trial(3, robust=(0.9,), clean=0.9, state="failed"),
    ]
    assert [trial.number for trial in pareto_front(trials, ["robust", "clean"])] == [1, 0]
    assert [trial.number for trial in pareto_front(trials, ["robust"])] == [1]


def test_an_epoch_repeated_after_a_crash_replaces_itself():
    trial = make_trial(0, robust=(0.1, 0.2)).with_point(Point(epoch=2, robust=0.3, clean=0.5))
    assert [(point.epoch, point.robust) for point in trial.history] == [(1, 0.1), (2, 0.3)]


def make_board(root: Path, known=(), num_trials: int = 3, heard=None) -> Board:
    return Board(
        root,
        "run",
        sampler=ListSampler([{LR: 0.1}, {LR: 0.2}, {LR: 0.3}], set()),
        identify=lambda values: f"{int(values[LR] * 10):08d}",
        num_trials=num_trials,
        known=known,
        on_trial=lambda trial: heard.append(trial.state) if heard is not None else None,
    )


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
    assert heard[-1] == "failed"


def test_trials_of_other_settings_are_not_taken_for_known_ones(tmp_path: Path):
    from pipeline.cluster.sweep.search import _identify

    base = overlay(BASE, {"search.enabled": True})
    trial = Trial(number=0, identity=_identify(base)({LR: 0.2}), legs=(Leg(epoch=0, values={LR: 0.2}),))
    save_trial(tmp_path, trial)
    assert _known_trials(tmp_path, base) == [trial]
    assert _known_trials(tmp_path, overlay(base, {"search.num_trials": 99})) == [trial]
    assert _known_trials(tmp_path, overlay(base, {"training.batch_size": 32})) == []


def asha_decisions(known, reported):
    from types import SimpleNamespace

    from pipeline.cluster.sweep.asha import asha

    scheduler = asha(SearchConfig(), epochs=9, known=known)
    assert scheduler.set_search_properties("robust", "max")
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, {"epoch": e, "robust": r}) for e, r in reported]


def test_asha_knows_the_trials_of_the_run_before_and_stops_none_at_its_last_epoch():
    pytest.importorskip("ray")
    known = [make_trial(n, robust=(0.5,) * 9) for n in range(3)]
    assert asha_decisions((), [(1, 0.1)]) == ["CONTINUE"]  # the first at its rung
    assert asha_decisions(known, [(1, 0.1)]) == ["STOP"]
    assert asha_decisions(known, [(1, 0.9), (2, 0.1), (3, 0.1)]) == ["CONTINUE", "CONTINUE", "STOP"]
    assert asha_decisions(known, [(9, 0.1)]) == ["CONTINUE"]  # a rung, and the end


def test_a_damaged_trial_record_is_passed_over_with_a_warning(tmp_path: Path, caplog):
    save_trial(tmp_path, make_trial(0))
    save_trial(tmp_path, make_trial(1))
    (tmp_path / make_trial(1).directory / "trial.json").write_text("{")
    assert [trial.number for trial in load_trials(tmp_path)] == [0]
    assert "cannot be read" in caplog.text


def test_population_based_training_changes_settings_of_the_training_only_and_stays_in_range():
    space = {"model.activation.name": Choice("relu", "silu"), KIND: Choice("pgd_at", "mart"), **SPACE}
    mutable = mutable_keys(space)
    assert set(mutable) == set(SPACE)
    assert _clipped({LR: 7.0, "model.activation.name": "relu"}, mutable) == {LR: 1.0, "model.activation.name": "relu"}
    with pytest.raises(ConfigError, match="pbt needs an unconditional training"):
        mutable_keys({KIND: Choice("pgd_at", "mart")})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"algorithm": "annealing"}, "random"),
        ({"scheduler": "pbt"}, "set search.algorithm=random"),
        ({"scheduler": "pbt", "algorithm": "random", "num_workers": 2}, "one-worker trials"),
        ({"objectives": ["robust", "clean"]}, "set search.scheduler=none"),
        ({"objectives": []}, "objectives"),
        ({"grace_epochs": 5, "epochs": 2}, "lower the first"),
        ({"num_trials": 0}, "greater than 0"),
    ],
)
def test_a_bad_search_section_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        validate({"search": section})


def test_an_unknown_space_is_one_readable_line():
    base = overlay(BASE, {"search.space": "atack"})
    with pytest.raises(ConfigError, match=r"search\.space: expected a search space"):
        checked_space(base)


def test_results_hold_every_trial_and_the_best_runs_as_a_preset(tmp_path: Path):
    lrs = [0.01 * 2**n for n in range(10)]
    trials = [make_trial(n, robust=(0.05 * n, 0.06 * n), **{LR: lr, EPS: 0.03}) for n, lr in enumerate(lrs)]
    trials.append(make_trial(10, robust=(), state="failed", **{LR: 0.9, EPS: 0.03}))
    base = overlay(BASE, {"search.enabled": True, "search.space": "optim"})
    front = pareto_front(trials, ["robust"])
    files = write_results(tmp_path, base, trials, front, judged(base, front[0].values))

    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert [row["state"] for row in rows] == ["done"] * 10 + ["failed"]
    assert max(rows[:10], key=lambda row: float(row["robust"]))["front"] == "1"
    best = load_config(str(tmp_path / "best.yaml"))
    assert best.training.optimizer.lr == lrs[9]
    assert not best.search.enabled
    assert {"pretrain:source", "report:page"} <= {node.key for node in [*head(best), *tail(best)]}
    pictures = [name for name in files if name.endswith(".png")]
    assert len(pictures) == 4
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_importance_goes_to_the_parameter_that_matters_and_needs_enough_trials():
    import random

    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(30)]
    trials = [make_trial(n, robust=(a,), a=a, b=b) for n, (a, b) in enumerate(points)]
    shares = importance(trials, ["a", "b"])
    assert shares["a"] > 0.8
    assert sum(shares.values()) == pytest.approx(1.0)
    assert importance(trials[:5], ["a", "b"]) == {}


def test_off_a_terminal_every_epoch_is_a_line_and_on_one_it_is_a_table():
    plain = Console(file=io.StringIO(), force_terminal=False)
    with Table(2, [LR, EPS], console=plain) as table:
        table.update(make_trial(1, robust=(0.25,), state="running", **{LR: 0.1}))
    assert " ".join(plain.file.getvalue().split()) == "trial 2/2 running epoch 1 clean 50.0 robust 25.0 lr=0.1"

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Table(2, [LR, EPS], console=terminal) as table:
        table.update(make_trial(1, robust=(0.25,), state="running", **{LR: 0.1}))
    assert "search: 1 of 2 trials" in terminal.file.getvalue()


def test_short_names_are_as_short_as_they_can_be_told_apart():
    names = short_names(["training.optimizer.lr", "model.activation.options.beta", "training.method.beta"])
    assert list(names.values()) == ["lr", "options.beta", "method.beta"]
