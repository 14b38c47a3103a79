"""Adversarial training: attacks, methods, the loop, checkpoints. Knows nothing of the launcher that runs it."""
