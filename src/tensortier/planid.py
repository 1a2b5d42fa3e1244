"""What a plan was made for: fingerprints of a model and of a machine, readable enough to say what differs."""

from __future__ import annotations

import hashlib

from tensortier.errors import PlanError
from tensortier.types import Hardware, ModelInfo, Plan

_DESCRIBED = "described"  # the first part of the identity of a machine that is not here


def of_model(model: ModelInfo) -> str:
    """The same for the same tensors at any path, split into files or not: the architecture and every tensor's
    name, type, shape and bytes. Values are not read: a fine-tuned model of the same shapes has the same plan."""
    digest = hashlib.sha256(model.architecture.encode())
    for t in sorted(model.tensors, key=lambda t: t.name):
        digest.update(f"\n{t.name}\0{t.qtype}\0{t.shape}\0{t.nbytes}".encode())
    return f"{_describe(model)}, sha256:{digest.hexdigest()[:32]}"


def of_machine(hardware: Hardware) -> str:
    """Main memory, and every device's name, description and memory, joined by "; ". What is free now is no part
    of it. Sizes are rounded to a tenth of a GiB: drivers and kernels keep some MiB more or less."""
    parts = [f"{_gib(hardware.ram_total)} of RAM"]
    for device in hardware.devices:
        size = "" if device.kind == "cpu" else f" with {_gib(device.memory_total)}"
        parts.append(f"{device.name} is {device.description.replace(';', ',')}{size}")
    if is_described(hardware):
        parts.insert(0, _DESCRIBED)
    return "; ".join(parts)


def is_described(hardware: Hardware) -> bool:
    """True for a machine made of catalogue entries."""
    return any(d.details.get("provenance") == "catalogue" for d in hardware.devices)


def check_model(plan: Plan, model: ModelInfo) -> None:
    """Raises PlanError where ``plan`` was made for another model than ``model``; it says what differs."""
    found = of_model(model)
    if not plan.model_id or plan.model_id == found:
        return
    made_for, here = plan.model_id.rpartition(", sha256:")[0], _describe(model)
    if made_for == here:
        here = "another with the same number of tensors and bytes, but other names, types or shapes"
    raise PlanError(
        f"this plan is for another model: it was made for {made_for or plan.model_id}, and {model.path} is "
        f"{here}. {_again(model.path)}"
    )


def check_present(plan: Plan) -> None:
    """Raises PlanError where ``plan`` was made for a machine that was only described."""
    first, *parts = plan.machine_id.split("; ")
    if first == _DESCRIBED:
        raise PlanError(
            f"this plan is for a machine that was only described ({', '.join(parts)}). {_again(plan.model)}"
        )


def check_machine(plan: Plan, hardware: Hardware) -> None:
    """Raises PlanError where ``plan`` was made for another machine than ``hardware``; it says what differs."""
    check_present(plan)
    if not plan.machine_id:
        return
    made_for, here = plan.machine_id.split("; "), of_machine(hardware).split("; ")
    if made_for == here:
        return
    there = ", ".join(part for part in made_for if part not in here) or "fewer devices"
    now = ", ".join(part for part in here if part not in made_for) or "fewer devices"
    raise PlanError(f"this plan is for another machine: there {there}; here {now}. {_again(plan.model)}")


def _again(model: str) -> str:
    return f"Make a new plan with: tensortier plan {model} --json"


def _describe(model: ModelInfo) -> str:
    return f"{model.architecture} with {len(model.tensors)} tensors of {model.nbytes} bytes"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
