"""`python -m llmworks`."""

from __future__ import annotations

from llmworks.cli import main

raise SystemExit(main())
