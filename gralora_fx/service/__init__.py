"""The HTTP service over an export directory: OpenAI's protocol for text, the Open Inference Protocol for tensors."""

from gralora_fx.base.compat.packages import require_extra
from gralora_fx.errors import ServingError

require_extra("serve", "the HTTP service", ServingError)  # before anything slow is imported
