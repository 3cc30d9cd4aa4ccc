"""megalm: train large language models, from raw text to a served model, on a laptop or a cluster."""

__version__ = "0.1.0"
