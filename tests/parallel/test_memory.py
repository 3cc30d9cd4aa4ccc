"""The bytes of model states are those of the formula, ZeRO's gradients are never whole, and a start never holds the model."""

from __future__ import annotations

import gc
import itertools
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megalm.checkpoint import state as checkpoint
from megalm.checkpoint.state import RunState, load_checkpoint, save_checkpoint
from megalm.config.parallel import ParallelConfig
from megalm.config.train import ITEM_BYTES
from megalm.parallel import zero_config
from megalm.parallel.engine import PlainEngine
from megalm.parallel.memory import ModelStates, model_states
from megalm.parallel.topology import build_topology
from megalm.parallel.zero import ZeroEngine
from megalm.testing import run_distributed
from megalm.train import build
from tests.parallel.tiny import adamw, tiny_config, toy_groups

WIDTH, LAYERS, BUCKET = 192, 16, 40_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = [(0, "step"), (1, "step"), (2, "step"), (2, "microbatch"), (3, "step"), (3, "microbatch")]
RUNS = list(itertools.product(DTYPES, KINDS))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def storages() -> dict[int, torch.UntypedStorage]:
    """Every live tensor memory of this process, by its address. Gradients that Python never saw count too."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                for tensor in (item, item.grad if item.is_leaf else None):
                    if tensor is not None and tensor.device.type == "cpu":
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage
    return found


class Meter:
    """Bytes that live now and did not when it was made."""

    def __init__(self) -> None:
        self.before = storages()  # kept, so that no address is used again
        self.peak = 0

    def read(self) -> int:
        found = sum(storage.nbytes() for address, storage in storages().items() if address not in self.before)
        self.peak = max(self.peak, found)
        return found


def measure(parallel: ParallelConfig, precision: str) -> tuple[int, int, int]:
    """Parameters, bytes at the end of the second step's last backward, and the most within that backward."""
    topology, meter = build_topology(ParallelConfig(), torch.device("cpu")), Meter()
    model = Stack().to(DTYPES[precision])
    groups = toy_groups(model)
    if parallel.zero == 0:
        engine = PlainEngine(groups, adamw, topology, 0.5)
    else:
        engine = ZeroEngine(nn.ModuleList([model]), groups, adamw, topology, 0.5, parallel)  # type: ignore[assignment]
    x = torch.ones(2, WIDTH, dtype=DTYPES[precision])
    for step in range(2):
        with engine.accumulate():
            for microbatch in range(2):
                loss = engine.scale_loss(model(x).float().square().mean())
                if step and microbatch:  # in the last backward
                    for layer in model.layers[::6]:
                        layer.register_full_backward_hook(lambda *_: meter.read() and None)
                    loss = engine.scale_loss(model(x).float().square().mean())
                loss.backward()
                engine.after_backward()
            held = meter.read() if step else 0
        if not step:
            engine.step(1e-3)
    return sum(p.numel() for p in Stack().parameters()), held, meter.peak


def measure_all(rank: int, world_size: int) -> dict:
    zero_config.BUCKET_ELEMENTS = BUCKET
    zero_config.import_deepspeed()
    measure(ParallelConfig(zero=3), "fp32")
    gc.freeze()  # what the imports made is not looked at again and again
    return {(p, kind): measure(ParallelConfig(zero=kind[0], zero_reduce=kind[1]), p) for p, kind in RUNS}


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return run_distributed(measure_all, 2)


@pytest.mark.dist
@pytest.mark.parametrize(("precision", "kind"), RUNS)
def test_formula(measured, precision, kind) -> None:
    zero, reduce = kind
    for rank in measured:
        parameters, held, _ = rank[precision, kind]
        expected = model_states(parameters, 2, zero, precision, reduce == "microbatch", bucket_elements=BUCKET)
        assert held == pytest.approx(expected.total, rel=0.05)


@pytest.mark.dist
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_are_never_whole_with_reduction_in_the_backward(measured, zero, precision) -> None:
    for rank in measured:
        parameters, _, whole = rank[precision, (zero, "step")]
        _, _, shared = rank[precision, (zero, "microbatch")]
        assert whole - shared > 0.3 * 4 * parameters


def test_bytes_of_an_element_are_those_of_its_dtype() -> None:
    assert {name: dtype.itemsize for name, dtype in build.DTYPES.items()} == ITEM_BYTES


def test_terms() -> None:
    assert model_states(100, 1, 0, "fp32") == ModelStates(400, 400, 0, 800, 0)
    assert model_states(100, 4, 0, "bf16") == ModelStates(200, 400, 400, 800, 0)
    assert model_states(100, 4, 0, "fp16", accumulate_fp32=False) == ModelStates(200, 200, 400, 800, 0)
    assert model_states(100, 4, 1, "bf16") == ModelStates(200, 400, 100, 200, 0)
    assert model_states(100, 4, 2, "bf16", in_backward=True) == ModelStates(200, 100, 100, 200, 0)
    assert model_states(101, 4, 3, "bf16", in_backward=True) == ModelStates(52, 104, 104, 208, 404)
    shared = model_states(100, 4, 3, "bf16", offload=True, bucket_elements=10)
    assert (shared.gradients, shared.buckets, shared.offloaded) == (500, 40, 300)
    assert shared.on_device == shared.total - 300 == 50 + 500 + 40


# --- the start --------------------------------------------------------------------------------------------------------


def start(rank: int, world_size: int, folder: str) -> dict:
    """Bytes at each moment of a start on four copies, drawn and loaded."""
    zero_config.BUCKET_ELEMENTS = BUCKET
    zero_config.import_deepspeed()
    gc.freeze()
    config = tiny_config(zero=3, layers=3)
    config.model.hidden_size, config.model.ffn_size, config.model.vocab_size = 128, 256, 256
    topology = build_topology(config.parallel, torch.device("cpu"))
    meter = Meter()
    place = build.build_place(config, topology, torch.float32)
    assert place is not None

    def placed(parameter: nn.Parameter) -> None:
        meter.read()  # the whole parameter as drawn, and this rank's slice of it
        place(parameter)

    stage = build.build_stage(config, topology, 0, 1, torch.float32, place=placed)
    sizes = [p.ds_numel for p in stage.parameters()]  # type: ignore[attr-defined]
    seen = {"parameters": sum(sizes), "largest": max(sizes), "drawn": meter.peak}
    engine = build.build_engine(config, topology, nn.ModuleList([stage]))
    seen["built"] = meter.read()
    written = save_checkpoint(Path(folder), engine, RunState(), asdict(config), 0)
    meter.peak, original = 0, checkpoint.read_box

    def read(*args: object) -> Tensor:
        value = original(*args)  # type: ignore[arg-type]
        meter.read()
        return value

    checkpoint.read_box = read  # type: ignore[assignment]
    load_checkpoint(written, engine, asdict(config)["model"])
    return seen | {"loaded": meter.peak}


@pytest.mark.dist
def test_a_start_holds_a_share_and_one_parameter(tmp_path: Path) -> None:
    for seen in run_distributed(start, 4, str(tmp_path)):
        weights, largest = 4 * seen["parameters"], 4 * seen["largest"]
        assert largest < weights / 8, "else the test shows nothing"
        assert seen["drawn"] < 1.05 * weights / 4 + 2.1 * largest
        assert seen["drawn"] < weights / 2
        assert seen["loaded"] < seen["built"] + 2.1 * largest
