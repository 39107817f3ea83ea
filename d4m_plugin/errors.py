"""The errors a user can cause and mend."""


class InputError(ValueError):
    """A value of the user's cannot work; the message names the option, the value and what would be right.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
