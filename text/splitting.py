"""The split into training and validation: which records are kept, and how much of each is for training.

split = Split(scan, val_fraction=0.1)
split.is_kept, split.n_train     # one entry per record: not a duplicate, not filtered out; characters for training
"""

import numpy as np

from base.configuration import UserError
from text.scan import CorpusScan, some_names
from text.tokenizer import special_pattern


class Split:
    """Whole records are for validation, and of documents too large for that the end.

    Records whose group has one of the smallest hashes are for validation. A hash is a pseudo-random number that depends
    on the content alone, so the split is random and the same every time; equal records are never on both sides. A
    document larger than the whole validation part (one text alone, say) gives its last val_fraction for it.
    """

    def __init__(self, scan: CorpusScan, val_fraction: float) -> None:
        hashes, groups = (np.array(values, dtype=np.uint64) for values in (scan.hashes, scan.groups))
        lengths = np.array(scan.lengths, dtype=np.int64)
        accepted = np.flatnonzero(np.array(scan.is_accepted, dtype=bool))
        _, first = np.unique(hashes[accepted], return_index=True)
        self.is_kept = np.zeros(len(hashes), dtype=bool)
        self.is_kept[accepted[first]] = True
        self.n_duplicates = len(accepted) - len(first)
        self.n_kept = len(first)

        has_documents = scan.stage == "pretrain"
        sizes = np.where(self.is_kept, lengths if has_documents else 1, 0)
        _, group_of = np.unique(groups, return_inverse=True)  # numbered in the order of their hashes
        group_size = np.bincount(group_of, weights=sizes)
        is_cut = group_size > val_fraction * group_size.sum() if has_documents else np.zeros(len(group_size), bool)
        is_val = choose_validation(np.where(is_cut, 0, group_size), val_fraction, must=not has_documents)
        self.n_train = np.where(is_val[group_of], 0, lengths)  # (n_records,)
        self.n_cut = int(is_cut.sum())  # documents whose end is for validation
        if self.n_cut:
            offset = characters_before(group_of, sizes)
            end = group_size[group_of] * (1 - val_fraction)  # of the training part of each record's group
            is_piece = np.bincount(group_of, weights=self.is_kept)[group_of] > 1  # pieces of a document stay whole
            cut = np.where(is_piece, np.where(offset < end, lengths, 0), end.astype(np.int64))
            self.n_train = np.where(is_cut[group_of], cut, self.n_train)
        self.is_val = self.n_train == 0
        if not has_documents and not (self.is_kept & self.is_val).any():
            what = {"dpo": "prompt", "vision": "image"}.get(scan.stage, scan.split_by)
            which = f", all with the same {what}" if self.n_kept > 1 else ""
            raise UserError(
                f"{some_names([source.name for source in scan.sources])}: {self.n_kept} distinct sample(s){which}; "
                "at least 2 are needed, one for validation"
            )

    def parts(self, record: int, text: str, start: int) -> list[tuple[str, str]]:
        """(split, text) of a piece of a document that starts at its character `start`."""
        cut = min(len(text), max(0, int(self.n_train[record]) - start))
        special = special_pattern.match(text, max(0, text.rfind("<|", 0, cut + 1)))
        if special and special.start() < cut < special.end():  # a special token is not cut in two
            cut = special.start()
        return [(split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part]


def choose_validation(sizes: np.ndarray, val_fraction: float, must: bool) -> np.ndarray:
    """Whether each group is for validation, (n,) bool, given their sizes (n,) in the order of their hashes.

    Takes groups until val_fraction of the whole is reached, as nearly as whole ones can. must: at least one of two.
    """
    target = val_fraction * sizes.sum()
    fits = (sizes > 0) & (sizes <= max(target, 1))
    fitting = np.where(fits, sizes, 0)
    taken = fits & (np.cumsum(fitting) - fitting / 2 <= target)
    if must and not taken.any() and (sizes > 0).sum() > 1:
        taken[np.where(sizes > 0, sizes, np.inf).argmin()] = True
    if taken.any() and taken[sizes > 0].all():  # one is left for training
        taken[np.flatnonzero(taken)[-1]] = False
    return taken


def characters_before(group_of: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For each record, the characters of its group's records before it, (n_records,)."""
    order = np.argsort(group_of, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    first = np.searchsorted(group_of[order], np.arange(group_of.max() + 1))  # the first record of each group
    offset = np.empty_like(before)
    offset[order] = before - before[first[group_of[order]]]
    return offset
