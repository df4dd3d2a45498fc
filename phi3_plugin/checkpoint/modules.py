"""Every module of a Phi-3 that can have an adapter: its size, and what other programs call it."""

from phi3_plugin.checkpoint.names import EMBEDDING, HEAD, NAMES
from phi3_plugin.checkpoint.split import INNER, PARTS, part_rows
from phi3_plugin.config import Phi3Config

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What PEFT, DDP, torch.compile and FSDP put before names."""


def module_sizes(config: Phi3Config) -> dict[str, tuple[int, int]]:
    """Return our name of every module and part, and what its adapter maps: (out, in).

    An embedding maps a token, one of the vocabulary, to a row: out is the model's width.
    """
    d, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    sizes = {
        "attn.qkv_proj": (config.qkv_size, d),
        "attn.o_proj": (d, d),
        "mlp.gate_up_proj": (2 * inner, d),
        "mlp.down_proj": (d, inner),
    }
    for part, split in INNER.items():
        rows = part_rows(part.rpartition(".")[0], config)[split]
        sizes[part] = rows.stop - rows.start, d
    layers = range(config.num_hidden_layers)
    out = {f"layers.{n}.{name}": size for n in layers for name, size in sizes.items()}
    return {**out, "tok_embeddings": (d, vocab), "output": (vocab, d)}


def aliases(config: Phi3Config) -> dict[str, str]:
    """Return every name under which a module may come, and ours.

    These are Hugging Face's, with and without ``model.``, with the parts as Llama names them;
    torchtune's; and ours.
    """
    out = {}
    for ours in module_sizes(config):
        for name in (ours, hf_name(ours), torchtune_name(ours)):
            out[name] = out[name.removeprefix("model.")] = ours
    return out


def hf_name(module: str) -> str:
    """Return Hugging Face's name of one of our modules, or Llama's of a part."""
    if module in ("tok_embeddings", "output"):
        return EMBEDDING if module == "tok_embeddings" else HEAD
    _, layer, block, *inner = module.split(".")
    fused = f"model.layers.{layer}.{HF_BLOCKS[block]}"
    return f"{fused}.{inner[-1]}"


HF_BLOCKS = {
    ours.split(".")[2]: hf.split(".")[3]
    for hf, ours in NAMES.items()
    if ours.startswith("layers.") and len(ours.split(".")) == 4
}
"""attn and mlp, as Hugging Face names them."""


def torchtune_name(module: str) -> str:
    """Return torchtune's name of one of our modules; it has none for whole qkv and gate_up."""
    layer, inner = layer_of(module)
    return f"{layer}{TORCHTUNE.get(inner, inner)}"


TORCHTUNE = {**INNER, **{fused: parts[0] for fused, parts in PARTS.items() if len(parts) == 1}}


def layer_of(module: str) -> tuple[str, str]:
    """Split ``layers.3.attn.o_proj`` into ``layers.3.`` and the rest."""
    words = module.split(".", 2)
    return (f"layers.{words[1]}.", words[2]) if words[0] == "layers" else ("", module)


def unwrapped(name: str) -> str:
    """Return a name without what other programs put before it."""
    while prefix := next((p for p in WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name
