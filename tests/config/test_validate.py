"""Every row of the table raises, and the proposed fixes lead to a config that passes."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.config import fields, kernel_rules
from megalm.config.load import examine, load
from megalm.config.run import ParityRun, RunConfig
from megalm.config.validate import RULES, check, expand_layouts, split_shares, validate
from megalm.errors import ConfigError, Problem

# row of the table: a config that breaks it, as {dotted key: value}
BREAKS: dict[str, dict[str, Any]] = {
    "fold_counted": {"data.fold": 5},
    "fold_evaluated": {"data.fold": 1, "train.eval_every": 0},
    "layout_fits": {"cluster.num_processes": 3, "parallel.tensor_parallel": 2},
    "kv_heads_per_head": {"model.num_kv_heads": 3},
    "hidden_per_head": {"model.num_heads": 3},
    "rope_even": {"model.head_dim": 33},
    "heads_per_rank": {"parallel.tensor_parallel": 8},
    "kv_heads_per_rank": {"parallel.tensor_parallel": 4, "model.num_heads": 12, "model.num_kv_heads": 6, "model.head_dim": 8},
    "ffn_per_rank": {"parallel.tensor_parallel": 2, "model.ffn_size": 511},
    "sequence_per_rank": {"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True, "data.seq_length": 127},
    "sequence_parallel_used": {"parallel.sequence_parallel": True},
    "layer_per_chunk": {"parallel.pipeline_parallel": 5},
    "split_known": {"parallel.pipeline_parallel": 2, "parallel.stage_split": "most"},
    "split_length": {"parallel.pipeline_parallel": 2, "parallel.stage_split": "2,1,1"},
    "split_sum": {"parallel.pipeline_parallel": 2, "parallel.stage_split": "3,3"},
    "split_empty": {"parallel.pipeline_parallel": 4, "parallel.stage_split": "2,0,1,1"},
    "recompute_every_used": {"train.recompute_every": 2},
    "recompute_modules_used": {"train.recompute_modules": ["mlp"]},
    "offload_device": {"train.offload_activations": "cpu"},
    "offload_path_used": {"train.offload_path": "x"},
    "chunks_schedule": {"parallel.pipeline_parallel": 2, "parallel.chunks": 2},
    "interleaved_chunks": {"parallel.pipeline_parallel": 2, "parallel.schedule": "interleaved"},
    "chunks_stages": {"parallel.chunks": 2, "parallel.schedule": "gpipe"},
    "two_chunks": {"parallel.pipeline_parallel": 2, "parallel.schedule": "zbv"},
    "schedule_file_given": {"parallel.pipeline_parallel": 2, "parallel.schedule": "csv"},
    "schedule_file_used": {"parallel.pipeline_parallel": 2, "parallel.schedule_file": "x.csv"},
    "trace_name": {"train.trace": "trace.svg"},
    "trace_reached": {"train.trace": "trace.json", "train.trace_step": 5, "train.steps": 4, "optim.warmup_steps": 1},
    "ledger_reached": {"train.ledger_step": 1001},
    "batch_divides": {"train.global_batch_size": 15},
    "sequence_fits": {"data.seq_length": 2048},
    "split_shares": {"data.split": "0.9,0.1"},
    "eval_has_data": {"data.split": "1,0,0", "train.eval_every": 5},
    "patience_used": {"train.patience": 1},
    "lr_order": {"optim.min_lr": 1.0},
    "record_step_used": {"train.record_step": 2},
    "record_step_runs": {"train.record": "records", "train.record_step": 1001},
    "warmup_ends": {"optim.warmup_steps": 1000},
    "wsd_used": {"optim.wsd_decay_steps": 5},
    "wsd_fits": {"optim.schedule": "wsd", "optim.wsd_decay_steps": 600, "optim.warmup_steps": 500},
    "microbatch_zero": {"parallel.zero_reduce": "microbatch", "parallel.zero": 1},
    "microbatch_tied": {
        "parallel.zero_reduce": "microbatch",
        "parallel.zero": 2,
        "parallel.pipeline_parallel": 2,
        "model.tie_embeddings": True,
    },
    "microbatch_whole_backward": {
        "parallel.zero_reduce": "microbatch",
        "parallel.zero": 3,
        "parallel.pipeline_parallel": 2,
        "parallel.schedule": "zbh1",
    },
    "offload_zero": {"parallel.zero_offload": "cpu"},
    "nvme_zero3": {"parallel.zero_offload": "nvme", "parallel.zero_offload_path": "/nvme", "parallel.zero": 2},
    "nvme_path": {"parallel.zero_offload": "nvme", "parallel.zero": 3},
    "nvme_path_used": {"parallel.zero_offload_path": "/nvme"},
    "node_size_zero3": {"parallel.zero_node_size": 2, "parallel.zero": 2, "cluster.num_processes": 4},
    "node_size_divides": {"parallel.zero_node_size": 3, "parallel.zero": 3, "cluster.num_processes": 4},
    "quantized_zero3": {"parallel.zero_quantized": True, "parallel.zero": 2},  # on a machine with GPUs
    "fuse_gathered": {"kernels.fuse_projections": True, "parallel.zero": 3},
    **{f"{name}_device": {f"kernels.{name}": "triton"} for name in kernel_rules.NAMES},
    "layer_norm_used": {"kernels.layer_norm": "torch"},
    **{f"{name}_used": {"model.architecture": "gpt", f"kernels.{name}": "torch"} for name in ("rms_norm", "rotary", "swiglu")},
    "attention_head_dim": {"kernels.attention": "triton", "model.head_dim": 44},  # on a machine with GPUs
    "attention_precision": {"kernels.attention": "cudnn", "train.precision": "fp32"},  # on a machine with GPUs
    "sequence_per_context_rank": {"parallel.context_parallel": 2, "data.seq_length": 126},
    "heads_per_context_rank": {
        "parallel.context_parallel": 4, "parallel.context_method": "ulysses", "parallel.tensor_parallel": 2
    },
    "kv_heads_per_context_rank": {
        "parallel.context_parallel": 4, "parallel.context_method": "ulysses", "model.num_heads": 12, "model.num_kv_heads": 6,
        "model.head_dim": 8,
    },
    "context_method_used": {"parallel.context_method": "ulysses"},
    "ring_kernel": {"parallel.context_parallel": 2, "kernels.backend": "torch"},  # on a machine with GPUs
    "attention_window": {"kernels.attention": "cudnn", "model.window": 16},  # on a machine with GPUs
    "latent_llama": {"model.architecture": "gpt", "model.kv_latent_size": 64, "model.rope_head_dim": 8},
    "latent_rope_even": {"model.kv_latent_size": 64, "model.rope_head_dim": 7},
    "latent_rope": {"model.kv_latent_size": 64, "model.rope_head_dim": 32},
    "latent_value": {"model.kv_latent_size": 64, "model.rope_head_dim": 8, "model.value_head_dim": 33},
    "latent_kv_heads": {"model.kv_latent_size": 64, "model.rope_head_dim": 8, "model.num_kv_heads": 2},
    "experts_llama": {"model.architecture": "gpt", "model.num_experts": 4},
    "experts_per_token_used": {"model.experts_per_token": 1},
    "num_shared_experts_used": {"model.num_shared_experts": 1},
    "num_dense_layers_used": {"model.num_dense_layers": 1},
    "router_score_used": {"model.router_score": "sigmoid"},
    "router_normalize_used": {"model.router_normalize": False},
    **{f"router_{name}_used": {f"model.router_{name}": 0.5} for name in ("scale", "aux_loss", "z_loss", "balance_rate")},
    "capacity_factor_used": {"model.capacity_factor": 1.25},
    "expert_parallel_used": {"parallel.expert_parallel": 2, "cluster.num_processes": 2},
    "expert_ffn_size_used": {"model.expert_ffn_size": 64},
    "experts_enough": {"model.num_experts": 4, "model.experts_per_token": 5},
    "router_learns": {"model.num_experts": 4, "model.experts_per_token": 1},
    "experts_somewhere": {"model.num_experts": 4, "model.num_dense_layers": 4},
    "expert_features_per_rank": {"model.num_experts": 4, "model.expert_ffn_size": 65, "parallel.tensor_parallel": 2},
    "experts_per_rank": {"model.num_experts": 5, "parallel.expert_parallel": 2, "cluster.num_processes": 2},
    "expert_ranks": {"model.num_experts": 6, "parallel.expert_parallel": 3, "cluster.num_processes": 4},
    "q_latent_used": {"model.q_latent_size": 64},
    "rope_head_dim_used": {"model.rope_head_dim": 8},
    "value_head_dim_used": {"model.value_head_dim": 8},
    "node_size_experts": {
        "parallel.zero_node_size": 2, "parallel.zero": 3, "cluster.num_processes": 4, "model.num_experts": 4,
        "parallel.expert_parallel": 2,
    },
    "quantized_experts": {  # on a machine with GPUs
        "parallel.zero_quantized": True, "parallel.zero": 3, "cluster.num_processes": 2, "model.num_experts": 4,
        "parallel.expert_parallel": 2,
    },
    "quantized_gpu": {"parallel.zero_quantized": True, "parallel.zero": 3},
    "fp16_zero_device": {"train.precision": "fp16", "parallel.zero": 1},
    "loss_scale_used": {"train.loss_scale": 8.0},
    "loss_scale_window_used": {"train.loss_scale_window": 10},
    "accumulation_used": {"train.accumulate_fp32": False},
    **{f"slurm_{name}": {f"slurm.{name}": "a\n#SBATCH --uid=0"} for name in ("job_name", "partition", "account", "qos")},
    "slurm_reservation": {"slurm.reservation": "$(touch pwn)"},
    "slurm_constraint": {"slurm.constraint": "a100;touch pwn"},
    "slurm_exclude": {"slurm.exclude": "n1 --uid=0"},
    "slurm_container": {"slurm.container": "image; touch pwn"},
    "slurm_container_mounts": {"slurm.container": "image", "slurm.container_mounts": "`touch pwn`:/x"},
    "slurm_setup": {"slurm.setup": "x.sh\ntouch pwn"},
    "slurm_extra": {"slurm.extra": ["--mail-type=END", "--wrap=touch"]},
    "slurm_saves_in_time": {"slurm.save_seconds": 600, "slurm.minutes": 10},
    "slurm_ranks_fit": {"slurm.processes_per_node": 4, "slurm.gpus_per_node": 2},
    "slurm_chain_used": {"slurm.chain": 3},
    "slurm_mounts_used": {"slurm.container_mounts": "/data:/data"},
    "slurm_container_tool_used": {"slurm.container_tool": "apptainer"},
    "cuda_present": {"cluster.device": "cuda"},
    "gpu_each": {"cluster.num_processes": 4},  # on a machine with two GPUs
    "launched": {"cluster.num_processes": 4},  # under a launcher that started two
}
MACHINES = {
    "gpu_each": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "quantized_zero3": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "quantized_experts": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "attention_head_dim": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "attention_precision": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "ring_kernel": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "attention_window": {"CUDA_VISIBLE_DEVICES": "0,1"},
    "launched": {"RANK": "0", "WORLD_SIZE": "2"},
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for key, value in flat.items():
        section, name = key.split(".")
        raw.setdefault(section, {})[name] = value
    return raw


def apply_fix(flat: dict[str, Any], problem: Problem) -> None:
    """What the user would do: paste the proposed `key=value`."""
    (text,) = shlex.split(problem.fix)
    override = OverridesParser.create().parse_override(text)
    flat[override.key_or_group] = override.value()


def test_each_row_is_tested() -> None:
    assert set(BREAKS) == {rule.name for rule in RULES}
    assert len(BREAKS) == len(RULES)


@pytest.mark.parametrize("name", BREAKS)
def test_row_raises_and_its_fix_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in MACHINES.get(name, {}).items():
        monkeypatch.setenv(variable, value)
    flat = dict(BREAKS[name])
    rule = next(rule for rule in RULES if rule.name == name)
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, nested(flat))
    mine = [problem for problem in caught.value.problems if problem.rule.startswith(rule.text)]
    assert len(mine) == 1
    assert mine[0].key == rule.keys[0]
    for problem in caught.value.problems:
        apply_fix(flat, problem)
    load(RunConfig, nested(flat))


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True, "parallel.pipeline_parallel": 2},
        {"parallel.pipeline_parallel": 2, "parallel.chunks": 2, "parallel.schedule": "gpipe"},
        {"parallel.pipeline_parallel": 2, "parallel.chunks": 2, "parallel.schedule": "interleaved"},
        {"model.head_dim": 48, "model.num_heads": 3, "model.num_kv_heads": 1},  # a given head_dim need not divide
        {"model.architecture": "gpt", "model.head_dim": 33},  # learned positions need no pairs
        {"cluster.num_processes": 4, "parallel.zero": 3},
        {"optim.schedule": "wsd", "optim.wsd_decay_steps": 500, "optim.warmup_steps": 500},
        {"parallel.pipeline_parallel": 2, "parallel.schedule": "zbh1"},
        {"parallel.pipeline_parallel": 2, "parallel.chunks": 2, "parallel.schedule": "dualpipev"},
        {"parallel.pipeline_parallel": 2, "parallel.schedule": "csv", "parallel.schedule_file": "x.csv"},
        {"train.trace": "trace.json", "train.trace_step": 1000},
        {"data.split": "98, 2, 0", "train.eval_every": 5, "train.patience": 3},
        {"parallel.pipeline_parallel": 3, "parallel.stage_split": "auto"},
        {"parallel.pipeline_parallel": 6, "parallel.stage_split": "0, 1,1,1,1, 0"},  # more stages than layers
        {"parallel.pipeline_parallel": 2, "parallel.chunks": 2, "parallel.schedule": "bfs", "parallel.stage_split": "0,2,1,1"},
        {"train.recompute": "selective", "train.recompute_every": 3},
        {"train.recompute": "modules", "train.recompute_modules": ["norms"], "train.offload_activations": "disk"},
        {"kernels.attention": "sdpa", "model.head_dim": 44},
        {"kernels.attention": "reference", "train.precision": "fp32"},
        {"kernels.backend": "torch", "model.head_dim": 44},
        {"model.kv_latent_size": 64, "model.rope_head_dim": 10, "model.head_dim": 33, "model.value_head_dim": 33},
        {"model.num_experts": 6, "parallel.expert_parallel": 2, "cluster.num_processes": 4, "model.capacity_factor": 1.0},
        {"model.ffn_size": 384, "model.expert_ffn_size": 384},  # as a saved configuration says it
        {"model.value_head_dim": 32},  # as a saved configuration says it: what 0 stands for
    ],
)
def test_sound_configs_pass(flat: dict[str, Any]) -> None:
    check(load(RunConfig, nested(flat)))


def test_attention_follows_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for backend, broken in (("triton", True), ("torch", False), ("apex", False), ("auto", False)):
        flat = {"kernels.backend": backend, "model.head_dim": 44, "train.precision": "bf16"}
        problems = examine(RunConfig, nested(flat))[1]
        assert [problem.fix for problem in problems] == ["kernels.attention=sdpa"] * broken, backend


@pytest.mark.parametrize("text", ["", "1", "a,b,c", "1,0", "0,1,0", "-1,1,1", "nan,0,0", "inf,0,0", "1,0,0,0"])
def test_bad_splits(text: str) -> None:
    assert split_shares(text) is None


def test_check_raises() -> None:
    config = RunConfig()
    config.train.patience = 2
    with pytest.raises(ConfigError, match="patience"):
        check(config)


def test_the_number_of_processes_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = nested({"parallel.tensor_parallel": 2, "train.global_batch_size": 48})
    assert load(RunConfig, raw).cluster.num_processes == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert load(RunConfig, raw).data_parallel == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert load(RunConfig, raw).data_parallel == 3


@pytest.mark.parametrize(
    ("stages", "fix"), [(2, "parallel.pipeline_parallel=1"), (3, "parallel.tensor_parallel=1 parallel.pipeline_parallel=1")]
)
def test_a_layout_under_a_launcher(stages: int, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flat = {"parallel.tensor_parallel": stages, "parallel.pipeline_parallel": stages, "model.num_heads": 12}
    problem = next(p for p in examine(RunConfig, nested(flat))[1] if "were started" in p.rule)
    assert f"2 were started, this layout needs a multiple of {stages * stages}" in problem.rule
    assert set(problem.fix.split()) <= {"parallel.tensor_parallel=1", "parallel.pipeline_parallel=1"}
    assert len(problem.fix.split()) == len(fix.split())


def test_millions_of_processes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    flat = {"cluster.num_processes": 10**9, "parallel.tensor_parallel": 2}
    assert examine(RunConfig, nested(flat))[1][0].fix == "cluster.num_processes=4"


def test_the_rule_prints_every_factor() -> None:
    _, problems = examine(RunConfig, nested({"train.global_batch_size": 10, "cluster.num_processes": 3}))
    assert "train.micro_batch_size = 4, data parallel copies = 3" in problems[0].rule
    assert problems[0].fix == "train.global_batch_size=12"


@pytest.mark.parametrize("name", ["tp3", "foo", "zero9", "dp0", "tp0", "dp3"])
def test_parity_names_the_layout_that_cannot_run(name: str) -> None:
    config, problems = examine(ParityRun, {"parity": {"layouts": ["tp2", name]}})
    assert [(problem.key, problem.value) for problem in problems] == [("parity.layouts", name)]
    assert problems[0].fix == "'parity.layouts=[tp2]'"
    config.parity.layouts = ["tp2"]
    assert validate(config) == []


@pytest.mark.parametrize("words", [["all"], ["all8"], ["all4"], ["sample"], ["tp2", "sample", "tp2"]])
def test_words_for_layouts_stand_for_legal_ones(words: list[str]) -> None:
    config, problems = examine(ParityRun, {"model": {"num_kv_heads": 2}, "parity": {"layouts": words}})
    assert problems == []
    names = expand_layouts(config)
    assert len(names) == len(set(names)) and not set(names) & {"all", "sample"}
    config.parity.layouts = names
    assert validate(config) == []


def test_all_layouts_are_many_and_the_sample_shows_each_of_their_traits() -> None:
    config = ParityRun()
    config.parity.layouts = ["all"]
    every = expand_layouts(config)
    assert 120 <= len(every) <= 240
    assert {"tp2_sp_pp2_zbv", "pp2_dp2_zero3_microbatch", "tp2_sp_pp2_dp2_zero1", "dp4", "zero2"} <= set(every)
    config.parity.layouts = ["all4"]
    assert set(expand_layouts(config)) < set(every)
    config.parity.layouts = ["sample"]
    sample = expand_layouts(config)
    assert 10 <= len(sample) <= 20 and set(sample) < set(every)
    parts = ["tp4", "pp4", "dp4", "cp4", "ring", "ulysses", "sp", "zero1", "zero3", "microbatch"]
    parts += ["gpipe", "interleaved", "bfs", "zbh1", "zbv"]
    assert [part for part in parts if not any(part in name.split("_") for name in sample)] == []
    assert expand_layouts(config) == sample, "the same each time"


def test_the_rules_of_the_model_decide_what_all_means() -> None:
    config, _ = examine(ParityRun, {"model": {"num_layers": 2}, "parity": {"layouts": ["all"]}})
    assert not any("pp4" in name or "interleaved" in name for name in expand_layouts(config))


@pytest.mark.parametrize(
    ("section", "key", "fix"),
    [
        ({"models": ["lama", "gpt"]}, "parity.models", "'parity.models=[gpt]'"),
        ({"report": "parity.txt"}, "parity.report", "parity.report=parity.html"),
        ({"report": "a.html,b"}, "parity.report", "parity.report=parity.html"),
    ],
)
def test_parity_names_what_is_wrong_with_its_section(section: dict, key: str, fix: str) -> None:
    _, (problem,) = examine(ParityRun, {"parity": {"layouts": ["tp2"], **section}})
    assert (problem.key, problem.fix) == (key, fix)
    assert examine(ParityRun, {"parity": {"models": ["llama", "gpt"], "report": "a.html, b.md"}})[1] == []


def test_a_layout_that_one_of_the_models_cannot_have_is_named() -> None:
    raw = {"model": {"num_heads": 2, "head_dim": 3}, "parity": {"layouts": ["tp2"], "models": ["llama", "gpt"]}}
    assert [problem.key for problem in examine(ParityRun, raw)[1]] == ["model.head_dim"]  # rope needs pairs, gpt has none


def test_parity_reports_the_base_run_too() -> None:
    _, problems = examine(ParityRun, {"model": {"num_heads": 3}, "parity": {"layouts": ["pp2"]}})
    assert [problem.key for problem in problems] == ["model.hidden_size"]


def _values(field: Any, kind: Any) -> st.SearchStrategy[Any]:
    """Values of the right type, legal and not, near the default and far from it."""
    numbers = {
        int: st.integers(-1, 12) | st.integers(0, 20_000),
        float: st.floats(-1, 2) | st.just(fields.default_of(field)),
    }
    texts = st.sampled_from(["1,0,0", "0.9,0.1,0", "x", "2,2", "0,3,1", "auto", *(field.metadata["allowed"] or ["y"])])
    lists = st.lists(st.sampled_from([*field.metadata["allowed"], "y"]), max_size=2)
    return {bool: st.booleans(), str: texts, list[str]: lists, **numbers}[kind]


LEAVES = {
    key: _values(field, kind)
    for key, field, kind in fields.leaves(RunConfig)
    if key.split(".")[0] in ("model", "parallel", "data", "optim", "train", "cluster")
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flat=st.fixed_dictionaries({}, optional=LEAVES), gpus=st.sampled_from(["", "0", "0,1,2,3,4,5,6,7"]))
def test_fixes_lead_to_a_config_that_passes(flat: dict, gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for _ in range(10):
        _, problems = examine(RunConfig, nested(flat))
        if not problems:
            return
        for problem in problems:
            assert problem.fix, problem
            apply_fix(flat, problem)
    pytest.fail(f"still broken: {flat}: {problems}")
