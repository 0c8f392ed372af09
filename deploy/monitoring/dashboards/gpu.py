"""GPUs, as NVIDIA's dcgm-exporter tells of them (its default counters), and what a picture costs on them."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Query, Row, Source, Step, Unit, Variable
from deploy.monitoring.dashboards.promql import WINDOW, Selection

# The exporter is no part of the stack: its namespace, job and pod labels are its own.
GPU = Selection(matchers='hostname=~"$hostname",gpu=~"$gpu"')
WHICH = "{{hostname}} {{gpu}}"
MIB = 1 << 20
VARIABLES = (
    Variable(name="hostname", label="Node", metric="DCGM_FI_DEV_GPU_TEMP", described="Where the GPU is."),
    Variable(
        name="gpu",
        label="GPU",
        metric='DCGM_FI_DEV_GPU_TEMP{hostname=~"$hostname"}',
        described="Its number on the node.",
    ),
)


def _panel(title: str, description: str, unit: Unit, *queries: Query, **more: object) -> Panel:
    return Panel(title=title, description=description, unit=unit, queries=queries, source=Source.DCGM, **more)  # type: ignore[arg-type]


def _each(expr: str, legend: str = WHICH) -> Query:
    return Query(expr=expr, legend=legend)


def _memory() -> str:
    return f"{GPU.of('DCGM_FI_DEV_FB_USED')} / ({GPU.of('DCGM_FI_DEV_FB_USED')} + {GPU.of('DCGM_FI_DEV_FB_FREE')})"


SUMMARY = Row(
    title="At a glance",
    panels=(
        _panel(
            "GPUs",
            "That the exporter sees.",
            Unit.COUNT,
            _each(f"count({GPU.of('DCGM_FI_DEV_GPU_TEMP')})", "GPUs"),
            kind=Kind.STAT,
            width=4,
        ),
        _panel(
            "Busy",
            "Mean over all GPUs: share of the time in which any kernel runs.",
            Unit.RATIO,
            _each(f"avg({GPU.of('DCGM_FI_PROF_GR_ENGINE_ACTIVE')})", "busy"),
            kind=Kind.STAT,
            width=4,
        ),
        _panel(
            "Memory of the fullest",
            "Above 95 % the next allocation fails, and with it a batch.",
            Unit.RATIO,
            _each(f"max({_memory()})", "of its memory"),
            kind=Kind.STAT,
            width=4,
            steps=(Step(value=0.9, color=Color.ORANGE), Step(value=0.95, color=Color.RED)),
            alerts=("GpuMemoryFull",),
        ),
        _panel(
            "Hottest",
            "Above about 85 °C clocks fall, and with them the speed.",
            Unit.CELSIUS,
            _each(f"max({GPU.of('DCGM_FI_DEV_GPU_TEMP')})", "hottest"),
            kind=Kind.STAT,
            width=4,
            steps=(Step(value=80, color=Color.ORANGE), Step(value=85, color=Color.RED)),
            alerts=("GpuHot",),
        ),
        _panel(
            "Power",
            "Of all GPUs.",
            Unit.WATTS,
            _each(f"sum({GPU.of('DCGM_FI_DEV_POWER_USAGE')})", "all"),
            kind=Kind.STAT,
            width=4,
        ),
        _panel(
            "GPUs with an XID",
            "A driver's error: the last one's number is below, and stays until the driver is loaded again.",
            Unit.COUNT,
            _each(f"count({GPU.of('DCGM_FI_DEV_XID_ERRORS')} > 0) or vector(0)", "GPUs"),
            kind=Kind.STAT,
            width=4,
            steps=(Step(value=1, color=Color.RED),),
            alerts=("GpuFault",),
        ),
    ),
)

WORK = Row(
    title="Work",
    panels=(
        _panel(
            "Busy",
            "Share of the time in which any kernel runs. High, with tensor cores idle: small batches, or launches.",
            Unit.RATIO,
            _each(GPU.of("DCGM_FI_PROF_GR_ENGINE_ACTIVE")),
            top=1,
        ),
        _panel(
            "Tensor cores busy",
            "Share of the cycles. It is what bf16 matrix products and convolutions run on.",
            Unit.RATIO,
            _each(GPU.of("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE")),
            top=1,
        ),
        _panel(
            "Memory's bandwidth busy",
            "Share of the cycles in which memory is read or written. Near the top, the network is bound by memory.",
            Unit.RATIO,
            _each(GPU.of("DCGM_FI_PROF_DRAM_ACTIVE")),
            top=1,
        ),
        _panel(
            "Over PCIe",
            "To the GPU (rx) and from it (tx). Neighbors' features stay on the GPU: it is pictures and plans.",
            Unit.BYTES_PER_SECOND,
            _each(GPU.of("DCGM_FI_PROF_PCIE_RX_BYTES"), f"{WHICH} rx"),
            _each(GPU.of("DCGM_FI_PROF_PCIE_TX_BYTES"), f"{WHICH} tx"),
        ),
        _panel(
            "Clock",
            "Of the multiprocessors. It falls with heat and at the limit of power.",
            Unit.HERTZ,
            _each(f"{GPU.of('DCGM_FI_DEV_SM_CLOCK')} * 1e6"),
        ),
        _panel(
            "Energy of a picture",
            "All of these GPUs' energy over the pictures that all generators finished; idle time counts.",
            Unit.JOULES,
            _each(
                f"sum(rate({GPU.of('DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION')}[{WINDOW}])) / 1000"
                f" / (sum(rate(reimagen_generator_pictures_total[{WINDOW}])) > 0)",
                "a picture",
            ),
        ),
    ),
)

STATE = Row(
    title="State",
    panels=(
        _panel(
            "Memory",
            "Taken, and how much there is.",
            Unit.BYTES,
            _each(f"{GPU.of('DCGM_FI_DEV_FB_USED')} * {MIB}", f"{WHICH} taken"),
            _each(f"({GPU.of('DCGM_FI_DEV_FB_USED')} + {GPU.of('DCGM_FI_DEV_FB_FREE')}) * {MIB}", f"{WHICH} there is"),
            alerts=("GpuMemoryFull",),
        ),
        _panel(
            "Temperature",
            "Of the chip and of its memory.",
            Unit.CELSIUS,
            _each(GPU.of("DCGM_FI_DEV_GPU_TEMP"), f"{WHICH} chip"),
            _each(GPU.of("DCGM_FI_DEV_MEMORY_TEMP"), f"{WHICH} memory"),
            steps=(Step(value=85, color=Color.RED),),
            alerts=("GpuHot",),
        ),
        _panel("Power", "Drawn by each.", Unit.WATTS, _each(GPU.of("DCGM_FI_DEV_POWER_USAGE"))),
        _panel(
            "Last XID",
            "The number of the driver's last error, 0 without one. 13, 31, 43: the program's; 48, 63, 64, 74, 79, 94, 95:"
            " the device's, drain the node.",
            Unit.NUMBER,
            _each(GPU.of("DCGM_FI_DEV_XID_ERRORS")),
            alerts=("GpuFault",),
        ),
        _panel(
            "Rows remapped",
            "Memory rows replaced for errors, since the GPU was made. Uncorrectable ones that grow: replace it.",
            Unit.COUNT,
            _each(GPU.of("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"), f"{WHICH} uncorrectable"),
            _each(GPU.of("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS"), f"{WHICH} correctable"),
        ),
        _panel(
            "PCIe retries",
            "In ten minutes. Many: a cable, a riser, a slot.",
            Unit.COUNT,
            _each(f"increase({GPU.of('DCGM_FI_DEV_PCIE_REPLAY_COUNTER')}[10m])"),
        ),
    ),
)

BOARD = Board(
    name="gpu",
    title="GPU",
    description="What the GPUs do and how they are, as dcgm-exporter tells (its default counters).",
    variables=VARIABLES,
    rows=(SUMMARY, WORK, STATE),
)
