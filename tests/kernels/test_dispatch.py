"""The choice of a kernel: made once, with a reason, and never silently another than asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megalm_kernels
from megalm.config import kernel_rules
from megalm.config.kernels import KERNELS, KernelsConfig
from megalm.errors import ConfigError
from megalm.train.kernels import choose_kernels, describe
from megalm_kernels import compat, dispatch
from megalm_kernels.attention import operators


@pytest.fixture
def registry(monkeypatch):
    """Two operations: `op` with three implementations, of which Triton's needs a GPU; `plain` with torch's alone."""
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_orders", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    dispatch.register("op", "torch", lambda: "torch")
    dispatch.register("op", "triton", lambda: "triton", lambda device: "" if device == "cuda" else "no GPU")
    dispatch.register("op", "apex", lambda: "apex", lambda device: "absent" if device == "cpu" else "")
    dispatch.register("plain", "torch", lambda: "torch")


def chosen(choices: list[dispatch.Choice]) -> dict[str, tuple[str, str]]:
    return {choice.operation: (choice.backend, choice.reason) for choice in choices}


def test_auto_takes_the_first_usable_and_says_why(registry):
    assert chosen(dispatch.choose("auto", "cpu"))["op"] == ("torch", "triton: no GPU")
    assert dispatch.implementation("op")() == "torch"
    assert chosen(dispatch.choose("auto", "cuda")) == {
        "op": ("triton", "the fastest here"),
        "plain": ("torch", "triton: has none"),
    }
    assert dispatch.implementation("op")() == "triton"


def test_apex_is_used_only_when_asked_for(registry):
    assert chosen(dispatch.choose("apex", "cuda")) == {
        "op": ("apex", "asked for"),
        "plain": ("torch", "apex: has none; triton: has none"),
    }
    assert chosen(dispatch.choose("torch", "cuda", {"op": "apex"}))["op"] == ("apex", "asked for")


def test_an_operation_may_have_an_order_of_its_own(registry):
    dispatch.register("op", "cudnn", lambda: "cudnn", lambda device: "" if device == "cuda" else "no cuDNN")

    def order(device: str, facts: dispatch.Facts) -> dispatch.Order:
        if "head_dim" in facts:
            return dispatch.Order(["cudnn", "torch"], "measured", [f"triton: not with {facts['head_dim']}"])
        return dispatch.Order(["cudnn", "triton", "torch"], "measured")

    dispatch.prefer("op", order)
    assert chosen(dispatch.choose("auto", "cuda"))["op"] == ("cudnn", "measured")
    assert chosen(dispatch.choose("auto", "cpu"))["op"] == ("torch", "cudnn: no cuDNN; triton: no GPU")
    assert chosen(dispatch.choose("auto", "cuda", facts={"head_dim": 5}))["op"] == ("cudnn", "triton: not with 5")
    assert chosen(dispatch.choose("triton", "cuda"))["op"] == ("triton", "asked for")
    assert chosen(dispatch.choose("auto", "cuda", {"op": "torch"}))["op"] == ("torch", "asked for")
    assert chosen(dispatch.choose("cudnn", "cuda")) == {
        "op": ("cudnn", "asked for"),
        "plain": ("torch", "cudnn: has none; triton: has none"),
    }
    with pytest.raises(megalm_kernels.Unavailable, match=r"plain has .*backend=cudnn on cuda: cudnn: has none \(it has torch\)"):
        dispatch.choose("auto", "cuda", {"plain": "cudnn"})


def test_what_is_asked_for_and_cannot_run_is_an_error(registry):
    before = chosen(dispatch.choose("auto", "cpu"))
    refused = [("triton", {}, "no GPU"), ("auto", {"op": "apex"}, "absent"), ("auto", {"plain": "triton"}, "none")]
    for backend, operations, reason in refused:
        with pytest.raises(megalm_kernels.Unavailable, match=reason):
            dispatch.choose(backend, "cpu", operations)
    with pytest.raises(ValueError, match="no operation is called opp; there are op, plain"):
        dispatch.choose("auto", "cpu", {"opp": "torch"})
    assert chosen(dispatch.explain()) == before, "a refused choice leaves the last one"


def test_a_context_changes_the_choice_and_gives_it_back(registry):
    dispatch.choose("auto", "cuda")
    with dispatch.use("auto", "cuda", op="torch") as choices:
        assert chosen(choices)["op"] == ("torch", "asked for")
        assert dispatch.implementation("op")() == "torch"
    assert dispatch.implementation("op")() == "triton"
    dispatch.choose("torch", "cuda")
    with dispatch.use(op="apex", device_type="cuda"), dispatch.use(plain="torch"):
        assert dispatch.implementation("op")() == "apex", "what is not named stays as it was"
    dispatch.choose("auto", "cuda")
    with pytest.raises(RuntimeError), dispatch.use("torch", "cuda"):
        raise RuntimeError
    assert dispatch.implementation("op")() == "triton"


def test_the_first_use_chooses_for_this_machine(registry):
    here = "triton" if torch.cuda.is_available() else "torch"
    assert dispatch.implementation("op")() == here


def test_a_run_that_asks_for_the_impossible_gets_the_key_and_a_fix(registry):
    config = KernelsConfig(backend="triton")
    config.operations = dict  # the operations of this registry
    with pytest.raises(ConfigError) as caught:
        choose_kernels(config, "cpu")
    (problem,) = caught.value.problems
    assert (problem.key, problem.value, problem.fix) == ("kernels.backend", "triton", "kernels.backend=auto")
    config = KernelsConfig()
    config.operations = lambda: {"op": "apex"}
    with pytest.raises(ConfigError, match=r"kernels\.op = apex") as caught:
        choose_kernels(config, "cpu")
    assert "absent" in str(caught.value)
    assert describe(dispatch.choose("auto", "cuda")) == "torch for plain (triton: has none); triton for op (the fastest here)"
    assert describe(dispatch.choose("torch", "cpu")) == "torch (asked for)"


def test_the_configuration_knows_what_training_uses_and_its_implementations():
    assert set(KERNELS) - {"linear_cross_entropy"} == set(dispatch._registry)
    for name in KernelsConfig().operations():
        allowed = set(KernelsConfig.__dataclass_fields__[name].metadata["allowed"])
        also = {"torch"} if name == "attention" else set()  # backend=torch, which is sdpa there
        assert allowed | also == {"auto", *dispatch._registry[name]}, name
    assert {name for has in dispatch._registry.values() for name in has} == set(dispatch.BACKENDS)
    assert [operators.suits(n) for n in range(300)] == [kernel_rules.suits(n) for n in range(300)]
    package = Path(megalm_kernels.__file__).parent
    sources = "".join(path.read_text() for path in (package.parents[1] / "megalm").rglob("*.py"))
    imported = set(re.findall(r"\w+", " ".join(re.findall(r"from megalm_kernels import (.*)", sources))))
    owners = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm", "FusedAdamW": "fused_adam", "flash_attention": "attention"}
    assert {owners.get(name, name) for name in imported} & set(dispatch._registry) == set(KernelsConfig().operations())


def test_names_that_do_not_exist_are_refused(registry):
    words = "no backend is called tritn; there are auto, triton, torch, apex, sdpa, cudnn, reference"
    for arguments in (("tritn",), ("auto", "cpu", {"op": "tritn"})):
        with pytest.raises(ValueError, match=words):
            dispatch.choose(*arguments)
    with pytest.raises(ValueError, match="the device type is 'tpu', wanted cpu or cuda"):
        dispatch.choose("auto", "tpu")


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
import torch, megalm_kernels
choices = megalm_kernels.choose()
assert all(choice.backend == ("sdpa" if choice.operation == "attention" else "torch") for choice in choices), choices
assert any("triton is not installed" in choice.reason for choice in choices), choices
x = torch.ones(2, 4)
assert megalm_kernels.rms_norm(x, torch.ones(4), 0.0).equal(x)
"""


def test_the_package_works_with_no_triton_installed():
    program = BLOCKED.replace("import torch, megalm", "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\nimport torch, megalm")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_importing_the_package_imports_no_triton_kernel():
    program = "import sys, megalm_kernels; assert not [m for m in sys.modules if m.startswith('megalm_kernels.device')]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


START = """
import sys, torch
import megalm.train.pretrain
from megalm.parallel.memory_meter import MemoryMeter
from megalm_kernels import FusedAdamW
meter = MemoryMeter()
meter.start()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = FusedAdamW([weight])
weight.grad = torch.ones(2)
optimizer.step()
meter.stop()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"deepspeed", "sympy", "triton"}), "torch._dynamo" in sys.modules)
"""


def test_a_start_imports_no_compiler():
    """It takes every rank a second or two of CPU time, at every start and restart; who compiles imports it then."""
    said = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[] False"


def test_the_mark_for_the_compiler_is_torchs_own():
    def ours() -> None: ...
    def theirs() -> None: ...

    assert vars(compat.assume_constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
    add = torch.optim.Optimizer.add_param_group
    assert compat.undecorated(add) is not add and compat.undecorated(ours) is ours
