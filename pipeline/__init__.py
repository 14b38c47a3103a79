"""The system around `sparta_models`: data, adversarial training, evaluation, tracking and the chain that joins them."""
