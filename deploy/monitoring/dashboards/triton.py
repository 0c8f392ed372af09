"""Triton: batches and passes of each model, what Triton counts itself, and how the generator fares with it."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Step, Unit, Variable
from deploy.monitoring.dashboards.processes import PROCESS, SELECTED, process_variables
from deploy.monitoring.dashboards.promql import WINDOW, Selection

KNOWN_BY = "nv_inference_count"
MODEL = Selection(matchers=f'model=~"$model",{PROCESS.matchers}')
ASKED = Selection(matchers='model=~"$model",namespace=~"$namespace"')  # the generators' figures, of all their instances
TARGET = Selection(matchers='target=~"($model)@.*",namespace=~"$namespace"')
VARIABLES = (
    *process_variables(KNOWN_BY, "One Triton of several."),
    Variable(
        name="model",
        label="Model",
        metric=f"{KNOWN_BY}{{{SELECTED}}}",
        described="A stage's U-Net, or the text encoder.",
    ),
)


def _per_execution(counter: str) -> str:
    """Mean seconds of an execution, from a counter of microseconds."""
    spent = f"sum by (model)(rate({MODEL.of(counter)}[{WINDOW}]))"
    return f"{spent} / 1e6 / (sum by (model)(rate({MODEL.of('nv_inference_exec_count')}[{WINDOW}])) > 0)"


PASSES = Row(
    title="Batches",
    panels=(
        Panel(
            title="Pictures' steps",
            description="Steps of trajectories a second: the work that is done, whatever shares a pass.",
            unit=Unit.PER_SECOND,
            width=6,
            queries=(
                Query(expr=MODEL.rate("reimagen_stage_trajectory_steps_total", by=("model",)), legend="{{model}}"),
            ),
        ),
        Panel(
            title="Trajectories in a pass",
            description="Mean batch. Near 1 while many are drawn, batching does not work: requests that end a step at other"
            " times, or a queue delay that is too short.",
            unit=Unit.NUMBER,
            width=6,
            queries=(
                Query(
                    expr=f"{MODEL.rate('reimagen_stage_trajectory_steps_total', by=('model',))}"
                    f" / ({MODEL.rate('reimagen_stage_passes_total', by=('model',))} > 0)",
                    legend="{{model}}",
                ),
            ),
            alerts=("BatchCollapse",),
        ),
        Panel(
            title="Time of a pass",
            description="Mean, as the model measures it. Triton exports no histogram of it.",
            unit=Unit.SECONDS,
            width=6,
            queries=(
                Query(
                    expr=f"{MODEL.rate('reimagen_stage_pass_seconds_total', by=('model',))}"
                    f" / ({MODEL.rate('reimagen_stage_passes_total', by=('model',))} > 0)",
                    legend="{{model}}",
                ),
            ),
        ),
        Panel(
            title="Busy",
            description="Share of the time in which a model is in a pass. At 100 % it is the bottleneck.",
            unit=Unit.RATIO,
            top=1,
            width=6,
            queries=(
                Query(
                    expr=f"sum by (model,instance)(rate({MODEL.of('reimagen_stage_pass_seconds_total')}[{WINDOW}]))",
                    legend="{{model}} {{instance}}",
                ),
            ),
            steps=(Step(value=0.95, color=Color.ORANGE),),
        ),
        Panel(
            title="Requests whose state is kept",
            description="In the models' memory, from a trajectory's first step to its last. It returns to zero with the load;"
            " what stays was not released.",
            unit=Unit.COUNT,
            width=12,
            queries=(Query(expr=MODEL.total("reimagen_stage_live_requests", by=("model",)), legend="{{model}}"),),
        ),
        Panel(
            title="Memory of that state",
            description="Neighbors' features, text keys and values, pictures in the making.",
            kind=Kind.STACKED,
            unit=Unit.BYTES,
            width=12,
            queries=(Query(expr=MODEL.total("reimagen_stage_live_bytes", by=("model",)), legend="{{model}}"),),
        ),
    ),
)

OWN = Row(
    title="Triton's own figures (a step of a sequence counts as a request)",
    panels=(
        Panel(
            title="Executions",
            description="Calls of a model, each with the requests of a batch.",
            unit=Unit.PER_SECOND,
            width=6,
            queries=(Query(expr=MODEL.rate("nv_inference_exec_count", by=("model",)), legend="{{model}}"),),
        ),
        Panel(
            title="Failed",
            description="By reason. CANCELED also counts the end of every sequence that its model closes.",
            unit=Unit.PER_SECOND,
            width=6,
            queries=(
                Query(
                    expr=MODEL.rate("nv_inference_request_failure", by=("model", "reason")),
                    legend="{{model}} {{reason}}",
                ),
            ),
        ),
        Panel(
            title="Waiting for an execution",
            description="Requests in Triton's scheduler, which has no bound: the generator admits no more than it may.",
            unit=Unit.COUNT,
            width=6,
            queries=(Query(expr=MODEL.total("nv_inference_pending_request_count", by=("model",)), legend="{{model}}"),),
        ),
        Panel(
            title="Queue, for each execution",
            description="Time in Triton's queue over executions. Beyond the time of a pass, another instance is due.",
            unit=Unit.SECONDS,
            width=6,
            queries=(Query(expr=_per_execution("nv_inference_queue_duration_us"), legend="{{model}}"),),
        ),
        Panel(
            title="Computing, for each execution",
            description="Time in the models over executions, input and output beside it: what is not infer is overhead.",
            unit=Unit.SECONDS,
            queries=(
                Query(expr=_per_execution("nv_inference_compute_infer_duration_us"), legend="{{model}} infer"),
                Query(expr=_per_execution("nv_inference_compute_input_duration_us"), legend="{{model}} input"),
                Query(expr=_per_execution("nv_inference_compute_output_duration_us"), legend="{{model}} output"),
            ),
            logarithmic=True,
        ),
        Panel(
            title="Machine's memory",
            description="Taken on Triton's machine, by all its processes, and how much there is.",
            unit=Unit.BYTES,
            queries=(
                Query(expr=PROCESS.of("nv_cpu_memory_used_bytes"), legend="{{instance}} taken"),
                Query(expr=PROCESS.of("nv_cpu_memory_total_bytes"), legend="{{instance}} there is"),
            ),
        ),
        Panel(
            title="Pinned memory",
            description="Share of the pool through which tensors go to a GPU. When it is full, copies become slow.",
            unit=Unit.RATIO,
            top=1,
            queries=(
                Query(
                    expr=f"{PROCESS.of('nv_pinned_memory_pool_used_bytes')}"
                    f" / {PROCESS.of('nv_pinned_memory_pool_total_bytes')}",
                    legend="{{instance}}",
                ),
            ),
            steps=(Step(value=0.9, color=Color.RED),),
        ),
    ),
)

CALLERS = Row(
    title="As the generators see it",
    panels=(
        Panel(
            title="Requests and second tries",
            description="Sent to Triton, and those of them beyond a request's first.",
            unit=Unit.REQUESTS_PER_SECOND,
            width=6,
            queries=(
                Query(expr=ASKED.rate("reimagen_generator_triton_attempts_total", by=("model",)), legend="{{model}}"),
                Query(
                    expr=ASKED.rate("reimagen_generator_triton_retries_total", by=("model",)),
                    legend="{{model}} again",
                    after="a request was tried again",
                ),
            ),
        ),
        Panel(
            title="Errors",
            description="Attempts that failed, by what was wrong: unreachable (no server), stub_dead (its interpreter is"
            " gone), stopping, not_loaded, queue_full, queue_timeout, raised (the model's own code), hung.",
            kind=Kind.STACKED,
            unit=Unit.PER_SECOND,
            width=6,
            queries=(
                Query(
                    expr=ASKED.rate("reimagen_generator_triton_errors_total", by=("model", "kind")),
                    legend="{{model}} {{kind}}",
                ),
            ),
            alerts=("TritonModelDied",),
        ),
        Panel(
            title="Wait for the first step",
            description="From sending a stage to its first step.",
            unit=Unit.SECONDS,
            width=6,
            queries=ASKED.percentiles("reimagen_generator_triton_queue_seconds", by=("model",), quantiles=(0.5, 0.95)),
            alerts=("StageWaits",),
        ),
        Panel(
            title="From the first step to the pictures",
            description="The trajectory itself, in shared batches.",
            unit=Unit.SECONDS,
            width=6,
            queries=ASKED.percentiles("reimagen_generator_triton_run_seconds", by=("model",), quantiles=(0.5, 0.95)),
        ),
        Panel(
            title="Under way",
            description="Requests at each Triton.",
            kind=Kind.STACKED,
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(
                    expr=ASKED.total("reimagen_generator_triton_in_flight", by=("model", "endpoint")),
                    legend="{{model}} {{endpoint}}",
                ),
            ),
        ),
        Panel(
            title="Canary",
            description="1 while a model is in use; 0 from its ejection until a canary has passed.",
            unit=Unit.COUNT,
            top=1,
            width=6,
            queries=(Query(expr=f"min by (target)({TARGET.of('reimagen_canary_success')})", legend="{{target}}"),),
            alerts=("CanaryFailing",),
        ),
        Panel(
            title="Since the last canary that passed",
            description="While a model is in use, no longer than the time between two canaries.",
            unit=Unit.SECONDS,
            width=6,
            queries=(
                Query(
                    expr=f"min by (target)(time() - {TARGET.of('reimagen_canary_last_success_timestamp_seconds')})",
                    legend="{{target}}",
                ),
            ),
            alerts=("CanaryFailing", "TritonEndpointEjected"),
        ),
        Panel(
            title="Time of a canary",
            description="Of canaries that passed; a model that is slow here is slow for callers, too.",
            unit=Unit.SECONDS,
            width=6,
            queries=ASKED.percentiles("reimagen_canary_duration_seconds", by=("model",), quantiles=(0.95,)),
        ),
        Panel(
            title="Taken out of use",
            description="How often in ten minutes, by model and endpoint.",
            unit=Unit.COUNT,
            width=24,
            queries=(
                Query(
                    expr="sum by (model,endpoint)(increase("
                    f"{ASKED.of('reimagen_generator_triton_ejections_total')}[10m]))",
                    legend="{{model}} {{endpoint}}",
                ),
            ),
            alerts=("TritonEndpointEjected",),
        ),
    ),
)

BOARD = Board(
    name="triton",
    title="Triton",
    description="Batches and passes of each model, what Triton counts itself, and how the generators fare with it.",
    variables=VARIABLES,
    rows=(PASSES, OWN, CALLERS),
)
