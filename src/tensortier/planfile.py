"""Plans as JSON: written for people and other programs, read back with every field checked."""

from __future__ import annotations

import dataclasses
import json
import math
import types as python_types
import typing
from collections.abc import Mapping
from typing import Any

from tensortier.errors import PlanError
from tensortier.types import Plan

VERSION = 1


def to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON types."""
    return {"tensortier_plan": VERSION, **dataclasses.asdict(plan)}


def from_dict(data: object) -> Plan:
    """The plan that ``to_dict`` wrote.

    Raises:
        PlanError: something is missing, of the wrong type, or unknown; the message names the field.
    """
    if not isinstance(data, Mapping) or "tensortier_plan" not in data:
        raise PlanError("this is not a tensortier plan (it has no field tensortier_plan)")
    version = data["tensortier_plan"]
    if version != VERSION or isinstance(version, bool):
        raise PlanError(f"this plan is of version {version!r:.60}, this tensortier reads version {VERSION}")
    plan = _decode(Plan, {k: v for k, v in data.items() if k != "tensortier_plan"}, "plan")
    assert isinstance(plan, Plan)
    return plan


def parse(text: str) -> Plan:
    """The plan in the text of a plan file.

    Raises:
        PlanError: it is not JSON (cut short, for example), or not a plan; see ``from_dict``.
    """
    try:
        data = json.loads(text)
    except RecursionError as exc:
        raise PlanError("it is nested deeper than any plan") from exc
    except ValueError as exc:
        raise PlanError(f"it is not JSON: {exc}") from exc
    return from_dict(data)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PlanError(f"{where}: expected a list, got {value!r:.60}")
        item, *more = typing.get_args(kind)
        if Ellipsis not in more and len(value) != 1 + len(more):
            raise PlanError(f"{where}: expected {1 + len(more)} values, got {len(value)}")
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise PlanError(f"{where}: expected an object, got {value!r:.60}")
        item = typing.get_args(kind)[1]
        return {str(k): _decode(item, v, f"{where}.{k}") for k, v in value.items()}
    if origin in (typing.Union, python_types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _decode(next(o for o in options if o is not type(None)), value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # JSON has no such numbers, but Python's reader takes them; and an integer may be of any length
        if abs(value) > 1e300 or not math.isfinite(value):
            raise PlanError(f"{where}: {value!r:.60} is not a number that can be")
        return float(value)
    # bool is a subclass of int, but true is no number of layers
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{where}: expected {kind.__name__}, got {value!r:.60}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where}: expected an object, got {value!r:.60}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise PlanError(f"{where}: unknown field {name!r:.60}")
    decoded = {}
    for name, field in fields.items():
        if name in value:
            decoded[name] = _decode(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlanError(f"{where}: the field {name!r} is missing")
    return kind(**decoded)
