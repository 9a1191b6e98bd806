"""Run untrusted code without network or host files, with limits on time, memory, processes and output.

`run` takes any command, `run_python` a program and its files. Isolation combines bubblewrap (Linux namespaces), a
seccomp filter of denied system calls, and limits that a watcher enforces over all processes together. Without
bubblewrap nothing is run: MissingDependency says what to install.
"""

from __future__ import annotations

from llmworks.sandbox.bubblewrap import Limits, SandboxResult, require_bubblewrap, run
from llmworks.sandbox.python import run_python

__all__ = ["Limits", "SandboxResult", "require_bubblewrap", "run", "run_python"]
