"""How strong the training attack is, and what is made of it."""

from tune_spaces.distributions import Choice, Integer, Space, Uniform, When

_ATTACKED = ("pgd_at", "trades")

SPACE: Space = {
    "training.method.kind": Choice("pgd_at", "trades"),
    "training.method.beta": When("training.method.kind", ("trades",), Uniform(1.0, 12.0, log=True)),
    "training.threat.eps": Uniform(2 / 255, 16 / 255),
    "training.eps_warmup_epochs": Choice(0.0, 1.0, 2.0),
    "training.method.attack.steps": When("training.method.kind", _ATTACKED, Integer(1, 10, log=True)),
    "training.method.attack.step_size": When("training.method.kind", _ATTACKED, Uniform(0.5 / 255, 8 / 255, log=True)),
    "training.method.attack.start": When("training.method.kind", _ATTACKED, Choice("uniform", "normal")),
}
