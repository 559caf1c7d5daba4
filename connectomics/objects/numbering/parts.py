"""The objects of one range of keys: measured, selected, and numbered from the range's first object on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from connectomics.objects.merge import AT_ONCE, FIRST_ID
from connectomics.objects.numbering.cuts import Cuts
from connectomics.objects.numbering.ranges import KeyRanges, between
from connectomics.objects.pieces import PIECE, merged, together
from connectomics.objects.selection import Rule
from connectomics.volumes.volume import Array

Finish = Callable[[Array], None]
"""Changes ``PIECE`` rows of whole objects in place."""


def unchanged(rows: Array) -> None:
    """Leave rows as they are."""


def objects_of(
    cuts: Cuts, plan: KeyRanges, number: int, rule: Rule, *, finish: Finish = unchanged, at_once: int = AT_ONCE
) -> Mapping[str, Array]:
    """The objects of a range, for which nothing of other ranges is needed.

    Parameters
    ----------
    cuts
        The blocks.
    plan
        What ``prepare`` has left.
    number
        Of the range.
    rule
        Which objects stay; ``largest``, for which all objects are needed, is not looked at.
    finish
        Called with the rows of whole objects, to change what pieces cannot know.
    at_once
        Rows of pieces that follow others in memory at a time.

    Returns
    -------
    arrays
        ``rows``: ``PIECE`` [n] of the objects that stay, by key. ``numbers``: u8 [n], what is painted for them, where
        ids begin anew with ``FIRST_ID``. ``painted``: u8, the same for each piece of the range, 0 for those that are
        dropped or follow another. ``pieces``: i8 [blocks, 2], where these lie among all pieces: first and last + 1.
        ``found``: i8 [1], how many objects there are.
    """
    pieces, rows, keys, leads = _pieces_of(cuts, plan, number)
    objects, at = merged(rows, keys)
    del rows
    for nodes, leader_keys in plan.followers(number, at_once):
        more, of = merged(_rows_of(cuts, plan, nodes), np.searchsorted(at, leader_keys))
        objects[of] = together(objects[of], more)
    finish(objects)
    fits = rule.fits(objects)
    ids = np.arange(len(objects), dtype=np.uint64) + np.uint64(FIRST_ID)
    numbers = np.where(fits, rule.paint(objects, ids), np.uint64(0)).astype(np.uint64)
    painted = np.zeros(len(leads), np.uint64)
    painted[leads] = numbers[np.searchsorted(at, keys)]
    return {
        "rows": objects if fits.all() else objects[fits],
        "numbers": numbers[fits],
        "painted": painted,
        "pieces": pieces,
        "found": np.array([len(objects)]),
    }


def _pieces_of(cuts: Cuts, plan: KeyRanges, number: int) -> tuple[Array, Array, Array, Array]:
    """Where the pieces of a range lie, rows and keys of those that lead, and which of them do, bool [pieces]."""
    low, high = plan.keys(number)
    pieces, parts = [np.zeros((0, 2), np.int64)], [np.zeros(0, PIECE)]
    keys, leads = [np.zeros(0, np.uint64)], [np.zeros(0, np.bool_)]
    for block in plan.blocks(number):
        rows, first = cuts.rows(block), int(plan.offsets[block])
        within = between(rows.keys, low, high)
        lead = np.ones(within.stop - within.start, np.bool_)
        if plan.nodes is not None:
            following = plan.nodes.follow(block) - (first + within.start)
            lead[following[(following >= 0) & (following < len(lead))]] = False
        leading = within if lead.all() else within.start + np.flatnonzero(lead)
        pieces.append(np.array([[first + within.start, first + within.stop]]))
        parts.append(rows.take(leading))
        keys.append(np.array(rows.keys[leading]))
        leads.append(lead)
    return np.concatenate(pieces), np.concatenate(parts), np.concatenate(keys), np.concatenate(leads)


def _rows_of(cuts: Cuts, plan: KeyRanges, nodes: Array) -> Array:
    """Rows of the pieces of some nodes, which ascend; ``PIECE`` [n]."""
    assert plan.nodes is not None
    found = np.empty(len(nodes), PIECE)
    block = np.searchsorted(plan.nodes.offsets, nodes, "right") - 1
    edges = np.flatnonzero(np.diff(block, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges.tolist()):
        here = int(block[begin])
        places = plan.nodes.piece_of[nodes[begin:end]] - plan.offsets[here]
        found[begin:end] = cuts.rows(here).take(places)
    return found
