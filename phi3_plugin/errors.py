"""Every error this package raises on purpose.

A message says what was given, what was expected, and what to do. Each kind also
inherits the standard library's error for the same situation, so that callers who
know nothing about this package still catch it.
"""


class Phi3Error(Exception):
    """Base of all errors raised on purpose by phi3_plugin."""


class ConfigError(Phi3Error, ValueError):
    """A key of config.json or of the YAML is missing, unknown or has a value we cannot honour."""


class MissingFileError(Phi3Error, FileNotFoundError):
    """A file or folder that was named, or that must lie beside a named one, is not there."""


class CheckpointError(Phi3Error, ValueError):
    """Weights or a saved run do not fit what the configuration promises."""


class AdapterError(Phi3Error, ValueError):
    """LoRA targets, ranks or adapter weights that cannot be used as asked."""


class TokenizerError(Phi3Error, ValueError):
    """Tokenizer files or a chat template that we cannot follow exactly."""


class DataError(Phi3Error, ValueError):
    """A data file or row that cannot be turned into training samples."""


class OutputError(Phi3Error, OSError):
    """The output folder cannot be written or holds something we must not overwrite."""
