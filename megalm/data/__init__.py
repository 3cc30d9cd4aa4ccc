"""Data: from raw text to the microbatches of a rank. Only `loader` imports torch."""
