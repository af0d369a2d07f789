"""Structured output: schemas, regular expressions, choices and grammars become masks over the vocabulary."""
