"""Images as people have them: every mode, damage, folders, torchvision's data sets."""

import os

import numpy as np
import pytest
from data_sets import picture, write_folder
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data import DataError, build, identity, prepare
from pipeline.data.folder import folder_source
from pipeline.data.samples import fit, shrink, to_channels
from pipeline.data.sidecar import read_sidecar
from pipeline.data.sources import open_source
from pipeline.data.splits import select


@pytest.fixture
def raw(monkeypatch):
    """Prepare without starting FFCV's writer: what is tested comes before it."""
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)


def grey_ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA", "YCbCr", "I;16", "I", "F"])
def test_every_mode_gives_the_same_grey_ramp(mode):
    ramp = grey_ramp()
    if mode in ("I;16", "I"):
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32))
    else:
        rgb = Image.fromarray(ramp).convert("RGB")
        image = rgb.quantize(256) if mode == "P" else rgb.convert(mode)
    rgb, grey = to_channels(image, 3), to_channels(image, 1)
    assert (rgb.shape, grey.shape) == ((16, 16, 3), (16, 16, 1))
    # The palette merges neighbours, CMYK and YCbCr round.
    tolerance = 2
    assert np.abs(rgb.astype(int) - ramp[:, :, None]).max() <= tolerance
    assert np.abs(grey[:, :, 0].astype(int) - ramp).max() <= tolerance


def test_a_turned_picture_is_turned_back(tmp_path):
    image = picture(0, 20, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert (to_channels(turned, 3) == np.rot90(np.asarray(image), -1)).all()


def test_fit_takes_the_centre_square_and_shrink_keeps_the_shape():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fit(wide, 10) == 200).all()
    assert fit(wide, 5).shape == (5, 5, 3)
    assert shrink(wide, 15).shape == (5, 15, 3)
    assert shrink(wide, 99).shape == wide.shape
    assert fit(np.zeros((7, 4, 1), np.uint8), 8).shape == (8, 8, 1)


def test_plain_folder_is_split_by_class(raw, tmp_path):
    root = write_folder(tmp_path / "images", classes=3, images=10)
    config = DataConfig(dataset="folder", path=str(root), image_size=16, test_fraction=0.2, val_fraction=0.25)
    with pytest.warns(UserWarning, match="read into memory"):
        prepared = prepare(config, tmp_path / "out", seed=0)
    assert prepared.class_names == ("class0", "class1", "class2")
    assert {s: prepared.splits[s].class_counts for s in ("train", "val", "test")} == {
        "train": (6, 6, 6),
        "val": (2, 2, 2),
        "test": (2, 2, 2),
    }
    assert (prepared.channels, prepared.image_size, prepared.storage) == (3, 16, "raw")


@pytest.mark.parametrize(
    ("folders", "origins"),
    [
        (("train", "test"), {"train": "train", "val": "train", "test": "test"}),
        (("train", "val"), {"train": "train", "val": "train", "test": "test"}),
        (("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}),
    ],
)
def test_the_folders_own_splits_are_used(tmp_path, folders, origins):
    for name in folders:
        write_folder(tmp_path / name, images=5)
    config = DataConfig(dataset="folder", path=str(tmp_path))
    chosen, _ = select(open_source(config), config, seed=0)
    assert {split: part.origin for split, part in chosen.items()} == origins


def damaged(root):
    whole = (root / "class0" / "00.jpg").read_bytes()
    (root / "class0" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "class1" / "empty.png").write_bytes(b"")
    (root / "class1" / "text.jpg").write_text("not an image")
    return root


def test_images_that_do_not_decode_are_all_named(raw, tmp_path):
    root = damaged(write_folder(tmp_path / "images"))
    config = DataConfig(dataset="folder", path=str(root), image_size=16)
    with pytest.raises(DataError, match=r"3 images do not decode: class0/cut\.jpg: .*truncated.*on_bad_image=skip"):
        prepare(config, tmp_path / "out", seed=0)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_images_that_do_not_decode_are_skipped_and_listed_on_request(raw, tmp_path):
    root = damaged(write_folder(tmp_path / "images"))
    config = DataConfig(dataset="folder", path=str(root), image_size=16, on_bad_image="skip")
    with pytest.warns(UserWarning, match="read into memory"):
        prepared = prepare(config, tmp_path / "out", seed=0)
    assert sum(split.count for split in prepared.splits.values()) == 16
    listed = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == ["class0/cut.jpg", "class1/empty.png", "class1/text.jpg"]


def test_a_class_of_bad_images_only_is_an_empty_class(raw, tmp_path):
    root = write_folder(tmp_path / "images")
    for path in (root / "class1").iterdir():
        path.write_bytes(b"")
    config = DataConfig(dataset="folder", path=str(root), on_bad_image="skip")
    with pytest.raises(DataError, match="of every class, got none of class1"):
        prepare(config, tmp_path / "out", seed=0)


def test_group_pattern_keeps_groups_together(raw, tmp_path):
    root = write_folder(tmp_path / "images", images=12)
    config = DataConfig(dataset="folder", path=str(root), group_pattern=r"(class\d/\d)\d")
    source = folder_source(config)
    assert source.splits["train"].groups.tolist() == [0] * 10 + [1] * 2 + [2] * 10 + [3] * 2
    threes = config.model_copy(update={"group_pattern": r"(\d)\.jpg", "val_fraction": 0.3, "test_fraction": 0.3})
    source = folder_source(threes)  # 00 and 10 of both classes are one group, 01 and 11 another, 02 to 09 their own
    chosen, _ = select(source, threes, seed=0)
    parts = [set(source.splits["train"].groups[part.indices].tolist()) for part in chosen.values()]
    assert all(parts)
    assert sorted(group for part in parts for group in part) == list(range(10))
    for wrong in ("(nothing)", "(nothing)?"):
        with pytest.raises(DataError, match=r"finds no group in 'class0/00\.jpg'"):
            folder_source(config.model_copy(update={"group_pattern": wrong}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: None, "no such file or folder"),
        (lambda root: root.write_text(""), "expected a folder of images, got a file"),
        (lambda root: root.mkdir(), "expected one subfolder of images per class.*got none"),
        (lambda root: [(root / n).mkdir(parents=True) for n in "ab"], "no images"),
    ],
)
def test_a_folder_that_is_none_is_refused(tmp_path, spoil, message):
    spoil(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(dataset="folder", path=str(tmp_path / "images")))


def test_a_class_whose_name_no_record_can_hold_is_refused(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / "class1").rename(root / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"expected class folders with names in UTF-8, got 'caf.udce9'; rename it"):
        open_source(DataConfig(dataset="folder", path=str(root)))


def test_images_behind_a_link_are_not_left_out_in_silence(tmp_path):
    root = write_folder(tmp_path / "images")
    elsewhere = write_folder(tmp_path / "elsewhere")
    (root / "class1" / "more").symlink_to(elsewhere / "class1", target_is_directory=True)
    with pytest.raises(DataError, match="more: expected a folder, got a link to one, which is not followed"):
        open_source(DataConfig(dataset="folder", path=str(root)))


def test_a_class_that_training_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train", classes=2)
    write_folder(tmp_path / "test", classes=3)
    with pytest.raises(DataError, match="classes class2 are not in the training folder"):
        open_source(DataConfig(dataset="folder", path=str(tmp_path)))


def test_an_image_replaced_by_one_of_the_same_length_makes_other_data(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(3):
            picture(number, 20, 20).save(tmp_path / label / f"{number}.bmp")
    config = DataConfig(dataset="folder", path=str(tmp_path))
    path, before = tmp_path / "b" / "1.bmp", identity(config)
    stat = path.stat()
    os.utime(path)
    assert identity(config) == before
    picture(9, 20, 20).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert identity(config) != before


def test_of_a_large_folder_a_share_of_the_files_is_looked_into(tmp_path, monkeypatch):
    root, looked = write_folder(tmp_path / "images", images=10), []
    monkeypatch.setattr(build, "_NUM_GLIMPSED", 7)
    monkeypatch.setattr(build, "sampled_digest", lambda path, _: looked.append(path) or "")
    identity(DataConfig(dataset="folder", path=str(root)))
    assert len(looked) == 7
    assert {path.parent.name for path in looked} == {"class0", "class1"}


def test_jpeg_storage_keeps_shapes_up_to_max_side(photos):
    from pipeline.data.readers import open_reader

    path = photos.path("train")
    reader = open_reader(path, read_sidecar(path))
    assert len(np.unique(reader.shapes, axis=0)) > 3
    assert reader.shapes.max() == 100
    reader.close()
