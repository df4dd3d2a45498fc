"""Fine-tune Microsoft's Phi-3 family with LoRA and QLoRA inside torchtune.

Importing this package imports nothing else: the start-up hook in
:mod:`phi3_plugin.hook` runs in every process that imports torch.
"""

__version__ = "0.1.0"
