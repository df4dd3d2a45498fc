"""Fine-tune Microsoft's Phi-3 family with LoRA and QLoRA inside torchtune.

Importing this package imports nothing else: the start-up hook in
:mod:`phi3_plugin.hook` runs in every process that imports torch.
"""

import os as _os
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from inspect import Signature
    from typing import Any

    from phi3_plugin.api import evaluate, generate, load, train

    __all__ = ["evaluate", "generate", "load", "train"]

__version__ = "0.1.0"

# `recipes` and `configs` are installed within this folder and lie beside it in a clone, whose
# folder comes before what is installed if Python is started there.
if not _os.path.exists(_os.path.join(__path__[0], "recipes")):
    __path__.append(_os.path.dirname(__path__[0]))


class CallableModule(ModuleType):
    """A module that is called as the function of its name in :mod:`phi3_plugin.api`.

    ``phi3_plugin.train`` and its like are modules whose contents YAMLs name, and are imported when
    somebody asks for them: ``from phi3_plugin import train`` needs no more than that.
    """

    @property
    def _function(self) -> "Callable[..., Any]":
        from phi3_plugin import api

        function: Callable[..., Any] = getattr(api, self.__name__.rpartition(".")[2])
        return function

    def __call__(self, *args: "Any", **kwargs: "Any") -> "Any":
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> "Signature":
        from inspect import signature

        return signature(self._function)

    __doc__ = property(lambda module: module._function.__doc__)
