"""Next-token cross entropy, summed, so that a step can divide once by all its labelled tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


# Shapes: B batch, S sequence, V vocabulary
class SummedCrossEntropy:
    """The sum over labelled tokens of -log p, in fp32, a piece of the sequence at a time.

    The fp32 copy of the logits, the largest tensor of a step, never exists whole.
    """

    def __init__(self, model: nn.Module, num_output_chunks: int = 8) -> None:
        """Ask the model for its logits in pieces.

        Args:
            model: torchtune's decoder.
            num_output_chunks: Pieces that the sequence is cut into.
        """
        self.num_output_chunks = num_output_chunks
        model.set_num_output_chunks(num_output_chunks)  # type: ignore[operator]

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Run the model and return the summed loss, a scalar.

        Args:
            model: The decoder that gives its logits in pieces.
            batch: What the model takes, and ``labels [B, S]`` at their own tokens' places,
                -100 where there is none.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        pieces = model(**inputs)
        labels = shifted(batch["labels"]).chunk(self.num_output_chunks, dim=1)
        losses = [_summed(*pair) for pair in zip(pieces, labels, strict=True)]
        return torch.stack(losses).sum()


def shifted(labels: Tensor) -> Tensor:
    """Put each label at the token that predicts it; the last token predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def labelled(labels: Tensor) -> Tensor:
    """Count what is predicted: labels, less those at a first token."""
    return (labels[:, 1:] != IGNORED).sum()


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
