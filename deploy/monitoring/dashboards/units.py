"""Values as people read them: scaled, with their unit, three digits."""

from __future__ import annotations

import math

from deploy.monitoring.dashboards.description import Unit

_SI = ((1e9, "G"), (1e6, "M"), (1e3, "K"))
_IEC = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_SMALL = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_LONG = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"))
_ENDINGS = {
    Unit.REQUESTS_PER_SECOND: " req/s",
    Unit.PER_SECOND: "/s",
    Unit.WATTS: " W",
    Unit.JOULES: " J",
    Unit.HERTZ: "Hz",
}


def spoken(value: float, unit: Unit) -> str:
    """E.g. `1.25 s`, `12 ms`, `99.5 %`, `340 MiB`."""
    if not math.isfinite(value):
        return "-"
    if unit is Unit.RATIO:
        return f"{100 * value:.4g} %"
    if unit is Unit.CELSIUS:
        return f"{value:.3g} °C"
    if unit is Unit.SECONDS:
        return _seconds(value)
    if unit in (Unit.BYTES, Unit.BYTES_PER_SECOND):
        return _scaled(value, _IEC, " ", " B") + ("/s" if unit is Unit.BYTES_PER_SECOND else "")
    return _scaled(value, _SI, " " if unit is Unit.HERTZ else "", "") + _ENDINGS.get(unit, "")


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    for scale, name in _LONG:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    for scale, name in _SMALL:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.1e} s"


def _scaled(value: float, scales: tuple[tuple[float, str], ...], between: str, otherwise: str) -> str:
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{value / scale:.3g}{between}{name}"
    return f"{value:.3g}{otherwise}"
