"""Formats results; never calculates, never judges."""
