"""Rotary positions in torch's operators, their operators under torch.compile, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from megalm_kernels import dispatch, rotary, rotary_reference
from megalm_kernels.rotary import _rotary_triton, rotary_in_place_op, rotary_op

POSITIONS = torch.tensor([3, 0, 4, 4, 1])


def angles(positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(positions)[:, None] * torch.logspace(0, -2, half)[None]
    return angle.cos(), angle.sin()


def test_rotary_keeps_length_and_depends_on_distance_only() -> None:
    cos, sin = angles(6, 2)
    q, k = torch.randn(4).expand(1, 6, 1, 4), torch.randn(4).expand(1, 6, 1, 4)
    for interleaved in (False, True):
        turned_q, turned_k = (rotary(x, cos, sin, interleaved=interleaved) for x in (q, k))
        torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
        scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
        torch.testing.assert_close(scores.diagonal(1), scores.diagonal(1)[:1].expand(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_turned_as_written_out(dtype: torch.dtype) -> None:
    """The formula on its own, to the bit: what models have computed from the first version on."""
    x, (cos, sin) = torch.randn(2, 5, 3, 8).to(dtype), angles(5, 4)
    a, b = x.float().chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    with dispatch.use("torch"):
        assert torch.equal(rotary(x, cos, sin), torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(dtype))


def test_pairs_that_lie_side_by_side_are_complex_numbers() -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 10), angles(5, 4)
    want = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous()) * torch.complex(cos, sin)[:, None]
    got = rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(got[..., :8], torch.view_as_real(want).flatten(-2))
    assert torch.equal(got[..., 8:], x[..., 8:])


@pytest.mark.parametrize("shape", [(2, 5, 3, 10), (5, 3, 10)])
def test_positions_are_rows_of_the_angles(shape: tuple[int, ...]) -> None:
    x, (cos, sin) = torch.randn(shape), angles(5, 4)
    want = rotary(x, cos[POSITIONS], sin[POSITIONS])
    assert torch.equal(rotary(x, cos, sin, positions=POSITIONS), want)
    if len(shape) == 4:
        assert torch.equal(rotary(x, cos, sin, positions=POSITIONS.expand(2, 5)), want)


@pytest.mark.parametrize("implementation", ["torch", "operator"])
def test_in_place(implementation: str) -> None:
    """With gradients that the writing over must not spoil: those of a view's base, and of an earlier use of the value."""
    cos, sin = angles(5, 4)
    call = rotary if implementation == "torch" else lambda *args, inplace: _rotary_triton(*args, POSITIONS * 0, False, inplace)
    where = None if implementation == "torch" else POSITIONS * 0
    base = torch.randn(2, 5, 4, 8, requires_grad=True)
    grads = []
    for inplace in (True, False):
        y = base * 1.0
        before = y + 0.0
        x = y[:, :, :3]
        turned = call(x, cos, sin, inplace=inplace)
        assert (turned is x or turned.data_ptr() == y.data_ptr()) == inplace
        loss = (turned * turned.detach().cos()).sum() + before.square().sum() + y[:, :, 3:].sum()
        grads.append(torch.autograd.grad(loss, base)[0])
        torch.testing.assert_close(turned, rotary_reference(base[:, :, :3], cos, sin, where))
    torch.testing.assert_close(*grads)
    with torch.no_grad():  # nor does a leaf mind, when nobody will ask for its gradient
        assert call(base, cos, sin, inplace=True) is base


def test_operators_satisfy_torch() -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 10, requires_grad=True), angles(5, 4)
    torch.library.opcheck(rotary_op, (x, cos, sin, None, False, False))
    torch.library.opcheck(rotary_op, (x.detach().bfloat16(), cos, sin, POSITIONS, True, True))
    torch.library.opcheck(rotary_in_place_op, (x.detach().clone(), cos, sin, POSITIONS, False, False))


def test_gradient_of_the_operator_and_of_its_gradient() -> None:
    cos, sin = (t.double() for t in angles(5, 4))
    x = torch.randn(1, 5, 2, 10, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        turn = lambda x, i=interleaved: rotary_op(x, cos, sin, POSITIONS, i, False)  # noqa: E731
        torch.autograd.gradcheck(turn, (x,))
        torch.autograd.gradgradcheck(turn, (x,))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_into_one_graph(inplace: bool) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8, requires_grad=True), angles(5, 4)

    def run(x: torch.Tensor) -> torch.Tensor:
        return _rotary_triton(x * 2.0, cos, sin, POSITIONS, False, inplace).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    (got,), (want,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, run))
    torch.testing.assert_close(got, want)
    public = torch.compile(lambda x: rotary(x, cos, sin, positions=POSITIONS, inplace=inplace), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(public(x * 2.0), rotary(x * 2.0, cos, sin, positions=POSITIONS))


def test_refuses() -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8), angles(5, 4)
    leaf = x.clone().requires_grad_()
    wrong = {
        r"x is \(5, 8\), wanted \(B, S, H, D\)": lambda: rotary(x[0, :, 0], cos, sin),
        "dtype of x is torch.int64": lambda: rotary(x.long(), cos, sin),
        r"cos is \(5, 5\), wanted .* R from 2 to 8": lambda: rotary(x, *angles(5, 5)),
        r"cos is \(4, 4\), wanted at least 5 rows": lambda: rotary(x, cos[:4], sin[:4]),
        r"sin is \(5, 3\)": lambda: rotary(x, cos, sin[:, :3]),
        "dtype of cos is torch.float64": lambda: rotary(x, cos.double(), sin),
        "device of sin is meta": lambda: rotary(x, cos, sin.to("meta")),
        "cos is a tensor that requires a gradient": lambda: rotary(x, cos.clone().requires_grad_(), sin),
        r"positions is \(4,\), wanted \(2, 5\)": lambda: rotary(x, cos, sin, positions=POSITIONS[:4]),
        "dtype of positions is torch.int32": lambda: rotary(x, cos, sin, positions=POSITIONS.int()),
        "device of positions is meta": lambda: rotary(x, cos, sin, positions=POSITIONS.to("meta")),
        "positions is 1 to 5, wanted 0 to 4": lambda: rotary(x, cos, sin, positions=POSITIONS.clamp(min=1) + (POSITIONS == 4)),
        "positions is -1 to 3": lambda: rotary(x, cos, sin, positions=POSITIONS - 1),
        "not a leaf": lambda: rotary(leaf, cos, sin, inplace=True),
        "nor a view of one": lambda: rotary(leaf[:, :, 1:], cos, sin, inplace=True),
        "x is of type list, wanted a Tensor": lambda: rotary([1.0], cos, sin),
        "cos is None, wanted a Tensor": lambda: rotary(x, None, sin),
        "sin is of type float, wanted a Tensor": lambda: rotary(x, cos, 1.0),
        "positions is of type list, wanted a Tensor": lambda: rotary(x, cos, sin, positions=[0, 1, 2, 3, 4]),
        r"with Triton: .* x is torch.float64, wanted .*others: kernels.rotary=torch or use\(rotary=\"torch\"\)": (
            lambda: _rotary_triton(x.double(), cos, sin, None, False, False)
        ),
        "share memory": lambda: rotary(x[:1].expand(2, 5, 3, 8), cos, sin, inplace=True),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith(("rotary: ", "rotary with Triton: "))
    with dispatch.use("torch"):
        assert rotary(x.double(), cos, sin).dtype == torch.float64
