"""Fine-tune Phi-3, with adapters or whole, on one CPU, one GPU, many GPUs or many nodes.

    tune run phi3_lora_finetune --config phi3_mini_lora checkpoint_dir=A output_dir=B ...
    tune run --nproc_per_node 8 phi3_lora_finetune --config phi3_mini_lora ...

The loop is `Finetune.train`. What differs between one process and many is in
`phi3_plugin.train.world`; what one step does is in `phi3_plugin.train.step`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config
from torchtune.data import Message

from phi3_plugin import settings as strict
from phi3_plugin.checkpoint.check import proof, served_by
from phi3_plugin.checkpoint.files import check_output
from phi3_plugin.checkpoint.peft import check_trained, export_adapter, export_model
from phi3_plugin.data.order import shares
from phi3_plugin.errors import CheckpointError
from phi3_plugin.generate import Generator
from phi3_plugin.models.nf4 import rows_of
from phi3_plugin.options import Sampling
from phi3_plugin.train import checkpoints as run
from phi3_plugin.train.checkpoints import Saver
from phi3_plugin.train.feed import build, make_feed
from phi3_plugin.train.losses import sft
from phi3_plugin.train.monitor import Monitor
from phi3_plugin.train.optimizer import check_shards
from phi3_plugin.train.plan import memory_choices, plan
from phi3_plugin.train.prepare import DTYPES, is_adapted, parameter_groups, prepare
from phi3_plugin.train.start import NF4_BASE, check_base, made, starting_weights, trained
from phi3_plugin.train.step import train_step, validate
from phi3_plugin.train.stop import Stop
from phi3_plugin.train.world import World

# Answers to a few fixed questions while `phi3_plugin.recipes.lora_finetune` trains.

TOGETHER = 8
"""Questions that are answered at a time."""

BROKEN = "(no answer: the model's scores are not finite)"
"""Stands where an answer would."""


def answers(model: nn.Module, tokenizer: Any, prompts: Sequence[str], longest: int) -> list[str]:
    """Answer each question greedily; every process of a sharded model must ask.

    Args:
        model: Evaluated, then trained on.
        tokenizer: Renders a conversation and knows where an answer stops.
        prompts: What the user says.
        longest: Tokens of an answer.
    """
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=longest), batch_size=TOGETHER)
    training = model.training
    model.eval()
    # Compiled layers would be compiled again for every length that a cache can have
    try:
        with torch.compiler.set_stance("force_eager"):
            found = list(generator.answers(_asked(tokenizer, prompt) for prompt in prompts))
    except CheckpointError:  # not finite; when a run is given up for that, the run decides
        return [BROKEN] * len(prompts)
    finally:
        model.train(training)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


def _asked(tokenizer: Any, prompt: str) -> list[int]:
    sample = tokenizer({"messages": [Message(role="user", content=prompt)]}, inference=True)
    return list(sample["tokens"])


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now."""
    return bool(every) and step % every == 0


class Finetune:
    """One run, from settings to the final checkpoint."""

    def __init__(self, cfg: DictConfig) -> None:
        """Check what can be checked before anything slow happens."""
        self.cfg, self.s = cfg, strict.read(cfg)
        check_output(self.s.output_dir, self.s.checkpoint_dir)
        self.world = World(self.s.device, self.s.fsdp_replicas)
        self.found = self.world.same("output_dir", run.find(self.s.output_dir, self.s.resume))
        patience, nonfinite = self.s.early_stop_patience, self.s.max_nonfinite_steps
        self.stop = Stop(self.world, patience=patience, max_nonfinite=nonfinite)
        self.step, self.stale, self.best, self.validated, self.answers = 0, 0, math.inf, 0, []

    def setup(self) -> None:
        """Data first: its mistakes are the likeliest, and it is the quickest to load."""
        s = self.s
        self.setup_data()
        self.setup_model()
        self.setup_optimizer()
        asked = self.feed.tokenizer, s.sample_prompts, s.sample_max_new_tokens
        self.answer = partial(answers, self.model, *asked)
        self.before = self.answer()
        torch.manual_seed(s.seed + self.world.rank)
        self.world.same("dataset", self.order.identity)
        if self.found.folder:
            self.load_state(run.load_state(self.found.folder))
        steps = {"total": self.total_steps, "start": self.step}
        self.monitor = Monitor(self.world.is_main, self.cfg, s, **steps)
        self.monitor.resumed(self.step, *self.found)
        folder, limit, background = s.output_dir, s.save_total_limit, s.save_in_background
        self.saver = Saver(folder, limit, self.saved, background=background)

    def train(self) -> None:
        """The loop."""
        while self.step < self.total_steps and not self.stop.now():
            batches = self.order.batches(self.step, self.world.rank, self.collate)
            result = train_step(
                self.world, self.model, self.optimizer, sft, batches, self.s.clip_grad_norm
            )
            rate = float(self.optimizer.param_groups[0]["lr"])
            if self.scheduler:
                self.scheduler.step()
            epoch, self.step = self.step // self.order.steps_per_epoch, self.step + 1
            self.monitor.step(self.step, epoch, result, rate)
            self.stop.after_step(result.problem, self.order.indices(self.step - 1))
            if self.step == self.total_steps:
                break  # finish() validates and saves
            if is_due(self.step, self.s.run_val_every_n_steps):
                self.validate()
            epoch_end = self.s.save_every_epoch and is_due(self.step, self.order.steps_per_epoch)
            if is_due(self.step, self.s.save_every_n_steps) or epoch_end:
                self.save(run.step_name(self.step))

    def finish(self) -> None:
        """Save once more: the result, or a step that an interrupted run goes on from."""
        interrupted = self.stop.interrupted and self.step < self.total_steps
        if self.feed.order_val and self.validated < self.step == self.total_steps:
            self.validate()
        folder = self.save(run.step_name(self.step) if interrupted else run.FINAL)
        self.saver.wait()
        if self.s.report:
            after = (self.validated == self.step and self.answers) or self.answer()
            samples = zip(self.s.sample_prompts, self.before, after, strict=True)
            if self.world.is_main:
                from phi3_plugin.pages.report import write_report  # brings matplotlib

                page = write_report(
                    self.s.output_dir,
                    model=self.model,
                    config=self.cfg,
                    adapter=folder,
                    ending=self.stop.reason,
                    answers=list(samples),
                )
                self.monitor.say(f"Wrote {page}.")
        self.monitor.close()
        if self.world.is_main:
            print(f"Saved {folder}.", "Repeat the command with resume=auto to go on." * interrupted)
        self.world.close()
        if self.world.is_main and self.s.prove and self.is_lora and not interrupted:
            print(proof(folder, self.s.checkpoint_dir))

    def setup_data(self) -> None:
        """Tokenize, split and order the samples."""
        self.feed = feed = make_feed(self.s, self.world.size)
        self.order, self.collate, self.total_steps = feed.order, feed.collate, feed.total_steps

    def setup_model(self) -> None:
        """Build, shard and fill the model."""
        s, folder, offload = self.s, self.found.folder, self.s.fsdp_cpu_offload
        choices = {"adapter_dtype": s.adapter_dtype, "compiled": s.compile}
        choices |= memory_choices(s, self.world)
        self.model = self.world.build(
            lambda: prepare(build(s.model), **choices),
            DTYPES[s.dtype],
            offload=offload,
            reshard=s.fsdp_reshard_after_forward,
        )
        self.is_lora = is_adapted(self.model)
        weights, self.first = starting_weights(self.world, self.model, s, folder)
        self.world.load(self.model, weights, rows_of, offload=offload)
        for module in self.model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        self.model.train()

    def setup_optimizer(self) -> None:
        """Build optimizer and schedule."""
        s = self.s
        groups = parameter_groups(self.model, s.optimizer.get("lr"), s.lora_plus_ratio)
        self.optimizer = build(s.optimizer, groups)
        check_shards(self.optimizer, self.model.named_parameters(), self.world.shards)
        self.scheduler = build(s.lr_scheduler, self.optimizer, num_training_steps=self.total_steps)

    def validate(self) -> None:
        """Measure the loss on held-out data; keep the best, and stop if it stays behind."""
        batches = shares(self.feed.order_val, self.world.rank, self.feed.collate_val)
        loss, tokens = validate(self.world, self.model, sft, batches)
        self.answers = self.answer()
        self.monitor.validation(self.step, loss, tokens, self.answers)
        self.validated = self.step
        self.stale = 0 if loss < self.best else self.stale + 1
        if loss < self.best:
            self.best = loss
            if self.s.keep_best:
                self.save(run.BEST)
        self.stop.after_validation(self.stale)

    def save(self, name: str) -> Path:
        """Write a checkpoint that serves and that the run can go on from."""
        parameters = trained(self.model).items()
        values = {n: self.world.whole(p.detach()).to("cpu", copy=True) for n, p in parameters}
        state = self.state()
        if self.world.is_main:
            self.saver.save(name, self.step, self.writer(values, name), state)
        self.world.barrier()
        return self.s.output_dir / name

    def saved(self, name: str, step: int) -> None:
        """Say that a checkpoint is whole, and who can serve it."""
        self.monitor.saved(name, step)
        if self.is_lora:
            print(served_by(self.s.output_dir / name))

    def writer(self, values: dict[str, torch.Tensor], name: str) -> Callable[[Path], None]:
        """Return what writes an adapter, or a whole model, into a folder."""
        if not self.is_lora:
            return partial(export_model, weights=values, checkpoint_dir=self.s.checkpoint_dir)
        moved = {name: values[name] - start for name, start in self.first.items()}
        check_trained(
            {**values, **moved}, may_be_identity=name != run.FINAL
        )  # warm-up may start from 0
        card = {**(self.s.checkpointer or {}).get("card", {}), "steps": self.step}
        if self.best < math.inf:
            card["validation loss"] = f"{self.best:.4f}"
        adapter = made(self.model, values, self.first, self.s.model.get("lora_dropout", 0.0))
        if adapter.origin.get("lora_init") == "loftq":
            card["base to serve"] = NF4_BASE
        where = {"checkpoint_dir": self.s.checkpoint_dir, "card": card}
        return partial(export_adapter, adapter=adapter, **where)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to end in the same bits."""
        return {
            "optimizer": self.world.optimizer_state(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "random": self.world.gather(self.world.random_state()),
            "best": self.best,
            "stale": self.stale,
            "validated": self.validated,
            "data": self.order.identity,
            "answers": self.before,
            "settings": OmegaConf.to_container(self.cfg, resolve=True),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint ended."""
        if state["data"] != self.order.identity:
            raise CheckpointError(
                f"resume: the order of the data would change from {state['data']} to "
                f"{self.order.identity}. Use the settings the run was started with; with another "
                "number of processes change gradient_accumulation_steps or batch_size instead."
            )
        check_base(state["settings"]["model"], self.model)
        self.world.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        for name in ("step", "best", "stale", "validated"):
            setattr(self, name, state[name])
        self.before = state["answers"]
        self.stop.after_validation(self.stale)
        self.world.set_random_state(state["random"], self.s.seed + self.step)


@config.parse
def main(cfg: DictConfig) -> None:
    """Fine-tune Phi-3; see the top of this file."""
    if cfg.get("plan"):
        return plan(cfg)
    recipe = Finetune(cfg)
    recipe.setup()
    recipe.train()
    recipe.finish()


if __name__ == "__main__":
    sys.exit(main())
