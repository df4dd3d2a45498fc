"""What a training run needs around model, data and checkpoint."""

from phi3_plugin.train.metrics import DiskLogger
from phi3_plugin.train.schedules import cosine_with_warmup

__all__ = ["DiskLogger", "cosine_with_warmup"]
