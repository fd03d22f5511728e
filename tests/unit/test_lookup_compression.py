"""Fact lookup by compression: increments that telescope and tell attention from MLP."""

import numpy as np
import pytest

from mechunlearn.components import Component
from mechunlearn.localize.fact_lookup_probe import fact_lookup_probe
from mechunlearn.models import all_components, attention_write, embedding, first_output, mlp_write, with_first_output
from mechunlearn.probes import online_bits, online_code, residual_features
from mechunlearn.prompts import token_roles


def write_the_answer(model, facts, module):
    """Make a sublayer write the answer at the subject's last token."""
    names = sorted({fact.target_true for fact in facts})
    known = {}
    for fact in facts:
        ids, roles = token_roles(model, fact.ask(fact.prompt), fact.subject)
        known[tuple(ids)] = (roles.index("subject_last"), names.index(fact.target_true))
    rows = []
    embedding(model).register_forward_pre_hook(lambda _m, args: rows.__setitem__(slice(None), args[0].tolist()))

    def write(_module, _inputs, output):
        changed = first_output(output).clone()
        for i, row in enumerate(rows):
            for ids, (position, answer) in known.items():
                if tuple(row[: len(ids)]) == ids:
                    changed[i, position, answer] += 60.0
        return with_first_output(output, changed)

    module.register_forward_hook(write)
    return model


@pytest.fixture(scope="module")
def colours(tiny_facts):
    return tiny_facts.of("colour").facts


@pytest.mark.parametrize(("kind", "write"), [("attention", attention_write), ("mlp", mlp_write)])
def test_the_sublayer_that_makes_the_answer_readable_is_told_from_its_neighbour(kind, write, tiny_model, colours):
    model = tiny_model()
    write_the_answer(model, colours, write(model, 1))
    scores = fact_lookup_probe(model, colours, score="compression", draws=1)
    assert scores.components == all_components(model, ("attention", "mlp"))
    assert scores.ranking()[0] == Component(kind, 1)
    assert scores.values.max() > 0.3
    assert scores.notes["band"]["first"] == 1
    assert len(scores.notes["code"]["compression"]) == 2 * model.n_layers + 1


def test_increments_telescope_to_the_bits_that_the_whole_model_saves(tiny_model, colours) -> None:
    model = tiny_model("gpt2")
    scores = fact_lookup_probe(model, colours, score="compression", draws=1, seed=3)
    streams = residual_features(model, colours, sites=("subject_last",))["subject_last"]
    labels, groups = [f.target_true for f in colours], [f.subject for f in colours]
    before, after = (online_bits(streams[:, i], labels, groups, seed=3)[0] for i in (0, -1))
    code = scores.notes["code"]
    baseline = code["baseline"][-1] - code["baseline"][0]
    saved = (before - after) / np.log2(len(set(labels)))
    np.testing.assert_allclose(scores.per_fact[:, :, 0].sum(axis=1) + baseline, saved, atol=1e-9)
    assert saved.std() > 0.01
    assert np.diff(np.array(code["compression"]) - code["baseline"]) == pytest.approx(scores.values)
    twin = fact_lookup_probe(model, colours, twin=model, score="compression", draws=1, seed=3)
    assert max(np.array(twin.notes["code"]["compression"]) - twin.notes["code"]["baseline"]) <= 1e-12


def test_parallel_blocks_have_one_increment_each(tiny_model, colours) -> None:
    model = tiny_model("gpt_neox")
    scores = fact_lookup_probe(model, colours, score="compression", draws=1)
    assert scores.components == all_components(model, ("mlp",))


def test_rows_add_up_to_the_code(colours) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4))
    labels = [("a", "b", "c")[i] for i in rng.integers(3, size=30)]
    groups = [f"s{i // 2}" for i in range(30)]
    code = online_code(features, labels, groups, seed=5)
    bits, block = online_bits(features, labels, groups, seed=5)
    np.testing.assert_allclose([bits[block == i].sum() for i in range(len(code.rows))], code.bits)
    assert np.allclose(bits[block == 0], np.log2(3))


def test_the_streams_between_sublayers_lie_between_the_blocks(tiny_model, colours) -> None:
    model = tiny_model("gemma3_text")
    whole, fine = (residual_features(model, colours[:4], mid=mid)["last"] for mid in (False, True))
    np.testing.assert_array_equal(fine[:, ::2], whole)
    with pytest.raises(ValueError, match="blocks are parallel"):
        residual_features(tiny_model("gpt_neox"), colours[:4], mid=True)
