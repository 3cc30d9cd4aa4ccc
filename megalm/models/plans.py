"""Tensor parallel plans: for each module name, how its work is split over the tensor parallel ranks.

column    weight rows (output features) are split; the input is whole on every rank, the output is a slice
heads     column for key and value heads, of which there may be fewer than ranks: then neighbouring ranks hold copies
logits    column for the vocabulary: where it does not divide, the last ranks' parts are padded
row       weight columns (input features) are split; the outputs are summed over the ranks (the paper's g)
vocab     embedding rows (the vocabulary) are split, padded like the logits; the looked-up vectors are summed
norm      parameters are whole; its output enters a split region (the paper's f). With sequence parallelism it works on
          this rank's slice of the sequence and the output is gathered
sequence  parameters are whole; with sequence parallelism it works on this rank's slice of the sequence
inside    a linear layer or a norm within a split region: parameters, input and output are whole on every rank, but what
          comes back to them in the backward is the part of this rank's heads: gradients are summed over the ranks

experts   of each expert the inner features are split; the output is this rank's part
part      a row whose parts are not summed: somebody does that further on
leave     what sums them (g)

A name matches a module if it is the end of the module's path: `attention.q` matches `layers.3.attention.q`.
f and g are those of Shoeybi et al. 2019, with sequence parallelism those of Korthikanti et al. 2022.
"""

from __future__ import annotations

_DECODER = {
    "embedding": "vocab",
    "embedding_dropout": "sequence",
    "attention_norm": "norm",
    "attention.q": "column",
    "attention.k": "heads",
    "attention.v": "heads",
    "attention.out": "row",
    "attention_dropout": "sequence",
    "mlp_norm": "norm",
    "mlp.up": "column",
    "mlp.down": "row",
    "mlp_dropout": "sequence",
    "norm": "norm",
    "head": "logits",
}
_LATENT = {
    "attention.q_down": "inside",
    "attention.q_norm": "inside",
    "attention.q_up": "column",
    "attention.kv_down": "inside",
    "attention.kv_norm": "inside",
    "attention.kv_up": "column",
}
_EXPERTS = {
    "mlp.router": "inside",
    "mlp.experts": "experts",
    "mlp.shared.gate": "column",
    "mlp.shared.up": "column",
    "mlp.shared.down": "part",
    "mlp.leave": "leave",
}
PLANS: dict[str, dict[str, str]] = {
    "gpt": {**_DECODER, "position_embedding": "sequence"},
    "llama": {**_DECODER, **_LATENT, **_EXPERTS, "mlp.gate": "column"},
}

TIED = {"head.weight": "embedding.weight"}
"""With tied embeddings: a parameter's name -> the name of the parameter it is a copy of, where both cannot be one."""
