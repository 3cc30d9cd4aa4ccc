"""Short names of layouts, as configs and applied to a run."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megalm.config.layouts import candidate_layouts, layout_node, sample_layouts, with_layout, with_model
from megalm.config.model import ModelConfig
from megalm.config.parallel import layout_name
from megalm.config.run import RunConfig

NAMES = ["single", "tp2", "tp2_sp", "tp2_pp2_dp2_zero3", "dp4_zero1", "zero2"]
NAMES += ["cp2_ring", "tp2_sp_cp2_ulysses", "cp2_ring_pp2_dp2_ep4_zero1", "dp2_ep2"]
NAMES += ["pp2_gpipe", "pp2_gpipe_chunks2", "pp2_interleaved", "pp4_interleaved_chunks3"]


@pytest.mark.parametrize("name", NAMES)
def test_names_go_there_and_back(name: str) -> None:
    config = with_layout(RunConfig(), name)
    assert layout_name(config.parallel, config.data_parallel) == name


def test_what_the_name_leaves_out_is_the_default() -> None:
    config = with_layout(with_layout(RunConfig(), "tp4_sp_zero3"), "pp2")
    assert config.parallel.tensor_parallel == 1
    assert config.parallel.zero == 0
    assert config.cluster.num_processes == 2


def test_another_architecture_derives_anew_what_it_had_derived() -> None:
    llama = RunConfig()
    gpt = with_model(llama, "gpt")
    assert (gpt.model.architecture, gpt.model.tie_embeddings) == ("gpt", True)
    assert gpt.model.ffn_size == 4 * gpt.model.hidden_size != llama.model.ffn_size
    assert with_model(gpt, "llama").model == llama.model
    experts = with_model(with_model(RunConfig(model=ModelConfig(num_experts=4)), "gpt"), "llama").model
    assert experts.expert_ffn_size == experts.ffn_size == llama.model.ffn_size, "derived from what is derived"
    saved = ModelConfig(**asdict(llama.model))  # nothing of what it does not have is derived, to be in the way of a change
    assert (saved.expert_ffn_size, saved.value_head_dim) == (0, 0)


def test_candidates_are_few_first_and_each_once() -> None:
    names = candidate_layouts(8)
    sizes = [with_layout(RunConfig(), name).cluster.num_processes for name in names]
    assert sizes == sorted(sizes) and sizes[-1] == 8 and len(set(names)) == len(names)
    assert all(with_layout(RunConfig(), name).cluster.num_processes <= 2 for name in candidate_layouts(2))
    assert {"cp2_ring", "cp2_ulysses_ep2", "dp2_ep2_zero3", "cp2_ring_zero2"} < set(candidate_layouts(2))
    dealt = [with_layout(RunConfig(), name) for name in names if "ep" in name]
    assert all(config.replicas % config.parallel.expert_parallel == 0 for config in dealt)


def test_a_sample_shows_every_schedule_and_each_pair_of_axes() -> None:
    legal = ["dp2", "pp2", "pp2_gpipe", "pp2_dp2", "tp2", "tp2_dp2", "tp2_pp2_gpipe", "dp8"]
    assert sample_layouts(legal) == ["pp2_dp2", "tp2_dp2", "tp2_pp2_gpipe"]  # the smaller ones show nothing more
    assert sample_layouts([]) == []


def test_a_sample_joins_context_and_expert_parallelism_with_everything_else_once() -> None:
    """Few layouts, because a continuous build runs all of them."""
    every = candidate_layouts(8)
    for names, limit in (([name for name in every if "ep" not in name], 20), (every, 20)):
        sample = [set(name.split("_")) for name in sample_layouts(names)]
        joins = [{"cp2", "ring"}, {"tp2", "ulysses"}, {"cp2", "pp2"}, {"cp2", "dp2", "zero1"}, {"cp2", "dp2", "zero3"}, {"cp4"}]
        if names is every:
            joins += [{"ep4"}, {"ep2", "tp2"}, {"ep2", "pp2", "zero1"}, {"ep2", "cp2"}]
        missing = [join for join in joins if not any(join <= parts for parts in sample)]
        assert missing == [] and len(sample) <= limit


@pytest.mark.parametrize("name", ["foo", "tp0", "dp0", "zero4", "tp2_x"])
def test_bad_names_raise(name: str) -> None:
    with pytest.raises(ValueError, match=name.split("_")[0][:2]):
        with_layout(RunConfig(), name)


def test_node_sets_the_world_size_only_where_the_name_does() -> None:
    assert layout_node("tp2_pp2") == {"parallel": {"tensor_parallel": 2, "pipeline_parallel": 2}}
    assert layout_node("tp2_pp2_dp3")["cluster"] == {"num_processes": 12}
    assert layout_node("tp2_cp2_ring_dp3_ep2")["cluster"] == {"num_processes": 12}
