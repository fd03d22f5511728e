from dataclasses import replace

import numpy as np
import pytest
import torch

from mechunlearn.attack import ATTACKS, asking, logit_lens, probing, quantization, relearning
from mechunlearn.attack.results import FRAMES, AttackResult, Health
from mechunlearn.edit.training import Diverged
from mechunlearn.evidence import gather_evidence
from mechunlearn.facts import FactSplit
from mechunlearn.metrics import score_facts
from mechunlearn.verdict import decide

QUICK = {
    "asking": {},
    "relearning": {
        "learning_rates": (3e-3,),
        "steps": 4,
        "eval_every": 2,
        "batch_size": 16,
        "kinds": ("full", "lora:2"),
    },
    "probing": {"max_steps": 20},
    "logit_lens": {},
    "quantization": {"bits": (8,), "group_sizes": (0,)},
}
RUN = {"asking": asking, "relearning": relearning, "probing": probing, "logit_lens": logit_lens,
       "quantization": quantization}  # fmt: skip


class Guarded:
    """A split whose hidden facts cannot be read; `passes` holds how often the model had been run when it was tried."""

    def __init__(self, split: FactSplit):
        self._split = split
        self.passes: list[int] = []
        self._run = 0

    def count(self, *_: object) -> None:
        """A forward hook."""
        self._run += 1

    def __getattr__(self, name):
        if name in ("forget_hidden", "forget", "sha256"):
            self.passes.append(self._run)
            raise PermissionError("hidden facts read")
        return getattr(self._split, name)


def test_all_attacks_are_registered():
    assert {"asking", "relearning", "probing"} <= set(ATTACKS.names())


@pytest.mark.parametrize("name", sorted(QUICK))
def test_an_attack_leaves_the_model_bit_identical_and_is_reproducible(name, knowing, tiny_split):
    before, state = knowing.sha256, torch.random.get_rng_state()
    first = RUN[name](knowing, tiny_split, **QUICK[name])
    assert knowing.sha256 == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.grad is not None for p in knowing.hf.parameters())
    second = RUN[name](knowing, tiny_split, **QUICK[name])
    assert first.rows.equals(second.rows)
    assert set(first.hidden_scores()) == set(first.hidden_before())
    assert len(first.hidden_scores()) == len(tiny_split.forget_hidden)
    assert all(0 <= p <= 1 for p in first.hidden_scores().values())


@pytest.mark.parametrize("name", sorted(QUICK))
def test_hidden_facts_stay_unread_until_everything_is_chosen(name, knowing, tiny_split, monkeypatch):
    guarded = Guarded(tiny_split)
    counting = knowing.hf.register_forward_hook(guarded.count)
    scored = []
    for module in RUN.values():
        monkeypatch.setitem(
            module.__globals__, "fact_rows", lambda *args, **_: scored.append(args) or pytest.fail("scored")
        )
    with pytest.raises(PermissionError):
        RUN[name](knowing, guarded, **QUICK[name])
    assert len(guarded.passes) == 1
    counting.remove()
    assert guarded.passes[0] >= QUICK[name].get("steps", 1)  # it had looked at other facts, or trained, before
    assert not scored


@pytest.mark.parametrize("name", sorted(QUICK))
def test_other_hidden_facts_change_nothing_that_was_chosen(name, knowing, tiny_split):
    shuffled = replace(tiny_split, forget_hidden=tiny_split.forget_hidden[:3])
    whole, part = (RUN[name](knowing, split, **QUICK[name]) for split in (tiny_split, shuffled))
    assert (whole.chosen, whole.chosen_step, whole.health) == (part.chosen, part.chosen_step, part.health)
    for key, score in part.hidden_scores().items():
        assert score == pytest.approx(whole.hidden_scores()[key], abs=1e-5)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_target_can_be_dropped_from_the_candidates(name, knowing, split):
    result = RUN[name](knowing, split, drop_targets=True, **QUICK[name])
    assert result.options["drop_targets"] is True
    assert all(0 <= p <= 1 for p in result.hidden_scores().values())


def test_zero_steps_of_relearning_are_the_evaluation_before(knowing, tiny_split):
    result = relearning(knowing, tiny_split, steps=0, learning_rates=(1e-3,))
    assert result.hidden_scores() == pytest.approx(result.hidden_before())
    direct = score_facts(knowing, tiny_split.forget_hidden)["p_true"]
    assert np.mean(list(result.hidden_before().values())) == pytest.approx(direct.mean())


def test_asking_a_model_that_knows_gets_the_facts(knowing, tiny_split):
    result = asking(knowing, tiny_split)
    assert result.zero_budget
    assert np.mean(list(result.hidden_scores().values())) > 0.8
    forms = {"prompt", "paraphrase:0", "question:0", "choice", "few_shot:shown", "few_shot:retained"}
    assert set(result.rows["setting"]) == forms


def test_relearning_that_breaks_the_model_says_so(knowing, tiny_split):
    # one answer for everybody is soon learnt, by the others, too
    same = {
        part: tuple(replace(fact, target_true="red") for fact in getattr(tiny_split, part))
        for part in ("forget_shown", "attack_dev", "forget_hidden")
    }
    split = replace(tiny_split, **same)
    result = relearning(knowing, split, learning_rates=(0.1,), kinds=("full",), steps=12, eval_every=12)
    assert result.chosen_step == 12
    assert not result.health.healthy
    assert "retained" in result.health.reason
    assert Health(fitted=1.0, retained_before=0.9, retained_after=0.8, perplexity_ratio=1.0).reason.startswith(
        "retained"
    )
    assert "perplexity" in Health(perplexity_ratio=float("nan")).reason


def test_a_probe_without_two_answers_to_train_on_is_refused_in_one_line(knowing, tiny_split):
    lone = replace(tiny_split, retain_train=(), forget_shown=tiny_split.forget_shown[:1])
    with pytest.raises(ValueError, match="no two answers to train on"):
        probing(knowing, lone)


def test_a_result_survives_writing_and_reading(knowing, tiny_split, tmp_path):
    result = asking(knowing, tiny_split)
    result.save(tmp_path / "asking")
    again = AttackResult.load(tmp_path / "asking")
    frames = {name: getattr(result, name) for name in FRAMES}
    assert all(getattr(again, name).equals(frame) for name, frame in frames.items())
    assert replace(again, **frames) == result


def test_the_unedited_model_is_still_expressed_against_its_twin(knowing, tiny_model, tiny_split):
    twin = tiny_model("llama", seed=1)  # random weights know nothing
    evidence = gather_evidence([asking(knowing, tiny_split)], [asking(twin, tiny_split)])
    verdict = decide([evidence], original=0.95, null_before=0.25, draws=500)
    assert str(verdict) == "hidden (still expressed)"


def test_relearning_that_always_diverges_is_an_error_and_bad_rates_are_named(knowing, tiny_split, monkeypatch):
    def diverges(*_: object, **__: object) -> None:
        raise Diverged("training: the loss is nan at step 1 of 4; lower the learning_rate")

    monkeypatch.setitem(relearning.__globals__, "train", diverges)
    with pytest.raises(ValueError, match="every setting diverged"):
        relearning(knowing, tiny_split, **QUICK["relearning"])
    with pytest.raises(ValueError, match="learning_rates"):
        ATTACKS.get("relearning").validate({"learning_rates": [-1e-3]})
