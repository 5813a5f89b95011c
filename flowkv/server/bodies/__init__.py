"""What clients send: the fields of each body, and all rules that need no model."""
