"""Which processes the dashboard of one service is about: of a namespace, a job and an instance, all three to be chosen."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Variable
from deploy.monitoring.dashboards.promises import NAMESPACE
from deploy.monitoring.dashboards.promql import Selection

SELECTED = 'namespace=~"$namespace",job=~"$job"'
PROCESS = Selection(matchers=f'{SELECTED},instance=~"$instance"')


def process_variables(metric: str, described: str) -> tuple[Variable, ...]:
    """Namespace, job and instance; the latter two are found by a metric that no other service has.

    Args:
        described: what one instance is.
    """
    return (
        NAMESPACE,
        Variable(name="job", label="Job", metric=metric, described="What Prometheus calls it."),
        Variable(name="instance", label="Instance", metric=f"{metric}{{{SELECTED}}}", described=described),
    )


def and_own(metric: str) -> str:
    """Behind a query of what every process has: of all that are chosen (all jobs may be), the service's alone."""
    return f" and on(job,instance) {metric}"
