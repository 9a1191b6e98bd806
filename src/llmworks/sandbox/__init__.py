"""Run code that nobody has read: no network, no file of the host, limited time, memory, processes and output.

`run` takes any command, `run_python` a program and its files. Isolation is bubblewrap's (Linux namespaces), a list of
refused system calls, and limits that a watcher enforces over all processes together. Without bubblewrap nothing is run:
MissingDependency says what to install.
"""

from __future__ import annotations

from llmworks.sandbox.bubblewrap import Limits, Outcome, require, run
from llmworks.sandbox.python import run_python

__all__ = ["Limits", "Outcome", "require", "run", "run_python"]
