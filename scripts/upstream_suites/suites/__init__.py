"""Suites of Transformers on the classes under test."""
