"""Draws axial, coronal and sagittal slices as PNG, fast enough to scroll: numpy and Pillow, no plotting library.

Radiological convention unless told otherwise: the patient's right is on the left of axial and coronal pictures. Noses
point left in sagittal ones in both conventions. Letters on the four sides say which way is which, and pixels are square
in millimetres, whatever the voxels are. Every picture carries the notice, below the slice and in its metadata.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fediod_med.errors import SettingsError
from fediod_med.resources import NOT_FOR_CLINICAL_USE
from fediod_med.review.overlays import Overlay
from fediod_med.review.volumes import LoadedVolume, Point, require_same_grid

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
AXIS: Mapping[Plane, int] = {"axial": 2, "coronal": 1, "sagittal": 0}
"""The array axis that a plane is cut along, on the axes of `LoadedVolume`."""

_LETTERS: Mapping[Plane, tuple[str, str, str, str]] = {  # left, right, top, bottom; radiological
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}
_STRIP = 18  # pixels below the slice, for the notice
_CROSSHAIR = (240, 228, 66)
_OBLIQUE_DEGREES = 2.0


@dataclass(frozen=True)
class View:
    """How slices are drawn.

    Attributes:
        radiological: patient's right on image left; otherwise neurological, right on right.
        window: grey values shown as black and white; the image's own (percentiles) when omitted.
        style: of overlays, `fill` or `outline`.
        opacity: of overlays, 0 to 1.
        crosshair: lines through the position.
        letters: L R A P S I on the four sides.
        synthetic: burn SYNTHETIC into the pixels, and leave the letters out: the generator learns from mirrored
            volumes, so the sides of what it makes have no names.
        pixels: longest side of the largest of the three planes.
    """

    radiological: bool = True
    window: tuple[float, float] | None = None
    style: Literal["fill", "outline"] = "fill"
    opacity: float = 0.5
    crosshair: bool = True
    letters: bool = True
    synthetic: bool = False
    pixels: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1 or not 32 <= self.pixels <= 4096 or self.style not in ("fill", "outline"):
            raise SettingsError(
                f"view: expected opacity 0 to 1, 32 to 4096 pixels and style fill or outline, found {self.opacity}, "
                f"{self.pixels} and {self.style}"
            )
        if self.window is not None and not self.window[0] < self.window[1]:
            raise SettingsError(f"view: expected a window from a lower to a higher grey value, found {self.window}")


@dataclass(frozen=True)
class Picture:
    """One drawn slice.

    Attributes:
        png: the file.
        alt: the same in words.
        plane: axial, coronal or sagittal.
        index: of the slice, along `AXIS[plane]`.
        slices: how many there are.
        mm: world position of the crosshair, moved to the slice's voxel centre.
        size: width and height in pixels of the slice, without the strip below it.
        volume: that was cut.
    """

    png: bytes
    alt: str
    plane: Plane
    index: int
    slices: int
    mm: Point
    size: tuple[int, int]
    volume: LoadedVolume = field(repr=False, compare=False)
    _radiological: bool = field(repr=False, compare=False)

    def mm_at(self, x: float, y: float) -> Point:
        """World position (mm) under a pixel, counted from the top left corner; on this picture's slice."""
        across, down = _axes(self.plane)
        wide, high = self.size
        along = x / wide if not _flipped(self.plane, self._radiological) else 1 - x / wide
        index = [0.0, 0.0, 0.0]
        index[AXIS[self.plane]] = self.index
        index[across] = min(max(along, 0.0), 1.0) * self.volume.shape[across] - 0.5
        index[down] = (1 - min(max(y / high, 0.0), 1.0)) * self.volume.shape[down] - 0.5
        return self.volume.mm_of((index[0], index[1], index[2]))


def tri_planar(
    image: LoadedVolume, mm: Point, *, overlay: Overlay | None = None, view: View | None = None
) -> dict[Plane, Picture]:
    """The three planes through one position, in one scale; arguments and errors as in `slice_picture`."""
    return {plane: slice_picture(image, plane, mm, overlay=overlay, view=view) for plane in PLANES}


def slice_picture(
    image: LoadedVolume, plane: Plane, mm: Point, *, overlay: Overlay | None = None, view: View | None = None
) -> Picture:
    """Draw the slice nearest to a position. Grey values are interpolated linearly in the plane, labels never.

    Args:
        image: to draw.
        plane: of the grid; an oblique grid is cut along its own axes, named by the nearest direction.
        mm: world position (RAS+); outside the grid the nearest voxel counts.
        overlay: drawn on top, on the same grid.
        view: how.

    Raises:
        SettingsError: an unknown plane.
        GeometryError: the overlay lies on another grid.
    """
    if plane not in PLANES:
        raise SettingsError(f"plane: expected one of {', '.join(PLANES)}, found {plane!r}")
    view = View() if view is None else view
    voxel = image.voxel_of(mm)
    axis, index = AXIS[plane], voxel[AXIS[plane]]
    size = _size(image, plane, view.pixels)
    grey = windowed(image.cut(axis, index), view.window or image.window)
    scaled = _turned(grey, plane, view.radiological).resize(size, Image.Resampling.BILINEAR)
    pixels = np.repeat(np.asarray(scaled)[:, :, None], 3, axis=2)
    areas: dict[str, float] = {}
    if overlay is not None:
        require_same_grid(image, overlay.labels)
        drawn = overlay.drawn(axis, index)
        areas = _areas(drawn, overlay, image, plane)
        tall = _turned(drawn, plane, view.radiological).resize(size, Image.Resampling.NEAREST)
        pixels = _tint(pixels, np.asarray(tall), overlay, view)
    picture = Image.new("RGB", (size[0], size[1] + _STRIP))
    picture.paste(Image.fromarray(pixels), (0, 0))
    pen = ImageDraw.Draw(picture)
    if view.crosshair:
        _draw_crosshair(pen, image, voxel, plane, view.radiological, size)
    if view.letters and not view.synthetic:
        _draw_letters(pen, plane, view.radiological, size)
    if view.synthetic:
        _draw_synthetic(pen, size)
    _draw_notice(pen, size)
    at = image.mm_of((float(voxel[0]), float(voxel[1]), float(voxel[2])))
    alt = alt_text(image, plane, at, view=view, areas=areas, other=overlay is not None and overlay.other is not None)
    return Picture(
        _png(picture, alt),
        alt,
        plane,
        index,
        image.shape[axis],
        at,
        size,
        volume=image,
        _radiological=view.radiological,
    )


def alt_text(
    image: LoadedVolume,
    plane: Plane,
    mm: Point,
    *,
    view: View,
    areas: Mapping[str, float] | None = None,
    other: bool = False,
) -> str:
    """A slice in words: what it shows, where, in which convention, and the area of each overlay (square cm)."""
    words = [f"{plane} slice of {image.name or 'the image'} at {place(mm)}"]
    if view.synthetic:
        words = [f"synthetic {plane} slice of {image.name or 'a volume'}", "no patient, sides have no names"]
    elif plane == "sagittal":
        words.append("nose to the left")
    else:
        words.append("radiological view, patient's right on the left" if view.radiological else "neurological view")
    if image.oblique > _OBLIQUE_DEGREES:
        words.append(f"oblique grid, {image.oblique:.0f} degrees from the named plane")
    if areas is not None and areas:
        told = [f"{name} {area:.1f} square cm" for name, area in areas.items()]
        words.append(("differences: " if other else "overlay: ") + ", ".join(told))
    text = ", ".join(words)
    return f"{text[0].upper()}{text[1:]}. {NOT_FOR_CLINICAL_USE}"


def place(mm: Point) -> str:
    """A world position (RAS+, mm) with letters in place of signs, such as `R 12.0 A 3.5 S 40.0 mm`."""
    letters = [("R", "L"), ("A", "P"), ("S", "I")]
    parts = [f"{pair[0] if v >= 0 else pair[1]} {abs(v):.1f}" for pair, v in zip(letters, mm, strict=True)]
    return f"{' '.join(parts)} mm"


def _axes(plane: Plane) -> tuple[int, int]:
    """Array axes that run across and up the picture."""
    across, up = (axis for axis in range(3) if axis != AXIS[plane])
    return across, up


def _flipped(plane: Plane, radiological: bool) -> bool:
    """Whether the picture's columns run against the array axis."""
    return radiological if plane != "sagittal" else True  # anterior on the left


def _turned(plane_values: np.ndarray, plane: Plane, radiological: bool) -> Image.Image:
    """A 2-D uint8 slice as the picture lies: second array axis up, first across."""
    rows = plane_values.T[::-1]
    return Image.fromarray(np.ascontiguousarray(rows[:, ::-1] if _flipped(plane, radiological) else rows))


def _size(image: LoadedVolume, plane: Plane, pixels: int) -> tuple[int, int]:
    """Width and height; one scale for all three planes."""
    extent = [n * s for n, s in zip(image.shape, image.spacing, strict=True)]
    scale = pixels / max(extent)
    across, up = _axes(plane)
    return max(1, round(extent[across] * scale)), max(1, round(extent[up] * scale))


def windowed(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Grey values as shades, uint8 of the same shape; exact zeros, and what lies below the window, are black."""
    low, high = window
    # outside the brain is black, for z-scores too
    shade = np.where(values == 0, 0.0, (values - low) * (255.0 / (high - low)))
    return np.clip(shade, 0, 255).astype(np.uint8)


def _areas(drawn: np.ndarray, overlay: Overlay, image: LoadedVolume, plane: Plane) -> dict[str, float]:
    across, up = _axes(plane)
    square_cm = image.spacing[across] * image.spacing[up] / 100
    counts = np.bincount(drawn.ravel(), minlength=256)
    return {layer.name: float(sum(counts[v] for v in layer.values)) * square_cm for layer in overlay.layers}


def _tint(pixels: np.ndarray, labels: np.ndarray, overlay: Overlay, view: View) -> np.ndarray:
    strength = np.zeros((*labels.shape, 1), dtype=np.float32)
    colour = np.zeros((*labels.shape, 3), dtype=np.float32)
    for layer in overlay.layers:
        table = np.zeros(256, dtype=bool)
        table[list(layer.values)] = True
        mask = table[labels]
        if not mask.any():
            continue
        if view.style == "outline":
            mask &= ~_eroded(mask)
        colour[mask] = _rgb(layer.colour)
        strength[mask] = view.opacity
    if not strength.any():
        return pixels
    mixed = pixels + strength * (colour - pixels)
    return np.asarray(np.rint(mixed), dtype=np.uint8)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """What is more than two pixels inside; the border of the picture counts as outside."""
    inner = np.pad(mask, 2)
    for _ in range(2):
        shrunk = inner.copy()
        shrunk[1:] &= inner[:-1]
        shrunk[:-1] &= inner[1:]
        shrunk[:, 1:] &= inner[:, :-1]
        shrunk[:, :-1] &= inner[:, 1:]
        inner = shrunk
    return inner[2:-2, 2:-2]


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


def _draw_crosshair(
    pen: ImageDraw.ImageDraw,
    image: LoadedVolume,
    voxel: tuple[int, int, int],
    plane: Plane,
    radiological: bool,
    size: tuple[int, int],
) -> None:
    """Thin lines through the voxel's centre, with a gap so that nothing there is hidden."""
    across, up = _axes(plane)
    x = (voxel[across] + 0.5) / image.shape[across]
    y = 1 - (voxel[up] + 0.5) / image.shape[up]
    left, top = (1 - x if _flipped(plane, radiological) else x) * size[0] - 0.5, y * size[1] - 0.5
    gap = max(5.0, 0.02 * max(size))
    for start, stop in (((0, top), (left - gap, top)), ((left + gap, top), (size[0] - 1, top))):
        if start[0] < stop[0]:
            pen.line((start, stop), fill=_CROSSHAIR)
    for start, stop in (((left, 0), (left, top - gap)), ((left, top + gap), (left, size[1] - 1))):
        if start[1] < stop[1]:
            pen.line((start, stop), fill=_CROSSHAIR)


def _draw_letters(pen: ImageDraw.ImageDraw, plane: Plane, radiological: bool, size: tuple[int, int]) -> None:
    left, right, top, bottom = _LETTERS[plane]
    if plane != "sagittal" and not radiological:
        left, right = right, left
    font = _font(max(12, round(0.045 * max(size))))
    wide, high = size
    places = ((4, high / 2, "lm", left), (wide - 4, high / 2, "rm", right))
    for x, y, anchor, letter in (*places, (wide / 2, 3, "mt", top), (wide / 2, high - 3, "mb", bottom)):
        pen.text((x, y), letter, font=font, anchor=anchor, fill="white", stroke_width=2, stroke_fill="black")


def _draw_synthetic(pen: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    font = _font(max(11, min(round(size[0] / 9), 40)))
    for y, anchor in ((4, "lt"), (size[1] - 4, "lb")):
        pen.text((4, y), "SYNTHETIC", font=font, anchor=anchor, fill="#F0E442", stroke_width=2, stroke_fill="black")


def _draw_notice(pen: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    points = 12.0
    while points > 6 and pen.textlength(NOT_FOR_CLINICAL_USE, font=_font(points)) > size[0] - 6:
        points -= 1
    pen.text((3, size[1] + _STRIP / 2), NOT_FOR_CLINICAL_USE, font=_font(points), anchor="lm", fill="#DDDDDD")


def _font(points: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def _png(picture: Image.Image, alt: str) -> bytes:
    told = PngInfo()
    told.add_itxt("Description", alt)
    told.add_text("Disclaimer", NOT_FOR_CLINICAL_USE)
    stream = io.BytesIO()
    picture.save(stream, "PNG", pnginfo=told, compress_level=1)
    return stream.getvalue()
