"""Recognition of torch tensors without importing torch: whoever gives one has imported it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs


def is_tensor(value: object) -> TypeIs[Tensor]:
    """Return whether a value is a torch tensor."""
    kind = getattr(sys.modules.get("torch"), "Tensor", None)
    return kind is not None and isinstance(value, kind)
