"""Evaluation of models on data, one file per kind of task."""
