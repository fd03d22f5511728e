import pytest
import torch

from mechunlearn.attack import ATTACKS
from mechunlearn.localize import LOCALIZERS
from mechunlearn.models import wrap_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run with -m gpu on a machine with one"),
]


@pytest.fixture
def pair(tiny_model):
    cpu, gpu = tiny_model(), tiny_model()
    return cpu, wrap_model(gpu.hf.to("cuda"), gpu.tokenizer, gpu.name)


@pytest.mark.parametrize("name", ["attribution_patching", "resample_ablation", "activation_patching", "path_patching"])
def test_scores_on_the_gpu_are_those_of_the_cpu(name, pair, tiny_split):
    on_cpu, on_gpu = (LOCALIZERS.get(name).function(model, tiny_split.forget) for model in pair)
    assert on_gpu.values == pytest.approx(on_cpu.values, abs=1e-3)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_attacks_run_on_the_gpu(name, pair, tiny_split):
    options = {"relearning": {"steps": 2, "learning_rates": (1e-3,)}}.get(name, {})
    result = ATTACKS.get(name).function(pair[1], tiny_split, **options)
    assert len(result.hidden_scores()) == len(tiny_split.forget_hidden)
