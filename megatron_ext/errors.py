"""Errors that are told in one line, without a traceback."""


class RunFailed(Exception):
    """A run that could not do what it was asked for, through nobody's wrong input: exit code 1."""


class UserError(Exception):
    """Bad input: which key, which value, and what would be right. Exit code 2.

    Args:
        key: the configuration key, option or file that is wrong, as the user would type it.
        value: what it was.
        reason: why that cannot work and what would be right.
    """

    def __init__(self, key: str, value: object, reason: str):
        self.key, self.value, self.reason = key, value, reason
        super().__init__(f"{key}={value}: {reason}")

    def __reduce__(self):  # crosses process boundaries (data-preparation workers)
        return type(self), (self.key, self.value, self.reason)
