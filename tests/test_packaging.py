"""What a user installs and imports: links, import rules, wheel contents, HF `kernels` beside us.

Nothing here looks at what the code computes.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import forked

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("drafters", "verifier", "kernels", "configs", "experiments")
SOURCES = ("specdec", "hydra_plugins", "drafters", "verifier", "kernels", "experiments", "tests")
RESULTS = "experiments/results/"  # measured with this repository; no part of the package

pytestmark = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="an unpacked sdist has folders where a checkout has links"
)


def run_python(code: str, *, cwd: Path, path: Path) -> dict[str, Any]:
    """Run `code` in a new offline interpreter, `path` on PYTHONPATH; return the JSON it prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    env |= {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "YES"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- links


@pytest.mark.parametrize("name", LINKS)
def test_component_is_a_relative_link(name: str) -> None:
    link = ROOT / "specdec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert link.is_dir()


@pytest.mark.parametrize("name", LINKS)
def test_component_is_no_package_of_its_own(name: str) -> None:
    # With an __init__.py the folder would win over an installed package of the same name.
    assert not (ROOT / name / "__init__.py").exists()


# --- Hugging Face's `kernels`

STAND_IN = """
__version__ = "{version}"


class Anything:
    def __init__(self, *args, **kwargs): ...

    def __call__(self, decorated):
        return decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""

IMPORT = """
import json
import specdec, specdec.kernels
import kernels

print(json.dumps({
    "kernels": kernels.__file__,
    "specdec": specdec.__file__,
    "specdec.kernels": list(specdec.kernels.__path__),
}))
"""
IMPORT_LLAMA = f"""
import transformers.models.llama.modeling_llama
from transformers.utils.import_utils import is_kernels_available

assert is_kernels_available()
{IMPORT}
"""


@pytest.mark.parametrize(
    "code", [IMPORT, pytest.param(IMPORT_LLAMA, marks=pytest.mark.slow)], ids=["ours", "llama"]
)
def test_imports_from_the_root_next_to_hf_kernels(code: str, tmp_path: Path) -> None:
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN.format(version=version))
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )

    assert run_python(code, cwd=ROOT, path=tmp_path) == {
        "kernels": str(package / "__init__.py"),
        "specdec": str(ROOT / "specdec" / "__init__.py"),
        "specdec.kernels": [str(ROOT / "specdec" / "kernels")],
    }


# --- who may import whom


def imported_names(source: str, package: str) -> set[str]:
    """Full dotted names that `source`, a module of `package`, imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=level):
                relative = "." * level + (module or "")
                base = importlib.util.resolve_name(relative, package)
                names |= {f"{base}.{alias.name}" for alias in aliases}
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


HYDRA = ("specdec.run", "specdec.lab.settings", "hydra_plugins.specdec_launcher")


def broken_rule(module: str, name: str) -> str | None:
    """The rule that `module` breaks by importing `name`, if any."""
    root = name.partition(".")[0]
    if root in LINKS:
        return f"write specdec.{name}: the bare name belongs to somebody else"
    if within(module, "tests"):
        return None
    if root == "argparse":
        return "specdec.lab.command reads command lines"
    if root in ("hydra", "omegaconf") and module not in HYDRA:
        return "only specdec/run.py, specdec/lab/settings.py and the plugin know Hydra"
    if root in ("wandb", "trackio") and module != f"specdec.lab.{root}_tracker":
        return f"only specdec/lab/{root}_tracker.py knows {root}"
    if within(module, "specdec.experiments"):
        return None
    if within(name, "specdec.experiments"):
        return "nothing is built on experiments"
    if within(module, "specdec.drafters"):
        return "a drafter knows no verifier" if within(name, "specdec.verifier") else None
    if within(module, "specdec.verifier"):
        return "a verifier knows no drafter" if within(name, "specdec.drafters") else None
    if within(module, "specdec.kernels"):
        allowed = root in {*sys.stdlib_module_names, "torch", "triton"}
        return None if allowed or within(name, "specdec.kernels") else "tensors in, tensors out"
    if within(name, "specdec.drafters", "specdec.verifier"):
        return "the core reaches drafters and rules through configs only"
    return None


def broken_rules(module: str, source: str) -> list[str]:
    names = imported_names(source, package=module.rpartition(".")[0])
    found = ((name, broken_rule(module, name)) for name in sorted(names))
    return [f"{module} imports {name}: {rule}" for name, rule in found if rule]


def modules() -> Iterator[tuple[str, Path]]:
    """(name it is imported by, file) of every source file; rglob does not follow the links."""
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield f"specdec.{name}" if folder in LINKS else name, path


def test_import_rules_hold() -> None:
    found = dict(modules())
    for package in (*(f"specdec.{name}" for name in LINKS if name != "configs"), "tests"):
        assert any(within(name, package) for name in found), f"no source file of {package}"
    broken = [
        rule for name, path in found.items() for rule in broken_rules(name, path.read_text())
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.drafters.x", "from specdec.verifier.rejection import Rejection"),
        ("specdec.drafters.x", "from specdec import verifier"),
        ("specdec.drafters.x", "from ..verifier import rejection"),
        ("specdec.verifier.x", "import specdec.drafters.none"),
        ("specdec.verifier.x", "def f():\n    from specdec.drafters import none"),
        ("specdec.decode", "from .drafters.none import NoDrafter"),
        ("specdec.decode", "from . import verifier"),
        ("specdec.run", "import importlib\nimportlib.import_module('specdec.drafters.none')"),
        ("specdec.__init__", "from .verifier import verifier"),
        ("specdec.kernels.x", "import numpy as np"),
        ("specdec.kernels.x", "from specdec.tree import TokenTree"),
        ("specdec.kernels.x", "from .. import tree"),
        ("specdec.decode", "from omegaconf import DictConfig"),
        ("specdec.lab.tracking", "import hydra.utils"),
        ("specdec.experiments.x", "import wandb"),
        ("specdec.lab.wandb_tracker", "import trackio"),
        ("specdec.experiments.x", "import argparse"),
        ("specdec.experiments.x", "from hydra import compose"),
        ("specdec.experiments.x", "from kernels import reference"),
        ("specdec.experiments.x", "from experiments.bench import peers"),
        ("specdec.lab.x", "from specdec.experiments.bench import peers"),
        ("specdec.drafters.x", "from specdec.experiments import tools"),
        ("tests.test_x", "import experiments.bench.peers"),
        ("tests.test_x", "import drafters.none"),
    ],
)
def test_import_rules_catch(module: str, source: str) -> None:
    assert len(broken_rules(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.run", "import hydra\nfrom omegaconf import DictConfig"),
        ("specdec.lab.settings", "from omegaconf import OmegaConf"),
        ("specdec.lab.wandb_tracker", "def f():\n    import wandb"),
        ("specdec.drafters.x", "from specdec.kernels import reference\nfrom .base import Base"),
        (
            "specdec.kernels.x",
            "import math\nimport triton.language as tl\nfrom torch import Tensor",
        ),
        ("specdec.kernels.x", "from specdec.kernels.reference import f\nfrom . import reference"),
        ("specdec.decode", "from specdec import kernels, tree"),
        ("specdec.experiments.x", "from specdec.drafters.none import NoDrafter"),
        ("specdec.experiments.x", "from specdec.experiments.bench import peers"),
        ("tests.test_x", "from hydra import compose\nimport specdec.verifier.x"),
    ],
)
def test_import_rules_allow(module: str, source: str) -> None:
    assert broken_rules(module, source) == []


# --- wheel and sdist


def build(out: Path, *options: str) -> Path:
    """Build from the checkout into `out`; return the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


def package_files() -> set[str]:
    """Every file of the package as a wheel names it."""
    files = set()
    for folder in ("specdec", "hydra_plugins", *LINKS):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith((".", "__pycache__")) for part in name.split("/"))
            if path.is_file() and not hidden and not name.startswith(RESULTS):
                files.add(f"specdec/{name}" if folder in LINKS else name)
    return files


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "specdec = specdec.__main__:main" in archive.read(entry_points).decode()
    assert wheel.name.startswith("specdec_lab-")
    assert files == package_files()
    assert {name.partition("/")[0] for name in files} == {"specdec", "hydra_plugins"}
    for folder, suffix in [
        ("drafters", ".py"),
        ("verifier", ".py"),
        ("kernels", ".py"),
        ("experiments/tools", ".py"),
        ("configs", ".yaml"),
        ("zoo/target", ".safetensors"),
        ("zoo/draft", ".safetensors"),
        ("data", ".jsonl"),
        ("compare", ".j2"),
        ("compare", ".css"),
        ("compare", ".js"),
    ]:
        assert any(
            name.startswith(f"specdec/{folder}/") and name.endswith(suffix) for name in files
        ), f"no {suffix} file of specdec/{folder} in the wheel"


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    from_sdist = build(tmp_path)  # builds the sdist, and the wheel from it
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(from_sdist) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {
            i.filename: i.CRC for i in other.infolist()
        }
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {name.partition("/")[0] for name in names} >= {
        *("specdec", "tests", "pyproject.toml", "README.md", "LICENSE"),
    }
    assert f"{RESULTS}cpu_speed.json" in names
    assert not [n for n in names if within(n.replace("/", "."), *LINKS) and RESULTS not in n]


RUN_TOOL = """

from specdec.experiments.tools import build_datastore

found["tool"] = [build_datastore.main(["--help"]), build_datastore.main(["out=here"])]
print(json.dumps(found))
"""


LOAD_ZOO = """
import json
from pathlib import Path
import torch
import specdec
from transformers import AutoModelForCausalLM, AutoTokenizer

text = "import os\\n\\n\\ndef main():\\n    for name in os.listdir(path):\\n        print(name)\\n"
found = {"specdec": specdec.__file__}
for name in ("target", "draft"):
    folder = Path(specdec.__file__).parent / "zoo" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    found[name] = {
        "parameters": model.num_parameters(),
        "complete": not any(info.values()),
        "loss": loss,
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False),
    }
"""


# Of what is imported already, and of where it was found, only others' packages are left.
INSTALLED = """
import os
import sys

for name in list(sys.modules):
    if name.partition(".")[0] in ("specdec", "hydra_plugins", "tests"):
        del sys.modules[name]
elsewhere = [path for path in sys.path if not os.path.isdir(os.path.join(path, "specdec"))]
sys.path[:] = [os.path.abspath("site"), *elsewhere]
"""


def test_the_installed_wheel_has_tools_and_models_offline(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "installed.py").write_text(INSTALLED + LOAD_ZOO + RUN_TOOL)
    done = forked(tmp_path, "installed")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tool"] == [0, 2]
    assert found["specdec"] == str(tmp_path / "site" / "specdec" / "__init__.py")
    for name, parameters in [("target", 14_062_464), ("draft", 2_409_408)]:
        model = found[name]
        assert model["parameters"] == parameters
        assert model["complete"], "weights are missing, unexpected or of another shape"
        # An untrained model has ln(8192) = 9.0 nats per token.
        assert model["loss"] < 4.0
        assert model["chat"] == "<|user|>\nHi\n"
