"""LightningDataModules for multi-task data sets."""
