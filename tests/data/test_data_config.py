"""The data section refuses what makes no sense, and says what to do."""

import pytest
from pydantic import ValidationError

from pipeline.config.data import AugmentConfig, DataConfig, RandomResizedCropConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "npz"}, "dataset=npz needs data.path"),
        ({"dataset": "folder"}, "dataset=folder needs data.path"),
        ({"path": "x.npz"}, "path='x.npz' has no meaning for data.dataset=digits"),
        ({"dataset": "imagenet"}, "'digits', 'mnist'"),
        ({"datset": "digits"}, "datset"),
        ({"classes": (1,)}, "at least two different classes"),
        ({"classes": (1, 1)}, "at least two different classes"),
        ({"val_fraction": 0}, "greater than 0"),
        ({"test_fraction": 1}, "less than 1"),
        ({"channels": 2}, "1 or 3"),
        ({"limit": {"train": 0}}, "greater than or equal to 1"),
        ({"storage": "jpeg", "channels": 1}, "set data.channels=3"),
        ({"storage": "jpeg", "loader": "memory"}, "set data.storage=raw"),
        ({"dataset": "folder", "path": "s3://bucket/images"}, "reads a folder of this machine, not a URL"),
        ({"max_side": 8193}, "less than or equal to 8192"),
        ({"group_pattern": "(x)"}, "leave it out"),
        ({"dataset": "folder", "path": "p", "group_pattern": "("}, "not a regular expression"),
        ({"dataset": "folder", "path": "p", "group_pattern": "x"}, "needs a group in parentheses"),
    ],
)
def test_bad_data_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_crop": 2, "random_resized_crop": {}}, "are both set"),
        ({"random_resized_crop": {"scale": (0.5, 0.2)}}, "low <= high"),
        ({"random_resized_crop": {"ratio": (0, 2)}}, "0 < low"),
        ({"color_jitter": {"hue": 0.6}}, "less than or equal to 0.5"),
        ({"pad_crop": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_augmentation_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        AugmentConfig(**settings)


def test_resized_crop_takes_the_place_of_the_default_pad_crop():
    config = AugmentConfig(random_resized_crop=RandomResizedCropConfig())
    assert (config.random_resized_crop is not None, config.pad_crop) == (True, 0)
    assert AugmentConfig.model_validate(config.model_dump()) == config, "a search writes it out and reads it again"


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().dataset = "npz"
