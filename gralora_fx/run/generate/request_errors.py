"""Why a request is not answered, other than that it is wrong in itself; the service has a status for each."""

from __future__ import annotations

from gralora_fx.errors import ServingError


class WrongFieldError(ServingError):
    """What a field of a request, or an option, asks for cannot be done."""

    def __init__(self, field: str | None, problem: str) -> None:
        """Say what is wrong."""
        super().__init__(problem if field is None else f"{field}: {problem}")
        self.field = field


class DeadEndError(WrongFieldError):
    """No token can go on with an answer as it has to be, or that is too complex to tell."""


class UnknownModelError(ServingError):
    """A request names a model that is not served."""

    field = "model"


class UnknownAdapterError(ServingError):
    """A request names an adapter that is not there."""

    field = "lora_name"


class AdapterNotFoundError(ServingError):
    """There is nothing at the path of an adapter."""


class AdapterNameError(ServingError):
    """A name may not be given to an adapter."""

    field = "lora_name"


class AdapterLoadError(ServingError):
    """An adapter that a request names is there, and cannot be loaded."""

    field = "model"


class AdapterLimitError(ServingError):
    """An adapter is above a limit, or there is no room beside those that stay."""


class AdaptersInUseError(ServingError):
    """There is no room for an adapter until a request ends."""


class TooManyChangesError(ServingError):
    """There is no room for more loads now."""


class QueueFullError(ServingError):
    """There is no room for more requests now."""


class StoppedError(ServingError):
    """The service is stopping and takes no more requests."""


class DeadlineError(ServingError):
    """A request was right, and took longer than it may."""


class RunError(ServingError):
    """A request was right, and running it failed."""

    @classmethod
    def of(cls, error: Exception) -> RunError:
        """Make what a caller is told of an error while its request ran."""
        if isinstance(error, (DeadEndError, AdapterLoadError)):
            told = AnswerError(str(error))
            told.field = error.field
            return told
        return cls(str(error) if isinstance(error, ServingError) else "the request failed; the server's log says why")


class AnswerError(RunError):
    """A request was right as far as could be told, and its answer has come to where no token may follow."""
