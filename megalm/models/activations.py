"""What the parts of a model make, keep and free on one rank, operator by operator: block, embedding, head and loss.

The counts follow the code of the parts (block.py, attention.py, latent_attention.py, layers.py, moe.py and the kernels that they
call); the fullest moments follow from the tape. What is small is left out: whatever has no dimension of hidden or FFN size, heads
or vocabulary, but for the statistics that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.model import ModelConfig
from megalm.models.tape import Tape


@dataclass(frozen=True)
class Setting:
    """What decides about activations beside the model. `tokens` are those of one microbatch on one rank, all of its sequence."""

    element_bytes: int
    tokens: int = 1
    samples: int = 1  # in the microbatch: the collectives of sequence parallelism copy where there are several
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    fused: bool = False  # kernels.fuse_projections: the product that q, k and v lie in stays for v's sake
    triton: frozenset[str] = frozenset()  # operations that run as kernels of ours
    cuda: bool = False  # torch's own norms are one kernel there
    scores: int = 0  # kernels.attention=reference: of how many keys attention keeps the scores
    gradient_bytes: int = 4  # of an element of an accumulated weight gradient
    experts_here: int = 0  # of a MoE block; 0: all
    context: str = ""  # how attention sees the tokens of context parallel ranks: ring or ulysses; empty: there are none
    context_parallel: int = 1

    @property
    def slices(self) -> int:
        """Parts of the sequence, outside attention and MLP."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def weights(self, elements: float) -> float:
        """A weight's gradient as the product makes it, and as it is added up if that has another precision."""
        same = self.gradient_bytes == self.element_bytes
        return elements * (self.element_bytes + (0 if same else self.gradient_bytes))


class _Part:
    """A tape of one part of a model and the sizes on it."""

    def __init__(self, config: ModelConfig, setting: Setting):
        self.c, self.s = config, setting
        self.llama = config.architecture == "llama"
        self.whole = config.hidden_size * setting.element_bytes * setting.tokens  # (B, S, E)
        self.hidden = self.whole / setting.slices
        self.tape = Tape(self.hidden)

    def size(self, features: float, element_bytes: int | None = None) -> float:
        """Of (B, S, features)."""
        return features * self.s.tokens * (self.s.element_bytes if element_bytes is None else element_bytes)

    def of(self, part: str) -> None:
        """What comes belongs to this part of a block; with full and selective recomputation the block is one."""
        self.tape.part = part

    def norm(self, name: str, x: str, features: float, slices: int, kernel: str) -> str:
        """`name` = norm(x) over so many features."""
        size, tape = self.size(features) / slices, self.tape
        if kernel in self.s.triton or self.s.cuda or not self.llama:
            statistics = tape.keep(f"{name}.statistics", self.size(1, 4 if self.llama else 8) / slices)
            return tape.add(name, size, x, f"{x} {statistics}")
        wide = self.size(features, 4) / slices  # torch's RMSNorm on a CPU is several operators, in fp32
        if self.s.element_bytes < 4:
            x = tape.add(f"{name}.wide", wide, x)
        scale = tape.keep(f"{name}.scale", self.size(1, 4) / slices)
        scaled = tape.add(f"{name}.scaled", wide, x, f"{x} {scale}", back=3 * wide)
        if self.s.element_bytes == 4:
            return tape.add(name, size, scaled, scaled, back=wide)
        weighted = tape.add(f"{name}.weighted", wide, scaled, scaled, back=wide)
        return tape.add(name, size, weighted)

    def normed(self, name: str, x: str) -> str:
        """The norm in front of a part, and where its output enters that."""
        self.of("norms")
        normed = self.norm(name, x, self.c.hidden_size, self.s.slices, "rms_norm" if self.llama else "layer_norm")
        self.of("")
        return self.enter(normed)

    def enter(self, x: str) -> str:
        """x (hidden) where it enters what tensor parallel ranks do in parts."""
        copies = self.whole if self.s.samples > 1 else 0.0
        if self.s.slices > 1:
            return self.tape.add(f"{x}.gathered", self.whole, x, work=copies, back=copies, costly=True)
        if self.s.tensor_parallel > 1:
            return self.tape.add(f"{x}.entered", 0, x, gradient=self.whole)
        return x

    def leave(self, x: str, bias: bool) -> str:
        """The sum of the ranks' parts x (whole)."""
        copies = self.whole if self.s.samples > 1 else 0.0
        if self.s.slices > 1:
            x = self.tape.add(f"{x}.scattered", self.hidden, x, work=copies, back=copies, costly=True)
        if self.s.tensor_parallel > 1 and bias:
            x = self.tape.add(f"{x}.biased", self.hidden, x, passes=True)
        return x

    def memory_of(self, x: str) -> str:
        """What a layer that reads x keeps: of a view what it is a view of."""
        return x.removesuffix(".entered")

    def linear(self, name: str, x: str, inputs: float, outputs: float, holds: str = "") -> str:
        """A layer from so many features to so many, on this rank."""
        back = self.s.weights(inputs * outputs)
        return self.tape.add(name, self.size(outputs), x, self.memory_of(x), back=back, costly=True, waits=True, holds=holds)

    def linears(self, parts: dict[str, float], x: str, inputs: float, apart: bool = False) -> None:
        """Layers of one input: {name: features}. apart: each result is kept for itself, also if one product makes all."""
        if not self.s.fused:
            for name, features in parts.items():
                self.linear(name, x, inputs, features)
            return
        sizes = {name: self.size(features) for name, features in parts.items()}
        back = self.s.weights(inputs * sum(parts.values())) + sum(sizes.values())  # the parts' gradients are joined
        self.tape.split(sizes, x, self.memory_of(x), back)
        if apart:
            self.tape.sizes |= sizes

    def rotary(self, name: str, x: str, features: float) -> str:
        """`name` = x, turned."""
        wide = self.size(features, 4)
        work, back = (0.0, 0.0) if "rotary" in self.s.triton else (2 * wide - self.size(features), wide)
        back += 0.0 if "rotary" in self.s.triton or self.s.element_bytes == 4 else 2 * wide
        return self.tape.add(name, self.size(features), x, work=work, back=back)

    def dropout(self, x: str) -> str:
        """The mask is made of three times as many 64-bit numbers, which are gone when the result comes."""
        if not self.c.dropout:
            return x
        mask = self.tape.keep(f"{x}.mask", self.size(self.c.hidden_size, 1) / self.s.slices)
        work = self.size(self.c.hidden_size, 24 - 1 - self.s.element_bytes) / self.s.slices
        return self.tape.add(f"{x}.dropped", self.hidden, x, mask, work=work, back=self.hidden)


def block_tape(config: ModelConfig, setting: Setting, experts: bool = False) -> Tape:
    """One block: x (B, S, E) to `y`. experts: its MLP is made of them."""
    part = _Part(config, setting)
    seen = _attention_of(part, part.normed("normed", "x"))
    part.of("")
    middle = part.tape.add("middle", part.hidden, f"x {part.dropout(seen)}", passes=True)
    entered = part.normed("normed_middle", middle)
    part.of("mlp")
    made = _experts(part, entered) if experts else _mlp(part, entered, config.ffn_size / setting.tensor_parallel)
    made = part.leave(made, not part.llama)
    part.of("")
    part.tape.add("y", part.hidden, f"middle {part.dropout(made)}", passes=True, holds=seen)
    return part.tape


def _attention_of(part: _Part, x: str) -> str:
    part.of("attention")
    return part.leave(_latent_attention(part, x) if part.c.kv_latent_size else _attention(part, x), not part.llama)


def _attention(part: _Part, x: str) -> str:
    c, s = part.c, part.s
    q = c.num_heads * c.head_dim / s.tensor_parallel
    kv = max(c.num_kv_heads / s.tensor_parallel, 1) * c.head_dim  # each rank has a head, if need be a copy
    part.linears({"q": q, "k": kv, "v": kv}, x, c.hidden_size)
    names = ("q", "k")
    if part.llama:
        names = (part.rotary("q.turned", "q", q), part.rotary("k.turned", "k", kv))
    seen = _attend(part, *names, "v", q, kv)
    return part.linear("attended", seen, q, c.hidden_size, "q k v")


def _attend(part: _Part, q: str, k: str, v: str, features: float, kv: float) -> str:
    """Attention keeps no scores but the logarithms of their sums, in fp32; its reference keeps everything, in fp32."""
    c, s, tape = part.c, part.s, part.tape
    heads = c.num_heads / s.tensor_parallel
    logarithms = tape.keep("logarithms", part.size(heads, 4))
    if s.context == "ulysses":
        return _all_to_all_attention(part, f"{q} {k} {v}", features, kv, logarithms)
    if s.context == "ring":  # keys and values of two ranks; in the backward also sums of their gradients, in fp32
        wide = part.size(features, 4) if s.element_bytes < 4 else 0.0
        work = part.size(features + 4 * kv) + wide
        back = part.size(features + 4 * kv) + part.size(4 * kv, 4) + wide - (0.0 if wide else part.size(2 * kv))
        keeps = f"{q} {k} {v} seen {logarithms}"
        return tape.add("seen", part.size(features), f"{q} {k} {v}", keeps, work=work, back=back)
    if not s.scores:
        return tape.add("seen", part.size(features), f"{q} {k} {v}", f"{q} {k} {v} seen {logarithms}", costly=True)
    wide, scores = part.size(heads * c.head_dim, 4), part.size(heads * s.scores, 4)
    for name, x in (("q.wide", q), ("k.wide", k), ("v.wide", v)):
        tape.add(name, wide, x)
    tape.add("scores", scores, "q.wide k.wide", "q.wide k.wide", costly=True)
    tape.add("shares", scores, "scores", f"scores {logarithms}", work=scores, back=scores)
    tape.add("summed", wide, "shares v.wide", "shares v.wide", costly=True)
    return tape.add("seen", part.size(features), "summed")


def _all_to_all_attention(part: _Part, reads: str, features: float, kv: float, logarithms: str) -> str:
    """Two exchanges, each with copies before and behind it, and between them attention with some of the heads."""
    tape, one = part.tape, part.c.head_dim
    all_kv = kv * max(1, part.s.context_parallel * one / kv)  # ranks that share a head have copies of it
    whole = part.size(features + 2 * all_kv)
    for name in ("packed", "packed.sent", "packed.received", "packed.whole"):
        reads = tape.add(name, whole, reads)
    keeps = f"packed.whole seen.whole {logarithms}"
    seen = tape.add("seen.whole", part.size(features), "packed.whole", keeps, back=whole, costly=True)
    for name in ("seen.sent", "seen.received", "seen"):
        seen = tape.add(name, part.size(features), seen)
    return seen


def _latent_attention(part: _Part, x: str) -> str:
    """Queries, keys and values made from narrow vectors; values are filled up to the width of keys."""
    c, s, tape = part.c, part.s, part.tape
    heads, turned, E = c.num_heads / s.tensor_parallel, c.rope_head_dim, c.hidden_size
    q, plain, value = heads * c.head_dim, heads * (c.head_dim - turned), heads * c.value_head_dim
    kv: dict[str, float] = {"kv_down": c.kv_latent_size + turned}
    part.linears(({"q_down": c.q_latent_size} if c.q_latent_size else {"q": q}) | kv, x, E)
    if c.q_latent_size:
        part.linear("q", part.norm("q_latent", "q_down", c.q_latent_size, 1, "rms_norm"), c.q_latent_size, q)
    latent = part.norm("kv_latent", "kv_down", c.kv_latent_size, 1, "rms_norm")
    part.linear("kv", latent, c.kv_latent_size, plain + value)
    tape.add("k", part.size(q), "kv")
    tape.add("v", part.size(q), "kv")
    seen = _attend(part, part.rotary("q.turned", "q", q), "k", "v", q, q)
    return part.linear("attended", tape.add("values", part.size(value), seen), value, E)


def _mlp(part: _Part, x: str, inner: float, name: str = "") -> str:
    c, tape, E = part.c, part.tape, part.c.hidden_size
    up, gate, down = f"{name}up", f"{name}gate", f"{name}down"
    if not part.llama:
        part.linear(up, x, E, inner)
        tape.add("gelu", part.size(inner), up, up)
        return part.linear(down, "gelu", inner, E)
    part.linears({gate: inner, up: inner}, x, E, apart=True)
    return part.linear(down, _swiglu(part, gate, up, part.size(inner)), inner, c.hidden_size)


def _swiglu(part: _Part, gate: str, up: str, size: float) -> str:
    if "swiglu" in part.s.triton:
        return part.tape.add(f"{gate}.inner", size, f"{gate} {up}", f"{gate} {up}")
    part.tape.add(f"{gate}.silu", size, gate, gate)
    return part.tape.add(f"{gate}.inner", size, f"{gate}.silu {up}", f"{gate}.silu {up}")


def _experts(part: _Part, x: str) -> str:
    """Every slot is a row; where experts are dealt out, as many rows arrive as leave, if the loads are even."""
    c, s, tape, E = part.c, part.s, part.tape, part.c.hidden_size
    slots, memory = c.experts_per_token, part.memory_of(x)
    rows = min(1.0, c.capacity_factor or 1.0) * slots
    here, inner = s.experts_here or c.num_experts, c.expert_ffn_size / s.tensor_parallel
    routed = memory
    if s.element_bytes < 4:
        routed = tape.add("router.wide", part.size(E, 4), x)
    else:
        routed = x
    logits = tape.add("logits", part.size(c.num_experts, 4), routed, part.memory_of(routed), back=c.num_experts * E * 4.0)
    scores = tape.add("scores", part.size(c.num_experts, 4), logits, logits, work=part.size(c.num_experts, 8))
    way = tape.keep("way", part.size(3 * slots, 8))  # row of each slot, slot and token of each row
    weights = tape.add("weights", part.size(slots, 4), scores, f"{scores} {way}")
    arrived = tape.add("rows", part.size(rows * E), x, way)
    if here < c.num_experts:
        for arrived in ("rows.arrived", "rows.sorted"):
            tape.add(arrived, part.size(rows * E), tape.operators[-1].makes[0])
    product, costly = s.weights(here * inner * E), "grouped_linear" in s.triton  # torch's run again
    for name in ("expert.gate", "expert.up"):
        tape.add(name, part.size(rows * inner), arrived, arrived, back=product, costly=costly)
    mixed = _swiglu(part, "expert.gate", "expert.up", part.size(rows * inner))
    made = tape.add("expert.down", part.size(rows * E), mixed, mixed, back=product, costly=costly)
    if here < c.num_experts:
        for name in ("made.sorted", "made.returned"):
            made = tape.add(name, part.size(rows * E), made, holds="rows rows.arrived")
    made = tape.add("mixed", part.whole, f"{made} {weights}", f"{made} {weights} {way}", back=part.size(2 * rows * E))
    if c.num_shared_experts:
        shared = _mlp(part, x, c.num_shared_experts * inner, "shared.")
        made = tape.add("mixed.all", part.whole, f"{made} {shared}", passes=True)
    return made


def head_tape(config: ModelConfig, setting: Setting, loss: str = "torch") -> Tape:
    """Last norm, head and loss.

    loss: torch; triton: our kernel, which writes the gradient over the logits; fused: logits exist for some tokens at a time, and
    are made again in the backward; fused_kept: the gradients are made in the forward instead, and kept.
    """
    part = _Part(config, setting)
    entered = part.normed("normed", "x")
    columns = -(-config.vocab_size // setting.tensor_parallel)
    if loss.startswith("fused"):
        _fused_loss(part, entered, columns, loss == "fused_kept")
        return part.tape
    part.linear("logits", entered, config.hidden_size, columns)
    wide, tape = part.size(columns, 4), part.tape
    low = setting.element_bytes < 4
    if loss == "triton":
        tape.add("loss", 0, "logits", "logits", passes=True, gradient=part.size(columns))
    elif setting.tensor_parallel > 1:  # the gradient is written over the exponentials
        tape.add("exponentials", wide, "logits", gradient=0.0 if low else wide, passes=not low)
        tape.add("loss", 0, "exponentials", "exponentials" if low else "", gradient=0.0)
        if not low:
            tape.operators[-2] = tape.operators[-2]._replace(keeps=("exponentials",))
    else:
        last = tape.add("logits.wide", wide, "logits") if low else "logits"
        tape.add("shares", wide, last, "shares")
        tape.add("loss", 0, "shares")
    return tape


def _fused_loss(part: _Part, x: str, columns: int, kept: bool) -> None:
    c, s, tape = part.c, part.s, part.tape
    product = 4.0 * columns * c.hidden_size  # the weight's gradient is added up in fp32
    logits = min(chunk_of(s.tokens, c.hidden_size, columns), s.tokens) * columns
    again = 0 if "cross_entropy" in s.triton else 4
    work, back = logits * (s.element_bytes + again), logits * (s.element_bytes + (again if s.element_bytes < 4 else 0)) + product
    statistics = tape.keep("loss.statistics", part.size(2, 4))
    if kept:
        gradients = f"{tape.keep('loss.dx', part.whole)} {tape.keep('loss.dweight', product)}"
        tape.add("loss", 0, x, gradients, work=work, back=s.weights(columns * c.hidden_size))
    else:
        tape.add("loss", 0, x, f"{part.memory_of(x)} {statistics}", work=work, back=back)


def chunk_of(tokens: int, size: int, vocab_size: int) -> int:
    """Tokens whose logits exist at once in megalm_kernels.linear_cross_entropy: `default_chunk` there, which needs torch."""
    most = max(2048, tokens * size // max(vocab_size, 1))
    chunks = max(1, -(-tokens // most))
    return max(16, -(-tokens // (16 * chunks)) * 16)


def embedding_backward(config: ModelConfig, setting: Setting) -> float:
    """Bytes at once in the embedding's backward: the gradients of its output and, whole, of its weight."""
    part = _Part(config, setting)
    weight = setting.weights(-(-config.vocab_size // setting.tensor_parallel) * config.hidden_size)
    return weight + part.hidden + (part.whole if setting.tensor_parallel > 1 else 0.0)
