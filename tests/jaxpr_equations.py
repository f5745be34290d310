"""What a traced program consists of."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations(jaxpr: Jaxpr, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], JaxprEqn]]:
    """All equations, and the names of the equations that they are nested in."""
    for equation in jaxpr.eqns:
        yield inside, equation
        is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)  # noqa: E731
        for part in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(part):
                name = equation.primitive.name
                yield from equations(part.jaxpr if isinstance(part, ClosedJaxpr) else part, (*inside, name))
