"""The errors a user can cause and mend, and what a user should know of."""

WARNING = "warning: "  # how the command line begins an InputWarning


class InputError(ValueError):
    """A value of the user's cannot work; the message names the option, the value and what would be right.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class InputWarning(UserWarning):
    """Something in the user's data is dealt with in a way that the user should know of; the command line says it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without a full stop; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
