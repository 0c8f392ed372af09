"""How far raters agree beyond chance, on answers that are names (0 and 1, or any others)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

Answers = Mapping[Hashable, Hashable]  # of one rater: by what was rated, the answer


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Alpha of nominal answers, where raters may have left anything out.

    1: all agree; 0: as chance would have it; None where it says nothing: no unit has two answers, or all answers are the
    same (then there is no disagreement that chance could explain).

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C, nominal data: of values c that were
    paired with values k in the coincidence matrix o, alpha = 1 - (n - 1) sum_{c != k} o_ck / sum_{c != k} n_c n_k.

    Args:
        units: of each thing that was rated, the answers it got; units with fewer than two count for nothing.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(pairable, Counter[Hashable]())
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum(_differing(unit) / (sum(unit.values()) - 1) for unit in pairable)
    return 1.0 - (n - 1) * observed / expected


def cohen_kappa(first: Answers, second: Answers) -> tuple[float | None, int]:
    """Kappa of two raters over what both rated, and how much that is.

    Source: Cohen, A coefficient of agreement for nominal scales (1960), equation 1. None where both rated nothing, or chance
    alone has them agree on everything.
    """
    common = [(answer, second[thing]) for thing, answer in first.items() if thing in second]
    n = len(common)
    if not n:
        return None, 0
    one, other = (Counter(pair[i] for pair in common) for i in (0, 1))
    agreeing = sum(a == b for a, b in common) / n
    by_chance = sum(one[answer] * other[answer] for answer in one) / (n * n)
    return (None if by_chance == 1.0 else (agreeing - by_chance) / (1.0 - by_chance)), n


def _differing(unit: Counter[Hashable]) -> int:
    """Ordered pairs of answers of a unit that differ."""
    n = sum(unit.values())
    return n * n - sum(count * count for count in unit.values())
