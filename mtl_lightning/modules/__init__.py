"""LightningModules for multi-task learning."""
