"""Losses, optimizers, steps and the run."""
