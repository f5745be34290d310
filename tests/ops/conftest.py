"""Shapes of everything a traced function computes."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jaxpr_equations import equations


@pytest.fixture(scope="session")
def computed_shapes() -> Callable[..., set[tuple[int, ...]]]:
    """(function, *arguments) -> shapes of all results of its jaxpr, those of nested jaxprs included."""

    def shapes(function: Callable, *arguments: Any) -> set[tuple[int, ...]]:
        traced = jax.make_jaxpr(function)(*arguments)
        return {v.aval.shape for _, equation in equations(traced.jaxpr) for v in equation.outvars}

    return shapes
