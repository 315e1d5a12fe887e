"""What every error has in common that is meant for a person."""

from typing_extensions import override


class UserError(ValueError):
    """The input was at fault: the message is for a person, one sentence on what was wrong, where,
    and what to do. A script ends with it alone, without a traceback.

    Every error class of the project derives from it; whatever else is raised is a defect.
    """

    @override
    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Names of files that are no UTF-8 stand in it as escapes, so that any terminal takes it."""
    return text.encode("utf-8", "backslashreplace").decode()
