"""How strong the training attack is, and what is made of it.

Radii and steps are relative to the threat that the networks are evaluated under: the same space fits photographs and
digits.
"""

from tune_spaces.distributions import Choice, Integer, Relative, Space, Uniform, When

_ATTACKED = ("pgd_at", "trades")
_THREAT = "evaluation.threat.eps"

SPACE: Space = {
    "training.method.kind": Choice("pgd_at", "trades"),
    "training.method.beta": When("training.method.kind", ("trades",), Uniform(1.0, 12.0, log=True)),
    "training.threat.eps": Relative(0.25, 2.0, to=_THREAT),
    "training.eps_warmup_epochs": Choice(0.0, 1.0, 2.0),
    "training.method.attack.steps": When("training.method.kind", _ATTACKED, Integer(1, 10, log=True)),
    "training.method.attack.step_size": When(
        "training.method.kind", _ATTACKED, Relative(1 / 16, 1.0, to=_THREAT, log=True)
    ),
    "training.method.attack.start": When("training.method.kind", _ATTACKED, Choice("uniform", "normal")),
}
