"""What a training run needs around model, data and checkpoint."""

import sys

from phi3_plugin.callable_module import CallableModule
from phi3_plugin.train.optimizer import constant_with_warmup, cosine_with_warmup, linear_with_warmup
from phi3_plugin.train.stock import DiskLogger

__all__ = ["DiskLogger", "constant_with_warmup", "cosine_with_warmup", "linear_with_warmup"]

sys.modules[__name__].__class__ = CallableModule
