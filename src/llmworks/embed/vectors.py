"""Type of the embedding arrays [texts, dimensions] that embedders return."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Vectors = npt.NDArray[Any]
