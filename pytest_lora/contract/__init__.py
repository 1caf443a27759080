"""Laws that code for LoRA keeps, held against an implementation by Hypothesis (docs/contract.md)."""
