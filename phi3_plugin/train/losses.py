"""Losses over the log-probabilities of labelled tokens, summed: a step divides once.

The model gives log p of every labelled token, and its gradient whatever the loss: another loss is
another function of them here.

    sft                     a mean over tokens: how well each is predicted
    distill                 the same, and how near all that is predicted is to a teacher's
    dpo, simpo, orpo        a mean over pairs: how much better the chosen answer is than the other
    kto                     a mean over answers, each of which is a good or a bad one

The teacher is loaded by `phi3_plugin.teacher`.

Answers are documents of a row, a pair is two neighbours in it, the chosen one first. What a loss
compares with, the model without its adapter, comes with the batch: `phi3_plugin.train.reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear
from torchtune.modules.peft import disable_adapter

from phi3_plugin.models.distillation import Teaching
from phi3_plugin.models.lora import linear
from phi3_plugin.options import Kind, Positive, Share, is_number
from phi3_plugin.train.world import exact

Batch = dict[str, Any]
"""What the model takes, with ``targets`` and ``rows``; see :func:`phi3_plugin.train.step.ready`."""

Loss = Callable[[Tensor, Batch], Tensor]
"""(log p of each labelled token ``[N]``, their batch) -> loss, a scalar in fp32."""

Teacher = Callable[[Batch], Teaching]
"""Says what it predicts in the place of a ready batch's labelled tokens."""


LOSS_KEYS = frozenset(
    ("weights", "labelled", "wanted", "reference", "mismatched", "kl", "chosen_length")
)
"""What a batch has for a loss, and not for the model."""


def _is_ratio(value: Any) -> bool:
    return is_number(value, most=1) and value > 0


def _weighted(values: Tensor, batch: Batch) -> Tensor:
    """Return values of labelled tokens, [..., N], each times its weight if the data tells any."""
    weights = batch.get("weights")
    return values if weights is None else values * weights


# Shapes: N labelled tokens, A answers, P pairs
def predicted(model: nn.Module, batch: Batch, **asked: Any) -> Tensor:
    """Return log p of each labelled token, [N]; or what else of it a loss has `asked` for."""
    given = {key: batch[key] for key in batch if key not in LOSS_KEYS}
    logps: Tensor = model(**given, **asked)
    return logps


@dataclass(frozen=True)
class SFT:
    """Cross entropy of the labelled tokens, each times its weight if the data tells any.

    The step divides by the number of tokens, and not by the sum of weights: or a weight would mean
    nothing in a batch of one row, and something else beside each other row.
    """

    label_smoothing: Share = 0.0
    """Share of each target that all tokens of the vocabulary have in equal parts, as in torch's
    ``cross_entropy``. Validation measures without it."""

    def __call__(self, logps: Tensor, batch: Batch) -> Tensor:
        """Return -log p, summed over tokens."""
        return -_weighted(logps, batch).sum()

    @property
    def asked(self) -> dict[str, float]:
        """What the model is asked for in training beside log p; see its ``forward``."""
        return {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}


@dataclass(frozen=True)
class Distill:
    """Next tokens are to be predicted as a teacher does, and as they are labelled.

    The mean over labelled tokens of ``kd_ratio T**2 KL(teacher | student) - (1 - kd_ratio) log p``,
    each times its weight if the data tells any.
    """

    measured: ClassVar[tuple[str, ...]] = ("kl", "sft_loss")
    """What is told of a step beside its loss, each a mean over tokens."""
    kd_ratio: Annotated[float, Kind("above 0 and at most 1", _is_ratio)] = 0.5
    """Share of the teacher in the loss; the rest is cross entropy, as of sft."""
    temperature: Positive = 1.0
    """T, by which all logits are divided where the two are compared: above 1 what the teacher
    takes for unlikely counts more."""

    @torch.no_grad()
    def taught_by(self, model: nn.Module, batch: Batch) -> Teaching:
        """Return what a model says in the place of a ready batch's labelled tokens."""
        hidden = predicted(model, {key: batch[key] for key in batch if key != "targets"})
        head: Any = model.output
        return Teaching(hidden, head, self.kd_ratio, self.temperature)

    def taught_by_base(self, student: nn.Module, batch: Batch) -> Teaching:
        """Return what the student says without its adapter."""
        with disable_adapter(student):
            teaching = self.taught_by(student, batch)
        owner: Any = student.output
        if isinstance(owner, TiedLinear):
            owner = owner.tied_module
        # The weight is looked up in the student's own pass, where it is gathered if it is shared
        return teaching._replace(head=lambda x: linear(x, owner.weight))

    def __call__(self, distances: Tensor, batch: Batch) -> Tensor:
        """Return the loss, summed over tokens; see `token_distances`."""
        return _weighted(distances[0], batch).sum()

    def measure(self, distances: Tensor, batch: Batch) -> Tensor:
        """Return of each of `measured` the sum, and over how many, [measured, 2]."""
        _, logps, kl = _weighted(distances.to(exact(distances.device)), batch)
        sums = torch.stack([kl.sum(), -logps.sum()])
        return torch.stack([sums, torch.full_like(sums, len(kl))], dim=1)

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is told of a step, of the means of what is `measured`."""
        return means


class Answers(NamedTuple):
    """What a batch says of each answer, [A], or of one side of each pair, [P]."""

    logps: Tensor
    """Sum of log p over its tokens."""
    tokens: Tensor
    """How many these are."""
    reference: Tensor
    """Sum of log p without the adapter; zero where a loss needs none."""
    wanted: Tensor
    """Whether the answer is a good one."""

    @property
    def gains(self) -> Tensor:
        """By how much the adapter makes each answer likelier, in log p."""
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """Mean log p of a token."""
        return self.logps / self.tokens

    def pairs(self) -> tuple["Answers", "Answers"]:
        """Return the chosen and the rejected answers."""
        chosen, rejected = (Answers(*(value[side::2] for value in self)) for side in (0, 1))
        return chosen, rejected


def summed(logps: Tensor, batch: Batch) -> Tensor:
    """Return log p of each answer, [A]; of [N] those of an answer are neighbours."""
    # Unsafe is not to look whether the lengths add up, for which a GPU would be waited for
    how: Any = {"lengths": batch["labelled"], "initial": 0, "unsafe": True}
    return torch.segment_reduce(logps, "sum", **how)


def answers(logps: Tensor, batch: Batch) -> Answers:
    """Return what a batch says of its answers."""
    sums = summed(logps, batch)
    reference = batch.get("reference", torch.zeros_like(sums))
    return Answers(sums, batch["labelled"], reference, batch["wanted"])


@dataclass(frozen=True)
class Preference:
    """A loss of answers; those below say what becomes of each."""

    paired: ClassVar[bool] = True
    """Whether it compares two answers."""
    compares: ClassVar[bool] = True
    """Whether it needs the model without its adapter."""
    mismatched: ClassVar[bool] = False
    """Whether it needs answers to other questions."""
    measured: ClassVar[tuple[str, ...]] = (
        *("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"),
    )
    """What is told of a step beside its loss, each a mean over pairs."""

    def __call__(self, logps: Tensor, batch: Batch) -> Tensor:
        """Return the loss, summed over pairs, or answers."""
        if not len(logps):  # a process that the last samples of an epoch do not reach
            return logps.sum()
        losses: Tensor = self.losses(answers(logps, batch), batch)
        return losses.sum()

    def count(self, batch: Batch) -> int:
        """Return of how many pairs, or answers, the loss is a mean."""
        return len(batch["wanted"]) // (1 + self.paired) if len(batch["targets"]) else 0

    def measure(self, logps: Tensor, batch: Batch) -> Tensor:
        """Return of each of `measured` the sum, and over how many, [measured, 2]."""
        if not len(logps):
            return torch.zeros(
                len(self.measured), 2, dtype=exact(logps.device), device=logps.device
            )
        return self.sums(answers(logps, batch), batch).to(exact(logps.device))

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is told of a step, of the means of what is `measured`."""
        return means

    def losses(self, all: Answers, batch: Batch) -> Tensor:
        """Return the loss of each pair, [P], or answer, [A]."""
        raise NotImplementedError

    def rewards(self, side: Answers) -> Tensor:
        """Return how much the model has come to like each answer."""
        raise NotImplementedError

    def sums(self, all: Answers, batch: Batch) -> Tensor:
        """Return sums and counts of rewards, [measured, 2]."""
        chosen, rejected = map(self.rewards, all.pairs())
        values = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).float()])
        return torch.stack([values.sum(1), torch.full_like(values[:, 0], len(chosen))], dim=1)


def _nll(chosen: Answers, batch: Batch) -> Tensor:
    """Return what of each pair adds up to P times -log p of a chosen token, the mean of a step."""
    length: Tensor = batch["chosen_length"]
    return -chosen.logps / length


def _logistic(logits: Tensor, smoothing: float) -> Tensor:
    return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


@dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimization: the chosen answer gains more over the base than the other.

    Source: Rafailov et al. 2023, DPO, equation 7; Azar et al. 2023, IPO, equation 17, with means
    over tokens as its authors do; Zhao et al. 2023, SLiC (hinge); Mitchell 2023, cDPO (smoothing);
    Pang et al. 2024, RPO, equation 1, with the mean over all tokens of the step.
    """

    beta: Positive = 0.1
    """How much a gain in log p counts: the larger, the nearer the model stays to the base. Of ipo
    the margin to reach is 1 / (2 beta)."""
    form: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """What is made of the difference of gains."""
    label_smoothing: Share = 0.0
    """Share of pairs that are thought to be the wrong way round; for sigmoid."""
    rpo_alpha: Positive | None = None
    """Weight of -log p of the chosen answers' tokens, which is added then."""

    def losses(self, all: Answers, batch: Batch) -> Tensor:
        """Return the loss of each pair, [P]."""
        chosen, rejected = all.pairs()
        logits = self.beta * (chosen.gains - rejected.gains)
        if self.form == "ipo":
            difference = chosen.gains / chosen.tokens - rejected.gains / rejected.tokens
            losses = (difference - 1 / (2 * self.beta)).square()
        elif self.form == "hinge":
            losses = F.relu(1 - logits)
        else:
            losses = _logistic(logits, self.label_smoothing)
        return losses if self.rpo_alpha is None else losses + self.rpo_alpha * _nll(chosen, batch)

    def rewards(self, side: Answers) -> Tensor:
        """Return beta times what each answer has gained, [P]."""
        return self.beta * side.gains


@dataclass(frozen=True)
class SimPO(Preference):
    """The chosen answer is likelier than the other, token by token and by a margin.

    Source: Meng et al. 2024, SimPO, equation 6.
    """

    compares: ClassVar[bool] = False
    beta: Positive = 2.0
    """How much a difference of mean log p counts."""
    gamma: Annotated[float, Kind("at least 0", partial(is_number, least=0))] = 0.5
    """The margin, in rewards."""
    label_smoothing: Share = 0.0
    """Share of pairs that are thought to be the wrong way round."""

    def losses(self, all: Answers, batch: Batch) -> Tensor:
        """Return the loss of each pair, [P]."""
        chosen, rejected = all.pairs()
        margins = self.rewards(chosen) - self.rewards(rejected)
        return _logistic(margins - self.gamma, self.label_smoothing)

    def rewards(self, side: Answers) -> Tensor:
        """Return beta times the mean log p of each answer's tokens, [P]."""
        return self.beta * side.means


@dataclass(frozen=True)
class ORPO(Preference):
    """Cross entropy of the chosen answers, and better odds than those of the others.

    Source: Hong et al. 2024, ORPO, equations 4, 6 and 7; their lambda is beta. The prompts are not
    learned.
    """

    compares: ClassVar[bool] = False
    beta: Positive = 0.1
    """Weight of the odds ratio."""

    def losses(self, all: Answers, batch: Batch) -> Tensor:
        """Return the loss of each pair, [P]."""
        chosen, rejected = all.pairs()
        log_odds = _log_odds(chosen.means) - _log_odds(rejected.means)
        return _nll(chosen, batch) - self.beta * F.logsigmoid(log_odds)

    def rewards(self, side: Answers) -> Tensor:
        """Return beta times the mean log p of each answer's tokens, [P]."""
        return self.beta * side.means


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)); of a p that rounds to 1 that of the largest below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))


@dataclass(frozen=True)
class KTO(Preference):
    """A good answer gains, and a bad one loses, beside what answers to other questions gain.

    Of these, one for each answer, the mean over the whole step is taken, or 0 if it is less.

    Source: Ethayarajh et al. 2024, KTO, equation 8.
    """

    paired: ClassVar[bool] = False
    mismatched: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "kl")
    beta: Positive = 0.1
    """How much a gain in log p counts: the larger, the nearer the model stays to the base."""
    desirable_weight: Positive = 1.0
    """Of the loss of good answers."""
    undesirable_weight: Positive = 1.0
    """Of the loss of bad answers; where there are n times as many, 1 / n evens it out."""

    def losses(self, all: Answers, batch: Batch) -> Tensor:
        """Return the loss of each answer, [A]."""
        sign = torch.where(all.wanted, 1.0, -1.0)
        weights = torch.where(all.wanted, self.desirable_weight, self.undesirable_weight)
        return weights * (1 - torch.sigmoid(self.beta * sign * (all.gains - batch["kl"])))

    def rewards(self, side: Answers) -> Tensor:
        """Return beta times what each answer has gained, [A]."""
        return self.beta * side.gains

    def told(self, means: dict[str, float]) -> dict[str, float]:
        """Add by how much good answers have gained more than bad ones."""
        return {**means, "reward_margin": means["reward_chosen"] - means["reward_rejected"]}

    def sums(self, all: Answers, batch: Batch) -> Tensor:
        """Return sums and counts of rewards, [measured, 2]."""
        rewards, count = self.rewards(all), len(all.wanted)
        sides = torch.stack([all.wanted, ~all.wanted]).to(rewards.dtype)
        sums = torch.cat([sides @ rewards, batch["kl"][None] * count])
        return torch.stack([sums, torch.cat([sides.sum(1), sums.new_full((1,), count)])], dim=1)


# By which a YAML names them
sft = SFT
distill = Distill
dpo = DPO
simpo = SimPO
orpo = ORPO
kto = KTO
