"""Pictures of an attack: image, adversarial image, their difference, and the gates of both, stage by stage."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.gates import gate_maps
from pipeline.report.inputs import ModelCard

Array = npt.NDArray[np.float32]
_TILE_PIXELS = 96
_GAP, _CAPTION = 8, 24


class Tile(NamedTuple):
    """One small picture."""

    title: str
    uri: str
    pixels: npt.NDArray[np.uint8]


class Strip(NamedTuple):
    """A line of tiles: the images, or the gates of one stage."""

    name: str
    note: str
    tiles: tuple[Tile, ...]


class Example(NamedTuple):
    """One test image and its adversarial twin."""

    number: int
    """Index in the test split."""
    truth: str
    seen_as: str
    strips: tuple[Strip, ...]


class Gallery(NamedTuple):
    """The examples of one model."""

    card: ModelCard
    examples: tuple[Example, ...]


def gallery(card: ModelCard, model: torch.nn.Module | None, count: int) -> Gallery:
    """The first `count` pictures of an evaluation; with the model, its gates too."""
    arrays = card.evaluation.arrays(card.evaluation_directory)
    x, x_adv = (np.asarray(arrays[f"picture/{name}"][:count], dtype=np.float32) for name in ("x", "x_adv"))
    if len(x) == 0:
        return Gallery(card, ())
    clean = gate_maps(model, torch.from_numpy(x)) if model is not None else {}
    attacked = gate_maps(model, torch.from_numpy(x_adv)) if model is not None else {}
    examples = []
    for i in range(len(x)):
        gates = [_gate_strip(stage, clean[stage][i], attacked[stage][i]) for stage in clean]
        examples.append(
            Example(
                number=int(arrays["picture/index"][i]),
                truth=_class_name(card, int(arrays["picture/y"][i])),
                seen_as=_class_name(card, int(arrays["picture/predicted"][i])),
                strips=(_image_strip(x[i], x_adv[i]), *gates),
            )
        )
    return Gallery(card, tuple(examples))


def write_sheet(found: Gallery, path: Path) -> None:
    """All examples of a gallery as one PNG, side by side."""
    step = _TILE_PIXELS + _GAP
    lines = max(len(example.strips) for example in found.examples)
    width = _GAP + len(found.examples) * (3 * step + _GAP)
    sheet = Image.new("RGB", (width, 2 * _CAPTION + lines * (step + _CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, example in enumerate(found.examples):
        left = _GAP + column * (3 * step + _GAP)
        draw.text((left, 4), f"{example.truth}, attacked: {example.seen_as}", "black", font)
        for line, strip in enumerate(example.strips):
            top = _CAPTION + line * (step + _CAPTION)
            draw.text((left, top + 4), f"{strip.name} ({strip.note})", "dimgray", font)
            for place, tile in enumerate(strip.tiles):
                shown = Image.fromarray(tile.pixels).resize((_TILE_PIXELS, _TILE_PIXELS), Image.Resampling.NEAREST)
                sheet.paste(shown, (left + place * step, top + _CAPTION))
    sheet.save(path)


def _image_strip(x: Array, x_adv: Array) -> Strip:
    change = x_adv - x
    largest = float(np.abs(change).max())
    shown = 0.5 + change / (2 * largest) if largest > 0 else np.full_like(change, 0.5)
    tiles = (_tile("image", _rgb(x)), _tile("attacked", _rgb(x_adv)), _tile("difference", _rgb(shown)))
    return Strip("image", f"difference magnified {1 / (2 * largest):.0f} x" if largest > 0 else "no difference", tiles)


def _gate_strip(stage: int, clean: Array, attacked: Array) -> Strip:
    low, high = float(min(clean.min(), attacked.min())), float(max(clean.max(), attacked.max()))
    span = max(high - low, 1e-6)
    change = attacked - clean
    largest = max(float(np.abs(change).max()), 1e-6)
    tiles = (
        _tile("clean", _coloured((clean - low) / span, "viridis")),
        _tile("attacked", _coloured((attacked - low) / span, "viridis")),
        _tile("difference", _coloured(0.5 + change / (2 * largest), "RdBu_r")),
    )
    return Strip(f"gate, stage {stage}", f"{low:.2f} to {high:.2f}, difference ±{largest:.1g}", tiles)


def _tile(title: str, pixels: npt.NDArray[np.uint8]) -> Tile:
    image = Image.fromarray(pixels)
    scale = max(1, _TILE_PIXELS // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Tile(title, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", pixels)


def _rgb(x: Array) -> npt.NDArray[np.uint8]:
    """(C, H, W) in [0, 1] -> (H, W, 3)."""
    channels = x[[0, 0, 0]] if len(x) < 3 else x[:3]
    return np.asarray((channels.clip(0, 1) * 255).round().transpose(1, 2, 0), dtype=np.uint8)


def _coloured(values: Array, colours: str) -> npt.NDArray[np.uint8]:
    return np.asarray(colormaps[colours](values.clip(0, 1), bytes=True)[..., :3], dtype=np.uint8)


def _class_name(card: ModelCard, label: int) -> str:
    return card.class_names[label] if 0 <= label < len(card.class_names) else str(label)
