from phi3_plugin.api import evaluate as evaluate
from phi3_plugin.api import generate as generate
from phi3_plugin.api import load as load
from phi3_plugin.api import train as train

__all__ = ["evaluate", "generate", "load", "train"]

__version__: str
