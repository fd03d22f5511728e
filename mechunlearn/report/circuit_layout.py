"""Where the nodes of a circuit are drawn, and which edges lead from the embedding to the answer."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_NODE = re.compile(r"(?P<part>[am])(?P<layer>\d+)(?:\.(?P<inner>[hgn])(?P<index>\d+))?")


@dataclass(frozen=True, kw_only=True)
class Edge:
    """What one node's output is worth to another that reads it."""

    writer: str
    reader: str
    value: float
    text: str
    """For the hover, escaped."""


def reader_node(reader: str) -> str:
    """The node a reader belongs to: a5.h2 for a5.h2.q; a5.g1 for keys and values that several heads share."""
    return re.sub(r"\.[qkv]$", "", reader)


def paths(edges: Sequence[Edge]) -> list[Edge]:
    """The edges on a path from the embedding to the answer.

    Keys and values that heads share (a5.g1) lead on to each head of their layer: which ones share them is not told by
    the names.
    """
    follows: dict[str, set[str]] = {}
    for edge in edges:
        follows.setdefault(edge.writer, set()).add(edge.reader)
    for group in {edge.reader for edge in edges if ".g" in edge.reader}:
        layer = group.partition(".")[0] + ".h"
        follows[group] = {edge.writer for edge in edges if edge.writer.startswith(layer)}
    before: dict[str, set[str]] = {}
    for writer, readers in follows.items():
        for reader in readers:
            before.setdefault(reader, set()).add(writer)
    reached, leading = _closure("embed", follows), _closure("logits", before)
    return [edge for edge in edges if edge.writer in reached and edge.reader in leading]


def _closure(start: str, following: dict[str, set[str]]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        new = following.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def places(nodes: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Where to draw every node (x, y): by layer upwards, attention below the MLP; heads left, MLPs right.

    Raises:
        ValueError: a node of an unknown form.
    """
    rows: dict[tuple[int, str], list[tuple[str, int, str]]] = {}
    ends: set[str] = set()
    for node in dict.fromkeys(nodes):  # a set would draw them in another order each time
        if node in ("embed", "logits"):
            ends.add(node)
            continue
        found = _NODE.fullmatch(node)
        if not found:
            raise ValueError(f"circuit: got node {node!r}, allowed: embed, logits, m3, a5, a5.h2, a5.g1, m3.n117")
        key = int(found["layer"]), found["part"]
        rows.setdefault(key, []).append((found["inner"] or "", int(found["index"] or 0), node))
    at: dict[str, tuple[float, float]] = {}
    for (layer, part), members in rows.items():
        y, side = (2 * layer + 1, -1) if part == "a" else (2 * layer + 2, 1)
        for i, (_, _, node) in enumerate(sorted(members, reverse=part == "a")):
            at[node] = (side * (1.0 + i), float(y))
    top = max([layer for layer, _ in rows], default=0)
    at |= {"embed": (0.0, 0.0)} if "embed" in ends else {}
    return at | ({"logits": (0.0, 2.0 * top + 3)} if "logits" in ends else {})


def between(start: tuple[float, float], end: tuple[float, float]) -> tuple[list[float], list[float]]:
    """A curve from node to node; a straight line through others would look like an edge to them."""
    (x0, y0), (x1, y1) = start, end
    bow = 0.16 * (y1 - y0) * (1 if x0 + x1 >= 0 else -1) if y1 - y0 > 1 else 0.0
    t = np.linspace(0, 1, 15)
    middle = ((x0 + x1) / 2 + bow, (y0 + y1) / 2)
    x = (1 - t) ** 2 * x0 + 2 * t * (1 - t) * middle[0] + t**2 * x1
    y = (1 - t) ** 2 * y0 + 2 * t * (1 - t) * middle[1] + t**2 * y1
    return x.tolist(), y.tolist()
