"""Metrics of multi-objective learning, on torchmetrics."""
