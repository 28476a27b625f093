"""The error of a request that is larger than there is ever room for."""

from gralora_fx.errors import ServingError


class TooLargeError(ServingError):
    """A request has more tokens, prompts or rows than there is ever room for."""
