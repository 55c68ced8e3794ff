"""What this package needs of PEFT beyond its public names: a new PEFT that moves it fails here, by name."""

import inspect
import subprocess
import sys

import pytest
import torch

peft = pytest.importorskip("peft", reason="tuners need the extra [peft]")

from peft.tuners import tuners_utils  # noqa: E402
from peft.utils import peft_types  # noqa: E402

from hf_masked.modeling.parts.bits import pack_bits, packed_size, unpack_bits  # noqa: E402
from hf_masked.modeling.registry import CATALOGUE, load_later_families, register_tuner  # noqa: E402
from hf_masked.modeling.weight_masking.masking_lm import MaskingLMConfig, MaskingLMTuner  # noqa: E402
from hf_masked.modeling.weight_masking.peft_bridge import peft_type, register_with_peft  # noqa: E402


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_create_and_replace", {"peft_config", "adapter_name", "target", "target_name", "parent", "current_key"}),
        ("_replace_module", {"parent", "child_name", "new_module", "child"}),
        ("_prepare_adapter_config", {"peft_config", "model_config"}),
        ("_remap_adapter_state_dict_for_load", {"model", "config", "adapter_name", "state_dict"}),
        ("inject_adapter", {"model", "adapter_name"}),
        ("_post_injection_hook", {"model", "config", "adapter_name"}),
        ("_unload_and_optionally_merge", {"merge", "adapter_names"}),
    ],
)
def test_hooks_of_the_tuner_are_there(name, arguments):
    assert hasattr(tuners_utils.BaseTuner, name), f"PEFT {peft.__version__} has no BaseTuner.{name}: adapt peft_bridge"
    found = set(inspect.signature(getattr(tuners_utils.BaseTuner, name)).parameters)
    assert arguments <= found, f"BaseTuner.{name} of PEFT {peft.__version__} takes {found}: adapt peft_bridge"


@pytest.mark.parametrize(
    "name", ["adapter_layer_names", "other_param_names", "_get_available_adapters", "set_adapter"]
)
def test_names_of_the_layer_are_there(name):
    assert hasattr(tuners_utils.BaseTunerLayer, name), (
        f"PEFT {peft.__version__} has no BaseTunerLayer.{name}: adapt peft_bridge"
    )


def test_a_type_is_added_to_the_closed_enum():
    member = peft_type("fish_mask")
    assert member is peft_types.PeftType.FISH_MASK is peft_types.PeftType("FISH_MASK") is peft_type("fish_mask")
    assert member in list(peft_types.PeftType) and member == "FISH_MASK"
    assert len(set(peft_types.PeftType)) == len(list(peft_types.PeftType))


def test_a_name_is_given_once():
    with pytest.raises(KeyError, match="already"):
        register_with_peft(MaskingLMConfig, MaskingLMTuner)
    with pytest.raises(ValueError, match="registered already"):
        register_tuner(config=MaskingLMConfig, tuner=MaskingLMTuner, layer=None, tiny_config=MaskingLMConfig)


def test_tuners_are_in_the_catalogue():
    assert load_later_families() == {}
    assert {"fish_mask", "masking_lm", "maskllm"} <= {v.name for v in CATALOGUE.values() if v.kind == "tuner"}


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "peft" else found(name, package)
import hf_masked
from hf_masked.cli import main
assert "hf_masked.modeling.weight_masking" not in sys.modules
try:
    hf_masked.FishMaskConfig
except ImportError as error:
    print(error)
try:
    hf_masked.get_variant("fish_mask")
except ValueError as error:
    print(error)
sys.argv = ["hf-masked", "list"]
main()
"""


def test_without_peft_one_line_says_what_is_missing():
    output = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True, check=False)
    lines = output.stdout.strip().splitlines()
    assert lines[0] == "Masks on weights need PEFT: pip install 'hf-masked[peft]'."
    assert lines[1].endswith("Methods of weight_masking are known after pip install 'hf-masked[peft]'.")
    assert lines[-1] == "More in weight_masking after: pip install 'hf-masked[peft]'", output.stderr
    assert any(line.startswith("mae ") for line in lines)


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (4, 2, 3)])
def test_bits_are_numpys_and_come_back(shape):
    import numpy as np

    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert torch.equal(packed, torch.from_numpy(np.packbits(mask.numpy())))
    assert len(packed) == packed_size(shape) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), mask)
