"""What a training run needs around model, data and checkpoint."""

from phi3_plugin.train.monitor import DiskLogger
from phi3_plugin.train.optimizer import constant_with_warmup, cosine_with_warmup, linear_with_warmup

__all__ = ["DiskLogger", "constant_with_warmup", "cosine_with_warmup", "linear_with_warmup"]
