"""A model for use: the base, or base and adapter, with weights that are read once and not copied.

    from phi3_plugin.load import load

    model, tokenizer = load("Phi-3-mini-4k", "my_adapter/final")

What generates, evaluates and checks starts here.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.training import set_default_dtype

from phi3_plugin import hub
from phi3_plugin.callable_module import CallableModule
from phi3_plugin.checkpoint.adapter import Adapter
from phi3_plugin.checkpoint.base import A, B, open_weights, refuse_other_base
from phi3_plugin.checkpoint.files import StoredTensor
from phi3_plugin.checkpoint.foreign import read_adapter
from phi3_plugin.checkpoint.peft import CONFIG, new_tokens_of
from phi3_plugin.config import Phi3Config, checkpoint_folder, read_config
from phi3_plugin.data import phi3_tokenizer
from phi3_plugin.data.added_tokens import NewToken, pieces_of
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import AdapterError, ConfigError, MissingFileError
from phi3_plugin.models import lora_phi3, phi3
from phi3_plugin.models.cache import ServedLinear
from phi3_plugin.models.lora_settings import keys_of
from phi3_plugin.models.new_tokens import starting_rows, widen, with_rows
from phi3_plugin.models.nf4 import is_nf4, rows_of
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.models.rope import RotaryEmbedding
from phi3_plugin.train.world import check_weights, pick_device


def load(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "bf16",
    device: str | None = None,
    quantize: bool = False,
    check_base: bool = True,
    sharing: nn.Module | None = None,
) -> tuple[nn.Module, Phi3Tokenizer]:
    """Return a model that is ready to compute, and its tokenizer.

    That is the base's, with the tokens that the adapter has rows for.

    The model is on the device, in eval mode, without gradients.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter: Its name on the Hub, or folder or file of an adapter of PEFT, torchtune, loralib,
            mlx-lm or this package; it stays beside the base weights.
        dtype: bf16, fp16 or fp32, of base and adapter.
        device: cpu, cuda, xpu or mps; None is cuda where there is one.
        quantize: Store the base in NF4, as QLoRA trains over it.
        check_base: Refuse an adapter that says it was made for other base weights.
        sharing: A model that was loaded from the same folder, with the same dtype, device and
            quantize: its base weights serve this one too and take no memory twice. Where both are
            to answer, `serve` comes after, for both at once.

    Raises:
        AdapterError: The adapter is broken, or does not fit this base.
        CheckpointError: The base weights are damaged or not those of config.json.
        ConfigError: An option has a value that it cannot have.
        MissingFileError: A folder or file is not there.
        TokenizerError: The tokenizer is not one that we follow exactly.
    """
    tokenizer = tokenizer_of(checkpoint_dir, adapter)  # before what takes time
    model = load_model(
        checkpoint_dir,
        adapter,
        dtype=dtype,
        device=device,
        quantize=quantize,
        check_base=check_base,
        sharing=sharing,
    )
    return model, tokenizer


def tokenizer_of(
    checkpoint_dir: str | Path, adapter: str | Path | None = None, **options: Any
) -> Phi3Tokenizer:
    """Return the tokenizer of a base, with the tokens that an adapter has rows for.

    Args:
        checkpoint_dir: Folder of the base model.
        adapter: Folder or file of an adapter.
        options: Those of :func:`phi3_tokenizer`.

    Raises:
        MissingFileError: A folder or file is not there.
        TokenizerError: The tokenizer is not one that we follow exactly.
    """
    base = checkpoint_folder(checkpoint_dir)
    more = new_tokens_of(Path(adapter), base) if adapter else []
    return phi3_tokenizer(base, add_tokens=more, **options)


def load_model(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "bf16",
    device: str | None = None,
    quantize: bool = False,
    check_base: bool = True,
    sharing: nn.Module | None = None,
) -> nn.Module:
    """Return the model of :func:`load` alone, whose options and errors these are.

    The folder may be without a tokenizer.
    """
    # Of several processes on a machine, as torchrun starts them, each has a GPU of its own
    place = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    model, values = empty_model(
        checkpoint_dir, adapter, dtype=dtype, quantize=quantize, check_base=check_base
    )
    if sharing is not None:
        shared = _shared(sharing, model, place)
        values |= {n: v for n, v in shared.items() if isinstance(values.get(n), StoredTensor)}
    fill(model, values, place)
    return model.eval().requires_grad_(False)


def load_start(
    checkpoint_dir: str | Path,
    new_tokens: Mapping[int, NewToken],
    *,
    dtype: str,
    device: str | None,
    quantize: bool,
) -> nn.Module:
    """Return the base that a run starts from: with rows for new tokens, see `starting_rows`.

    Options and errors are those of :func:`load`.
    """
    place = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    model, values = empty_model(
        checkpoint_dir, dtype=dtype, quantize=quantize, new_tokens=new_tokens
    )
    fill(model, values, place)
    return model.eval().requires_grad_(False)


def empty_model(
    checkpoint_dir: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str = "bf16",
    quantize: bool = False,
    check_base: bool = True,
    new_tokens: Mapping[int, NewToken] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model on the meta device and where its values are, once adapter and base fit.

    Options and errors are those of :func:`load`. A base without an adapter may be given tokens
    that are not in it: their rows are those from which training starts.

    Returns:
        The model, and by name of each parameter a tensor of the adapter or a stored one of the
        base.
    """
    if dtype not in PRECISIONS:
        raise ConfigError(f"dtype: {dtype!r} must be one of {', '.join(PRECISIONS)}.")
    base = checkpoint_folder(checkpoint_dir)
    if (base / CONFIG).is_file():
        raise MissingFileError(
            f"checkpoint_dir: {base} is the folder of an adapter. Give the folder of its base "
            "model here, and this one as the adapter."
        )
    values: dict[str, Any] = {**open_weights(base)}
    rows: Mapping[str, Mapping[int, Tensor]] = starting_rows(values, pieces_of(new_tokens or {}))
    config, read, vocabulary = read_config(base), None, max([0, *(new_tokens or ())]) + 1
    if adapter:
        folder = hub.adapter(str(adapter))
        read = read_adapter(folder, config=config, base=base)
        if read.origin.get("lora_init") == "loftq" and not quantize:
            raise AdapterError(
                f"{adapter} was started by LoftQ and belongs to the base in NF4; over the original "
                "weights it computes something else. Load it with quantize=True."
            )
        if check_base:
            refuse_other_base(folder, read.base_hash, read.base, base)
        values |= {**read.tensors, **read.saved}
        rows, vocabulary = read.rows, read.vocabulary
    values |= with_rows(values, rows)
    model: nn.Module
    try:
        with set_default_dtype(PRECISIONS[dtype]), torch.device("meta"):
            if read is None:
                model = phi3(base, quantize_base=quantize)
            else:
                model = lora_phi3(base, **keys_for(read, config), quantize_base=quantize)
            widen(model, vocabulary)
    except AdapterError as error:
        raise AdapterError(
            f"{error} `phi3-tune adapter merge` makes a checkpoint of adapter and base, which "
            "computes the same and can be used in the base's place."
        ) from error
    model.loaded_from = base.resolve()  # type: ignore[assignment]
    model.with_rows = {f"{module}.weight" for module in rows}  # type: ignore[assignment]
    return model, values


def keys_for(adapter: Adapter, sizes: Phi3Config, *, use_rslora: bool = False) -> dict[str, Any]:
    """Return the keys of our builder for a model with the ranks and scales of an adapter.

    Args:
        adapter: See above.
        sizes: Of the model.
        use_rslora: How the keys are to say the scales.

    Raises:
        AdapterError: No keys of a model say where the adapter is.
    """
    return keys_of(
        adapter.ranks,
        adapter.scales,
        set(adapter.saved),
        layers=sizes.num_hidden_layers,
        use_dora=adapter.is_dora,
        use_rslora=use_rslora,
    )


def fill(model: nn.Module, values: Mapping[str, Any], device: torch.device) -> None:
    """Give a model on the meta device its values, one parameter after the other.

    Args:
        model: See above.
        values: By parameter name: a parameter that is taken as it is, a whole tensor, or what
            reads rows when it is sliced.
        device: Where they go.

    Raises:
        CheckpointError: Names or shapes are not those of the model; all are listed.
    """
    check_weights(model, values)
    for name, parameter in list(model.named_parameters()):
        value = values[name]
        if not isinstance(value, nn.Parameter):
            rows = rows_of(value, parameter.detach(), 0, 1, device)
            value = nn.Parameter(rows, requires_grad=False)
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, value)
    for part in model.modules():
        if isinstance(part, RotaryEmbedding):
            part.rope_init(device)


def _shared(given: nn.Module, model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Return the weights that a model can take from another.

    Raises:
        ConfigError: They are others, or of another kind.
    """
    if (folder := getattr(given, "loaded_from", None)) != model.loaded_from:
        raise ConfigError(f"sharing: the model is of {folder}, but this is {model.loaded_from}.")
    if any(isinstance(module, ServedLinear) for module in given.modules()):
        raise ConfigError("sharing: the model was made ready by serve(). Load all, then serve all.")
    theirs, ours = dict(given.named_parameters()), dict(model.named_parameters())
    if any(name.endswith((A, B)) for name in theirs):
        raise ConfigError("sharing: the model has an adapter. Share one that was loaded without.")
    for name in given.with_rows:  # type: ignore[union-attr]
        del theirs[name]  # not the base's
    for name in theirs.keys() & ours.keys():
        one, other = theirs[name], ours[name]
        if (one.dtype, is_nf4(one), one.device) != (other.dtype, is_nf4(other), device):
            raise ConfigError(
                "sharing: the model was loaded with another dtype or quantize, or elsewhere."
            )
    return {name: theirs[name] for name in theirs.keys() & ours.keys()}


sys.modules[__name__].__class__ = CallableModule
