"""The data of a run: the YAML's sections, built, split, ordered and ready to be collated.

It needs no model, so an inspection sees exactly what a training run would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from phi3_plugin.data.order import Collate, Order, hold_out
from phi3_plugin.data.packing import without_padding
from phi3_plugin.data.preferences import PreferenceDataset
from phi3_plugin.errors import ConfigError, DataError
from phi3_plugin.settings import Settings, component
from phi3_plugin.train.losses import SFT, Loss, Preference


@dataclass(frozen=True)
class RunData:
    """All batches of a run, in their order."""

    tokenizer: Any
    order: Order
    collate: Collate
    order_val: Order | None
    """None where nothing is held out."""
    collate_val: Collate
    total_steps: int
    """Optimizer steps of the whole run."""


def load_data(settings: Settings, processes: int) -> RunData:
    """Tokenize, split and order the samples.

    Args:
        settings: Of the run.
        processes: Number of processes that share a step.
    """
    s = settings
    tokenizer = instantiate(s.tokenizer)
    loss = loss_of(s)
    dataset = _compared(instantiate(s.dataset, tokenizer), loss)
    dataset, held_out = hold_out(dataset, validation_share(s, dataset), s.seed)
    if held_out is None:
        held_out = _compared(instantiate(s.dataset_val, tokenizer), loss)
    if held_out is None and s.early_stop_patience:
        raise ConfigError(
            f"early_stop_patience: {s.early_stop_patience} needs validation data, and of fewer "
            f"than {ENOUGH} samples none are held out by themselves. Set dataset_val, or "
            "val_fraction=0.05 to split it off the training set."
        )
    order_of = partial(Order, batch_size=s.batch_size, processes=processes, seed=s.seed)
    order = order_of(
        dataset,
        accumulation=s.gradient_accumulation_steps,
        shuffle=s.shuffle,
        group_by_length=s.group_by_length,
    )
    order_val = None if held_out is None else order_of(held_out, accumulation=1, shuffle=False)
    return RunData(
        tokenizer,
        order,
        _collate(s.dataset, s.collate_fn, tokenizer.pad_id),
        order_val,
        _collate(s.dataset_val or s.dataset, s.collate_fn, tokenizer.pad_id),
        s.max_steps or s.epochs * order.steps_per_epoch,
    )


def check_positions(data: RunData, positions: int, whose: str = "model") -> None:
    """Refuse a document that is longer than the model has positions, before weights are loaded.

    One of a data set that does not offer its lengths is refused at the step that meets it.

    Args:
        data: Of the run.
        positions: That the model has.
        whose: What the model is called.

    Raises:
        ConfigError: There is such a document.
    """
    for order in (data.order, data.order_val):
        dataset = order and order.dataset
        lengths = getattr(getattr(dataset, "plan", dataset), "lengths", None)  # of packs, documents
        if isinstance(samples := getattr(dataset, "ds", dataset), PreferenceDataset):
            lengths = samples.document_lengths
        if lengths is not None and lengths.max() > positions:
            raise ConfigError(
                f"tokenizer.max_seq_len: a document has {lengths.max():,} tokens, but the "
                f"{whose} has {positions:,} positions. Set it to {positions} or less."
            )


def loss_of(s: Settings) -> Loss:
    """Return the loss of a run."""
    return SFT() if s.loss is None else instantiate(s.loss)


def is_weighted(dataset: Any) -> bool:
    """Whether the data says that some of its tokens count more than others."""
    store = getattr(getattr(dataset, "ds", dataset), "store", None)
    return bool(getattr(store, "is_weighted", False))


def _compared(dataset: Any, loss: Loss) -> Any:
    """Return a data set as our recipe takes it, with what the loss compares.

    Raises:
        DataError: The loss is one of answers, and these are others or none.
    """
    dataset = without_padding(dataset)
    samples = getattr(dataset, "ds", dataset)  # of packs, the documents
    is_answers = isinstance(samples, PreferenceDataset)
    if not isinstance(loss, Preference):
        if is_answers:
            raise DataError("loss: cross entropy would learn rejected answers too. Set another.")
        return dataset
    name = type(loss).__name__
    if dataset is not None and not is_answers:
        raise DataError(
            f"dataset: {name} compares answers. Use phi3_plugin.data.preference_dataset."
        )
    if dataset is not None and loss.paired and not samples.is_paired:
        raise DataError(
            f"dataset.source: {name} compares two answers to a question, and each row has one with "
            "a label. Use phi3_plugin.train.losses.kto."
        )
    if dataset is not None and loss.mismatched:
        if len(samples.store.samples) < 2 * samples.width:
            raise DataError(f"dataset.source: {name} needs answers to more than one question.")
        samples.has_mismatched = True
    return dataset


ENOUGH = 200
"""Samples from which on a part is held out, and the most that are."""


def validation_share(s: Settings, dataset: Any) -> float:
    """Return the share of the samples that a run holds out, if need be by their number."""
    if s.val_fraction is not None or s.dataset_val:
        return s.val_fraction or 0.0
    samples = getattr(dataset, "ds", dataset)  # of packs, the documents
    can_split = hasattr(samples, "hold_out") or samples is dataset
    return min(0.05, ENOUGH / len(samples)) if can_split and len(samples) >= ENOUGH else 0.0


FEW_STEPS = 10
"""A run of fewer learns next to nothing."""


def facts_in_words(data: RunData) -> str:
    """Return in one line what a run is going to do."""
    order, steps = data.order, data.total_steps
    epochs = round(steps / order.steps_per_epoch, 2)
    held_out = 0 if data.order_val is None else len(data.order_val.dataset)
    return (
        f"samples: {len(order.dataset):,}, and {held_out:,} held out; steps: {steps:,}, of "
        f"{order.per_step:,} samples each; epochs: {epochs:,g}, of {order.steps_per_epoch:,} steps"
    )


def instantiate(section: Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Call the component that a section of the YAML names; None stays None.

    Unlike torchtune's, it takes every value as it is: one that was resolved once is no
    interpolation any more, whatever it looks like.
    """
    if section is None:
        return None
    named = {key: value for key, value in section.items() if key != "_component_"}
    return component(section["_component_"])(*args, **{**named, **kwargs})


def _collate(section: Mapping[str, Any], collate_fn: str, padding_idx: int) -> Collate:
    """Return what a data set's section asks for: validation data may be packed alone."""
    if section.get("packed", False):  # any other would mix the documents
        collate_fn = "phi3_plugin.data.collate.concatenate"
    return partial(component(collate_fn), padding_idx=padding_idx)
