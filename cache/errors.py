"""The one exception that stands for a mistake of the user's."""


class UserError(ValueError):
    """An option, file, model, data set or cache is not what it must be.

    Its message is one line: what was expected, what was found, where, and what to do. The command line prints it and
    exits with code 2; any other exception is a fault of the program and gives a traceback.
    """
