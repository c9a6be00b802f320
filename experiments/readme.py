"""Write the measured tables of the README from the JSON files they come from.

python experiments/readme.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cpu_speed() -> str:
    """The table of `cpu_speed.py`."""
    result = json.loads((ROOT / "experiments/results/cpu_speed.json").read_text())
    hardware, versions = result["hardware"], result["versions"]
    lines = [
        f"Greedy decoding of {len(result['prompts'])} built-in prompts, "
        f"{result['tokens_per_output']:.0f} tokens each, one at a time, float32, "
        f"{hardware['threads']} threads of an {hardware['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; 95 % paired bootstrap intervals over prompts; "
        f"{result['outputs_unlike_transformers_generate']} outputs differ from those of "
        f"transformers' `generate` (`{result['command']}`, "
        f"[JSON](experiments/results/cpu_speed.json)):",
        "",
        "| method | tokens/s | accepted length | over `none` | over `generate` |",
        "|---|---|---|---|---|",
    ]
    for name, method in result["methods"].items():
        length = method["accepted_length"]
        cells = [
            name,
            f"{method['tokens_per_second']:.0f}",
            f"{length:.2f}" if length else "",
            *(
                "{:.2f} ({:.2f} to {:.2f})".format(*method[key])
                for key in ("speedup_over_none", "speedup_over_generate")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text()
    for marker, table in (("cpu_speed", cpu_speed()),):
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()
