"""Laws that code for LoRA keeps, held against it by Hypothesis (docs/contract.md)."""
