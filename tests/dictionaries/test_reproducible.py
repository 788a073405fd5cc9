"""A training step gives the same bits each time on a GPU too, because no sum uses atomic adds."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_sae.dictionaries import base, penalised
from tests.dictionaries.recipes import (
    CONFIGS,
    N_LATENTS,
    PENALISED,
    VARIANTS,
    make,
    rows,
    sae_rows,
    some_dead,
    step,
)

_IN_NO_ORDER = {
    *("index_add", "index_put", "index_reduce", "put", "scatter_add", "scatter_reduce"),
    *("bincount", "cumsum", "histc"),
}
"""Operations that sum floats in no fixed order on CUDA, per `torch.use_deterministic_algorithms`.

`index_put` does so only with `accumulate=True`.
"""
_WITH_A_DENSE_WAY = (*PENALISED, "crosscoder_relu", "clt_jumprelu")


class NothingAtomic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that fails on float operations whose result depends on the order of a GPU's threads."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.strip("_").removesuffix("_impl")
        if name in _IN_NO_ORDER:
            given = [*args, *kwargs.values()]
            of_floats = any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in given)
            adds = name != "index_put" or any(argument is True for argument in given)
            assert not (of_floats and adds), f"{func} adds up floats in no fixed order on CUDA"
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "sparse_below"),
    [(kind, 1.0) for kind in (*VARIANTS, "routed by batch")]
    + [(kind, 0.0) for kind in _WITH_A_DENSE_WAY],
)
def test_no_step_adds_up_floats_in_no_order(
    kind: str, sparse_below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, constraints, AuxK, reviving and inference sum floats in a fixed order."""
    monkeypatch.setattr(penalised, "SPARSE_BELOW", sparse_below)
    monkeypatch.setattr(base, "SPARSE_BELOW", sparse_below)
    config = VARIANTS.get(kind, CONFIGS["routed"].model_copy(update={"selection": "batch"}))
    sae, x = make(config, torch.float32), rows(torch.float32)
    with NothingAtomic():  # type: ignore[no-untyped-call]
        output = sae.objective(sae_rows(x), step(some_dead()))
        output.terms.total.backward()  # type: ignore[no-untyped-call]
        sae.constrain()
        sae.revive(torch.arange(N_LATENTS) == 9, x, output.error)
        sae.infer(x)


@pytest.mark.parametrize(
    "adds",
    [
        lambda x, at: x.index_add(0, at, x),
        lambda x, at: x.scatter_add_(0, at, x),
        lambda x, at: x.index_put_((at,), x, accumulate=True),
        lambda x, at: x.requires_grad_().index_select(0, at).sum().backward(),
        lambda x, at: x.requires_grad_().gather(0, at).sum().backward(),
        lambda x, at: x.requires_grad_()[at].sum().backward(),
        lambda x, at: torch.bincount(at, x),
        lambda x, _: x.cumsum(0),
    ],
)
def test_such_sums_are_found(adds: Any) -> None:
    refused = pytest.raises(AssertionError, match="in no fixed order")
    with refused, NothingAtomic():  # type: ignore[no-untyped-call]
        adds(torch.ones(3), torch.tensor([0, 1, 1]))


def test_sums_of_integers_are_the_same_in_any_order() -> None:
    with NothingAtomic():  # type: ignore[no-untyped-call]
        counts = torch.zeros(2).int().scatter_add_(0, torch.tensor([1, 1]), torch.ones(2).int())
    assert counts.tolist() == [0, 2]
