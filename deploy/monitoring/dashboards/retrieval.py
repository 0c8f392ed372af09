"""Retrieval: lookups and their legs, what the indexes hold, and Qdrant's server where vectors lie in one."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Source, Step, Unit, Variable
from deploy.monitoring.dashboards.processes import PROCESS, SELECTED, and_own, process_variables
from deploy.monitoring.dashboards.promises import BURN_ALERTS, CALLS, LOOKED_UP, LOOKUPS
from deploy.monitoring.dashboards.promql import WINDOW, Selection

KNOWN_BY = "reimagen_retrieval_results_count"
INDEX = Selection(matchers=f'index=~"$index",{PROCESS.matchers}')
QDRANT = Selection(matchers='job="qdrant",namespace=~"$namespace"')
CHANGES = 'grpc_method=~"reimagen.retrieval.v1.KnowledgeBaseService/.*"'
LEG_TIME = "reimagen_retrieval_duration_seconds"
OWN = and_own(KNOWN_BY)
VARIABLES = (
    *process_variables(KNOWN_BY, "One retrieval service of several."),
    Variable(
        name="index",
        label="Knowledge base",
        metric=f"reimagen_retrieval_index_documents{{{SELECTED}}}",
        described="The first 50 by name; the rest are together in `other`.",
    ),
)

LOOKUP_ROW = Row(
    title="Lookups",
    panels=(
        Panel(
            title="Lookups by what answered and outcome",
            description="bm25, vector, or both fused. shortfall: fewer pairs than asked for; degraded: one leg alone.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(Query(expr=PROCESS.rate(LOOKUPS, by=("leg", "outcome")), legend="{{leg}} {{outcome}}"),),
            alerts=(*BURN_ALERTS, "RetrievalRefusals"),
        ),
        Panel(
            title="Time of a call",
            description="From a call's arrival to its status, of calls that were answered; 99 % within 0.1 s is promised.",
            unit=Unit.SECONDS,
            queries=PROCESS.percentiles(CALLS, LOOKED_UP, 'grpc_status="OK"'),
            steps=(Step(value=0.1, color=Color.RED),),
        ),
        Panel(
            title="Time of a call, spread",
            description="How many calls fell into which bucket.",
            kind=Kind.HEAT,
            unit=Unit.SECONDS,
            queries=PROCESS.heat(CALLS, LOOKED_UP),
        ),
        Panel(
            title="Time of the legs",
            description="Of a leg's own searches in a lookup; fused: of a whole lookup with both. The slow one shows.",
            unit=Unit.SECONDS,
            queries=PROCESS.percentiles(LEG_TIME, 'outcome="ok"', by=("leg",), quantiles=(0.5, 0.99)),
        ),
        Panel(
            title="Legs that failed",
            description="So that the other answered alone: unavailable (Qdrant is away, say) or internal (a fault of ours).",
            kind=Kind.STACKED,
            unit=Unit.PER_SECOND,
            queries=(
                Query(
                    expr=PROCESS.rate("reimagen_retrieval_leg_failures_total", by=("leg", "reason")),
                    legend="{{leg}} {{reason}}",
                    after="a leg has failed",
                ),
            ),
            alerts=("RetrievalLegFailing",),
        ),
        Panel(
            title="Pairs found",
            description="By a lookup. At zero, prompts name what no knowledge base holds, or an index is empty.",
            kind=Kind.HEAT,
            unit=Unit.COUNT,
            queries=PROCESS.heat("reimagen_retrieval_results"),
        ),
    ),
)

INDEXES = Row(
    title="Knowledge bases",
    panels=(
        Panel(
            title="Pairs",
            description="That BM25 sees, by knowledge base.",
            unit=Unit.COUNT,
            width=6,
            queries=(
                Query(expr=f"max by (index)({INDEX.of('reimagen_retrieval_index_documents')})", legend="{{index}}"),
            ),
        ),
        Panel(
            title="Stored and not seen yet",
            description="How much later the newest stored change is than the newest one that BM25 sees. It is zero but for"
            " moments; where it grows, the index no longer follows.",
            unit=Unit.SECONDS,
            width=6,
            queries=(
                Query(
                    expr="max by (index)("
                    f"{INDEX.of('reimagen_retrieval_index_generation_timestamp_seconds')}"
                    f" - {INDEX.of('reimagen_retrieval_index_seen_timestamp_seconds')})",
                    legend="{{index}}",
                ),
            ),
            steps=(Step(value=60, color=Color.RED),),
            alerts=("RetrievalIndexNotFresh",),
        ),
        Panel(
            title="Age of the newest change",
            description="Since when nothing was put in or taken out. Where imports run nightly, a day is the most.",
            unit=Unit.SECONDS,
            width=6,
            queries=(
                Query(
                    expr="min by (index)(time() - "
                    f"{INDEX.of('reimagen_retrieval_index_generation_timestamp_seconds')})",
                    legend="{{index}}",
                ),
            ),
        ),
        Panel(
            title="Pairs changed",
            description="Pairs that were to be put in or taken out, by what became of them.",
            kind=Kind.STACKED,
            unit=Unit.PER_SECOND,
            width=6,
            queries=(
                Query(
                    expr=PROCESS.rate("reimagen_retrieval_changed_pairs_total", by=("outcome",)),
                    legend="{{outcome}}",
                ),
            ),
        ),
        Panel(
            title="Calls that manage knowledge bases",
            description="By method and status.",
            kind=Kind.STACKED,
            unit=Unit.REQUESTS_PER_SECOND,
            queries=(
                Query(
                    expr=PROCESS.rate(f"{CALLS}_count", CHANGES, by=("grpc_method", "grpc_status")),
                    legend="{{grpc_method}} {{grpc_status}}",
                ),
            ),
        ),
        Panel(
            title="Memory",
            description="Resident memory; the indexes are mapped, and what was read of them counts.",
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


def _qdrant(
    title: str,
    description: str,
    unit: Unit,
    queries: tuple[Query, ...],
    steps: tuple[Step, ...] = (),
    alerts: tuple[str, ...] = (),
) -> Panel:
    return Panel(
        title=title,
        description=description,
        unit=unit,
        width=6,
        source=Source.QDRANT,
        queries=queries,
        steps=steps,
        alerts=alerts,
    )


SERVER = Row(
    title="Qdrant's server (absent where the engine is embedded)",
    panels=(
        _qdrant(
            "Points",
            "By collection; approximate, as Qdrant counts them.",
            Unit.COUNT,
            (Query(expr=f"max by (id)({QDRANT.of('collection_points')})", legend="{{id}}"),),
        ),
        _qdrant(
            "Replicas",
            "Shard replicas that are not active, as the worst peer sees it, and the active ones of the shard with fewest.",
            Unit.COUNT,
            (
                Query(expr=f"max({QDRANT.of('collection_dead_replicas')})", legend="not active"),
                Query(expr=f"min({QDRANT.of('collection_active_replicas_min')})", legend="active, at least"),
            ),
            alerts=("QdrantReplicaDead",),
        ),
        _qdrant(
            "Time of calls",
            "As Qdrant measures it, over its gRPC interface.",
            Unit.SECONDS,
            QDRANT.percentiles("grpc_responses_duration_seconds", by=("endpoint",), quantiles=(0.5, 0.99)),
        ),
        _qdrant(
            "Calls",
            "Over gRPC, by method.",
            Unit.REQUESTS_PER_SECOND,
            (Query(expr=QDRANT.rate("grpc_responses_total", by=("endpoint",)), legend="{{endpoint}}"),),
        ),
        _qdrant(
            "Not indexed",
            "Vectors that a search through the index alone would leave out, and optimizations that are at it. After a bulk load"
            " the first falls while the second runs.",
            Unit.COUNT,
            (
                Query(
                    expr=QDRANT.total("collection_indexed_only_excluded_points", by=("id",)), legend="{{id}} vectors"
                ),
                Query(expr=QDRANT.total("collection_running_optimizations", by=("id",)), legend="{{id}} optimizations"),
            ),
            alerts=("QdrantPointsNotIndexed",),
        ),
        _qdrant(
            "Memory",
            "Resident, by node.",
            Unit.BYTES,
            (Query(expr=QDRANT.of("memory_resident_bytes"), legend="{{instance}}"),),
        ),
        _qdrant(
            "Read from the disk",
            "Pages of mapped files that were not in memory, by node. Many while searches are slow: memory is too small.",
            Unit.PER_SECOND,
            (Query(expr=f"rate({QDRANT.of('process_major_page_faults_total')}[{WINDOW}])", legend="{{instance}}"),),
        ),
        _qdrant(
            "Cluster",
            "Peers, and operations that wait for consensus: these do not stay.",
            Unit.COUNT,
            (
                Query(expr=f"min({QDRANT.of('cluster_peers_total')})", legend="peers"),
                Query(expr=f"max({QDRANT.of('cluster_pending_operations_total')})", legend="operations pending"),
            ),
            alerts=("QdrantConsensusPending",),
        ),
    ),
)

BOARD = Board(
    name="retrieval",
    title="Retrieval",
    description="Lookups and their legs, what the knowledge bases hold, and Qdrant's server.",
    variables=VARIABLES,
    rows=(LOOKUP_ROW, INDEXES, SERVER),
)
