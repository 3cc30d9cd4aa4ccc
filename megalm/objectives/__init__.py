"""From a batch and the model's outputs to a loss: one function per objective."""
