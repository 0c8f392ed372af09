"""Queries as the dashboards write them: what their variables leave of a metric, its rate, its percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.monitoring.dashboards.description import Query

WINDOW = "$__rate_interval"  # Grafana's: four scrapes or a step, whichever is longer
PERCENTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The series that a dashboard is about, by label matchers that hold its variables."""

    matchers: str

    def of(self, metric: str, *matchers: str) -> str:
        """An instant vector."""
        return f"{metric}{{{','.join((*matchers, self.matchers))}}}"

    def rate(self, counter: str, *matchers: str, by: Sequence[str] = (), window: str = WINDOW) -> str:
        """The rate of a counter, summed but for the labels `by`."""
        return f"sum{_by(by)}(rate({self.of(counter, *matchers)}[{window}]))"

    def total(self, gauge: str, *matchers: str, by: Sequence[str] = ()) -> str:
        """A gauge, summed but for the labels `by`."""
        return f"sum{_by(by)}({self.of(gauge, *matchers)})"

    def quantile(self, q: float, histogram: str, *matchers: str, by: Sequence[str] = ()) -> str:
        """A quantile of what was observed within the window."""
        return f"histogram_quantile({q:g}, {self.rate(f'{histogram}_bucket', *matchers, by=('le', *by))})"

    def percentiles(
        self,
        histogram: str,
        *matchers: str,
        by: Sequence[str] = (),
        legend: str = "",
        quantiles: Sequence[float] = PERCENTILES,
    ) -> tuple[Query, ...]:
        """A query a percentile, whose legends begin with the labels `by`."""
        first = legend or " ".join(f"{{{{{label}}}}}" for label in by)
        return tuple(
            Query(expr=self.quantile(q, histogram, *matchers, by=by), legend=f"{first} p{100 * q:g}".strip())
            for q in quantiles
        )

    def mean(self, histogram: str, *matchers: str, by: Sequence[str] = ()) -> str:
        """The mean of what was observed within the window; for shares of a whole, not for what callers wait."""
        sums = self.rate(f"{histogram}_sum", *matchers, by=by)
        return f"{sums} / {self.rate(f'{histogram}_count', *matchers, by=by)}"

    def heat(self, histogram: str, *matchers: str) -> tuple[Query, ...]:
        """Observations by bucket, for a heat map."""
        increase = f"increase({self.of(f'{histogram}_bucket', *matchers)}[{WINDOW}])"
        return (Query(expr=f"sum by (le)({increase})", legend="{{le}}"),)


def _by(labels: Sequence[str]) -> str:
    return f" by ({','.join(labels)})" if labels else ""
