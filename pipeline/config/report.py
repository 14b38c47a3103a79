"""What the report shows."""

from pydantic import Field

from pipeline.config.base import Section


class ReportConfig(Section):
    """The HTML page and the pictures beside it."""

    title: str | None = Field(default=None, max_length=120)
    """Heading of the page; None: the name of the chain."""
    num_pictures: int = Field(default=3, ge=0, le=32)
    """Examples per model shown as image, adversarial image and gate maps; at most `evaluation.num_pictures` exist."""
    png_dpi: int = Field(default=150, ge=50, le=600)
    """Resolution of the PNG files that are written beside the page."""
