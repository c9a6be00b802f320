"""Recording: the target decodes plainly, and what it and a drafter say of every next token is
kept. Both do what they do in a run: the drafter drafts one node a step from its candidates, of
which nothing is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.lab.build import imported
from specdec.lab.conversations import Conversations
from specdec.lab.experiment import Experiment
from specdec.lab.method import Method
from specdec.lab.prompts import Prompt
from specdec.lab.session import OurSession
from specdec.protocols import AcceptanceRule, Growth, StepContext, TreePolicy
from specdec.replay.record import CANDIDATES, FINISHES, WIDEST, Arrays
from specdec.sampling import SamplingParams, filtered
from specdec.tree import Acceptance, Children, TokenTree

# Whose law depends on where a step begins as well.
HEADS = ("eagle3", "eagle", "peagle", "mtp", "medusa", "dflash", "dspark")
LEVELS = 8  # of what is recorded of them, if their depth is open
RECORDED = ("small_llama", "translated", "early_exit")  # whose law depends on the tokens alone
SEARCHING = ("ngram", "pld", "retriever", "rest", "suffix_decoding")  # functions of the tokens
Row = tuple[NDArray[Any], ...]


def check_drafter(name: str) -> None:
    """Raise ValueError for a drafter whose drafts along a text are not known from the text."""
    if name in (*RECORDED, *HEADS, *SEARCHING, "none"):
        return
    raise ValueError(
        f"drafter={name}: what it drafts depends on more than the tokens of a text, so a record "
        f"cannot answer for it; use one of {', '.join((*RECORDED, *HEADS, *SEARCHING))}, or run it"
    )


class OneNode(TreePolicy):
    """A node, and as many candidates as a record holds; with `none`, nothing. Of heads `budget`
    levels."""

    def __init__(self, *, budget: int = 1) -> None:
        super().__init__(budget=budget, children="top_k")

    def levels(self, depth: int | None) -> int:
        return self.budget

    def width(self, level: int) -> int:
        return CANDIDATES

    def select(self, at: Growth, scores: Tensor) -> Tensor:
        return (torch.arange(scores.shape[2], device=scores.device) == 0).expand_as(scores)


@dataclass
class Watch(AcceptanceRule):
    """Keeps nothing of a tree, goes on as plain decoding does, and takes down what is said of the
    next token.

    Args:
        plain: the rule of plain decoding.
        sampling: how tokens are chosen.
        rows: by request, what was seen of each of its tokens.
        texts: by request, what is to be said instead; {} where the target chooses.
        along: the drafter, of heads.
    """

    plain: AcceptanceRule
    sampling: SamplingParams
    rows: dict[int, list[Row]] = field(default_factory=dict)
    texts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    along: Any = None
    drafts: dict[int, list[Tensor]] = field(default_factory=dict)  # of heads, the newest first
    needs_proposal = True
    name = "watch"

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return None

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        own = self.plain.accept(context, TokenTree.roots(tree.tokens[:, 0]), logits[:, :1])
        chosen = self._told(context, own.next_token)
        self._note(context, tree, logits[:, 0], chosen)
        path = torch.zeros(
            len(tree.tokens), tree.depth + 1, dtype=torch.int64, device=logits.device
        )
        return Acceptance(path=path, length=own.length, next_token=chosen)

    def _told(self, context: StepContext, own: Tensor) -> Tensor:
        """[B] the next tokens: of the texts, where there are some."""
        if not self.texts:
            return own
        found = []
        for sequence in context.sequences:
            text = self.texts[sequence.request.id]
            place = len(self.rows.get(sequence.request.id, ()))
            found.append(text[place] if place < len(text) else 0)
        return torch.tensor(found, dtype=own.dtype, device=own.device)

    def _note(self, context: StepContext, tree: TokenTree, logits: Tensor, chosen: Tensor) -> None:
        law = replace(self.sampling, temperature=1.0) if self.sampling.greedy else self.sampling
        if self.sampling.greedy:
            law = replace(law, top_k=None, top_p=None, min_p=None)
        logs = filtered(logits, law).double().log_softmax(-1)  # [B, V]
        width = min(WIDEST, logs.shape[1])
        best = logs.topk(width)
        rest = logs.exp().scatter(1, best.indices, 0.0).sum(-1).log()
        own = logs.gather(1, chosen[:, None])[:, 0]
        found = [best.indices.int(), best.values.float(), rest.float(), own.float()]
        if tree.proposal is not None:
            ids, probs = tree.proposal.ids[:, 0], tree.proposal.probs[:, 0]
            found += [ids.int(), probs.double().log().float(), logs.gather(1, ids).float()]
        if self.along is not None and self.along.texts:
            found += self._depths(context, logs)
        host = [one.cpu().numpy() for one in found]
        for row, sequence in enumerate(context.sequences):
            self.rows.setdefault(sequence.request.id, []).append(tuple(one[row] for one in host))

    def _depths(self, context: StepContext, logs: Tensor) -> list[Tensor]:
        """What a head says here of all depths, and what the target gives to the candidates that
        were named for this place: at depth d those of the step d tokens before; [B, D, K] each."""
        ids = self.along.ids
        named = torch.zeros_like(ids)
        for row, sequence in enumerate(context.sequences):
            known = self.drafts.setdefault(sequence.request.id, [])
            known.insert(0, ids[row])
            del known[ids.shape[1] :]
            for depth, before in enumerate(known):
                named[row, depth] = before[depth]
        given = logs.gather(1, named.flatten(1)).view(named.shape)
        return [ids.int(), self.along.probs.double().log().float(), given.float()]


def watching(method: Method, plain: AcceptanceRule) -> tuple[Method, Watch]:
    """A method that is recorded with, and its rule.

    Raises:
        ValueError: a drafter that cannot be recorded.
    """
    name = method.drafter_name
    check_drafter(name)
    watch = Watch(plain=plain, sampling=method.sampling)
    if name not in HEADS:
        tree = OneNode(budget=int(name in RECORDED))
        return replace(method, tree=tree, rule=watch), watch
    watch.along = imported("drafter", "specdec.drafters.along.AlongText")(method.drafter)
    tree = OneNode(budget=method.drafter.depth or LEVELS)
    return replace(method, drafter=watch.along, tree=tree, rule=watch), watch


def record_prompts(
    experiment: Experiment,
    session: OurSession,
    watch: Watch,
    prompts: Sequence[Prompt],
    told: Mapping[int, Sequence[int]],
) -> tuple[Arrays, dict[str, list[str]]]:
    """The arrays of a shard; and of its texts the categories, and the ids of their prompts. Texts
    have to be known before a head is asked along them, so that the target decodes them first.

    Args:
        told: texts by request, instead of decoding any; {} for none.

    Raises:
        ValueError: the texts are not of these settings.
    """
    if watch.along is not None and not told:
        decoded = _decoded(experiment, session, watch, prompts, {})
        told = {text["request"]: text["output_ids"] for text in decoded}
    texts = _decoded(experiment, session, watch, prompts, told)
    names = {kind: [text[kind] or "" for text in texts] for kind in ("category", "id")}
    return arrays_of(texts, watch.rows), names


def _decoded(
    experiment: Experiment,
    session: OurSession,
    watch: Watch,
    prompts: Sequence[Prompt],
    told: Mapping[int, Sequence[int]],
) -> list[dict[str, Any]]:
    """Records of the texts, in order; what was seen is in `watch.rows`."""
    watch.texts = told
    watch.rows.clear()
    watch.drafts.clear()
    if watch.along is not None:
        watch.along.texts, watch.along.asked = told, {}
    queue = Conversations(
        experiment.target.tokenizer,
        prompts,
        vocab_size=experiment.target.vocab_size,
        samples=experiment.samples,
        chat=experiment.chat,
        max_new_tokens=experiment.max_new_tokens,
        finished=[],
        marks={},
    )
    texts = list(queue.begin(session.decoder))
    for sequence in session.decoder.run():
        texts += queue.finish(session.decoder, sequence)
    for text in texts:
        if told and text["output_ids"] != list(told[text["request"]]):
            raise ValueError(
                f"run: its text of request {text['request']} ends elsewhere than by these settings"
            )
    return sorted(texts, key=lambda text: text["request"])


def arrays_of(texts: Sequence[dict[str, Any]], rows: dict[int, list[Row]]) -> Arrays:
    """Of texts as `Conversations` has them, and what was seen of each token."""
    outputs, prompts = ([text[name] for text in texts] for name in ("output_ids", "prompt_ids"))
    # What a step saw after the end of a text is none of it.
    seen = [
        row
        for text, output in zip(texts, outputs, strict=True)
        for row in rows.get(text["request"], [])[: len(output)]
    ]
    found: Arrays = {
        "request": np.array([text["request"] for text in texts], np.int64),
        "finish": np.array([FINISHES.index(text["finish_reason"]) for text in texts], np.int32),
    }
    for name, lists in (("output", outputs), ("prompt", prompts)):
        found[f"{name}_ids"] = np.concatenate(
            [np.array(one, np.int32) for one in lists] or [np.zeros(0, np.int32)]
        )
        place = "offsets" if name == "output" else "prompt_offsets"
        found[place] = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    names = ["target_ids", "target_logs", "target_tail", "own_log"]
    names += ["draft_ids", "draft_logs", "draft_target_logs"]
    for name, part in zip(names, zip(*seen, strict=True), strict=False):
        found[name] = np.stack(part)
    if found.get("draft_ids", np.zeros(0)).ndim == 3:
        given = found["draft_target_logs"]
        found["draft_target_logs"] = moved(given, found["offsets"])
    return found


def moved(given: NDArray[Any], offsets: NDArray[Any]) -> NDArray[Any]:
    """[t, D, K] by the place where a step began, of what stands at the place that it is said of;
    of places past the end of a text nothing is given."""
    found = np.full_like(given, -np.inf)
    for start, stop in pairwise(offsets.tolist()):
        for depth in range(min(given.shape[1], stop - start)):
            found[start : stop - depth, depth] = given[start + depth : stop, depth]
    return found
