"""What the estimate of a dry run may take for granted. It changes no result, so it is in no fingerprint."""

from pydantic import Field

from pipeline.config.base import Section


class PlanConfig(Section):
    """Facts for `--dry-run` that are only known once something was measured or prepared."""

    images_per_second: float | None = Field(default=None, gt=0)
    """Training images per second that one worker (one GPU) manages on the source network, as its journal reports or,
    for its own few networks, benchmarks/at_step.py. None: as measured, where the source is trained already; else no
    hours are given."""
    num_images: int | None = Field(default=None, ge=1)
    """Training images of a folder or npz that is not prepared yet. None: counted, where that is quick."""
    num_test_images: int | None = Field(default=None, ge=1)
    """Test images of the same. None: they are held out of the training images."""
    num_classes: int | None = Field(default=None, ge=2)
    """Classes of a folder or npz that is not prepared yet."""
