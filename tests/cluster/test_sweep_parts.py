"""The parts of a sweep that need no Ray: the space against the configuration, samplers, results, the table."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from sweep_records import EPS, KIND, LR, make_trial

from pipeline.cluster.sweep import pareto_front
from pipeline.cluster.sweep.plots import importance
from pipeline.cluster.sweep.results import write_results
from pipeline.cluster.sweep.samplers import make_sampler
from pipeline.cluster.sweep.search import checked_space
from pipeline.cluster.sweep.space import check_space, judged, overrides, trial_config
from pipeline.cluster.sweep.table import Table, short_names
from pipeline.cluster.sweep.trials import Leg
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, load_config, overlay, validate
from pipeline.config.search import SearchConfig
from pipeline.stages.graph import head, tail
from tune_spaces import SPACES, Choice, Integer, Uniform, When

SPACE = {LR: Uniform(0.01, 1.0, log=True), "training.eps_warmup_epochs": Choice(0.0, 1.0)}
BASE = ChainConfig()


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
        ({"training.epochs": Integer(1, 9)}, "set search.epochs"),
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


@pytest.mark.parametrize("other", ["trades", "mart"])
def test_a_conditional_parameter_is_tried_under_every_value_that_it_depends_on(other):
    smoothing, steps, kinds = "training.label_smoothing", "training.method.attack.steps", ("pgd_at", other)
    space = {KIND: Choice(*kinds), smoothing: When(KIND, kinds, Choice(0.0, 0.1))}
    deep = {
        KIND: Choice(*kinds),
        steps: When(KIND, kinds, Integer(1, 2)),
        smoothing: When(steps, (1, 2), Choice(0.0, 0.1)),
    }
    for tried in (space, deep):
        if other == "trades":
            check_space(tried, BASE)
        else:
            with pytest.raises(ConfigError, match=r"label_smoothing=0\.1: .*mart"):
                check_space(tried, BASE)


def test_another_kind_brings_its_own_defaults_and_the_same_kind_keeps_the_settings():
    base = overlay(BASE, {"training.method.attack.steps": 3})
    method = overlay(base, overrides(base, {KIND: "trades", "training.method.beta": 2.0})).training.method
    assert (method.kind, method.beta, method.attack.loss) == ("trades", 2.0, "kl")
    assert overlay(base, overrides(base, {KIND: "pgd_at"})).training.method.attack.steps == 3
    attack = trial_config(base, {KIND: "trades", "training.method.attack.steps": 5}).training.method.attack
    assert (attack.loss, attack.start, attack.steps) == ("kl", "normal", 5)
    behind = trial_config(base, {"training.method.attack.steps": 5, KIND: "trades"}).training.method.attack
    assert behind == attack, "wherever the kind stands in the space"


def test_every_trial_is_judged_by_one_threat_whatever_it_trains_against():
    weak, strong = trial_config(BASE, {EPS: 0.001}), trial_config(BASE, {EPS: 0.5})
    assert (weak.training.threat.eps, strong.training.threat.eps) == (0.001, 0.5)
    assert weak.training.selection == strong.training.selection
    assert weak.training.selection.threat.eps == BASE.evaluation.threat.eps
    assert overlay(BASE, judged(BASE, {EPS: 0.5})).training.selection.threat.eps == BASE.evaluation.threat.eps


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_sampler_takes_any_seed_of_a_chain(algorithm):
    assert make_sampler(SPACE, SearchConfig(algorithm=algorithm), seed=2**32).ask() is not None


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


def test_a_long_random_sweep_goes_on_behind_the_points_of_the_run_before():
    space, config = {"x": Uniform(0.0, 1.0)}, SearchConfig(algorithm="random")
    sampler = make_sampler(space, config, seed=0)
    known = [make_trial(n, **sampler.ask()) for n in range(300)]
    assert make_sampler(space, config, seed=0, known=known).ask() == sampler.ask()


def test_a_trial_that_changed_on_its_way_is_known_by_the_point_it_began_with():
    changed = make_trial(0, x=1).with_values({"x": 2})
    sampler = make_sampler({"x": Integer(1, 2)}, SearchConfig(algorithm="random"), seed=0, known=[changed])
    assert sampler.ask() == {"x": 2}


@pytest.mark.parametrize(("num_trials", "warned"), [(5, True), (6, False)])
def test_a_grid_that_is_longer_than_the_sweep_is_warned_of(num_trials, warned, caplog):
    space = {"x": Uniform(0.0, 1.0), "y": Choice("a", "b")}
    make_sampler(space, SearchConfig(algorithm="grid", num_trials=num_trials), seed=0)
    assert (f"more than search.num_trials={num_trials} points" in caplog.text) == warned


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


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"algorithm": "annealing"}, "random"),
        ({"scheduler": "pbt"}, "set search.algorithm=random"),
        ({"scheduler": "pbt", "algorithm": "random", "num_workers": 2}, "one-worker trials"),
        ({"objectives": ["robust", "clean"]}, "set search.scheduler=none"),
        ({"objectives": []}, "objectives"),
        ({"enabled": True, "grace_epochs": 5, "epochs": 2}, r"above search\.epochs=2.*lower the first"),
        ({"enabled": True, "grace_epochs": 500}, r"above training\.epochs=\d+.*lower the first"),
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
    (tmp_path / pictures[0]).unlink()
    assert write_results(tmp_path, base, trials, front, judged(base, front[0].values)) == files
    assert (tmp_path / pictures[0]).is_file()


def test_the_best_of_a_population_is_written_with_the_way_that_led_to_it(tmp_path: Path):
    best = make_trial(0, robust=(0.1, 0.2, 0.3), **{EPS: 0.03})
    best = best.model_copy(update={"legs": (*best.legs, Leg(epoch=2, values={EPS: 0.04}))})
    base = overlay(BASE, {"search.enabled": True, "search.space": "attack"})
    write_results(tmp_path, base, [best], [best], judged(base, best.values))
    assert "#   after epoch 2: training.threat.eps=0.04\n" in (tmp_path / "best.yaml").read_text()
    assert load_config(str(tmp_path / "best.yaml")).training.threat.eps == 0.04


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
        table.update(make_trial(1, robust=(0.25, 0.2), state="running", **{LR: 0.1}))
    line = " ".join(plain.file.getvalue().split())
    assert line == "trial 2/2 running epoch 2 clean 50.0 robust 20.0 best 25.0 lr=0.1"

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Table(3, [LR, EPS], known=[make_trial(0)], console=terminal) as table:
        table.update(make_trial(1, robust=(0.25,), state="running", **{LR: 0.1}))
    shown = terminal.file.getvalue()
    assert "search: 2 of 3 trials" in shown
    assert "done" in shown, "trials of the run before are in the table"


def test_short_names_are_as_short_as_they_can_be_told_apart():
    names = short_names(["training.optimizer.lr", "model.activation.options.beta", "training.method.beta"])
    assert list(names.values()) == ["lr", "options.beta", "method.beta"]
