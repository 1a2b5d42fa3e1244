"""Workloads by name and by numbers, and how one is made to fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortier import workloads
from tensortier.errors import UsageError
from tensortier.types import Workload


def test_the_default_is_chat() -> None:
    assert workloads.NAMED["chat"] == Workload()
    assert all(name == workload.name for name, workload in workloads.NAMED.items())
    assert set(workloads.NAMED) == {"chat", "code", "long-document", "agent"}


def test_numbers() -> None:
    found = workloads.parse("512:256:4096")
    assert (found.prompt, found.output, found.depth) == (512, 256, 4096)
    assert found.context == 4864
    assert workloads.parse("1:1:0").context == 2


@pytest.mark.parametrize(
    "text",
    ["", "chatt", "1:2", "1:2:3:4", "0:1:1", "1:0:1", "-1:1:1", "1:1:x", "1.5:1:1", "٣:1:1", "1:1:99999999"],
)
def test_what_is_no_workload(text: str) -> None:
    with pytest.raises(UsageError):
        workloads.parse(text)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="chat, code, long-document, agent"):
        workloads.parse("poem")


counts = st.integers(1, 1 << 24)


@given(st.builds(Workload, st.just("x"), counts, counts, st.integers(0, 1 << 24)), st.integers(2, 1 << 25))
def test_fitted(workload: Workload, context: int) -> None:
    found = workloads.fitted(workload, context)
    assert found.context <= context
    assert found.prompt >= 1 and found.output >= 1 and found.depth >= 0
    if workload.context <= context:
        assert found == workload
    else:
        assert found.context == context  # no more is given up than has to be
    if workload.prompt + workload.output <= context:
        assert (found.prompt, found.output) == (workload.prompt, workload.output)
