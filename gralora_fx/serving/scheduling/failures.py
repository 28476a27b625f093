"""Why a request is not answered, other than that it is wrong."""

from gralora_fx.errors import ServingError


class QueueFullError(ServingError):
    """There is no room for more requests now."""


class StoppedError(ServingError):
    """The service is stopping and takes no more requests."""


class RunError(ServingError):
    """A request was right, and running it failed."""


class DeadlineError(ServingError):
    """A request was right, and took longer than it may."""
