"""Evaluation tasks: read from files by format, prompted, answered by a model and graded."""
