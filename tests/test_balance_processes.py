"""Processes that control together agree to the bit, and are one process with all of their tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import circuitroute as cr
from tests import balance_worker
from tests.balance_worker import SPLITS, E, controllers, logits, steps

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
def test_two_processes_are_one_with_all_tokens(tmp_path: Path) -> None:
    paths = [str(ROOT), str(ROOT / "compilers"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, balance_worker.__file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert "target adds up to 4" in "".join(map(chr, first["error"].tolist()))
    for name, controller in controllers().items():
        alone = steps(controller, logits(), None)
        for split in SPLITS:
            found = first[f"{name}/{split}"]
            if name.startswith(("LossFree", "Quantile")):  # whole numbers of tokens
                assert torch.equal(found, alone), (name, split)
            torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
    wanted = cr.balance.bias_for(cr.compile(cr.Exactly(2), E)(logits().double()))
    for split in SPLITS:
        torch.testing.assert_close(first[f"bias_for/{split}"], wanted, rtol=0, atol=1e-9)
