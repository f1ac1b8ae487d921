"""Many videos on one page: a row for each, its prompt above, frames from first to last."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NUM_COLUMNS = 6
CELL_WIDTH = 192
"""Pixels of a frame; small frames are enlarged by whole numbers so that their pixels stay sharp."""
GAP = 8
MAX_ROWS = 48
"""Of a page that can still be looked at."""
FONT_SIZE = 16
LINE_HEIGHT = 20
MAX_CAPTION_LINES = 4
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (130, 130, 130)


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One video."""

    caption: str
    note: str
    """In grey behind the caption: seed, step and such."""
    frames: np.ndarray
    """(F, H, W, 3) uint8."""
    fps: float


def pick_frames(num_frames: int, num_columns: int = NUM_COLUMNS) -> list[int]:
    """Frames spread evenly from the first to the last, each once."""
    return sorted({round(i) for i in np.linspace(0, num_frames - 1, min(num_columns, num_frames))})


def write_contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Draw the rows to a PNG; an unfinished one is never seen under its name."""
    font = ImageFont.load_default(size=FONT_SIZE)
    width = GAP + NUM_COLUMNS * (CELL_WIDTH + GAP)
    drawn = [_draw_row(row, width, font) for row in rows]
    sheet = Image.new("RGB", (width, GAP + sum(row.height for row in drawn)), BACKGROUND)
    top = GAP
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def _draw_row(row: SheetRow, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    lines = _wrap(row.caption, width - 2 * GAP, font)
    cells = [(index, _fit(row.frames[index])) for index in pick_frames(len(row.frames))]
    frame_height = cells[0][1].height
    height = (len(lines) + 1) * LINE_HEIGHT + frame_height + LINE_HEIGHT + GAP
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((GAP, number * LINE_HEIGHT), line, INK, font=font)
    draw.text((GAP, len(lines) * LINE_HEIGHT), row.note, FAINT, font=font)
    top = (len(lines) + 1) * LINE_HEIGHT + 2
    for column, (index, cell) in enumerate(cells):
        left = GAP + column * (CELL_WIDTH + GAP)
        image.paste(cell, (left, top))
        draw.text((left, top + frame_height), f"{index / row.fps:.2f} s", FAINT, font=font)
    return image


def _fit(frame: np.ndarray) -> Image.Image:
    """Scale a frame to a cell's width: up by a whole number, down smoothly."""
    image = Image.fromarray(frame)
    if image.width * 2 <= CELL_WIDTH:
        factor = CELL_WIDTH // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    height = max(1, round(image.height * CELL_WIDTH / image.width))
    return image.resize((CELL_WIDTH, height), Image.Resampling.LANCZOS)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a caption into lines by the mean width of its letters; a very long one is cut."""
    text = " ".join(text.split()) or " "
    letters = max(1, int(width / max(font.getlength(text) / len(text), 1.0) * 0.95))
    return textwrap.wrap(text, letters, max_lines=MAX_CAPTION_LINES, placeholder=" …") or [" "]
