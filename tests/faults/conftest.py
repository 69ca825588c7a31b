"""The data set and the trained run of the tests of the commands."""

from tests.commands.conftest import data, once, trained

__all__ = ["data", "once", "trained"]
