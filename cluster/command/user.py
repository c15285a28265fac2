"""The user that runs the command. In some containers, no name belongs to its number."""

import getpass
import os


def user_name() -> str:
    """Return the user's name, or the number of a user without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def user_variables() -> dict[str, str]:
    """Return the variables with which Ray, torch and Triton find a name and a folder for a user who has none."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return {"USER": str(os.getuid())}
    return {}
