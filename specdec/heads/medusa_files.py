"""From the tensors of Medusa heads to their configuration. config.json is not asked how many there
are: published ones say 2 where the files hold 5."""

from collections.abc import Sequence

from specdec.heads.files import HeadFiles
from specdec.heads.host import Host
from specdec.heads.layouts import Layout
from specdec.heads.medusa import MedusaConfig
from specdec.heads.taps import settled_taps
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap


def medusa_config(
    files: HeadFiles, layout: Layout, host: Host, *, taps: Sequence[Tap] | None
) -> MedusaConfig:
    """Of heads in any layout.

    Raises:
        ValueError: heads that differ, or are made for another target.
    """
    shapes = layout.shapes(files.shapes)
    heads, blocks = counts(layout)
    outputs = sum(key.startswith("lm_heads.") for key in shapes)
    if not heads:
        raise BrokenFilesError(f"{files.name}: {files.file_of('')} holds no block of a head")
    size = shapes.get("blocks.0.0.weight", (0,))[0]
    if size != host.state_size:
        raise ValueError(
            f"{files.name}: reads states of {size} numbers, and those of {host.name} have "
            f"{host.state_size}: these heads belong to another target"
        )
    where = settled_taps(files, layout, host, taps)
    if len(where) != 1:
        raise ValueError(f"{files.name}: Medusa heads read one state; give drafter.taps one")
    vocabulary = host.vocab_size
    if "token_map" in shapes:
        vocabulary = shapes["token_map"][0]
    return MedusaConfig(
        heads=heads,
        blocks=blocks,
        state_size=size,
        vocab_size=vocabulary,
        taps=where,
        bias="blocks.0.0.bias" in shapes,
        tied=not outputs,
        shared=blocks > 1 and _one_block(files, layout, heads, blocks),
    )


def counts(layout: Layout) -> tuple[int, int]:
    """Heads, and blocks of each."""
    places = [key.split(".") for key in layout.files if key.startswith("blocks.")]
    heads, blocks = (1 + max((int(place[i]) for place in places), default=-1) for i in (1, 2))
    return heads, blocks


def _one_block(files: HeadFiles, layout: Layout, heads: int, blocks: int) -> bool:
    """Whether each head's blocks are the same numbers: Medusa's code repeats one module."""
    for head in range(heads):
        keys = [layout.files.get(f"blocks.{head}.{block}.weight") for block in range(blocks)]
        known = [key for key in keys if key is not None]
        first = files.read(known[0])
        if len(known) < blocks or not all(first.equal(files.read(key)) for key in known[1:]):
            return False
    return True
