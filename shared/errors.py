"""The errors a user can mend: one line each, exit code 2. Anything else is a bug and gets its traceback."""


class UserError(Exception):
    """Bad input. The message names the thing, its value and the next step, in one line."""


class ConfigError(UserError):
    """A setting is unknown, contradictory or impossible."""


class DatasetError(UserError):
    """The user's folder of videos, or what ingest made of it, cannot be used."""


class StoreError(UserError):
    """The store of latents and text is missing, damaged, stale or made for another model."""


class ModelError(UserError):
    """Model weights are missing, of an unsupported kind, or do not fit the settings."""


class RunError(UserError):
    """A training run cannot start, continue or be exported."""
