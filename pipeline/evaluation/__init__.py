"""Judging a model: the attack suite, the gradient-masking audit, and the gate that guards promotion in the registry."""

from pipeline.evaluation.audit import CHECKS, audit
from pipeline.evaluation.judged_model import model_digest
from pipeline.evaluation.promotion import PromotionVerdict, promotion_verdict
from pipeline.evaluation.records import AuditReport, Check, Evaluation
from pipeline.evaluation.stats import Accuracy, Difference, difference, mcnemar
from pipeline.evaluation.suite import evaluate, evaluate_shard, merge

__all__ = [
    "CHECKS",
    "Accuracy",
    "AuditReport",
    "Check",
    "Difference",
    "Evaluation",
    "PromotionVerdict",
    "audit",
    "difference",
    "evaluate",
    "evaluate_shard",
    "mcnemar",
    "merge",
    "model_digest",
    "promotion_verdict",
]
