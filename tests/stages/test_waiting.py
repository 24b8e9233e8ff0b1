"""Stage one does not wait for its device inside a row: on a GPU each operation counted here would be such a wait."""

from collections import Counter
from typing import Any

import pytest
import torch
from fpo.stages.model.anatomy import anatomy
from fpo.stages.model.sae import Site
from fpo.stages.scoring.measure import RowResult, measure_pairs
from pairs import calm_gemma2, random_pairs
from tiny import tiny_sae
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item")


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [8, None])
@pytest.mark.parametrize("count", [2, 12])
def test_a_row_is_read_once_however_many_responses_it_holds(monkeypatch, count, keep):
    saes = [tiny_sae(), tiny_sae(site=Site(1, "mlp_out"), seed=1)]
    waits, reads = Waits(), Counter()
    plain_read = RowResult.read

    def read(self: RowResult, *args: Any) -> Any:
        reads["read"] += 1
        for name in ("cpu", "tolist", "numpy"):  # from here on all is on the host
            monkeypatch.setattr(torch.Tensor, name, plain[name])
        try:
            return plain_read(self, *args)
        finally:
            reads["finished"] += 1

    plain = {name: getattr(torch.Tensor, name) for name in ("cpu", "tolist", "numpy")}

    def counted(name: str) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.found[name] += 1
            return plain[name](self, *args, **kwargs)

        return call

    for name in plain:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(RowResult, "read", read)
    model = calm_gemma2()
    anatomy(model)  # found once a model
    with waits:
        measured = measure_pairs(model, random_pairs(0, count), saes, "fp32", token_budget=10_000, keep_features=keep)
    assert len(measured) == count
    assert reads["read"] == reads["finished"] == 1
    assert sum(waits.found.values()) + reads["read"] <= 3, waits.found
