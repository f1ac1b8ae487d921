"""Synthetic captioned clips: coloured shapes that move over plain backgrounds, and captions that are true of them.

Lengths are in frame heights: x runs from 0 to 1.5 to the right, y from 0 to 1 downwards. Time is in seconds.
A scene depends on (seed, index) alone, so that asking for more clips keeps the first ones as they were.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from mimir_precompute.toy.captions import Motion, Relation, Shape, Subject, describe

FRAMES_PER_CLIP = 25
FPS = 8
HEIGHT, WIDTH = 128, 192
ASPECT = WIDTH / HEIGHT

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (32, 165, 60),
    "blue": (40, 76, 224),
    "yellow": (245, 214, 36),
    "purple": (150, 48, 190),
    "orange": (245, 136, 24),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (243, 243, 243),
    "light grey": (205, 205, 208),
    "dark grey": (72, 74, 78),
    "black": (18, 18, 20),
    "beige": (226, 210, 184),
    "pale blue": (186, 208, 230),
}
SHAPES: tuple[Shape, ...] = ("square", "circle", "triangle", "ring", "star")
MOTIONS: tuple[Motion, ...] = ("still", "left", "right", "up", "down")
_DIRECTIONS: dict[Motion, tuple[int, int]] = {
    "still": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# How many things of each kind a clip shows; a clip's index picks one, so that even a few clips have them all.
_CASTS: tuple[tuple[int, ...], ...] = ((1,), (1, 1), (2,), (1, 1), (2, 1), (1, 1, 1), (1, 1), (3,), (1, 2))


@dataclass(frozen=True, kw_only=True)
class ToyObject:
    """One shape; where it is at time t is start + t * velocity."""

    shape: Shape
    colour: str
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float]

    def centre(self, time_s: float) -> tuple[float, float]:
        return (self.start[0] + time_s * self.velocity[0], self.start[1] + time_s * self.velocity[1])


@dataclass(frozen=True, kw_only=True)
class ToyScene:
    """What a clip shows. Objects come subject by subject, in the order of `subjects`."""

    subjects: tuple[Subject, ...]
    objects: tuple[ToyObject, ...]
    relation: Relation | None
    """Where the first subject is with respect to the second (with three: each to the next), in every frame."""
    background: str
    gradient: tuple[float, float]
    """Change of brightness from side to side and from top to bottom, in 1/255."""
    caption: str


def toy_scene(seed: int, index: int) -> ToyScene:
    """Make up scene `index` of the world `seed`, with a caption that is true of it from the first frame to the last."""
    rng = random.Random(f"mimir toy scene {seed} {index}")
    cast = _CASTS[index % len(_CASTS)]
    while True:
        subjects = _draw_subjects(rng, cast)
        relation = _draw_relation(rng, len(cast))
        objects = _place(rng, subjects, relation)
        if objects is not None:
            break
    background = rng.choice(sorted(BACKGROUNDS))
    gradient = (rng.uniform(-14, 14), rng.uniform(-14, 14)) if rng.random() < 0.6 else (0.0, 0.0)
    caption = describe(subjects, relation, background, rng)
    return ToyScene(
        subjects=subjects,
        objects=objects,
        relation=relation,
        background=background,
        gradient=gradient,
        caption=caption,
    )


def _draw_subjects(rng: random.Random, cast: tuple[int, ...]) -> tuple[Subject, ...]:
    # Shapes and colours both differ between subjects, so that "the red one" or "the circle" would name one alone.
    colours = rng.sample(sorted(COLOURS), len(cast))
    shapes = rng.sample(SHAPES, len(cast))
    same_motion = rng.random() < 0.4
    motions = [rng.choice(MOTIONS)] * len(cast) if same_motion else [rng.choice(MOTIONS) for _ in cast]
    return tuple(
        Subject(count=count, colour=colour, shape=shape, motion=motion)
        for count, colour, shape, motion in zip(cast, colours, shapes, motions, strict=True)
    )


def _draw_relation(rng: random.Random, num_subjects: int) -> Relation | None:
    if num_subjects == 1:
        return None
    if num_subjects == 3:
        return "left"
    relations: tuple[Relation, ...] = ("left", "right", "above", "below")
    return rng.choice(relations)


def _place(
    rng: random.Random, subjects: tuple[Subject, ...], relation: Relation | None
) -> tuple[ToyObject, ...] | None:
    """Try positions until everything stays inside, apart, and in the relation; None where no try succeeds."""
    largest = 0.19 if sum(subject.count for subject in subjects) < 3 else 0.155
    for _ in range(200):
        objects = []
        for subject in subjects:
            radius = rng.uniform(0.125, largest) * (1.15 if subject.shape == "star" else 1.0)
            speed = rng.uniform(0.09, 0.16)
            step_x, step_y = _DIRECTIONS[subject.motion]
            for _ in range(subject.count):
                start = (rng.uniform(radius, ASPECT - radius), rng.uniform(radius, 1 - radius))
                objects.append(
                    ToyObject(
                        shape=subject.shape,
                        colour=subject.colour,
                        radius=radius,
                        start=start,
                        velocity=(speed * step_x, speed * step_y),
                    )
                )
        if _is_clear(objects, subjects, relation):
            return tuple(objects)
    return None


def _is_clear(objects: list[ToyObject], subjects: tuple[Subject, ...], relation: Relation | None) -> bool:
    subject_of = [number for number, subject in enumerate(subjects) for _ in range(subject.count)]
    duration_s = (FRAMES_PER_CLIP - 1) / FPS
    for time_s in (0.0, duration_s / 4, duration_s / 2, duration_s * 3 / 4, duration_s):
        centres = [thing.centre(time_s) for thing in objects]
        for thing, (x, y) in zip(objects, centres, strict=True):
            room = 1.05 * thing.radius
            if not (room < x < ASPECT - room and room < y < 1 - room):
                return False
        for i in range(len(objects)):
            for j in range(i):
                gap_x, gap_y = centres[i][0] - centres[j][0], centres[i][1] - centres[j][1]
                if math.hypot(gap_x, gap_y) < 1.25 * (objects[i].radius + objects[j].radius):
                    return False
                if relation is None or subject_of[i] == subject_of[j]:
                    continue
                ahead = {"left": gap_x, "right": -gap_x, "above": gap_y, "below": -gap_y}[relation]
                # Along the named axis and farther than across it: nobody would call it otherwise.
                across = abs(gap_y if relation in ("left", "right") else gap_x)
                if ahead < 0.2 or ahead < 1.1 * across:
                    return False
    return True


def render(
    scene: ToyScene, *, num_frames: int = FRAMES_PER_CLIP, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS
) -> npt.NDArray[np.uint8]:
    """Draw the scene, anti-aliased; (F, H, W, 3) uint8. Another width shows the middle of the scene, or more of it."""
    left = (ASPECT - width / height) / 2
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None]
    base = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    empty = np.clip(base + scene.gradient[0] * across + scene.gradient[1] * down, 0, 255)
    frames = np.repeat(empty[None], num_frames, axis=0)  # (F, H, W, 3) float32
    for number in range(num_frames):
        for thing in scene.objects:
            x, y = thing.centre(number / fps)
            _paint(frames[number], thing, (x - left) * height - 0.5, y * height - 0.5, thing.radius * height)
    pixels: npt.NDArray[np.uint8] = np.rint(frames).astype(np.uint8)
    return pixels


def _paint(frame: npt.NDArray[np.float32], thing: ToyObject, x: float, y: float, radius: float) -> None:
    """Blend one object into a frame (H, W, 3) at pixel (x, y), touching only the pixels near it."""
    reach = 1.2 * radius + 2
    top, bottom = max(0, math.floor(y - reach)), min(frame.shape[0], math.ceil(y + reach) + 1)
    left, right = max(0, math.floor(x - reach)), min(frame.shape[1], math.ceil(x + reach) + 1)
    if top >= bottom or left >= right:
        return
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    # The signed distance, in pixels, gives the share of the pixel that is covered: no supersampling needed.
    cover = np.clip(0.5 - _signed_distance(thing.shape, dx, dy, radius), 0, 1)[:, :, None]
    colour = np.asarray(COLOURS[thing.colour], dtype=np.float32)
    patch = frame[top:bottom, left:right]
    patch += cover * (colour - patch)


def _signed_distance(
    shape: Shape, dx: npt.NDArray[np.float32], dy: npt.NDArray[np.float32], radius: float
) -> npt.NDArray[np.floating]:
    """Distance in pixels to the outline, negative inside (H, W). Exact near edges, which is where it matters."""
    distance: npt.NDArray[np.floating]
    if shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    elif shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - 0.74 * radius) - 0.26 * radius
    elif shape == "triangle":
        # Apex up, moved down a little so that the eye finds it centred.
        low = dy - 0.12 * radius
        sides = np.abs(dx) * math.sqrt(3) / 2 - low * 0.5
        distance = np.maximum(sides - 0.56 * radius, low - 0.56 * radius)
    else:
        distance = _star_distance(dx, dy, radius)
    return distance


def _star_distance(dx: npt.NDArray[np.float32], dy: npt.NDArray[np.float32], radius: float) -> npt.NDArray[np.floating]:
    """Distance to a five-pointed star, one point up: fold the plane into a tenth, where the outline is one line."""
    angle = np.arctan2(dx, -dy)
    folded = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    reach = np.hypot(dx, dy)
    along, aside = reach * np.cos(folded), reach * np.sin(folded)
    inner = 0.48 * radius
    notch_x, notch_y = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    edge_x, edge_y = notch_x - radius, notch_y
    length = math.hypot(edge_x, edge_y)
    return ((along - radius) * edge_y - aside * edge_x) / length


def write_toy_clips(directory: Path, num_clips: int, seed: int) -> None:
    """Write directory/clips/*.mp4 (H.264, 25 frames of 128x192 at 8 fps) and directory/clips/metadata.jsonl."""
    clips_dir = directory / "clips"
    clips_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_clips):
        scene = toy_scene(seed, index)
        file_name = f"{index:06d}.mp4"
        write_mp4(clips_dir / file_name, render(scene))
        lines.append(json.dumps({"file_name": file_name, "text": scene.caption}) + "\n")
    (clips_dir / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_mp4(path: Path, frames: npt.NDArray[np.uint8], fps: int = FPS) -> None:
    """Encode (F, H, W, 3) uint8 frames as H.264; equal frames give equal bytes."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread: x264 may otherwise choose frame types by timing. crf 14: the codec is not what is studied here.
        stream.options = {"crf": "14", "preset": "medium", "threads": "1", "flags": "+bitexact"}
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
