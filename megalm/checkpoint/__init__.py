"""The state of a run on disk: named tensors with global shapes that any layout can load."""
