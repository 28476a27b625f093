"""Errors of requests other than plain invalid ones; the service maps each to an HTTP status."""

from __future__ import annotations

from gralora_fx.errors import ServingError


class WrongFieldError(ServingError):
    """The value of a request field, or of an option, is not supported."""

    def __init__(self, field: str | None, problem: str) -> None:
        """Create it with the field's name and the problem."""
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.field = field


class DeadEndError(WrongFieldError):
    """No token can continue an answer under its constraint, or the constraint is too complex to evaluate."""


class UnknownModelError(ServingError):
    """A request names a model that is not served."""

    field = "model"


class UnknownAdapterError(ServingError):
    """A request names an adapter that does not exist."""

    field = "lora_name"


class AdapterNotFoundError(ServingError):
    """There is nothing at the path of an adapter."""


class AdapterNameError(ServingError):
    """A name is not allowed for an adapter."""

    field = "lora_name"


class AdapterLoadError(ServingError):
    """An adapter that a request names exists, but cannot be loaded."""

    field = "model"


class AdapterLimitError(ServingError):
    """An adapter exceeds a limit, or there is no room beside those that stay."""


class AdaptersInUseError(ServingError):
    """There is no room for an adapter until a request ends."""


class TooManyChangesError(ServingError):
    """Too many adapter changes are waiting."""


class QueueFullError(ServingError):
    """The queue of requests is full."""


class StoppedError(ServingError):
    """The service is stopping and takes no more requests."""


class DeadlineError(ServingError):
    """A valid request exceeded its time limit."""


class RunError(ServingError):
    """Running a valid request failed."""

    @classmethod
    def of(cls, error: Exception) -> RunError:
        """Create the error that a caller receives when its request failed while running."""
        if isinstance(error, (DeadEndError, AdapterLoadError)):
            told = AnswerError(str(error))
            told.field = error.field
            return told
        return cls(str(error) if isinstance(error, ServingError) else "the request failed; the server's log says why")


class AnswerError(RunError):
    """A valid request's answer has reached a point at which no token is allowed."""
