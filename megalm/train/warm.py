"""Imported for its effect, by the fork server alone: everything that a rank of a run would import (see parallel/forked.py)."""

from __future__ import annotations

import os

import torch

from megalm.config.model import ModelConfig
from megalm.models.registry import build_model

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU when it is imported, and a fork can have none

import megalm.train.pretrain  # noqa: F401
from megalm.parallel.zero_config import import_deepspeed

import_deepspeed()
with torch.device("meta"):  # a model's first initialisation on the meta device imports hundreds of modules
    build_model(ModelConfig(vocab_size=2, hidden_size=2, num_layers=1, num_heads=1))
