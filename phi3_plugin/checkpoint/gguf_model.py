"""A whole model as llama.cpp and ollama read it: one GGUF file, as convert_hf_to_gguf.py makes it.

Needs llama.cpp's own ``gguf`` package, which comes with ``phi3-plugin[gguf]``. Its tables name the
keys and tensors, its `Metadata` and `SpecialVocab` read the model card, the special tokens and the
chat template. Layers stay fused, norms and LongRoPE's factors are fp32, all else is of the type
that is asked for.

Beside the file lies a Modelfile for ollama, see modelfile.py.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from torch import Tensor

from phi3_plugin import hub
from phi3_plugin.checkpoint.base import OUTPUT, TOK_EMBEDDINGS, to_hf
from phi3_plugin.checkpoint.files import whole_files
from phi3_plugin.checkpoint.gguf import gguf_package
from phi3_plugin.checkpoint.modelfile import MODELFILE, modelfile
from phi3_plugin.config import GENERATION, ORIGINAL, Phi3Config, read_config, read_json
from phi3_plugin.data.vocabulary import Vocabulary, read_vocabulary
from phi3_plugin.errors import CheckpointError, OutputError, TokenizerError
from phi3_plugin.options import Quantization

FILE_TYPES = {
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
"""What the file says it is, in the package's words."""


def write_model(
    file: Path,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    weight: Callable[[str], Tensor],
    quantization: Quantization,
) -> list[str]:
    """Write a model for llama.cpp, and a Modelfile for ollama beside it.

    Args:
        file: The file to create; the Modelfile has its name with another ending.
        folder: Has the model's config.json, tokenizer and, where there are, generation_config.json
            and README.md. Its name is the model's where the card gives it none.
        shapes: Our name and the shape of each weight.
        weight: Gives one; the next is asked for, by another thread, while the last is written.
        quantization: Type of all weights that are matrices. In ``q4_0`` the head has ``q8_0``.

    Returns:
        What llama.cpp will do otherwise than transformers, in words.

    Raises:
        CheckpointError: The type cannot hold a weight, or a file of the folder cannot be read.
        MissingFileError: The package is not installed, or the tokenizer is not there.
        OutputError: A file exists or cannot be written, or the disk has not enough room.
        TokenizerError: llama.cpp does not know a tokenizer of this kind.
    """
    gguf, config = gguf_package(), read_config(folder)
    vocabulary = read_vocabulary(folder)
    writer = gguf.GGUFWriter(None, "phi3")
    kinds = {name: _kind(gguf, name, shape, quantization, config) for name, shape in shapes.items()}
    factors = _rope_factors(gguf, config)
    for name, values in factors.items():
        _announce(gguf, writer, name, values.shape, gguf.GGMLQuantizationType.F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    for name, shape in shapes.items():
        theirs = names.get_name(to_hf(name).removesuffix(".weight"))
        _announce(gguf, writer, f"{theirs}.weight", shape, kinds[name])
    _check_room(file, sum(info.nbytes for info in writer.tensors[0].values()))
    # The order of all keys is the converter's, too: files can be compared as they are
    if config.rope.scaling:
        writer.add_rope_scaling_attn_factors(config.rope.scaling.attention_factor)
    _add_model(gguf, writer, folder, vocabulary)
    _add_sizes(gguf, writer, folder, config, FILE_TYPES[quantization])
    _add_vocabulary(gguf, writer, folder, config, vocabulary)
    for_ollama = modelfile(file, config, vocabulary)
    with whole_files(file.with_suffix(MODELFILE), file) as (beside, unfinished):
        beside.write_text(for_ollama, encoding="utf-8")
        try:
            writer.write_header_to_file(path=unfinished)
            with _naming_the_card(folder):
                writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in factors.values():
                writer.write_tensor_data(values)
            for name, value in _read_ahead([*kinds], weight):
                writer.write_tensor_data(_encoded(gguf, to_hf(name), value, kinds[name]))
        finally:
            writer.close()
    return [*_differences(vocabulary, config)]


def _read_ahead(
    names: Sequence[str], weight: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights; the next one is made while the last one is written."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(weight, names[0])
        for name, following in pairwise([*names, names[-1]]):
            value = coming.result()
            if following != name:
                coming = ahead.submit(weight, following)
            yield name, value


def _check_room(file: Path, size: int) -> None:
    existing = next(path for path in file.parents if path.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise OutputError(
            f"{file.parent} has {free / 1e9:.1f} GB left, but {file.name} takes {size / 1e9:.1f} "
            "GB. Make room, or choose a folder on another disk."
        )


# Tensors


def _kind(
    gguf: Any, name: str, shape: tuple[int, ...], quantization: str, config: Phi3Config
) -> Any:
    """Return the type of a weight in the file."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    head = TOK_EMBEDDINGS if config.tie_word_embeddings else OUTPUT
    if quantization == "q4_0" and name == f"{head}.weight":
        quantization = "q8_0"  # as others keep it finer; their Q6_K the package does not write
    kind = gguf.GGMLQuantizationType[quantization.upper()]
    per_block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % per_block else kind


def _announce(gguf: Any, writer: Any, name: str, shape: Sequence[int], kind: Any) -> None:
    """Say which tensor comes next; the file lists all of them before the first."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    size = prod(shape) // per_block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _rope_factors(gguf: Any, config: Phi3Config) -> dict[str, NDArray[np.float32]]:
    if config.rope.scaling is None:
        return {}
    tensors, scaling = gguf.MODEL_TENSOR, config.rope.scaling
    return {
        f"{gguf.TENSOR_NAMES[tensor]}.weight": np.array(factors, np.float32)
        for tensor, factors in (
            (tensors.ROPE_FACTORS_LONG, scaling.long_factor),
            (tensors.ROPE_FACTORS_SHORT, scaling.short_factor),
        )
    }


ROWS = 1024
"""Of a weight that are brought into the file's type at a time."""

VALUES_AT_ONCE = 200_000
"""That a thread quantizes at a time: they stay in the cache of a core."""


class _Plain(NamedTuple):
    dtype: torch.dtype
    bits: type[np.unsignedinteger[Any]]
    infinite: int
    """The bits that are all set in what is infinite or no number."""


UNPACKED = {
    "F32": _Plain(torch.float32, np.uint32, 0x7F800000),
    "F16": _Plain(torch.float16, np.uint16, 0x7C00),
    "BF16": _Plain(torch.bfloat16, np.uint16, 0x7F80),
}
"""Types of one number a weight."""


def _encoded(gguf: Any, name: str, value: Tensor, kind: Any) -> NDArray[np.uint8]:
    """Return a weight as the bytes of the file.

    Raises:
        CheckpointError: It has a number that the type cannot hold.
    """
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = value.reshape(-1, value.shape[-1])
    out = np.empty((len(rows), rows.shape[1] // per_block * block_bytes), np.uint8)
    plain = UNPACKED.get(kind.name)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for top in range(0, len(rows), ROWS):
            some, part = rows[top : top + ROWS], out[top : top + ROWS]
            if plain:
                part[:] = some.to(plain.dtype).view(torch.uint8).numpy()
                bits, infinite = part.view(plain.bits), plain.infinite
            else:
                _quantize(gguf, some.float().numpy(), part, kind, pool)
                scales = part.reshape(-1, block_bytes)[:, :2]  # of each block, in fp16
                bits, infinite = scales.copy().view(np.uint16), UNPACKED["F16"].infinite
            if (bits & infinite).max() == infinite:
                largest = value.float().abs().max().item()
                raise CheckpointError(
                    f"{name} has numbers up to {largest:g}, which {kind.name.lower()} cannot hold. "
                    + ("Choose --type bf16." if np.isfinite(largest) else "The model is broken.")
                )
    return out.reshape(*value.shape[:-1], -1)


def _quantize(
    gguf: Any,
    rows: NDArray[np.float32],
    out: NDArray[np.uint8],
    kind: Any,
    pool: ThreadPoolExecutor,
) -> None:
    """Quantize rows, some of them to a thread."""
    blocks = q8_0 if kind.name == "Q8_0" else partial(gguf.quants.quantize, qtype=kind)
    step = max(1, VALUES_AT_ONCE // rows.shape[1])

    def quantize(start: int) -> None:
        some = slice(start, start + step)
        out[some] = blocks(rows[some])

    list(pool.map(quantize, range(0, len(rows), step)))


def q8_0(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return rows in blocks of 32: a scale in fp16, then 32 numbers of 8 bits.

    The bytes are those of ``gguf.quants.quantize``, in a third of its time.

    Args:
        rows: ``[rows, columns]``, columns a multiple of 32.
    """
    blocks = rows.reshape(-1, 32)
    sizes = np.abs(blocks).T.copy()  # numpy is quick along the rows of a matrix that are long
    scale = np.maximum.reduce(sizes, axis=0) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), 1 / scale)
        # Halves round away from zero: t = trunc(2 x) becomes (t + 1) >> 1, of a negative t >> 1
        twice = (blocks * (inverse + inverse)[:, None]).astype(np.int16)
        numbers = (twice + (twice >> 15) + np.int16(1)) >> 1
        out = np.empty((len(blocks), 34), np.uint8)
        out[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
        out[:, 2:] = numbers.astype(np.int8).view(np.uint8)
    return out.reshape(rows.shape[0], -1)


# Keys


def _add_model(gguf: Any, writer: Any, folder: Path, vocabulary: Vocabulary) -> None:
    """Say what the model is called, and what its card says of it."""
    parameters, *counts = writer.get_total_parameter_count()
    read_json(folder / GENERATION)  # refused here if it is broken
    with _naming_the_card(folder):
        metadata = gguf.Metadata.load(None, folder, None, parameters)
        repository = hub.name_of(folder)  # in the Hub's cache the folder's name is a hash
        name = repository.rpartition("/")[2] if repository else metadata.name or folder.name
        metadata.name = name_for_llama_cpp(name, vocabulary.backend)
        metadata.size_label = metadata.size_label or gguf.size_label(parameters, *counts)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)


@contextmanager
def _naming_the_card(folder: Path) -> Iterator[None]:
    """Name the files of a stranger that the package reads, in errors of many kinds.

    Raises:
        CheckpointError: It raised something.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: README.md or {GENERATION} cannot be read as a model's: "
            f"{' '.join(str(error).split())[:200]}. Correct what stands between the lines of --- "
            "of the one, or the numbers of the other."
        ) from error


def name_for_llama_cpp(name: str, backend: Tokenizer) -> str:
    """Return a name of a model by which llama.cpp takes white space as the tokenizer does.

    A GGUF file cannot say that a special token swallows the white space after it, as
    ``<|user|>`` does with its newline. llama.cpp takes it from the name: it is so in a model
    whose name has Phi-3 or Phi3 in it, and in no other.

    Source: llama.cpp v0.5.0, llama-vocab.cpp, "Handle per token attributes".
    """
    strips = _like_phi3(backend)
    named = re.search("phi-?3", name, re.IGNORECASE)
    if strips and not named:
        replaced = re.sub("phi 3", "Phi-3", name, count=1, flags=re.IGNORECASE)
        return replaced if replaced != name else f"{name} (Phi-3)"
    return name if strips else re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)


KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
"""Which special tokens llama.cpp lets keep what follows, in a model of that name; it must have
these and ``</s>``."""


def _like_phi3(backend: Tokenizer) -> bool:
    has_all = all(backend.token_to_id(text) is not None for text in (*KEEP_SPACE, "</s>"))
    added = backend.get_added_tokens_decoder().values()
    return has_all and any(token.rstrip and token.content != "</s>" for token in added)


def _differences(vocabulary: Vocabulary, config: Phi3Config) -> Iterator[str]:
    """Yield what llama.cpp does otherwise than transformers."""
    like_phi3 = _like_phi3(vocabulary.backend)
    added = sorted(vocabulary.backend.get_added_tokens_decoder().items())
    wrong = [
        token.content
        for _, token in added
        if token.content != "</s>"  # which is in no chat
        and (token.lstrip or token.rstrip != (like_phi3 and token.content not in KEEP_SPACE))
    ]
    if wrong:
        does = "drops" if like_phi3 else "keeps"
        yield f"llama.cpp {does} white space beside {', '.join(wrong)}, other than this tokenizer."
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        yield (
            "llama.cpp computes no sliding window: answers differ from transformers' after "
            f"{config.sliding_window} tokens."
        )


def _add_sizes(gguf: Any, writer: Any, folder: Path, config: Phi3Config, file_type: str) -> None:
    rope, keys = config.rope, read_json(folder / "config.json")
    writer.add_context_length(config.max_position_embeddings)
    original = keys.get("original_max_position_embeddings", ORIGINAL)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# The vocabulary


class _Token(NamedTuple):
    text: str
    score: float
    kind: Any


PRE_TOKENIZERS = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "dbrx",
}
"""How a text is cut before it is encoded, Phi-4-mini's and Phi-4's, and what llama.cpp calls it."""

CUTS = (
    "He'll I'VE WE'RE 'tis HelloWORLD naïve नमस्ते 中文 3 45 6789.01 a//b !!\n\n  \n x \t  y .\r\n/"
)
"""A text that they cut at different places."""


def _add_vocabulary(
    gguf: Any, writer: Any, folder: Path, config: Phi3Config, vocabulary: Vocabulary
) -> None:
    """Add all tokens, how texts are cut into them, the special ones and the chat template.

    Raises:
        TokenizerError: llama.cpp has none of this kind.
    """
    types, backend = gguf.TokenType, vocabulary.backend
    description = json.loads(backend.to_str())
    tokens = [_Token(f"[PAD{i}]", -10000.0, types.UNUSED) for i in range(config.vocab_size)]
    sentencepiece = bool(description["model"].get("byte_fallback"))
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        for i, token in _pieces(types, folder, backend, description["model"]):
            tokens[i] = token
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(vocabulary, description))
        for text, i in backend.get_vocab(with_added_tokens=False).items():
            tokens[i] = _Token(text, 0.0, types.NORMAL)
    for i, added in backend.get_added_tokens_decoder().items():
        looks_special = added.content.startswith("<|") and added.content.endswith("|>")
        special = added.special or (looks_special and not sentencepiece)
        kind = types.CONTROL if special else types.USER_DEFINED
        tokens[i] = _Token(added.content, -1000.0, kind)
    writer.add_token_list([token.text.encode() for token in tokens])
    if sentencepiece:
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    special_tokens = gguf.SpecialVocab(
        folder, load_merges=not sentencepiece, n_vocab=config.vocab_size
    )
    # A chat has what its template writes and no more; where nothing is said, llama.cpp adds one
    special_tokens.add_special_token |= {"bos": False, "eos": False}
    special_tokens.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(vocabulary: Vocabulary, description: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts a text."""
    own = vocabulary.backend.pre_tokenizer
    for pattern, name in PRE_TOKENIZERS.items():
        steps = [Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)]
        cuts = pre_tokenizers.Sequence(steps).pre_tokenize_str(CUTS)
        if own and own.pre_tokenize_str(CUTS) == cuts and not description.get("normalizer"):
            return name
    raise TokenizerError(
        f"{vocabulary.file}: llama.cpp knows no tokenizer that cuts texts like this one "
        f"({json.dumps(description.get('pre_tokenizer'))[:200]}), expected one of the family."
    )


def _pieces(
    types: Any, folder: Path, backend: Tokenizer, model: Mapping[str, Any]
) -> Iterator[tuple[int, _Token]]:
    """Yield the pieces of a SentencePiece vocabulary and their scores, best first merged.

    Raises:
        TokenizerError: tokenizer.model and tokenizer.json are not of one revision, or the latter
            alone does not say in which order to merge.
    """
    file, vocab = folder / "tokenizer.model", backend.get_vocab(with_added_tokens=False)
    if not file.is_file():
        yield from _pieces_of_merges(types, folder, vocab, model["merges"])
        return
    from sentencepiece import SentencePieceProcessor  # not earlier: it is needed for this alone

    try:
        pieces: Any = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}. Download it again.") from error
    special = (
        (pieces.IsUnknown, types.UNKNOWN),
        (pieces.IsControl, types.CONTROL),
        (pieces.IsUnused, types.UNUSED),
        (pieces.IsByte, types.BYTE),
    )
    for i in range(len(pieces)):
        text = pieces.IdToPiece(i)
        if vocab.get(text) != i:
            raise TokenizerError(
                f"{file}: token {i} is {text!r}, which is {vocab.get(text)} in tokenizer.json. Use "
                "the two files of one revision."
            )
        kind = next((kind for holds, kind in special if holds(i)), types.NORMAL)
        yield i, _Token(text, pieces.GetScore(i), kind)


BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _pieces_of_merges(
    types: Any, folder: Path, vocab: Mapping[str, int], merges: Sequence[Any]
) -> Iterator[tuple[int, _Token]]:
    """Yield the same from tokenizer.json alone: a piece that is merged earlier has a better score.

    SentencePiece scores pieces, tokenizer.json orders pairs: pairs that make one piece follow each
    other in a file that was made of a tokenizer.model.
    """
    made = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    pieces = [piece for before, piece in pairwise(["", *made]) if piece != before]
    if len(pieces) != len(set(pieces)):
        raise TokenizerError(
            f"{folder} has no tokenizer.model, and tokenizer.json merges in an order that "
            "llama.cpp cannot follow. Put the tokenizer.model of the base model beside it."
        )
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    last = -float(len(scores))
    for text, i in vocab.items():
        if BYTE_TOKEN.fullmatch(text):
            yield i, _Token(text, 0.0, types.BYTE)
        else:
            yield i, _Token(text, scores.get(text, last), types.NORMAL)
