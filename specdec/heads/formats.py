"""load_head: a published head, in whatever layout, for a target.

Every tensor of the files is used or known to be of no use, and every one that the head computes
with is there, of the shape that follows from config.json and target, and finite. Whatever is
wrong is one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.heads.files import HeadFiles, find_head
from specdec.heads.layouts import IGNORED as IGNORED
from specdec.heads.layouts import Layout, recognise
from specdec.heads.reading import eagle3_config
from specdec.heads.recurrent import Eagle3Config, Eagle3Head, RecurrentHead
from specdec.models.paged import PagedLM
from specdec.models.weights import BrokenFilesError, more, not_finite
from specdec.observation import Tap

__all__ = ["Host", "find_head", "load_head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """What a head needs to know of its target.

    Args:
        name: for messages.
        layers, state_size, vocab_size: n, H and V.
        embedding, output: [V or more, H] and [V, H], the target's own.
        architecture: its class in transformers.
    """

    name: str
    layers: int
    state_size: int
    vocab_size: int
    embedding: Tensor
    output: Tensor
    architecture: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, target: PagedLM) -> Self:
        """The target itself."""
        return cls(
            name=target.name,
            layers=target.layers,
            state_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            embedding=target.model.get_input_embeddings().weight.detach(),
            output=target.model.get_output_embeddings().weight.detach(),
            architecture=type(target.model).__name__,
            device=target.device,
            dtype=target.dtype,
        )


def load_head(
    path: str,
    target: PagedLM,
    *,
    kinds: Sequence[str],
    setting: str = "drafter.path",
    taps: Sequence[Tap] | None = None,
    rope_theta: float | None = None,
) -> nn.Module:
    """A head on the target's device and in its type, in evaluation mode and without gradients.

    Args:
        path: folder, hub id or zoo:NAME.
        kinds: of "eagle3", "eagle", "medusa", those that the drafter can run.
        setting: the option that gave `path`, for messages.
        taps: which states of the target it reads, instead of what its files say.
        rope_theta: base of its rotary angles, instead of the files'.

    Returns:
        The head, with `description`, a line for the start of a run.

    Raises:
        ValueError: no head, one of another kind or target, or broken files: one line that names
            setting, file, tensor and the likely reason.
    """
    files = HeadFiles(path, setting)
    layout = recognise(files.shapes, files.config, files.name)
    if layout.kind not in kinds:
        raise ValueError(
            f"{files.name}: is a head of kind {layout.kind} ({layout.label}), not "
            f"{' or '.join(kinds)}; use drafter={layout.kind}"
        )
    host = Host.of(target)
    config = eagle3_config(files, layout, host, taps=taps, rope_theta=rope_theta)
    head = _empty(config, host)
    names = _names(files, host, config.vocab_size)
    _fill(head, files, layout, host)
    if names is not None:
        head.names = names.to(host.device)
    head.description = _describe(head, layout, host)
    return head.eval().requires_grad_(False)


def _empty(config: Eagle3Config, host: Host) -> RecurrentHead:
    """A head without memory, but for what is computed of its configuration."""
    with torch.device("meta"):
        head = Eagle3Head(config)
    head.rotary = LlamaRotaryEmbedding(config.layer).to(host.device)
    return head


def _fill(head: nn.Module, files: HeadFiles, layout: Layout, host: Host) -> None:
    """Hold the tensors of the files against what the head needs, then read them.

    Raises:
        ValueError: one is missing, left over, of another shape or not finite.
    """
    wanted = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    theirs = layout.files
    theirs.pop("d2t", None)
    if "embed_tokens.weight" not in theirs:
        wanted.pop("embed_tokens.weight")
    _check_names(wanted, files, theirs)
    _check_shapes(wanted, files, theirs, host)
    read = {ours: files.read(their, host.device).to(host.dtype) for ours, their in theirs.items()}
    bad = not_finite(read)
    if bad:
        key = theirs[bad[0]]
        raise BrokenFilesError(
            f"{files.name}: {files.file_of(key)} gives {key}{more(bad)} values that are NaN or "
            f"infinite in {str(host.dtype).removeprefix('torch.')}; take other weights, or "
            f"another dtype if they are finite there"
        )
    own = read.get("embed_tokens.weight")
    if own is None or (own.shape == host.embedding.shape and torch.equal(own, host.embedding)):
        read["embed_tokens.weight"] = host.embedding
    head.load_state_dict(read, strict=True, assign=True)


def _check_names(wanted: dict[str, Any], files: HeadFiles, theirs: dict[str, str]) -> None:
    missing = sorted(wanted.keys() - theirs.keys())
    unknown = sorted(their for ours, their in theirs.items() if ours not in wanted)
    if missing:
        instead = f", but {unknown[0]}{more(unknown)} instead" if unknown else ""
        raise BrokenFilesError(
            f"{files.name}: {files.file_of('')} has no {missing[0]}{more(missing)}, which a head "
            f"with this config.json computes with{instead}; download both again"
        )
    if unknown:
        raise BrokenFilesError(
            f"{files.name}: {files.file_of(unknown[0])} holds {unknown[0]}{more(unknown)}, for "
            f"which a head with this config.json has no use; it would compute something else "
            f"without it"
        )


def _check_shapes(
    wanted: dict[str, tuple[int, ...]], files: HeadFiles, theirs: dict[str, str], host: Host
) -> None:
    for ours, shape in wanted.items():
        there = files.shapes[theirs[ours]]
        if there != shape:
            raise BrokenFilesError(
                f"{files.name}: {files.file_of(theirs[ours])} holds {theirs[ours]} of shape "
                f"{list(there)}, and with this config.json and {host.name} it must be "
                f"{list(shape)}; config.json, weights and target do not belong together"
            )


def _names(files: HeadFiles, host: Host, count: int) -> Tensor | None:
    """[VD] the target's ids of the head's tokens, of which files have the differences.

    Raises:
        ValueError: ids that the target does not have, that are not ascending, or that t2d denies.
    """
    if "d2t" not in files.shapes:
        if count != host.vocab_size:
            raise BrokenFilesError(
                f"{files.name}: names {count} tokens and has no d2t that says which of the "
                f"{host.vocab_size} of {host.name} they are; it belongs to another target"
            )
        return None
    if files.shapes["d2t"] != (count,):
        raise BrokenFilesError(
            f"{files.name}: {files.file_of('d2t')} holds d2t of shape "
            f"{list(files.shapes['d2t'])}, and its output head names {count} tokens; {_AGAIN}"
        )
    names = files.read("d2t").long() + torch.arange(count)
    said = f"{files.name}: d2t, the target's id of each of its tokens less its own,"
    if not bool((names.diff() > 0).all()):
        raise BrokenFilesError(f"{said} does not make ascending ids; {_AGAIN}")
    if count and not 0 <= int(names[0]) <= int(names[-1]) < host.vocab_size:
        raise BrokenFilesError(
            f"{said} makes ids {int(names[0])} to {int(names[-1])}, and {host.name} has "
            f"{host.vocab_size}: it belongs to another target"
        )
    if "t2d" in files.shapes:
        listed = files.read("t2d").bool().nonzero()[:, 0]
        if not torch.equal(listed, names):
            raise BrokenFilesError(f"{said} and t2d name different tokens; {_AGAIN}")
    return names


_AGAIN = "download the head again, or take another"


def _describe(head: RecurrentHead, layout: Layout, host: Host) -> str:
    """Layout, layers, taps, tokens, flags and sizes."""
    config = head.config
    own = [key for key in head.state_dict() if key not in ("embed_tokens.weight", "names")]
    sizes = {key: head.get_parameter(key) for key in own}
    level = sum(x.nbytes for key, x in sizes.items() if not key.startswith(("fc", "input_norm")))
    flags = [
        flag
        for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "norms")
        if getattr(config, flag, False)
    ]
    layers = config.layer.num_hidden_layers
    return ", ".join(
        [
            f"{layout.label}: {layers} layer{'s' * (layers > 1)} of {head.width}",
            f"states {' '.join(map(str, config.taps))} of {host.layers}",
            f"{config.vocab_size:,} of {host.vocab_size:,} tokens",
            *flags,
            f"{sum(x.numel() for x in sizes.values()) / 1e6:,.1f} M parameters",
            f"{level / 1e6:,.1f} MB read per level",
        ]
    )
