"""drafter=mtp: a layer for multi-token prediction that a model was published with."""

from specdec.drafters.eagle import Eagle
from specdec.heads.mtp_files import HANDED_ON
from specdec.models.paged import PagedLM
from specdec.observation import Tap


class MTP(Eagle):
    """Drafts with an MTP layer (DeepSeek-AI 2024), in the layouts of MiMo, Qwen3-Next and
    speculators. It was trained for the token after next, and drafts deeper ones by reading what it
    made itself (FastMTP, Cai et al. 2025).

    Args, Raises: those of `HeadDrafter`; and
        path: None for the MTP layer in the target's own files.
        feedback: which state it hands on to its next depth: normal, after its final norm, or
            hidden, before it; None for what is usual for its layout.
    """

    kind = "mtp"

    def __init__(
        self,
        *,
        path: str | None = None,
        taps: list[Tap] | None = None,
        feedback: str | None = None,
        depth: int | None = None,
        candidates: int = 64,
        rope_theta: float | None = None,
        widen: bool = True,
    ) -> None:
        super().__init__(
            path=path or "",
            taps=taps,
            depth=depth,
            candidates=candidates,
            rope_theta=rope_theta,
            widen=widen,
        )
        if feedback not in HANDED_ON:
            raise ValueError(f"drafter.feedback={feedback}: must be normal, hidden or null")
        self.feedback = feedback

    def find(self) -> None:
        if self.path:
            super().find()

    def _files(self, target: PagedLM) -> tuple[str, str]:
        if self.path:
            return super()._files(target)
        if target.path is None:
            raise ValueError(
                f"drafter.path=null: {target.name} has no files of its own; give the folder or "
                f"hub id of an MTP layer"
            )
        return target.path, "target.path"
