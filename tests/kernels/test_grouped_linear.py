"""Linear layers of groups in torch's operators, their operators under torch.compile, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch, grouped_linear, grouped_linear_reference
from megalm_kernels.grouped_linear import GroupedMM, _grouped_triton, grouped_linear_op, grouped_linear_weight_op, loop

BOUNDS = [0, 3, 3, 8, 9]  # one group is empty; of 11 rows two are padding


def example(dtype: torch.dtype = torch.float64, rows: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, starts: sizes that only torch's grouped product minds, which wants multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 8), (4, 16, 8)))
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(BOUNDS, dtype=torch.int32)


def operator(x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """What Triton's implementation calls: on a CPU its plain body."""
    return grouped_linear_op(x, weight, starts, False)


def results(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    """The output and both gradients; that of the output has numbers in padding rows, too."""
    y = function(x, weight)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def by_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Each row by itself, with the matrix of its group; padding rows are of no group."""
    groups = torch.bucketize(torch.arange(x.shape[0]), torch.tensor(BOUNDS[1:]), right=True)
    matrices = torch.cat([weight, torch.zeros_like(weight[:1])])
    return torch.einsum("tk,tnk->tn", x, matrices[groups])


def test_every_row_meets_the_matrix_of_its_group() -> None:
    x, weight, starts = example()
    want = results(by_rows, x, weight)
    assert want[2][1].count_nonzero() == 0 and want[0][9:].count_nonzero() == 0 and want[1][9:].count_nonzero() == 0
    for function in (grouped_linear, grouped_linear_reference, operator):
        got = results(lambda x, weight, f=function: f(x, weight, starts), x, weight)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bounds", [BOUNDS, None], ids=["known", "unknown"])
def test_the_grouped_product_of_torch_is_the_loop(bounds: Sequence[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU may run instead: the same numbers, and zeros where torch writes nothing."""
    x, weight, starts = example(torch.bfloat16)
    product = torch._grouped_mm

    def careless(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        y = product(a, b, offsets)
        if b.dim() == 3:
            y[int(offsets[-1]) :] = torch.nan
        else:
            y[offsets.diff(prepend=offsets.new_zeros(1)) == 0] = torch.nan
        return y

    monkeypatch.setattr(torch, "_grouped_mm", careless)
    got = results(lambda x, weight: GroupedMM.apply(x, weight, starts, bounds), x, weight)
    torch.testing.assert_close(got, results(lambda x, weight: loop(x, weight, BOUNDS), x, weight))


def test_gradients() -> None:
    x, weight, starts = example()
    torch.autograd.gradcheck(lambda x, weight: grouped_linear(x, weight, starts), (x, weight))
    for transposed in (False, True):
        a = x if not transposed else torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
        either = lambda a, weight, t=transposed: grouped_linear_op(a, weight, starts, t)  # noqa: E731
        torch.autograd.gradcheck(either, (a, weight))
    x, weight, _ = example(torch.bfloat16)
    frozen, trained = (torch.autograd.grad(grouped_linear(x, w, starts).sum(), x)[0] for w in (weight.detach(), weight))
    assert torch.equal(frozen, trained)


def test_the_gradient_is_added_up_in_the_dtype_that_the_parameter_asks_for() -> None:
    x, weight, starts = example(torch.bfloat16)
    weight.grad_dtype = torch.float32
    for function in (grouped_linear, operator):
        weight.grad = None
        for _ in range(2):
            function(x, weight, starts).sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        once = torch.autograd.grad(function(x, weight, starts).sum(), weight)[0].float()
        assert torch.equal(weight.grad, 2 * once)


def test_only_x_and_weight_are_kept_and_nothing_is_copied() -> None:
    _, weight, starts = example()
    wide = torch.randn(11, 3 * 8, dtype=torch.float64)[:, 8:16].requires_grad_()
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), dispatch.use("torch"):
        grouped_linear(wide, weight, starts)
    assert [t.data_ptr() for t in kept] == [wide.data_ptr(), weight.data_ptr()]


def test_the_host_need_not_ask_for_what_it_knows() -> None:
    """Of meta tensors nothing can be asked."""
    x, weight, starts = (t.detach().to("meta") for t in example())
    with dispatch.use("torch"):
        y = grouped_linear(x.requires_grad_(), weight.requires_grad_(), starts, BOUNDS)
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert (y.shape, dx.shape, dweight.shape) == ((11, 16), x.shape, weight.shape)
        with pytest.raises(NotImplementedError):
            grouped_linear(x, weight, starts)


def test_operators_satisfy_torch() -> None:
    x, weight, starts = example(torch.float32)
    dy = torch.randn(11, 16, requires_grad=True)
    torch.library.opcheck(grouped_linear_op, (x, weight, starts, False))
    torch.library.opcheck(grouped_linear_op, (dy, weight, starts, True))
    torch.library.opcheck(grouped_linear_weight_op, (dy.detach(), x.detach(), starts))


def test_compiles_into_one_graph() -> None:
    x, weight, starts = example(torch.float32)
    want = results(lambda x, weight: grouped_linear(x * 2.0, weight, starts).square(), x, weight)
    for function in (operator, grouped_linear):
        plain = lambda x, weight, f=function: f(x * 2.0, weight, starts).square()  # noqa: E731
        run = torch.compile(plain, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results(run, x, weight), want)


def test_refuses() -> None:
    x, weight, starts = (t.detach() for t in example(torch.float32))
    far = x.to("meta"), weight.to("meta"), starts.to("meta")

    def at(*bounds: int) -> Tensor:
        return torch.tensor(bounds, dtype=torch.int32)

    wrong = {
        r"shape of x is \(11, 2, 4\)": lambda: grouped_linear(x.unflatten(1, (2, 4)), weight, starts),
        r"shape of weight is \(16, 8\), wanted \(groups": lambda: grouped_linear(x, weight[0], starts),
        r"shape of weight is \(0, 16, 8\), wanted .* at least 1": lambda: grouped_linear(x, weight[:0], starts[:1]),
        r"shape of weight is \(4, 16, 7\), wanted \(4, 16, 8\)": lambda: grouped_linear(x, weight[..., 1:], starts),
        r"shape of starts is \(4,\), wanted \(5,\)": lambda: grouped_linear(x, weight, starts[1:]),
        "dtype of x is torch.int64": lambda: grouped_linear(x.long(), weight, starts),
        "dtype of weight is torch.bfloat16": lambda: grouped_linear(x, weight.bfloat16(), starts),
        "dtype of starts is torch.int64": lambda: grouped_linear(x, weight, starts.long()),
        "device of weight is meta": lambda: grouped_linear(x, weight.to("meta"), starts),
        "device of starts is meta": lambda: grouped_linear(x, weight, starts.to("meta")),
        "starts is of type list": lambda: grouped_linear(x, weight, BOUNDS),  # type: ignore[arg-type]
        r"starts is \[0, 3, 2, 8, 9\], wanted 0 first": lambda: grouped_linear(x, weight, at(0, 3, 2, 8, 9)),
        r"starts is \[1, 3, 3, 8, 9\]": lambda: grouped_linear(x, weight, at(1, 3, 3, 8, 9)),
        r"starts is .* none above 11": lambda: grouped_linear(x, weight, at(0, 3, 3, 8, 12)),
        r"starts_host is \[0, 9\], wanted \[0, 3, 3, 8, 9\]": lambda: grouped_linear(x, weight, starts, [0, 9]),
        r"starts_host is \[0, 1\], wanted 5 numbers": lambda: grouped_linear(*far, [0, 1]),
        r"with Triton: .* x is torch.float64.*kernels.grouped_linear=torch or use\(": (
            lambda: _grouped_triton(x.double(), weight.double(), starts, None)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith(("grouped_linear: ", "grouped_linear with Triton: "))
