"""The array of vectors that embedders return: [texts, dimensions]."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Vectors = npt.NDArray[Any]
