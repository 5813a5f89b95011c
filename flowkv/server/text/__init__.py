"""Text to token ids and back: tokenizers, chat templates, stop strings. Nothing of HTTP or requests in here."""
