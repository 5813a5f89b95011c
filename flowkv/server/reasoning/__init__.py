"""Thoughts that models write before their answers: found in the text, counted, and let past a grammar."""
