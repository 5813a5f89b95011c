"""Outputs that follow a grammar: what a token may be next. No torch; llguidance does the parsing."""
