"""Captured calls by themselves: what they give is the caller's, whatever is replayed after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.kit.frozen import frozen
from vtc.runtime.graphs import Graphs

CPU = torch.device("cpu")


@pytest.fixture(params=[nullcontext, frozen], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def same(got: Any, want: Any) -> None:
    (a, one), (b, other) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert one == other
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            assert x is y or x == y
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


def many(x: Tensor) -> Any:
    """Tensors of all item sizes and shapes, twice the same, a large one, and other things."""
    number = x.sum().long()
    return {
        "flags": [x > 0, (x > 1)[:0], number],
        "views": (x[:, 1], x.T, x[:1].expand(3, -1), x.to(torch.bfloat16)),
        "twice": (x, x),
        "large": x.sum() + torch.zeros(200, 200),
        "rest": (None, "name", 3),
    }


def one(x: Tensor) -> Any:
    return x * 2


def large(x: Tensor) -> Any:
    return [x.sum() + torch.zeros(200, 200), x.sum() - torch.zeros(200, 200)]


def nothing(x: Tensor) -> Any:
    return ["nothing"]


@pytest.mark.parametrize("function", [many, one, large, nothing])
def test_what_is_replayed_is_what_the_function_gives(function: Callable[[Tensor], Any]) -> None:
    graphs = Graphs(CPU, "eager")
    given = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    got = [graphs.run("key", function, [x]) for x in given]
    assert graphs.captures == 1
    for x, found in zip(given, got, strict=True):
        same(found, function(x))


def test_what_a_call_gave_can_be_written_to() -> None:
    graphs, x = Graphs(CPU, "eager"), torch.ones(5, 3)
    found = graphs.run("key", many, [x])
    for part in pytree.tree_leaves(found):
        if isinstance(part, Tensor):
            part.zero_()
    same(graphs.run("key", many, [x]), many(x))
