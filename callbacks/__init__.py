"""Callbacks that track multi-objective training; they observe and never change it."""
