"""What holds for all tests."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are noisy: no example fails for having taken long
settings.load_profile("untimed")
