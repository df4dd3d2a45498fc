"""Fine-tune Microsoft's Phi-3 family with LoRA and QLoRA inside torchtune.

Importing this package imports nothing else: the start-up hook in
:mod:`phi3_plugin.hook` runs in every process that imports torch.

``from phi3_plugin import load, train, generate, evaluate`` gives the modules of these
names, which are called as the functions of :mod:`phi3_plugin.api`; ``__init__.pyi`` tells type
checkers so.
"""

import os as _os

__version__ = "0.1.0"

# `recipes` and `configs` are installed within this folder and lie beside it in a clone, whose
# folder comes before what is installed if Python is started there.
if not _os.path.exists(_os.path.join(__path__[0], "recipes")):
    __path__.append(_os.path.dirname(__path__[0]))
