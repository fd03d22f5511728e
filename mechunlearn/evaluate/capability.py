"""General capability: the questions of a task of lm-evaluation-harness."""

import random
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from mechunlearn.evaluate.results import COLUMNS
from mechunlearn.models import Model

CAPABILITY = "capability"


def capability_rows(
    model: Model,
    task: str,
    *,
    max_questions: Annotated[int | None, Field(ge=1)] = None,
    shots: Annotated[int | None, Field(ge=0)] = None,
    batch_size: Annotated[int, Field(ge=1)] = 8,
    include: str | None = None,
) -> pd.DataFrame:
    """Ask the model the questions of an lm-eval task, as that project asks and scores them.

    Args:
        task: a task or group of lm-eval's ("mmlu", "sciq").
        max_questions: of each of its subtasks, the first ones; None asks all.
        shots: worked examples before each question; None is the task's own number.
        include: folder of tasks of one's own (yaml, in lm-eval's format).

    Returns:
        Rows of an evaluation, one a question: part "capability", the task's and question's number as subject, the
        task as relation, metric "accuracy" (lm-eval's `acc`, 0 or 1), so that models are compared question by question.

    Raises:
        ValueError: lm-eval is not installed, an unknown task, or one that is not scored by `acc`.

    Source: Gao et al., lm-evaluation-harness; MMLU and SciQ in arXiv:2410.12949 (section 4).
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]  # an extra
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"capability {task}: needs lm-eval; pip install 'mechunlearn[lm-eval]'") from None
    manager = TaskManager(include_path=include)
    if task not in manager.all_tasks:
        raise ValueError(f"capability: got task {task!r}, allowed: those of lm-eval (`lm_eval ls tasks`)")
    mode, state = model.hf.training, random.getstate()  # the data sets' library draws from the global one
    try:
        found: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=[task], num_fewshot=shots, limit=max_questions, log_samples=True, bootstrap_iters=0,
            task_manager=manager, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
        )  # fmt: skip
    finally:
        model.hf.train(mode)
        random.setstate(state)
    asked = [(name, sample) for name, samples in found["samples"].items() for sample in samples]
    if any("acc" not in sample for _, sample in asked):
        raise ValueError(f"capability: task {task!r} is not scored by `acc`; give one of single questions with options")
    rows = [
        (CAPABILITY, f"{name}:{sample['doc_id']}", task, "", "prompt", "accuracy", float(sample["acc"]))
        for name, sample in asked
    ]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))
