"""A step that trains the top quarter's MLPs against a step of ordinary fine-tuning of all weights, on one batch.

A forward pass costs F, gradients of activations F, gradients of weights F. Training weights of the top quarter only
needs F + F/4 + the masked share of F, so the ratio should be near (1 + 1/4 + share) / 3. Ratios within one run, never
times: pytest -m benchmark tests/benchmarks -s
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from mechunlearn.components import Component
from mechunlearn.edit.training import masked_trainable, train
from mechunlearn.masks import mask_of
from mechunlearn.models import wrap_model

pytestmark = pytest.mark.benchmark

N_LAYERS, STEPS = 8, 5


def test_a_masked_step_costs_what_its_layers_cost(tokenizer, median, record_property):
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=384, intermediate_size=1152, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = wrap_model(transformers.LlamaForCausalLM(config), tokenizer)
    ids = torch.randint(0, 512, (32, 32))
    top = [Component("mlp", layer) for layer in range(3 * N_LAYERS // 4, N_LAYERS)]
    mask = mask_of(model, top)
    share = mask.n_selected / sum(p.numel() for p in model.hf.parameters())

    def masked():
        def loss(_call, forward):
            logits = forward(ids, torch.arange(32))
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        train(model, masked_trainable(model, mask), loss, steps=STEPS, learning_rate=1e-6)

    def full():
        optimizer = torch.optim.AdamW(model.hf.parameters(), lr=1e-6, fused=True)
        for _ in range(STEPS):
            model.hf(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.hf.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    ratio, floor = median(masked, 5) / median(full, 5), (1.25 + share) / 3
    record_property("ratio", ratio)
    print(f"masked step / full step: {ratio:.2f}; by count of operations {floor:.2f}")  # noqa: T201
    assert ratio < 1.3 * floor
