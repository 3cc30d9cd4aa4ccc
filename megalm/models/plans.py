"""Tensor parallel plans: for each module name, how its work is split over the tensor parallel ranks.

column    weight rows (output features) are split; the input is whole on every rank, the output is a slice
heads     column for key and value heads, of which there may be fewer than ranks: then neighbouring ranks hold copies
logits    column for the vocabulary: where it does not divide, the last ranks' parts are padded
row       weight columns (input features) are split; the outputs are summed over the ranks (the paper's g)
vocab     embedding rows (the vocabulary) are split, padded like the logits; the looked-up vectors are summed
norm      parameters are whole; its output enters a split region (the paper's f). With sequence parallelism it works on
          this rank's slice of the sequence and the output is gathered
sequence  parameters are whole; with sequence parallelism it works on this rank's slice of the sequence

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
PLANS: dict[str, dict[str, str]] = {
    "gpt": {**_DECODER, "position_embedding": "sequence"},
    "llama": {**_DECODER, "mlp.gate": "column"},
}

TIED = {"head.weight": "embedding.weight"}
"""With tied embeddings: a parameter's name -> the name of the parameter it is a copy of, where both cannot be one."""
