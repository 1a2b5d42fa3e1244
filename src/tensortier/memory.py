"""Exact bytes per device for a plan: asks llama.cpp, in a process of its own, without allocating anything."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Protocol

from tensortier import errors, formulas, placement, planfile
from tensortier.types import DeviceMemory, ModelInfo, Plan


class Answers(Protocol):
    """Whoever can say what a plan takes."""

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        """Bytes of weights, KV cache and compute buffer per device ("CPU" is RAM)."""
        ...


class Probe:
    """Answers many questions about one or more models from one helper process.

    ::

        with memory.Probe() as probe:
            rows = probe.ask(plan)
    """

    def __init__(self) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensortier._llama.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
            # a debugger that llama.cpp would start may take longer than anybody waits for the process to end
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            # a Ctrl-C at the terminal is for the program that asked, which then closes this one
            start_new_session=True,
        )

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        """Bytes of weights, KV cache and compute buffer per device ("CPU" is RAM).

        Raises:
            ModelFileError, LoadError, PatternError, BackendError, PlanError: as loading the plan would.
                The message of a LoadError holds the last words of a process that llama.cpp ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(planfile.to_dict(plan)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise errors.LoadError(f"llama.cpp gives up on {plan.model}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return tuple(DeviceMemory(**row) for row in answer["memory"])

    def _last_words(self) -> str:
        self._process.wait(timeout=30)
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages.read().decode(errors="replace").splitlines()]
        told = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()] or lines
        return told[0] if told else f"its process ended with code {self._process.returncode}"

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            # a question that a dead process did not take is still in the pipe's buffer
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._messages.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # whatever it is still working on, nobody waits for the answer
            self._process.kill()
        self.close()


class Formulas:
    """Answers the same questions by formula, for a machine or a model that is not here: weights and KV cache to
    the byte but for alignment, the compute buffer within some tens of MiB (``formulas.compute_bytes``).

    ``free``: bytes per device, by which layers are shared out where a plan gives no shares. ``helpers``: devices
    that take wide products of weights in main memory (op offload).
    """

    def __init__(self, model: ModelInfo, free: Mapping[str, int], helpers: Collection[str] = ()) -> None:
        self._model = model
        self._free = free
        self._helpers = helpers

    def ask(self, plan: Plan) -> tuple[DeviceMemory, ...]:
        """As ``Probe.ask``, at once."""
        model, place, settings = self._model, plan.placement, plan.settings
        layers = placement.layer_devices(model, place, self._free)
        where = placement.resolve(model, place, self._free)
        weights = placement.bytes_per_device(model, where)
        output = layers[-1]
        embedding = next((t for t in model.tensors if t.name == "token_embd.weight"), None)
        if model.tied_output and embedding is not None and where[embedding.name] != output:
            weights[output] = weights.get(output, 0) + embedding.nbytes
        kv: dict[str, int] = {}
        for device, size in zip(layers, formulas.kv_bytes(model, settings), strict=False):
            home = device if place.kv_on_device else "CPU"
            kv[home] = kv.get(home, 0) + size
        ffn = {where[t.name] for t in model.tensors if t.role.is_dense_ffn or t.role.is_routed_expert}
        helper, staged, staged_output = self._staged(plan, where, output)
        return tuple(
            DeviceMemory(
                device,
                weights.get(device, 0),
                kv.get(device, 0),
                formulas.compute_bytes(
                    model,
                    settings,
                    attention=device in layers[:-1],
                    ffn=device in ffn,
                    output=device == output,
                    inputs=device == "CPU",
                    staged=staged if device == helper else 0,
                    staged_output=staged_output if device == helper else 0,
                ),
            )
            for device in sorted({"CPU", *layers, *where.values()} | ({helper} if staged else set()))
        )

    def _staged(self, plan: Plan, where: Mapping[str, str], output: str) -> tuple[str, int, int]:
        """The device that is sent weights for wide batches, the largest matrix of a layer that it is sent, and the
        output's where that is sent. llama.cpp asks its devices in order."""
        helper = next((d for d in plan.placement.devices if d in self._helpers), "")
        if not (helper and plan.settings.op_offload):
            return "", 0, 0
        here = [t for t in self._model.tensors if where[t.name] == "CPU" and len(t.shape) >= 2]
        staged = max((t.nbytes for t in here if t.layer is not None), default=0)
        tied = self._model.tied_output and output == "CPU"
        name = "token_embd.weight" if tied else "output.weight"
        return helper, staged, sum(t.nbytes for t in here if t.name == name)


def predict(plan: Plan) -> tuple[DeviceMemory, ...]:
    """One question; see ``Probe.ask``."""
    with Probe() as probe:
        return probe.ask(plan)
