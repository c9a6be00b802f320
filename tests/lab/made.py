"""Records made by hand."""


def generation(prompt: int, output: list[int], steps: int, turn: int = 0, sample: int = 0) -> dict:
    return {
        "request": (sample * 1_000_000 + prompt) * 1000 + turn,
        "prompt": prompt,
        "sample": sample,
        "turn": turn,
        "id": str(prompt),
        "category": None,
        "prompt_ids": [1, 2],
        "output_ids": output,
        "text": "",
        "tokens": len(output),
        "steps": steps,
        "drafted": 3 * steps,
        "finish_reason": "length",
    }


def step(requests: list[int], depths: list[int], accepted: list[int], tokens: list[int]) -> dict:
    seconds = {"draft": 0.25, "verify": 0.5, "prefill": 0.25}
    return {
        "requests": requests,
        "nodes": depths,
        "depths": depths,
        "accepted": accepted,
        "tokens": tokens,
        "seconds": seconds,
    }
