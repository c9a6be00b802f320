"""load_head: a published head, in whatever layout, for a target.

Every tensor of the files is used or known to be of no use, and every one that the head computes
with is there, of the shape that follows from config.json and target, and finite. Whatever is
wrong is one line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.block import MASK_ROW, BlockHead
from specdec.heads.block_files import (
    block_config,
    flash2_config,
    mask_row,
    remarks_of,
    shape_of_block,
    spark_config,
)
from specdec.heads.files import HeadFiles, find_head
from specdec.heads.filling import EMBEDDING, OUTPUT, fill
from specdec.heads.flash2 import Flash2Head
from specdec.heads.host import Host
from specdec.heads.layered import LayeredHead
from specdec.heads.layouts import BLOCK_KINDS, EAGLE3_KINDS, Layout, recognise
from specdec.heads.medusa import MedusaHeads
from specdec.heads.medusa_files import counts, medusa_config
from specdec.heads.mtp_files import HowMTP, fold, handed_on, mtp_config, unfold
from specdec.heads.narrow import narrow
from specdec.heads.parallel import ParallelHead
from specdec.heads.quantised import quantise_head
from specdec.heads.reading import eagle3_config, eagle_config, parallel_config, unstated
from specdec.heads.recurrent import Eagle3Head, EagleHead, MTPHead
from specdec.heads.spark import SparkHead
from specdec.heads.verifier import check_verifier
from specdec.heads.widen import moved, widen
from specdec.models.load import find_model
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Tap

__all__ = ["check_whole", "find_head", "levels_of", "load_head"]

RECURRENT: dict[str, tuple[Any, Any]] = {
    "eagle3": (eagle3_config, Eagle3Head),
    "peagle": (parallel_config, ParallelHead),
    "eagle": (eagle_config, EagleHead),
}
# Of a state_dict: MTP layers share the output matrix of the first.
NOT_READ = re.compile(r"names|(later\.\d+\.)?embed_tokens\.weight|later\.\d+\.lm_head\.\w+")
FLAGS = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "norms",
    "tied",
    "shifted",
    "own_mask",
    "confidence",
)


def load_head(
    path: str,
    target: PagedLM,
    *,
    kinds: Sequence[str],
    setting: str = "drafter.path",
    taps: Sequence[Tap] | None = None,
    rope_theta: float | None = None,
    how: HowMTP | None = None,
    widened: bool = True,
    vocabulary: int | str | None = None,
    quantize: Quantize = "none",
) -> nn.Module:
    """A head on the target's device and in its type, in evaluation mode and without gradients.

    Args:
        path: folder, hub id or zoo:NAME.
        kinds: of `layouts.Kind`, those that the drafter can run.
        setting: the option that gave `path`, for messages.
        taps: which states of the target it reads, instead of what its files say.
        rope_theta: base of its rotary angles, instead of the files'.
        how: of MTP layers; None leaves it to the files.
        widened: whether a stand-in's head, of its small model, gets the size of published ones.
        vocabulary: which tokens it may name, as of `narrow`; None is all that it can.
        quantize: fp8 quantises its weights, as `quantise_head` does.

    Returns:
        The head, with `description`, a line for the start of a run.

    Raises:
        ValueError: no head, one of another kind or target, or broken files: one line that names
            setting, file, tensor and the likely reason.
    """
    files = HeadFiles(path, setting)
    layout = _asked_for(files, kinds)
    small = _is_of_small(files, layout, target, widened)
    host = Host.small(target) if small else Host.of(target)
    remarks = check_verifier(files, host) + unstated(files, layout)
    head: Any = _made(files, layout, host, how or HowMTP(), taps=taps, rope_theta=rope_theta)
    if small:
        remarks.append(f"widened from {head.width}" if widened else "not widened")
        head = widen(head, target, setting=files.name) if widened else moved(head, target)
        host = Host.of(target)
    narrow(head, vocabulary, host, name=files.name)
    kept = [] if quantize == "none" else [quantise_head(head, host)]
    head.description = ", ".join([*_facts(head, layout, host, kept), *remarks])
    ready: nn.Module = head.eval().requires_grad_(False)
    return ready


def _asked_for(files: HeadFiles, kinds: Sequence[str]) -> Layout:
    """How a head is laid out that is of one of these kinds.

    Raises:
        ValueError: it is of another.
    """
    layout = recognise(files.shapes, files.config, files.name)
    if layout.kind not in kinds:
        raise _another(files, layout, " or ".join(kinds))
    return layout


def _another(files: HeadFiles, layout: Layout, wanted: str) -> ValueError:
    setting, _, path = files.name.partition("=")
    mend = f"{'method' if setting == 'method.path' else 'drafter'}={layout.kind}"
    if setting == "target.path":
        mend += f" drafter.path={path}, and the model that it was made for as the target"
    return ValueError(
        f"{files.name}: is a head of kind {layout.kind} ({layout.label}), and {wanted} is asked "
        f"for; use {mend}"
    )


def check_whole(path: str, setting: str) -> None:
    """Find a model that is none of the heads, as far as that is known before it is loaded.

    Raises:
        ValueError: no such built-in model, stand-in or folder, or it holds a head alone.
    """
    if not Path(find_model(path, setting=setting)).is_dir():
        return
    try:
        files = HeadFiles(path, setting)
        layout = recognise(files.shapes, files.config, files.name)
    except ValueError:  # no head; what is wrong with a model, loading tells
        return
    its = {key for of_layer in (layout.files, *layout.later) for key in of_layer.values()}
    if not any("layers.0.mlp." in key for key in files.shapes.keys() - its):
        raise _another(files, layout, "a whole model")


def levels_of(path: str, kinds: Sequence[str], setting: str = "drafter.path") -> int | None:
    """How many levels the head in a folder has answers for; None if it goes on, or if that is not
    known before it is loaded.

    Raises:
        ValueError: broken files, no head, or one of another kind.
    """
    if not Path(find_head(path, setting)).is_dir():
        return None
    files = HeadFiles(path, setting)
    layout = _asked_for(files, kinds)
    if layout.kind == "medusa":
        return counts(layout)[0]
    if layout.kind in BLOCK_KINDS:
        block, shifted = shape_of_block(files, layout)
        return block - (not shifted)
    return None


def _is_of_small(files: HeadFiles, layout: Layout, target: PagedLM, widened: bool) -> bool:
    """Whether it is a head of the small model that a stand-in was made of.

    Raises:
        ValueError: it is not, and was not to be widened.
    """
    standin = target.standin
    if standin is not None and _state_size(files, layout) == standin.small.hidden_size:
        return True
    if not widened:
        raise ValueError(
            f"drafter.widen=false: {files.name} is no head of the small model of a stand-in, and "
            f"{target.name} runs it as it is; leave out drafter.widen"
        )
    return False


def _state_size(files: HeadFiles, layout: Layout) -> int:
    """Numbers of a state of its target, if the files are as they should be."""
    stated = files.config.get("target_hidden_size") or layout.layer.get("hidden_size")
    if layout.kind == "medusa":
        stated = layout.shapes(files.shapes).get("blocks.0.0.weight", (0,))[0]
    return stated if isinstance(stated, int) else 0


def _made(
    files: HeadFiles, layout: Layout, host: Host, how: HowMTP, *, taps: Any, **said: Any
) -> nn.Module:
    """The head, of the host's own size; `taps` and what else is `said` as of `load_head`."""
    if layout.kind == "medusa":
        return _medusa(files, layout, host, taps)
    if layout.kind == "mtp":
        return _mtp(files, layout, host, how, taps=taps, **said)
    make = _block if layout.kind in BLOCK_KINDS else _recurrent
    return make(files, layout, host, taps=taps, **said)


def _recurrent(files: HeadFiles, layout: Layout, host: Host, **said: Any) -> LayeredHead:
    read, kind = RECURRENT[layout.kind]
    config = read(files, layout, host, **said)
    with torch.device("meta"):
        head: Any = kind(config)
    if layout.kind == "eagle":
        head.one = torch.ones(head.width, dtype=host.dtype, device=host.device)
    unused = () if getattr(config, "fc", True) else ("fc.weight",)
    return _filled(head, files, layout, host, {}, unused)


def _mtp(files: HeadFiles, layout: Layout, host: Host, how: HowMTP, **said: Any) -> LayeredHead:
    config = mtp_config(files, layout, host, how=how, **said)
    heads: list[Any] = []
    shared: dict[str, Tensor] = {}
    for each in how.chosen(layout, files.name):
        with torch.device("meta"):
            head: Any = MTPHead(config)
        head.one = torch.ones(head.width, dtype=host.dtype, device=host.device)
        unfold(head)
        _filled(head, files, each, host, shared, ())
        fold(head, layout)
        heads.append(head)
        shared = {EMBEDDING: head.embed_tokens.weight, OUTPUT: head.lm_head.weight}
    first: LayeredHead = heads[0]
    heads[0].later.extend(heads[1:])
    return first


def _block(files: HeadFiles, layout: Layout, host: Host, **said: Any) -> LayeredHead:
    config = block_config(files, layout, host, **said)
    row = mask_row(files, config.layer.hidden_size)
    config = replace(config, own_mask=row is not None)
    with torch.device("meta"):
        if layout.kind == "dspark":
            head: BlockHead = SparkHead(spark_config(files, layout, config))
        elif layout.selects:
            head = Flash2Head(flash2_config(files, config, host))
        else:
            head = BlockHead(config)
    own = {} if row is None else {MASK_ROW: row.to(host.device, host.dtype)}
    return _filled(head, files, layout, host, own, ())


def _filled(
    head: Any,
    files: HeadFiles,
    layout: Layout,
    host: Host,
    lent: Mapping[str, Tensor],
    unused: Sequence[str],
) -> LayeredHead:
    """A head with layers whose parameters have no memory yet, with what its files and the target
    give; the target's matrices besides `lent`."""
    config = head.config
    head.rotary = head.turning().to(host.device)
    theirs = {EMBEDDING: host.embedding} if head.width == host.state_size else {}
    theirs |= _lent_output(files, layout, host, config)
    fill(
        head, files, layout, host, count=config.vocab_size, lent={**theirs, **lent}, unused=unused
    )
    made: LayeredHead = head
    return made


def _lent_output(files: HeadFiles, layout: Layout, host: Host, config: Any) -> dict[str, Tensor]:
    """The target's output matrix, where the head may do with it. A head of EAGLE-3 that lost its
    own would not be noticed (sglang#27908), so that its config.json must say so."""
    said = files.config.get("draft_vocab_size", 0) is None  # SGLang takes the target's then
    may = layout.kind not in EAGLE3_KINDS or said
    if config.layer.hidden_size != host.state_size or not may or "d2t" in layout.files:
        return {}
    if host.output_bias and OUTPUT not in layout.files:
        raise ValueError(
            f"{files.name}: uses the output head of {host.name}, which adds a bias that heads do "
            f"not; take another head or target"
        )
    return {OUTPUT: host.output}


def _medusa(
    files: HeadFiles, layout: Layout, host: Host, taps: Sequence[Tap] | None
) -> MedusaHeads:
    config = medusa_config(files, layout, host, taps=taps)
    with torch.device("meta"):
        head = MedusaHeads(config)
    repeated = {
        key for key in layout.files if config.shared and key.startswith("blocks.")
    } - head.state_dict().keys()
    lent = {OUTPUT: host.output} if config.tied else {}
    fill(head, files, layout, host, count=config.vocab_size, lent=lent, unused=repeated)
    return head


def _facts(head: Any, layout: Layout, host: Host, kept: list[str]) -> list[str]:
    """Layout, layers, taps, tokens, flags, how weights are kept, and sizes."""
    config = head.config
    weights = {k: w for k, w in head.state_dict().items() if not NOT_READ.fullmatch(k)}
    theirs = {host.embedding.data_ptr(), host.output.data_ptr()}
    sizes = {k: w.numel() for k, w in weights.items() if not k.endswith(".scale")}
    own = sum(size for k, size in sizes.items() if weights[k].data_ptr() not in theirs)
    once = ("fc.", "fc_norm.", "input_norm.") if layout.kind == "eagle3" else ()
    level, per = sum(w.nbytes for k, w in weights.items() if not k.startswith(once)), "step"
    if layout.kind == "medusa":
        size = f"{config.heads} heads of {config.blocks} block{'s' * (config.blocks != 1)}"
    else:
        count = config.layer.num_hidden_layers + len(getattr(head, "later", ()))
        size = f"{count} layer{'s' * (count > 1)} of {head.width}"
        if isinstance(head, BlockHead):
            size += f", blocks of {config.block}"
        elif layout.kind != "peagle":
            per = "level"
    facts = [
        f"{layout.label}: {size}",
        f"states {' '.join(map(str, config.taps))} of {host.layers}",
        f"{config.vocab_size:,} of {host.vocab_size:,} tokens",
        *(flag for flag in FLAGS if getattr(config, flag, False)),
    ]
    if isinstance(head, MTPHead):
        facts[3:] = handed_on(head)
    if layout.kind != "medusa":
        rope = config.layer.rope_parameters
        kind = "" if rope["rope_type"] == "default" else f" {rope['rope_type']}"
        facts.append(f"rope{kind} {rope['rope_theta']:,g}")
        facts.append(f"{config.layer.max_position_embeddings:,} positions")
    reach = sorted({window for window in getattr(config, "windows", ()) if window})
    facts += [f"windows of {' '.join(map(str, reach))}"] * bool(reach)
    facts += [f"{_short(own)} parameters", *kept, f"{_short(level)}B read per {per}"]
    return facts + (remarks_of(head) if isinstance(head, BlockHead) else [])


def _short(number: float) -> str:
    """With three digits and a prefix."""
    for prefix in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} G"
