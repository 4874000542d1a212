"""The one error type that is a message to the user."""


class UserError(Exception):
    """Wrong input: the text says what is wrong, where, and what to do.

    Command lines print it as one line on stderr and exit with code 2; a server answers HTTP 4xx.
    """
