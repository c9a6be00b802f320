"""Which of the target's tokens a head can name."""

import torch
from torch import Tensor

from specdec.heads.files import HeadFiles
from specdec.heads.host import Host
from specdec.models.weights import BrokenFilesError

AGAIN = "download the head again, or take another"


def names_of(files: HeadFiles, host: Host, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The target's ids of a head's tokens, by d2t, t2d or token_map.

    d2t holds differences: the target's id less the head's (SafeAILab/EAGLE `cnets.py`); token_map
    holds ids in any order (vLLM).

    Args:
        count: VD, tokens the head can name.

    Returns:
        ([VD] int64, ascending, None if they are the target's own; [VD] int64, which row of the
        files' output matrix each has, None if they are in order.)

    Raises:
        ValueError: ids that the target does not have, that repeat, or that contradict each other.
    """
    keys = {bare: key for bare in ("d2t", "t2d", "token_map") if (key := _key(files, bare))}
    order: Tensor | None = None
    if "d2t" in keys:
        names, said = _by_differences(files, keys, host, count), "d2t"
    elif "token_map" in keys:
        names, order = files.read(keys["token_map"]).long().sort()
        said = "token_map"
    elif "t2d" in keys:
        names, said = files.read(keys["t2d"]).bool().nonzero()[:, 0], "t2d"
    elif count == host.vocab_size:
        return None, None
    else:
        raise BrokenFilesError(
            f"{files.name}: names {count} tokens and has no d2t that says which of the "
            f"{host.vocab_size} of {host.name} they are; it is incomplete, or belongs to another "
            f"target"
        )
    _check(files, host, names, count, said)
    return (None if count == host.vocab_size else names), order


def _by_differences(files: HeadFiles, keys: dict[str, str], host: Host, count: int) -> Tensor:
    found = files.read(keys["d2t"]).long()
    if found.shape != (count,):
        raise BrokenFilesError(
            f"{files.name}: {files.file_of(keys['d2t'])} holds d2t of shape {list(found.shape)}, "
            f"and its output head names {count} tokens; {AGAIN}"
        )
    names = found + torch.arange(count)
    if "t2d" in keys:
        listed = files.read(keys["t2d"]).bool().nonzero()[:, 0]
        if not torch.equal(listed, names):
            raise BrokenFilesError(
                f"{files.name}: d2t (the target's id of each of its tokens less its own) and t2d "
                f"name different tokens; {AGAIN}"
            )
    elif count < host.vocab_size and not bool(found.any()):
        raise BrokenFilesError(
            f"{files.name}: d2t is all zero and there is no t2d: nothing says which tokens of "
            f"{host.name} its {count} are; {AGAIN}"
        )
    return names


def _check(files: HeadFiles, host: Host, names: Tensor, count: int, said: str) -> None:
    if names.shape != (count,):
        raise BrokenFilesError(
            f"{files.name}: {said} names {len(names)} tokens, and its output head {count}; {AGAIN}"
        )
    if not bool((names.diff() > 0).all()):
        raise BrokenFilesError(
            f"{files.name}: {said} does not make ids that ascend; its file is broken: {AGAIN}"
        )
    if count and not 0 <= int(names[0]) <= int(names[-1]) < host.vocab_size:
        raise BrokenFilesError(
            f"{files.name}: {said} makes ids {int(names[0])} to {int(names[-1])}, and {host.name} "
            f"has {host.vocab_size}: this head belongs to another target"
        )


def _key(files: HeadFiles, bare: str) -> str | None:
    prefixes = ("", "model.", "medusa_heads.")
    return next((p + bare for p in prefixes if p + bare in files.shapes), None)
