"""The objects of one range of keys: measured, selected, and numbered from the range's first object on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from connectomics.objects.arrays import view
from connectomics.objects.merge import AT_ONCE, FIRST_ID, Cuts
from connectomics.objects.numbering.ranges import KeyRanges, between, key_name
from connectomics.objects.pieces import PIECE, merged, together
from connectomics.objects.selection import Rule
from connectomics.volumes.volume import Array


def objects_of(cuts: Cuts, plan: KeyRanges, number: int, rule: Rule, at_once: int = AT_ONCE) -> Mapping[str, Array]:
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
    pieces, rows, leads = _pieces_of(cuts, plan, number)
    keys = rows[key_name(cuts)].copy()
    objects, at = merged(rows, keys)
    del rows
    for nodes, leader_keys in plan.followers(number, at_once):
        more, of = merged(_rows_of(cuts, plan, nodes), np.searchsorted(at, leader_keys))
        objects[of] = together(objects[of], more)
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


def _pieces_of(cuts: Cuts, plan: KeyRanges, number: int) -> tuple[Array, Array, Array]:
    """Where the pieces of a range lie, the rows of those that lead, and which of them do, bool [pieces]."""
    low, high = plan.keys(number)
    pieces, parts, leads = [np.zeros((0, 2), np.int64)], [np.zeros(0, PIECE)], [np.zeros(0, np.bool_)]
    for block in plan.blocks(number):
        rows, first = view(cuts.pieces(block), "rows"), int(plan.offsets[block])
        within = between(rows[key_name(cuts)], low, high)
        own = np.array(rows[within])
        lead = np.ones(len(own), np.bool_)
        if plan.nodes is not None:
            following = plan.nodes.follow(block) - (first + within.start)
            lead[following[(following >= 0) & (following < len(own))]] = False
        pieces.append(np.array([[first + within.start, first + within.stop]]))
        parts.append(own if lead.all() else own[lead])
        leads.append(lead)
    return np.concatenate(pieces), np.concatenate(parts), np.concatenate(leads)


def _rows_of(cuts: Cuts, plan: KeyRanges, nodes: Array) -> Array:
    """Rows of the pieces of some nodes, which ascend; ``PIECE`` [n]."""
    assert plan.nodes is not None
    found = np.empty(len(nodes), PIECE)
    block = np.searchsorted(plan.nodes.offsets, nodes, "right") - 1
    edges = np.flatnonzero(np.diff(block, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges.tolist()):
        here = int(block[begin])
        places = plan.nodes.piece_of[nodes[begin:end]] - plan.offsets[here]
        found[begin:end] = view(cuts.pieces(here), "rows")[places]
    return found
