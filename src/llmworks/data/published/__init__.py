"""Readers of published datasets in formats of their own: each has `rows(path, rejected)`, which returns chat rows."""
