"""Tiles of attention that are so small that short sequences have many of them."""

from __future__ import annotations

import pytest

from megalm_kernels import tables


def small_tiles(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int] = (16, 32)) -> None:
    """Tiles of `sizes` queries and keys in all attention kernels, until the monkeypatch is undone."""
    names = [name for name, rows in tables.TABLES.items() if name.startswith("attention_") and "BLOCK_K" in rows[90][0].settings]
    assert {"attention_forward_16", "attention_dkdv_32", "attention_dq_16", "attention_backward_32"} <= set(names), names
    small = dict(zip(("BLOCK_Q", "BLOCK_K"), sizes, strict=True))
    for name in names:
        for arch, rows in tables.TABLES[name].items():
            monkeypatch.setitem(tables.TABLES[name], arch, [tables.Row(row.limit, {**row.settings, **small}) for row in rows])
    tables._find.cache_clear()
