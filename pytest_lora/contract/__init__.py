"""Laws that code for LoRA keeps, held against it by Hypothesis (docs/contract.md)."""

IN_FRESH_PROCESSES = frozenset({"seeded_initialisation", "save_reload", "merged_reload"})
"""Laws whose every example takes fresh processes, which take seconds to start."""
