"""Optimizers, parameter groups, learning-rate schedules and gradient clipping."""
