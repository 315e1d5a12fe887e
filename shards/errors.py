"""What every error has in common that is meant for a person."""


class UserError(ValueError):
    """The input was at fault: the message is for a person, one sentence on what was wrong, where,
    and what to do. A script ends with it alone, without a traceback.

    Every error class of the project derives from it; whatever else is raised is a defect.
    """
