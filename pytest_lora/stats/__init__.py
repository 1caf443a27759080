"""Verdicts on data with a stated error rate.  Nothing is imported here."""
