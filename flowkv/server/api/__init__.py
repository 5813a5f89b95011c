"""The routes: what each takes, does and answers, and what they share."""
