"""Plans as JSON: written for people and other programs, read back with every field checked."""

from __future__ import annotations

import dataclasses
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
    if data["tensortier_plan"] != VERSION:
        raise PlanError(f"this plan is of version {data['tensortier_plan']}, this tensortier reads {VERSION}")
    plan = _decode(Plan, {k: v for k, v in data.items() if k != "tensortier_plan"}, "plan")
    assert isinstance(plan, Plan)
    return plan


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PlanError(f"{where}: expected a list, got {value!r:.60}")
        item = typing.get_args(kind)[0]
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
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
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
