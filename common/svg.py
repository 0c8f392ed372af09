"""What an SVG may hold that comes from outside: nothing that reads files, and nothing that takes without bound to draw.

The renderer would read files of this machine into the picture, overflows its stack on deep nesting, and draws for
hours what a few hundred bytes can ask of it. All of that is told by the text alone, before anything is drawn.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from xml.parsers import expat

MAX_DEPTH = 64  # of elements, and of what they refer to; resvg's stack holds about 250
MAX_ELEMENTS = 50_000
MAX_COST = 400_000  # elements drawn, each as often as it is referred to
_EFFECT_COST = 50  # of a filter, a mask, a layer: about so many plain shapes

# Their work grows with numbers that stand in attributes, whatever the size of the picture.
_UNBOUNDED = {"feTurbulence", "feMorphology", "feConvolveMatrix"}
_EFFECTS = {"filter", "mask", "clip-path", "opacity", "mix-blend-mode", "style"}
_GRADIENTS = {"linearGradient", "radialGradient"}
_LOCAL = re.compile(r"url\(\s*[\"']?\s*#([^)\"']+?)\s*[\"']?\s*\)")
_RASTER = re.compile(r"\s*data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")


class SvgError(ValueError):
    """The text is no SVG that may be drawn."""


@dataclass(kw_only=True)
class _Element:
    name: str
    cost: int
    outline: int
    refers_to: list[str] = field(default_factory=list)
    marked_with: list[str] = field(default_factory=list)
    children: list[int] = field(default_factory=list)


def check_svg(text: str) -> list[bytes]:
    """Find out whether an SVG can be drawn without harm.

    Returns:
        The raster pictures inside of it (data addresses): to be checked by whoever knows rasters.

    Raises:
        SvgError: it is not XML, not an SVG, refers to what is outside of it, declares entities, or is too deep, too
            large or too expensive to draw.
    """
    reading = _Reading()
    try:
        reading.parse(text)
    except expat.ExpatError as error:
        raise SvgError(f"not XML ({error})") from None
    _Cost(reading).check()
    return reading.rasters


class _Reading:
    """The elements of an SVG, and what they refer to."""

    def __init__(self) -> None:
        self.elements: list[_Element] = []
        self.named: dict[str, int] = {}
        self.rasters: list[bytes] = []
        self.style = ""
        self._open: list[int] = []

    def parse(self, text: str) -> None:
        """Read the text; ExpatError where it is not XML."""
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler = self._start
        parser.EndElementHandler = lambda _: self._open.pop()
        parser.CharacterDataHandler = self._characters
        parser.EntityDeclHandler = self._entity
        parser.Parse(text, True)

    def _entity(self, name: str, *_: object) -> None:
        raise SvgError(f"it declares the entity {name!r}")

    def _start(self, qualified: str, attributes: dict[str, str]) -> None:
        name = _local(qualified)
        if not self._open and name != "svg":
            raise SvgError(f"its root is {name!r}, not svg")
        if len(self._open) == MAX_DEPTH or len(self.elements) == MAX_ELEMENTS:
            raise SvgError(f"more than {MAX_ELEMENTS} elements, or more than {MAX_DEPTH} in one another")
        if name in _UNBOUNDED:
            raise SvgError(f"{name} is not drawn: it may take without bound")
        outline = sum(len(attributes.get(key, "")) for key in ("d", "points"))
        element = _Element(name=name, outline=outline, cost=_EFFECT_COST if name.startswith("fe") else 1)
        position = len(self.elements)
        for key, value in attributes.items():
            self._attribute(element, _local(key), value, position)
        if self._open:
            self.elements[self._open[-1]].children.append(position)
        self.elements.append(element)
        self._open.append(position)

    def _attribute(self, element: _Element, key: str, value: str, position: int) -> None:
        if key == "id":
            self.named.setdefault(value, position)
        elif key == "href":
            self._href(element, value)
        elif key in _EFFECTS:
            element.cost += _EFFECT_COST
        if "url(" in value:
            is_marked = key.startswith("marker") or (key == "style" and "marker" in value)
            (element.marked_with if is_marked else element.refers_to).extend(_LOCAL.findall(value))

    def _href(self, element: _Element, value: str) -> None:
        if value.strip().startswith("#"):
            element.refers_to.append(value.strip()[1:])
        elif element.name in ("image", "feImage"):
            head = _RASTER.match(value)
            if head is None:
                raise SvgError("it refers to what is outside of it")
            try:
                self.rasters.append(base64.b64decode(_NOT_BASE64.sub("", value[head.end() :])))
            except binascii.Error as error:
                raise SvgError(f"a picture in it is damaged ({error})") from None

    def _characters(self, text: str) -> None:
        if self.elements[self._open[-1]].name == "style":
            self.style += text


class _Cost:
    """How many elements are drawn, each as often as it is referred to."""

    def __init__(self, reading: _Reading) -> None:
        self._elements = reading.elements
        self._named = reading.named
        self._style = reading.style
        # A marker is drawn at each point of an outline; about four characters make a point.
        self._num_points = 1 + sum(element.outline for element in reading.elements) // 4
        self._known: dict[int, tuple[int, int]] = {}  # cost and depth of an element with all that it draws

    def check(self) -> None:
        """Raises SvgError where it is too much."""
        cost, _ = self._of(0, 1)
        # What a rule of a style sheet refers to is counted for every element: any of them may fall under it.
        times = len(self._elements) * (self._num_points if "marker" in self._style else 1)
        cost += times * sum(self._target(name, 1)[0] for name in _LOCAL.findall(self._style))
        self._check(cost, 1)

    def _of(self, position: int, depth: int) -> tuple[int, int]:
        if position in self._known:
            return self._known[position]
        element = self._elements[position]
        cost, deepest = element.cost, 0
        self._check(cost, depth)
        parts = [self._of(child, depth + 1) for child in element.children]
        parts += [self._target(name, depth + 1) for name in element.refers_to]
        num_points = 1 + element.outline // 4 if element.outline else self._num_points
        marks = [self._target(name, depth + 1) for name in element.marked_with]
        for part_cost, part_depth in [*parts, *((num_points * cost, depth) for cost, depth in marks)]:
            cost, deepest = cost + part_cost, max(deepest, part_depth)
        self._known[position] = cost, deepest + 1
        self._check(cost, deepest + 1)
        return self._known[position]

    def _target(self, name: str, depth: int) -> tuple[int, int]:
        position = self._named.get(name)
        if position is None or self._elements[position].name in _GRADIENTS:
            return 0, 0
        return self._of(position, depth)

    def _check(self, cost: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise SvgError(f"what it draws refers to itself, or is nested deeper than {MAX_DEPTH}")
        if cost > MAX_COST:
            raise SvgError(f"it draws more than {MAX_COST} shapes")


def _local(qualified: str) -> str:
    return qualified.rpartition(" ")[2]
