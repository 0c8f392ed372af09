"""The generator: requests, who waits and who is refused, stages and steps, the process itself."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Step, Unit, Variable
from deploy.monitoring.dashboards.processes import PROCESS, SELECTED, and_own, process_variables
from deploy.monitoring.dashboards.promises import BURN_ALERTS, ORDER_TIME, ORDERS
from deploy.monitoring.dashboards.promql import WINDOW, Selection

KNOWN_BY = "reimagen_generator_admission_capacity"
STAGE = Selection(matchers=f'stage=~"$stage",{PROCESS.matchers}')
METHODS = 'grpc_method=~"reimagen.generator.v1.GeneratorService/.*"'
DRAWN = 'outcome="ok"'
OWN = and_own(KNOWN_BY)
VARIABLES = (
    *process_variables(KNOWN_BY, "One generator of several."),
    Variable(
        name="stage",
        label="Stage",
        metric=f"reimagen_generator_stage_duration_seconds_count{{{SELECTED}}}",
        described="The side of the pictures that a stage makes.",
    ),
)

REQUESTS = Row(
    title="Orders",
    panels=(
        Panel(
            title="Orders by outcome",
            description="Orders that have ended. rejected: no room; too_short: refused at once, since the caller's deadline"
            " could not be met; deadline: missed it nevertheless; invalid and cancelled are the caller's.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(Query(expr=PROCESS.rate(ORDERS, by=("outcome",)), legend="{{outcome}}"),),
            alerts=BURN_ALERTS,
        ),
        Panel(
            title="Time of an order, by side",
            description="From its arrival to its end, waiting included, of those that were drawn; by the picture's side.",
            unit=Unit.SECONDS,
            queries=PROCESS.percentiles(ORDER_TIME, DRAWN, by=("resolution",), quantiles=(0.5, 0.95)),
        ),
        Panel(
            title="Time of an order, spread",
            description="How many orders fell into which bucket, drawn or not. Two bands are two kinds of orders.",
            kind=Kind.HEAT,
            unit=Unit.SECONDS,
            queries=PROCESS.heat(ORDER_TIME),
        ),
        Panel(
            title="Slower than alone",
            description="Time of an order that was drawn over what it was estimated to take with nobody beside it. The"
            " promise is told in it, since it does not depend on the machine, the size or the steps.",
            unit=Unit.NUMBER,
            width=6,
            queries=PROCESS.percentiles("reimagen_generator_request_slowdown_ratio"),
        ),
        Panel(
            title="First preview",
            description="From arrival to the first preview, of the orders that ask for previews.",
            unit=Unit.SECONDS,
            width=6,
            queries=PROCESS.percentiles("reimagen_generator_time_to_first_preview_seconds"),
        ),
        Panel(
            title="Drawn with less than was looked for",
            description="Share of the orders drawn without neighbors because retrieval failed, or with those of one leg.",
            unit=Unit.RATIO,
            width=6,
            queries=(
                Query(
                    expr=f"{PROCESS.rate('reimagen_generator_degraded_total', by=('reason',))}"
                    f" / on() group_left() ({PROCESS.rate(ORDERS, DRAWN)} > 0)",
                    legend="{{reason}}",
                ),
            ),
            steps=(Step(value=0.01, color=Color.RED),),
            alerts=("PicturesWithoutNeighbors",),
        ),
        Panel(
            title="Calls under way",
            description="From arrival to status, by method.",
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(
                    expr=PROCESS.total("reimagen_server_calls_in_flight", METHODS, by=("grpc_method",)),
                    legend="{{grpc_method}}",
                ),
            ),
        ),
    ),
)

ADMISSION = Row(
    title="Admission",
    panels=(
        Panel(
            title="Waiting",
            description="Requests in the queue, by priority.",
            kind=Kind.STACKED,
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(expr=PROCESS.total("reimagen_generator_queue_depth", by=("priority",)), legend="{{priority}}"),
            ),
            alerts=("GeneratorSaturated",),
        ),
        Panel(
            title="Being drawn, of the room there is",
            description="Share of the places that are taken. At 100 % who comes has to wait.",
            unit=Unit.RATIO,
            top=1,
            width=6,
            queries=(
                Query(
                    expr=f"sum by (instance)({PROCESS.of('reimagen_generator_in_flight_requests')})"
                    f" / sum by (instance)({PROCESS.of('reimagen_generator_admission_capacity')})",
                    legend="{{instance}}",
                ),
            ),
            steps=(Step(value=0.8, color=Color.ORANGE), Step(value=1, color=Color.RED)),
            alerts=("GeneratorSaturated",),
        ),
        Panel(
            title="Wait before drawing",
            description="From a request's arrival until its turn, of those that got one; by priority.",
            unit=Unit.SECONDS,
            width=6,
            queries=PROCESS.percentiles(
                "reimagen_generator_queue_wait_seconds", by=("priority",), quantiles=(0.5, 0.95)
            ),
        ),
        Panel(
            title="Refused",
            description="Orders turned away, by reason, and those whose callers went away before their turn.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            width=6,
            queries=(
                Query(expr=PROCESS.rate("reimagen_generator_refused_total", by=("reason",)), legend="{{reason}}"),
                Query(expr=PROCESS.rate("reimagen_generator_abandoned_total"), legend="given up by the caller"),
            ),
            alerts=("GeneratorRefusals", "GeneratorQueueFull"),
        ),
        Panel(
            title="Estimated work that waits",
            description="Seconds that what waits would take alone. Autoscaling looks at it: it grows before callers wait.",
            unit=Unit.SECONDS,
            width=12,
            queries=(
                Query(
                    expr=PROCESS.total("reimagen_generator_queue_work_seconds", by=("instance",)),
                    legend="{{instance}}",
                ),
            ),
        ),
        Panel(
            title="Memory that admitted orders keep",
            description="Bytes of neighbors' features and states, by stage, where the stages run in the generator itself."
            " Triton's are on its own dashboard.",
            kind=Kind.STACKED,
            unit=Unit.BYTES,
            width=12,
            queries=(Query(expr=STAGE.total("reimagen_generator_taken_bytes", by=("stage",)), legend="{{stage}} px"),),
        ),
    ),
)

STAGES = Row(
    title="Stages",
    panels=(
        Panel(
            title="Where a picture's time goes",
            description="Mean time in each stage, one above the other, waiting for a batch included. Means add up;"
            " percentiles, beside it, do not.",
            kind=Kind.STACKED,
            unit=Unit.SECONDS,
            queries=(
                Query(
                    expr=STAGE.mean("reimagen_generator_stage_duration_seconds", by=("stage",)), legend="{{stage}} px"
                ),
            ),
        ),
        Panel(
            title="Time of a stage",
            description="What an order's pictures spent in a stage.",
            unit=Unit.SECONDS,
            queries=STAGE.percentiles(
                "reimagen_generator_stage_duration_seconds", by=("stage",), quantiles=(0.5, 0.95)
            ),
        ),
        Panel(
            title="Time of a stage, spread",
            description="All chosen stages together: choose one above.",
            kind=Kind.HEAT,
            unit=Unit.SECONDS,
            queries=STAGE.heat("reimagen_generator_stage_duration_seconds"),
        ),
        Panel(
            title="Time of a step",
            description="One pass of the network over a batch, where the stages run in the generator itself.",
            unit=Unit.SECONDS,
            width=6,
            queries=STAGE.percentiles("reimagen_generator_step_duration_seconds", by=("stage",), quantiles=(0.5, 0.95)),
        ),
        Panel(
            title="Time of a step, spread",
            description="All chosen stages together: choose one above.",
            kind=Kind.HEAT,
            unit=Unit.SECONDS,
            width=6,
            queries=STAGE.heat("reimagen_generator_step_duration_seconds"),
        ),
        Panel(
            title="Trajectories in a step",
            description="Mean number of pictures that share a pass. Near 1 while many are drawn, batching does not work.",
            unit=Unit.NUMBER,
            width=6,
            queries=(
                Query(expr=STAGE.mean("reimagen_generator_step_batch_size", by=("stage",)), legend="{{stage}} px"),
            ),
            alerts=("BatchCollapse",),
        ),
        Panel(
            title="Trajectories in a step, spread",
            description="How often a pass held how many pictures, over all chosen stages.",
            kind=Kind.HEAT,
            unit=Unit.COUNT,
            width=6,
            queries=STAGE.heat("reimagen_generator_step_batch_size"),
        ),
    ),
)

PROCESS_ROW = Row(
    title="Process",
    panels=(
        Panel(
            title="Event loop held up",
            description="How much later than asked the loop went on. All calls wait for it: beyond 50 ms something in it"
            " computes that should not.",
            unit=Unit.SECONDS,
            queries=PROCESS.percentiles(
                "reimagen_generator_event_loop_lag_seconds", by=("instance",), quantiles=(0.5, 0.99)
            ),
            alerts=("EventLoopBlocked",),
            steps=(Step(value=0.05, color=Color.RED),),
        ),
        Panel(
            title="Memory",
            description="Resident memory.",
            unit=Unit.BYTES,
            queries=(Query(expr=f"{PROCESS.of('process_resident_memory_bytes')}{OWN}", legend="{{instance}}"),),
        ),
        Panel(
            title="Processor",
            description="Cores kept busy.",
            unit=Unit.CORES,
            queries=(
                Query(expr=f"rate({PROCESS.of('process_cpu_seconds_total')}[{WINDOW}]){OWN}", legend="{{instance}}"),
            ),
        ),
    ),
)

BOARD = Board(
    name="generation",
    title="Generation",
    description="The generator: its requests, who waits and who is refused, where a picture's time goes.",
    variables=VARIABLES,
    rows=(REQUESTS, ADMISSION, STAGES, PROCESS_ROW),
)
