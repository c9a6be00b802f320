"""Tensors of files into a head: every one is held against what the head computes with, and read
once."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from specdec.heads.files import CONFIG, HeadFiles
from specdec.heads.host import Host
from specdec.heads.layouts import Layout
from specdec.heads.vocabulary import names_of
from specdec.models.weights import BrokenFilesError, more, not_finite

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
MAPS = ("d2t", "token_map")
OF_TARGET = (
    "fc.",
    "mask_hidden",
    "fc_norm.",
    "input_norm.",
    EMBEDDING,
    OUTPUT,
)  # their shapes tell the target
BOTH = f"{CONFIG} and weights must be of one head: download both again"


def fill(
    head: nn.Module,
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    count: int,
    lent: Mapping[str, Tensor],
    unused: Iterable[str] = (),
) -> None:
    """Read a head's tensors, which have no memory yet, and set its `names`.

    Args:
        count: VD, tokens that it can name.
        lent: the target's, for those that the files may lack.
        unused: names here of those that they may hold for nothing.

    Raises:
        ValueError: one is missing, left over, of another type or shape, or not finite.
    """
    names, order = names_of(files, host, count)
    theirs = {o: t for o, t in layout.files.items() if o not in MAPS and o not in unused}
    wanted = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    own = {key: shape for key, shape in wanted.items() if key in theirs or key not in lent}
    _check_names(own, files, theirs)
    _check_shapes(own, files, theirs, host, cut=order is not None)
    device = host.device
    read = {o: files.read(t, device).to(host.dtype) for o, t in theirs.items()}
    bad = not_finite(read)
    if bad:
        key = theirs[bad[0]]
        raise BrokenFilesError(
            f"{files.name}: {files.file_of(key)} gives {key}{more(bad)} values that are NaN or "
            f"infinite in {str(host.dtype).removeprefix('torch.')}; take other weights, or "
            f"another dtype if they are finite there"
        )
    outputs = [key for key in wanted if key.startswith("lm_head")]
    for key in wanted:
        if key not in read:
            read[key] = lent[key]
        if order is not None and names is not None and key in outputs:
            rows = names if len(read[key]) == host.vocab_size else order
            read[key] = read[key].index_select(0, rows.to(device))
        alike = {EMBEDDING: host.embedding, OUTPUT: host.output}.get(key)
        if alike is not None and read[key] is not alike and torch.equal(read[key], alike):
            read[key] = alike  # kept once
    head.load_state_dict(read, strict=True, assign=True)
    if names is not None:
        head.names = names.to(device)


def _check_names(
    wanted: Mapping[str, tuple[int, ...]], files: HeadFiles, theirs: Mapping[str, str]
) -> None:
    missing = sorted(wanted.keys() - theirs.keys())
    unknown = sorted(their for ours, their in theirs.items() if ours not in wanted)
    if missing:
        instead = f", but {unknown[0]}{more(unknown)} instead" if unknown else ""
        raise BrokenFilesError(
            f"{files.name}: {files.file_of('')} has no {missing[0]}{more(missing)}, which a head "
            f"with this {CONFIG} computes with{instead}; {BOTH}"
        )
    if unknown:
        raise BrokenFilesError(
            f"{files.name}: {files.file_of(unknown[0])} holds {unknown[0]}{more(unknown)}, for "
            f"which a head with this {CONFIG} has no use; {BOTH}"
        )


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    files: HeadFiles,
    theirs: Mapping[str, str],
    host: Host,
    *,
    cut: bool,
) -> None:
    """`cut`: output matrices may have a row for each of the target's tokens."""
    for ours, shape in wanted.items():
        key = theirs[ours]
        there = files.shapes[key]
        whole = cut and ours.startswith("lm_head") and there == (host.vocab_size, shape[1])
        if there != shape and not whole:
            other = f"this head belongs to another target than {host.name}"
            raise BrokenFilesError(
                f"{files.name}: {files.file_of(key)} holds {key} of shape {list(there)}, and it "
                f"must be {list(shape)}: {other if ours.startswith(OF_TARGET) else BOTH}"
            )
        type_ = files.types[key]
        if not type_.is_floating_point or type_.itemsize < 2:
            kind = str(type_).removeprefix("torch.")
            raise BrokenFilesError(
                f"{files.name}: {files.file_of(key)} holds {key} as {kind}; quantised heads are "
                f"not read: take the head in bfloat16, float16 or float32"
            )
