"""Several conversations in one row of fixed length.

With room for 8 tokens, conversations of 3, 2 and 5 tokens become two packs::

    tokens     a0 a1 a2 b0 b1  _  _  _      c0 c1 c2 c3 c4  _  _  _
    labels      . a1 a2  . b1  .  .  .       . c1 c2 c3 c4  .  .  .
    input_pos   0  1  2  0  1  0  0  0       0  1  2  3  4  0  0  0
    seq_lens   [3, 2, 3]                    [5, 3]

``_`` is padding, ``.`` is not trained on. The first token of a conversation never is, so after
the shift that the recipes do nothing is predicted from one conversation about the next.
"""

from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset


def pack(
    dataset: Dataset[dict[str, list[int]]], max_seq_len: int, padding_idx: int
) -> PackedDataset:
    """Pack conversations in their order, each whole, with torchtune's packer.

    Args:
        dataset: Samples of at most ``max_seq_len`` tokens.
        max_seq_len: Tokens a pack.
        padding_idx: Fills the end of a pack that the next conversation does not fit into.

    Returns:
        Packs of ``tokens``, ``labels`` and ``input_pos``, each ``[max_seq_len]``, and
        ``seq_lens``; made for ``torchtune.data.padded_collate_packed``.
    """
    packs = PackedDataset(dataset, max_seq_len=max_seq_len, padding_idx=padding_idx)
    for pack in packs.packs:
        # torchtune lets the padding count on from the last conversation. It can come past the
        # position from which LongRoPE turns every angle of the batch, so it stays at 0 here.
        end = int(pack["seq_lens"][:-1].sum())
        if pack["input_pos"][end] != 0:
            pack["input_pos"][end:] = 0
    return packs
