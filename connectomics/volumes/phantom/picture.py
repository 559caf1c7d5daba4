"""Grey values of the phantom: stains its shapes, then cuts, damages and records the section.

``phantom`` calls ``picture``; all is a function of seed and absolute voxel coordinates, whatever the tile.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from connectomics.volumes.phantom.shapes import (
    FAR,
    Floats,
    Mitochondria,
    Tile,
    hashed,
    mitochondria,
    neurites,
    noise,
    owner_of,
    ramp,
    sites_of,
    uniform,
    warp_of,
)

Damage = Literal["", "black", "fold", "faint"]


class Section(NamedTuple):
    """How one section was cut, stained and recorded."""

    damage: Damage
    gain: float
    offset: float
    grain: float  # standard deviation of the noise, grey values


def section(seed: int, z: int) -> Section:
    """About 2 % of the sections are damaged; the others differ in contrast, brightness and noise."""
    u = float(uniform(hashed(seed, "damage 1767", z))[0])  # 1767: seed 7 has each kind once in z < 64
    h = hashed(seed, "section", z)
    gain, offset, grain = (float(uniform(h, part)[0]) for part in range(3))
    if u < 0.005:
        return Section("black", 0.0, 0.0, 0.0)
    if u < 0.013:
        return Section("faint", 0.42, 20 + 20 * offset, 14.0)
    return Section("fold" if u < 0.02 else "", 0.9 + 0.3 * gain, -12 + 24 * offset, 8 + 5 * grain)


def picture(tile: Tile) -> npt.NDArray[np.uint8]:
    """Grey values of a tile; 0 only in black sections."""
    cut = section(tile.seed, tile.z)
    if cut.damage == "black":
        return np.zeros((len(tile.ys), len(tile.xs)), np.uint8)
    warp = warp_of(tile)
    value = _tissue(tile, warp)
    if cut.damage == "fold":
        value = _fold(tile, warp, value)
    light = noise(tile, "light", 600, 1) * 7
    value = (value - 128) * cut.gain + (128 + cut.offset) + light
    value += _grain(tile) * cut.grain
    return np.clip(np.rint(value), 1, 255).astype(np.uint8)


def _tissue(tile: Tile, warp: tuple[Floats, Floats]) -> Floats:
    """Grey values of undamaged tissue before the section's own contrast and noise."""
    sites, mitos = sites_of(tile), mitochondria(tile, warp)
    nearest, border = neurites(tile, warp, sites)
    owners = [owner_of(tile, c) for c in mitos.capsules]
    place = {key: n for n, key in enumerate(zip(sites.j.tolist(), sites.i.tolist(), strict=True))}
    owner = np.array([place.get(key, -1) for key in owners] + [-1])[mitos.bag_index]
    in_bag = mitos.bag < 0
    border = np.minimum(np.where(in_bag, FAR, border), np.where(owner == nearest, FAR, np.abs(mitos.bag)))
    j, i = np.concatenate([np.stack(sites[:2]), np.array(owners, np.int64).reshape(-1, 2).T], axis=1)
    cell = np.where(in_bag, len(sites.j) + mitos.bag_index, nearest)
    stain, crowd = (uniform(hashed(tile.seed, "cytoplasm", j, i), part) for part in range(2))

    patch = noise(tile, "patch", 60, 4)
    fine = noise(tile, "fine", 3, 1)
    dark = stain * stain * stain  # few neurites are dark
    value = (184 - 74 * dark * dark + 14 * (stain - 0.5))[cell]
    value += 13 * fine + 11 * noise(tile, "medium", 7, 1) + 7 * patch
    value = _reticulum(tile, warp, value, border)
    value = _vesicles(tile, value, (0.9 * crowd)[cell] + 0.6 * patch, border)
    width = 1.2 + ramp(patch, 0.35, 0.9) * 2 + ramp(warp[1], 4, 18) * 1.5
    value += (52 - value) * ramp(width - border, -1.3, 0.4)
    return _paint_mitochondria(tile, mitos, value, fine)


def _reticulum(tile: Tile, warp: tuple[Floats, Floats], value: Floats, border: Floats) -> Floats:
    """Thin dark cisternae: contour lines of a noise, where another noise allows them."""
    line = np.abs(noise(tile, "reticulum", 36, 5))
    allowed = ramp(warp[0], 5, 8) * ramp(border, 4, 8)
    return value - 52 * allowed * ramp(line, 0.06, 0.02)


def _vesicles(tile: Tile, value: Floats, crowd: Floats, border: Floats) -> Floats:
    """Synaptic vesicles, 40 to 50 nm: light discs with a dark rim, crowded where ``crowd`` is high."""
    p = 10
    jy = tile.ys // p
    rows = np.arange(jy[0], jy[-1] + 1)
    shift = (hashed(tile.seed, "vesicle row", tile.z, rows) % np.uint64(p)).astype(np.int64)[:, None]
    columns = np.arange(tile.xs[0] // p, tile.xs[-1] // p + 2)
    h = hashed(tile.seed, "vesicle", tile.z, rows[:, None], columns)
    jx = (tile.xs + shift) // p - columns[0]
    y, x, rank = (np.take_along_axis(uniform(h, part), jx, axis=1)[jy - jy[0]] for part in range(3))
    dy = (tile.ys % p).astype(np.float32)[:, None] - (3 + 4 * y)
    dx = ((tile.xs + shift) % p).astype(np.float32)[jy - jy[0]] - (3 + 4 * x)
    d = np.sqrt(dy * dy + dx * dx)
    present = ramp(crowd - rank, 0.2, 0.32) * ramp(border, 4.5, 6.5)
    return value + present * (20 * ramp(d, 1.6, 0.6) - 72 * ramp(np.abs(d - 2.3), 1.3, 0.4))


def _paint_mitochondria(tile: Tile, mitos: Mitochondria, value: Floats, fine: Floats) -> Floats:
    """Two dark membranes with a light gap, a darker matrix, and cristae across the long axis."""
    tint = np.array([*(c.matrix.tint for c in mitos.capsules), 0.0], np.float32)
    d = mitos.depth
    phase = mitos.along + 0.55 * noise(tile, "cristae", 16, 2)
    wave = np.abs(phase - np.floor(phase) - 0.5) * 2
    full = ramp(noise(tile, "cristae gaps", 20, 3), -0.55, -0.2) * ramp(d, -4, -7)
    matrix = (108 + 34 * tint)[mitos.at] + 12 * fine
    matrix += full * (26 * ramp(wave, 0.35, 0.15) - 38 * ramp(np.abs(wave - 0.5), 0.22, 0.08))
    matrix += 26 * ramp(np.abs(d + 3.2), 1.4, 0.4) - 45 * ramp(np.abs(d + 5), 1.6, 0.5)
    matrix += (50 - matrix) * ramp(d, -2.6, -1.6)
    return np.where(d < 0, matrix, value + (56 - value) * ramp(d, 1.2, 0.2))


def _fold(tile: Tile, warp: tuple[Floats, Floats], value: Floats) -> Floats:
    """A fold: a dark band across the section, every 1400 pixels or so."""
    bits = int(hashed(tile.seed, "fold", tile.z)[0])
    down, right, start = bits % 701 + 300, (bits >> 32) % 1001 - 500, bits >> 20  # normal in pixels / 1024
    period = 1400 * 1024
    across = (tile.ys[:, None] * down + tile.xs * right + start) % period - period // 2
    d = np.abs(across.astype(np.float32) * np.float32(1 / 1024) + 1.5 * warp[0])
    return value - 120 * ramp(d, 16, 9) - 25 * ramp(d, 45, 16)


def _grain(tile: Tile) -> Floats:
    """Noise of the camera: for each voxel the sum of four hashed bytes, mean 0, standard deviation 1."""
    rows = (hashed(tile.seed, "grain", tile.z, tile.ys) >> np.uint64(32)).astype(np.uint32)
    columns = (hashed(tile.seed, "grain column", tile.xs) >> np.uint64(32)).astype(np.uint32)
    h = rows[:, None] ^ columns
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(15)
    pairs = (h & np.uint32(0x00FF00FF)) + ((h >> np.uint32(8)) & np.uint32(0x00FF00FF))
    total = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    return (total.astype(np.float32) - 510) * np.float32(1 / 147.8)
