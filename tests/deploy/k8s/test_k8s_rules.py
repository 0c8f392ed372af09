"""Every rule holds in every overlay, and finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.deploy.k8s import (
    admission_rules,
    encryption_mutations,
    encryption_rules,
    monitor_rules,
    network_rules,
    platform_mutations,
    qdrant_rules,
    scheduling_rules,
    schema_rules,
    workload_mutations,
    workload_rules,
)
from tests.deploy.k8s.mutations import MUTATIONS, Mutation
from tests.deploy.k8s.rendering import OTHERWISE, OVERLAYS, Manifests, stack

Rule = Callable[[Manifests], Iterator[str]]
assert encryption_mutations and platform_mutations and workload_mutations, "they note themselves"
RULES: list[Rule] = [
    schema_rules.schema,
    schema_rules.unique,
    schema_rules.restricted,
    schema_rules.hardened,
    schema_rules.resources,
    schema_rules.secrets,
    network_rules.reachable,
    network_rules.closed,
    workload_rules.settings,
    workload_rules.configuration,
    workload_rules.listening,
    workload_rules.written,
    workload_rules.references,
    workload_rules.probes,
    workload_rules.grace,
    encryption_rules.mounted,
    encryption_rules.encrypted,
    monitor_rules.scraping,
    qdrant_rules.limits,
    admission_rules.signatures,
    scheduling_rules.gpus,
    scheduling_rules.rollouts,
    scheduling_rules.disruptions,
    scheduling_rules.spreading,
    scheduling_rules.autoscaling,
    scheduling_rules.priorities,
    scheduling_rules.queues,
    scheduling_rules.images,
    scheduling_rules.shards,
    scheduling_rules.handed_on,
    scheduling_rules.headless,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("overlay", [*OVERLAYS, OTHERWISE])
def test_the_overlays_keep_the_rule(overlay: str, rule: Rule) -> None:
    assert list(rule(stack(overlay))) == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_breaks_the_rule_is_found(mutation: Mutation) -> None:
    manifests = stack(mutation.overlay)
    mutation.change(manifests)
    (rule,) = (rule for rule in RULES if rule.__name__ == mutation.rule)
    assert list(rule(manifests)), f"{mutation.rule} does not see it"


def test_each_rule_has_something_that_breaks_it() -> None:
    assert {rule.__name__ for rule in RULES} == {mutation.rule for mutation in MUTATIONS}
