"""Shapes of everything a traced function computes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr


def _shapes(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
        for part in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(part):
                yield from _shapes(part.jaxpr if isinstance(part, ClosedJaxpr) else part)


@pytest.fixture(scope="session")
def computed_shapes() -> Callable[..., set[tuple[int, ...]]]:
    """(function, *arguments) -> shapes of all results of its jaxpr, those of nested jaxprs included."""

    def shapes(function: Callable, *arguments: Any) -> set[tuple[int, ...]]:
        return set(_shapes(jax.make_jaxpr(function)(*arguments).jaxpr))

    return shapes
