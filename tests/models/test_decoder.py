"""What all decoders promise: shapes, causality, names that do not change when parts are missing, right gradients."""

from __future__ import annotations

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.decoder import Decoder
from megalm.models.init import initial_value
from megalm.models.layers import Dropout
from megalm.parallel.split import even_split
from megalm.parallel.stages import apply_stage

BOTH = pytest.mark.parametrize("architecture", ["gpt", "llama"])


@BOTH
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 16), (2, 7)])
def test_shapes(architecture: str, batch: int, length: int, build) -> None:
    assert build(architecture, num_kv_heads=4)(torch.zeros(batch, length, dtype=torch.int64)).shape == (batch, length, 37)


@BOTH
def test_a_later_token_never_changes_an_earlier_logit(architecture: str, build, tokens) -> None:
    model = build(architecture).eval()
    before = model(tokens)
    for place in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 37
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).any(-1).all(), "every later position sees the change"


@BOTH
def test_samples_of_a_batch_do_not_see_each_other(architecture: str, build, tokens) -> None:
    model = build(architecture).eval()
    changed = torch.stack([tokens[0], torch.zeros_like(tokens[1])])
    torch.testing.assert_close(model(changed)[0], model(tokens)[0])


@BOTH
def test_gradient_is_the_slope_of_the_loss(architecture: str, build, tokens) -> None:
    """Along random directions, central differences in fp64 (rotary itself works in fp32, hence the tolerance)."""
    model = build(architecture).double()
    parameters = list(model.parameters())
    labels = tokens.roll(-1, 1).flatten()

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels)

    gradients = torch.autograd.grad(loss(), parameters)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope, values = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)), []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += step * d
                values.append(float(loss()))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += 1e-4 * d
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=1e-3, abs=1e-3)


@BOTH
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layers", "stages"), [(3, 1), (3, 2), (3, 3), (5, 2), (5, 4), (8, 4)])
def test_the_stages_together_are_the_model(architecture: str, tied: bool, layers: int, stages: int, build, tokens) -> None:
    """Names, numbers of layers, and the logits of one stage after the other."""
    changes = {"num_layers": layers, "tie_embeddings": tied}
    model = build(architecture, **changes)
    x, names = tokens, []
    for stage in range(stages):
        part = build(architecture, **changes)
        apply_stage(part, stage, even_split(layers, stages))
        part.tie()
        names += [name for name, _ in part.named_parameters()]
        x = part(x)
    torch.testing.assert_close(x, model(tokens))
    whole = [name for name, _ in model.named_parameters()]
    copies = ["head.weight"] if tied and stages > 1 else []
    assert sorted(names) == sorted(whole + copies)


@BOTH
def test_a_stage_has_the_weights_of_the_whole_model(architecture: str, build) -> None:
    """A parameter's name, and so its initial weights, do not depend on the cut."""
    config = ModelConfig(architecture, 37, 24, 4, 4, max_seq_length=16, init_std=0.3)
    whole = dict(build(architecture, num_layers=4).named_parameters())
    part = build(architecture, num_layers=4)
    apply_stage(part, 1, [2, 2])
    assert "layers.3.mlp.down.weight" in dict(part.named_parameters())
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, whole[name])
        if parameter.dim() == 2:
            assert torch.equal(initial_value(name, tuple(parameter.shape), config, 3), parameter)


@BOTH
def test_tied_embeddings_are_one_parameter(architecture: str, build) -> None:
    model = build(architecture, tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    untied = build(architecture)
    assert untied.head.weight is not untied.embedding.weight


@BOTH
def test_every_dropout_has_a_site_of_its_own(architecture: str, build) -> None:
    model = build(architecture, num_layers=5, dropout=0.1)
    sites = [m.site for m in model.modules() if isinstance(m, Dropout)]
    assert len(sites) == len(set(sites)) == 2 * 5 + 1


@BOTH
def test_dropout_acts_in_training_only(architecture: str, build, tokens) -> None:
    model, samples = build(architecture, dropout=0.5), torch.tensor([5, 6])
    a, b = (model.train()(tokens, samples=s) for s in (samples, samples.flip(0)))
    assert torch.equal(a, model(tokens, samples=samples)) and not torch.equal(a, b)
    assert torch.equal(model.eval()(tokens), build(architecture)(tokens))


def test_the_base_class_is_no_model() -> None:
    config = ModelConfig(num_layers=1, hidden_size=8)
    with pytest.raises(AssertionError, match="builds its blocks"):
        Decoder(config)
    with pytest.raises(AssertionError, match="builds its norm"):
        Decoder.build_norm(torch.nn.Module())  # type: ignore[arg-type]
