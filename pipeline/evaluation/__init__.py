"""Judging a model: the attack suite, the gradient-masking audit, and the gate that guards promotion in the registry."""
