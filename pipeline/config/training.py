"""How a network is trained: threat, method, optimizer, schedule, averaging, precision, selection."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.base import ChosenThreat, PixelStep, Section, ThreatModel

AttackLoss = Literal["ce", "margin", "dlr", "kl"]


class AttackConfig(Section):
    """Projected gradient ascent within the threat's ball (Madry et al., arXiv 1706.06083)."""

    steps: int = Field(default=10, ge=1, le=1000)
    """Number of gradient steps."""
    step_size: PixelStep | None = None
    """Length of a step in pixel units; unset: 2.5 * eps / steps."""
    step_rule: Literal["constant", "linear", "cosine"] = "constant"
    """How the step length falls over the steps of one attack."""
    loss: AttackLoss = "ce"
    """Objective: cross-entropy, margin (Carlini-Wagner), difference of logits ratio, KL from the clean prediction."""
    start: Literal["none", "uniform", "normal"] = "uniform"
    """Where an attack starts: at the image, uniformly in the ball, or 0.001 N(0, 1) away (TRADES)."""
    restarts: int = Field(default=1, ge=1, le=100)
    """Number of independent starts; the worst perturbation of every example is kept."""
    bn: Literal["eval", "train"] = "eval"
    """Batch normalisation during the attack: running statistics, or those of the batch; the running ones never move."""

    @model_validator(mode="after")
    def _step_moves(self) -> "AttackConfig":
        if self.step_size == 0:
            raise ValueError("attack.step_size=0 never moves; give a positive size or leave it unset")
        if self.restarts > 1 and self.start == "none":
            raise ValueError(
                f'attack.restarts={self.restarts} repeats one start while start="none"; use start="uniform"'
            )
        if self.loss == "kl" and self.start == "none":
            raise ValueError('attack.loss="kl" has no gradient at the image itself; use start="normal" or "uniform"')
        return self


def _over(default: AttackConfig) -> BeforeValidator:
    """What is written of an attack is laid over the default of its place, not over that of attacks in general."""
    return BeforeValidator(lambda given: {**default.model_dump(), **given} if isinstance(given, Mapping) else given)


_TRADES = AttackConfig(loss="kl", start="normal")
_MART = AttackConfig(start="normal")
_FALLBACK = AttackConfig(steps=2)


class StandardConfig(Section):
    """Cross-entropy on clean images."""

    kind: Literal["standard"] = "standard"
    """Discriminator."""


class PGDATConfig(Section):
    """Cross-entropy on PGD examples (Madry et al., arXiv 1706.06083)."""

    kind: Literal["pgd_at"] = "pgd_at"
    """Discriminator."""
    attack: AttackConfig = AttackConfig()
    """The attack that makes the training examples."""


class TRADESConfig(Section):
    """Clean cross-entropy + beta * KL(clean prediction || adversarial prediction) (Zhang et al., arXiv 1901.08573)."""

    kind: Literal["trades"] = "trades"
    """Discriminator."""
    beta: float = Field(default=6.0, ge=0)
    """Weight of the robust term."""
    attack: Annotated[AttackConfig, _over(_TRADES)] = _TRADES
    """The attack that makes the training examples."""


class MARTConfig(Section):
    """Boosted adversarial cross-entropy + beta * KL weighted by misclassification (Wang et al., ICLR 2020)."""

    kind: Literal["mart"] = "mart"
    """Discriminator."""
    beta: float = Field(default=5.0, ge=0)
    """Weight of the regularisation term."""
    attack: Annotated[AttackConfig, _over(_MART)] = _MART
    """The attack that makes the training examples."""


class FGSMRSConfig(Section):
    """One-step training from a random start (Wong et al., arXiv 2001.03994), watched for catastrophic overfitting."""

    kind: Literal["fgsm_rs"] = "fgsm_rs"
    """Discriminator."""
    step_factor: float = Field(default=1.25, gt=0, le=2)
    """Length of the step in units of eps."""
    bn: Literal["eval", "train"] = "eval"
    """Batch normalisation during the attack."""
    collapse_drop: float = Field(default=0.2, gt=0, le=1)
    """Catastrophic overfitting is declared when validation robust accuracy falls this far below the best so far, or to
    half of the best where that is less of a fall and the best was above chance."""
    on_collapse: Literal["stop", "pgd_at"] = "stop"
    """What follows: end with the best epoch, or go on from the best epoch with PGD training."""
    fallback: Annotated[AttackConfig, _over(_FALLBACK)] = _FALLBACK
    """The attack of the PGD training that follows when on_collapse is "pgd_at"."""


MethodConfig = Annotated[
    StandardConfig | PGDATConfig | TRADESConfig | MARTConfig | FGSMRSConfig, Field(discriminator="kind")
]


class AWPConfig(Section):
    """Adversarial weight perturbation around any method (Wu et al., arXiv 2004.05884)."""

    gamma: float = Field(default=5e-3, gt=0, lt=1)
    """Size of the perturbation, relative to the norm of each weight tensor."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs before it sets in."""


class MixConfig(Section):
    """Convex mixtures of two images and of their labels."""

    kind: Literal["mixup", "cutmix"]
    """Mixup (arXiv 1710.09412) blends, CutMix (arXiv 1905.04899) pastes a rectangle."""
    alpha: float = Field(default=1.0, gt=0)
    """Parameter of the Beta(alpha, alpha) distribution of the share of the first image."""


class OptimizerConfig(Section):
    """Stochastic gradient descent with momentum; activation parameters form a group of their own."""

    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = True
    """Nesterov's look-ahead."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Decay of convolution and linear weights."""
    norm_weight_decay: float | None = Field(default=None, ge=0)
    """Decay of normalisation parameters and biases; unset: as weight_decay, the usual recipe of the field."""
    activation_lr_factor: float = Field(default=5.0, ge=0)
    """Learning rate of activation parameters, relative to lr. Their gradients are small, and they have no decay. 0: the
    activations are frozen as they start."""
    activation_weight_decay: float = Field(default=0.0, ge=0)
    """Decay of activation parameters."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the whole gradient; unset: no clipping."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimizerConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov=true needs momentum > 0; set optimizer.nesterov=false")
        return self


class ConstantConfig(Section):
    """The same learning rate throughout, after the warm-up."""

    kind: Literal["constant"] = "constant"
    """Discriminator."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up from 0."""


class PiecewiseConfig(Section):
    """The learning rate is multiplied at given shares of the training (Rice et al.: by 0.1 at 1/2 and 3/4)."""

    kind: Literal["piecewise"] = "piecewise"
    """Discriminator."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training, rising, in (0, 1)."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """Multiplier at every milestone."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up from 0."""

    @model_validator(mode="after")
    def _rising(self) -> "PiecewiseConfig":
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"schedule.milestones must rise strictly within (0, 1), got {self.milestones}")
        return self


class CosineConfig(Section):
    """Half a cosine from lr down to final_factor * lr."""

    kind: Literal["cosine"] = "cosine"
    """Discriminator."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, relative to lr."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up from 0."""


class OneCycleConfig(Section):
    """Linear rise to lr, then linear fall to final_factor * lr (Smith and Topin, arXiv 1708.07120)."""

    kind: Literal["one_cycle"] = "one_cycle"
    """Discriminator."""
    peak: float = Field(default=0.4, gt=0, lt=1)
    """Share of the training at which lr is reached."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, relative to lr."""


ScheduleConfig = Annotated[
    ConstantConfig | PiecewiseConfig | CosineConfig | OneCycleConfig, Field(discriminator="kind")
]


class EMAConfig(Section):
    """Exponential moving average of weights and of batch-normalisation statistics; what is then validated and kept."""

    decay: float = Field(default=0.995, gt=0, lt=1)
    """Share of the average kept at every step."""
    warmup: bool = True
    """Let the decay rise as (1 + n) / (10 + n) over the first n steps, so that the start is forgotten."""


class SelectionConfig(Section):
    """Which epoch is kept: the best on the validation split, under one fixed attack, in float32."""

    metric: Literal["robust", "clean"] | None = None
    """Accuracy to maximise; unset: robust, or clean for standard training."""
    attack: AttackConfig = AttackConfig(steps=10)
    """The fixed evaluation attack, at the threat's full eps."""
    threat: ChosenThreat | None = None
    """What the evaluation attack may do; unset: training.threat. A search sets it, so that its trials compare."""
    every: int = Field(default=1, ge=1)
    """Validate every so many epochs (the last one always)."""
    max_samples: int | None = Field(default=None, ge=1)
    """Validation images attacked; unset: all of the split."""
    batch_size: int = Field(default=256, ge=1)
    """Images per validation batch and worker."""

    def num_judged(self, num_images: int) -> int:
        """How many of a validation split of `num_images` are attacked."""
        return num_images if self.max_samples is None else min(num_images, self.max_samples)


class EarlyStoppingConfig(Section):
    """End the training when the selection metric no longer improves (against robust overfitting, arXiv 2002.11569)."""

    patience: int = Field(default=20, ge=1)
    """Validations without improvement that are borne."""
    min_delta: float = Field(default=0.0, ge=0, lt=1)
    """Improvement that counts."""


class CheckpointConfig(Section):
    """When the training can be resumed from."""

    every_epochs: int = Field(default=1, ge=1)
    """Write a checkpoint after every so many epochs (after the last one always)."""
    every_steps: int | None = Field(default=None, ge=1)
    """Also inside an epoch, after every so many steps; unset: at epoch ends alone."""


class TrainingConfig(Section):
    """Everything about one training except the network, the data and the seed."""

    epochs: int = Field(default=30, ge=1)
    """Number of passes over the training split."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step over all workers together."""
    threat: ChosenThreat = ThreatModel()
    """Perturbations to withstand."""
    eps_warmup_epochs: float = Field(default=0.0, ge=0)
    """The training attack grows linearly from 0 to the full eps over these epochs."""
    method: MethodConfig = PGDATConfig()
    """Training method."""
    awp: AWPConfig | None = None
    """Adversarial weight perturbation around the method; unset: none."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the label spread over all classes, in the training loss alone."""
    mix: MixConfig | None = None
    """Mixup or CutMix; unset: neither."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = PiecewiseConfig()
    """Learning rate over the training."""
    ema: EMAConfig | None = None
    """Averaged weights; unset: the trained weights themselves."""
    batch_norm: Literal["local", "sync"] = "local"
    """Batch statistics of each worker, or of the joint batch of all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the training steps; auto: bf16 where the processor computes faster in it. Validation is float32."""
    compile: Literal["auto", "off", "on"] = "auto"
    """torch.compile of the networks of attack and training step; auto: where the training is long enough to pay."""
    selection: SelectionConfig = SelectionConfig()
    """Choice of the epoch to keep."""
    early_stopping: EarlyStoppingConfig | None = None
    """Unset: all epochs are run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints to resume from."""

    @property
    def metric(self) -> Literal["robust", "clean"]:
        """Name of the accuracy the selection maximises."""
        return self.selection.metric or ("clean" if self.method.kind == "standard" else "robust")

    @property
    def _attacks(self) -> dict[str, AttackConfig]:
        """The attacks of the method, by key."""
        keys = ("attack", "fallback")
        return {f"method.{key}": getattr(self.method, key) for key in keys if hasattr(self.method, key)}

    def varied(self, *, epochs: int | None = None, activation_lr_factor: float | None = None) -> "TrainingConfig":
        """This training with what is given in place of its own.

        Raises:
            ValidationError: where that does not go together with the rest.
        """
        content = self.model_dump()
        if epochs is not None:
            content["epochs"] = epochs
        if activation_lr_factor is not None:
            content["optimizer"]["activation_lr_factor"] = activation_lr_factor
        return TrainingConfig.model_validate(content)

    @model_validator(mode="after")
    def _hard_labels_where_needed(self) -> "TrainingConfig":
        if self.label_smoothing and self.method.kind == "mart":
            raise ValueError('label_smoothing has no form in method.kind="mart"; set it to 0')
        if self.mix and self.method.kind == "mart":
            raise ValueError(f'mix.kind="{self.mix.kind}" gives soft labels, which method.kind="mart" has no form for')
        for key, attack in self._attacks.items():
            if self.mix and attack.loss in ("margin", "dlr"):
                raise ValueError(
                    f'mix.kind="{self.mix.kind}" gives soft labels; {key}.loss="{attack.loss}" needs hard ones'
                )
        return self

    @model_validator(mode="after")
    def _steps_inside_the_box(self) -> "TrainingConfig":
        attacks = [(key, attack, self.threat) for key, attack in self._attacks.items()]
        attacks.append(("selection.attack", self.selection.attack, self.selection.threat or self.threat))
        for key, attack, threat in attacks:
            if threat.norm == "linf" and (attack.step_size or 0) > 1:
                raise ValueError(
                    f"expected {key}.step_size <= 1 for linf, got {attack.step_size}: pixels are in [0, 1], "
                    'write "2/255"'
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.eps_warmup_epochs and self.method.kind == "standard":
            raise ValueError('eps_warmup_epochs needs an attack; method.kind="standard" has none')
        if self.selection.attack.bn != "eval":
            raise ValueError('selection.attack.bn="train" would judge another network than the kept one; use "eval"')
        if self.method.kind == "fgsm_rs" and self.metric == "clean":
            raise ValueError(
                'selection.metric="clean" prefers the network that method.kind="fgsm_rs" leaves after a collapse; '
                'use "robust" or leave it unset'
            )
        warmup = getattr(self.schedule, "warmup_epochs", 0.0)
        if warmup >= self.epochs > 1:
            raise ValueError(f"schedule.warmup_epochs={warmup} leaves nothing of epochs={self.epochs}")
        if self.eps_warmup_epochs > self.epochs > 1:
            raise ValueError(
                f"eps_warmup_epochs={self.eps_warmup_epochs} is above epochs={self.epochs}: the attack never has "
                "all of eps; lower it"
            )
        return self
