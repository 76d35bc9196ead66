"""Any set of metrics, base beside edited: single prompts, their means, and a plain-text table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxedit.evaluation.report import Summary, mean


@dataclasses.dataclass(frozen=True)
class Measured:
    """One metric at one prompt, for both models; None where it has no meaning for one of them.

    prompt, answer: what was asked and what was to be said; None where the metric is about a whole record.
    said: what the base and the edited model said, where they were let speak.
    """

    metric: str
    prompt: str | None
    answer: str | None
    base: float | None
    edited: float | None
    said: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class RecordScores:
    """All measurements of one record: `index` is its place in the list, `id` its own name."""

    index: int
    id: str | int | None
    measured: tuple[Measured, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`base` and `edited`: means by metric, between 0 and 1, None where nothing could be measured.

    counts: how many measurements stand behind each metric.
    """

    records: tuple[RecordScores, ...]
    base: Summary
    edited: Summary
    counts: dict[str, int]

    @classmethod
    def of(cls, records: Sequence[RecordScores], metrics: Sequence[str], pooled: Sequence[str] = ()) -> Comparison:
        """Means in float64 over the measurements of a record, then over the records that have any.

        metrics: their order. pooled: those whose mean is over all measurements at once.
        """
        sides: tuple[Summary, Summary] = ({}, {})
        counts = {}
        for metric in metrics:
            found = [[m for m in r.measured if m.metric == metric] for r in records]
            counts[metric] = sum(map(len, found))
            groups = [[m] for some in found for m in some] if metric in pooled else found
            for name, side in zip(("base", "edited"), sides, strict=True):
                known = [[x for m in some if (x := getattr(m, name)) is not None] for some in groups]
                side[metric] = mean([float(np.mean(some)) for some in known if some])
        return cls(tuple(records), *sides, counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The means in percent as aligned text, base beside edited, and the number of measurements."""
        rows = [("", "base", "edited", "count")]
        for metric, count in self.counts.items():
            base, edited = ("-" if x is None else f"{100 * x:.1f}" for x in (self.base[metric], self.edited[metric]))
            rows.append((metric.replace("_", " "), base, edited, str(count)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()
