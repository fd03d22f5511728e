import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from mechunlearn.evaluate.capability import CAPABILITY, capability_rows
from mechunlearn.metrics import candidate_log_probs

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_target: answer
doc_to_choice: options
metric_list:
  - metric: acc
"""
needs = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra; pip install -e '.[lm-eval]'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"question": f"Where is {name} born?", "options": ["Oslo", "Rome", "Lima"], "answer": i % 3}
        for i, name in enumerate(("Bram", "Hilda", "Cora", "Ada", "Ben"))
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    text = TASK.format(name="birthplaces", data=tmp_path / "data.jsonl", kind="multiple_choice")
    (tmp_path / "birthplaces.yaml").write_text(text)
    return tmp_path, questions


@needs
def test_questions_are_scored_as_we_score_them_and_everything_is_left_as_found(tiny_model, folder):
    path, questions = folder
    model = tiny_model("llama")
    before, states = model.sha256, (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    model.hf.train()
    rows = capability_rows(model, "birthplaces", include=str(path))
    assert model.hf.training
    model.hf.eval()
    scored = candidate_log_probs(
        model, [f"Question: {q['question']} Answer:" for q in questions], [tuple(q["options"]) for q in questions]
    )
    assert rows["value"].tolist() == [float(p.argmax() == q["answer"]) for p, q in zip(scored, questions, strict=True)]
    assert rows["subject"].tolist() == [f"birthplaces:{i}" for i in range(5)]
    assert set(rows["part"]) == {CAPABILITY}
    assert model.sha256 == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]  # noqa: NPY002
    assert len(capability_rows(model, "birthplaces", include=str(path), max_questions=2)) == 2


@needs
def test_an_unknown_task_is_one_line(tiny_model, folder):
    with pytest.raises(ValueError, match="got task 'births', allowed") as error:
        capability_rows(tiny_model(), "births", include=str(folder[0]))
    assert "\n" not in str(error.value)


def test_without_the_extra_one_line_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'mechunlearn\[lm-eval\]'"):
        capability_rows(tiny_model(), "sciq")
