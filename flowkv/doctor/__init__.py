"""`flowkv doctor`: looks at this machine and a configuration, and says what would go wrong and what to do about it."""
