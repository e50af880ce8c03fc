"""Passports: what a guard needs to know of a model, measured once and kept in a file."""

from safeopt.passport.file import Passport, PassportError

__all__ = ["Passport", "PassportError"]
