"""Question sets by name: where they are, their columns, and how they are asked by those who publish scores on them.

A recipe's `tasks: {gsm8k: 1}` means the set: training draws from its training split and evaluation from its test
split. `path` puts a local file of the same columns in the place of both. Prompts and numbers of examples are those of
the papers, of EleutherAI's lm-evaluation-harness and of the first Open LLM Leaderboard, as each set's note says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from farthing.data.rows import Row
from farthing.recipe import Gold, RewardPart
from farthing.tasks.columns import Unusable
from farthing.tasks.instructions import unchecked
from farthing.tasks.item import Convention

QUESTION_ANSWER = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class NamedSet:
    """One set. Templates are over the columns of a row, and `question`, `answer`, `solution` and `choices` as read."""

    note: str
    """What it is, its paper, and whose prompt and number of examples these are."""
    source: str
    """The questions of an evaluation, on the hub."""
    question: str
    answer: Gold | None
    reward: tuple[RewardPart, ...]
    train: str | None = None
    """Questions to train on, if the set has any."""
    choices: str | None = None
    prompt: str = "{question}"
    shown: str = " {answer}"
    """What follows the prompt in an example."""
    shots: int = 0
    shots_from: str | None = None
    """Where the examples come from; None takes the rows themselves."""
    shots_where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Values of a column that examples must have."""
    shots_like: str | None = None
    """A column in which examples agree with the question."""
    intro: str = ""
    """What stands before the examples."""
    until: tuple[str, ...] = ()
    """Where an answer ends, in a model that goes on to ask the next question."""
    convention: Convention | None = None
    """How answers are given, whatever the stage's `answer` says."""
    likelihood: Literal["letters", "texts"] | None = None
    """Which endings are compared where a model is judged by log-likelihood."""
    context: str = ""
    """What precedes such an ending."""
    prepare: Callable[[Row], Row] | None = None


def _endings(row: Row) -> Row:
    """HellaSwag's row with its context in one column, and without the marks that WikiHow's pages leave in it."""
    try:
        context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        endings = row["endings"]
    except KeyError as missing:
        raise Unusable(f"it has no {missing}") from None
    if not isinstance(endings, list):
        raise Unusable("its 'endings' is no list of texts")
    return {
        **row,
        "context": _without_marks(context),
        "endings": [_without_marks(str(one)) for one in endings],
    }


def _without_marks(text: str) -> str:
    text = re.sub(r"\[[^\[\]]*\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _subject(row: Row) -> Row:
    """MMLU's row with its subject in words."""
    return {**row, "about": str(row.get("subject", "")).replace("_", " ")}


def _checkable(row: Row) -> Row:
    """IFEval's row, if all its instructions can be checked."""
    why = unchecked(row)
    if why:
        raise Unusable(why)
    return row


_BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def _aime(year: int, source: str) -> NamedSet:
    return NamedSet(
        note=f"Thirty problems of the American Invitational Mathematics Examination of {year}, answers from 0 to 999. "
        "No examples; asked in DeepSeek-R1's words (github.com/deepseek-ai/DeepSeek-R1, usage recommendations).",
        source=source,
        question="problem",
        answer=Gold(column="answer"),
        reward=(RewardPart(use="number"),),
        prompt=_BOXED,
        convention="boxed",
    )


def _arc(config: str, shots: int, note: str) -> NamedSet:
    return NamedSet(
        note=f"AI2's science questions of grades 3 to 9 (arXiv:1803.05457), {note}",
        source=f"hf:allenai/ai2_arc/{config}:test",
        train=f"hf:allenai/ai2_arc/{config}:train",
        question="question",
        answer=Gold(column="answerKey"),
        choices="choices",
        reward=(RewardPart(use="choice"),),
        prompt=QUESTION_ANSWER,
        shots=shots,
        shots_from=f"hf:allenai/ai2_arc/{config}:train",
        until=("\nQuestion:",),
        likelihood="texts",
        context=QUESTION_ANSWER,
    )


_CHALLENGE = _arc(
    "ARC-Challenge", 25, "the harder part. 25 examples, as the Open LLM Leaderboard; lm-eval's prompt."
)

SETS: dict[str, NamedSet] = {
    "gsm8k": NamedSet(
        note="Grade-school word problems (arXiv:2110.14168), 7,473 to train on and 1,319 to test. 5 examples with "
        "their solutions, as lm-eval's gsm8k and the Open LLM Leaderboard, without the calculator's notes in them.",
        source="hf:openai/gsm8k/main:test",
        train="hf:openai/gsm8k/main:train",
        question="question",
        answer=Gold(column="answer", after="####"),
        reward=(RewardPart(use="number"),),
        prompt=QUESTION_ANSWER,
        shown=" {solution}\n#### {answer}",
        shots=5,
        shots_from="hf:openai/gsm8k/main:train",
        until=("\nQuestion:",),
    ),
    "math500": NamedSet(
        note="500 problems of MATH's test set (arXiv:2103.03874), chosen for arXiv:2305.20050. No examples; asked in "
        "DeepSeek-R1's words (github.com/deepseek-ai/DeepSeek-R1, usage recommendations).",
        source="hf:HuggingFaceH4/MATH-500:test",
        question="problem",
        answer=Gold(column="answer"),
        reward=(RewardPart(use="math"),),
        prompt=_BOXED,
        convention="boxed",
    ),
    "aime24": _aime(2024, "hf:HuggingFaceH4/aime_2024:train"),
    "aime25": _aime(2025, "hf:math-ai/aime25:test"),
    "arc": _CHALLENGE,
    "arc_challenge": _CHALLENGE,
    "arc_easy": _arc("ARC-Easy", 0, "the easier part. No examples, as lm-eval's arc_easy."),
    "mmlu": NamedSet(
        note="57 subjects, four options each (arXiv:2009.03300). The 5 examples of the question's own subject, in the "
        "words of the paper's code.",
        source="hf:cais/mmlu/all:test",
        question="question",
        answer=Gold(column="answer"),
        choices="choices",
        reward=(RewardPart(use="choice"),),
        prompt="{question}\nAnswer:",
        shots=5,
        shots_from="hf:cais/mmlu/all:dev",
        shots_like="subject",
        intro="The following are multiple choice questions (with answers) about {about}.",
        until=("\n\n",),
        likelihood="letters",
        prepare=_subject,
    ),
    "hellaswag": NamedSet(
        note="The likeliest of four endings (arXiv:1905.07830); the test split has no answers, hence validation. "
        "10 examples, as the Open LLM Leaderboard.",
        source="hf:Rowan/hellaswag:validation",
        train="hf:Rowan/hellaswag:train",
        question="context",
        answer=Gold(column="label"),
        choices="endings",
        reward=(RewardPart(use="choice"),),
        prompt="{question}\nAnswer:",
        shots=10,
        shots_from="hf:Rowan/hellaswag:train",
        until=("\n\n",),
        likelihood="texts",
        context="{context}",
        prepare=_endings,
    ),
    "humaneval": NamedSet(
        note="164 Python functions to complete (arXiv:2107.03374). No examples; the prompt is the function's head.",
        source="hf:openai/openai_humaneval:test",
        question="prompt",
        answer=None,
        reward=(RewardPart(use="code"),),
    ),
    "mbpp": NamedSet(
        note="500 short Python programs to write (arXiv:2108.07732). 3 examples, problems 2, 3 and 4, in the words of "
        "the paper.",
        source="hf:google-research-datasets/mbpp/full:test",
        train="hf:google-research-datasets/mbpp/full:train",
        question="{text}\n\n{test_list}",
        answer=None,
        reward=(RewardPart(use="code"),),
        prompt="You are an expert Python programmer, and here is your task: {text} Your code should pass these "
        "tests:\n\n{test_list}\n[BEGIN]\n",
        shown="{code}\n[DONE]",
        shots=3,
        shots_from="hf:google-research-datasets/mbpp/full:prompt",
        shots_where={"task_id": (2, 3, 4)},
        until=("[DONE]",),
    ),
    "ifeval": NamedSet(
        note="541 requests whose instructions a program can check (arXiv:2311.07911); those on the answer's language "
        "are left out. No examples. An answer is right if it follows every instruction (prompt-level, strict).",
        source="hf:google/IFEval:train",
        question="prompt",
        answer=None,
        reward=(RewardPart(use="ifeval"),),
        prepare=_checkable,
    ),
}
