"""drafter=mtp: a layer for multi-token prediction that a model was published with."""

from specdec.drafters.eagle import Eagle
from specdec.heads.mtp_files import HowMTP
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.observation import Tap


class MTP(Eagle):
    """Drafts with MTP layers (DeepSeek-AI 2024), in the layouts of MiMo, Qwen3-Next and
    speculators. Layer m drafts the level m below the root's children; the last of them, which most
    models have alone, drafts all further levels from what it made itself (FastMTP, Cai et al.
    2025).

    Args, Raises: those of `HeadDrafter`; and
        path: None for the MTP layers in the target's own files.
        feedback: which state a layer hands on to the next level: normal, after its final norm, or
            hidden, before it; None for what is usual for its layout.
        layers: how many are used; None is all there are.
    """

    kind = "mtp"

    def __init__(
        self,
        *,
        path: str | None = None,
        taps: list[Tap] | None = None,
        feedback: str | None = None,
        layers: int | None = None,
        depth: int | None = None,
        candidates: int = 64,
        rope_theta: float | None = None,
        widen: bool = True,
        vocabulary: int | str | None = None,
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(
            path=path or "",
            taps=taps,
            depth=depth,
            candidates=candidates,
            rope_theta=rope_theta,
            widen=widen,
            vocabulary=vocabulary,
            quantize=quantize,
        )
        self.how = HowMTP(feedback=feedback, layers=layers)

    def _find_head(self) -> None:
        if self.path:
            super()._find_head()

    def _files(self, target: PagedLM) -> tuple[str, str]:
        if self.path:
            return super()._files(target)
        if target.path is None:
            raise ValueError(
                f"drafter.path=null: {target.name} has no files of its own; give the folder or "
                f"hub id of an MTP layer"
            )
        return target.path, "target.path"
