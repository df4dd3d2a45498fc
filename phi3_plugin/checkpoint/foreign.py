"""Read an adapter from whatever program wrote it: PEFT, torchtune, loralib, mlx-lm, or this one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from phi3_plugin.checkpoint.adapter import (
    Adapter,
    FileContent,
    Note,
    Origin,
    original,
    pattern_content,
    split_ending,
    uniform_content,
)
from phi3_plugin.checkpoint.base import (
    MAGNITUDE,
    OUTPUT,
    PEFT_ENDINGS,
    PEFT_PREFIX,
    PEFT_ROWS,
    TOK_EMBEDDINGS,
    A,
    B,
    fused_name,
    hf_name,
    module_sizes,
    open_weights,
    torchtune_name,
)
from phi3_plugin.checkpoint.equivalents import STARTS, adalora_tensors, first_factors, over_base
from phi3_plugin.checkpoint.files import quoted, read_tensors
from phi3_plugin.checkpoint.loralib import EnableLora, loralib_content, ungrouped
from phi3_plugin.checkpoint.mlx import MLX_WEIGHTS, is_mlx, of_mlx
from phi3_plugin.checkpoint.peft import (
    CONFIG,
    NOTE,
    WEIGHTS,
    folders_within,
    new_tokens_of,
    parsed_object,
    token_indices,
)
from phi3_plugin.checkpoint.peft_config import (
    MERGED_BY_PEFT,
    PEFT_MERGES,
    PeftConfig,
    is_adalora,
    is_alpha,
    problem_list,
    read_peft_config,
    refuse_unsupported,
)
from phi3_plugin.checkpoint.torchtune import split_content
from phi3_plugin.config import Phi3Config, read_json_object
from phi3_plugin.errors import AdapterError, CheckpointError, MissingFileError

FILES = (WEIGHTS, "adapter_model.pt", "adapter_model.bin", MLX_WEIGHTS)
"""What is looked for in a folder, the first that is there."""

Writer = Callable[[Adapter], FileContent]
"""Gives what a file of the same kind would hold for an adapter."""

# Shapes: R rank


def read_adapter(
    path: Path,
    *,
    config: Phi3Config,
    base: Path | None = None,
    alpha: float | None = None,
    enable_lora: EnableLora | None = None,
    rank: int | None = None,
) -> Adapter:
    """Return the adapter of a folder or file, as it computes.

    Parts of fused layers stay parts, and ranks and scales of modules may differ. A file that this
    package wrote gives what was saved, bit for bit, unless it was changed since.

    Args:
        path: A folder of PEFT, torchtune or mlx-lm; or a .safetensors, .pt or .bin file of theirs,
            or of loralib's ``lora_state_dict``.
        config: Of the base model.
        base: Its folder. With it, what the file repeats of the base's weights is compared.
        alpha: What the file does not say: loralib's never do, nor do torchtune's of Phi-3. The
            scale is alpha / rank.
        enable_lora: For loralib's MergedLinear: which of its equal groups of rows have an adapter;
            of qkv_proj, or by the last word of a module's name.
        rank: Makes sure that every module has it.

    Raises:
        AdapterError: The file is broken, is not for this base, needs what we do not compute, or
            its scale is not known.
        MissingFileError: There is no adapter.
    """
    file = Path(path)
    if file.is_dir():
        files = [file / name for name in FILES if (file / name).is_file()]
        if not files:
            if (file / CONFIG).is_file():
                refuse_unsupported(file / CONFIG)  # some have files of other names
            names = ", ".join(FILES)
            problem = f"{path} has none of {names}: it is not an adapter folder."
            raise MissingFileError(f"{problem}{folders_within(file)}")
        file = files[0]
    tensors, metadata = read_tensors(file)
    beside = file.with_name(CONFIG)
    content = None if is_mlx(beside) else _checked_content(tensors, file, config, base)
    program = content.program if content else "mlx-lm"
    if program != "loralib" and enable_lora is not None:
        raise AdapterError(f"enable_lora: is for files of loralib, but {file} is {program}'s.")
    if content is None:
        found, note, write = of_mlx(tensors, metadata, beside, alpha, config)
        _check_tensors(found.tensors, {}, config, file)
    elif program == "loralib":
        found, note, write = _of_loralib(content, file, metadata, alpha, enable_lora, config)
    else:
        found, note, write = _of_peft(content, file, metadata, alpha, config, base)
    adapter = _as_written(found, note, config, write)
    _check_width(adapter, config, file)
    if base is not None:
        adapter = replace(adapter, new_tokens=new_tokens_of(path, base))
    if wrong := [m for m, r in adapter.ranks.items() if rank not in (None, r)]:
        raise AdapterError(f"rank: {rank}, but {wrong[0]} of {file} has {adapter.ranks[wrong[0]]}.")
    return adapter


def _checked_content(
    tensors: Mapping[str, Tensor], file: Path, config: Phi3Config, base: Path | None
) -> "Content":
    if (beside := file.with_name(CONFIG)).is_file():
        refuse_unsupported(beside)  # before names that only such a feature has
        if is_adalora(keys := read_json_object(beside, AdapterError)):
            tensors = adalora_tensors(tensors, keys, file)
    _refuse_other_kinds(tensors, file)
    _refuse_merged(tensors, file)
    return _content(tensors, config, file)


def _refuse_merged(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse what a loralib model's ``state_dict`` gives instead of ``lora_state_dict``.

    Whether its weights are merged cannot be told without the base, so any base weight counts.
    """
    base = [n for n in tensors if n.endswith((".weight", ".bias"))]
    if base and any(name.endswith(".lora_A") for name in tensors):
        raise AdapterError(
            f"{file} holds {len(base)} weights of the base, first {base[0][:120]!r}. loralib's "
            "eval() adds the adapter to them in place, and the file does not say whether it did: "
            "the adapter might count twice. Save loralib.lora_state_dict(model, bias='none')."
        )


def _of_peft(
    content: "Content",
    file: Path,
    metadata: Mapping[str, str],
    alpha: float | None,
    config: Phi3Config,
    base: Path | None,
) -> tuple[Adapter, object, Writer]:
    """Return what a file of PEFT's or torchtune's holds, its note, and how it is written."""
    write = partial(split_content, config=config)
    _check_tensors(content.tensors, content.saved, config, file)
    adapter = Adapter(content.tensors, {}, content.saved)
    beside = file.with_name(CONFIG)
    if content.rows and not beside.is_file():
        raise AdapterError(f"{file} has rows of tokens, and only {CONFIG} beside it says of which.")
    if not beside.is_file():
        scales = _scales(adapter.ranks, _known_alpha(alpha, file), {})
        _check_copies(content.copies, config, base, file)
        return replace(adapter, scales=scales), None, write
    peft = read_peft_config(beside, {hf_name(m): rank for m, rank in adapter.ranks.items()})
    if alpha is not None and alpha != peft.keys["lora_alpha"]:
        said = peft.keys["lora_alpha"]
        raise AdapterError(f"alpha: {alpha}, but {beside} says {said}. Leave it out.")
    _check_config(adapter, peft, content.program)
    adapter = replace(
        adapter,
        rows=_token_rows(content, peft, config),
        scales={module: peft.scale(hf_name(module)) for module in adapter.ranks},
        dropout=float(peft.keys.get("lora_dropout") or 0.0),
        base=peft.keys.get("base_model_name_or_path") or "",
        origin=Origin(rslora=True) if peft.keys.get("use_rslora") else Origin(),
    )
    if content.program == "torchtune":
        return adapter, peft.keys.get(NOTE), write
    if (start := peft.keys.get("init_lora_weights")) in STARTS:
        if base is None:
            raise AdapterError(f"{beside}: init_lora_weights: {start!r} needs the base's weights.")
        first = first_factors(adapter, start, base, config)
        taken = {}
        if OUTPUT + A in first:
            product = first[OUTPUT + B] @ first[OUTPUT + A]
            taken[f"{OUTPUT}.weight"] = adapter.scales[OUTPUT] * product
        _check_copies(content.copies, config, base, file, taken)
        return over_base(adapter, first), None, write
    _check_copies(content.copies, config, base, file)

    def row_norms(module: str) -> Tensor:
        """Rows of parts without an adapter have the base's norms, which only the file knows."""
        return adapter.tensors[module + MAGNITUDE].clone()

    note = parsed_object(metadata.get(NOTE, "{}"))
    make = pattern_content if note.get("patterns") else uniform_content
    return adapter, note, partial(make, config=config, row_norms=row_norms)


def _token_rows(
    content: "Content", peft: PeftConfig, config: Phi3Config
) -> dict[str, dict[int, Tensor]]:
    """Return the rows of single tokens by module and id.

    Args:
        content: Has them, in the order of the configuration's ids.
        peft: Says whose they are.
        config: Of the base model.

    Raises:
        AdapterError: They are not those of the configuration, or the base has not all rows.
    """
    by_name, known = token_indices(peft.keys), aliases(config)
    rows, saved, tensors = content.rows, content.saved, content.tensors
    ids = {known[name]: of_tokens for name, of_tokens in by_name.items() if name in known}
    if config.tie_word_embeddings and ids.get(OUTPUT) == ids.get(TOK_EMBEDDINGS):
        ids.pop(OUTPUT, None)  # the embedding's are its own
    problems = [
        f"{m}: its rows are missing, which trainable_token_indices names"
        for m in ids.keys() - rows.keys()
        if ids[m]
    ]
    for module, values in rows.items():
        size = [len(ids.get(module, ())), config.hidden_size]
        if [*values.shape] != size:
            problems.append(f"{module}: its rows are {[*values.shape]}, expected {size}")
        elif not torch.isfinite(values).all():
            problems.append(f"{module}: its rows hold NaN or infinite numbers")
        elif module + WHOLE in saved or module + A in tensors:
            problems.append(f"{module}: adapted or trained whole, and some rows of it again")
    _refuse(problems, peft.file)
    return {module: dict(zip(ids[module], rows[module], strict=True)) for module in rows}


def _check_width(adapter: Adapter, config: Phi3Config, file: Path) -> None:
    """Check that embedding and head have all rows of a vocabulary that is larger than the base's.

    Raises:
        AdapterError: They have not: the base was resized, and its new rows are in no file.
    """
    if (wide := adapter.vocabulary) <= config.vocab_size:
        return
    for module in [TOK_EMBEDDINGS] if config.tie_word_embeddings else [TOK_EMBEDDINGS, OUTPUT]:
        whole, own = adapter.saved.get(module + WHOLE), adapter.rows.get(module, {})
        lacking = wide - max(config.vocab_size, 0 if whole is None else len(whole))
        # Counted first: a stranger's id may be any number
        if lacking > len(own) or {*range(wide - lacking, wide)} - own.keys():
            raise AdapterError(
                f"{file} is for a base of {wide} rows, but this one has {config.vocab_size}, and "
                f"the file has not all others of {hf_name(module)}. Give the base that was resized."
            )


def _check_config(adapter: Adapter, peft: PeftConfig, program: str) -> None:
    for module, rank in adapter.ranks.items():
        if (said := peft.rank(hf_name(module))) != rank:
            raise AdapterError(
                f"{peft.file}: {hf_name(module)} is said to have rank {quoted(said)}, but its "
                f"tensors have {rank}. Correct r or rank_pattern."
            )
    dora = bool(peft.keys.get("use_dora"))
    has = {module + MAGNITUDE in adapter.tensors for module in adapter.ranks}
    if len(has) > 1 or (program == "peft" and has != {dora}):
        some = "some" if len(has) > 1 else "all" if True in has else "no"
        raise AdapterError(
            f"{peft.file}: use_dora is {dora}, but {some} modules have magnitudes. PEFT would "
            "compute something else than was trained: save it again."
        )


def _of_loralib(
    content: "Content",
    file: Path,
    metadata: Mapping[str, str],
    alpha: float | None,
    enable_lora: EnableLora | None,
    config: Phi3Config,
) -> tuple[Adapter, object, Writer]:
    """Return what a file of loralib's holds, its note, and how it is written."""
    beside = file.with_suffix(".json")
    about = parsed_object(metadata.get(NOTE, "{}"))
    if not about and file.suffix == ".pt" and beside.is_file():
        about = read_json_object(beside, AdapterError)
    said = _known_alpha(about.get("alpha") if alpha is None else alpha, file)
    enabled = about.get("enable_lora") if enable_lora is None else enable_lora
    tensors, divisors = ungrouped(content.tensors, enabled, config)
    _check_tensors(tensors, content.saved, config, file)
    adapter = Adapter(tensors, _scales(divisors, said, aliases(config)))
    as_said = alpha is None and enable_lora is None

    def write(original: Adapter) -> FileContent:
        merged_linear = bool(about.get("merged_linear"))
        written, enabled = loralib_content(original, config, merged_linear=merged_linear)
        again, ranks = ungrouped(written.tensors, enabled, config)
        alphas = {module: written.alphas[fused_name(module)] for module in ranks}
        return FileContent(again, ranks, alphas, written.note)

    return adapter, about.get(NOTE) if as_said else None, write


def _known_alpha(alpha: Any, file: Path) -> Any:
    if alpha is None:
        raise AdapterError(
            f"{file} does not say its alpha, and there is no {CONFIG} beside it. Give the alpha it "
            "was trained with; loralib's own default is 1."
        )
    return alpha


def _scales(ranks: Mapping[str, int], alpha: Any, known: Mapping[str, str]) -> dict[str, float]:
    """Return alpha / rank of every module; alpha may be given for each, by any of its names."""
    alphas: dict[str, Any] = dict.fromkeys(ranks, alpha)
    if isinstance(alpha, dict) and alpha:
        each = {known.get(name, name): value for name, value in alpha.items()}
        alphas = {m: each.get(m, each.get(m.rpartition(".")[0])) for m in ranks}
    for module, value in alphas.items():
        if not is_alpha(value):
            raise AdapterError(f"alpha: {quoted(value)} for {module} must be a number above 0.")
    return {module: alphas[module] / rank for module, rank in ranks.items()}


# Which tensor is whose

Program = Literal["peft", "torchtune", "loralib"]

ENDINGS: dict[str, tuple[Program, str]] = {
    **{theirs: ("peft", ours) for theirs, ours in PEFT_ENDINGS.items()},
    **{ending: ("torchtune", ending) for ending in (A, B, MAGNITUDE)},
    ".lora_A": ("loralib", A),
    ".lora_B": ("loralib", B),
}
"""How names end, in which program's files, and with us."""

OTHER_KINDS = {
    **{".ia3_l": "IA3", ".hada_": "LOHA", ".lokr_": "LOKR", ".vera_": "VERA", ".oft_": "OFT"},
    **{".boft_": "BOFT", ".hra_": "HRA", ".fourierft_": "FOURIERFT", ".randlora_": "RANDLORA"},
    **{".vblora_": "VBLORA", ".miss_": "MISS", ".road_": "ROAD", ".delora_": "DELORA"},
    **{".lora_E": "ADALORA without adapter_config.json", ".lora_B.bias": "LORA with lora_bias"},
    **{".poly_lora_": "POLY", "prompt_embeddings": "prompt or prefix tuning"},
}
"""What only names of adapters have that are not computed, and of which kind that is."""

WHOLE, COPY = ".weight", ".base_layer.weight"
"""Of a module that is trained whole; and of the copy of the base that PEFT puts beside adapters on
embedding and head."""

REPLACED = ".original_module.weight"
"""Of the base's weight beside one that is trained whole, which computes in its place. PEFT writes
it, and the trained one twice, where the vocabulary was resized."""

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and activation checkpointing put into names, before each module
that they wrap."""


@dataclass(frozen=True)
class Content:
    """Tensors of a file under our names."""

    program: Program
    tensors: dict[str, Tensor]
    saved: dict[str, Tensor]
    copies: dict[str, Tensor]
    """Of the base's weights, beside adapters on them."""
    rows: dict[str, Tensor]
    """Of single tokens, by module, ``[N, D]``."""


def _content(tensors: Mapping[str, Tensor], config: Phi3Config, file: Path) -> Content:
    """Give every tensor its name.

    Raises:
        AdapterError: Names are not those of an adapter of this base, or one stands for another.
    """
    known, programs, problems = aliases(config), set[Program](), list[str]()
    low, saved, copies = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    rows = dict[str, Tensor]()
    endings = sorted((*ENDINGS, COPY, WHOLE, PEFT_ROWS), key=len, reverse=True)
    for name, value in tensors.items():
        plain = _unwrapped(name)
        if (
            plain.endswith(REPLACED) and plain.removesuffix(REPLACED) in known
        ):  # what modules_to_save stands for
            continue
        ending = next((ending for ending in endings if plain.endswith(ending)), "")
        module = known.get(plain.removesuffix(ending), "") if ending else ""
        group = {COPY: copies, WHOLE: saved, PEFT_ROWS: rows}.get(ending, low)
        is_of_ends = ending in (COPY, PEFT_ROWS)
        if not module or (is_of_ends and module not in (TOK_EMBEDDINGS, OUTPUT)):
            problems.append(f"{name[:120]!r} is no part of an adapter of this base")
            continue
        own = "" if ending == PEFT_ROWS else WHOLE
        if ending in ENDINGS:
            program, own = ENDINGS[ending]
            programs.add(program)
        again = group.get(module + own)
        if again is not None and not (group is saved and torch.equal(again, value)):
            problems.append(f"{name!r}: {module + own} is there twice")
        group[module + own] = value
    _refuse(problems, file)
    if len(programs) != 1:
        names = f"names of {' and '.join(sorted(programs))}" if programs else "no low-rank adapter"
        raise AdapterError(f"{file} has {names}, expected those of one program.")
    return Content(programs.pop(), low, saved, copies, rows)


def _refuse_other_kinds(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse tensors that only an adapter of another kind has.

    Raises:
        AdapterError: It is one, and its kind is named.
    """
    for name in tensors:
        for mark, kind in OTHER_KINDS.items():
            if mark in name:
                raise AdapterError(
                    f"{file} is an adapter of {kind}, as {quoted(name)} says, which is not "
                    f"computed here. {PEFT_MERGES if kind in MERGED_BY_PEFT else ''}".rstrip()
                )


def aliases(config: Phi3Config) -> dict[str, str]:
    """Return every name under which a module may come, and ours.

    These are Hugging Face's, with and without ``model.``, with the parts as Llama names them;
    torchtune's; and ours.
    """
    names = {}
    for module in module_sizes(config):
        for name in (module, hf_name(module), torchtune_name(module)):
            names[name] = names[name.removeprefix("model.")] = module
    return names


def _unwrapped(name: str) -> str:
    """Return a name without wrappers and without PEFT's name of the adapter."""
    name = ".".join(word for word in name.split(".") if word not in WRAPPERS)
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    for written in (".modules_to_save.default", ".modules_to_save", ".default"):
        if name.endswith((written, f"{written}.weight")):
            head, _, tail = name.rpartition(written)
            return head + tail
    return name


def _refuse(problems: list[str], file: Path) -> None:
    if problems:
        raise AdapterError(
            f"{file} is not an adapter of this base:\n{problem_list(problems, 8)}\n"
            "Give the base that it was trained on, or a file that is whole."
        )


def _check_tensors(
    tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], config: Phi3Config, file: Path
) -> None:
    """Check that tensors make an adapter of the base.

    Args:
        tensors: Our names; ``lora_a [R, in]``, ``lora_b [out, R]``, ``magnitude [out]``.
        saved: Weights trained whole.
        config: Of the base model.
        file: For errors.

    Raises:
        AdapterError: Halves of pairs are missing, shapes are wrong, modules are adapted twice, or
            there are numbers that are none; the first few are listed.
    """
    sizes, problems = module_sizes(config), list[str]()
    modules = dict.fromkeys(split_ending(name)[0] for name in tensors)
    for module in modules:
        problems += _misfits(module, tensors, sizes[module])
    whole = {name.removesuffix(WHOLE): value for name, value in saved.items()}
    for module, value in whole.items():
        if module not in (TOK_EMBEDDINGS, OUTPUT):
            ends = f"{TOK_EMBEDDINGS} and {OUTPUT}"
            problems.append(f"{module}: base weights; only {ends} are read whole")
        elif value.shape != (size := (max(config.vocab_size, len(value)), config.hidden_size)):
            problems.append(f"{module}: its weight is {list(value.shape)}, expected {list(size)}")
    for module in modules:
        if module in whole or (fused_name(module) != module and fused_name(module) in modules):
            problems.append(f"{module}: adapted twice, also in {fused_name(module)}")
    if not problems:
        for name, value in {**tensors, **saved}.items():
            if not torch.isfinite(value).all():
                problems.append(f"{name}: holds NaN or infinite numbers")
    _refuse(problems, file)


def _misfits(module: str, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> Iterator[str]:
    a, b, magnitude = (tensors.get(module + ending) for ending in (A, B, MAGNITUDE))
    if a is None or b is None:
        yield f"{module}: has no {'B' if b is None else 'A'}"
        return
    out, into = size
    rank = a.shape[0] if a.ndim == 2 else 0
    if not rank or a.shape != (rank, into) or b.shape != (out, rank):
        shapes = f"A is {list(a.shape)} and B {list(b.shape)}"
        yield f"{module}: {shapes}, expected [R, {into}] and [{out}, R]"
    if magnitude is not None and magnitude.shape != (out,):
        yield f"{module}: its magnitude is {list(magnitude.shape)}, expected [{out}]"
    if magnitude is not None and module == TOK_EMBEDDINGS:
        yield f"{module}: DoRA on an embedding is not computed here"


def _check_copies(
    copies: Mapping[str, Tensor],
    config: Phi3Config,
    base: Path | None,
    file: Path,
    taken: Mapping[str, Tensor] | None = None,
) -> None:
    """Check that what a file repeats of the base is the base's.

    PEFT loads it in the base's place, as after new tokens were trained into an embedding, and
    then the adapter is for that. Rounded to another dtype it still counts as the same.

    Args:
        copies: Our names.
        config: Of the base model.
        base: Its folder; without one, only shapes are compared.
        file: For errors.
        taken: What a start took off the base's, of which the copies have the rest.

    Raises:
        AdapterError: It is not.
    """
    size = (config.vocab_size, config.hidden_size)
    wrong = [name for name, value in copies.items() if value.shape != size]
    if copies and base is not None and not wrong:
        weights, least = open_weights(base), 1e-5 if taken else 1e-6
        for name, value in copies.items():
            stored = weights.get(name, weights[f"{TOK_EMBEDDINGS}.weight"])  # a tied head has none
            own = (taken or {}).get(name, torch.zeros(size[0], 1))
            steps = (slice(start, start + 4096) for start in range(0, size[0], 4096))
            pairs = ((value[rows].float(), stored[rows].float() - own[rows]) for rows in steps)
            if not all(torch.allclose(*pair, rtol=1e-2, atol=least) for pair in pairs):
                wrong.append(name)
    if wrong:
        raise AdapterError(
            f"{file} holds a copy of {', '.join(wrong)} that differs from the base's, and its "
            "adapter is for that one. Give the base that it was trained on; or merge it with "
            "PEFT, which loads the copy."
        )


# Whether a file is still what its note says, so that its original can be given back


def _as_written(found: Adapter, note: object, config: Phi3Config, write: Writer) -> Adapter:
    """Return the adapter that a file was made of, or what it holds if it was changed since.

    A note is believed only if writing the adapter that it describes would give the very tensors
    and scales that were found.

    Args:
        found: What the file holds, checked.
        note: What it says of its original, if anything.
        config: Sizes of the model.
        write: Of a file of its kind.
    """
    if not isinstance(note, dict):
        return found
    made_for = note.get("base_hash")  # holds for a file whose numbers were changed, too
    found = replace(found, base_hash=made_for if isinstance(made_for, str) else "")
    if (ours := _checked(note, config)) is None:
        return found
    try:
        tensors, scales = original(found.tensors, ours, config)
        origin = cast(Origin, {k: v for k, v in ours.items() if k in Origin.__annotations__})
        adapter = replace(found, tensors=tensors, scales=scales, origin=origin)
        again = write(adapter)
    except (AdapterError, CheckpointError, ArithmeticError, KeyError, RuntimeError):
        return found
    same = again.scales == found.scales and again.tensors.keys() == found.tensors.keys()
    for name, value in again.tensors.items() if same else ():
        stored = found.tensors[name]
        same = same and value.dtype == stored.dtype and torch.equal(value, stored)
    return adapter if same else found


def _checked(note: Mapping[str, Any], config: Phi3Config) -> Note | None:
    """Return a note with our names of modules, or None if it is none."""
    modules, rounded, known = note.get("modules"), note.get("rounded", {}), aliases(config)
    if not isinstance(modules, dict) or not isinstance(rounded, dict):
        return None
    for value in modules.values():
        if not isinstance(value, list) or len(value) not in (2, 3) or not all(map(is_alpha, value)):
            return None
    if not all(isinstance(text, str) for text in rounded.values()):
        return None
    if not (rounded.keys() | modules.keys()) <= known.keys():
        return None
    ours = {known[name]: value for name, value in modules.items()}
    texts = {known[name]: text for name, text in rounded.items()}
    return cast(Note, {**note, "modules": ours, "rounded": texts})
