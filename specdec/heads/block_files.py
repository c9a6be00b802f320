"""From config.json and tensors to the configuration of a block head.

Sources: z-lab/dflash `dflash/model.py`, hao-ai-lab/JetSpec `jetflow/models/draft_head.py`,
deepseek-ai/DeepSpec `modeling/dspark`, sgl-project/SpecForge `modeling/draft/dflash.py`,
vllm-project/speculators `models/dflash` and `models/dflash2`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from typing import Any, get_args

from torch import Tensor

from specdec.heads.block import MASK_ROW, BlockConfig, BlockHead
from specdec.heads.files import CONFIG, HeadFiles, object_in
from specdec.heads.flash2 import Flash2Config
from specdec.heads.host import Host
from specdec.heads.layouts import Layout
from specdec.heads.reading import check_states, common, decoder_config, mask_token, windows_of
from specdec.heads.spark import Markov, SparkConfig
from specdec.heads.taps import settled_taps
from specdec.models.weights import BrokenFilesError
from specdec.observation import Tap

DEFAULT_BLOCK = {False: 16, True: 8}  # of raw files, of those that speculators wrote
MASK_FILE = f"{MASK_ROW}.pt"  # beside the weights of some
ZERO = 0.01  # an embedding so much shorter than others was never trained


def block_config(
    files: HeadFiles,
    layout: Layout,
    host: Host,
    *,
    taps: Sequence[Tap] | None,
    rope_theta: float | None,
) -> BlockConfig:
    """Of a head of DFlash whose mask token has the embedding of its id.

    Raises:
        ValueError: fields that are missing, or contradict tensors or target.
    """
    shapes, said = layout.shapes(files.shapes), fields(files)
    decoder = decoder_config(layout, shapes, files.name, rope_theta=rope_theta)
    where = settled_taps(files, layout, host, taps)
    columns = shapes.get("fc.weight", (0, 0))[1]
    check_states(files, host, int(said.get("target_hidden_size") or 0), columns, len(where))
    block, shifted = shape_of_block(files, layout)
    rows = shapes.get("embed_tokens.weight", tuple(host.embedding.shape))[0]
    causal, windows = _attention(files, layout, said, decoder.num_hidden_layers, block)
    softcap = number(said, "final_logit_softcapping", 0.0, files.name)
    return BlockConfig(
        **common(files, layout, host, decoder, rows),
        taps=where,
        block=block,
        mask=mask_token(said, rows, files.name),
        shifted=shifted,
        causal=causal,
        windows=windows,
        scale=number(said, "input_embedding_scale", 1.0, files.name),
        multiplier=number(said, "output_multiplier", 1.0, files.name),
        softcap=softcap if softcap > 0 else None,
    )


def spark_config(files: HeadFiles, layout: Layout, config: BlockConfig) -> SparkConfig:
    """Of a head of DSpark.

    Args:
        config: of what it has in common with DFlash.

    Raises:
        ValueError: a correction of another kind.
    """
    shapes, said = layout.shapes(files.shapes), fields(files)
    rank = int(number(said, "markov_rank", 0, files.name))
    kind = str(said.get("markov_head_type") or "vanilla").lower()
    if rank and kind not in get_args(Markov):
        raise ValueError(
            f"{files.name}: {CONFIG} asks for markov_head_type={kind}, which is none of "
            f"{', '.join(get_args(Markov))}; take another head"
        )
    columns = shapes.get("confidence_head.proj.weight", (0, 0))[1]
    return SparkConfig(
        **_common(config),
        rank=rank,
        markov=kind,  # type: ignore[arg-type]  # checked if it is of use
        confidence=bool(columns or said.get("enable_confidence_head")),
        confidence_markov=bool(rank) and columns == config.layer.hidden_size + rank,
    )


def flash2_config(files: HeadFiles, config: BlockConfig, host: Host) -> Flash2Config:
    """Of a head of DFlash 2.

    Args:
        config: of what it has in common with DFlash.

    Raises:
        ValueError: sizes out of range, or slots or tokens that its selector does not know.
    """
    said, width = fields(files), config.layer.hidden_size
    known = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256}
    sizes = {name: _count(said, name, default, files.name) for name, default in known.items()}
    choices = _count(said, "selector_top_k", 16, files.name)
    channels = sizes["conv_group_size"]
    for name, wrong, must in (
        ("conv_group_size", width % channels, f"divide its hidden_size={width}"),
        ("conv_kernel_size", sizes["conv_kernel_size"] > config.block, "fit into a block"),
        ("selector_top_k", choices > config.vocab_size, "be no more than its tokens"),
        ("sample_from_anchor", config.shifted, "be false, as a selector comes after the root"),
        ("draft_vocab_size", config.vocab_size != host.vocab_size, "be that of the target"),
    ):
        if wrong:
            raise BrokenFilesError(
                f"{files.name}: {CONFIG} has {name}={said.get(name, known.get(name))}, which must "
                f"{must} in a head of DFlash 2; take another head"
            )
    return Flash2Config(
        **_common(config),
        taps_of_convolution=sizes["conv_kernel_size"],
        channels=channels,
        rank=sizes["selector_rank"],
        choices=choices,
    )


def _common(config: BlockConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclass_fields(config)}


def fields(files: HeadFiles) -> dict[str, Any]:
    """What config.json says at its top and in dflash_config, which comes first."""
    return {**files.config, **object_in(files.config, "dflash_config", files.name)}


def shape_of_block(files: HeadFiles, layout: Layout) -> tuple[int, bool]:
    """Slots of a block, and whether each names the token after its place."""
    said = fields(files)
    block = said.get("block_size", DEFAULT_BLOCK[layout.wrapped])
    shifted = layout.shifted
    if layout.wrapped:
        shifted = bool(said.get("sample_from_anchor", layout.kind == "dspark"))
    if type(block) is not int or block < 2 - shifted:
        raise BrokenFilesError(
            f"{files.name}: {CONFIG} has block_size={block}, which must be a number of at least "
            f"{2 - shifted}; take the head's own {CONFIG}"
        )
    return block, shifted


def mask_row(files: HeadFiles, width: int) -> Tensor | None:
    """The embedding [D] of the mask token that a file of its own holds; None if there is none.

    Raises:
        ValueError: it is of another token, size or kind.
    """
    found, token = files.beside(MASK_FILE), None
    if isinstance(found, Mapping):
        token, found = found.get("mask_token_id"), found.get("embedding")
    elif found is None:
        return None
    if not isinstance(found, Tensor) or found.numel() != width or not found.isfinite().all():
        raise BrokenFilesError(
            f"{files.name}: {MASK_FILE} holds no finite embedding of {width} numbers; take that "
            f"of this head"
        )
    if token not in (None, fields(files).get("mask_token_id")):
        raise BrokenFilesError(
            f"{files.name}: {MASK_FILE} is of token {token}, and {CONFIG} has mask_token_id="
            f"{fields(files).get('mask_token_id')}; take that of this head"
        )
    return found.flatten()


def remarks_of(head: BlockHead) -> list[str]:
    """What the start of a run should say of the mask's row in the embedding."""
    config, embedding = head.config, head.embed_tokens.weight
    some = embedding[:: max(1, len(embedding) // 1000)].float().norm(dim=1).median()
    row = embedding[config.mask].float().norm()
    if config.own_mask or row > ZERO * some:
        return []
    return [f"whose mask token {config.mask} has an embedding of about zero: drafts may be poor"]


def number(said: Mapping[str, Any], field: str, default: float, name: str) -> float:
    """A field of config.json that is a finite number; `default` if it is not there."""
    found = said.get(field)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1e9:
        raise BrokenFilesError(
            f"{name}: {CONFIG} has {field}={found}, which must be a number; take the head's own "
            f"{CONFIG}"
        )
    return float(found)


def _count(said: Mapping[str, Any], field: str, default: int, name: str) -> int:
    """A field of config.json that is a number of at least 1; `default` if it is not there."""
    found = said.get(field, default)
    if type(found) is not int or found < 1:
        raise BrokenFilesError(
            f"{name}: {CONFIG} has {field}={found}, which must be a number of at least 1; take "
            f"the head's own {CONFIG}"
        )
    return found


def _attention(
    files: HeadFiles, layout: Layout, said: Mapping[str, Any], layers: int, block: int
) -> tuple[tuple[bool, ...], tuple[int | None, ...]]:
    """Of each layer whether it is causal, and its window."""
    modes = said.get("attention_modes") or [said.get("attention_mode") or "gqa"]
    other = [mode for mode in modes if mode not in ("gqa", "mha")]
    if other:
        raise ValueError(
            f"{files.name}: {CONFIG} asks for attention_mode={other[0]}, which layers of heads do "
            f"not have here; take another head"
        )
    windows = windows_of(layout.layer, layers, files.name, least=block)
    return _causal(layout, said, [one is not None for one in windows]), windows


def _causal(layout: Layout, said: Mapping[str, Any], sliding: Sequence[bool]) -> tuple[bool, ...]:
    if layout.wrapped:  # full attention is always both ways there
        both = bool(said.get("sliding_window_non_causal", layout.selects))
        return tuple(one and not both for one in sliding)
    stated = (said.get(name) for name in ("is_causal", "causal_head", "causal"))
    every = next((one for one in stated if one is not None), None)
    return tuple(bool(one if every is None else every) for one in sliding)
