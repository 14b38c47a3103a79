"""Augmentation: closed forms, properties, and independence of everything but the generator."""

import math

import numpy as np
import pytest
import torch

from pipeline.config.data import AugmentConfig, ColorJitterConfig, RandomResizedCropConfig
from pipeline.data.augment import augment, center_boxes, random_boxes, to_float

OFF = AugmentConfig(pad_crop=0, flip=False)
CONFIGS = {
    "off": OFF,
    "pad_crop": AugmentConfig(pad_crop=2, flip=False),
    "flip": AugmentConfig(pad_crop=0, flip=True),
    "pad_crop_flip": AugmentConfig(pad_crop=3),
    "cutout": AugmentConfig(cutout=4),
    "resized_crop": AugmentConfig(random_resized_crop=RandomResizedCropConfig()),
    "jitter": AugmentConfig(
        color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), cutout=3
    ),
}


def images(num=6, size=10, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shape_range_and_repeatability(config, channels):
    x = images(channels=channels)
    first, again, other = (augment(x, config, seeded(s)) for s in (1, 1, 2))
    assert first.shape == (6, channels, 10, 10)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert config == OFF or not torch.equal(first, other)


def test_nothing_asked_for_is_the_image():
    x = images()
    assert torch.equal(augment(x, OFF, seeded()), to_float(x))
    assert torch.equal(to_float(x), x.permute(0, 3, 1, 2) / 255)


def test_pad_crop_and_flip_are_one_of_all_shifts_and_mirrors():
    x, pad = images(num=64, size=5), 2
    y = augment(x, AugmentConfig(pad_crop=pad, flip=True), seeded())
    padded = torch.nn.functional.pad(to_float(x), (pad,) * 4)
    seen = set()
    for number in range(len(x)):
        matches = []
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                window = padded[number, :, top : top + 5, left : left + 5]
                matches += [(top, left, m) for m, w in enumerate((window, window.flip(2))) if torch.equal(w, y[number])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len({m[0] for m in seen}) == len({m[1] for m in seen}) == 2 * pad + 1
    assert {m[2] for m in seen} == {0, 1}


def test_flip_happens_about_half_the_time():
    x = images(num=2000, size=2, channels=1)
    x[:, :, 0], x[:, :, 1] = 0, 255
    flipped = augment(x, CONFIGS["flip"], seeded())[:, 0, 0, 0].mean().item()
    assert abs(flipped - 0.5) < 4 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize("cropped", [False, True])
def test_a_flip_without_a_crop_is_the_image_or_its_mirror(cropped):
    x = images(num=64)
    given, plain = x.clone(), to_float(x)
    crop = RandomResizedCropConfig() if cropped else None  # done while decoding
    config = AugmentConfig(pad_crop=0, random_resized_crop=crop)
    y = augment(x, config, seeded(), cropped=cropped)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(y, plain, strict=True)]
    assert all(m != torch.equal(a, b) for m, a, b in zip(mirrored, y, plain, strict=True))
    assert set(mirrored) == {True, False}
    assert torch.equal(x, given)


def test_whole_image_resized_crop_is_the_image():
    whole = RandomResizedCropConfig(scale=(1, 1), ratio=(1, 1))
    x = images()
    y = augment(x, AugmentConfig(random_resized_crop=whole, flip=False), seeded())
    # The sampling grid is computed in float32: half a grey level at most.
    assert torch.allclose(y, to_float(x), atol=1e-4)


def test_resized_crop_of_a_ramp_is_a_ramp():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).view(1, 1, 32, 1).expand(8, 32, 32, 3)
    config = AugmentConfig(random_resized_crop=RandomResizedCropConfig(scale=(0.25, 0.5)), flip=False)
    step = augment(ramp, config, seeded())[:, 0, :, 2:-2].diff(dim=2)
    assert torch.allclose(step, step.mean((1, 2), keepdim=True).expand_as(step), atol=1e-5)
    assert (step.mean((1, 2)) < 8 / 255).all()


def test_random_boxes_lie_inside_and_follow_scale_and_ratio():
    shapes = torch.tensor([[300, 500], [500, 300], [40, 41]]).repeat(500, 1)
    boxes = random_boxes(shapes, RandomResizedCropConfig(scale=(0.1, 0.9), ratio=(0.8, 1.25)), seeded())
    top, left, height, width = boxes.unbind(1)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert ((top + height <= shapes[:, 0]) & (left + width <= shapes[:, 1])).all()
    large = shapes.prod(1) == 150_000
    area = (height * width / shapes.prod(1))[large]
    assert area.min() > 0.09
    assert area.max() < 0.91
    assert abs(area.mean() - 0.5) < 0.05


def test_center_boxes_are_seven_eighths_of_the_shorter_side():
    assert center_boxes(np.array([[256, 400], [80, 64]])).tolist() == [[16, 88, 224, 224], [12, 4, 56, 56]]


def test_cutout_zeroes_a_square_and_nothing_else():
    x = torch.full((200, 8, 8, 3), 255, dtype=torch.uint8)
    y = augment(x, AugmentConfig(pad_crop=0, flip=False, cutout=3), seeded())
    holes = (y == 0).all(1)
    assert ((y == 1).all(1) | holes).all()
    sizes = holes.flatten(1).sum(1)
    assert set(sizes.tolist()) == {4, 6, 9}
    assert (holes.any(2).sum(1) * holes.any(1).sum(1) == sizes).all()


def test_zero_strength_jitter_is_the_image():
    x = images()
    y = augment(x, AugmentConfig(pad_crop=0, flip=False, color_jitter=ColorJitterConfig()), seeded())
    assert torch.equal(y, to_float(x))


def test_brightness_scales_and_saturation_keeps_grey():
    grey = torch.full((50, 2, 2, 3), 100, dtype=torch.uint8)
    brighter = ColorJitterConfig(brightness=0.5)
    y = augment(grey, AugmentConfig(pad_crop=0, flip=False, color_jitter=brighter), seeded())
    factor = y[:, 0, 0, 0] / (100 / 255)
    assert 0.5 <= factor.min() < 0.7
    assert 1.3 < factor.max() <= 1.5001
    coloured = ColorJitterConfig(contrast=0.5, saturation=0.9, hue=0.5)
    y = augment(grey, AugmentConfig(pad_crop=0, flip=False, color_jitter=coloured), seeded())
    assert torch.allclose(y, to_float(grey), atol=2e-3)


def test_hue_keeps_luminance():
    x = torch.randint(100, 150, (20, 4, 4, 3), generator=seeded(), dtype=torch.uint8)
    y = augment(x, AugmentConfig(pad_crop=0, flip=False, color_jitter=ColorJitterConfig(hue=0.5)), seeded())
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert torch.allclose((y * weights).sum(1), (to_float(x) * weights).sum(1), atol=1e-3)
    assert not torch.allclose(y, to_float(x), atol=0.05)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    for config in CONFIGS.values():
        augment(images(), config, seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert (state == np.random.get_state()[1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_images_on_every_device(config):
    here = augment(images(), config, seeded())
    there = augment(images().cuda(), config, seeded()).cpu()
    assert torch.allclose(here, there, atol=1e-5)
