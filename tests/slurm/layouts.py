"""What the runs of these tests are submitted with."""

from __future__ import annotations

TWO_BY_TWO = ("parallel=tp2_pp2", "slurm.nodes=2")
BY_RANK = "slurm.launch=rank"  # one task per rank; the default is an agent per node
