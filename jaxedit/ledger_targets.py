"""What a ledger keeps of its edits' targets, and how it tells the statistics that it is solved with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxedit.config import BackwardSpread, Method, PerLayer
from jaxedit.models.fingerprint import matrix_hash
from jaxedit.models.transformer import Decoder
from jaxedit.statistics import SecondMoments
from jaxedit.targets.anchor import Anchors
from jaxedit.targets.strategies import Targets


def identity(stats: SecondMoments | None, method: Method, base: Decoder) -> dict[str, Any] | None:
    """What tells second moments at the method's layers from others: where they come from, if they say so, or else
    hashes of the matrices. None for the default ones.

    Raises StatisticsError where they do not fit the model or lack a layer.
    """
    if stats is None:
        return None
    stats.check(base)
    counts = {str(l): stats[l].count for l in method.layers}
    about = {name: value for name, value in stats.about.items() if name != "implementation"}
    if about and stats.fingerprint is not None:
        found = {"counts": counts, "fingerprint": stats.fingerprint, "about": about}
    else:
        found = {"counts": counts, "hashes": {str(l): matrix_hash(stats[l].matrix) for l in method.layers}}
    return json.loads(json.dumps(found, default=str))


def statistics_named(statistics: Mapping[str, Any] | None) -> str:
    if statistics is None:
        return "the default ones, of the packaged corpus"
    corpus = statistics.get("about", {}).get("corpus")
    counts = ", ".join(str(n) for n in sorted(set(statistics["counts"].values())))
    return f"over {counts} tokens" + (f" of the corpus with hash {corpus}" if corpus else "")


def own_layers(method: Method) -> tuple[int, ...]:
    """The layers whose targets have to be kept, as they are made of the edit alone and not of other targets."""
    if method.at_once is not None:  # anchors are found on the model as edited so far
        return ()
    match method.targets:
        case PerLayer():
            return method.layers[:1]
        case BackwardSpread():
            return method.layers[-1:]
        case _:
            return method.layers


def to_arrays(targets: Targets) -> dict[str, np.ndarray]:
    """Targets as arrays that have the edit as their first axis."""
    arrays = {"values": np.moveaxis(np.asarray(targets.values), 0, 1)}
    if targets.keys is not None:
        arrays["keys"] = np.moveaxis(np.asarray(targets.keys), 0, 1)
    if targets.lookup is not None:
        arrays["lookup"] = np.asarray(targets.lookup)
    n = len(arrays["values"])
    for l, anchors in targets.anchors.items():
        for name, x in anchors._asdict().items():
            arrays[f"anchors.{l}.{name}"] = np.full(n, x) if np.ndim(x) == 0 else np.asarray(x)
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray], layers: tuple[int, ...]) -> Targets:
    """The targets again; the padding of anchors found in several calls is their mean."""
    fields: dict[int, dict[str, Any]] = {}
    for name, x in arrays.items():
        if name.startswith("anchors."):
            _, l, field = name.split(".")
            fields.setdefault(int(l), {})[field] = float(x.mean()) if field == "padding" else x
    keys = np.moveaxis(arrays["keys"], 1, 0) if "keys" in arrays else None
    anchors = {l: Anchors(**found) for l, found in fields.items()}
    return Targets(layers, np.moveaxis(arrays["values"], 1, 0), arrays.get("lookup"), anchors, keys)
