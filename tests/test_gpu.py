"""What only a CUDA device can show: ``pytest -m gpu``."""

import pytest
import torch

from fitted_runs import toy_recipe
from sidetune import SIDES, fit, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("side", sorted(SIDES))
@pytest.mark.parametrize("mode", ["stored", "live"])
def test_a_run_fitted_on_a_gpu_serves_on_a_cpu(image_folder, tmp_path, side, mode):
    recipe = toy_recipe(side, f"features.mode={mode}")
    store = None if mode == "live" else tmp_path / "store"
    run = fit(image_folder, out=tmp_path / "run", recipe=recipe, store=store, device="cuda", quiet=True)
    assert run.metrics["cost"]["peak_gpu_bytes"] > 0
    files = sorted(image_folder.glob("*/*.png"))[:20]
    here, there = (load(run.folder, device=device).predict(files) for device in ("cpu", "cuda"))
    for one, two in zip(here, there, strict=True):
        assert one.label == two.label
        assert list(one.values.values()) == pytest.approx(list(two.values.values()), abs=2e-2)
