"""The divergence of a loss from the caller's arguments."""

from __future__ import annotations

from collections.abc import Mapping

from kdtrain_kernels.divergences import DIVERGENCES, DivergenceSpec, divergence_spec

DEFAULTS = {
    "temperature": 1.0,
    **{name: of.default for row in DIVERGENCES.values() for name, of in row.parameters.items()},
}
"""Argument -> its default in the signatures of the public losses."""


def spec_of(divergence: str | DivergenceSpec, temperature: float, parameters: Mapping[str, float]) -> DivergenceSpec:
    """`divergence` itself if it is a spec, else the one of that name at `temperature`, with its own of `parameters`.

    Raises ValueError for what `divergence_spec` refuses and, beside a spec, for a temperature or a parameter that is
    not at its default: the spec has its own.
    """
    if not isinstance(divergence, DivergenceSpec):
        row = DIVERGENCES.get(divergence)
        read = {name: value for name, value in parameters.items() if row is not None and name in row.parameters}
        return divergence_spec(divergence, temperature=temperature, **read)
    for name, value in {"temperature": temperature, **parameters}.items():
        if value != DEFAULTS[name]:
            raise ValueError(
                f"{name} = {value} beside divergence = {divergence}, which has its own; "
                "leave it out, or give it to divergence_spec"
            )
    return divergence
