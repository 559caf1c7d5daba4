"""Shapes of the phantom's tissue: hashed noise, mitochondria and neurites, drawn on one tile of one section.

All is a function of seed and absolute voxel coordinates, whatever the tile; ``phantom_picture`` and
``phantom`` call it. Lengths are pixels of 8 nm, along z too, unless they say sections.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from connectomics.core.geometry import Vec3, vec3
from connectomics.volumes.volume import Nanometres

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

VOXEL_SIZE_NM: Nanometres = (30.0, 8.0, 8.0)
Z_PER_PIXEL = VOXEL_SIZE_NM[0] / VOXEL_SIZE_NM[1]
MITO_CELL = (36, 112, 164)  # lattice cells (sections, pixels, pixels); each holds at most one mitochondrion
WARP = ((16.0, 170, 26), (3.5, 34, 9))  # bends all shapes: amplitude and pitch in pixels, pitch in sections
WARP_MAX = 20  # at least the sum of the amplitudes
BAG_MAX = 36  # pixels of cytoplasm around a mitochondrion, at most
SITE_PITCH = 60  # pixels between the lattice points of the neurites
SITE_REACH = 150  # pixels around a lattice point in which its neurite may lie
FAR = 1e4

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Tile(NamedTuple):
    """A rectangle of one section: absolute section number, rows and columns (increasing int64)."""

    seed: int
    z: int
    ys: Ints
    xs: Ints


# --- hashing and noise


def _mix(h: Hashes) -> Hashes:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def hashed(seed: int, stream: str, *coordinates: Ints | int) -> Hashes:
    """64 random bits for each lattice point; ``stream`` names what they are for. At least one-dimensional."""
    start = (seed * _GOLDEN + int.from_bytes(stream.encode()) * 0xD1342543DE82EF95) & _MASK
    h = _mix(np.array([start], np.uint64))
    for c in coordinates:
        points = np.asarray([c] if isinstance(c, int) else c, np.int64).view(np.uint64)
        h = _mix(h + points * np.uint64(_GOLDEN))
    return h


def uniform(h: Hashes, part: int = 0) -> Floats:
    """One of three independent numbers in [0, 1) from each hash (``part`` 0, 1 or 2)."""
    bits = (h >> np.uint64(21 * part)) & np.uint64(2**21 - 1)
    return bits.astype(np.float32) * np.float32(2.0**-21)


def _smooth(t: Any) -> Any:
    """Cubic step from 0 at 0 to 1 at 1."""
    return t * t * (3 - 2 * t)


def ramp(values: Floats, zero: float, one: float) -> Floats:
    """Linear from 0 at ``zero`` to 1 at ``one``, clipped."""
    scaled: Floats = np.clip((values - zero) * (1.0 / (one - zero)), 0, 1)
    return scaled


def noise(tile: Tile, stream: str, pitch: int, z_pitch: int) -> Floats:
    """Value noise in [-1, 1]: random numbers at lattice points, interpolated with cubic steps."""

    def plane(k: int) -> Floats:
        return 2 * uniform(hashed(tile.seed, stream, k, rows[:, None], columns)) - 1

    jy, jx = tile.ys // pitch, tile.xs // pitch
    ty, tx = (_smooth((v % pitch).astype(np.float32) * np.float32(1 / pitch)) for v in (tile.ys, tile.xs))
    rows, columns = np.arange(jy[0], jy[-1] + 2), np.arange(jx[0], jx[-1] + 2)
    k, rest = divmod(tile.z, z_pitch)
    lattice = plane(k)
    if rest:
        lattice = lattice + (plane(k + 1) - lattice) * np.float32(_smooth(rest / z_pitch))
    near = lattice[jy - jy[0]]
    lines = near + (lattice[jy - jy[0] + 1] - near) * ty[:, None]
    slope = lines[:, 1:] - lines[:, :-1]
    jx -= jx[0]
    return cast(Floats, lines.take(jx, axis=1) + slope.take(jx, axis=1) * tx)


def warp_of(tile: Tile) -> tuple[Floats, Floats]:
    """Displacement (y, x) in pixels, below WARP_MAX; its slopes stay below 0.6, so it tears no shape."""
    y, x = (
        sum((a * noise(tile, f"warp {axis}{i}", p, zp) for i, (a, p, zp) in enumerate(WARP)), np.float32(0))
        for axis in "yx"
    )
    return cast(Floats, y), cast(Floats, x)


# --- mitochondria


class Matrix(NamedTuple):
    """What fills a mitochondrion: its tint, and the pixels between its cristae."""

    tint: float
    period: float


class Capsule(NamedTuple):
    """A mitochondrion: all points within ``radius`` of a segment, in its own lattice cell (pixels)."""

    cell: Vec3
    start: tuple[float, float, float]  # z from the top of the lattice cell, y, x absolute
    step: tuple[float, float, float]  # from one end to the other
    radius: float
    waist: float  # how much thinner it is in the middle, share of the radius
    bag: float  # cytoplasm around it before the next membrane
    depth: float  # z of this section from the top of the lattice cell
    matrix: Matrix


class Mitochondria(NamedTuple):
    """The mitochondria of a tile; ``at`` is -1 outside them, else a position in the tuples."""

    capsules: tuple[Capsule, ...]
    at: npt.NDArray[np.int32]
    depth: Floats  # signed distance to the nearest surface in pixels, negative inside
    bag: Floats  # signed distance to the nearest cytoplasm bag
    bag_index: npt.NDArray[np.int32]
    along: Floats  # cristae phase, valid inside

    def ids(self) -> npt.NDArray[np.uint64]:
        """Id of the mitochondrion at each pixel, 0 outside."""
        return np.array([*(_lattice_id(c.cell) for c in self.capsules), 0], np.uint64)[self.at]


def _lattice_id(index: Vec3) -> int:
    """Id of the mitochondrion in a lattice cell, 1 + the interleaved bits of (z, y, x), in any volume."""
    code = 0
    for axis, value in enumerate(reversed(index)):
        for bit in range(18):
            code |= ((value + 2) >> bit & 1) << (3 * bit + axis)
    return code + 1


def id_dtype(extent: Vec3) -> np.dtype[Any]:
    """The smaller of uint32 and uint64 that holds any id of a volume (a lattice cell with all bits set)."""
    last = [(n + WARP_MAX) // c + 2 for n, c in zip(extent, MITO_CELL, strict=True)]
    largest = _lattice_id(vec3([2 ** n.bit_length() - 3 for n in last]))
    return np.dtype(np.uint32 if largest < 2**32 else np.uint64)


def _row_shift(seed: int, j: int) -> int:
    """Pixels by which a row of lattice cells is moved along x."""
    return int(hashed(seed, "mito row", j)[0] % np.uint64(MITO_CELL[2]))


def _capsule(seed: int, index: Vec3, depth: float) -> Capsule | None:
    """The mitochondrion of a lattice cell, if it has one."""
    k, j, i = index
    h = hashed(seed, "mito", k, j, i, np.arange(5))
    u = np.concatenate([uniform(h, part) for part in range(3)]).tolist()
    if u[0] > 0.88:
        return None
    radius = 14 + 18 * u[1]
    sizes = (MITO_CELL[0] * Z_PER_PIXEL, MITO_CELL[1], MITO_CELL[2])
    corner = (0, j * MITO_CELL[1], i * MITO_CELL[2] + _row_shift(seed, j))
    lowest = [c + radius + 3 for c in corner]
    free = [size - 2 * (radius + 3) for size in sizes]
    az, ay, ax = (low + f * v for low, f, v in zip(lowest, free, u[3:6], strict=True))
    bz, by, bx = (low + f * v for low, f, v in zip(lowest, free, u[6:9], strict=True))
    bag = 6 + (BAG_MAX - 8) * u[10] * u[10]
    step = (bz - az, by - ay, bx - ax)
    length = math.sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2])
    waist = min(0.3 * u[9], 0.15 * length / radius)  # no notches in short ones
    matrix = Matrix(u[11], 8 + 4 * u[12])
    return Capsule(index, (az, ay, ax), step, radius, waist=waist, bag=bag, depth=depth, matrix=matrix)


def _reaches(mito: Capsule) -> bool:
    """Whether its bag, or the neighbourhood of that, reaches into the section."""
    ends = (mito.start[0], mito.start[0] + mito.step[0])
    reach = mito.radius + mito.bag + 10
    return min(ends) - reach < mito.depth < max(ends) + reach


def _capsules(tile: Tile) -> list[Capsule]:
    """The mitochondria whose bag may reach into a tile, in raster order of their lattice cells."""
    nz, ny, nx = MITO_CELL
    reach = WARP_MAX + BAG_MAX
    found = []
    for j in range(int(tile.ys[0] - reach) // ny, int(tile.ys[-1] + reach) // ny + 1):
        shift = _row_shift(tile.seed, j)
        for i in range(int(tile.xs[0] - reach - shift) // nx, int(tile.xs[-1] + reach - shift) // nx + 1):
            offset = int(hashed(tile.seed, "mito column", j, i)[0] % np.uint64(nz))
            k, rest = divmod(tile.z - offset, nz)
            mito = _capsule(tile.seed, (k, j, i), rest * Z_PER_PIXEL)
            if mito is not None and _reaches(mito):
                found.append(mito)
    return found


def _window(values: Ints, low: float, high: float) -> slice:
    """The part of increasing ``values`` from ``low`` to ``high``."""
    return slice(int(np.searchsorted(values, low)), int(np.searchsorted(values, high, side="right")))


def mitochondria(tile: Tile, warp: tuple[Floats, Floats]) -> Mitochondria:
    """Draw the mitochondria of a tile."""
    shape = (len(tile.ys), len(tile.xs))
    capsules = tuple(_capsules(tile))
    index, bag_index = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    depth, bag, along = (np.full(shape, value, np.float32) for value in (FAR, FAR, 0))
    for n, c in enumerate(capsules):
        (az, ay, ax), (bz, by, bx) = c.start, c.step
        reach = c.radius + c.bag + WARP_MAX + 2
        part = (
            _window(tile.ys, ay + min(by, 0) - reach, ay + max(by, 0) + reach),
            _window(tile.xs, ax + min(bx, 0) - reach, ax + max(bx, 0) + reach),
        )
        dz = c.depth - az
        dy = (tile.ys[part[0]] - ay).astype(np.float32)[:, None] + warp[0][part]
        dx = (tile.xs[part[1]] - ax).astype(np.float32) + warp[1][part]
        t = np.clip((dy * by + dx * bx + dz * bz) * (1 / max(bz * bz + by * by + bx * bx, 1.0)), 0, 1)
        ey, ex, ez = dy - t * by, dx - t * bx, dz - t * bz
        square = ey * ey + ex * ex
        to_axis = np.sqrt(square + ez * ez)
        d = to_axis - c.radius * (1 - c.waist * 4 * t * (1 - t))
        inside = d < 0
        index[part][inside] = n
        np.minimum(depth[part], d, out=depth[part])
        flat = np.maximum(np.sqrt(square), np.maximum(0.3 * to_axis, 1e-3))
        d = (d - c.bag) * to_axis / flat  # measured in the plane of the section
        nearer = d < bag[part]
        bag[part][nearer] = d[nearer]
        bag_index[part][nearer] = n
        length = math.sqrt(max(by * by + bx * bx, 1.0)) * c.matrix.period
        along[part][inside] = (dy * (by / length) + dx * (bx / length))[inside]
    return Mitochondria(capsules, index, depth, bag, bag_index=bag_index, along=along)


# --- neurites


class Sites(NamedTuple):
    """The neurites that may reach into a tile: sites of a power diagram that drift along z."""

    j: Ints
    i: Ints
    y: npt.NDArray[np.float64]
    x: npt.NDArray[np.float64]
    weight: Floats  # square pixels


def sites_of(tile: Tile) -> Sites:
    """The neurites of a tile, in raster order of their lattice points."""
    p, reach = SITE_PITCH, SITE_REACH
    rows = np.arange((tile.ys[0] - reach - p // 2) // p, (tile.ys[-1] + reach - p // 2) // p + 1)
    columns = np.arange((tile.xs[0] - reach - p // 2) // p, (tile.xs[-1] + reach - p // 2) // p + 1)
    j, i = (v.ravel() for v in np.meshgrid(rows, columns, indexing="ij"))
    k, rest = divmod(tile.z, 30)
    now, later = (hashed(tile.seed, "site drift", k + step, j, i) for step in (0, 1))
    t = np.float32(_smooth(rest / 30))
    drift = [uniform(now, part) + (uniform(later, part) - uniform(now, part)) * t for part in range(3)]
    h = hashed(tile.seed, "site", j, i)
    y, x = (
        (lattice + 0.5) * p + (uniform(h, part) - 0.5) * 52.0 + (drift[part] - 0.5) * 32.0
        for part, lattice in enumerate((j, i))
    )
    size = uniform(h, 2) * uniform(h, 2)
    weight = 7500 * size * size * (0.7 + 0.3 * drift[2])
    return Sites(j, i, y, x, weight=weight.astype(np.float32))


def neurites(tile: Tile, warp: tuple[Floats, Floats], sites: Sites) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return for each pixel its neurite (position in ``sites``) and the distance to the nearest border in pixels.

    Both nearest sites are found as minima of integers that carry the site in their last 8 bits, so the order
    of drawing does not matter. Neurites bend more than mitochondria: nothing depends on their topology.
    """
    bend = (6.8 * warp[0], 6.8 * warp[1])  # quarters of a pixel, so the squares below are sixteenths
    first, second = (np.full((len(tile.ys), len(tile.xs)), 2**31 - 1, np.int32) for _ in range(2))
    for n, (j, i, y, x, weight) in enumerate(zip(*sites, strict=True)):
        cy, cx = ((int(v) * SITE_PITCH + SITE_PITCH // 2) for v in (j, i))
        part = (_window(tile.ys, cy - SITE_REACH, cy + SITE_REACH), _window(tile.xs, cx - SITE_REACH, cx + SITE_REACH))
        dy = (4 * (tile.ys[part[0]] - y)).astype(np.float32)[:, None] + bend[0][part]
        dx = (4 * (tile.xs[part[1]] - x)).astype(np.float32) + bend[1][part]
        dy *= dy
        dx *= dx
        dy += dx
        power = dy.astype(np.int32)
        power *= 256
        power += n - 256 * int(16 * weight)
        np.minimum(second[part], np.maximum(first[part], power), out=second[part])
        np.minimum(first[part], power, out=first[part])
    gap = np.sqrt((sites.y[:, None] - sites.y) ** 2 + (sites.x[:, None] - sites.x) ** 2).astype(np.float32)
    scale = np.zeros((256, 256), np.float32)
    scale[: len(gap), : len(gap)] = 1 / (32 * np.maximum(gap, 1))
    nearest = first & 255
    border = ((second >> 8) - (first >> 8)).astype(np.float32) * scale.ravel()[nearest * 256 + (second & 255)]
    return nearest, border


def owner_of(tile: Tile, mito: Capsule) -> tuple[int, int]:
    """Lattice position (j, i) of the neurite in which a mitochondrion lies in this section."""
    bz = mito.step[0]
    t = min(max((mito.depth - mito.start[0]) / bz, 0.0), 1.0) if bz else 0.5
    y, x = (mito.start[axis] + t * mito.step[axis] for axis in (1, 2))
    sites = sites_of(Tile(tile.seed, tile.z, np.array([int(y)]), np.array([int(x)])))
    n = int(np.argmin((sites.y - y) ** 2 + (sites.x - x) ** 2 - sites.weight))
    return int(sites.j[n]), int(sites.i[n])
