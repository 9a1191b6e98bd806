"""Configs of stages: help, `--set`, and descriptions of errors."""
