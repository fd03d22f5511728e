import pytest
import torch

from mechunlearn.components import Component
from mechunlearn.edit.losses import Term, batches, text_loss, text_tokens, weighted_sum
from mechunlearn.edit.training import low_rank_trainable, masked_trainable, train
from mechunlearn.masks import mask_of
from mechunlearn.models import Model, wrap_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run with -m gpu on a machine with one"),
]

TEXTS = ["The favourite colour of Bram is red", "Cora lives", "Where is Dina Marlowe born?", "Lima, the city of Ivo."]
# losses of the same weights differ by rounding: sums are taken in another order for a batch of another shape
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def on_gpu(tiny_model, architecture: str, dtype: torch.dtype) -> Model:
    cpu = tiny_model(architecture)
    return wrap_model(cpu.hf.to("cuda", dtype), cpu.tokenizer)


def run(model: Model, make, **options):
    trainable = make(model, mask_of(model, [Component("mlp", 1), Component("head", 2, 1), Component("neuron", 2, 3)]))
    loss = weighted_sum(
        [Term(weight=1.0, objective=text_loss, batches=batches(text_tokens(model, TEXTS), 2, seed=0))]
    )  # fmt: skip
    history = train(model, trainable, loss, steps=12, learning_rate=1e-2, **options)
    return history, trainable


def low_rank(model, mask):
    return low_rank_trainable(model, mask, 4)


@pytest.mark.parametrize("make", [masked_trainable, low_rank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma3_text"])
def test_a_step_on_the_gpu_is_the_same_cached_checkpointed_or_plain(tiny_model, architecture, dtype, make):
    model = on_gpu(tiny_model, architecture, dtype)
    before = model.sha256
    plain, _ = run(model, make, prefix_cache_gb=0.0)
    assert plain[-1] < plain[0]
    for options in ({}, {"prefix_cache_gb": 0.0, "checkpoint": True}, {"checkpoint": True}):
        history, _ = run(model, make, **options)
        assert history == pytest.approx(plain, rel=CLOSE[dtype]), options
    assert model.sha256 == before


def test_float32_losses_on_the_gpu_are_those_of_the_cpu(tiny_model):
    gpu, _ = run(on_gpu(tiny_model, "llama", torch.float32), masked_trainable)
    cpu, _ = run(tiny_model("llama"), masked_trainable)
    assert gpu == pytest.approx(cpu, rel=1e-3)


def test_a_bfloat16_model_is_trained_by_float32_leaves_with_the_fused_optimizer(tiny_model, monkeypatch):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(adamw(*a, **k)) or made[-1])
    model = on_gpu(tiny_model, "llama", torch.bfloat16)
    _, trainable = run(model, masked_trainable)
    assert made[0].defaults["fused"]
    leaves = list(trainable.leaves.values())
    moments = [value for state in made[0].state.values() for value in state.values() if value.ndim]
    assert {tensor.dtype for tensor in (*leaves, *moments)} == {torch.float32}
    assert all(tensor.is_cuda for tensor in (*leaves, *moments))
    assert sum(value.numel() for value in moments) == 2 * sum(leaf.numel() for leaf in leaves)
    for name, value in trainable.overrides().items():
        assert value.dtype == torch.bfloat16
        assert value.is_cuda
        assert not torch.equal(value, model.hf.get_parameter(name))


def test_checkpointing_takes_less_memory_on_the_gpu(tiny_model):
    model = wrap_model(tiny_model("llama", n_layers=12).hf.to("cuda"), tiny_model().tokenizer)
    ids = torch.randint(1, 100, (64, 60), device="cuda")
    peak = {}
    for checkpoint in (False, True):
        torch.cuda.reset_peak_memory_stats()
        train(
            model, masked_trainable(model, mask_of(model, [Component("mlp", 0)])),
            lambda _, forward: forward(ids, torch.tensor([59], device="cuda")).logsumexp(-1).mean(),
            steps=2, learning_rate=1e-3, checkpoint=checkpoint,
        )  # fmt: skip
        peak[checkpoint] = torch.cuda.max_memory_allocated()
    assert peak[True] < 0.5 * peak[False]
