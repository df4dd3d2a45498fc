"""Fine-tune Phi-3, with adapters or whole, on one CPU, one GPU, many GPUs or many nodes.

    tune run phi3_lora_finetune --config phi3_mini_lora checkpoint_dir=A output_dir=B ...
    tune run --nproc_per_node 8 phi3_lora_finetune --config phi3_mini_lora ...

Read this file first: a run, from its settings to its last checkpoint, in the order in which it
happens. The loop is `Finetune.train`. What differs between one process and many is in
`phi3_plugin.train.world`; what one step does is in `phi3_plugin.train.step`.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import config

from phi3_plugin import settings, upload
from phi3_plugin.checkpoint.base import known_hash
from phi3_plugin.checkpoint.check import served_by
from phi3_plugin.checkpoint.files import check_output
from phi3_plugin.checkpoint.peft import base_name, export_adapter, export_model
from phi3_plugin.config import read_config
from phi3_plugin.data.order import held_out, shares
from phi3_plugin.device import computes_ahead
from phi3_plugin.errors import CheckpointError
from phi3_plugin.first_run import next_commands
from phi3_plugin.generate import answers_in_training
from phi3_plugin.inspect import unpacked
from phi3_plugin.launch import ending_at_once
from phi3_plugin.lock import FolderLock
from phi3_plugin.models.phi3 import PRECISIONS
from phi3_plugin.proof import proof_of_run
from phi3_plugin.redaction import redacted
from phi3_plugin.teacher import check_same_teacher, check_teacher, identity, load_teacher
from phi3_plugin.terminal import in_lines, outlived
from phi3_plugin.train import checkpoints
from phi3_plugin.train.ahead import Batches
from phi3_plugin.train.cached_reference import compare_with_cached
from phi3_plugin.train.compiled import compiles
from phi3_plugin.train.data import (
    check_positions,
    facts_in_words,
    instantiate,
    is_weighted,
    load_data,
    loss_of,
)
from phi3_plugin.train.losses import Distill, Preference, Teacher
from phi3_plugin.train.model import is_adapted, model_of, prepare, trained_parameters
from phi3_plugin.train.monitor import Monitor
from phi3_plugin.train.optimizer import (
    check_shards,
    for_gpu,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    replay,
)
from phi3_plugin.train.plan import give_memory_back, print_plan, recomputed_for
from phi3_plugin.train.resume import (
    FINISHING_KEYS,
    Change,
    changes_of,
    check_base,
    check_changes,
    check_unfinished,
    moved,
    noted,
    record,
    told,
)
from phi3_plugin.train.start import NF4_BASE, adapter_state, starting_weights, trained_adapter
from phi3_plugin.train.step import StepResult, loss_scaler, train_step, validate
from phi3_plugin.train.stop import Stop
from phi3_plugin.train.world import World


@dataclass
class TrainState:
    """Where a run is; a checkpoint keeps it beside model, optimizer and random numbers."""

    step: int = 0
    """Optimizer steps made."""
    best: float = math.inf
    """Lowest validation loss."""
    stale: int = 0
    """Validations since then."""
    validated: int = 0
    """Step of the last validation."""
    answers_before: dict[str, str] = field(default_factory=dict)
    """To the sample questions, before the first step."""
    skipped: int = 0
    """Steps whose gradient overflowed in fp16, for which the learning rate waits."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that changed when the run went on, see `phi3_plugin.train.resume.noted`."""


class Finetune:
    """One run: ``setup``, ``train``, ``finish``."""

    def __init__(self, cfg: DictConfig, *, is_announced: bool = False) -> None:
        """Check settings and folders, join the other processes, find what to go on from.

        Args:
            cfg: YAML and command line, merged.
            is_announced: Whether somebody has said already what the run is going to do, and will
                say how to go on with it.
        """
        self.cfg = cfg
        self.is_announced = is_announced
        self.s = settings.read(cfg)
        check_output(self.s.output_dir, self.s.checkpoint_dir)
        self.world = World(self.s.device, self.s.fsdp_replicas)
        # A job that was queued again may start before the first one has died.
        self.lock = FolderLock(self.s.output_dir, "output_dir") if self.world.is_main else None
        last = checkpoints.find(self.s.output_dir, self.s.resume)
        self.last = self.world.same("output_dir", last)
        self.stop = Stop(
            self.world,
            self.s.output_dir,
            patience=self.s.early_stop_patience,
            max_nonfinite=self.s.max_nonfinite_steps,
        )
        self.loss = loss_of(self.s)
        self.teacher: Teacher | None = None
        self.state = TrainState()
        self.answers: list[str] = []  # to the sample questions, at the last validation
        self.new_tokens: dict[int, Any] = {}  # of the tokenizer, by id
        self.settings = record(cfg)
        self.card = (redacted(cfg).get("checkpointer") or {}).get("card", {})
        self.differences: list[Change] = []  # from those of the checkpoint to go on from
        self.finished = False
        self.unnoted: Callable[[], None] | None = None  # tells of the last step

    def setup(self) -> None:
        """Data first: its mistakes are the likeliest, and it is the quickest to load."""
        saved: dict[str, Any] | None = None
        if self.last.folder:
            saved = checkpoints.load_state(self.last.folder, checkpoints.RUN_STATE)
            with checkpoints.going_on(self.last.folder):
                self.compare(self.last.folder, saved)
        if not self.finished or moved(self.differences):
            self.setup_data()
            if saved:
                with checkpoints.going_on(self.last.folder):
                    self.check_data(saved)
        if self.finished:
            return
        self.setup_model(saved)
        self.setup_reference()
        self.setup_optimizer()
        if saved:
            self.load_state_dict(saved)
        else:
            self.state.answers_before = dict(zip(self.s.sample_prompts, self.answer(), strict=True))
            torch.manual_seed(self.s.seed + self.world.rank)
        self.monitor = Monitor(
            self.world.is_main,
            self.cfg,
            self.s,
            total=self.data.total_steps,
            start=self.state.step,
        )
        if not self.is_announced:
            self.monitor.say(facts_in_words(self.data))
        if self.compiled_words:
            self.monitor.say(self.compiled_words)
        self.monitor.resumed(self.state.step, self.last, noted(self.differences, self.state.step))
        self.saver = checkpoints.Saver(
            self.s.output_dir,
            self.s.save_total_limit,
            self.on_saved,
            passed_over=self.last.passed_over,
            background=self.s.save_in_background,
        )

    def compare(self, folder: Path, saved: dict[str, Any]) -> None:
        """Find out which settings differ from a checkpoint's; refuse what cannot be honoured."""
        check_base(folder, saved["base_hash"], self.s.checkpoint_dir)
        if isinstance(self.loss, Distill) and "teacher" in saved:
            check_same_teacher(folder, saved["teacher"], self.s)
        self.state = TrainState(**saved["train"])
        if self.state.step != saved["step"]:
            raise ValueError(f"train.step: is {self.state.step}, expected {saved['step']}")
        self.differences = changes_of(saved["settings"], self.settings)
        extended = any(change.key in FINISHING_KEYS for change in self.differences)
        if folder.name == checkpoints.FINAL and not extended:
            self.check_finished(folder)
        check_changes(folder, self.differences)
        self.state.changes += noted(self.differences, self.state.step)

    def check_finished(self, folder: Path) -> None:
        """Refuse to repeat a finished run with other settings; with its own nothing is left to do.

        Except for the report, if the run was killed before it was written.
        """
        check_unfinished(folder, self.state.step, self.differences)
        self.finished = not self.s.report or (self.s.output_dir / "report.html").exists()

    def setup_data(self) -> None:
        """Tokenize, split and order the samples."""
        self.data = load_data(self.s, self.world.size)
        check_positions(self.data, read_config(self.s.checkpoint_dir).max_position_embeddings)
        self.world.same("dataset", self.data.order.identity)
        if isinstance(self.loss, Distill):
            check_teacher(self.s, self.data)
        # Another's tokenizer has none
        self.new_tokens = getattr(self.data.tokenizer, "new_tokens", {})

    def setup_model(self, saved: dict[str, Any] | None = None) -> None:
        """Build, shard and fill the model, with what a checkpoint's state has of it."""
        give_memory_back()
        recompute_first = recomputed_for(self.s, self.world)
        micro_batches = self.data.total_steps * self.s.gradient_accumulation_steps
        compiled, self.compiled_words = compiles(self.s, self.world, micro_batches)

        def make() -> torch.nn.Module:
            return prepare(
                model_of(self.s, [*self.new_tokens]),
                adapter_dtype=self.s.adapter_dtype,
                recompute_every=int(self.s.enable_activation_checkpointing),
                recompute_first=recompute_first,
                offload=self.s.enable_activation_offloading,
                compiled=compiled,
                neftune_alpha=self.s.neftune_alpha,
            )

        self.model = self.world.build(
            make,
            PRECISIONS[self.s.dtype],
            offload=self.s.fsdp_cpu_offload,
            reshard=self.s.fsdp_reshard_after_forward,
        )
        self.is_lora = is_adapted(self.model)
        # PiSSA trains over what its first A and B leave of the base weights; others have no such.
        weights, self.pissa_start = starting_weights(
            self.world, self.model, self.s, self.last.folder, saved, self.new_tokens
        )
        self.world.load(self.model, weights, offload=self.s.fsdp_cpu_offload)
        self.model.train()

    def setup_reference(self) -> None:
        """Load a teacher; or compute once what a loss of answers compares with, if asked for."""
        if isinstance(self.loss, Distill):
            self.teacher = load_teacher(self.world, self.s, self.loss, self.model)
        if (
            self.s.reference == "cached"
            and isinstance(self.loss, Preference)
            and self.loss.compares
        ):
            for order in filter(None, (self.data.order, self.data.order_val)):
                compare_with_cached(
                    self.world,
                    self.model,
                    self.s,
                    order.dataset,
                    mismatched=self.loss.mismatched,
                )

    def setup_optimizer(self) -> None:
        """Build optimizer and schedule, and what scales the loss in fp16."""
        rate = self.s.optimizer.get("lr")
        groups = parameter_groups(self.model, rate, self.s.lora_plus_ratio)
        self.optimizer = instantiate(self.s.optimizer, groups, **for_gpu(self.s.optimizer, groups))
        check_shards(self.optimizer, self.model.named_parameters(), self.world.shards)
        self.scheduler = instantiate(
            self.s.lr_scheduler, self.optimizer, num_training_steps=self.data.total_steps
        )
        if self.scheduler:
            replay(self.scheduler, self.state.step - self.state.skipped)
        self.scaler = loss_scaler(self.s.dtype, self.world.device)

    def train(self) -> None:
        """Make steps until they are made or there is a reason to stop."""
        if self.finished:
            return
        state, order, total = self.state, self.data.order, self.data.total_steps
        made = Batches(self.world, order, self.data.collate, total)
        while state.step < total and not self.stop.now():
            samples, batches = made.of(state.step)
            epoch = state.step // order.steps_per_epoch
            rate = float(self.optimizer.param_groups[0]["lr"])
            # Counts the labelled tokens of all processes, runs forward and backward, clips, steps
            result = train_step(
                self.world,
                self.model,
                self.optimizer,
                self.loss,
                batches,
                self.s.clip_grad_norm,
                self.scaler,
                self.teacher,
            )
            if result.overflowed:  # asked of fp16 alone: a GPU is waited for
                state.skipped += 1
            elif self.scheduler:
                self.scheduler.step()
            state.step += 1
            self.note()  # the step before: a GPU has just begun with this one
            self.unnoted = partial(self.note_step, state.step, epoch, result, rate, samples)
            if not computes_ahead(self.world.device):
                self.note()
            if state.step == total:
                break  # finish() validates and saves
            if self.data.order_val and is_due(state.step, self.s.run_val_every_n_steps):
                self.validate()
            epoch_ends = is_due(state.step, order.steps_per_epoch)
            is_kept = self.s.save_every_epoch and epoch_ends
            if is_kept or is_due(state.step, self.s.save_every_n_steps):
                self.save(checkpoints.step_name(state.step))
        self.note()

    def note(self) -> None:
        """Tell of the last step, if nobody has yet; waits for a GPU that is at it."""
        tell, self.unnoted = self.unnoted, None
        if tell:
            tell()

    def note_step(
        self, step: int, epoch: int, result: StepResult, rate: float, samples: list[int]
    ) -> None:
        """Tell of a step, and end the run if too many in a row left the weights alone."""
        self.monitor.step(step, epoch, result, rate)
        self.stop.after_step(result, samples)

    def validate(self) -> None:
        """Measure the loss on held-out data; keep the best, and stop if it stays behind."""
        assert self.data.order_val is not None  # the settings are refused otherwise
        self.note()
        state = self.state
        batches = shares(self.data.order_val, self.world.rank, self.data.collate_val)
        measures = dict[str, float]()
        loss, count = validate(self.world, self.model, self.loss, batches, measures, self.teacher)
        self.answers = self.answer()
        weighted = is_weighted(self.data.order_val.dataset)
        self.monitor.validation(state.step, loss, count, self.answers, measures, weighted=weighted)
        state.validated = state.step
        state.stale += 1
        if loss < state.best:
            state.best = loss
            state.stale = 0
            if self.s.keep_best:
                self.save(checkpoints.BEST)
        self.stop.after_validation(state.stale)

    def answer(self) -> list[str]:
        """Return what the model says to the sample questions now."""
        return answers_in_training(
            self.model,
            self.data.tokenizer,
            self.s.sample_prompts,
            self.s.sample_max_new_tokens,
        )

    def save(self, name: str) -> Path:
        """Write a checkpoint that serves and that the run can go on from."""
        self.note()
        trained: dict[str, Tensor] = {}
        for parameter_name, parameter in trained_parameters(self.model).items():
            whole = self.world.whole(parameter.detach())
            if self.world.is_main:
                trained[parameter_name] = whole.to("cpu", copy=True)
        state = self.state_dict(trained)
        if self.world.is_main:
            may_be_identity = name != checkpoints.FINAL  # warm-up may start from 0
            write = self.exporter(trained, may_be_identity=may_be_identity)
            self.saver.save(name, self.state.step, write, state)
        self.world.barrier()
        return self.s.output_dir / name

    def exporter(
        self, trained: dict[str, Tensor], *, may_be_identity: bool
    ) -> Callable[[Path], None]:
        """Return what writes an adapter, or a whole model, into a folder."""
        if not self.is_lora:
            return partial(
                export_model,
                weights=trained,
                checkpoint_dir=self.s.checkpoint_dir,
                new_tokens=[token.entry for token in self.new_tokens.values()],
            )
        adapter = trained_adapter(
            self.model,
            trained,
            self.pissa_start,
            self.new_tokens,
            may_be_identity=may_be_identity,
        )
        card = {**self.card, "steps": self.state.step, **told(self.state.changes)}
        if self.state.best < math.inf:
            card["validation loss"] = f"{self.state.best:.4f}"
        if adapter.origin.get("lora_init") == "loftq":
            card["base to serve"] = NF4_BASE
        return partial(
            export_adapter, adapter=adapter, checkpoint_dir=self.s.checkpoint_dir, card=card
        )

    def on_saved(self, name: str, step: int) -> None:
        """Note that a checkpoint is whole."""
        self.monitor.saved(name, step)

    def state_dict(self, trained: dict[str, Tensor]) -> dict[str, Any]:
        """Return what a resumed run needs to end in the same bits.

        Of a whole model the weights are not repeated: those that serve are the trained bits.
        """
        state = {
            "optimizer": optimizer_state(self.world, self.model, self.optimizer),
            "loss_scale": self.scaler.state_dict(),
            "random": self.world.gather(self.world.random_state()),
            "train": asdict(self.state),
            "data": self.data.order.identity,
            "held_out": held_out(self.data.order_val),
            "base_hash": known_hash(self.s.checkpoint_dir),
            "settings": self.settings,
        }
        if isinstance(self.loss, Distill):
            state["teacher"] = identity(self.s)
        if self.is_lora:
            state["adapter"] = adapter_state(self.model, trained, self.pissa_start)
        return state

    def check_data(self, saved: dict[str, Any]) -> None:
        """Refuse to go on with samples that earlier steps have seen, or in another order."""
        identity, step, total = saved["data"], self.state.step, self.data.total_steps
        if identity != self.data.order.identity:
            raise CheckpointError(
                f"resume: the order of the data would change from {identity} to "
                f"{self.data.order.identity}. Use the settings the run was started with; with "
                "another number of processes change gradient_accumulation_steps or batch_size "
                "instead."
            )
        if saved["held_out"] != held_out(self.data.order_val):
            raise CheckpointError(
                f"resume: the validation data would change from {saved['held_out']} to "
                f"{held_out(self.data.order_val)}, and losses could not be compared. Use the "
                "dataset_val or val_fraction the run was started with."
            )
        if step == total and self.last.folder and self.last.folder.name == checkpoints.FINAL:
            self.check_finished(self.last.folder)
        if step > total:
            raise CheckpointError(
                f"resume: {self.last.folder} has made {step} steps, and the run is to have "
                f"{total}. Raise max_steps or epochs, or resume from an earlier checkpoint."
            )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where a checkpoint ended; the trained tensors are in the model by now."""
        with checkpoints.going_on(self.last.folder):
            load_optimizer_state(self.world, self.model, self.optimizer, saved["optimizer"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["loss_scale"])
            self.stop.after_validation(self.state.stale)
            self.world.set_random_state(saved["random"], self.s.seed + self.state.step)

    def finish(self) -> None:
        """Save once more: the result, or a step that an interrupted run goes on from."""
        if self.finished:
            return self.say_finished()
        state = self.state
        is_finished = state.step == self.data.total_steps
        interrupted = self.stop.interrupted and not is_finished
        if self.data.order_val is not None and is_finished and state.validated < state.step:
            self.validate()
        name = checkpoints.step_name(state.step) if interrupted else checkpoints.FINAL
        folder = self.save(name)
        self.saver.wait()
        self.stop.saved()
        self.monitor.close()
        if self.s.report:
            self.report(folder)
        self.world.close()
        if not self.world.is_main:
            return
        if self.is_lora:
            print(in_lines(served_by(folder)))
        if interrupted:
            again = "" if self.is_announced else " Repeat the command with resume=auto to go on."
            print(in_lines(f"Saved {folder}.{again}"))
            return
        print(f"Saved {folder}.")
        if self.s.prove and self.is_lora:
            print(in_lines(str(proof_of_run(folder, self.s.checkpoint_dir))))
        if self.s.push_to_hub:
            print(f"Uploaded to {upload.push(folder, self.s.push_to_hub)}.")

    @property
    def exit_code(self) -> int:
        """What the command ends with: 128 and the number of the signal that interrupted the run.

        So a command that follows it is not run, and a job scheduler starts it again. One process of
        a machine says so: the launcher ends the others when the first has failed.
        """
        is_finished = self.finished or self.state.step == self.data.total_steps
        if is_finished or int(os.environ.get("LOCAL_RANK", 0)):
            return 0
        return self.stop.exit_code

    def say_finished(self) -> None:
        """Say that there is nothing to do; no file changes."""
        self.world.close()
        if self.world.is_main:
            text = (
                f"{self.s.output_dir} holds this run, finished after {self.state.step} steps: "
                f"{self.last.folder}. Nothing was trained or written. Raise max_steps or epochs to "
                "train on, or set another output_dir for another run."
            )
            print(in_lines(text))

    def close(self) -> None:
        """Leave signals and the folder to others, however the run has ended."""
        self.stop.close()
        if self.lock:
            self.lock.release()

    def report(self, folder: Path) -> None:
        """Write the page that tells what the run did; every process answers the questions."""
        is_answered = self.answers and self.state.validated == self.state.step
        after = self.answers if is_answered else self.answer()
        if not self.world.is_main:
            return
        from phi3_plugin.pages.report import Ending, write_report  # brings matplotlib

        step, total = self.state.step, self.data.total_steps
        shown, held = redacted(self.cfg), self.data.order_val
        named = shown["checkpoint_dir"]
        typed = next_commands(self.s, named, folder, has_validation=held is not None)
        page = write_report(
            self.s.output_dir,
            model=self.model,
            settings=shown,
            changes=told(self.state.changes),
            adapter=folder,
            base=Path(base_name(self.s.checkpoint_dir)).name,
            outcome=Ending(step, total, self.stop.reason, time.strftime("%Y-%m-%d")),
            samples=len(unpacked(self.data.order.dataset)),
            held_out=len(unpacked(held.dataset)) if held else 0,
            answers=[
                (prompt, self.state.answers_before.get(prompt, ""), answer)
                for prompt, answer in zip(self.s.sample_prompts, after, strict=True)
            ],
            next_commands=[] if "${" in named else list(typed),  # a value of the environment
        )
        self.monitor.say(f"Wrote {page}.")


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


def finetune(cfg: DictConfig, *, is_announced: bool = False, is_command: bool = False) -> int:
    """Make a run and return the exit code.

    Args:
        cfg: As for `Finetune`.
        is_announced: As for `Finetune`.
        is_command: Whether the process is the run's alone.
    """
    recipe = Finetune(cfg, is_announced=is_announced)
    recipe.stop.is_command = is_command
    try:
        recipe.setup()
        recipe.train()
        recipe.finish()
    finally:
        recipe.close()
    return recipe.exit_code


@config.parse
def main(cfg: DictConfig) -> int:
    """Fine-tune Phi-3; see the top of this file."""
    if cfg.get("plan"):
        print_plan(cfg)
        return 0
    with ending_at_once(), outlived():
        code = finetune(cfg, is_command=True)
        if code:
            sys.exit(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
