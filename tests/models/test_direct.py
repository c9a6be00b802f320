"""Models that must not be run operation by operation, though their family is known: weights that
are quantised or sharded."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.models.direct import POSITIONS_AT_ONCE
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from tests.models.fp8_files import BLOCKED, configure, group, write
from tests.models.tiny import FLOAT32_ROUNDING, error, own_attention, paged_and_own, save, tiny

# Not in the environment itself: transformers would import it, with its warnings, at every start.
APART = Path(sys.prefix) / "apart"


def test_plain_weights_go_the_direct_way() -> None:
    assert PagedLM(tiny("llama"))._direct is not None


def test_tables_of_angles_are_as_long_as_the_run_not_as_the_configuration() -> None:
    model = tiny("llama", max_position_embeddings=4_194_304)
    own = own_attention(model)
    lm = PagedLM(model)
    assert lm._direct is not None
    assert lm.max_context == 4_194_304
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING
    assert len(lm._direct.angles.cos) == len(lm._direct.angles.sin) == POSITIONS_AT_ONCE
    before = lm._direct.angles.cos.clone()
    chain = torch.arange(3)[None]
    for tokens, rows in ((4090, 1), (4094, 2), (100, 2)):  # 4090 + 3 + what fills the last page
        cache = lm.new_cache(rows=1, pages=1100, page_size=4, max_tokens=tokens)
        cache.open(0, tokens=8)
        lm.forward(cache, [0], chain, chain)
        assert len(lm._direct.angles.cos) == rows * POSITIONS_AT_ONCE
    places = torch.arange(2 * POSITIONS_AT_ONCE)[None]
    cos, sin = own.base_model.rotary_emb(own.lm_head.weight, position_ids=places)
    assert torch.equal(lm._direct.angles.cos, cos[0])
    assert torch.equal(lm._direct.angles.sin, sin[0])
    assert torch.equal(lm._direct.angles.cos[:POSITIONS_AT_ONCE], before)


def test_tables_of_angles_end_where_the_model_does() -> None:
    lm = PagedLM(tiny("llama", max_position_embeddings=100))
    assert lm._direct is not None
    lm._direct.angles.reach(10**9)
    assert len(lm._direct.angles.cos) == 100


def apart(package: str, test: str) -> bool:
    """Whether a package can be imported; where it is not in the environment, the test is run by
    another process, to which it is."""
    if find_spec(package) is not None:
        return True
    if not (APART / package).is_dir():
        pytest.skip(f"{package} is not installed; make setup puts it apart")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", f"{__file__}::{test}"]
    environment = {**os.environ, "PYTHONPATH": f"{APART}{os.pathsep}{os.getcwd()}"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1 passed" in found.stdout, found.stdout + found.stderr
    return False


@pytest.mark.slow
def test_quantised_weights_go_the_general_way(tmp_path: Path) -> None:
    if not apart("torchao", "test_quantised_weights_go_the_general_way"):
        return
    from torchao import quantization
    from transformers import TorchAoConfig

    plain = save(tiny("llama"), tmp_path / "plain")
    method = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=method)
    kinds = {type(parameter.data) for parameter in model.parameters()}
    assert kinds > {torch.Tensor}
    folder = tmp_path / "quantised"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    lm = load_model(str(folder))
    assert {type(parameter.data) for parameter in lm.model.parameters()} == kinds
    assert lm._direct is None
    assert lm.quantised == "torchao"
    assert "quantised by torchao" in lm.notes[0]
    own = own_attention(model)
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.slow
def test_fp8_of_other_families_goes_the_general_way(tmp_path: Path) -> None:
    """And compressed-tensors reads files of ours as they are meant."""
    if not apart("compressed_tensors", "test_fp8_of_other_families_goes_the_general_way"):
        return
    from transformers import CompressedTensorsConfig

    for stored in ("channel", "tensor", "block"):
        folder = tmp_path / stored
        model = tiny("llama", tie_word_embeddings=False, **BLOCKED | {"hidden_size": 256})
        meant = write(model, folder, stored)
        plain = CompressedTensorsConfig(dequantize=True)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=plain
        )
        for (name, mine), other in zip(meant.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other), name
    config = group("channel")
    del config["config_groups"]["group_0"]["input_activations"]
    folder = tmp_path / "other"
    meant = write(tiny("smollm3", no_rope_layers=[1, 1, 1, 1]), folder, "channel")
    configure(folder, quantization_config=config)
    lm = load_model(str(folder))
    assert lm._direct is None
    assert "quantised by fp8" in lm.notes[0]
    for ours, expected in paged_and_own(lm, own_attention(meant)):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_go_the_general_way(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    own, model = own_attention(tiny("llama")), tiny("llama")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in (*columns, "mlp.up_proj")}
    plan |= {
        f"model.layers.*.{name}": RowwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    parallelize_module(model, mesh, plan)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight.data, DTensor)
    lm = PagedLM(model)
    assert lm._direct is None
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING
