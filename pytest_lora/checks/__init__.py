"""What is measured, one module per concern; nothing here judges."""
