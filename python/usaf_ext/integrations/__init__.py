"""Adapters to other frameworks, each loaded on demand."""
