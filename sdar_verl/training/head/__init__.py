"""Distributions over the vocabulary, computed at the language-model head."""
