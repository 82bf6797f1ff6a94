"""One exception per kind of user mistake.

A message is one line that says what was given, what is allowed and what to do. The command line prints it and
exits with `exit_code`; anything that is not a MegadpoError is a defect of megadpo and keeps its traceback.
"""


class MegadpoError(Exception):
    """Base of every mistake that the user can mend."""

    exit_code = 2


class ConfigError(MegadpoError):
    """The run file: an unknown key, a wrong type, settings that exclude each other, a grid that does not fit."""


class DataError(MegadpoError):
    """The preference data: a bad line, missing columns, nothing left to train on."""


class TokenizerError(MegadpoError):
    """The tokenizer or the chat template: missing, unreadable, or not the model's."""


class ModelError(MegadpoError):
    """The Hugging Face folder: unsupported architecture or field, missing, misshapen or truncated tensors."""


class CheckpointError(MegadpoError):
    """The run folder or one of its checkpoints: another run's, incomplete, or unreadable."""


class StorageError(MegadpoError):
    """The disk: full, read-only, or not shared where it must be."""


class DataChangedError(StorageError):
    """The tokenised data was written to while a run read it. Raised on every rank."""


class MachineError(MegadpoError):
    """The machine: a missing or wrong package, too few devices, a fault of Megatron-Core that is not guarded."""


class NumericsError(MegadpoError):
    """A loss or gradient that is not finite, or a reference that does not match; no update was made from it. Raised on
    every rank."""

    exit_code = 3
