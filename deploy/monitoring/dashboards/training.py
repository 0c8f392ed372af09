"""Training: runs of the trainer's service, and what a run tells of itself."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Step, Unit, Variable
from deploy.monitoring.dashboards.promises import ALL, NAMESPACE
from deploy.monitoring.dashboards.promql import WINDOW, Selection

PRESET = Selection(matchers='preset=~"$preset",namespace=~"$namespace"')
VARIABLES = (
    NAMESPACE,
    Variable(
        name="preset",
        label="Preset",
        metric='{__name__=~"reimagen_trainer_loss|reimagen_trainer_runs_loss",namespace=~"$namespace"}',
        described="What is trained; a run's name is no label.",
    ),
)
SAVED = "reimagen_trainer_checkpoint_last_success_timestamp_seconds"


def _held_out(condition: str) -> str:
    return PRESET.of("reimagen_trainer_held_out_loss", f'condition="{condition}"')


RUNS = Row(
    title="Runs of the trainer's service",
    panels=(
        Panel(
            title="Runs by state",
            description="Runs that the service knows.",
            kind=Kind.STACKED,
            unit=Unit.COUNT,
            width=6,
            queries=(Query(expr=ALL.total("reimagen_trainer_runs", by=("state",)), legend="{{state}}"),),
        ),
        Panel(
            title="Failed, by cause",
            description=(
                "hung: the watchdog ended it; bad_input: what it was given cannot be; full_disk: it goes on with room; "
                "other: see its log."
            ),
            kind=Kind.STACKED,
            unit=Unit.COUNT,
            width=6,
            alerts=("TrainingHung", "TrainingFailed"),
            queries=(Query(expr=ALL.total("reimagen_trainer_runs_failed", by=("cause",)), legend="{{cause}}"),),
        ),
        Panel(
            title="Examples a second",
            description="Of the runs of a preset that run, all together.",
            unit=Unit.PER_SECOND,
            width=6,
            queries=(
                Query(
                    expr=PRESET.total("reimagen_trainer_runs_examples_per_second", by=("preset",)),
                    legend="{{preset}}",
                ),
            ),
        ),
        Panel(
            title="Loss",
            description="Of the runs of a preset that run, their mean.",
            unit=Unit.NUMBER,
            width=6,
            queries=(Query(expr=f"avg by (preset)({PRESET.of('reimagen_trainer_runs_loss')})", legend="{{preset}}"),),
            alerts=("TrainingLossNotFinite",),
        ),
        Panel(
            title="Since a run last said something",
            description="Of the run of a preset for which that is longest ago; lines come every few seconds.",
            unit=Unit.SECONDS,
            width=12,
            queries=(
                Query(
                    expr=f"max by (preset)(time() - {PRESET.of('reimagen_trainer_runs_progress_timestamp_seconds')})",
                    legend="{{preset}}",
                ),
            ),
            steps=(Step(value=900, color=Color.RED),),
            alerts=("TrainingStalled",),
        ),
        Panel(
            title="Since a run last saved its state",
            description="Of the run of a preset for which that is longest ago: so much would be lost.",
            unit=Unit.SECONDS,
            width=12,
            queries=(
                Query(
                    expr=f"max by (preset)(time() - {PRESET.of('reimagen_trainer_runs_checkpoint_timestamp_seconds')})",
                    legend="{{preset}}",
                ),
            ),
            alerts=("CheckpointOld",),
        ),
    ),
)

LEARNING = Row(
    title="One training (with --metrics-address): learning",
    panels=(
        Panel(
            title="Loss of the last step",
            description="It jumps from step to step; the held-out loss, beside it, says more.",
            unit=Unit.NUMBER,
            queries=(Query(expr=PRESET.of("reimagen_trainer_loss"), legend="{{preset}}"),),
            logarithmic=True,
        ),
        Panel(
            title="Held-out loss by condition",
            description="Of the averaged weights, on the same times and noise. full must fall below text_only: else the"
            " neighbors are not used.",
            unit=Unit.NUMBER,
            may_go_below_zero=True,
            queries=(Query(expr=PRESET.of("reimagen_trainer_held_out_loss"), legend="{{preset}} {{condition}}"),),
        ),
        Panel(
            title="What neighbors are worth",
            description="How much lower the held-out loss is with the prompt's own neighbors than without any, and than"
            " with another prompt's. It opens early and grows; at zero or below, retrieval is not being learnt.",
            unit=Unit.NUMBER,
            may_go_below_zero=True,
            queries=(
                Query(
                    expr=f"{_held_out('text_only')} - on(preset,instance) {_held_out('full')}",
                    legend="{{preset}} than without",
                ),
                Query(
                    expr=f"{_held_out('wrong_neighbors')} - on(preset,instance) {_held_out('full')}",
                    legend="{{preset}} than with others'",
                ),
            ),
        ),
        Panel(
            title="Gradient norm",
            description="Of the last step, before clipping.",
            unit=Unit.NUMBER,
            queries=(Query(expr=PRESET.of("reimagen_trainer_grad_norm"), legend="{{preset}}"),),
            logarithmic=True,
        ),
        Panel(
            title="Learning rate",
            description="Of the last step.",
            unit=Unit.NUMBER,
            queries=(Query(expr=PRESET.of("reimagen_trainer_learning_rate"), legend="{{preset}}"),),
        ),
        Panel(
            title="Steps skipped",
            description="In ten minutes: their gradient was not finite. Now and then it is harmless in half precision.",
            unit=Unit.COUNT,
            queries=(
                Query(
                    expr=f"sum by (preset)(increase({PRESET.of('reimagen_trainer_nonfinite_total')}[10m]))",
                    legend="{{preset}}",
                ),
            ),
            steps=(Step(value=1, color=Color.ORANGE),),
            alerts=("TrainingStepsSkipped",),
        ),
    ),
)

SPEED = Row(
    title="One training: speed and safety",
    panels=(
        Panel(
            title="Examples a second",
            description="Trained on.",
            unit=Unit.PER_SECOND,
            width=6,
            queries=(Query(expr=PRESET.rate("reimagen_trainer_samples_total", by=("preset",)), legend="{{preset}}"),),
        ),
        Panel(
            title="Time of a step",
            description="Its wait for the batch included.",
            unit=Unit.SECONDS,
            width=6,
            queries=PRESET.percentiles("reimagen_trainer_step_duration_seconds", by=("preset",)),
        ),
        Panel(
            title="Time of a step, spread",
            description="A second band above the first is steps that wait for data, or for a checkpoint.",
            kind=Kind.HEAT,
            unit=Unit.SECONDS,
            width=6,
            queries=PRESET.heat("reimagen_trainer_step_duration_seconds"),
        ),
        Panel(
            title="Waiting for data",
            description="Share of the steps' time. Beyond a tenth the loader is the bottleneck, not the network.",
            unit=Unit.RATIO,
            top=0.2,
            width=6,
            queries=(
                Query(
                    expr=f"{PRESET.rate('reimagen_trainer_data_wait_seconds_sum', by=('preset',))}"
                    f" / {PRESET.rate('reimagen_trainer_step_duration_seconds_sum', by=('preset',))}",
                    legend="{{preset}}",
                ),
            ),
            steps=(Step(value=0.1, color=Color.ORANGE),),
        ),
        Panel(
            title="Time to save a state",
            description="Over the last half hour, since it is rare.",
            unit=Unit.SECONDS,
            width=6,
            queries=(
                Query(
                    expr="histogram_quantile(0.95, sum by (le,preset)(rate("
                    f"{PRESET.of('reimagen_trainer_checkpoint_duration_seconds_bucket')}[30m])))",
                    legend="{{preset}} p95",
                ),
            ),
        ),
        Panel(
            title="Since the last saved state",
            description="So much would be lost.",
            unit=Unit.SECONDS,
            width=6,
            queries=(Query(expr=f"time() - {PRESET.of(SAVED)}", legend="{{preset}}"),),
            alerts=("CheckpointOld",),
        ),
        Panel(
            title="Memory",
            description="Resident memory of the first rank.",
            unit=Unit.BYTES,
            width=6,
            queries=(
                Query(
                    expr=f"{ALL.of('process_resident_memory_bytes')} and on(instance) {PRESET.of('reimagen_trainer_loss')}",
                    legend="{{instance}}",
                ),
            ),
        ),
        Panel(
            title="Processor",
            description="Cores that the first rank keeps busy.",
            unit=Unit.CORES,
            width=6,
            queries=(
                Query(
                    expr=f"rate({ALL.of('process_cpu_seconds_total')}[{WINDOW}])"
                    f" and on(instance) {PRESET.of('reimagen_trainer_loss')}",
                    legend="{{instance}}",
                ),
            ),
        ),
    ),
)

BOARD = Board(
    name="training",
    title="Training",
    description="Runs of the trainer's service, and what a run tells of itself.",
    variables=VARIABLES,
    rows=(RUNS, LEARNING, SPEED),
)
