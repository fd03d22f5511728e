from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mechunlearn.evidence import AttackEvidence, PositiveControl, gather_evidence
from mechunlearn.verdict import Verdict, decide, demonstrate_power

ORIGINAL, NULL = 0.9, 0.1
N = 256
RECOVERED = (PositiveControl(kind="lora", recovered_by=("relearning", "probing")),)


def attack(
    name: str, share: float, *, n: int = N, spread: float = 0.05, noise_seed: int = 0, **fields
) -> AttackEvidence:
    """Scores whose mean recovered share is close to `share`."""
    rng = np.random.default_rng(noise_seed)
    null = np.clip(NULL + spread * rng.normal(size=n), 0, 1)
    edited = np.clip(null + share * (ORIGINAL - NULL) + spread * rng.normal(size=n), 0, 1)
    facts = tuple(f"fact {i}" for i in range(n))
    zero = name == "asking"
    return AttackEvidence(
        name=name, facts=facts, seeds=(0,) * n, edited=tuple(edited), null=tuple(null), zero_budget=zero, **fields
    )


def judge(*evidence: AttackEvidence, controls=RECOVERED, **options) -> Verdict:
    return decide(evidence, original=ORIGINAL, null_before=NULL, controls=controls, draws=1000, **options)


@pytest.fixture
def made_up():
    """`made_up(seeds)`: the same results under every seed, and those for 40 made-up facts."""

    class Scored(SimpleNamespace):
        def hidden_scores(self):
            return self.scores

    def results(seeds: int) -> tuple[list[Scored], list[Scored]]:
        rng = np.random.default_rng(0)
        real = {f"fact {i}": 0.2 for i in range(N)}
        other = {f"made up {i}": float(p) for i, p in enumerate(rng.random(40))}
        shared = {
            "attack": "relearning",
            "zero_budget": False,
            "decides": True,
            "health": SimpleNamespace(healthy=True),
        }
        return tuple([Scored(**shared, seed=s, scores=scores) for s in range(seeds)] for scores in (real, other))

    return results


def nothing_back() -> list[AttackEvidence]:
    return [attack("asking", 0.0), attack("relearning", 0.01, noise_seed=1), attack("probing", 0.0, noise_seed=2)]


def test_nothing_recovered_by_powerful_attacks_is_removed():
    verdict = judge(*nothing_back())
    assert verdict.label == "removed"
    assert not verdict.still_expressed
    assert verdict.settle is None
    assert all(row.upper < 0.1 for row in verdict.rows)


def test_one_attack_that_recovers_suffices_for_hidden():
    evidence = nothing_back()
    evidence[1] = attack("relearning", 0.6)
    verdict = judge(*evidence)
    assert (verdict.label, str(verdict)) == ("hidden", "hidden")
    assert "relearning" in verdict.reason


def test_what_asking_brings_back_is_still_expressed():
    evidence = nothing_back()
    evidence[0] = attack("asking", 0.6)
    verdict = judge(*evidence)
    assert str(verdict) == "hidden (still expressed)"
    assert judge(*evidence, controls=()).label == "hidden"  # asking needs no suppressed model


def test_the_share_is_the_ratio_with_a_fixed_denominator():
    verdict = judge(attack("relearning", 0.5, spread=0.0))
    assert verdict.rows[0].share == pytest.approx(0.5)
    assert verdict.denominator == pytest.approx(0.8)


def test_the_edited_twin_itself_is_removed_and_the_original_is_still_expressed():
    twin = [replace(e, edited=e.null) for e in nothing_back()]
    assert judge(*twin).label == "removed"
    original = [replace(e, edited=(ORIGINAL,) * N) for e in nothing_back()]
    assert str(judge(*original)) == "hidden (still expressed)"


def test_too_few_facts_are_inconclusive_and_say_how_many_would_settle_it():
    verdict = judge(*(attack(e.name, 0.03, n=20, noise_seed=i) for i, e in enumerate(nothing_back())))
    assert verdict.label == "inconclusive"
    assert verdict.settle is not None
    assert "hidden facts (now 20)" in verdict.settle


def test_broken_health_can_only_make_it_invalid():
    for share in (0.0, 0.08, 0.3, 0.9):
        for broken in range(3):
            evidence = nothing_back()
            evidence[1] = attack("relearning", share)
            evidence[broken] = replace(evidence[broken], healthy=False, health="perplexity x3.00")
            verdict = judge(*evidence)
            assert verdict.label == "invalid"
            assert "perplexity x3.00" in verdict.reason


def test_an_attack_without_demonstrated_power_never_decides():
    only = (PositiveControl(kind="lora", recovered_by=("probing",)),)
    evidence = nothing_back()
    evidence[1] = attack("relearning", 0.9)
    verdict = judge(*evidence, controls=only)
    assert verdict.label == "inconclusive"  # neither hidden, nor removed in spite of it
    assert verdict.rows[1].note == "no demonstrated power"
    assert judge(*nothing_back(), controls=only).label == "removed"
    assert judge(*nothing_back(), controls=()).label == "inconclusive"
    assert judge(evidence[0], controls=only).label == "inconclusive"  # asking alone cannot show removal


def test_an_attack_without_shown_power_withholds_removed_before_its_bound_is_certain():
    only = (PositiveControl(kind="lora", recovered_by=("probing",)),)
    evidence = nothing_back()
    evidence[1] = attack("relearning", 0.14, n=120, spread=0.25)
    evidence[0], evidence[2] = attack("asking", 0.0, n=120), attack("probing", 0.0, n=120, noise_seed=2)
    verdict = judge(*evidence, controls=only)
    assert verdict.rows[1].lower < 0.1 < verdict.rows[1].share
    assert verdict.label == "inconclusive"
    assert "no demonstrated power" in verdict.reason


def test_a_twin_that_was_not_edited_alike_cannot_show_removal_but_can_show_hiding():
    verdict = judge(*nothing_back(), alike=False)
    assert verdict.label == "inconclusive"
    assert "not edited like the model" in verdict.reason
    assert any("another tool" in caveat for caveat in verdict.caveats)
    hidden = [attack("relearning", 0.6), *nothing_back()[::2]]
    assert judge(*hidden, alike=False).label == "hidden"


def test_asking_may_recover_a_suppressed_model_but_shows_no_power_to_remove():
    evidence = [attack("asking", 0.6), attack("relearning", 0.6), attack("probing", 0.0)]
    shown = demonstrate_power("lora", evidence, original=ORIGINAL, null_before=NULL)
    assert shown.recovered_by == ("asking", "relearning")
    assert demonstrate_power("lora", evidence, original=ORIGINAL, null_before=NULL, accepted=False).recovered_by == ()
    gate = PositiveControl(kind="format_gate", recovered_by=("asking",))
    assert judge(*nothing_back(), controls=(gate,)).label == "inconclusive"  # asking alone cannot show removal
    assert judge(*nothing_back(), controls=(gate, *RECOVERED)).label == "removed"


def test_a_suppressed_model_that_no_attack_recovers_makes_it_invalid():
    controls = (*RECOVERED, PositiveControl(kind="output_only", recovered_by=()))
    assert judge(*nothing_back(), controls=controls).label == "invalid"
    not_suppressed = (*RECOVERED, PositiveControl(kind="output_only", recovered_by=(), accepted=False))
    verdict = judge(*nothing_back(), controls=not_suppressed)
    assert verdict.label == "removed"
    assert any("not accepted" in caveat for caveat in verdict.caveats)


def test_an_unaccepted_control_shows_no_power():
    control = demonstrate_power(
        "lora", [attack("relearning", 0.9)], original=ORIGINAL, null_before=NULL, accepted=False
    )
    assert control.recovered_by == ()
    assert judge(*nothing_back(), controls=(control,)).label == "inconclusive"


def test_power_is_shown_by_recovering_a_suppressed_model():
    evidence = [attack("relearning", 0.5), attack("probing", 0.0), attack("lens", 0.5, healthy=False)]
    control = demonstrate_power("lora", evidence, original=ORIGINAL, null_before=NULL)
    assert control == PositiveControl(kind="lora", recovered_by=("relearning",))


def test_diagnosing_attacks_are_shown_but_do_not_decide():
    evidence = [*nothing_back(), attack("patching", 0.9, decides=False, healthy=False)]
    verdict = judge(*evidence)
    assert verdict.label == "removed"
    assert verdict.rows[3].share > 0.8
    assert judge(*nothing_back()).rows == verdict.rows[:3]
    with pytest.raises(ValueError, match="only diagnoses"):
        judge(evidence[3])


def test_without_a_twin_removed_is_capped_at_inconclusive_but_hidden_is_not():
    proxy = [replace(e, null=e.null[:100]) for e in nothing_back()]
    verdict = judge(*proxy, null="proxy")
    assert verdict.label == "inconclusive"
    assert verdict.settle is not None
    assert "twin" in verdict.settle
    assert any("no twin" in caveat for caveat in verdict.caveats)
    proxy[1] = replace(attack("relearning", 0.6), null=(NULL,) * 100)
    assert judge(*proxy, null="proxy").label == "hidden"


def test_few_fabricated_facts_widen_the_interval():
    rng = np.random.default_rng(0)
    wide = attack("relearning", 0.05)
    few = judge(replace(wide, null=tuple(rng.random(10))), null="proxy").rows[0]
    many = judge(replace(wide, null=tuple(rng.random(2000))), null="proxy").rows[0]
    assert few.upper - few.lower > 3 * (many.upper - many.lower)


def test_the_same_made_up_facts_under_more_seeds_are_no_more_facts(made_up):
    one, five = (judge(gather_evidence(*made_up(seeds), paired=False), null="proxy").rows[0] for seeds in (1, 5))
    assert len(gather_evidence(*made_up(5), paired=False).null) == 40
    assert five.share - five.lower > 0.8 * (one.share - one.lower)


ORDER = {"removed": 0, "inconclusive": 1, "hidden": 2}


def test_more_recovery_of_any_fact_never_moves_it_towards_removed():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n = int(rng.choice([10, 40, 160]))
        spread = float(rng.choice([0.02, 0.1, 0.3]))
        evidence = attack("relearning", rng.uniform(-0.05, 0.3), n=n, spread=spread, noise_seed=trial)
        raised = np.clip(np.array(evidence.edited) + rng.uniform(0, 0.3, n) * (rng.random(n) < 0.3), 0, 1)
        before, after = judge(evidence), judge(replace(evidence, edited=tuple(raised)))
        assert ORDER[after.label] >= ORDER[before.label]
        assert after.rows[0].lower >= before.rows[0].lower - 1e-12
        assert after.rows[0].upper >= before.rows[0].upper - 1e-12


def test_more_recovery_by_one_of_several_attacks_never_moves_it_towards_removed():
    rng = np.random.default_rng(1)
    for trial in range(40):
        evidence = [
            attack(e.name, rng.uniform(-0.05, 0.25), n=80, spread=0.2, noise_seed=trial + i)
            for i, e in enumerate(nothing_back())
        ]
        which = int(rng.integers(3))
        raised = np.minimum(np.array(evidence[which].edited) + rng.uniform(0, 0.3), 1.0)
        more = [*evidence]
        more[which] = replace(evidence[which], edited=tuple(raised))
        assert ORDER[judge(*more).label] >= ORDER[judge(*evidence).label]


def test_removed_is_claimed_by_mistake_no_more_often_than_stated():
    mistakes = 0
    for trial in range(200):  # a true share exactly at the limit
        evidence = attack("relearning", 0.1, n=100, spread=0.15, noise_seed=trial)
        verdict = decide([evidence], original=ORIGINAL, null_before=NULL, controls=RECOVERED, draws=400)
        mistakes += verdict.label == "removed"
    assert mistakes <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_an_original_that_does_not_know_the_facts_is_invalid():
    verdict = decide(nothing_back(), original=0.12, null_before=0.1, controls=RECOVERED)
    assert verdict.label == "invalid"
    assert "nothing to remove" in verdict.reason


def test_no_data_is_an_error_and_not_a_verdict():
    with pytest.raises(ValueError, match="no attacks"):
        judge()
    with pytest.raises(ValueError, match="no data, no verdict"):
        AttackEvidence(name="asking", facts=(), seeds=(), edited=(), null=())
    with pytest.raises(ValueError, match="no null"):
        AttackEvidence(name="asking", facts=("a",), seeds=(0,), edited=(0.1,), null=())
    with pytest.raises(ValueError, match="allowed: \\[0, 1\\]"):
        AttackEvidence(name="asking", facts=("a",), seeds=(0,), edited=(float("nan"),), null=(0.1,))


def test_attacks_scored_on_different_facts_are_refused():
    with pytest.raises(ValueError, match="different facts"):
        judge(attack("asking", 0.0), attack("relearning", 0.0, n=N - 1))
    with pytest.raises(ValueError, match="repeat"):
        judge(attack("asking", 0.0), attack("asking", 0.0))


def test_a_verdict_survives_writing_and_reading():
    import json

    verdict = judge(*nothing_back())
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_several_seeds_are_counted_and_disagreeing_ones_are_inconclusive():
    low, high = attack("relearning", 0.0), attack("relearning", 0.3)
    both = replace(
        low, facts=low.facts * 2, seeds=(0,) * N + (1,) * N, edited=low.edited + high.edited, null=low.null + high.null
    )
    verdict = judge(both)
    assert verdict.rows[0].n_seeds == 2
    assert verdict.label == "inconclusive"
    assert verdict.settle is not None
    assert "seeds" in verdict.settle
