"""The first dashboard to open: are the promises kept, is there room, is everything there."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Source, Step, Unit
from deploy.monitoring.dashboards.promises import (
    ALL,
    BURN_ALERTS,
    CALLS,
    FASTEST,
    LOOKED_UP,
    LOOKUPS,
    NAMESPACE,
    ORDER_TIME,
    ORDERS,
    burns,
    kept,
    target,
)
from deploy.monitoring.dashboards.promql import WINDOW


def _objective(title: str, slo: str, described: str) -> Panel:
    wanted = target(slo)
    return Panel(
        title=title,
        description=f"{described} Over the time shown; promised: {wanted:.1%}. 100 % where nothing was asked for.",
        kind=Kind.STAT,
        unit=Unit.RATIO,
        width=6,
        queries=(Query(expr=kept(slo, "$__range"), legend="kept"),),
        steps=(Step(value=1 - 2 * (1 - wanted), color=Color.ORANGE), Step(value=wanted, color=Color.GREEN)),
        alerts=BURN_ALERTS,
    )


PROMISES = Row(
    title="Promises",
    panels=(
        _objective(
            "Drawn",
            "generator-availability",
            "Share of the orders that were drawn; wrong and cancelled ones, and deadlines that nobody could meet, left out.",
        ),
        _objective(
            "Drawn in time",
            "generator-latency",
            "Share of the orders drawn that took no longer than four times what they take with nobody beside them.",
        ),
        _objective("Looked up", "retrieval-availability", "Share of the lookups that were answered."),
        _objective("Looked up in time", "retrieval-latency", "Share of the lookups answered within 0.1 s."),
        Panel(
            title="Alerts firing",
            description="Of all severities, but for the heartbeat that always fires.",
            kind=Kind.STAT,
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(expr='count(ALERTS{alertstate="firing",alertname!="Heartbeat"}) or vector(0)', legend="firing"),
            ),
            steps=(Step(value=1, color=Color.RED),),
        ),
        Panel(
            title="Targets down",
            description="Processes of the stack that Prometheus knows and cannot read. Their figures stand still.",
            kind=Kind.STAT,
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(
                    expr='count(up{job=~"retrieval|generator|triton|trainer|qdrant",namespace=~"$namespace"} == 0)'
                    " or vector(0)",
                    legend="down",
                ),
            ),
            steps=(Step(value=1, color=Color.RED),),
            alerts=("ServiceDown", "TargetDown"),
        ),
        Panel(
            title="Canaries failing",
            description="Models of Tritons whose canary does not pass; no request is sent there until one does.",
            kind=Kind.STAT,
            unit=Unit.COUNT,
            width=6,
            queries=(Query(expr=f"count({ALL.of('reimagen_canary_success')} == 0) or vector(0)", legend="failing"),),
            steps=(Step(value=1, color=Color.RED),),
            alerts=("CanaryFailing",),
        ),
        Panel(
            title="Pictures",
            description="Finished in the time shown, of all sizes.",
            kind=Kind.STAT,
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(
                    expr=f"sum(increase({ALL.of('reimagen_generator_pictures_total')}[$__range]))", legend="pictures"
                ),
            ),
        ),
    ),
)

TRAFFIC = Row(
    title="Traffic",
    panels=(
        Panel(
            title="Orders by outcome",
            description="Orders of pictures that have ended. rejected is a refusal for want of room; too_short one at once,"
            " since the caller's deadline could not be met; deadline and error are broken promises.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(Query(expr=ALL.rate(ORDERS, by=("outcome",)), legend="{{outcome}}"),),
            alerts=BURN_ALERTS,
        ),
        Panel(
            title="Time of an order",
            description="From its arrival to its pictures, waiting included, over all sizes and steps that were asked for.",
            unit=Unit.SECONDS,
            queries=ALL.percentiles(ORDER_TIME, 'outcome="ok"'),
        ),
        Panel(
            title="Burn of the error budgets",
            description="How many times faster than allowed errors come: 1 uses up the budget in just 30 days,"
            f" {FASTEST.rate:g} takes {FASTEST.spent}, and pages. Recorded by the rules, by promise.",
            unit=Unit.NUMBER,
            queries=burns(),
            steps=(Step(value=1, color=Color.ORANGE), Step(value=FASTEST.rate, color=Color.RED)),
            alerts=BURN_ALERTS,
        ),
        Panel(
            title="Lookups by outcome",
            description="The generator's are among them: one an order. shortfall: fewer pairs than asked for; degraded: one"
            " leg answered alone.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(Query(expr=ALL.rate(LOOKUPS, by=("outcome",)), legend="{{outcome}}"),),
            alerts=BURN_ALERTS,
        ),
        Panel(
            title="Time of lookups",
            description="From a call's arrival to its status, of calls that were answered; 99 % within 0.1 s is promised.",
            unit=Unit.SECONDS,
            queries=ALL.percentiles(CALLS, LOOKED_UP, 'grpc_status="OK"'),
            steps=(Step(value=0.1, color=Color.RED),),
        ),
        Panel(
            title="Pictures by size",
            description="Finished pictures a second.",
            kind=Kind.STACKED,
            unit=Unit.PER_SECOND,
            queries=(Query(expr=ALL.rate("reimagen_generator_pictures_total", by=("size",)), legend="{{size}} px"),),
        ),
    ),
)

ROOM = Row(
    title="Room",
    panels=(
        Panel(
            title="Drawn at once, waiting, and room",
            description="Requests of all generators. At the line of room every new one waits; when the queue is full it is"
            " refused.",
            unit=Unit.COUNT,
            queries=(
                Query(expr=ALL.total("reimagen_generator_in_flight_requests"), legend="being drawn"),
                Query(expr=ALL.total("reimagen_generator_queue_depth"), legend="waiting"),
                Query(expr=ALL.total("reimagen_generator_admission_capacity"), legend="room"),
            ),
            alerts=("GeneratorSaturated",),
        ),
        Panel(
            title="Refused",
            description="Requests that were turned away at once, by reason: no room in the queue, a deadline too short"
            " to be met or passed in the queue, a process that ends.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(Query(expr=ALL.rate("reimagen_generator_refused_total", by=("reason",)), legend="{{reason}}"),),
            alerts=("GeneratorRefusals", "GeneratorQueueFull"),
        ),
        Panel(
            title="Drawn without neighbors",
            description="Orders that were drawn although retrieval, or a leg of it, failed: the picture comes, but less was"
            " looked up, or nothing.",
            unit=Unit.PER_SECOND,
            queries=(Query(expr=ALL.rate("reimagen_generator_degraded_total", by=("reason",)), legend="{{reason}}"),),
            alerts=("PicturesWithoutNeighbors",),
        ),
    ),
)

PROCESSES = Row(
    title="Processes",
    panels=(
        Panel(
            title="Up",
            description="1 where Prometheus reads a process's figures.",
            unit=Unit.COUNT,
            top=1,
            queries=(
                Query(
                    expr='min by (job,instance)(up{job=~"retrieval|generator|triton|trainer|qdrant",'
                    'namespace=~"$namespace"})',
                    legend="{{job}} {{instance}}",
                ),
            ),
            alerts=("ServiceDown", "TargetDown"),
        ),
        Panel(
            title="Memory",
            description="Resident memory of each of our processes. What only grows will be killed at its limit.",
            unit=Unit.BYTES,
            queries=(
                Query(
                    expr=f"{ALL.of('process_resident_memory_bytes')}"
                    f" and on(job,instance) {ALL.of('reimagen_build_info')}",
                    legend="{{job}} {{instance}}",
                ),
            ),
        ),
        Panel(
            title="Processor",
            description="Cores that each of our processes keeps busy.",
            unit=Unit.CORES,
            queries=(
                Query(
                    expr=f"rate({ALL.of('process_cpu_seconds_total')}[{WINDOW}])"
                    f" and on(job,instance) {ALL.of('reimagen_build_info')}",
                    legend="{{job}} {{instance}}",
                ),
            ),
        ),
        Panel(
            title="Versions",
            description="Processes by service, version and revision. During a rollout there are two of a service.",
            unit=Unit.COUNT,
            width=12,
            queries=(
                Query(
                    expr=f"count by (service,version,revision)({ALL.of('reimagen_build_info')})",
                    legend="{{service}} {{version}} {{revision}}",
                ),
            ),
        ),
        Panel(
            title="Started",
            description="How long each of our processes has run; a saw's teeth are restarts.",
            unit=Unit.SECONDS,
            width=12,
            queries=(
                Query(
                    expr=f"time() - {ALL.of('process_start_time_seconds')}"
                    f" and on(job,instance) {ALL.of('reimagen_build_info')}",
                    legend="{{job}} {{instance}}",
                ),
            ),
        ),
    ),
)

CLUSTER = Row(
    title="Kubernetes",
    panels=(
        Panel(
            title="Replicas missing",
            description="Pods of a Deployment that are wanted and not available.",
            unit=Unit.COUNT,
            width=6,
            source=Source.KUBERNETES,
            queries=(
                Query(
                    expr=f"{ALL.of('kube_deployment_spec_replicas')}"
                    f" - on(namespace,deployment) {ALL.of('kube_deployment_status_replicas_available')}",
                    legend="{{deployment}}",
                ),
            ),
            steps=(Step(value=1, color=Color.RED),),
        ),
        Panel(
            title="Restarts of containers",
            description="In ten minutes. Triton's container is restarted when its canary fails.",
            unit=Unit.COUNT,
            width=6,
            source=Source.KUBERNETES,
            alerts=("PodRestarts",),
            queries=(
                Query(
                    expr=f"sum by (container)(increase({ALL.of('kube_pod_container_status_restarts_total')}[10m]))",
                    legend="{{container}}",
                ),
            ),
        ),
        Panel(
            title="Autoscaling",
            description="Replicas that there are, and how many there may be at most.",
            unit=Unit.COUNT,
            width=6,
            source=Source.KUBERNETES,
            queries=(
                Query(
                    expr=ALL.of("kube_horizontalpodautoscaler_status_current_replicas"),
                    legend="{{horizontalpodautoscaler}}",
                ),
                Query(
                    expr=ALL.of("kube_horizontalpodautoscaler_spec_max_replicas"),
                    legend="{{horizontalpodautoscaler}} at most",
                ),
            ),
        ),
        Panel(
            title="Volumes filled",
            description="Share of each volume that is taken: knowledge bases, Qdrant's data, runs.",
            unit=Unit.RATIO,
            width=6,
            top=1,
            source=Source.KUBERNETES,
            queries=(
                Query(
                    expr=f"{ALL.of('kubelet_volume_stats_used_bytes')} / {ALL.of('kubelet_volume_stats_capacity_bytes')}",
                    legend="{{persistentvolumeclaim}}",
                ),
            ),
            alerts=("VolumeFilling", "VolumeFull"),
            steps=(Step(value=0.8, color=Color.ORANGE), Step(value=0.9, color=Color.RED)),
        ),
    ),
)

BOARD = Board(
    name="overview",
    title="Overview",
    description="Whether the promises are kept, whether there is room, whether everything is there.",
    variables=(NAMESPACE,),
    rows=(PROMISES, TRAFFIC, ROOM, PROCESSES, CLUSTER),
)
