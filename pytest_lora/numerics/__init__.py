"""Pure functions on tensors.  Nothing is imported here, so that every module stays separate."""
