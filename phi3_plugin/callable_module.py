"""Modules that are called: ``phi3_plugin.train`` holds modules, and ``train(...)`` trains."""

from collections.abc import Callable
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called as the function of its name in :mod:`phi3_plugin.api`.

    ``phi3_plugin.train`` and its like are modules whose contents YAMLs name, and are imported when
    somebody asks for them: ``from phi3_plugin import train`` needs no more than that.
    """

    @property
    def _function(self) -> Callable[..., Any]:
        name = self.__name__.rpartition(".")[2]
        function: Callable[..., Any] = getattr(import_module("phi3_plugin.api"), name)
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        return signature(self._function)

    __doc__ = property(lambda module: module._function.__doc__)
