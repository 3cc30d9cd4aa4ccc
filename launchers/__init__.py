"""One Hydra app per verb of the life of a model. Light to import: Hydra and torch come in where they are needed."""

import sys
from pathlib import Path

# Hydra finds plugins only in the namespace package hydra_plugins; this folder holds ours and nothing else.
sys.path.append(str(Path(__file__).resolve().parent / "hydra"))
