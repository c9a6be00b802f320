"""Identity: which run it is, whatever the folder, the hour and the machine. What has the same
identity is not decoded twice, and what differs in it is named."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from specdec.lab.fingerprints import contents_of, digest, fingerprint_of_code
from specdec.lab.prompts import Prompt
from specdec.lab.values import flat
from specdec.models.placement import Placement

IDENTITY = "identity.json"
NO_PART = (
    "out",
    "resume",
    "tracker",
    "choices",
    "baseline",
    "record",
)  # of what is decoded, or how
# Settings of prompts that only say how many; and where they lie, for prompts count one by one;
# and how long somebody waits.
GROWING = ("prompts.limit", "prompts.per_category")
UNCOUNTED = ("prompts.path", *GROWING, "target.tp_wait")
SHARE = "cache.share"  # what it has come to: a drafter may decide it
METHOD = ("drafter", "tree", "acceptance")  # groups that plain decoding does without


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes a run what it is.

    Args:
        settings: by full name, less what does not matter; `device` is its type, and what files
            they name counts by `contents`.
        contents: fingerprints of what settings name, and of the first prompt.
        code: of the package.
        prompts: fingerprint of each prompt, by its place in the set; no part of `method`, since a
            folder may grow.
    """

    settings: Mapping[str, Any]
    contents: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Names the folder of a run."""
        return digest([self.settings, self.contents, self.code])

    @property
    def baseline(self) -> str:
        """Names plain decoding of the same prompts, which no drafter, tree or rule changes."""
        return digest([*self._parts(METHOD), self.code])

    @property
    def workload(self) -> str:
        """Equal for runs that can be compared."""
        return digest(self._parts((*METHOD, "seed", SHARE)))

    def _parts(self, without: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {n: v for n, v in part.items() if not {n, n.split(".")[0]} & set(without)}
            for part in (self.settings, self.contents)
        ]

    def record(self) -> dict[str, Any]:
        """As identity.json has it."""
        parts = {"settings": self.settings, "contents": self.contents, "code": self.code}
        names = {name: getattr(self, name) for name in ("method", "baseline", "workload")}
        return {"schema": 1, **names, "parts": parts, "prompts": dict(self.prompts)}

    def differences(self, parts: Mapping[str, Any]) -> list[str]:
        """Names of what is different in the `parts` of another one's record."""
        found = []
        for kind, mine in (("", self.settings), ("contents of ", self.contents)):
            theirs = parts.get("contents" if kind else "settings", {})
            missing = object()
            found += [
                f"{kind}{name}"
                for name in sorted({*mine, *theirs})
                if mine.get(name, missing) != theirs.get(name, missing)
            ]
        return found + ["the code of specdec"] * (parts.get("code", "") != self.code)


def identity_of(
    settings: Mapping[str, Any],
    prompts: Sequence[Prompt],
    placement: Placement,
    *,
    share: bool = True,
) -> Identity:
    """Of a run that is not loaded yet, whose sequences share pages or do not.

    Raises:
        ValueError: a file that settings name cannot be read.
    """
    contents = contents_of(settings)
    parts = {name: v for name, v in settings.items() if name not in NO_PART}
    kept = flat(parts, empty=True)
    for name in (*UNCOUNTED, *contents):
        if not name.endswith("_target_"):  # a file may have several classes
            kept.pop(name, None)
    kept |= {
        "device": placement.device.type,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "kernels.impl": placement.kernels.impl,
        SHARE: share,
    }
    marks = {str(prompt.index): digest(asdict(prompt)) for prompt in prompts}
    return Identity(
        settings=json.loads(json.dumps(kept, default=str)),
        contents={**contents, "prompts": next(iter(marks.values()), "")},
        code=code(),
        prompts=marks,
    )


@cache
def code() -> str:
    """Of the files of this package that take part in a run."""
    return fingerprint_of_code(Path(__file__).parents[1], without=("experiments", "compare"))
