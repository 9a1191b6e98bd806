"""Catastrophic forgetting: what a training does to the rest of a model."""
