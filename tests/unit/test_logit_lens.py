import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mechunlearn.attack import logit_lens
from mechunlearn.attack.logit_lens import lens_scores
from mechunlearn.facts import FactSplit, with_edit_targets
from mechunlearn.metrics import score_facts
from mechunlearn.models import final_norm
from mechunlearn.prompts import encode, encode_answers
from mechunlearn.report.curves import probe_by_layer

ALL = ("block", "attention", "mlp")


def certain(model, factor=20):
    """The model with larger logits, so that Gemma's cap and the choice of a layer are felt."""
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(factor)
    return model


def probabilities(logits, fact, model):
    """Softmax over the candidates' only tokens."""
    ids = encode_answers(model, fact.choices)
    p = logits[[ids[answer][0] for answer in fact.choices]].double().softmax(-1)
    return dict(zip(fact.choices, p.tolist(), strict=True))


def test_every_layer_is_what_hidden_states_say_through_norm_and_unembedding(any_model, tiny_facts):
    model, facts = certain(any_model), tiny_facts.facts[:6]
    scores = lens_scores(model, facts, batch_size=4)
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    for i, fact in enumerate(facts):
        text = fact.ask(fact.prompt)
        (ids,) = encode(model, [text])
        (until,) = encode(model, [text[: re.search(re.escape(fact.subject), text).end()]])
        with torch.no_grad():
            states = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in range(1, model.n_layers + 1):  # Hugging Face gives the last one after the norm
                normed = states[layer] if layer == model.n_layers else final_norm(model)(states[layer])
                logits = model.hf.get_output_embeddings()(normed[0])
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                for site, position in (("last", len(ids) - 1), ("subject_last", len(until) - 1)):
                    read = scores[f"block {site} layer {layer}"].iloc[i]
                    expected = probabilities(logits[position], fact, model)
                    assert read["p_true"] == pytest.approx(expected[fact.target_true], abs=1e-4)
                    assert read["top"] == max(expected, key=lambda answer: expected[answer])
                    assert read["correct"] == (read["top"] == fact.target_true)


def test_the_last_layer_at_the_last_token_is_the_answer_itself(any_model, tiny_facts):
    model = certain(any_model)
    facts = with_edit_targets(tiny_facts.facts[:40])
    for drop_targets in (False, True):
        lens = lens_scores(model, facts, drop_targets=drop_targets)[f"block last layer {model.n_layers}"]
        direct = score_facts(model, facts, drop_targets=drop_targets)
        assert lens["p_true"].tolist() == pytest.approx(direct["p_true"].tolist(), abs=1e-4)
        assert lens[["correct", "top"]].equals(direct[["correct", "top"]])
        assert not lens["shared"].any()


@pytest.mark.parametrize(("stream", "silenced"), [("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
def test_a_sublayer_that_writes_nothing_says_nothing(stream, silenced, tiny_model, tiny_facts):
    model = certain(tiny_model("llama"))
    with torch.no_grad():
        model.hf.get_submodule(f"model.layers.1.{silenced}").weight.zero_()
    scores = lens_scores(model, tiny_facts.facts[:8], streams=ALL)
    uniform = [1 / len(fact.choices) for fact in tiny_facts.facts[:8]]
    silent = {place for place, read in scores.items() if read["p_true"].tolist() == pytest.approx(uniform, abs=1e-6)}
    assert silent == {f"{stream} last layer 2", f"{stream} subject_last layer 2"}
    assert not any(scores[place]["correct"].any() for place in silent)  # a tie is not knowledge


def test_candidates_that_share_their_first_token_share_its_probability(tiny_model, tiny_facts):
    model, plain = tiny_model(), tiny_facts.facts[0]
    fact = replace(plain, target_true="red", choices=("red", "blue", "green"))
    names = ("blue", "red A", "red B", "green")
    ids = encode_answers(model, names)
    assert ids["red A"][0] == ids["red B"][0] == encode_answers(model, ["red"])["red"][0]
    alone = {place: read["p_true"][0] for place, read in lens_scores(model, [fact]).items()}
    for true in ("red A", "red B"):
        for place, read in lens_scores(model, [replace(fact, target_true=true, choices=names)]).items():
            assert read["p_true"][0] == pytest.approx(alone[place] / 2, abs=1e-6)
            assert not read["correct"][0]
            assert read["top"][0] != true
            assert read["shared"][0]
    every = [replace(fact, target_true=true, choices=names) for true in names]
    for read in lens_scores(model, every).values():
        assert read["p_true"].sum() == pytest.approx(1)


@pytest.mark.parametrize("place", ["block subject_last layer 1", "mlp last layer 2", "attention subject_last layer 2"])
def test_the_lens_finds_where_the_answers_are_and_reads_them_there(place, tiny_model, tiny_split):
    """Answers are by definition what one place says; the choice must fall on it, and hidden facts come out there."""
    model = certain(tiny_model("llama"), 300)

    def told(facts):
        read = lens_scores(model, facts, streams=ALL)[place]
        return tuple(replace(fact, target_true=top) for fact, top in zip(facts, read["top"], strict=True))

    split = replace(tiny_split, attack_dev=told(tiny_split.forget_shown), forget_hidden=told(tiny_split.forget_hidden))
    result = logit_lens(model, split)
    assert result.chosen == place
    assert result.final()["correct"].all()
    assert np.mean(list(result.hidden_scores().values())) > np.mean(list(result.hidden_before().values())) + 0.1
    dev = lens_scores(model, split.attack_dev, streams=ALL)
    assert result.notes["dev_p_true"] == pytest.approx({p: float(read["p_true"].mean()) for p, read in dev.items()})
    assert len(result.rows) == len(dev) * len(split.forget_hidden)


def test_hidden_facts_are_read_once_after_the_choice(tiny_model, tiny_split):
    model, runs, read = tiny_model(), [], []

    class Watched(FactSplit):
        def __getattribute__(self, name):
            if name == "forget_hidden":
                read.append(len(runs))
            return super().__getattribute__(name)

    split = Watched(**{name: getattr(tiny_split, name) for name in tiny_split.__dataclass_fields__})
    counting = model.hf.register_forward_hook(lambda *_: runs.append(1))
    logit_lens(model, split, batch_size=1)
    counting.remove()
    assert read[0] == len(split.attack_dev)  # after one pass for each dev fact
    assert len(read) == 2  # the other time to hash the split for the record


def test_lens_curves_show_every_layer_and_keep_the_writes_for_a_click(tiny_model, tiny_split):
    model = tiny_model()
    result = logit_lens(model, tiny_split)
    cell = SimpleNamespace(name="arm", edited=[result], null=[], cells=[])
    figure = probe_by_layer(cell, attack="logit_lens")
    shown = {trace.name: trace for trace in figure.data}
    assert len(shown) == 6
    for name, trace in shown.items():
        assert (trace.visible is True) == ("block" in name)
        stream, site = name.removeprefix("this model, ").split(" ")
        assert list(trace.x) == [1, 2, 3]
        means = [result.rows.query(f"setting == '{stream} {site} layer {n}'")["p_true"].mean() for n in trace.x]
        assert list(trace.y) == pytest.approx(means)
    assert "unembedding" in figure.layout.title.subtitle.text


def test_an_empty_part_and_a_lone_candidate_are_refused_in_one_line(tiny_model, tiny_split):
    for part in ("attack_dev", "forget_hidden"):
        with pytest.raises(ValueError, match=f"logit_lens: {part} is empty"):
            logit_lens(tiny_model(), replace(tiny_split, **{part: ()}))
    lone = replace(tiny_split.attack_dev[0], choices=())
    with pytest.raises(ValueError, match="2 or more"):
        logit_lens(tiny_model(), replace(tiny_split, attack_dev=(lone,)))
