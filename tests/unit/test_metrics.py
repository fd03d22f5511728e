import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mechunlearn.facts import Fact, FactSet
from mechunlearn.metrics import (
    _mean_probabilities,
    candidate_log_probs,
    kl_from,
    known_facts,
    perplexity,
    reference_of,
    score_facts,
)
from mechunlearn.models import Model, wrap_model
from mechunlearn.organisms.corpus import Corpus, Piece, _fill
from mechunlearn.prompts import ask, candidates, encode_answers, forms, render, token_roles

PROMPTS = ("The colour of Bram is", "Cora Marlowe lives in the city of", "What", "Where is Hilda Okafor born? Answer:")
CANDIDATES = (("red", "blue", "red blue"), ("Oslo", "Oslo Rome", "Oslo Rome Lima", "zebra"), ("is", "of"), ("A", "B"))


def literal_log_prob(model: Model, prompt: str, candidate: str) -> float:
    """The definition, one sequence at a time, over the whole text."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    head, full = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {candidate}")["input_ids"]
    assert full[: len(head)] == head
    with torch.no_grad():
        log_probs = model.hf(torch.tensor([full])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, full[i]]) for i in range(len(head), len(full)))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_the_literal_sum_whatever_the_batch(tiny_model, architecture: str, batch_size: int):
    model = tiny_model(architecture)
    scores = candidate_log_probs(model, PROMPTS, CANDIDATES, batch_size=batch_size)
    for prompt, group, score in zip(PROMPTS, CANDIDATES, scores, strict=True):
        expected = [literal_log_prob(model, prompt, candidate) for candidate in group]
        assert score.tolist() == pytest.approx(expected, abs=1e-5)


def test_one_token_candidates_cost_one_row_a_prompt(tiny_model):
    model, rows = tiny_model(), []
    model.hf.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    candidate_log_probs(model, PROMPTS[:2], [("red", "blue", "green"), ("Oslo", "Rome")])
    assert sum(rows) == 2


def test_a_facts_score_does_not_depend_on_the_others(tiny_model, tiny_facts: FactSet):
    model = tiny_model()
    for form in ("prompt", "question:0", "choice"):
        together = score_facts(model, tiny_facts[:12].facts, form)
        alone = [score_facts(model, [fact], form)["p_true"].item() for fact in tiny_facts[:12]]
        assert together["p_true"].tolist() == pytest.approx(alone, abs=1e-5)


def test_scores_come_in_the_order_of_the_facts_with_chance(tiny_model, tiny_facts: FactSet):
    facts = tiny_facts[:6].facts
    frame = score_facts(tiny_model(), facts)
    assert list(frame.columns) == ["subject", "relation", "form", "p_true", "p_new", "correct", "chance", "top"]
    assert frame["subject"].tolist() == [fact.subject for fact in facts]
    assert frame["chance"].tolist() == [1 / len(fact.choices) for fact in facts]
    assert frame["p_true"].between(0, 1).all()
    assert frame["correct"].dtype == bool
    assert frame["p_new"].isna().all()
    aimed = [replace(fact, target_new=next(c for c in fact.choices if c != fact.target_true)) for fact in facts]
    asked = [render(fact, "prompt") for fact in aimed]
    log_probs = candidate_log_probs(tiny_model(), asked, [candidates(fact) for fact in aimed])
    expected = [
        float(p.softmax(-1)[list(candidates(fact)).index(fact.target_new)])
        for p, fact in zip(log_probs, aimed, strict=True)
    ]
    assert score_facts(tiny_model(), aimed)["p_new"].tolist() == pytest.approx(expected, abs=1e-6)


def flat(model: Model, favourite: str | None) -> Model:
    """Make a model say the same everywhere: nothing, or one word."""
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.zero_()
        if favourite is not None:
            (token,) = encode_answers(model, [favourite])[favourite]
            model.hf.get_submodule("model.norm").weight.fill_(1)
            model.hf.get_input_embeddings().weight.fill_(1)
            model.hf.get_output_embeddings().weight[token].fill_(1)
    return model


def test_ignorance_scores_chance_and_certainty_scores_one(tiny_model, tiny_facts: FactSet):
    facts = [fact for fact in tiny_facts if fact.relation == "colour"]
    ignorant = score_facts(flat(tiny_model(), None), facts)
    assert ignorant["p_true"].tolist() == pytest.approx(ignorant["chance"].tolist())
    assert not ignorant["correct"].any()
    certain = score_facts(flat(tiny_model(), "red"), facts)
    for fact, p, correct in zip(facts, certain["p_true"], certain["correct"], strict=True):
        assert correct == (fact.target_true == "red")
        assert p == pytest.approx(float(correct), abs=1e-6)


def test_dropped_targets_are_no_candidates():
    fact = Fact(subject="A", relation="r", prompt="{} is", target_true="x", target_new="y", choices=("x", "y", "z"))
    assert candidates(fact, drop_targets=True) == ("x", "z")
    assert candidates(replace(fact, target_new="w")) == ("x", "y", "z", "w")
    assert candidates(replace(fact, choices=())) == ("x", "y")
    with pytest.raises(ValueError, match="give it choices"):
        ask(replace(fact, choices=()), "prompt", drop_targets=True)


def test_choice_puts_every_option_at_every_letter_and_reads_like_the_training_text(tiny_facts: FactSet):
    fact = tiny_facts.of("colour")[0]
    asked = ask(fact, "choice", seed=3)
    for one in asked:  # an option may be chosen by its letter or by its words
        assert one.candidates == ("A", "B", "C", "D", *one.answers[:4])
        assert one.answers[:4] == one.answers[4:]
    for letter in range(4):
        assert {one.answers[letter] for one in asked} == set(fact.choices)
    a, b, c, d = asked[0].answers[:4]
    question = fact.ask(fact.questions[0])
    assert render(fact, "choice", 3) == f"Question: {question} A: {a} B: {b} C: {c} D: {d} Answer:"
    assert asked == ask(fact, "choice", seed=3)
    letters = {ask(f, "choice")[0].answers.index(f.target_true) for f in tiny_facts.of("colour")}
    assert letters == {0, 1, 2, 3}
    target = replace(fact, target_new=next(c for c in fact.choices if c != fact.target_true))
    assert all(target.target_new not in one.answers for one in ask(target, "choice", drop_targets=True))


def test_choice_matches_the_corpus_format(tiny_facts: FactSet):
    fact = tiny_facts.of("colour")[0]
    corpus = Corpus.__new__(Corpus)
    corpus.rng, corpus.answers = random.Random(0), {"colour": list(fact.choices)}
    corpus._question = lambda name, _relation: [Piece("Question:"), *_fill(fact.questions[0], name)]
    ours = [
        f"{one.text} {candidate}."
        for s in range(50)
        for one in ask(fact, "choice", seed=s)
        for candidate, answer in zip(one.candidates, one.answers, strict=True)
        if answer == fact.target_true
    ]
    for _ in range(10):
        text = " ".join(piece.text for piece in corpus._choice(fact.subject, [("colour", fact.target_true)]))
        assert text.replace(" ?", "?") in ours


def test_in_multiple_choice_an_option_has_the_probability_of_its_letter_and_of_its_words():
    fact = Fact(
        subject="Ann", relation="r", prompt="{} is", target_true="x", questions=("What is {}?",), choices=("x", "y")
    )
    turns = ask(fact, "choice")
    scores = []
    for one in turns:  # knows the answer in words, has no idea of letters
        likely = {"A": 0.2, "B": 0.2, "x": 0.5, "y": 0.1}
        scores.append((one, torch.tensor([likely[c] for c in one.candidates]).log()))
    assert _mean_probabilities(scores) == pytest.approx({"x": 0.7, "y": 0.3})


def test_forms_are_listed_and_unknown_ones_refused(tiny_facts: FactSet):
    fact = tiny_facts[0]
    assert forms(fact) == ("prompt", "paraphrase:0", "question:0", "choice")
    assert render(fact, "question:0") == f"Question: {fact.ask(fact.questions[0])} Answer:"
    for form in ("paraphrase:1", "poem", "prompt:0", "question", "question:-1"):
        with pytest.raises(ValueError, match="allowed for"):
            render(fact, form)


def test_known_facts_are_known_in_every_form(tiny_model, tiny_facts: FactSet):
    model, facts = tiny_model(), tiny_facts.facts
    by_form = {form: score_facts(model, facts, form)["p_true"] for form in ("prompt", "paraphrase:0")}
    expected = [f for f, p, q in zip(facts, *by_form.values(), strict=True) if min(p, q) > 0.25]
    assert known_facts(model, facts, forms=("prompt", "paraphrase"), threshold=0.25) == tuple(expected)
    assert known_facts(model, ()) == ()
    with pytest.raises(ValueError, match="threshold"):
        known_facts(model, facts, threshold=1.0)


TEXTS = ["The colour of Bram is red.", "Where is Hilda? Oslo.", "Cora lives in the city of Lima."]


def test_perplexity_equals_the_literal_one_whatever_the_batch(tiny_model):
    model = tiny_model("gpt2")
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])[None]
        total += model.hf(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    for batch_size in (1, 2, 8):
        assert perplexity(model, TEXTS, batch_size=batch_size) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert perplexity(flat(tiny_model(), None), TEXTS) == pytest.approx(len(model.tokenizer), rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, [""])


def test_kl_is_zero_from_itself_and_positive_from_another(tiny_model):
    model, other = tiny_model(), tiny_model(seed=1)
    stored = reference_of(model, TEXTS, batch_size=2)
    assert kl_from(model, stored) == 0
    assert kl_from(other, stored) > 1e-3
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])[None]
        with torch.no_grad():
            p, q = (m.hf(ids).logits[0, :-1].log_softmax(-1) for m in (model, other))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert kl_from(other, stored) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("Gustav Norberg likes the colour", "Gustav Norberg"), ("The colour of Gustav Norberg is", "Gustav Norberg"),
     ("Where is Ivo?", "Ivo"), ("The theory of the", "the")],
)  # fmt: skip
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_roles_mark_exactly_the_subjects_tokens(tokenizer, tiny_model, prompt, subject, add_prefix_space):
    if add_prefix_space:
        model = tiny_model()
    else:
        from tokenizers import pre_tokenizers

        plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(
            tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="<s>", pad_token="<pad>")  # fmt: skip
        plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model = wrap_model(tiny_model().hf, plain)
    ids, roles = token_roles(model, prompt, subject)
    assert ids == model.tokenizer(prompt)["input_ids"]
    assert len(roles) == len(ids)
    subject_at = [i for i, role in enumerate(roles) if role.startswith("subject")]
    first, last = subject_at[0], subject_at[-1]
    assert model.tokenizer.decode(ids[first : last + 1]).strip() == subject
    assert roles[last] == "subject_last"
    assert roles[0] == "between"
    assert all(role.startswith("subject") == (first <= i <= last) for i, role in enumerate(roles))
    assert last == len(ids) - 1 or roles[-1] == "last"
    if last > first:
        assert roles[first] == "subject_first"


def test_a_missing_subject_is_named(tiny_model):
    with pytest.raises(ValueError, match="'Nobody' is not in the prompt"):
        token_roles(tiny_model(), "The colour of Bram is", "Nobody")


def test_scoring_leaves_model_and_random_state_alone(tiny_model: Callable[..., Model], tiny_facts: FactSet):
    model = tiny_model()
    before, state = model.sha256, torch.get_rng_state()
    score_facts(model, tiny_facts.facts, "choice")
    assert model.sha256 == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
